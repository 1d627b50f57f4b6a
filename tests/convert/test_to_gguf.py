"""Conversion by the pinned converter: what the file holds, what is refused, what a killed conversion leaves."""

import json
import shutil
import signal
from pathlib import Path

import gguf
import pytest

from appliance import artifacts
from convert import to_gguf
from tests.running import Trained, call, kill_when, start


def field(reader: gguf.GGUFReader, key: str) -> object:
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


def copied(trained: Trained, folder: Path) -> Path:
    shutil.copytree(trained.made["merge"], folder, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


def test_file_holds_the_model(trained: Trained) -> None:
    reader = gguf.GGUFReader(trained.full)
    tokenizer = json.loads((trained.made["merge"] / "tokenizer.json").read_text())
    assert field(reader, "general.architecture") == "qwen3"
    assert field(reader, "tokenizer.ggml.pre") == "qwen2"
    assert field(reader, "tokenizer.chat_template") == (trained.made["merge"] / "chat_template.jinja").read_text()
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert set(tokenizer["model"]["vocab"]) <= set(tokens)
    assert tokens[field(reader, "tokenizer.ggml.eos_token_id")] == "<|im_end|>"  # type: ignore[call-overload]
    assert trained.manifest("gguf")["results"]["pre_tokenizer"] == "qwen2"
    matrices = {each.tensor_type.name for each in reader.tensors if len(each.shape) == 2}
    assert matrices == {"F16"}


def test_weights_are_those_of_the_merged_model(trained: Trained) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    weights = load_file(trained.made["merge"] / "model.safetensors")
    tensors = {each.name: each.data for each in gguf.GGUFReader(trained.full).tensors}
    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("attn_q", "self_attn.q_proj"), ("attn_norm", "input_layernorm")):
        expected = weights[f"model.layers.1.{ours}.weight"]
        found = tensors[f"blk.1.{theirs}.weight"]
        np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "config.json",
            '{"architectures": ["T5XModel"], "model_type": "t5"}',
            "Architecture ['T5XModel'] cannot be converted",
        ),
        ("config.json", "{}", "Architecture unnamed cannot be converted"),
        ("config.json", "{", "is not a JSON object"),
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, "was not converted"),
        ("model.safetensors", "garbage", "was not converted"),
    ],
)
def test_unusable_model_is_refused(
    trained: Trained, root: Path, tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    model = copied(trained, tmp_path / "model")
    (model / name).unlink()
    if text is not None:
        (model / name).write_text(text)
    result = call("convert", "gguf", model)
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert not list(root.rglob("*.gguf"))
    assert not list(root.rglob("*.partial"))


def test_check_answers_without_converting(trained: Trained, root: Path) -> None:
    result = call("convert", "gguf", trained.made["base"], "--check")
    assert result.exit_code == 0
    assert "(convertible)" in result.stdout
    assert not root.exists()


def test_split_pattern_names_the_pre_tokenizer(trained: Trained, tmp_path: Path) -> None:
    model = copied(trained, tmp_path / "model")
    assert to_gguf.pre_tokenizer(model) == "qwen2"
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace("?=", "?!").replace(r"\\p{L}+", r"\\p{L}{1,9}"))
    assert to_gguf.pre_tokenizer(model) is None
    path.unlink()
    assert to_gguf.pre_tokenizer(model) is None


def test_killed_conversion_starts_afresh(trained: Trained, root: Path) -> None:
    arguments = ("convert", "gguf", trained.made["merge"], "--name", "tiny")
    process = start(root, *arguments)
    assert kill_when(process, lambda: bool(list(root.glob("gguf/*.partial"))), signal.SIGKILL) == -signal.SIGKILL
    (partial,) = root.glob("gguf/*.partial")
    (partial / "half.gguf").write_bytes(b"GGUF")
    (partial / "tiny-F16.gguf").write_bytes(b"GGUF and garbage")
    assert not list(root.glob("gguf/*/manifest.json"))
    again = call(*arguments, "--json")
    assert again.exit_code == 0, again.stderr
    made = artifacts.load(Path(json.loads(again.stdout)["artifact"]))
    assert list(made.manifest["files"]) == ["tiny-F16.gguf"]
    assert made.manifest["files"] == trained.manifest("gguf")["files"]  # the same bytes as the uninterrupted run's
    assert not partial.exists()


def test_changed_input_is_refused(trained: Trained, root: Path) -> None:
    trained.copy(root, "merge")
    merged = root / trained.made["merge"].relative_to(trained.root)
    with (merged / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\0\0\0\1")
    result = call("convert", "gguf", merged)
    assert result.exit_code == 1
    assert "has changed since it was made" in result.stderr
    assert not list(root.rglob("*.gguf"))


def test_full_disk(trained: Trained, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    result = call("convert", "gguf", trained.made["merge"])
    assert result.exit_code == 3
    assert "The GGUF file needs" in result.stderr
    assert not root.exists()
