"""Models of real shape: their layouts, how their types are mixed, and that they can be computed with."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.serving import gguf_file
from benchmarks import random_weights, shapes
from benchmarks.shapes import SHAPES, Shape, Vocabulary
from convert import llama_cpp_source
from convert.quantizer import Settings, quantize_file
from tests import tiny_gguf
from tests.serving.llama_decoding import decode, engine_settings

MERGES = tuple(merge for merge in tiny_gguf.MERGES)
VOCABULARY = Vocabulary(tokens=tuple(tiny_gguf.vocabulary()[: 256 + len(MERGES)]), merges=MERGES, template=tiny_gguf.CHATML)
SMALL = Shape(layers=10, hidden=256, feed_forward=512, heads=4, kv_heads=2, head_width=64, vocabulary_tokens=256 + 5 + 40)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_weights_have_mean_0_and_the_deviation_asked_for(kind: str) -> None:
    values = 1 << 20
    pieces = random_weights.pieces(kind, values, 0.05, np.random.Generator(np.random.SFC64(1)))
    weights = dequantize(np.concatenate(list(pieces)), GGMLQuantizationType[kind]).reshape(-1)
    assert len(weights) == values
    assert abs(weights.mean()) < 0.0005
    assert weights.std() == pytest.approx(0.05, rel=0.01)
    assert weights.min() < -0.07
    assert weights.max() > 0.07


def test_pieces_are_as_long_as_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "PIECE_VALUES", 512)
    sizes = [piece.nbytes for piece in random_weights.pieces("Q6_K", 1280, 1.0, np.random.default_rng(1))]
    assert sizes == [420, 420, 210]


def test_types_are_mixed_as_llama_cpp_mixes_them(tmp_path: Path) -> None:
    """Its own quantizer is run on the same model in 16 bits."""
    full = shapes.write(tmp_path / "full.gguf", SMALL, "F16", VOCABULARY)
    for quantization in ("Q4_K_M", "Q4_0", "Q8_0"):
        quantize_file(full, tmp_path / "theirs.gguf", Settings(type=quantization))
        theirs = gguf_file.check(tmp_path / "theirs.gguf")
        ours = gguf_file.check(shapes.write(tmp_path / "ours.gguf", SMALL, quantization, VOCABULARY))
        assert {tensor.name: (tensor.type, tensor.shape) for tensor in ours.tensors} == {
            tensor.name: (tensor.type, tensor.shape) for tensor in theirs.tensors
        }
        assert ours.quantization == theirs.quantization == quantization
    assert [layer for layer in range(28) if shapes.has_more_bits(layer, 28)] == [
        *(0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27)
    ]


@pytest.mark.parametrize("quantization", ["Q4_K_M", "Q4_0", "Q8_0", "F16"])
def test_answers_are_finite_and_vary(tmp_path: Path, quantization: str) -> None:
    from appliance.serving.decoder import Feed
    from appliance.serving.llama import Context, Model
    from appliance.serving.requests import SamplingSettings

    path = shapes.write(tmp_path / "model.gguf", SMALL, quantization, VOCABULARY)
    model = Model(path, is_mapped=True, is_repacked=True)
    assert (model.token_count, model.is_end(256 + 5 + 2)) == (SMALL.vocabulary_tokens, True)
    assert model.tokenize("<|im_start|>use", parse_special=True) == [262, 260]
    context = Context(model, engine_settings(path))
    answers = []
    for prompt in (b"What do dogs eat?", b"Where is a bed?"):
        context.start(0, SamplingSettings(), None, SMALL.vocabulary_tokens)
        pending, position, answer = list(prompt), 0, []
        for _ in range(32):
            sampled = decode(context, [Feed(0, pending, position, is_sampled=True)])[0][0]
            assert np.isfinite([logprob for _, logprob in sampled.top]).all()
            assert sampled.logprob is not None
            assert -5 < sampled.logprob < -0.01, "neither flat nor certain"
            position, pending = position + len(pending), [sampled.token]
            answer.append(sampled.token)
        context.release(0)
        answers.append(answer)
    context.close()
    assert len(set(answers[0])) > 12, "it does not repeat itself"
    assert answers[0] != answers[1]


def test_the_same_file_each_time_and_none_that_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shapes.write(tmp_path / "a.gguf", SMALL, "Q4_0", VOCABULARY).read_bytes()
    assert shapes.write(tmp_path / "b.gguf", SMALL, "Q4_0", VOCABULARY).read_bytes() == first

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_weights, "pieces", fail)
    with pytest.raises(KeyboardInterrupt):
        shapes.write(tmp_path / "c.gguf", SMALL, "Q4_0", VOCABULARY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_written_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path))
    monkeypatch.setattr(shapes, "qwen_vocabulary", lambda: VOCABULARY)
    monkeypatch.setitem(shapes.SHAPES, "small", SMALL)  # type: ignore[arg-type]
    path = shapes.shaped_model("small", "Q4_0")
    assert path == tmp_path / f"benchmarks/qwen3-small-Q4_0-random{shapes.REVISION}.gguf"
    written = path.stat().st_mtime_ns
    assert shapes.shaped_model("small", "Q4_0").stat().st_mtime_ns == written
    with pytest.raises(RecipeError, match=r"no shape 3B in Q4_0; choose one of tiny, 0\.6B"):
        shapes.shaped_model("3B", "Q4_0")


@pytest.mark.parametrize(
    ("shape", "quantization", "megabytes"),
    [("0.6B", "Q4_K_M", 397), ("0.6B", "Q8_0", 639), ("1.7B", "Q8_0", 1834), ("4B", "Q4_K_M", 2497), ("4B", "Q8_0", 4280)],
)
def test_sizes_are_those_of_the_published_files(shape: str, quantization: str, megabytes: int) -> None:
    assert shapes.file_bytes(SHAPES[shape], quantization) / 1e6 == pytest.approx(megabytes, rel=0.005)


def test_the_vocabulary_comes_from_the_source_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path))
    model = shapes.write(tmp_path / "model.gguf", SMALL, "Q4_0", VOCABULARY).read_bytes()
    archive = tmp_path / "sdist.tar.gz"
    monkeypatch.setattr(llama_cpp_source, "ensure_source", lambda: archive)
    files = {shapes.VOCABULARY_FILE: model, "other": b"", shapes.TEMPLATE_FILE: VOCABULARY.template.encode()}
    for kept in (2, 3):
        with tarfile.open(archive, "w:gz") as stream:
            for name, content in list(files.items())[:kept]:
                member = tarfile.TarInfo(f"llama_cpp_python-1/{llama_cpp_source.VENDOR}{name}")
                member.size = len(content)
                stream.addfile(member, io.BytesIO(content))
        if kept == 2:
            with pytest.raises(EnvironmentIncomplete, match=f"has no {shapes.TEMPLATE_FILE}"):
                shapes.qwen_vocabulary()
    found = shapes.qwen_vocabulary()
    assert (tuple(found.tokens), tuple(found.merges)) == (VOCABULARY.tokens, VOCABULARY.merges), "added tokens are left out"
    assert found.template == VOCABULARY.template


def test_a_smaller_vocabulary_keeps_what_it_can_merge() -> None:
    smaller = VOCABULARY.first(258)
    assert (len(smaller.tokens), smaller.merges) == (258, MERGES[:2])
