"""How much memory a model will take, computed from the header of its file: weights, KV cache, buffers, the process.

The sums follow llama.cpp's own (commit 0c1e57098: `llama-model-loader.cpp`, `llama-context.cpp`, `ggml-cpu/repack.cpp`) with
flash attention; tests compare them with llama.cpp's figures and with measured processes. Everything is counted that an
engine may touch, rows of logits for drafts and a full memory's mask too. Not known: the states of recurrent layers; copies
of a prefix while it is written to disk or read back; layers with a sliding window are counted whole. Nothing is decided
here; `memory_plan.py` does.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

from appliance.serving.decoder import IDLE_CHUNK_TOKENS, batch_drafts, batch_tokens
from appliance.serving.engine_settings import CAUSAL_POOLING_TOKENS, KV_VALUE_BYTES
from appliance.serving.gguf_file import GgufHeader, Tensor

MIB = 1 << 20
# The first three are measured, on x86-64 with vocabularies of 32,768 and 151,936 tokens; see `benchmarks/memory.py`.
PROCESS_BYTES = 36 * MIB  # Python with its libraries, the threads, the texts of requests
VOCABULARY_TOKEN_BYTES = 300  # llama.cpp's tables of tokens, pieces and merges
ANSWER_TOKEN_BYTES = 500  # llguidance's table, from the first grammar on, and what tokens are drawn from
Q8_0_VALUES = 32  # in a block: heads must be a multiple of it
CELL_ALIGNMENT = 256
WORK_VALUE_BYTES = 292 / 256  # what is multiplied is rounded to llama.cpp's q8_K before; other types take less

# Type of tensor: what an x86 CPU must have for llama.cpp to repack it there (None: never), and rows must be a multiple of 8;
# then the multiple of rows on ARM with dot products.
_REPACKED: Mapping[str, tuple[str | None, int]] = {
    **{"Q4_0": ("avx2", 4), "Q4_K": ("avx2", 8), "IQ4_NL": ("avx2", 4), "MXFP4": ("avx2", 4), "Q2_K": ("avx512f", 0)},
    **{"Q5_K": (None, 8), "Q6_K": (None, 8), "Q8_0": (None, 4), "Q1_0": (None, 4)},
}
_REPACKED_BY_AMX = frozenset({"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the memory of a model depends on, besides its file."""

    slots: int
    context_tokens: int
    cache_tokens: int
    kv_type: Literal["f16", "q8_0"]
    is_mapped: bool
    is_repacked: bool
    chunk_tokens: int = IDLE_CHUNK_TOKENS  # of prompts, in one batch
    gpu_layers: int = 0
    is_stitching: bool = False

    @property
    def cells(self) -> int:
        """Of the KV memory, of which each slot has its own; cached prefixes are kept beside it."""
        return self.slots * padded_cells(self.context_tokens)

    @property
    def copied_tokens(self) -> int:
        """Cells that are copied at once, on their way between slots and the cache."""
        copied = self.context_tokens if self.slots > 1 or self.cache_tokens else 0
        return copied + self.context_tokens * self.is_stitching  # where prompts are put together


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrediction:
    """Bytes of the machine's memory, but for `gpu_bytes`."""

    weights_file_bytes: int  # mapped and read for every token: the kernel may drop them, at the price of reading again
    weights_copied_bytes: int  # read into memory, or copied into another layout
    weights_idle_bytes: int  # mapped, but hardly read again: sources of copies, embeddings. Not part of the total.
    adapter_bytes: int
    kv_bytes: int
    cache_bytes: int  # cached prefixes, once there are as many as may be, and one that is being copied
    compute_bytes: int
    output_bytes: int  # a row of logits for each token that may be sampled in one batch
    process_bytes: int
    gpu_bytes: int = 0  # weights and KV on GPUs

    @property
    def anonymous_bytes(self) -> int:
        """What the kernel cannot drop."""
        return self.total_bytes - self.weights_file_bytes

    @property
    def total_bytes(self) -> int:
        held = self.weights_file_bytes + self.weights_copied_bytes + self.adapter_bytes + self.kv_bytes
        return held + self.cache_bytes + self.compute_bytes + self.output_bytes + self.process_bytes

    @property
    def resident_bytes(self) -> int:
        """What tools such as `top` show after loading, pages that nothing reads again included."""
        return self.total_bytes + self.weights_idle_bytes

    def __str__(self) -> str:
        parts = {
            "weights in the file's pages": self.weights_file_bytes,
            "weights copied": self.weights_copied_bytes,
            "adapters": self.adapter_bytes,
            "KV cache": self.kv_bytes,
            "cached prefixes": self.cache_bytes,
            "computing": self.compute_bytes,
            "logits": self.output_bytes,
            "process": self.process_bytes,
        }
        said = ", ".join(f"{name} {mib(size)}" for name, size in parts.items() if size)
        return f"{mib(self.total_bytes)} MiB: {said}" + (f"; on GPUs {mib(self.gpu_bytes)} MiB" if self.gpu_bytes else "")


def predict(
    header: GgufHeader, choice: Choice, cpu_features: Collection[str], *, adapter_bytes: int = 0, is_pooling: bool = False
) -> MemoryPrediction:
    """`is_pooling`: for embedding or ranking, where every token of a batch has a row of output."""
    file_bytes, copied, idle, on_gpus = _weights(header, choice, cpu_features)
    cell = [kv_cell_bytes(header, layer, choice.kv_type) for layer in range(header.block_count)]
    kv = [size * choice.cells for size in cell]
    first_on_gpu = header.block_count + 1 - choice.gpu_layers
    tokens = compute_tokens(header, choice, is_pooling=is_pooling)
    rows = tokens if is_pooling else output_rows(choice)
    vocabulary = header.vocabulary_tokens
    return MemoryPrediction(
        weights_file_bytes=file_bytes,
        weights_copied_bytes=copied,
        weights_idle_bytes=idle,
        adapter_bytes=adapter_bytes,
        kv_bytes=sum(kv[: max(0, first_on_gpu)]),
        cache_bytes=sum(cell) * (choice.cache_tokens + choice.copied_tokens),
        compute_bytes=compute_bytes(header, choice, tokens, rows),
        output_bytes=4 * vocabulary * rows,
        process_bytes=PROCESS_BYTES + vocabulary * (VOCABULARY_TOKEN_BYTES + ANSWER_TOKEN_BYTES),
        gpu_bytes=on_gpus + sum(kv[max(0, first_on_gpu) :]),
    )


def kv_cell_bytes(header: GgufHeader, layer: int, kv_type: str) -> int:
    """One token in one layer; 0 for models that read a whole text at once and keep nothing."""
    if not is_causal(header):
        return 0
    values = header.kv_head_counts[layer] * (header.key_length + header.value_length)
    return int(values * KV_VALUE_BYTES[kv_type])


def can_quantize_kv(header: GgufHeader) -> bool:
    return header.key_length % Q8_0_VALUES == 0 and header.value_length % Q8_0_VALUES == 0


def is_causal(header: GgufHeader) -> bool:
    return header.values.get(f"{header.architecture}.attention.causal", True) is not False


def padded_cells(cells: int) -> int:
    return -(-cells // CELL_ALIGNMENT) * CELL_ALIGNMENT


def compute_tokens(header: GgufHeader, choice: Choice, *, is_pooling: bool = False) -> int:
    """Tokens computed at once. A text must be read in one go where a token sees the later ones or all tokens are pooled."""
    if is_pooling and is_causal(header) and header.pooling_type in ("last", "rank"):
        return CAUSAL_POOLING_TOKENS
    return choice.context_tokens if is_pooling or not is_causal(header) else batch_tokens(choice.slots, choice.chunk_tokens)


def output_rows(choice: Choice) -> int:
    """Rows of logits: one for each slot, and those of drafts."""
    return choice.slots + batch_drafts(choice.slots)


def compute_bytes(header: GgufHeader, choice: Choice, tokens: int, rows: int) -> int:
    """The graph's buffer, within a tenth of what llama.cpp says, and what the CPU takes for multiplications beside it.

    The graph is laid out for as many tokens of each sequence (`graph_reserve`). Beside the mask of attention, a layer holds
    three matrices of the width of its feed-forward part, what goes into it three times (as input, around attention, around
    feed-forward), and the queries, whose place is too small for the former. At the end, rows of logits are held instead.
    """
    tokens = -(-tokens // choice.slots) * choice.slots
    hidden, feed_forward = header.embedding_length, _feed_forward(header)
    queries = max(header.head_counts, default=0) * header.key_length
    mask = 2 * tokens * padded_cells(choice.context_tokens if is_causal(header) else tokens)
    layer = mask + 4 * tokens * (3 * feed_forward + 3 * hidden + queries)
    logits = 4 * (rows * header.vocabulary_tokens + (tokens + rows) * hidden)
    work = tokens * max(feed_forward, queries, hidden) * WORK_VALUE_BYTES
    return max(layer, logits) + int(work)


def layer_bytes(header: GgufHeader) -> list[int]:
    """Weights by layer, as llama.cpp counts them for GPUs: the last entry is the output, the input stays with the CPU."""
    sizes = [0] * (header.block_count + 1)
    for tensor in header.tensors:
        if (layer := _layer(tensor, header.block_count)) is not None:
            sizes[layer] += tensor.size_bytes
    sizes[-1] += sum(tensor.size_bytes for tensor in header.tensors if _is_output_too(tensor, header))
    return sizes


def repackable_bytes(header: GgufHeader, cpu_features: Collection[str]) -> int:
    """Weights that llama.cpp would copy into another layout on this CPU."""
    choice = Choice(slots=1, context_tokens=1, cache_tokens=0, kv_type="f16", is_mapped=True, is_repacked=True)
    return _weights(header, choice, cpu_features)[1]


def mib(size_bytes: int) -> int:
    return round(size_bytes / MIB)


def _weights(header: GgufHeader, choice: Choice, cpu_features: Collection[str]) -> tuple[int, int, int, int]:
    """Bytes used in the file's pages, copied, idle in the file's pages, and on GPUs."""
    used = copied = idle = on_gpus = 0
    first_on_gpu = header.block_count + 1 - choice.gpu_layers
    for tensor in header.tensors:
        size, layer = tensor.size_bytes, _layer(tensor, header.block_count)
        is_repacked = choice.is_repacked and _is_repacked(tensor, cpu_features)
        if layer is None:  # the input: a few rows are read, unless it is the output too
            is_second = _is_output_too(tensor, header) and (is_repacked or choice.gpu_layers > 0)
            is_read_whole = _is_output_too(tensor, header) and not is_second
            used += size if choice.is_mapped and is_read_whole else 0
            idle += size if choice.is_mapped and not is_read_whole else 0
            copied += 0 if choice.is_mapped else size
            on_gpus += size if is_second and choice.gpu_layers > 0 else 0
            copied += size if is_second and choice.gpu_layers == 0 else 0
        elif layer >= first_on_gpu:
            on_gpus += size
        elif is_repacked or not choice.is_mapped:
            copied += size
            idle += size if choice.is_mapped else 0
        else:
            used += size
    return used, copied, idle, on_gpus


def _layer(tensor: Tensor, layers: int) -> int | None:
    """The number of the layer, `layers` for the output; None for the input."""
    parts = tensor.name.split(".")
    if parts[0] == "blk" and len(parts) > 1 and parts[1].isdigit():
        return int(parts[1])
    return layers if parts[0].startswith("output") else None


def _is_output_too(tensor: Tensor, header: GgufHeader) -> bool:
    """Whether the embedding is the output matrix too."""
    return tensor.name == "token_embd.weight" and not any(each.name == "output.weight" for each in header.tensors)


def _is_repacked(tensor: Tensor, cpu_features: Collection[str]) -> bool:
    """`ggml_repack_get_optimal_repack_type`, for matrices that tokens are multiplied with."""
    if len(tensor.shape) < 2 or not tensor.name.endswith(".weight"):
        return False
    if "amx_int8" in cpu_features and tensor.type in _REPACKED_BY_AMX:
        return True
    on_x86, arm_rows = _REPACKED.get(tensor.type, (None, 0))
    if on_x86 in cpu_features:
        return tensor.shape[1] % 8 == 0
    return "asimddp" in cpu_features and arm_rows > 0 and tensor.shape[1] % arm_rows == 0


def _feed_forward(header: GgufHeader) -> int:
    def number(key: str) -> int:
        value = header.values.get(f"{header.architecture}.{key}", 0)
        numbers = value if isinstance(value, tuple) else (value,)
        return max((int(each) for each in numbers if isinstance(each, int | float)), default=0)

    return max(number("feed_forward_length"), number("expert_feed_forward_length") * number("expert_used_count"))
