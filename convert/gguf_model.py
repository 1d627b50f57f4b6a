"""A GGUF file through llama.cpp's C API, for verification: its metadata, token ids and the logits of a token sequence."""

import ctypes
from pathlib import Path
from typing import Any, Self

from appliance import device, llama_backends
from appliance.errors import ModelFileError


class GgufModel:
    """A loaded model; a context manager. Not for serving: one sequence, all logits kept."""

    def __init__(self, path: Path, context_tokens: int) -> None:
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
        self._model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        if not self._model:
            reason = next((line for line in self._lines if "error" in line.lower()), "llama.cpp gave no reason")
            self._forget_log()
            raise ModelFileError(f"{path} cannot be loaded: {reason}")
        self._vocab = c.llama_model_get_vocab(self._model)
        self.token_count: int = c.llama_vocab_n_tokens(self._vocab)
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context_tokens
        settings.n_threads = settings.n_threads_batch = device.usable_cores()
        self._context = c.llama_init_from_model(self._model, settings)
        if not self._context:
            c.llama_model_free(self._model)
            self._forget_log()
            raise ModelFileError(f"{path}: no memory for a context of {context_tokens} tokens.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._c.llama_free(self._context)
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

    def logits(self, tokens: list[int], first: int) -> Any:
        """Next-token logits `(tokens - first, vocabulary)`, float32, for the positions from `first` on."""
        import numpy

        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        batch = c.llama_batch_init(len(tokens), 0, 1)
        try:
            for row, token in enumerate(tokens):
                batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, row, 1
                batch.seq_id[row][0] = 0
                batch.logits[row] = row >= first
            batch.n_tokens = len(tokens)
            if (code := c.llama_decode(self._context, batch)) != 0:
                raise ModelFileError(f"llama.cpp could not compute {len(tokens)} tokens (code {code}).")
            rows = [
                numpy.ctypeslib.as_array(c.llama_get_logits_ith(self._context, row), shape=(self.token_count,)).copy()
                for row in range(first, len(tokens))
            ]
        finally:
            c.llama_batch_free(batch)
        return numpy.stack(rows)
