"""Quantizing: smaller files of the promised type, and words instead of a crash for what is no model."""

import json
from pathlib import Path

import gguf
import pytest

from appliance import artifacts
from convert import quantize as quantizing
from tests.running import Trained, call, run


def types(folder: Path) -> set[str]:
    (file,) = folder.glob("*.gguf")
    return {each.tensor_type.name for each in gguf.GGUFReader(file).tensors if len(each.shape) == 2}


def test_types_and_sizes(trained: Trained) -> None:
    assert types(trained.made["Q8_0"]) == {"Q8_0"}
    assert {"Q4_K", "Q6_K"} <= types(trained.made["Q4_K_M"]) <= {"Q4_K", "Q6_K", "Q5_K", "Q8_0"}
    sizes = [trained.manifest(step)["results"]["size_bytes"] for step in ("gguf", "Q8_0", "Q4_K_M")]
    assert sizes[0] > sizes[1] > sizes[2]
    for step, size in zip(("gguf", "Q8_0", "Q4_K_M"), sizes, strict=True):
        (file,) = trained.made[step].glob("*.gguf")
        assert file.stat().st_size == size


def test_metadata_survives(trained: Trained) -> None:
    full = gguf.GGUFReader(trained.full)
    (file,) = trained.made["Q4_K_M"].glob("*.gguf")
    small = gguf.GGUFReader(file)
    for key in ("tokenizer.chat_template", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.tokens", "qwen3.context_length"):
        ours, theirs = small.get_field(key), full.get_field(key)
        assert ours is not None
        assert theirs is not None
        assert ours.contents() == theirs.contents()


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_0"])
def test_other_types_from_file_or_folder(trained: Trained, root: Path, kind: str) -> None:
    outputs = [
        json.loads(call("convert", "quantize", source, "--type", kind, "--json").stdout)
        for source in (trained.full, trained.made["gguf"])
    ]
    assert outputs[0]["artifact"] == outputs[1]["artifact"]
    assert [each["state"] for each in outputs] == ["made", "unchanged"]
    artifact = artifacts.load(Path(outputs[0]["artifact"]))
    assert artifact.manifest["config"] == {"type": kind}
    assert artifact.manifest["parents"] == [f"gguf/{trained.made['gguf'].name}"]
    assert kind in types(artifact.path)
    assert artifact.path.is_relative_to(root)


@pytest.mark.parametrize("keep", [0, 4, 100, 60_000, 1_000_000])
def test_truncated_file_is_refused_in_words(trained: Trained, root: Path, tmp_path: Path, keep: int) -> None:
    broken = tmp_path / "broken-F16.gguf"
    broken.write_bytes(trained.full.read_bytes()[:keep])
    result = run(root, "convert", "quantize", broken, "--type", "Q8_0")  # a process of its own: llama.cpp might abort
    assert result.returncode == 1, result.stderr
    assert "was not quantized to Q8_0" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(root.rglob("*.gguf"))


def test_no_such_file(root: Path, tmp_path: Path) -> None:
    result = call("convert", "quantize", tmp_path / "no.gguf")
    assert result.exit_code == 1
    assert "does not exist" in result.stderr
    assert not root.exists()


def test_unknown_type_is_a_usage_error(trained: Trained) -> None:
    assert call("convert", "quantize", trained.full, "--type", "Q3").exit_code == 2


def test_types_are_those_of_llama_cpp() -> None:
    from llama_cpp import llama_cpp

    for name, number in quantizing.TYPES.items():
        assert getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}") == number
