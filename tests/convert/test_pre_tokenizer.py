"""The pre-tokenizer is read off a tokenizer's structure and proved; real vocabularies give llama.cpp's own token lists."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import ModelFileError
from convert import converter, pre_tokenizer, to_gguf
from convert.checkpoint import Checkpoint
from convert.gguf_model import GgufVocabulary
from tests.convert import quick_converter
from tests.convert import tokenizer_files as files

SPLIT = files.split
BY_NAME: dict[str, Callable[[], Any]] = {
    "gpt-2": files.words,
    "smollm": lambda: files.digits_then_words(),
    "falcon": files.falcon_split,
    "dbrx": lambda: SPLIT(pre_tokenizer.LLAMA3),
    "llama-bpe": lambda: SPLIT(pre_tokenizer.LLAMA3),
    "qwen2": lambda: SPLIT(pre_tokenizer.QWEN2),
    "qwen35": lambda: SPLIT(pre_tokenizer.QWEN35),
    "tekken": lambda: SPLIT(pre_tokenizer.TEKKEN),
    "gpt-4o": lambda: SPLIT(pre_tokenizer.GPT4O),
    "deepseek-v3": lambda: files.deepseek_split(),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)


def model(folder: Path, architecture: str = "LlamaForCausalLM", model_type: str = "llama") -> Checkpoint:
    """A model folder of a tokenizer alone: the converter writes what there is."""
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*table["model"]["vocab"].values(), *(each["id"] for each in table["added_tokens"])]
    shape = {"vocab_size": max(ids) + 1, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    more = {"num_key_value_heads": 1, "rms_norm_eps": 1e-5, "intermediate_size": 64, "max_position_embeddings": 64}
    settings = {"architectures": [architecture], "model_type": model_type, **shape, **more}
    (folder / "config.json").write_text(json.dumps(settings))
    return Checkpoint(folder, settings, [], {}, {})


def converted(checkpoint: Checkpoint) -> tuple[Path, str | None]:
    target = checkpoint.folder / "file.gguf"
    return target, to_gguf.convert(checkpoint, pre_tokenizer.load(checkpoint.folder), target, "f16")


def named(checkpoint: Checkpoint, name: str) -> Path:
    """The file with this pre-tokenizer, right or wrong."""
    target = checkpoint.folder / f"{name}.gguf"
    arguments = [str(checkpoint.folder), "--vocab-only", "--outfile", str(target)]
    converter.run(to_gguf.SCRIPT, checkpoint.folder, arguments, target, name)
    return target


def trained(folder: Path, name: str) -> Checkpoint:
    """A tokenizer that splits as `name` says, trained here."""
    options = {"bos": None, "eos": "<|end|>", "cls": "PreTrainedTokenizerFast"}
    files.write_trained(folder, BY_NAME[name], ["<|end|>"], looks_up=name in pre_tokenizer.LOOK_UP_WORDS, **options)
    return model(folder)


def vectors(name: str) -> tuple[list[str], list[list[int]]]:
    """llama.cpp's own test texts, and the ids that the vocabulary's makers give them."""
    texts, ids = (files.source()[f"models/ggml-vocab-{name}.gguf.{kind}"].decode() for kind in ("inp", "out"))
    found = texts.split("\n__ggml_vocab_test__\n")
    return found, [[int(each) for each in line.split()] for line in ids.split("\n")[: len(found)]]


BYTES = {"cls": "PreTrainedTokenizerFast"}
REBUILT: dict[str, tuple[str | None, Callable[[Path], Checkpoint]]] = {}


def rebuilt(name: str, expected: str | None) -> Callable[[Callable[[Path], Checkpoint]], Callable[[Path], Checkpoint]]:
    def keep(write: Callable[[Path], Checkpoint]) -> Callable[[Path], Checkpoint]:
        REBUILT[name] = (expected, write)
        return write

    return keep


@rebuilt("qwen2", "qwen2")
def qwen2(folder: Path, pattern: str = pre_tokenizer.QWEN2) -> Checkpoint:
    way = functools.partial(files.split, pattern)
    files.write_rebuilt(folder, "qwen2", way, bos=None, eos="<|im_end|>", is_nfc=True, **BYTES)
    return model(folder)


@rebuilt("qwen35", "qwen35")
def qwen35(folder: Path) -> Checkpoint:
    way = functools.partial(files.split, pre_tokenizer.QWEN35)
    files.write_rebuilt(folder, "qwen35", way, bos=None, eos="<|im_end|>", **BYTES)  # its own vectors are not composed
    return model(folder)


@rebuilt("llama-bpe", "llama-bpe")
def llama_bpe(folder: Path) -> Checkpoint:
    way = functools.partial(files.split, pre_tokenizer.LLAMA3)
    special = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "looks_up": True}
    files.write_rebuilt(folder, "llama-bpe", way, **special, **BYTES)
    return model(folder)


@rebuilt("gpt-2", "gpt-2")
def gpt_2(folder: Path) -> Checkpoint:
    files.write_rebuilt(folder, "gpt-2", files.words, bos="<|endoftext|>", eos="<|endoftext|>", **BYTES)
    return model(folder)


@rebuilt("falcon", "falcon")
def falcon(folder: Path) -> Checkpoint:
    files.write_rebuilt(folder, "falcon", files.falcon_split, bos=None, eos="<|endoftext|>", **BYTES)
    return model(folder)


@rebuilt("llama-spm", None)
def llama_spm(folder: Path) -> Checkpoint:
    pieces = files.pieces_rebuilt("llama-spm")
    files.write_pieces(folder, pieces, prefix="always", bos="<s>", eos="</s>", cls="PreTrainedTokenizerFast")
    return model(folder)


@rebuilt("phi-3", None)
def phi_3(folder: Path) -> Checkpoint:
    files.write_phi_3(folder)
    return model(folder, "Phi3ForCausalLM", "phi3")


@pytest.mark.parametrize("name", REBUILT)
def test_real_vocabulary(name: str, tmp_path: Path) -> None:
    expected, write = REBUILT[name]
    checkpoint = write(tmp_path)
    file, found = converted(checkpoint)
    assert found == expected
    tokenizer = pre_tokenizer.load(tmp_path)
    texts, ids = vectors(name)
    assert len(texts) == len(ids) >= 47
    with GgufVocabulary(file) as served:
        wrong = [text for text, each in zip(texts, ids, strict=True) if served.tokenize(text) != each]
        other = [
            text
            for text, each in zip(texts, ids, strict=True)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != each
        ]
    assert (wrong, other) == ([], [])


@pytest.mark.parametrize("name", BY_NAME)
def test_every_name_is_proved(name: str, tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, name)
    tokenizer = pre_tokenizer.load(tmp_path)
    assert pre_tokenizer.candidates(pre_tokenizer.table(tokenizer))[0] == name
    file, found = converted(checkpoint)
    assert found == name
    with GgufVocabulary(file) as served:
        assert served.metadata("tokenizer.ggml.pre") == name


def test_the_names_are_those() -> None:
    assert {name for names in pre_tokenizer.NAMES.values() for name in names} == set(BY_NAME)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("llama-bpe", "qwen2"), ("qwen2", "gpt-2"), ("qwen35", "qwen2"), ("tekken", "gpt-2"), ("gpt-4o", "tekken")),
        *(("smollm", "qwen2"), ("falcon", "gpt-2"), ("deepseek-v3", "llama-bpe"), ("gpt-2", "smollm"), ("dbrx", "qwen2")),
    ],
)
def test_wrong_name_is_seen(name: str, wrong: str, tmp_path: Path) -> None:
    checkpoint = trained(tmp_path, name)
    problem = pre_tokenizer.difference(named(checkpoint, wrong), pre_tokenizer.load(tmp_path))
    assert problem is not None
    assert re.search(r".+: \d+ token ids against \d+, first difference at \d+", problem)


def gpt_2_but(folder: Path, word: str) -> Checkpoint:
    """GPT-2's tokenizer, but that a word is split off, wherever it stands."""
    from tokenizers import Regex, pre_tokenizers

    def way() -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(word), behavior="isolated"), files.words()])

    files.write_rebuilt(folder, "gpt-2", way, bos="<|endoftext|>", eos="<|endoftext|>", **BYTES)
    return model(folder)


def test_unknown_structure_of_a_known_hash_is_refused_when_ids_differ(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="Tried: as the converter recognized it"):
        converted(gpt_2_but(tmp_path, "vannacht"))


def test_unknown_structure_of_a_known_hash_is_taken_when_ids_are_the_same(tmp_path: Path) -> None:
    file, name = converted(gpt_2_but(tmp_path, "a word that is nowhere"))
    assert name is None
    with GgufVocabulary(file) as served:
        assert served.metadata("tokenizer.ggml.pre") == "gpt-2"


@pytest.mark.slow
def test_structure_goes_before_the_hash(tmp_path: Path) -> None:
    """Qwen2's vocabulary with Qwen3.5's pattern: it has no token of letters with marks, so its hash says Qwen2."""
    file, name = converted(qwen2(tmp_path, pre_tokenizer.QWEN35))
    assert name == "qwen35"
    theirs = tmp_path / "theirs.gguf"
    converter.run(to_gguf.SCRIPT, tmp_path, [str(tmp_path), "--vocab-only", "--outfile", str(theirs)], theirs)
    with GgufVocabulary(file) as ours, GgufVocabulary(theirs) as recognized:
        assert ours.metadata("tokenizer.ggml.pre") == "qwen35"
        assert recognized.metadata("tokenizer.ggml.pre") == "qwen2"


@pytest.mark.parametrize("name", sorted(pre_tokenizer.PART_MARKS))
def test_marks_are_known_to_be_parted(name: str, tmp_path: Path) -> None:
    """llama.cpp parts letters from marks here: not proved, and nothing else is let through with it."""
    checkpoint = trained(tmp_path, name)
    file, _ = converted(checkpoint)
    tokenizer = pre_tokenizer.load(tmp_path)
    with GgufVocabulary(file) as served:
        assert served.tokenize(files.MARKED) != tokenizer(files.MARKED, add_special_tokens=False)["input_ids"]
        assert pre_tokenizer.parts_marks(served)
        assert "हिन्दी" not in "".join(pre_tokenizer.probe_texts(served, tokenizer))
    with GgufVocabulary(named(checkpoint, "gpt-2")) as served:
        assert "हिन्दी" in "".join(pre_tokenizer.probe_texts(served, tokenizer))
    assert pre_tokenizer.difference(named(checkpoint, "gpt-2"), tokenizer) is not None
