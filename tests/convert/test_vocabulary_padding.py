"""Embeddings with more rows than there are tokens, as most published models have them, stay whole to the end."""

import json
from pathlib import Path

import gguf
import pytest

from convert.gguf_model import GgufModel
from tests.convert import quick_converter, small_merge
from tests.convert.small_merge import make_adapter, merged
from tests.convert.test_families import output
from tests.running import call

PADDING = 64


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)


def test_padding_survives(root: Path, tmp_path: Path) -> None:
    import numpy as np

    base = small_merge.write_base(tmp_path / "base")
    tokens = len(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"])
    model = small_merge.load(base)
    rows = model.config.vocab_size + PADDING
    model.resize_token_embeddings(rows)
    model.save_pretrained(base)
    make_adapter(base, tmp_path / "adapter")
    folder = merged(root, tmp_path / "adapter", base)
    full = output(call("convert", "gguf", folder, "--json"))["file"]
    small = output(call("convert", "quantize", full, "--type", "Q8_0", "--json"))["file"]
    for file in (full, small):
        reader = gguf.GGUFReader(file)
        listed = reader.get_field("tokenizer.ggml.tokens")
        assert listed is not None
        assert len(listed.contents()) == rows > tokens
        (embeddings,) = [each for each in reader.tensors if each.name == "token_embd.weight"]
        assert embeddings.shape[1] == rows
        with GgufModel(file, context_tokens=64) as served:
            found = served.logits(range(3, 20))
            assert found.shape == (17, rows)
            assert np.isfinite(found).all()
