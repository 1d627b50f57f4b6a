"""Weights and vocabulary of one GGUF file, and what the file says about itself. Knows nothing of contexts or requests."""

import ctypes
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as c
from llguidance import LLTokenizer
from numpy.typing import NDArray

from appliance.errors import EngineFailed, ModelFileError, RequestError
from appliance.serving import gguf_file
from appliance.serving.engine_settings import KV_VALUE_BYTES
from appliance.serving.events import ModelKind
from appliance.serving.llama import library

# Control tokens that models use to mark parts of an answer: readers of the answer need to see them.
SPOKEN_CONTROLS = (  # control tokens that belong to the text: calls of tools, and thinking
    *("<think>", "</think>", "[THINK]", "[/THINK]"),
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)

RECENT_PIECES = 4096  # tokens whose bytes are at hand: nearly all of a text's, in less than a megabyte


class Model:
    """A loaded model. Raises `ModelFileError` when it cannot be loaded."""

    def __init__(self, path: Path, *, is_mapped: bool, is_repacked: bool, gpu_layers: int = 0) -> None:
        """`is_repacked` copies weights into the layout that computes fastest, which takes time and, if mapped, memory."""
        self.path = path
        self._header = gguf_file.check(path)
        library.start()
        library.forget_errors()
        params = c.llama_model_default_params()
        params.load_mode = c.LLAMA_LOAD_MODE_MMAP if is_mapped else c.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = is_repacked
        params.n_gpu_layers = gpu_layers
        no_devices = (ctypes.c_void_p * 1)(None)
        if gpu_layers == 0:  # else a GPU's driver would be started, and computing offered to it
            params.devices = ctypes.addressof(no_devices)
        self._model = c.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelFileError(f"{path} cannot be loaded: {library.first_error()}; copy it again or name another model.")
        self._vocab = c.llama_model_get_vocab(self._model)
        has_decoder = c.llama_model_has_decoder(self._model) and not c.llama_model_has_encoder(self._model)
        if not has_decoder or c.llama_model_is_diffusion(self._model):
            self.close()
            raise ModelFileError(f"{path} does not write text token by token; name a model with a decoder only.")
        self._token_count: int = c.llama_vocab_n_tokens(self._vocab)
        self._spoken = self._find_spoken_controls()
        self._recent_piece = functools.lru_cache(RECENT_PIECES)(self._said_piece)

    @property
    def handle(self) -> Any:
        return self._model

    @property
    def vocab(self) -> Any:
        return self._vocab

    @property
    def token_count(self) -> int:
        return self._token_count

    @property
    def header(self) -> gguf_file.GgufHeader:
        return self._header

    @property
    def architecture(self) -> str:
        return self._header.architecture

    @property
    def kind(self) -> ModelKind:
        if self.pooling == "rank":
            return "rerank"
        return "chat" if self.is_causal and self.pooling in (None, "none") else "embedding"

    @property
    def pooling(self) -> gguf_file.PoolingType | None:
        """How the vectors of tokens become one; None where the file does not say."""
        return self._header.pooling_type

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it, so that a text may be computed piece by piece."""
        return self._header.values.get(f"{self.architecture}.attention.causal", True) is not False

    @property
    def can_share(self) -> bool:
        """Whether a part of a sequence can be kept, copied or dropped.

        A recurrent state is of the whole sequence. A sliding window's cells are overwritten once they are out of the
        window of the one sequence that holds them, so a parked sequence would lose its beginning.
        """
        is_stateful = c.llama_model_is_recurrent(self._model) or c.llama_model_is_hybrid(self._model)
        return not is_stateful and c.llama_model_n_swa(self._model) == 0

    @property
    def trained_context_tokens(self) -> int:
        return int(c.llama_model_n_ctx_train(self._model))

    @property
    def embedding_width(self) -> int:
        return int(c.llama_model_n_embd_out(self._model))

    @property
    def quantization(self) -> str:
        """As llama.cpp names it, for example `Q4_K - Medium`."""
        return bytes(c.llama_ftype_name(c.llama_model_ftype(self._model))).decode()

    @property
    def kv_bytes_per_token(self) -> int:
        """With f16 values."""
        header = self._header
        values = sum(header.kv_head_counts) * (header.key_length + header.value_length)
        return int(values * KV_VALUE_BYTES["f16"])

    @functools.cached_property
    def weight_bytes(self) -> int:
        """What is read from memory for each token: not the input embeddings, of which it is one row, nor idle experts."""
        sizes = {tensor.name: tensor.size_bytes for tensor in self._header.tensors}
        if "output.weight" in sizes:
            sizes.pop("token_embd.weight", None)
        experts = sum(size for name, size in sizes.items() if "_exps." in name)
        count, used = (int(self.metadata(f"{self.architecture}.expert_{name}count") or 1) for name in ("", "used_"))
        return sum(sizes.values()) - experts * (count - used) // count

    @property
    def chat_template(self) -> str | None:
        return self.metadata("tokenizer.chat_template")

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256((self.chat_template or "").encode()).hexdigest()

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Texts of the tokens that templates name, where the file has them; llama.cpp would guess."""
        named = ((name, self.metadata(f"tokenizer.ggml.{name}_id")) for name in ("bos_token", "eos_token"))
        return {name: self.token_text(int(token)) for name, token in named if token is not None}

    @functools.cached_property
    def control_texts(self) -> Sequence[str]:
        is_control = [token for token in range(self._token_count) if c.llama_vocab_is_control(self._vocab, token)]
        return tuple(self.token_text(token) for token in is_control)

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        return max(len(c.llama_vocab_get_text(self._vocab, token) or b"") for token in range(self._token_count)) or 1

    @functools.cached_property
    def end_tokens(self) -> NDArray[np.int64]:
        """Ids of the tokens that end an answer: end of sequence, of turn, of message."""
        is_end = c.llama_vocab_is_eog
        return np.array([token for token in range(self._token_count) if is_end(self._vocab, token)], dtype=np.int64)

    @functools.cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(map(int, self.end_tokens))

    def metadata(self, key: str) -> str | None:
        size = 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = c.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.raw[:length].decode(errors="replace")
            size = length + 1

    def token_text(self, token: int) -> str:
        return bytes(c.llama_vocab_get_text(self._vocab, token) or b"").decode(errors="replace")

    def tokenize(self, text: str, *, parse_special: bool, add_special: bool = False) -> list[int]:
        """Token ids; `add_special` adds what this model expects at either end, for example BERT's [CLS] and [SEP]."""
        data = text.encode()
        room = len(data) + 8
        tokens = (c.llama_token * room)()
        count = c.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
        if count < 0:
            raise EngineFailed(f"Tokenizing {len(data)} bytes failed with code {count}.")
        return list(tokens[:count])

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Raises `RequestError` for ids that this model does not have; llama.cpp would end the process."""
        wrong = next((token for token in tokens if not 0 <= token < self._token_count), None)
        if wrong is not None:
            raise RequestError(
                f"{param}: token id {wrong} does not exist; this model's ids are 0 to {self._token_count - 1}.", param=param
            )

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens, but those that mark parts of an answer."""
        return self._recent_piece(token)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        self.check_tokens(tokens, "tokens")
        return b"".join(self._piece(token, is_control_shown=True) for token in tokens).decode(errors="replace")

    def is_end(self, token: int) -> bool:
        return token in self._ends

    def grammar_tokenizer(self) -> LLTokenizer:
        """For llguidance, which thus sees the very bytes that `piece` gives. Takes about a second for 150,000 tokens."""
        texts = [self._said_piece(token) or b"\xff" + self.token_text(token).encode() for token in range(self._token_count)]
        return LLTokenizer.from_llamacpp(
            tokens=texts,  # 0xff marks a control token, which no grammar matches as text
            vocab_ptr=self._vocab,
            tokenize_fptr=ctypes.cast(c._lib.llama_tokenize, ctypes.c_void_p).value,
            eos_token=[int(token) for token in self.end_tokens],
            slices=None,
        )

    def close(self) -> None:
        if self._model:
            c.llama_model_free(self._model)
            self._model = None

    def _find_spoken_controls(self) -> Mapping[int, bytes]:
        found = {}
        for text in SPOKEN_CONTROLS:
            tokens = self.tokenize(text, parse_special=True)
            if len(tokens) == 1 and c.llama_vocab_is_control(self._vocab, tokens[0]):
                found[tokens[0]] = text.encode()
        return found

    def _said_piece(self, token: int) -> bytes:
        return self._spoken.get(token) or self._piece(token, is_control_shown=False)

    def _piece(self, token: int, *, is_control_shown: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = c.llama_token_to_piece(self._vocab, token, buffer, size, 0, is_control_shown)
            if length >= 0:
                return buffer.raw[:length]
            size = -length
