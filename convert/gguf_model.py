"""A GGUF file through llama.cpp's C API, for verification: its metadata, token ids and the logits of a token sequence."""

import ctypes
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from appliance import device, llama_backends
from appliance.errors import ModelFileError

SPEED_TOKENS, SPEED_ROUNDS = 128, 3
STREAMED_TOKENS = 64  # whose logits are in memory at a time: 39 MB of them at a vocabulary of 152,000


class GgufVocabulary:
    """The tokenizer and the metadata of a file, without its weights; a context manager."""

    def __init__(self, path: Path) -> None:
        self._load(path, is_vocabulary_only=True)

    def _load(self, path: Path, *, is_vocabulary_only: bool) -> None:
        from llama_cpp import llama_cpp as c

        self._c = c
        self._lines: list[str] = []

        @c.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
        def keep(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
            self._lines.append(text.decode(errors="replace").strip())

        self._keep = keep  # llama.cpp holds the pointer only
        c.llama_log_set(keep, ctypes.c_void_p(0))
        llama_backends.load(c)
        c.llama_backend_init()
        settings = c.llama_model_default_params()
        settings.vocab_only = is_vocabulary_only
        self._model = c.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            reason = next((line for line in self._lines if "error" in line.lower()), "llama.cpp gave no reason")
            self._forget_log()
            raise ModelFileError(f"{path} cannot be loaded: {reason}")
        self._vocab = c.llama_model_get_vocab(self._model)
        self.token_count: int = c.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._c.llama_model_free(self._model)
        self._forget_log()

    def _forget_log(self) -> None:
        """llama.cpp must not call what goes with this object."""
        self._c.llama_log_set(self._c.llama_log_callback(), ctypes.c_void_p(0))

    def metadata(self, key: str) -> str | None:
        size = self._c.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self._c.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def special_tokens(self) -> dict[str, str]:
        """The texts of the tokens that a chat template may print by name."""
        named = ((name, self.metadata(f"tokenizer.ggml.{name}_id")) for name in ("bos_token", "eos_token"))
        texts = {name: self._c.llama_vocab_get_text(self._vocab, int(token)) for name, token in named if token is not None}
        return {name: text.decode(errors="replace") for name, text in texts.items()}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of rendered template text: control tokens are recognized, none is added."""
        data = text.encode()
        room = len(data) + 8
        tokens = (self._c.llama_token * room)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), tokens, room, False, True)
        if count < 0:
            raise ModelFileError(f"llama.cpp could not tokenize a text of {len(data)} bytes (code {count}).")
        return list(tokens[:count])

    def is_end(self, token: int) -> bool:
        """Whether generation ends with this token."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether this token stands for itself and has no text in an answer."""
        return bool(self._c.llama_vocab_is_control(self._vocab, token))

    def detokenize(self, tokens: Sequence[int], *, with_control: bool = False) -> str:
        """The text of token ids as a server would send it, piece by piece; control tokens only when asked for.

        Not by `llama_detokenize`, which removes spaces before signs for many vocabularies.
        """
        return b"".join(self._piece(token, with_control) for token in tokens).decode(errors="replace")

    def _piece(self, token: int, with_control: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = self._c.llama_token_to_piece(self._vocab, token, buffer, room, 0, with_control)
            if size >= 0:
                return buffer.raw[:size]
            room = -size


class GgufModel(GgufVocabulary):
    """A loaded model; a context manager. Not for serving: one sequence, all logits kept."""

    def __init__(self, path: Path, context_tokens: int) -> None:
        self._load(path, is_vocabulary_only=False)
        c = self._c
        settings = c.llama_context_default_params()
        settings.n_ctx = context_tokens
        settings.n_batch = settings.n_ubatch = STREAMED_TOKENS
        settings.n_threads = settings.n_threads_batch = device.usable_cores()
        self._context = c.llama_init_from_model(self._model, settings)
        if not self._context:
            super().__exit__()
            raise ModelFileError(f"{path}: no memory for a context of {context_tokens} tokens.")

    def __exit__(self, *_: object) -> None:
        self._c.llama_free(self._context)
        super().__exit__()

    def logits(self, tokens: Sequence[int], first: int = 0) -> Any:
        """Next-token logits `(tokens - first, vocabulary)`, float32, for the positions from `first` on."""
        import numpy

        return numpy.concatenate([rows for _, rows in self.stream(tokens, first)])

    def stream(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, Any]]:
        """The same in pieces: the position of the first row, and rows `(n, vocabulary)` that the caller may keep.

        Raises `ModelFileError` when llama.cpp cannot compute.
        """
        import numpy

        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), STREAMED_TOKENS):
            piece = tokens[start : start + STREAMED_TOKENS]
            wanted = range(max(first - start, 0), len(piece))
            self._decode(piece, start, wanted)
            if wanted:
                rows = [self._row(row) for row in wanted]
                yield start + wanted.start, numpy.stack(rows)

    def greedy(self, prompt: Sequence[int], most: int) -> list[int]:
        """The likeliest next tokens one after another, at most so many; ends after a token that ends generation."""
        *_, (_, rows) = self.stream(prompt, len(prompt) - 1)
        answer = [int(rows[-1].argmax())]
        while len(answer) < most and not self.is_end(answer[-1]):
            self._decode(answer[-1:], len(prompt) + len(answer) - 1, range(1))
            answer.append(int(self._row(0).argmax()))
        return answer

    def speed(self) -> dict[str, float]:
        """Tokens a second on this machine at this moment, reading and writing one text; the median of a few."""
        prompt = [index % self.token_count for index in range(1, SPEED_TOKENS + 1)]
        reading, writing = [], []
        for _ in range(SPEED_ROUNDS):
            started = time.monotonic()
            for _ in self.stream(prompt, len(prompt) - 1):
                pass
            read = time.monotonic()
            for offset in range(SPEED_TOKENS // 4):
                self._decode([1], len(prompt) + offset, range(1))
            reading.append(SPEED_TOKENS / (read - started))
            writing.append(SPEED_TOKENS // 4 / (time.monotonic() - read))
        return {
            "prompt_tokens_per_second": statistics.median(reading),
            "decode_tokens_per_second": statistics.median(writing),
        }

    def _decode(self, tokens: Sequence[int], position: int, wanted: range) -> None:
        c = self._c
        batch = c.llama_batch_init(len(tokens), 0, 1)
        try:
            for row, token in enumerate(tokens):
                batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position + row, 1
                batch.seq_id[row][0] = 0
                batch.logits[row] = row in wanted
            batch.n_tokens = len(tokens)
            if (code := c.llama_decode(self._context, batch)) != 0:
                raise ModelFileError(f"llama.cpp could not compute {len(tokens)} tokens at {position} (code {code}).")
        finally:
            c.llama_batch_free(batch)

    def _row(self, row: int) -> Any:
        import numpy

        pointer = self._c.llama_get_logits_ith(self._context, row)
        return numpy.ctypeslib.as_array(pointer, shape=(self.token_count,)).copy()
