"""Which of llama.cpp's pre-tokenizers a tokenizer needs: read off its structure, and proved on a text.

The tokenizer is the one that transformers loads, because training used that one: a class named in tokenizer_config.json can
split otherwise than tokenizer.json says. llama.cpp names the ways of splitting a text before byte pairs are merged
(src/llama-vocab.cpp, `llm_tokenizer_bpe`); a name also decides whether whole words are looked up before merging.
`candidates` orders them, and `difference` compares the token ids of both sides.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.errors import ModelFileError
from convert.gguf_model import GgufVocabulary

Table = Mapping[str, Any]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
SIGNS = r" ?[^\s\p{L}\p{N}]+"


def _words(ending: str) -> str:
    """Words whose capitals begin a new one, with what may end them."""
    return rf"{BEFORE_WORD}{UPPER}*{LOWER}+{ending}|{BEFORE_WORD}{UPPER}+{LOWER}*{ending}"


LLAMA3 = rf"{CONTRACTIONS}|{BEFORE_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{SIGNS}[\r\n]*|{WHITESPACE}"
QWEN2 = rf"{CONTRACTIONS}|{BEFORE_WORD}\p{{L}}+|\p{{N}}|{SIGNS}[\r\n]*|{WHITESPACE}"
QWEN35 = rf"{CONTRACTIONS}|{BEFORE_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{WHITESPACE}"
TEKKEN = rf"{_words('')}|\p{{N}}|{SIGNS}[\r\n/]*|{WHITESPACE}"
GPT4O = rf"{_words(CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{SIGNS}[\r\n/]*|{WHITESPACE}"

# How a tokenizer splits, as `structure` writes it: the names under which llama.cpp does so, likely ones first.
NAMES = {
    ("bytes and words",): ("gpt-2",),
    ("digits", "bytes and words"): ("smollm",),
    ("punctuation", "bytes and words", "digit groups", "[0-9][0-9][0-9]"): ("falcon",),
    (LLAMA3, "bytes"): ("dbrx", "llama-bpe"),
    (QWEN2, "bytes"): ("qwen2",),
    (QWEN35, "bytes"): ("qwen35",),
    (TEKKEN, "bytes"): ("tekken",),
    (GPT4O, "bytes"): ("gpt-4o",),
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", "bytes"): ("deepseek-v3",),
}
# What is a word of the vocabulary already is not merged from its bytes under these names.
LOOK_UP_WORDS = {"llama-bpe", "tekken"}
# llama.cpp writes these patterns with letters where the tokenizer has letters and their combining marks (vowel signs of
# Hindi and Thai), so that it parts a letter from its mark.
PART_MARKS = {"tekken", "gpt-4o"}
# Tokenizers that start from characters instead of bytes (SentencePiece): llama.cpp reads them without such a name.
CHARACTERS = "characters"

PROBE = """\
Waar kan ik vannacht slapen? De opvang aan de Tinlepelhof 5 is open van 20:00 tot 8:30; ‘s avonds is er één arts.
I've been told he's there, 'RE you sure? We'Ve a'lL 3 33 333 3333 33333 numbers, 3.14 and 1,000,000.
Gdzie mogę dziś przenocować? Zażółć gęślą jaźń. أين يمكنني النوم الليلة؟ ١٢٣ ﷺ Где я могу переночевать? Ποῦ;
今夜はどこで寝られますか？我想在apple工作1314151天～ 어디에서 잘 수 있나요? កាន់តែពិសេសអាច हिन्दी में १२३ ไทย עברית
🚀 (normal) 😶‍🌫️ (joined) ✅ 🦙🦙 👩‍👩‍👧 e=mc² ½ ™ © \u00a0nbsp\u200bzero \ufffd
\tTabs\t\tand   many    spaces  \n\n\n \n and lines\r\n
def f(x): return {"a": [1, 2], 'b': x**2 - 0x1F}  # ======= !!!!!! ....... ''''''' ```
https://example.org/a-b_c?d=e&f=%20#g user@example.org +31 (0)10 123 45 67 €1.234,56 camelCaseHTTPServer UPPER
"""
CONVERSATION = (
    {"role": "user", "content": "Waar kan ik vannacht slapen?\nI have a dog."},
    {"role": "assistant", "content": "De opvang is open van 20:00 tot 8:30.\n- Bring your dog."},
    {"role": "user", "content": "Dziękuję! 谢谢 👋"},
)


def load(model: Path) -> Any:
    """The tokenizer of a model folder as training loads it; raises `ModelFileError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelFileError(
            f"{model} has no tokenizer that can be loaded ({error}); fetch its tokenizer files again."
        ) from error


def table(tokenizer: Any) -> Table | None:
    """What tokenizer.json would say of it; None for a tokenizer that is written in Python and has no such form."""
    if not tokenizer.is_fast:
        return None
    found: Table = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def token_count(tokenizer: Any) -> int:
    """How many token ids it uses: one more than the largest."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def is_of_characters(found: Table | None) -> bool:
    return found is not None and bool(found["model"].get("byte_fallback"))


def structure(found: Table | None) -> tuple[str, ...]:
    """How a tokenizer splits a text, step by step."""
    if found is None:
        return ()
    return (CHARACTERS,) if is_of_characters(found) else tuple(_steps(found.get("pre_tokenizer") or {}))


def candidates(found: Table | None) -> Sequence[str]:
    """llama.cpp's names for that structure; none where it has no name for it, or needs none."""
    steps = structure(found)
    names = next((names for known, names in NAMES.items() if steps == known or _is_longer(steps, known)), ())
    looks_up = found is not None and bool(found["model"].get("ignore_merges"))
    return sorted(names, key=lambda name: (name in LOOK_UP_WORDS) != looks_up)


def difference(gguf: Path, tokenizer: Any) -> str | None:
    """Where llama.cpp makes other token ids than the model's own tokenizer; None when all are the same.

    Compared are the probe text, and a conversation in the model's own chat template. Raises `ModelFileError` for a template
    that fails.
    """
    with GgufVocabulary(gguf) as served:
        for text in (*probe_texts(served, tokenizer), *renderings(tokenizer)):
            expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if (found := served.tokenize(text)) != expected:
                shown = text.removeprefix(tokenizer.bos_token or "").strip()[:40]
                return f"{shown!r}: {unequal(found, expected)}"
    return None


def probe_texts(served: GgufVocabulary, tokenizer: Any) -> list[str]:
    """The probe text by lines and whole, as it could be served: behind the token that opens a conversation, if there is one.

    No text begins with a space there, which some tokenizers drop and no template writes. Combining marks are left out where
    llama.cpp is known to part them from their letters: whether a data set has any is told by comparing the data set.
    """
    start = tokenizer.bos_token or ""
    text = without_marks(PROBE) if parts_marks(served) else PROBE
    return [start + each.lstrip(" ") for each in (*text.splitlines(keepends=True), text)]


def parts_marks(served: GgufVocabulary) -> bool:
    """Whether llama.cpp is known to split texts with combining marks otherwise than tokenizers of the file's kind do."""
    return served.metadata("tokenizer.ggml.pre") in PART_MARKS


def without_marks(text: str) -> str:
    return "".join(character for character in text if not unicodedata.category(character).startswith("M"))


def renderings(tokenizer: Any) -> list[str]:
    """A plain conversation in the tokenizer's chat template, as it is trained on and as it is served; none without one.

    Raises `ModelFileError` for a template that fails.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return []
    try:
        return [
            tokenizer.apply_chat_template(list(CONVERSATION[:2]), tokenize=False),
            tokenizer.apply_chat_template(list(CONVERSATION), tokenize=False, add_generation_prompt=True),
        ]
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"The chat template of {tokenizer.name_or_path} fails on a plain conversation of two turns ({error});"
            " repair chat_template.jinja, or fetch it again."
        ) from error


def _steps(node: Any) -> list[str]:
    match node:
        case {"type": "Sequence", "pretokenizers": children}:
            return [step for child in children for step in _steps(child)]
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return [pattern.replace("\r", r"\r").replace("\n", r"\n")]
        case {"type": "ByteLevel"}:
            return ["bytes and words" if node.get("use_regex", True) else "bytes"]
        case {"type": "Digits"}:
            return ["digits" if node.get("individual_digits") else "digit groups"]
        case {"type": "Punctuation"}:
            return ["punctuation"]
        case {"type": kind}:
            return [str(kind)]
    return []


def _is_longer(found: Sequence[str], known: Sequence[str]) -> bool:
    """DeepSeek's last pattern is long and varies in its escapes; what comes before it is its own alone."""
    return known[0] == r"\p{N}{1,3}" and found[:2] == known[:2] and found[-1:] == known[-1:]


def unequal(found: Sequence[int], expected: Sequence[int]) -> str:
    """Where llama.cpp's token ids begin to differ, in words."""
    pairs = enumerate(zip(found, expected, strict=False))
    place = next((index for index, (a, b) in pairs if a != b), min(len(found), len(expected)))
    return f"{len(found)} token ids against {len(expected)}, first difference at {place}"
