"""An adapter that was trained on four bits is merged in the way that stays closer to what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts
from convert import nf4
from convert.lora import read_adapter
from convert.mapped_model import FileWeights, MappedModel
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
