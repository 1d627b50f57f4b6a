"""An adapter switched on at run time is the merged model, where llama.cpp's script makes it too weak; or it is refused."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from appliance.errors import ModelFileError
from convert import adapter as conversion
from convert import checkpoint
from convert.lora import Adapter
from tests.convert import adapters, families, quick_converter
from tests.convert.test_families import distance, logits, output
from tests.running import call

IDS = list(range(20, 60))
TARGETS = families.LLAMA_TARGETS


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    exact = dataclasses.replace(families.FAMILIES["Llama 3.2"], dtype="float16")  # rounds less than bfloat16
    return families.write_model(exact, tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base's 16-bit file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        quick_converter.install(patch)
        yield output(call("convert", "gguf", base, "--json"))["file"]


def merged(adapter: Path, base: Path) -> Any:
    """Logits of the merged model's 16-bit file."""
    folder = output(call("convert", "merge", adapter, "--base", base, "--json"))["artifact"]
    return logits(output(call("convert", "gguf", folder, "--json"))["file"], IDS)


@pytest.mark.parametrize(
    ("settings", "is_upstream_right"),
    [
        ({}, True),
        ({"use_rslora": True}, False),
        ({"use_rslora": True, "r": 16}, False),
        ({"alpha_pattern": {"q_proj": 64, "down_proj": 2}}, False),
        ({"rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 24}}, True),
        ({"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"o_proj": 40}}, False),
    ],
    ids=["LoRA", "rsLoRA", "rsLoRA of rank 16", "alpha pattern", "rank pattern", "all of them"],
)
def test_switched_on_is_merged(
    base: Path, full: Path, tmp_path: Path, settings: dict[str, Any], is_upstream_right: bool
) -> None:
    adapter = adapters.write(base, tmp_path / "adapter", TARGETS, **settings)
    expected = merged(adapter, base)
    ours = output(call("convert", "adapter", adapter, "--base", base, "--json"))["file"]
    error = distance(logits(full, IDS, ours), expected)
    assert error < 0.02
    theirs = tmp_path / "theirs.gguf"
    conversion.write(
        adapter, adapter, checkpoint.read(base), theirs, "f32"
    )  # llama.cpp's script, given the adapter as it is
    if is_upstream_right:
        assert distance(logits(full, IDS, theirs), expected) == pytest.approx(error)
    else:
        assert distance(logits(full, IDS, theirs), expected) > 100 * error


def test_file_says_what_it_is(base: Path, tmp_path: Path) -> None:
    adapter = adapters.write(base, tmp_path / "adapter", TARGETS, use_rslora=True, r=4, lora_alpha=6)
    made = output(call("convert", "adapter", adapter, "--base", base, "--type", "f16", "--name", "shelter", "--json"))
    assert made["file"].name == "shelter-lora-F16.gguf"
    results = json.loads((made["artifact"] / "manifest.json").read_text())["results"]
    assert results["weights"] == 14
    assert results["alpha"] == pytest.approx(6 * 4**0.5)
    reader = gguf.GGUFReader(made["file"])
    assert {each.tensor_type.name for each in reader.tensors} == {"F16"}
    again = output(call("convert", "adapter", adapter, "--base", base, "--type", "f16", "--name", "shelter", "--json"))
    assert again["state"] == "unchanged"


@pytest.mark.parametrize(
    ("settings", "said", "instead"),
    [
        ({"use_dora": True}, "DoRA scales whole weights", "appliance convert merge"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "it replaces whole tensors, ", "appliance convert merge"),
        ({"target_modules": ["q_proj", "lm_head"]}, "PEFT saved all of that weight beside", "appliance convert merge"),
        ({"init_lora_weights": "pissa_niter_2"}, "it belongs to a changed base", "path_initial_model_for_weight_conversion"),
    ],
    ids=["DoRA", "trained embeddings", "LoRA of the head", "PiSSA"],
)
def test_what_cannot_be_switched_on_is_refused(
    base: Path, root: Path, tmp_path: Path, settings: dict[str, Any], said: str, instead: str
) -> None:
    adapter = adapters.write(base, tmp_path / "adapter", ["q_proj", "v_proj"], **settings)
    result = call("convert", "adapter", adapter, "--base", base)
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert instead in result.stderr
    assert not list(root.rglob("*.gguf"))


def test_adapter_of_another_base_is_refused(base: Path, root: Path, tmp_path: Path) -> None:
    adapter = adapters.write(base, tmp_path / "adapter", ["q_proj"])
    other = families.write_model(families.FAMILIES["Falcon"], tmp_path / "other")
    result = call("convert", "adapter", adapter, "--base", other)
    assert result.exit_code == 1
    first = (
        "model.layers.0.self_attn.q_proj.weight (256, 256), which the base does not have; model.layers.1.self_attn.q_proj"
    )
    assert first in result.stderr
    assert not list(root.rglob("*.gguf"))


def test_weight_that_the_converter_drops_is_told(
    base: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter skips weights that it does not know; here it is given an adapter that lacks one."""
    adapter = adapters.write(base, tmp_path / "adapter", ["q_proj"])
    write = conversion.write_folded

    def short(lora: Adapter, folder: Path) -> float:
        return write(Adapter(dict(list(lora.changes.items())[1:]), {}), folder)

    monkeypatch.setattr(conversion, "write_folded", short)
    result = call("convert", "adapter", adapter, "--base", base)
    assert result.exit_code == 1
    assert "changes 2 weights, and llama.cpp's converter made a file of 1" in result.stderr
    assert not list(root.rglob("*.gguf"))


def test_base_model_under_the_name_of_an_adapter_is_told(full: Path, tmp_path: Path) -> None:
    """What the converter makes of an adapter of Ministral 3, left to itself."""
    with pytest.raises(ModelFileError, match="made a file of 0"):
        conversion.check_whole(full, Adapter({}, {}), tmp_path)
