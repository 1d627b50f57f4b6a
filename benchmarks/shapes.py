"""Models of real shape with random weights, to measure speed and memory with: `python -m benchmarks.shapes 0.6B Q4_K_M`.

Qwen3's layers and sizes from the public configurations, its vocabulary and chat template from the pinned source distribution
of llama.cpp, and noise for weights: what is computed takes the time and the memory of the real model, and the answers mean
nothing. Files lie in the cache and are used again. `shaped_model` is the entry.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import click
import gguf
import numpy as np

from appliance import artifacts
from appliance.config import cache_root
from appliance.console import Command, human_bytes, note
from appliance.errors import RecipeError
from benchmarks import random_weights
from convert import llama_cpp_source

REVISION = 1  # raised when the same names would give another file
VOCABULARY_FILE = "models/ggml-vocab-qwen2.gguf"  # a vocabulary without a model; Qwen3 has the same tokens and merges
TEMPLATE_FILE = "models/templates/Qwen-Qwen3-0.6B.jinja"
BYTES = 256  # the first tokens: one for each byte
VOCABULARY_BYTES = 6_000_000
EMBEDDING_DEVIATION = 0.02
LOGIT_DEVIATION = 4.0  # of the logits of one token: the likeliest has a probability of some percent, and others follow
QUERY_GAIN = 3.0  # attention looks at some tokens more than at others, so that answers depend on what was said before

# What follows the plain tokens in Qwen3's vocabulary, and whether it is text that an answer may hold.
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Dimensions of a Qwen3 model; the embedding is also the output."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int = 8
    head_width: int = 128
    vocabulary_tokens: int = 151_936
    context_tokens: int = 40_960


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(layers=4, hidden=256, feed_forward=768, heads=4, kv_heads=2, head_width=64, vocabulary_tokens=32_768),
    "0.6B": Shape(layers=28, hidden=1024, feed_forward=3072, heads=16),
    "1.7B": Shape(layers=28, hidden=2048, feed_forward=6144, heads=16),
    "4B": Shape(layers=36, hidden=2560, feed_forward=9728, heads=32),
}
FILE_TYPES: Mapping[str, gguf.LlamaFileType] = {
    "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Byte-level BPE: a token for each byte, then one for each merge; without those that are added for chats."""

    tokens: Sequence[str]
    merges: Sequence[str]
    template: str

    def first(self, tokens: int) -> "Vocabulary":
        """A smaller one: the merges are in the order in which they were learnt."""
        return dataclasses.replace(self, tokens=self.tokens[:tokens], merges=self.merges[: tokens - BYTES])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # rows first
    kind: str
    deviation: float = 0.0
    constant: float = 0.0  # of a norm


@click.command(cls=Command)
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("quantization", type=click.Choice(list(FILE_TYPES)))
def shapes(shape: str, quantization: str) -> None:
    """Print the path of a model with random weights, written to the cache unless it is there."""
    click.echo(shaped_model(shape, quantization))


def shaped_model(shape: str, quantization: str) -> Path:
    """The file of this shape and quantization, by their names. Raises `RecipeError` for another name."""
    if shape not in SHAPES or quantization not in FILE_TYPES:
        known = f"{', '.join(SHAPES)} and {', '.join(FILE_TYPES)}"
        raise RecipeError(f"There is no shape {shape} in {quantization}; choose one of {known}.")
    folder = cache_root() / "benchmarks"
    path = folder / f"qwen3-{shape}-{quantization}-random{REVISION}.gguf"
    if path.exists():
        return path
    with llama_cpp_source.locked(folder):
        if not path.exists():
            artifacts.require_space(folder, file_bytes(SHAPES[shape], quantization), f"The model {path.name}")
            write(path, SHAPES[shape], quantization, qwen_vocabulary())
            note(f"shapes: {path}, {human_bytes(path.stat().st_size)}")
    return path


def write(path: Path, shape: Shape, quantization: str, vocabulary: Vocabulary) -> Path:
    """Writes the model beside `path` and renames it; the same arguments give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    random = np.random.Generator(np.random.SFC64(list(dataclasses.astuple(shape))))
    tensors = list(_tensors(shape, quantization))
    writer = gguf.GGUFWriter(partial, "qwen3")
    _add_metadata(writer, shape, quantization)
    _add_vocabulary(writer, vocabulary.first(shape.vocabulary_tokens - len(ADDED_TOKENS)), shape.vocabulary_tokens)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float16), _size_bytes(tensor), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, tensors, random)
        writer.close()
        partial.rename(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return path


def qwen_vocabulary() -> Vocabulary:
    """Read from the source distribution, which is downloaded when the cache has none; takes some seconds."""
    contents = llama_cpp_source.read_source(VOCABULARY_FILE, TEMPLATE_FILE)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(contents[VOCABULARY_FILE])
        file.flush()
        fields = gguf.GGUFReader(file.name).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
    return Vocabulary(tokens=tokens[: BYTES + len(merges)], merges=merges, template=contents[TEMPLATE_FILE].decode())


def file_bytes(shape: Shape, quantization: str) -> int:
    """Bytes of the tensors, and of a vocabulary of Qwen's size."""
    return sum(_size_bytes(tensor) for tensor in _tensors(shape, quantization)) + VOCABULARY_BYTES


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, quantization: str) -> None:
    writer.add_name("Qwen3 shape, random weights")
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)


def _add_vocabulary(writer: gguf.GGUFWriter, plain: Vocabulary, size: int) -> None:
    """The plain tokens, those added for chats, and unused ones up to `size`: Qwen3's embedding has more rows than tokens."""
    tokens = [*plain.tokens, *ADDED_TOKENS]
    types = [gguf.TokenType.NORMAL] * len(plain.tokens)
    types += [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.USER_DEFINED for token in ADDED_TOKENS]
    unused = size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + number}]" for number in range(unused))])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * unused)
    writer.add_token_merges(plain.merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(plain.template)


def _tensors(shape: Shape, quantization: str) -> Iterator[_Tensor]:
    """Each layer adds more to what is passed on than the embedding holds, or a tied model would repeat its last token."""
    plain = {"Q4_K_M": "Q4_K"}.get(quantization, quantization)
    better = {"Q4_K_M": "Q6_K"}.get(quantization, quantization)
    tied = {"Q4_K_M": "Q6_K", "Q4_0": "Q6_K"}.get(quantization, quantization)

    def matrix(name: str, rows: int, columns: int, kind: str = plain) -> _Tensor:
        return _Tensor(name=f"{name}.weight", shape=(rows, columns), kind=kind, deviation=columns**-0.5)

    def norm(name: str, width: int, weight: float = 1.0) -> _Tensor:
        return _Tensor(name=f"{name}.weight", shape=(width,), kind="F32", constant=weight)

    embedding = matrix("token_embd", shape.vocabulary_tokens, shape.hidden, tied)
    yield dataclasses.replace(embedding, deviation=EMBEDDING_DEVIATION)
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    for layer in range(shape.layers):
        kind = better if has_more_bits(layer, shape.layers) else plain
        block = f"blk.{layer}"
        yield norm(f"{block}.attn_norm", shape.hidden)
        yield matrix(f"{block}.attn_q", queries, shape.hidden)
        yield matrix(f"{block}.attn_k", keys, shape.hidden)
        yield matrix(f"{block}.attn_v", keys, shape.hidden, kind)
        yield norm(f"{block}.attn_q_norm", shape.head_width, QUERY_GAIN)
        yield norm(f"{block}.attn_k_norm", shape.head_width)
        yield matrix(f"{block}.attn_output", shape.hidden, queries)
        yield norm(f"{block}.ffn_norm", shape.hidden)
        yield matrix(f"{block}.ffn_gate", shape.feed_forward, shape.hidden)
        yield matrix(f"{block}.ffn_up", shape.feed_forward, shape.hidden)
        yield matrix(f"{block}.ffn_down", shape.hidden, shape.feed_forward, kind)
    yield norm("output_norm", shape.hidden, LOGIT_DEVIATION / (EMBEDDING_DEVIATION * shape.hidden**0.5))


def has_more_bits(layer: int, layers: int) -> bool:
    """Where Q4_K_M has Q6_K in attn_v and ffn_down: `use_more_bits` of llama.cpp's `llama-quant.cpp`."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _write_tensors(writer: gguf.GGUFWriter, tensors: Iterable[_Tensor], random: np.random.Generator) -> None:
    """A piece at a time: `gguf` itself would want each tensor as a whole."""
    assert writer.fout is not None
    file = writer.fout[0]
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        if tensor.kind == "F32":
            np.full(tensor.shape, tensor.constant, dtype="<f4").tofile(file)
            continue
        for piece in random_weights.pieces(tensor.kind, math.prod(tensor.shape), tensor.deviation, random):
            piece.tofile(file)
    writer.write_padding(file, file.tell())


def _size_bytes(tensor: _Tensor) -> int:
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    return int(math.prod(tensor.shape) // values * size)


if __name__ == "__main__":
    shapes()
