"""Conversion by the pinned converter: what the file holds, what is refused, what a killed conversion leaves."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from appliance import artifacts
from convert import pre_tokenizer
from tests.convert import quick_converter, small_merge
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


def written(name: str, text: str | None) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).unlink()
        if text is not None:
            (model / name).write_text(text)

    return change


def quantized(model: Path) -> None:
    """As transformers saves a model that bitsandbytes has quantized."""
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(settings))


def cut_short(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)


def one_shard_of_two(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def one_token_more(model: Path) -> None:
    table = json.loads((model / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": len(table["model"]["vocab"]), "content": "<|new|>"})
    (model / "tokenizer.json").write_text(json.dumps(table))


def many_rows_more(model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(5000, tensors[name].shape[1], dtype=tensors[name].dtype)])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vocab_size": len(tensors[name])}))


def another_pattern(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace(r"[^\\r\\n\\p{L}\\p{N}]?\\p{L}+", r"\\p{L}{1,3}"))


UNKNOWN = '{"architectures": ["T5XModel"], "model_type": "t5"}'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (written("config.json", UNKNOWN), "Architecture ['T5XModel'] cannot be converted to GGUF; known are: "),
        (written("config.json", UNKNOWN), "Qwen3ForCausalLM"),
        (written("config.json", "{}"), "Architecture unnamed cannot be converted"),
        (written("config.json", "{"), "is not a JSON object"),
        (written("config.json", None), "has no config.json"),
        (written("tokenizer.json", None), "has no tokenizer that can be loaded"),
        (written("tokenizer.json", '{"model": {}}'), "has no tokenizer that can be loaded"),
        (written("chat_template.jinja", "{{ raise_exception('No, never.') }}"), "(No, never.); repair chat_template.jinja"),
        (written("chat_template.jinja", "{% for message in %}"), "fails on a plain conversation of two turns"),
        (written("chat_template.jinja", "{{ messages[0]['content'] + 1 }}"), "fails on a plain conversation of two turns"),
        (written("model.safetensors", "garbage"), "is no whole safetensors file (7 bytes); fetch it again"),
        (written("model.safetensors", None), "has no .safetensors file"),
        (cut_short, "model.safetensors has 100000 bytes, its header promises "),
        (one_shard_of_two, "lacks model-00002-of-00002.safetensors (1 of 2 shards are missing); fetch the model again"),
        (quantized, "is quantized already (bitsandbytes), which cannot be converted; fetch the 16-bit model"),
        (one_token_more, "rows; tokens were added and the embeddings not resized (resize_token_embeddings)"),
        (many_rows_more, " rows: 5000 more, which no padding explains; the tokenizer is another model's"),
        (another_pattern, "splits texts in a way that llama.cpp has no name for ((?i:'s|'t|'re|'ve|'m|'ll|'d)|"),
    ],
)
def test_unusable_model_is_refused(
    trained: Trained,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    said: str,
) -> None:
    quick_converter.install(monkeypatch)
    model = copied(trained, tmp_path / "model")
    change(model)
    result = call("convert", "gguf", model)
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert not list(root.rglob("*.gguf"))
    assert not list(root.rglob("*.partial"))


def test_wrong_pre_tokenizer_is_refused(
    trained: Trained, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_converter.install(monkeypatch)
    monkeypatch.setattr(pre_tokenizer, "candidates", lambda _table: ["falcon", "gpt-2"])
    result = call("convert", "gguf", copied(trained, tmp_path / "model"))
    assert result.exit_code == 1, result.stderr
    assert "llama.cpp splits texts otherwise than its tokenizer does" in result.stderr
    assert re.search(r"Tried: falcon \(.+first difference at \d+\); gpt-2 \(.+first difference at \d+\)", result.stderr)
    assert not list(root.rglob("*.gguf"))
    assert not list(root.rglob("*.vocabulary"))


def test_second_name_is_taken_when_the_first_is_wrong(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_converter.install(monkeypatch)
    monkeypatch.setattr(pre_tokenizer, "candidates", lambda _table: ["falcon", "qwen2"])
    result = call("convert", "gguf", copied(trained, tmp_path / "model"), "--json")
    assert result.exit_code == 0, result.stderr
    made = artifacts.load(Path(json.loads(result.stdout)["artifact"]))
    assert made.results["pre_tokenizer"] == "qwen2"
    assert [file.suffix for file in made.path.iterdir() if file.name != "manifest.json"] == [".gguf"]
    assert field(gguf.GGUFReader(next(made.path.glob("*.gguf"))), "tokenizer.ggml.pre") == "qwen2"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("has_template", [True, False])
def test_missing_chat_template_is_told(tmp_path: Path, has_template: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)
    base = small_merge.write_base(tmp_path / "base")
    if not has_template:
        (base / "chat_template.jinja").unlink()
    result = call("convert", "gguf", base)
    assert result.exit_code == 0, result.stderr
    assert ("has no chat template" in result.stderr) is not has_template


def test_check_answers_without_converting(trained: Trained, root: Path) -> None:
    result = call("convert", "gguf", trained.made["base"], "--check")
    assert result.exit_code == 0
    assert "(convertible)" in result.stdout
    assert not root.exists()


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
