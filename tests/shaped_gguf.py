"""GGUF models of a chosen shape with random weights, for measuring memory; their answers mean nothing.

Llama architecture, so that layer sizes, vocabulary and quantization are free to choose; built in-process, no torch.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

from tests import tiny_gguf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    layers: int = 4
    hidden: int = 256
    feed_forward: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 64
    vocabulary: int = 4096
    context_tokens: int = 4096
    is_tied: bool = False  # the embedding is also the output matrix
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_0


def write(path: Path, shape: Shape) -> Path:
    """Writes the model to `path` and returns it."""
    writer = _writer(path, shape)
    random = np.random.default_rng(3)
    for name, size in _tensors(shape):
        if len(size) == 1:
            writer.add_tensor(name, np.ones(size, dtype=np.float32))
            continue
        values = random.standard_normal(size, dtype=np.float32) / size[1] ** 0.5
        writer.add_tensor(name, quantize(values, shape.kind), raw_dtype=shape.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_hollow(path: Path, shape: Shape) -> Path:
    """Writes a model whose weights are a hole in the file: large shapes for what reads no weights."""
    writer = _writer(path, shape)
    hole = 0
    for name, size in _tensors(shape):
        kind = shape.kind if len(size) == 2 else gguf.GGMLQuantizationType.F32
        values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size_bytes = math.prod(size) // values * block_bytes
        writer.add_tensor_info(name, size, np.dtype(np.float32), size_bytes, raw_dtype=kind)
        hole += -(-size_bytes // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        start = -(-file.tell() // writer.data_alignment) * writer.data_alignment
        file.truncate(start + hole)
    return path


def _writer(path: Path, shape: Shape) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("shaped")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    _add_vocabulary(writer, shape)
    return writer


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape) -> None:
    known = tiny_gguf.vocabulary()
    plain = len(known) - len(tiny_gguf.SPECIALS)
    tokens = known + [f"<unused{number}>" for number in range(shape.vocabulary - len(known))]
    types = [gguf.TokenType.NORMAL] * plain + [gguf.TokenType.CONTROL] * len(tiny_gguf.SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * (len(tokens) - len(types)))
    writer.add_token_merges(tiny_gguf.MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes, rows first."""
    yield "token_embd.weight", (shape.vocabulary, shape.hidden)
    if not shape.is_tied:
        yield "output.weight", (shape.vocabulary, shape.hidden)
    yield "output_norm.weight", (shape.hidden,)
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (shape.hidden,)
        yield f"{block}.ffn_norm.weight", (shape.hidden,)
        yield f"{block}.attn_q.weight", (queries, shape.hidden)
        yield f"{block}.attn_k.weight", (keys, shape.hidden)
        yield f"{block}.attn_v.weight", (keys, shape.hidden)
        yield f"{block}.attn_output.weight", (shape.hidden, queries)
        yield f"{block}.ffn_gate.weight", (shape.feed_forward, shape.hidden)
        yield f"{block}.ffn_up.weight", (shape.feed_forward, shape.hidden)
        yield f"{block}.ffn_down.weight", (shape.hidden, shape.feed_forward)
