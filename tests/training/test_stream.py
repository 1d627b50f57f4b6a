"""Layers that are streamed compute what resident ones do: the same gradients to the bit, few layers at a time."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import ModelFileError
from appliance.training import stream
from appliance.training.stream import LayerStream

CPU = torch.device("cpu")
LAYERS = 5


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def base(kind: str = "qwen3", layers: int = LAYERS) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": layers, "head_dim": 16, "vocab_size": 96, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def with_adapters(model: Any, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora).train()


def in_four_bits(model: Any, nested: bool) -> Any:
    """Its linear layers but the head quantized to NF4, as QLoRA loads a model."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            four = Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.float32,
                compress_statistics=nested, quant_type="nf4",
            )  # fmt: skip
            four.load_state_dict(module.state_dict())
            model.set_submodule(name, four.to("cpu"))  # which quantizes
    model.is_loaded_in_4bit = True  # as PEFT asks
    return model


def gradients(model: Any, steps: int = 1, seed: int = 3) -> dict[str, torch.Tensor]:
    """After some micro-batches, by parameter."""
    torch.manual_seed(seed)
    for step in range(steps):
        tokens = torch.arange(2 * 11).reshape(2, 11) * (step + 3) % 96
        model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(gradient.abs().sum() > 0 for gradient in wanted.values())
    assert [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)] == []


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("bits", ["32", "nf4", "nested nf4"])
@pytest.mark.parametrize("keeps_inputs", [True, False])
def test_gradients_are_those_of_the_resident_model(kind: str, bits: str, keeps_inputs: bool) -> None:
    """With dropout, whose random numbers backward must draw again, and over two micro-batches."""
    model = base(kind)
    if bits != "32":
        model = in_four_bits(model, nested=bits == "nested nf4")
    model = with_adapters(model, dropout=0.2)
    streamed = copy.deepcopy(model)
    LayerStream(streamed, CPU, keeps_inputs=keeps_inputs)
    assert_equal(gradients(streamed, steps=2), gradients(model, steps=2))


def test_as_many_layers_as_there_are_slots_take_room_on_the_device() -> None:
    """Seen from outside while layers compute: where the weights of all of them lie."""
    model = with_adapters(base())
    moved = LayerStream(model, CPU)
    weights = [layer.module.mlp.gate_proj.base_layer for layer in moved._layers]
    hosts = [layer.host.untyped_storage().data_ptr() for layer in moved._layers]
    away: list[list[int]] = []
    blocks: set[int] = set()

    def look(*_: Any) -> None:
        places = [each.weight.untyped_storage().data_ptr() for each in weights]
        away.append([index for index, place in enumerate(places) if place != hosts[index]])
        blocks.update(place for index, place in enumerate(places) if place != hosts[index])

    for each in weights:
        each.register_forward_pre_hook(look)
    gradients(model, steps=2)
    forward = [[index] for index in range(LAYERS)]
    assert away == 2 * [*forward, *reversed(forward)]
    assert len(blocks) == stream.SLOTS


def test_moves_what_was_predicted() -> None:
    model = with_adapters(in_four_bits(base(), nested=True))
    moved = LayerStream(model, CPU)
    gradients(model)
    assert moved.counts.bytes_moved == stream.moved_bytes(moved.layer_bytes, first=True)
    moved.reset()
    gradients(model, steps=3)
    assert moved.counts.bytes_moved == stream.moved_bytes(moved.layer_bytes, passes=3)
    assert moved.counts.layers_moved == 3 * 2 * (LAYERS - stream.SLOTS)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.integers(1, 6), passes=st.integers(1, 3))
def test_prediction_holds_for_any_number_of_layers(layers: int, passes: int) -> None:
    model = with_adapters(base(layers=layers))
    moved = LayerStream(model, CPU)
    gradients(model, steps=passes)
    assert moved.counts.bytes_moved == stream.moved_bytes(moved.layer_bytes, passes=passes, first=True)


def test_weights_take_their_bits_on_the_way() -> None:
    """Half a byte for each weight, and an eighth of that for scales at most."""
    model = with_adapters(in_four_bits(base(), nested=True))
    weights = sum(module.in_features * module.out_features for module in stream.decoder_layers(model)[0].modules()
                  if type(module).__name__ == "Linear4bit" and hasattr(module, "base_layer"))  # fmt: skip
    (size, *_) = LayerStream(model, CPU).layer_bytes
    assert weights / 2 < size < weights * 0.75 + 16 * 1024


def test_trains_and_generates_between_steps() -> None:
    """As a run does: steps, an evaluation without gradients, text, steps; the resident model goes the same way."""
    model = with_adapters(in_four_bits(base(), nested=True))
    streamed = copy.deepcopy(model)
    LayerStream(streamed, CPU)
    outputs = []
    for each in (model, streamed):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        tokens = torch.arange(12).reshape(1, 12)
        losses = []
        for _ in range(3):
            loss = each(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                losses.append(each(input_ids=tokens, labels=tokens).loss.item())
            # Not in evaluation mode, in which bitsandbytes rewrites a resident weight for this CPU, and never back.
            text = each.generate(input_ids=tokens[:, :4], max_new_tokens=5, do_sample=False)
        outputs.append((losses, text.tolist()))
    assert outputs[0] == outputs[1]
    assert outputs[0][0][-1] < outputs[0][0][0]


def test_weights_are_whole_while_nothing_computes() -> None:
    model = with_adapters(in_four_bits(base(), nested=True))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    LayerStream(model, CPU)
    gradients(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert [name for name, parameter in before.items() if not torch.equal(parameter, after[name])] == []


def test_frozen_copy_of_an_adapter_stays_and_is_switched() -> None:
    """DPO compares with a copy: the same layers, another adapter, without gradients."""
    model = with_adapters(base())
    model.add_adapter("ref", model.peft_config["default"])
    streamed = copy.deepcopy(model)
    LayerStream(streamed, CPU)
    tokens = torch.arange(12).reshape(1, 12)
    found = []
    for each in (model, streamed):
        each.set_adapter("ref")
        with torch.no_grad():
            reference = each(input_ids=tokens).logits
        each.set_adapter("default")
        found.append((reference, gradients(each)))
    assert torch.equal(found[0][0], found[1][0])
    assert_equal(found[1][1], found[0][1])


def test_model_without_a_list_of_layers_is_refused() -> None:
    model = base()
    model.model.layers = torch.nn.ModuleDict()
    with pytest.raises(ModelFileError, match="Qwen3ForCausalLM has no list of decoder layers"):
        stream.decoder_layers(model)
