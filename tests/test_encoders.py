"""Encoders on ONNX Runtime: the same numbers as PyTorch, without torch, in bounded batches, and words for what is wrong."""

import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from appliance import encoders
from appliance.encoders import BATCH_TOKENS, Encoder, batches
from appliance.errors import ArtifactError, ModelFileError, PromptTooLong, RequestError
from convert.encoder_check import TEXTS
from tests.tiny_encoders import MAX_TOKENS, Exported

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "sentence_transformers", "optimum", "onnx", "llama_cpp"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def embedder(exported: Exported) -> Encoder:
    return Encoder.load(exported.encoder("embedding"), "fp32")


def pytorch(model: Path, texts: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Model, inputs and outputs of one padded batch, as a person would write it with transformers."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    has_head = json.loads((model / "config.json").read_text())["architectures"][0].endswith("ForSequenceClassification")
    loaded = (AutoModelForSequenceClassification if has_head else AutoModel).from_pretrained(model).eval()
    inputs = AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="pt", **options)
    with torch.inference_mode():
        return loaded, inputs, loaded(**inputs)


def mean_pooled(inputs: Any, output: Any) -> Any:
    import torch

    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


class TestAgainstPyTorch:
    # Neither two texts nor 16 tokens, which is what the exporter traced.
    @pytest.mark.parametrize("name", ["embedding", "real"])
    def test_vectors(self, exported: Exported, name: str) -> None:
        encoder = Encoder.load(exported.encoder(name), "fp32")
        prefix = encoder.settings.passage_prefix or ""
        texts = list(TEXTS[:7])
        _, inputs, output = pytorch(exported.model(name), [prefix + text for text in texts])
        found = encoder.embed(texts, "passage")
        assert found.dtype == np.float32
        assert np.abs(found - mean_pooled(inputs, output)).max() < 1e-4
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
        small = Encoder.load(exported.encoder(name)).embed(texts, "passage")
        cosines = (small * found).sum(axis=1)
        assert 0.9 < cosines.min() < 0.999999, "int8 is another file"

    def test_meaning_of_the_real_model(self, exported: Exported) -> None:
        encoder = Encoder.load(exported.encoder("real"))
        query = encoder.embed(["Where can I get something to eat?"], "query")
        near, far = encoder.embed(["Soup is served at noon in the canteen.", "I lost my passport on the train."], "passage")
        assert query[0] @ near > query[0] @ far + 0.2

    def test_scores(self, exported: Exported) -> None:
        import torch

        encoder = Encoder.load(exported.encoder("reranker"), "fp32")
        pairs = [(TEXTS[0], text) for text in TEXTS[1:6]]
        _, _, output = pytorch(exported.model("reranker"), pairs)
        found = encoder.score(TEXTS[0], TEXTS[1:6])
        assert found == pytest.approx(torch.sigmoid(output.logits[:, 0]).tolist(), abs=1e-4)
        assert max(found) - min(found) > 0.01

    @pytest.mark.parametrize(
        ("name", "texts"), [("nli", list(zip(TEXTS[:5], TEXTS[5:10], strict=True))), ("classifier", list(TEXTS[:5]))]
    )
    def test_labels(self, exported: Exported, name: str, texts: list[Any]) -> None:
        encoder = Encoder.load(exported.encoder(name), "fp32")
        model, _, output = pytorch(exported.model(name), texts)
        for found, expected in zip(encoder.classify(texts), output.logits.softmax(dim=1), strict=True):
            named = {model.config.id2label[i].lower(): value for i, value in enumerate(expected.tolist())}
            assert found == pytest.approx(named, abs=1e-4)
            assert sum(found.values()) == pytest.approx(1)

    def test_what_is_cut_is_what_transformers_cuts(
        self, exported: Exported, embedder: Encoder, caplog: pytest.LogCaptureFixture
    ) -> None:
        texts = [" ".join(TEXTS), TEXTS[0], " ".join(TEXTS[:12])]
        with pytest.raises(PromptTooLong, match=rf"Text 1 and 1 more: longer than the {MAX_TOKENS} tokens"):
            embedder.embed(texts, "query")
        with caplog.at_level(logging.WARNING):
            found = embedder.embed(texts, "query", truncate=True)
        assert "event=texts_truncated encoder=" in caplog.text
        assert "texts=2" in caplog.text
        model = exported.model("embedding")
        _, inputs, output = pytorch(model, [f"query: {text}" for text in texts], truncation=True, max_length=MAX_TOKENS)
        assert inputs["input_ids"].shape[1] == MAX_TOKENS
        assert np.abs(found - mean_pooled(inputs, output)).max() < 1e-4


@pytest.mark.parametrize("name", ["embedding", "reranker", "nli", "classifier", "real"])
def test_runs_without_torch(exported: Exported, name: str) -> None:
    folder = exported.encoder(name)
    call = {
        "reranker": "encoder.score(texts[0], texts)",
        "nli": "[[*each.values()] for each in encoder.classify(list(zip(texts, texts[1:])))]",
        "classifier": "[[*each.values()] for each in encoder.classify(texts)]",
    }.get(name, "encoder.embed(texts, 'query').tolist()")
    program = f"""
import json
from pathlib import Path
from appliance.encoders import Encoder
texts = {list(TEXTS[:5])!r}
encoder = Encoder.load(Path({str(folder)!r}), "fp32", threads=1)
print(json.dumps({call}))
"""
    command = [sys.executable, "-c", WITHOUT_TORCH + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    encoder, texts = Encoder.load(folder, "fp32", threads=1), list(TEXTS[:5])
    here = eval(call, {"encoder": encoder, "texts": texts})
    assert np.array(json.loads(done.stdout)) == pytest.approx(np.array(here), abs=1e-6)


def test_the_blocker_blocks() -> None:
    command = [sys.executable, "-c", f"{WITHOUT_TORCH}import torch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "torch was imported" in done.stderr


class TestBatches:
    @given(some.lists(some.integers(1, 9000), max_size=200), some.integers(1, 32))
    def test_hold_each_text_once_within_their_bounds(self, lengths: list[int], most_texts: int) -> None:
        found = list(batches(lengths, most_texts))
        assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
        for batch in found:
            longest = max(lengths[i] for i in batch)
            assert len(batch) <= most_texts
            assert len(batch) == 1 or len(batch) * longest <= BATCH_TOKENS

    def test_results_are_in_the_order_given_whatever_the_batch(
        self, embedder: Encoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = np.concatenate([embedder.embed([text], "passage") for text in TEXTS])
        together = embedder.embed(TEXTS, "passage")
        assert np.abs(alone - together).max() < 1e-5
        monkeypatch.setattr(encoders, "WINDOW_TEXTS", 5)
        monkeypatch.setattr(encoders, "BATCH_TEXTS", {"fp32": 2})
        assert np.abs(alone - embedder.embed(TEXTS, "passage")).max() < 1e-5
        assert np.abs(alone - alone[::-1]).max() > 0.1

    def test_int8_gives_a_text_one_vector_whatever_is_beside_it(self, exported: Exported) -> None:
        encoder = Encoder.load(exported.encoder("real"))
        alone, together = encoder.embed(TEXTS[:1], "passage"), encoder.embed(TEXTS[:6], "passage")
        assert np.array_equal(alone[0], together[0])

    def test_prefixes_differ(self, embedder: Encoder) -> None:
        query, passage = (embedder.embed([TEXTS[0]], kind) for kind in ("query", "passage"))  # type: ignore[arg-type]
        assert np.abs(query - passage).max() > 1e-3
        assert embedder.token_ids(["query: " + TEXTS[0]])[0] != embedder.token_ids([TEXTS[0]])[0]

    def test_nothing_and_empty_texts(self, exported: Exported, embedder: Encoder) -> None:
        assert embedder.embed([], "query").shape == (0, 32)
        assert np.isfinite(embedder.embed([""], "query")).all()
        assert Encoder.load(exported.encoder("reranker")).score("a", []) == []
        assert Encoder.load(exported.encoder("nli")).classify([]) == []


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: [None, (folder / name).write_bytes((folder / name).read_bytes()[:-2000])][0]


def change(**settings: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "encoder.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return apply


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (remove("encoder.json"), "is no encoder"),
            (remove("tokenizer.json"), "tokenizer.json is missing"),
            (remove("model-int8.onnx"), "model-int8.onnx is missing"),
            (cut("model-int8.onnx"), "cannot be opened"),
            (cut("tokenizer.json"), "is no tokenizer"),
            (cut("encoder.json"), "cannot be read"),
            (change(schema=2), "is not of schema 1"),
            (change(kind="oracle", max_tokens=0), "2 problems"),
            (change(pooling="median"), "'median' is not one of"),
            (change(unheard=1), "unknown key"),
        ],
    )
    def test_of_the_files_is_said(
        self, exported: Exported, tmp_path: Path, damage: Callable[[Path], None], said: str
    ) -> None:
        folder = tmp_path / "encoder"
        shutil.copytree(exported.encoder("embedding"), folder)
        (folder / "manifest.json").unlink()
        Encoder.load(folder)
        damage(folder)
        with pytest.raises(ModelFileError, match=said):
            Encoder.load(folder)

    @pytest.mark.parametrize("file", ["model-int8.onnx", "tokenizer.json", "encoder.json"])
    def test_a_file_that_has_changed_since_it_was_verified(self, exported: Exported, tmp_path: Path, file: str) -> None:
        folder = tmp_path / "encoder"
        shutil.copytree(exported.encoder("embedding"), folder)
        (folder / file).write_bytes((folder / file).read_bytes() + b"\n")
        with pytest.raises(ArtifactError, match="has changed since it was made"):
            Encoder.load(folder)

    def test_settings_of_another_model_are_found_when_it_computes(self, exported: Exported, tmp_path: Path) -> None:
        folder = tmp_path / "encoder"
        shutil.copytree(exported.encoder("embedding"), folder)
        (folder / "manifest.json").unlink()
        change(width=31)(folder)
        with pytest.raises(ModelFileError, match=r"gives \(1, \d+, 32\)"):
            Encoder.load(folder).embed(["a"], "query")

    def test_an_encoder_of_another_kind(self, exported: Exported, embedder: Encoder) -> None:
        with pytest.raises(ModelFileError, match="is of kind embedding; this needs reranker"):
            embedder.score("a", ["b"])
        with pytest.raises(ModelFileError, match="this needs nli or classifier"):
            embedder.classify(["a"])
        with pytest.raises(ModelFileError, match="is of kind nli; this needs embedding"):
            Encoder.load(exported.encoder("nli")).embed(["a"], "query")

    def test_a_text_that_is_none(self, embedder: Encoder) -> None:
        with pytest.raises(RequestError, match="no valid Unicode"):
            embedder.embed(["fine", "half of a pair: \ud83d"], "query")
        with pytest.raises(TypeError):
            embedder.embed("one text", "query")
