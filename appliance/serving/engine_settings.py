"""How one model is loaded and run: the outcome of the memory plan, handed to the engine's process."""

from typing import Literal

from msgspec import Struct

from appliance.serving.decoder import IDLE_CHUNK_TOKENS
from appliance.serving.events import ModelKind

KV_VALUE_BYTES = {"f16": 2.0, "q8_0": 34 / 32}  # q8_0: blocks of 32 values, each with a scale of two bytes
CAUSAL_POOLING_TOKENS = 128  # computed at once: causal models compute logits for every token, 4 bytes x vocabulary each


class EngineSettings(Struct, frozen=True, kw_only=True):
    """Everything decided, nothing left to "auto"; paths are absolute."""

    name: str
    model_path: str
    sha256: str
    made_at: int
    kind: ModelKind
    adapters: dict[str, str] = {}  # name to the path of its LoRA GGUF file
    slots: int
    context_tokens: int  # of one request
    cache_tokens: int = 0  # of prefixes kept in ordinary memory after their request has ended
    threads_decode: int
    threads_prefill: int
    chunk_tokens: int = IDLE_CHUNK_TOKENS  # of prompts, computed in one step at most
    kv_type: Literal["f16", "q8_0"]
    is_mapped: bool  # weights stay in the file's page cache (mmap)
    is_repacked: bool  # weights are copied into the layout that computes fastest
    gpu_layers: int = 0
    queue_requests: int
    queue_tokens: int
    snapshot_folder: str | None = None
    snapshot_bytes: int = 0
    system_prompts: tuple[str, ...] = ()
    reread_tokens: int | None = None  # of each document, which is read by itself otherwise; None: all, in their place
    document_tolerance: float = 0.0  # of the range of all scores, by which documents may be out of their order
    is_speculating: bool = True
    stream_seconds: float = 0.0  # text of an answer leaves at most this often
    notes: tuple[str, ...] = ()  # what was stepped down from what was asked, for a person

    @property
    def cells(self) -> int:
        """Tokens of the KV memory."""
        return self.slots * self.context_tokens
