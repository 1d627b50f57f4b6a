"""Quantizing: smaller files of the promised type, and words instead of a crash for what is no model."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from appliance import artifacts
from appliance.recipe import Serve
from convert import fitting, quantizer
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

    for name, number in quantizer.TYPES.items():
        prefix = "LLAMA_FTYPE_ALL_" if name == "F32" else "LLAMA_FTYPE_MOSTLY_"
        assert getattr(llama_cpp, prefix + name, number) == number  # the binding lacks the newest
    for name, number in quantizer.TENSOR_TYPES.items():
        assert gguf.GGMLQuantizationType[name] == number


def test_dry_run_names_the_types_that_the_file_gets(trained: Trained) -> None:
    (file,) = trained.made["Q4_K_M"].glob("*.gguf")
    expected = {each.name: each.tensor_type.name for each in gguf.GGUFReader(file).tensors}
    assert quantizer.tensor_types(trained.full, quantizer.Settings(type="Q4_K_M")) == expected


@pytest.mark.usefixtures("root")
def test_several_types_and_one_tensor_apart(trained: Trained) -> None:
    arguments = ("--type", "Q4_K_M", "--type", "Q8_0", "--tensor", "token_embd=q8_0", "--json")
    output = json.loads(call("convert", "quantize", trained.full, *arguments).stdout)
    assert [each["type"] for each in output["made"]] == ["Q4_K_M", "Q8_0"]
    found = {each.name: each.tensor_type.name for each in gguf.GGUFReader(Path(output["made"][0]["file"])).tensors}
    assert found["token_embd.weight"] == "Q8_0"
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    manifest = artifacts.load(Path(output["made"][0]["artifact"])).manifest
    assert manifest["config"] == {"type": "Q4_K_M", "tensors": [["token_embd", "Q8_0"]]}


@pytest.mark.parametrize("given", ["token_embd", "=Q8_0", "token_embd=Q9", "token_embd(=Q8_0"])
def test_a_bad_tensor_type_is_a_usage_error(trained: Trained, root: Path, given: str) -> None:
    assert call("convert", "quantize", trained.full, "--tensor", given).exit_code == 2
    assert not root.exists()


@pytest.mark.usefixtures("root")
def test_every_type_makes_a_file_that_loads(trained: Trained, tmp_path: Path) -> None:
    from convert.gguf_model import GgufModel

    means = {name: [1.0] * width for name, width in input_widths(trained.full).items()}
    importance = {name: np.array(each, dtype=np.float32) for name, each in means.items()}
    for kind in quantizer.TYPES:
        target = tmp_path / f"{kind}.gguf"
        quantizer.quantize_file(trained.full, target, quantizer.Settings(type=kind, imatrix=importance))
        with GgufModel(target, context_tokens=64) as model:
            assert np.isfinite(model.logits([1, 2, 3], 0)).all(), kind


def input_widths(file: Path) -> dict[str, int]:
    return {each.name: int(each.shape[0]) for each in gguf.GGUFReader(file).tensors if len(each.shape) == 2}


@pytest.mark.usefixtures("root")
def test_best_type_for_a_memory(trained: Trained) -> None:
    """What is chosen is predicted from the types alone, and the prediction is the file that comes out."""
    settings = ("--serve", '{"context_tokens": 256, "slots": 1, "cache_tokens": 0}')
    machine = fitting.machine_with(1 << 40)
    serve = Serve(context_tokens=256, slots=1, cache_tokens=0)
    chosen = []
    for kind in ("Q8_0", "Q4_K_M"):
        would_be = fitting.with_types(
            fitting.read(trained.full), quantizer.tensor_types(trained.full, quantizer.Settings(type=kind))
        )
        needed = fitting.fit(trained.full, would_be, serve, machine).needed_bytes
        assert needed is not None
        memory = (needed >> 10) + 65 * 1024 - 960  # with what is kept for the rest of so small a machine, and a little
        result = call("convert", "quantize", trained.full, "--for-memory", f"{memory}KiB", *settings, "--json")
        assert result.exit_code == 0, result.stderr
        output = json.loads(result.stdout)
        chosen.append(output["type"])
        file = Path(output["file"])
        if output["type"] == kind:
            assert abs(file.stat().st_size - would_be.size_bytes) < 4096
            assert fitting.fit(file, fitting.read(file), serve, machine).needed_bytes == pytest.approx(needed, rel=0.001)
    assert chosen[0] == "Q8_0"
    assert quantizer.NAMES.index(chosen[1]) > quantizer.NAMES.index("Q8_0")
    result = call("convert", "quantize", trained.full, "--for-memory", "80MiB", *settings)
    assert result.exit_code == 3
    assert "No type fits" in result.stderr
    assert call("convert", "quantize", trained.full, "--for-memory", "much").exit_code == 2
