"""An adapter that was trained on four bits is merged in the way that stays closer to what was trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance import artifacts
from convert import nf4, pre_tokenizer
from convert.divergence import Answer
from convert.lora import read_adapter
from convert.mapped_model import FileWeights, MappedModel
from convert.merge import _texts
from tests.convert import small_merge
from tests.convert.test_merge import load, logits, make_adapter
from tests.running import Trained, call


@pytest.fixture
def base(trained: Trained) -> Path:
    return trained.made["base"]


def live(base: Path, adapter: Path) -> Any:
    """The model as PEFT and bitsandbytes train it: transformers' own 4-bit loading, and the adapter on top."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32, device_map="cpu")
    return PeftModel.from_pretrained(model, adapter).eval()


def test_live_weights_are_those_of_training(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", use_rslora=True)
    adapter = read_adapter(tmp_path / "adapter")
    settings = nf4.as_trained(MappedModel(base))
    weights = nf4.MergedWeights(FileWeights(MappedModel(base).checkpoint), adapter, settings, is_rounded=False)
    found = MappedModel(base, weights).logits(list(range(3, 43)))
    expected = logits(live(base, tmp_path / "adapter"))[0].numpy()
    without = logits(load(base))[0].numpy()
    assert abs(found - expected).max() < 0.02 * abs(found - without).max()


def test_four_bits_of_gpt2_are_those_of_training(tmp_path: Path) -> None:
    """Its matrices are stored (in, out); training turns them before it quantizes: other values share a scale."""
    import torch
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

    torch.manual_seed(3)
    shape = GPT2Config(vocab_size=300, n_embd=128, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    double = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    trained_on = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=double, device_map="cpu")
    weight = trained_on.transformer.h[0].attn.c_attn.weight
    expected = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    model = MappedModel(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    found = nf4.widened(FileWeights(model.checkpoint).tensor(name), name, nf4.as_trained(model))
    assert found.shape == (128, 384)
    torch.testing.assert_close(found.T, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("root")
def test_the_closer_way_is_taken_and_told(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    result = call("convert", "merge", tmp_path / "adapter", "--base", base, "--trained-on", "nf4", "--json")
    assert result.exit_code == 0, result.stderr
    made = artifacts.load(Path(json.loads(result.stdout)["artifact"]))
    distances = made.results["kl_to_trained"]
    assert distances["round trip"] < distances["16-bit"]
    assert made.results["merged_into"] == "round trip"
    assert "taken: round trip" in result.stderr
    expected = logits(live(base, tmp_path / "adapter"))
    plain = json.loads(call("convert", "merge", tmp_path / "adapter", "--base", base, "--json").stdout)
    closer = (logits(load(made.path)) - expected).abs().mean()
    farther = (logits(load(Path(plain["artifact"]))) - expected).abs().mean()
    assert closer < 0.5 * farther


def test_sixteen_bits_are_taken_where_they_are_closer(base: Path, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(nf4, "divergences", lambda *_: {"16-bit": 0.1, "round trip": 0.2})
    arguments = ("convert", "merge", tmp_path / "adapter", "--base", base, "--json")
    made = [Path(json.loads(call(*arguments, *more).stdout)["artifact"]) for more in (("--trained-on", "nf4"), ())]
    assert made[0] != made[1]
    assert artifacts.load(made[0]).results["merged_into"] == "16-bit"
    assert (made[0] / "model.safetensors").read_bytes() == (made[1] / "model.safetensors").read_bytes()
    assert len(list(root.glob("merged/*/manifest.json"))) == 2


def test_every_matrix_is_quantized_once_however_many_texts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(base, tmp_path / "adapter")
    model, adapter = MappedModel(base), read_adapter(tmp_path / "adapter")
    settings = nf4.as_trained(model)
    seen: list[str] = []
    real = nf4.widened

    def counted(weight: Any, name: str, four: Any) -> Any:
        seen.append(name) if four is not None and name in four.covered else None
        return real(weight, name, four)

    monkeypatch.setattr(nf4, "widened", counted)
    texts = [Answer(list(range(3, 3 + count)), 1) for count in (40, 7, 100)]
    found = nf4.divergences(base, adapter, settings, texts)
    assert len(seen) == 2 * len(settings.covered)  # as trained, and for the round trip
    assert found["round trip"] < found["16-bit"]


def test_divergence_in_pieces_is_that_of_whole_arrays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = MappedModel(base)
    texts = [Answer(list(range(3, 64)), 1), Answer(list(range(5, 36)), 11)]
    logits_of = [model.logits(text.tokens)[text.start - 1 : -1] for text in texts]
    whole = torch.cat([torch.from_numpy(each) for each in logits_of])
    rows = nf4.sampled_logits(model, texts)
    torch.testing.assert_close(rows, whole, rtol=1e-3, atol=1e-4)
    other = whole + torch.linspace(-1, 1, whole.shape[1])
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(other, -1), torch.log_softmax(whole, -1), log_target=True, reduction="sum"
    )
    monkeypatch.setattr(nf4, "ROWS_AT_ONCE", 32)
    assert nf4.kl(whole, other) == pytest.approx(float(expected), rel=1e-4)
    monkeypatch.setattr(nf4, "MOST_ROWS", 30)  # every third of 80 positions
    torch.testing.assert_close(nf4.sampled_logits(model, texts), rows[::3])


def test_texts_are_cut_around_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is cut at its beginning: what is compared is how answers go on."""
    long, short = Answer(range(5000), 3000), Answer(range(5000, 5020), 5)
    assert nf4.bounded([long, short]) == [Answer(range(2488, 3512), 512), short]
    monkeypatch.setattr(nf4, "MOST_IN_ALL", 2000)
    assert nf4.bounded([long, short]) == [Answer(range(2488, 3512), 512)]


def test_answers_behind_long_prompts_are_compared(tmp_path: Path) -> None:
    folder = small_merge.write_base(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    messages = [("system", "Wees kort. " * 200), ("user", "Waar?"), ("assistant", "Hier."), ("user", "Ja?")]
    table = {"messages": [{"role": role, "content": content} for role, content in messages]}
    rows.write_text(json.dumps(table) + "\n")
    (text,) = nf4.bounded(_texts(folder, rows))
    assert "Hier." in pre_tokenizer.load(folder).decode(text.tokens[text.start :])
    assert "Hier." not in pre_tokenizer.load(folder).decode(text.tokens[: text.start])
    assert text.start > 100


@pytest.mark.parametrize("is_rounded", [False, True])
def test_lora_of_embeddings_is_computed_with(tmp_path: Path, is_rounded: bool) -> None:
    import torch

    folder = small_merge.write_base(tmp_path / "base")
    untied = small_merge.copied_untied(folder, tmp_path / "untied")
    model = make_adapter(untied, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    for name, value in model.named_parameters():
        if "lora_embedding" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    files = FileWeights(MappedModel(untied).checkpoint)
    found = MappedModel(untied, nf4.MergedWeights(files, adapter, None, is_rounded=is_rounded))
    np.testing.assert_allclose(found.logits(list(range(3, 43))), logits(model)[0].numpy(), rtol=1e-3, atol=1e-3)
