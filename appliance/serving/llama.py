"""llama.cpp through its C API: loading a model, its vocabulary, and a context that decodes several sequences together.

The only file of this package that imports llama_cpp, and the only one that uses llama.cpp's names. `Model` may be used
from several threads (its vocabulary is constant); `Context` belongs to one. Knows nothing of queues or templates.
"""

import ctypes
import functools
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as c

from appliance.errors import EngineFailed, EnvironmentIncomplete, ModelFileError
from appliance.serving import gguf_file
from appliance.serving.engine import SamplingSettings
from appliance.serving.scheduler import IDLE_CHUNK_TOKENS, Feed

LOG_WARNING, LOG_ERROR = 3, 4  # ggml.h; llama_cpp's own `_logger.py` has them wrong
DECODE_ABORTED = 2
SEEDS = 0xFFFFFFFF  # llama.cpp takes this very number for "any seed"

_log_tail: deque[str] = deque(maxlen=4)


@c.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _keep_errors(level: int, text: bytes | None, _: object) -> None:
    if level in (LOG_WARNING, LOG_ERROR) and text:
        _log_tail.append(text.decode(errors="replace").strip())


@functools.cache
def _start_backend() -> None:
    """Once per process: logging into `_log_tail`, and the CPU variants of a portable build."""
    c.llama_log_set(_keep_errors, ctypes.c_void_p(0))
    folder = Path(c.__file__).parent / "lib"
    if any(folder.glob("libggml-cpu-*.so")):  # a build with run-time dispatch has no backend until it is told where
        c._lib.ggml_backend_load_all_from_path(str(folder).encode())
    c.llama_backend_init()


def _last_error() -> str:
    return _log_tail[-1] if _log_tail else "llama.cpp gives no reason"


class Model:
    """Weights and vocabulary of one GGUF file. Raises `ModelFileError` when it cannot be loaded."""

    def __init__(self, path: Path, *, repack: bool = True) -> None:
        """`repack=False` loads faster, without copying weights into the layout that computes fastest."""
        gguf_file.check(path)
        _start_backend()
        _log_tail.clear()
        params = c.llama_model_default_params()
        params.use_extra_bufts = repack
        self._model = c.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            reason = _log_tail[0] if _log_tail else _last_error()
            raise ModelFileError(f"{path} cannot be loaded: {reason}; copy it again or name another model.")
        self._vocab = c.llama_model_get_vocab(self._model)
        if c.llama_model_has_encoder(self._model) or not c.llama_model_has_decoder(self._model):
            self.close()
            raise ModelFileError(f"{path} is no text generator; name a model with a decoder only.")
        self._token_count: int = c.llama_vocab_n_tokens(self._vocab)

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
    def trained_context_tokens(self) -> int:
        return int(c.llama_model_n_ctx_train(self._model))

    @property
    def quantization(self) -> str:
        """As llama.cpp names it, for example `Q4_K - Medium`."""
        return bytes(c.llama_ftype_name(c.llama_model_ftype(self._model))).decode()

    @property
    def chat_template(self) -> str | None:
        return self.metadata("tokenizer.chat_template")

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

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids without any token added at either end."""
        data = text.encode()
        room = len(data) + 8
        tokens = (c.llama_token * room)()
        count = c.llama_tokenize(self._vocab, data, len(data), tokens, room, False, parse_special)
        if count < 0:
            raise EngineFailed(f"Tokenizing {len(data)} bytes failed with code {count}.")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = c.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer: end of sequence, of turn, of message."""
        return bool(c.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        if self._model:
            c.llama_model_free(self._model)
            self._model = None


class Context:
    """The working memory of `slots` sequences of `context_tokens` each; the `Decoder` of the scheduler. Owns the model.

    One cache is shared by all sequences, so that a batch may mix decode tokens and prompt chunks of any length.
    """

    def __init__(self, model: Model, *, slots: int, context_tokens: int, threads: int) -> None:
        self._model = model
        self.slots, self.context_tokens = slots, context_tokens
        batch_tokens = slots + IDLE_CHUNK_TOKENS
        params = c.llama_context_default_params()
        params.n_ctx = slots * context_tokens
        params.n_batch = params.n_ubatch = batch_tokens
        params.n_seq_max = params.n_outputs_max = slots  # logits of one token per sequence, not of a whole batch
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = c.llama_init_from_model(model.handle, params)
        if not self._context:
            raise EnvironmentIncomplete(
                f"No memory for {slots} requests of {context_tokens} tokens: {_last_error()}; "
                "lower --slots or --context-tokens."
            )
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(batch_tokens, 0, 1)
        self._samplers: dict[int, Any] = {}
        self._abort_flag, self._abort_callback = _native_flag()
        c.llama_set_abort_callback(self._context, self._abort_callback, ctypes.addressof(self._abort_flag))

    def start(self, slot: int, sampling: SamplingSettings) -> None:
        self._samplers[slot] = _sampler_chain(sampling, self._model.token_count, self.context_tokens)

    def decode(self, feeds: Sequence[Feed]) -> Mapping[int, int] | None:
        """Computes one batch; the sampled token by slot, or None when aborted. Raises `EngineFailed`."""
        self._abort_flag[0] = b"\0"
        rows = self._fill_batch(feeds)
        code = c.llama_decode(self._context, self._batch)
        if code == DECODE_ABORTED:
            return None
        if code != 0:
            raise EngineFailed(f"llama.cpp could not compute the batch (code {code}: {_last_error()}).")
        return {slot: int(c.llama_sampler_sample(self._samplers[slot], self._context, row)) for slot, row in rows}

    def release(self, slot: int) -> None:
        c.llama_memory_seq_rm(self._memory, slot, -1, -1)
        if (chain := self._samplers.pop(slot, None)) is not None:
            c.llama_sampler_free(chain)

    def clear(self) -> None:
        c.llama_memory_clear(self._memory, True)

    def abort(self) -> None:
        self._abort_flag[0] = b"\1"

    def piece(self, token: int) -> bytes:
        return self._model.piece(token)

    def is_end(self, token: int) -> bool:
        return self._model.is_end(token)

    def close(self) -> None:
        """Frees the context and the model."""
        for slot in list(self._samplers):
            self.release(slot)
        c.llama_batch_free(self._batch)
        c.llama_free(self._context)
        self._model.close()

    def _fill_batch(self, feeds: Sequence[Feed]) -> list[tuple[int, int]]:
        """Writes the batch; returns (slot, row) of every token whose successor is to be sampled."""
        batch, row, rows = self._batch, 0, []
        for feed in feeds:
            for offset, token in enumerate(feed.tokens):
                batch.token[row] = token
                batch.pos[row] = feed.position + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = feed.slot
                batch.logits[row] = False
                row += 1
            if feed.is_sampled:
                batch.logits[row - 1] = True
                rows.append((feed.slot, row - 1))
        batch.n_tokens = row
        return rows


def _native_flag() -> tuple[Any, Any]:
    """A flag, and a C function that reads it: `strlen` is 0 while the first byte is NUL.

    llama.cpp asks after every node of the graph, hundreds of times a token; a Python callback would have to take the
    interpreter's lock each time.
    """
    flag = ctypes.create_string_buffer(2)
    return flag, ctypes.cast(ctypes.CDLL(None).strlen, c.ggml_abort_callback)


def _sampler_chain(sampling: SamplingSettings, token_count: int, context_tokens: int) -> Any:
    chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties = (1.0, sampling.frequency_penalty, sampling.presence_penalty)
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_penalties(token_count, context_tokens, *penalties))
    if sampling.temperature == 0.0:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_greedy())
        return chain
    if sampling.top_k > 0:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1.0:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0.0:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_min_p(sampling.min_p, 1))
    c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(sampling.temperature))
    seed = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed % SEEDS
    c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(seed))
    return chain
