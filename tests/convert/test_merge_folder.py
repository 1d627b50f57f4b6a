"""What lies beside the weights of a merged model: the base's, the adapter's, and nothing that was not merged."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.convert import small_merge
from tests.convert.small_merge import edit_json, make_adapter, merged


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_merge.write_base(tmp_path_factory.mktemp("models") / "base")


FOREIGN = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5", "model.onnx"),
    *("model.onnx_data", "flax_model.msgpack", "consolidated.00.pth", "rust_model.ot", "base-Q8_0.gguf", "64.tflite"),
    *("consolidated.safetensors", "optimizer.pt"),
)


def test_weights_in_other_formats_stay_where_they_are(base: Path, root: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    shutil.copytree(base, snapshot)
    for name in (*FOREIGN, "vocab.json", "LICENSE.txt", "tokenizer.tiktoken"):
        (snapshot / name).write_text("{}")
    make_adapter(base, tmp_path / "adapter")
    made = {each.name for each in merged(root, tmp_path / "adapter", snapshot).iterdir()}
    assert made.isdisjoint(FOREIGN)
    assert {"model.safetensors", "vocab.json", "LICENSE.txt", "tokenizer.tiktoken", "manifest.json"} <= made


@pytest.mark.parametrize(
    ("own", "settings", "expected"),
    [
        ([], None, "the base's"),
        (["tokenizer_config.json"], None, "the base's"),
        (["tokenizer_config.json"], {"chat_template": "its own"}, "its own"),
        (["tokenizer_config.json", "chat_template.jinja"], None, "its own"),
    ],
    ids=["tokenizer", "and settings", "template among settings", "all"],
)
@pytest.mark.parametrize("is_among_settings", [False, True], ids=["file", "among settings"])
def test_what_the_adapter_lacks_is_the_bases(
    base: Path, root: Path, tmp_path: Path, own: list[str], settings: Any, expected: str, is_among_settings: bool
) -> None:
    from transformers import AutoTokenizer

    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base, folder)
    make_adapter(base, adapter)
    for name in ("tokenizer.json", *own):
        shutil.copy(base / name, adapter)
    (folder / "chat_template.jinja").write_text("the base's")
    if is_among_settings:
        (folder / "chat_template.jinja").unlink()
        edit_json(folder / "tokenizer_config.json", chat_template="the base's")
    if "chat_template.jinja" in own:
        (adapter / "chat_template.jinja").write_text("its own")
    if "tokenizer_config.json" in own:
        edit_json(adapter / "tokenizer_config.json", **(settings or {}), model_max_length=7)
    found = AutoTokenizer.from_pretrained(merged(root, adapter, folder))
    assert found.chat_template == expected
    assert (found.model_max_length == 7) is ("tokenizer_config.json" in own)
