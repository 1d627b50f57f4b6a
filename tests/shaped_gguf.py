"""GGUF models of a chosen shape with random weights, for measuring memory; their answers mean nothing.

Llama architecture, so that layer sizes, vocabulary and quantization are free to choose; built in-process, no torch.
"""

import dataclasses
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
    _add_tensors(writer, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def _add_tensors(writer: gguf.GGUFWriter, shape: Shape) -> None:
    random = np.random.default_rng(3)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) / columns**0.5
        writer.add_tensor(f"{name}.weight", quantize(values, shape.kind), raw_dtype=shape.kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, dtype=np.float32))

    matrix("token_embd", shape.vocabulary, shape.hidden)
    if not shape.is_tied:
        matrix("output", shape.vocabulary, shape.hidden)
    norm("output_norm")
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", shape.heads * shape.head_width, shape.hidden)
        matrix(f"{block}.attn_k", shape.kv_heads * shape.head_width, shape.hidden)
        matrix(f"{block}.attn_v", shape.kv_heads * shape.head_width, shape.hidden)
        matrix(f"{block}.attn_output", shape.hidden, shape.heads * shape.head_width)
        matrix(f"{block}.ffn_gate", shape.feed_forward, shape.hidden)
        matrix(f"{block}.ffn_up", shape.feed_forward, shape.hidden)
        matrix(f"{block}.ffn_down", shape.hidden, shape.feed_forward)
