"""Texts of a known number of tokens for a model, drawn with a fixed seed, that no server has seen before.

Each word is one token of the model's own vocabulary, with the space before it, so words can be counted instead of tokens. A
text is named by a label: the same label gives the same text in every run and for every server.
"""

import ctypes
import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path

from appliance import llama_backends
from appliance.errors import ModelFileError

SEED = 20250601
FEWEST_WORDS = 64
WORD = re.compile(r" [a-z]{2,}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Words of one token, and the tokens that end an answer."""

    words: Sequence[str]
    end_tokens: Sequence[int]

    def text(self, label: str, tokens: int) -> str:
        drawn = random.Random(f"{SEED} {label}").choices(self.words, k=tokens)
        return "".join(drawn).lstrip()

    def user(self, label: str, tokens: int) -> list[dict[str, str]]:
        """A conversation of one message; the chat template adds some tokens."""
        return [{"role": "user", "content": self.text(label, tokens)}]

    def with_system(self, system: str, system_tokens: int, label: str, tokens: int) -> list[dict[str, str]]:
        """The same behind a system prompt, which is named by a label of its own."""
        return [{"role": "system", "content": self.text(system, system_tokens)}, *self.user(label, tokens)]


def read(model: Path) -> Prompts:
    """Reads the vocabulary of a GGUF file, no weights. Raises `ModelFileError` when it has too few plain words."""
    from llama_cpp import llama_cpp as c

    @c.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def ignore(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
        pass

    c.llama_log_set(ignore, ctypes.c_void_p(0))
    llama_backends.load(c)
    parameters = c.llama_model_default_params()
    parameters.vocab_only = True
    loaded = c.llama_model_load_from_file(str(model).encode(), parameters)
    c.llama_log_set(c.llama_log_callback(), ctypes.c_void_p(0))  # `ignore` goes with this function
    if not loaded:
        raise ModelFileError(f"{model} cannot be read by llama.cpp; copy it again or name another model.")
    try:
        vocabulary = c.llama_model_get_vocab(loaded)
        tokens = range(c.llama_vocab_n_tokens(vocabulary))
        buffer = ctypes.create_string_buffer(256)
        words: list[str] = []
        for token in tokens:
            length = c.llama_token_to_piece(vocabulary, token, buffer, len(buffer), 0, False)
            piece = buffer.raw[: max(0, length)].decode(errors="replace")
            if WORD.fullmatch(piece):
                words.append(piece)
        ends = [token for token in tokens if c.llama_vocab_is_eog(vocabulary, token)]
    finally:
        c.llama_model_free(loaded)
    if len(words) < FEWEST_WORDS:
        raise ModelFileError(
            f"{model} has {len(words)} words of one token, and prompts are made of at least {FEWEST_WORDS}; "
            "name a model with a larger vocabulary."
        )
    return Prompts(words=words, end_tokens=ends)
