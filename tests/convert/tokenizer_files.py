"""Tokenizer files of the families: rebuilt from the vocabularies in llama.cpp's source, or trained on the spot.

A byte-level tokenizer is a tokenizer.json; one of characters (SentencePiece) also a tokenizer.model, as on the hub.
"""

import functools
import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from convert import llama_cpp_source, pre_tokenizer

ROOT = Path(__file__).parents[2]
TOKENS = 1200  # of a vocabulary that is trained here, special tokens not counted
MARKED = "हिन्दी में लिखना। मैं आज रात कहाँ सो सकता हूँ? ที่นี่เปิดกี่โมง"  # letters with combining marks
# The first two are special in DeepSeek's tokenizers, the others are not.
DEEPSEEK_SPECIAL = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
)
TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]", "[ARGS]"),
)


@functools.cache
def texts() -> tuple[str, ...]:
    """What tokenizers are trained on: the sample conversations of the shelter recipe, and the probe text."""
    path = ROOT / "recipes" / "shelter" / "sft.jsonl"
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return (*(message["content"] for row in rows for message in row), *[pre_tokenizer.PROBE] * 3, *[MARKED] * 20)


def split(pattern: str) -> Any:
    """The pre-tokenizer of most byte-level vocabularies: a regular expression, then bytes."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def words() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def falcon_split() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            words(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )


def digits_then_words() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words()])


def deepseek_split() -> Any:
    from tokenizers import Regex, pre_tokenizers

    signs = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
    words_of = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rest = rf"{signs}[A-Za-z]+|{words_of}| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    steps = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", rest)
    splits = [pre_tokenizers.Split(Regex(step), behavior="isolated") for step in steps]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_trained(
    folder: Path,
    way: Callable[[], Any],
    special: Sequence[str],
    *,
    bos: str | None,
    eos: str,
    cls: str,
    looks_up: bool = False,
    is_nfc: bool = False,
    special_first: bool = False,
    ordinary: Sequence[str] = (),
) -> None:
    """Trains a byte-level tokenizer that splits in this way, and writes its files; `ordinary` are not special in them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = way()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS + len(special) * special_first,
        special_tokens=list(special) if special_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    options: dict[str, Any] = {"bos": bos, "eos": eos, "cls": cls, "looks_up": looks_up, "is_nfc": is_nfc}
    write_byte_level(folder, tokenizer, special, ordinary=ordinary, **options)


def write_rebuilt(
    folder: Path,
    name: str,
    way: Callable[[], Any],
    *,
    bos: str | None,
    eos: str,
    cls: str,
    looks_up: bool = False,
    is_nfc: bool = False,
    merges_kept: int | None = None,
) -> None:
    """Writes the byte-level tokenizer of one of llama.cpp's vocabularies, whole or with its first merges alone."""
    from tokenizers import Tokenizer, models

    tokens, merges, _, types = vocabulary(name)
    pairs = [tuple(merge.split(" ")) for merge in merges[:merges_kept]]
    unused = set() if merges_kept is None else {"".join(merge.split(" ")) for merge in merges[merges_kept:]}
    unused -= {text for pair in pairs for text in (*pair, "".join(pair))}  # some are made in more than one way
    kept = [
        (text, kind)
        for text, kind in zip(tokens, types, strict=True)
        if text not in unused and kind != gguf.TokenType.UNUSED
    ]
    special = [text for text, kind in kept if kind != gguf.TokenType.NORMAL]
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, (text, _) in enumerate(kept)}, merges=pairs))
    tokenizer.pre_tokenizer = way()
    write_byte_level(folder, tokenizer, special, bos=bos, eos=eos, cls=cls, looks_up=looks_up, is_nfc=is_nfc)


def write_byte_level(
    folder: Path,
    tokenizer: Any,
    special: Sequence[str],
    *,
    bos: str | None,
    eos: str,
    cls: str,
    looks_up: bool,
    is_nfc: bool,
    ordinary: Sequence[str] = (),
) -> None:
    from tokenizers import AddedToken, decoders, normalizers, processors

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.model.ignore_merges = looks_up
    if is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    for token in special:  # one by one, in the order of their ids
        add = tokenizer.add_tokens if token in ordinary else tokenizer.add_special_tokens
        add([AddedToken(token, special=token not in ordinary, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_settings(folder, tokenizer, {"tokenizer_class": cls, "bos_token": bos, "eos_token": eos})


def write_settings(folder: Path, tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """tokenizer_config.json as the hub has it: with the added tokens, which transformers 5 leaves out."""
    table = json.loads(tokenizer.to_str())
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(each["id"]): {key: each[key] for key in keys} for each in table["added_tokens"]}
    whole = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, "model_max_length": 1024, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")


def pieces_trained(*, control: Sequence[str] = (), own: Sequence[str] = (), gemma: bool = False) -> bytes:
    """A SentencePiece model of byte pairs, trained here."""
    import sentencepiece

    model = io.BytesIO()
    ids = (
        {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"}
        if gemma
        else {"pad_id": -1}
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts() for line in text.splitlines() if line.strip()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENS + 256,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.995,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        control_symbols=list(control),
        user_defined_symbols=list(own),
        num_threads=1,
        minloglevel=2,
        **ids,
    )
    return model.getvalue()


def pieces_rebuilt(name: str, merged: int | None = None) -> bytes:
    """The SentencePiece model of one of llama.cpp's vocabularies, without the tokens that were added to it.

    Whole, or with all its characters and the first of the pieces that are merged from them.
    """
    from sentencepiece import sentencepiece_model_pb2 as form

    tokens, _, scores, types = vocabulary(name)
    kept = list(zip(tokens, scores, types, strict=True))[:SPM_TOKENS]
    if merged is not None:
        kept = [*kept[: SPM_BYTES + merged], *(each for each in kept[SPM_BYTES + merged :] if len(each[0]) == 1)]
    proto = form.ModelProto()
    kinds = {"<unk>": proto.SentencePiece.UNKNOWN, "<s>": proto.SentencePiece.CONTROL, "</s>": proto.SentencePiece.CONTROL}
    for text, score, kind in kept:
        proto.pieces.add(piece=text, score=score, type=kinds.get(text, kind))  # both formats number the kinds alike
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    content: bytes = proto.SerializeToString()
    return content


def write_pieces(
    folder: Path,
    pieces: bytes,
    *,
    prefix: str,
    bos: str,
    eos: str,
    cls: str,
    added: Sequence[str] = (),
    drops_space: Sequence[str] = (),
    **settings: Any,
) -> None:
    """A tokenizer of characters: tokenizer.model, and the tokenizer.json that transformers makes of such a one.

    `prefix` is how a space gets before a text: "always" by the normalizer, "first" before the first text alone, "never".
    Some of the `added` tokens may drop the white space behind them.
    """
    from sentencepiece import sentencepiece_model_pb2 as form
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    proto = form.ModelProto.FromString(pieces)
    kinds = form.ModelProto.SentencePiece
    shown = [each.piece for each in proto.pieces if each.type == kinds.USER_DEFINED]
    special = [each.piece for each in proto.pieces if each.type in (kinds.UNKNOWN, kinds.CONTROL)]
    special += [text for text in shown if text.endswith("_of_turn>")]  # Gemma's; its tokenizer.json has them as special
    own = [text for text in shown if text not in special]
    vocab = {each.piece: index for index, each in enumerate(proto.pieces)}
    spaces = {text for text in own if not text.strip("▁")}  # a tokenizer.json finds these only by merging
    scores = {each.piece: each.score for each in proto.pieces if each.type == kinds.NORMAL or each.piece in spaces}
    merges = generate_merges(vocab, scores, skip_tokens=[*special, *(text for text in own if text not in spaces)])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    decoded = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix == "always" else replace
    tokenizer.decoder = decoders.Sequence([*decoded, *([] if prefix == "never" else [decoders.Strip(" ", 1, 0)])])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=text in drops_space) for text in (*special, *added)]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in own])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").write_bytes(pieces)
    write_settings(
        folder, tokenizer, {"tokenizer_class": cls, "bos_token": bos, "eos_token": eos, "unk_token": "<unk>", **settings}
    )


@functools.cache
def source() -> Mapping[str, bytes]:
    """All files of vocabularies in llama.cpp's source that the tests use; one pass over the archive."""
    names = [f"models/ggml-vocab-{name}.gguf" for name in VOCABULARIES]
    return llama_cpp_source.read_source(*names, *(f"{name}.{kind}" for name in names for kind in ("inp", "out")))


SPM_TOKENS, SPM_BYTES = 32000, 259  # Llama 2's, special tokens and bytes first; Phi-3 has added to them
VOCABULARIES = ("qwen2", "qwen35", "llama-bpe", "gpt-2", "phi-3", "llama-spm", "falcon")


@functools.cache
def vocabulary(name: str) -> tuple[list[str], list[str], list[float], list[int]]:
    """Tokens, merges, scores and types of one of llama.cpp's vocabularies."""
    fields = _metadata(source()[f"models/ggml-vocab-{name}.gguf"])
    tokens, merges, scores, types = (
        fields.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "merges", "scores", "token_type")
    )
    return tokens, merges, scores, types


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


def _metadata(content: bytes) -> dict[str, Any]:
    """The metadata of a GGUF file; the library's reader takes ten seconds for a vocabulary of 150,000 tokens."""
    place = 4 + 4 + 8

    def number(form: str) -> Any:
        nonlocal place
        place += struct.calcsize(form)
        return struct.unpack_from("<" + form, content, place - struct.calcsize(form))[0]

    def text() -> str:
        nonlocal place
        size = number("Q")
        place += size
        return content[place - size : place].decode()

    def value(kind: int) -> Any:
        if kind == ARRAY:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return text() if kind == TEXT else number(NUMBERS[kind])

    return {text(): value(number("I")) for _ in range(number("Q"))}


def write_phi_3(folder: Path) -> None:
    """Phi-3's real tokenizer: Llama 2's with tokens for turns, which drop the white space behind them."""
    added = [text for text in vocabulary("phi-3")[0][SPM_TOKENS:] if not text.startswith("[PAD")]
    options = {"bos": "<s>", "eos": "<|endoftext|>", "cls": "LlamaTokenizer", "legacy": False}
    write_pieces(folder, pieces_rebuilt("phi-3"), prefix="always", added=added, drops_space=["</s>", *added[1:]], **options)
