"""Loading GGUF files with the real llama.cpp: vocabularies, kinds of models, and files that are none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.errors import ModelFileError, RequestError
from appliance.serving.llama import Model
from tests import tiny_gguf
from tests.serving.llama_decoding import open_model

ENDS_TURN = "<|im_end|>"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    model = open_model(path)
    yield model
    model.close()


def test_vocabulary(model: Model) -> None:
    assert model.special_tokens == {"eos_token": ENDS_TURN}
    assert set(model.control_texts) == set(tiny_gguf.SPECIALS)
    ends = model.tokenize(ENDS_TURN, parse_special=True)
    assert len(ends) == 1
    assert model.is_end(ends[0])
    assert model.piece(ends[0]) == b""
    assert model.detokenize([*model.tokenize("é", parse_special=False), *ends]) == "é" + ENDS_TURN
    for text in ("the use of é 😀\n\n", ENDS_TURN, ""):
        plain = model.tokenize(text, parse_special=False)
        assert b"".join(map(model.piece, plain)).decode() == text
        assert not any(map(model.is_end, plain))


def test_facts(model: Model, path: Path) -> None:
    assert (model.kind, model.architecture, model.quantization) == ("chat", "qwen3", "all F32")
    assert model.can_share
    assert model.kv_bytes_per_token == tiny_gguf.LAYERS * tiny_gguf.KV_HEADS * tiny_gguf.HEAD_WIDTH * 2 * 2
    embeddings = len(tiny_gguf.vocabulary()) * tiny_gguf.HIDDEN * 4
    assert path.stat().st_size - embeddings - 10_000 < model.weight_bytes < path.stat().st_size - embeddings
    assert model.chat_template == tiny_gguf.CHATML
    assert len(model.template_sha256) == 64


def test_control_tokens_that_mark_parts_of_an_answer_are_spoken(tmp_path: Path) -> None:
    model = open_model(tiny_gguf.write(tmp_path / "thinking.gguf", controls=("<think>", "</think>", "<|secret|>")))
    thinking, thought, secret = (model.tokenize(text, parse_special=True) for text in ("<think>", "</think>", "<|secret|>"))
    assert [model.piece(tokens[0]) for tokens in (thinking, thought, secret)] == [b"<think>", b"</think>", b""]
    model.close()


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_token_that_does_not_exist_is_a_request_error(model: Model, wrong: int) -> None:
    for refused in (lambda: model.check_tokens([1, wrong], "prompt"), lambda: model.detokenize([wrong])):
        with pytest.raises(RequestError, match=f"token id {wrong} does not exist; this model's ids are 0 to 263"):
            refused()


def test_kinds(tmp_path: Path) -> None:
    for is_causal in (False, True):
        embedding = open_model(tiny_gguf.write_embedding(tmp_path / "e.gguf", is_causal=is_causal))
        reranker = open_model(tiny_gguf.write_reranker(tmp_path / "r.gguf", is_causal=is_causal))
        assert (embedding.kind, embedding.embedding_width) == ("embedding", tiny_gguf.HIDDEN)
        assert reranker.kind == "rerank"
        assert embedding.is_causal == reranker.is_causal == is_causal
        embedding.close()
        reranker.close()


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"PK\x03\x04 no model at all")
    for file, said in ((tmp_path / "none.gguf", "does not exist"), (foreign, "GGUF"), (tmp_path, str(tmp_path))):
        with pytest.raises(ModelFileError, match=said):
            open_model(file)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.005, 0.01, 0.02, 0.03, 0.3, 0.9, 0.9999])
def test_truncated_file_is_refused_in_words(path: Path, tmp_path: Path, share: float) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelFileError, match=str(cut)):
        open_model(cut)


def test_damaged_header_never_ends_the_process(path: Path, tmp_path: Path) -> None:
    whole = bytearray(path.read_bytes())
    damaged = tmp_path / "damaged.gguf"
    for at in (4, 8, 12, 16, 24, 32):
        copy = bytearray(whole)
        copy[at : at + 4] = b"\xff\xff\xff\x7f"
        damaged.write_bytes(copy)
        with pytest.raises(ModelFileError):
            open_model(damaged)
