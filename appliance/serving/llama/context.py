"""The working memory of a chat model: many sequences that are decoded together. Implements `Decoder`; owns its model.

Each slot has a KV memory of its own (a "stream"): in one that all share, attention passes over the cells of every other
answer, which costs a tenth with eight short answers and a third with eight long ones. llama.cpp computes streams with
neighbouring numbers together, as many tokens of each as all of them have, so that feeds are given to it in order. Memory
that cannot be moved (a recurrent state, a sliding window) is shared, because gaps could not be closed there. Flash attention
is always on: without it, every cell of the memory costs as much in each decode as one that is attended to.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as c

from appliance.errors import EngineFailed, EnvironmentIncomplete, ModelFileError
from appliance.serving import gguf_file
from appliance.serving.decoder import (
    MAX_DRAFT_TOKENS,
    Adapter,
    CompiledGrammar,
    Feed,
    Sampled,
    SavedCells,
    SavedPart,
    SnapshotRefused,
    batch_drafts,
    batch_tokens,
)
from appliance.serving.engine_settings import KV_VALUE_BYTES, EngineSettings
from appliance.serving.grammar import CompiledGrammar as LlguidanceGrammar
from appliance.serving.grammar import GrammarCompiler
from appliance.serving.llama import library, rope, sampler, saved_cells
from appliance.serving.llama.batch import Batch
from appliance.serving.llama.model import Model
from appliance.serving.llama.sampler import Candidates, SlotSampler
from appliance.serving.requests import Grammar, SamplingSettings
from appliance.serving.sampling import Logits

TILE_ROWS = 64  # ggml_fa_tile_config::Q
PROBE_TEXT = "Each passage is read once, wherever it stands in a prompt: its keys are moved there."


class Context:
    """See `Decoder`. Raises `EnvironmentIncomplete` without memory, `ModelFileError` for an adapter that does not fit."""

    def __init__(self, model: Model, settings: EngineSettings) -> None:
        self._model = model
        self.slots, self.context_tokens = settings.slots, settings.context_tokens
        self.can_share = model.can_share
        is_drafting = self.can_share and settings.is_speculating
        self._drafts = batch_drafts(self.slots) if is_drafting else 0
        self._threads = (settings.threads_decode, settings.threads_prefill)
        self._kv_type = library.KV_TYPES[settings.kv_type]
        self._context = c.llama_init_from_model(model.handle, self._params(settings))
        if not self._context:
            raise EnvironmentIncomplete(
                f"No memory for {self.slots} requests of {self.context_tokens} tokens: {library.last_error()}; "
                "lower --slots, --context-tokens or --cache-tokens."
            )
        self._memory = c.llama_get_memory(self._context)
        self._batch = Batch(c.llama_n_batch(self._context))
        self._abort_flag = library.AbortFlag()
        self._abort_flag.watch(self._context)
        self._samplers: dict[int, SlotSampler] = {}
        self._candidates = Candidates(model.token_count)
        self._grammars = GrammarCompiler(model.grammar_tokenizer, model.end_tokens)
        self._is_on_gpu = settings.gpu_layers > 0
        self._rows: dict[int, Logits] = {}  # by address
        values = KV_VALUE_BYTES
        self.cell_bytes = int(model.kv_bytes_per_token * values[settings.kv_type] / values["f16"])
        self._rotation: rope.Rotation | None = None
        self._buffer: saved_cells.Bytes | None = None
        self._adapter: Adapter | None = None
        self._adapters = {name: _load_adapter(model, Path(path)) for name, path in settings.adapters.items()}

    @property
    def cells(self) -> int:
        return int(c.llama_n_ctx(self._context))

    @property
    def batch_tokens(self) -> int:
        """The most that one `decode` takes, drafts included."""
        return self._batch.capacity

    @property
    def can_move(self) -> bool:
        return self._rotation is not None

    def allow_moving(self) -> None:
        """Saved parts may stand at other positions from now on. Raises `SnapshotRefused` with the reason why they cannot.

        Before anything is answered: a short text is read at two places, and its keys are moved from one to the other.
        """
        if not self.can_share:
            raise SnapshotRefused("parts of its memory cannot be kept")
        rope_type = c.llama_model_rope_type(self._model.handle)
        rotation = rope.of(self._model.header, self._model.path, rope_type, self._threads[1])
        most = min(self.batch_tokens, self.context_tokens // 2)
        tokens = self._model.tokenize(PROBE_TEXT, parse_special=False)[:most]

        def keys_at(position: int) -> Sequence[rope.Keys]:
            self._compute([Feed(0, tokens, position, is_sampled=False)])
            try:
                return saved_cells.keys(self.save(0))
            finally:
                self.remove(0, 0, -1)

        rope.check(rotation, keys_at, self.context_tokens - len(tokens))
        self._rotation = rotation
        # Put together for each request: new pages for it take up to three times as long as the copying.
        size = saved_cells.most_bytes(
            self.context_tokens, self.slots, self.cell_bytes, len(self._model.header.kv_head_counts)
        )
        self._buffer = np.empty(size, dtype=np.uint8)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        return self._grammars.compile(grammar)

    def check_sampling(self, sampling: SamplingSettings) -> None:
        """Raises `RequestError` for what this vocabulary cannot do; any thread."""
        sampler.check(sampling, self._model.token_count)

    def start(
        self, slot: int, sampling: SamplingSettings, grammar: CompiledGrammar | None, top_logprobs: int | None
    ) -> None:
        """Raises `RequestError` as `check_sampling` does."""
        self.check_sampling(sampling)
        assert grammar is None or isinstance(grammar, LlguidanceGrammar)
        gate = None if grammar is None else self._grammars.gate(grammar, self._model.piece)
        self._stop_sampler(slot)
        self._samplers[slot] = SlotSampler(
            sampling,
            candidates=self._candidates,
            end_tokens=self._model.end_tokens,
            gate=gate,
            top_logprobs=top_logprobs,
        )

    def decode(self, feeds: Sequence[Feed], adapter: Adapter | None) -> Mapping[int, Sequence[Sampled]] | None:
        self._abort_flag.lower()
        self._use_adapter(adapter)
        feeds = self._without_surplus_drafts(sorted(feeds, key=lambda feed: feed.slot))
        logits: dict[int, Sequence[Logits]] = {}
        for part in self._passes(feeds):
            logits = {slot: [row.copy() for row in rows] for slot, rows in logits.items()}  # else written over now
            if (found := self._compute(part)) is None:
                return None
            logits |= found
        return {feed.slot: self.sample(feed, logits[feed.slot]) for feed in feeds if feed.is_sampled}

    def use_threads(self, decode: int, prefill: int) -> None:
        self._threads = (decode, prefill)

    def forced(self, slot: int) -> Sequence[int]:
        return self._samplers[slot].forced()

    def remove(self, slot: int, start: int, end: int) -> None:
        if not c.llama_memory_seq_rm(self._memory, slot, start, end):
            raise EngineFailed("This model cannot forget a part of a sequence; the whole sequence must be released.")

    def save(self, slot: int) -> memoryview:
        size = c.llama_state_seq_get_size(self._context, slot)
        data = np.empty(size, dtype=np.uint8)  # 100 MB and more: never a second copy, nor zeros first
        written = c.llama_state_seq_get_data(self._context, _pointer(data), size, slot)
        if written != size:
            raise EngineFailed(f"Saving a sequence failed: {written} of {size} bytes were written.")
        return data.data

    def restore(self, slot: int, parts: Sequence[SavedPart]) -> None:
        self.remove(slot, 0, -1)
        is_whole = len(parts) == 1 and saved_cells.can_be_taken(parts[0], self.slots, self.context_tokens)
        data = np.frombuffer(parts[0].cells, np.uint8) if is_whole else self._joined(parts, self._buffer)
        library.forget_errors()
        if c.llama_state_seq_set_data(self._context, _pointer(data), len(data), slot) == 0:
            self.remove(slot, 0, -1)
            raise SnapshotRefused(f"{len(data)} bytes of saved cells were not taken: {library.last_error()}")
        if is_whole:
            self.remove(slot, parts[0].end, -1)

    def join(self, parts: Sequence[SavedPart]) -> memoryview:
        if len(parts) == 1 and saved_cells.is_whole(parts[0]):
            return memoryview(parts[0].cells)
        return self._joined(parts).data

    def check(self, cells: SavedCells, tokens: int) -> None:
        saved_cells.check(cells, tokens, self.cell_bytes, self._kv_type)

    def _joined(self, parts: Sequence[SavedPart], buffer: saved_cells.Bytes | None = None) -> saved_cells.Bytes:
        return saved_cells.join(parts, self.slots, self._rotation, buffer)

    def move(self, source: int, target: int) -> None:
        if tokens := c.llama_memory_seq_pos_max(self._memory, source) + 1:  # none where nothing was read yet
            self.restore(target, [SavedPart(self.save(source), 0, tokens)])
        else:
            self.remove(target, 0, -1)
        self._stop_sampler(target)
        self._samplers[target] = self._samplers.pop(source)
        self.remove(source, 0, -1)

    def release(self, slot: int, kept: int = 0) -> None:
        self.remove(slot, kept, -1)
        self._stop_sampler(slot)

    def clear(self) -> None:
        c.llama_memory_clear(self._memory, True)
        for slot in list(self._samplers):
            self._stop_sampler(slot)

    def abort(self) -> None:
        self._abort_flag.lift()

    def piece(self, token: int) -> bytes:
        return self._model.piece(token)

    def is_end(self, token: int) -> bool:
        return self._model.is_end(token)

    def close(self) -> None:
        """Frees the context and the model, adapters with it."""
        self._grammars.close()
        for slot in list(self._samplers):
            self._stop_sampler(slot)
        c.llama_free(self._context)
        self._model.close()

    def _params(self, settings: EngineSettings) -> Any:
        params = c.llama_context_default_params()
        params.n_ctx = settings.cells
        params.n_batch = params.n_ubatch = batch_tokens(self.slots, settings.chunk_tokens)
        params.n_seq_max = self.slots
        params.n_outputs_max = self.slots + self._drafts  # rows of logits, not one for each token of a batch
        params.n_threads, params.n_threads_batch = self._threads
        params.kv_unified = not self.can_share
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = self._kv_type
        params.swa_full = False  # all of the text would be kept only to allow sharing, which is not done
        return params

    def _use_adapter(self, adapter: Adapter | None) -> None:
        if adapter == self._adapter:
            return
        handles = [] if adapter is None else [self._adapters[adapter.name]]
        scales = [] if adapter is None else [adapter.scale]
        native_handles = (c.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        native_scales = (ctypes.c_float * len(scales))(*scales)
        if c.llama_set_adapters_lora(self._context, native_handles, len(handles), native_scales) != 0:
            raise EngineFailed(f"llama.cpp could not change the adapter: {library.last_error()}.")
        self._adapter = adapter

    def _without_surplus_drafts(self, feeds: Sequence[Feed]) -> Sequence[Feed]:
        """Drafts beyond the rows there are for them are dropped: a draft that is not computed is not accepted."""
        if not any(feed.drafted for feed in feeds):
            return feeds
        left = self._drafts
        kept = []
        for feed in feeds:
            drafted = min(feed.drafted, MAX_DRAFT_TOKENS, left)
            left -= drafted
            tokens = feed.tokens[: len(feed.tokens) - feed.drafted + drafted]
            kept.append(Feed(feed.slot, tokens, feed.position, feed.is_sampled, drafted))
        return kept

    def _passes(self, feeds: Sequence[Feed]) -> Sequence[Sequence[Feed]]:
        """In a shared memory on a CPU a long text is read by itself: together with answers it takes up to twice as long.

        From 64 rows on, llama.cpp's flash attention takes 64 at a time over every cell that one of them needs, so that one
        row of an answer among those of a prompt makes all of them pass over both texts (`ggml-cpu/ops.cpp`, tiled path).
        """
        read = [feed for feed in feeds if feed.is_read]
        is_tiled = not self.can_share and not self._is_on_gpu and sum(len(feed.tokens) for feed in feeds) >= TILE_ROWS
        if not is_tiled or not read or len(read) == len(feeds):
            return (feeds,)
        return (read, [feed for feed in feeds if not feed.is_read])

    def _compute(self, feeds: Sequence[Feed]) -> dict[int, Sequence[Logits]] | None:
        """Rows of logits by slot, where something is to be sampled; None when aborted."""
        is_text_read = any(feed.is_read for feed in feeds)
        c.llama_set_n_threads(self._context, self._threads[0], self._threads[is_text_read])
        rows = self._fill_batch(feeds)
        if not library.decode(self._context, self._batch.native):
            return None
        sampled = (feed for feed in feeds if feed.is_sampled)
        return {feed.slot: [self._logits(rows[feed.slot] + i) for i in range(1 + feed.drafted)] for feed in sampled}

    def _fill_batch(self, feeds: Sequence[Feed]) -> Mapping[int, int]:
        """Writes the batch; returns the first row of logits of each slot that is sampled."""
        total = sum(len(feed.tokens) for feed in feeds)
        if total > self.batch_tokens:
            raise EngineFailed(f"A batch of {total} tokens was asked for; the limit is {self.batch_tokens}.")
        self._batch.clear()
        rows = {}
        for feed in feeds:
            outputs = 1 + feed.drafted if feed.is_sampled else 0
            rows[feed.slot] = self._batch.add(feed.tokens, feed.position, feed.slot, outputs)
        return rows

    def sample(self, feed: Feed, logits: Sequence[Logits]) -> Sequence[Sampled]:
        """What follows the last token that is sure, and each draft that sampling agreed with; a row of `logits` for each."""
        slot_sampler = self._samplers[feed.slot]
        drafts = feed.tokens[len(feed.tokens) - feed.drafted :]
        told = [slot_sampler.sample(logits[0])]
        for number, draft in enumerate(drafts, start=1):
            if told[-1].token != draft or self.is_end(draft):
                break
            told.append(slot_sampler.sample(logits[number]))
        if len(told) <= feed.drafted:
            end = feed.position + len(feed.tokens) - feed.drafted + len(told) - 1
            self.remove(feed.slot, end, -1)
        return told

    def _logits(self, row: int) -> Logits:
        """llama.cpp's own row; it may be changed. A view is no more than its address, so one made before serves again."""
        address = library.logits_address(self._context, row)
        if (found := self._rows.get(address)) is None:
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            found = self._rows[address] = np.ctypeslib.as_array(pointer, shape=(self._model.token_count,))
        return found

    def _stop_sampler(self, slot: int) -> None:
        if (slot_sampler := self._samplers.pop(slot, None)) is not None:
            slot_sampler.close()


def _pointer(data: "np.ndarray[Any, np.dtype[np.uint8]]") -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _load_adapter(model: Model, path: Path) -> Any:
    header = gguf_file.read_metadata(path)
    if not header.is_adapter:
        raise ModelFileError(f"{path} is a model, not a LoRA adapter; name the GGUF file of an adapter.")
    library.forget_errors()
    adapter = c.llama_adapter_lora_init(model.handle, str(path).encode())
    if not adapter:
        raise ModelFileError(
            f"{path} cannot be used as an adapter of {model.path}: {library.first_error()}; name the GGUF file of a LoRA "
            "that was trained on this model."
        )
    return adapter
