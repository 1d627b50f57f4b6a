"""GGUF models of a few hundred kilobytes with random weights, built in-process: no network, no torch.

The chat model: Qwen3 architecture, byte-level vocabulary with a few merges, ChatML. Its answers are noise, and always the
same noise. Beside it a LoRA adapter for it, and models that embed or rank: BERT's architecture, or Qwen3's.
"""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_WIDTH = 2, 64, 128, 2, 1, 32
CONTEXT_TOKENS = 1024
MERGES = ("Ċ Ċ", "Ġ t", "h e", "u s", "us e")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BERT_CONTEXT_TOKENS = 128
BERT_VOCABULARY = [  # ▁ begins a word; without it a piece continues one
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *(prefix + chr(letter) for prefix in ("▁", "") for letter in range(ord("a"), ord("z") + 1)),
    *("▁the", "▁use", "ing", "."),
]
RERANK_TEMPLATE = "<|im_start|>user\n{query}\n{document}<|im_end|>\n"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_characters() -> list[str]:
    """The printable character that GPT-2's byte-level BPE writes for each byte 0-255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary(controls: Sequence[str] = ()) -> list[str]:
    return [*byte_characters(), *(merge.replace(" ", "") for merge in MERGES), *SPECIALS, *controls]


def write(path: Path, *, template: str | None = CHATML, seed: int = 7, controls: Sequence[str] = ()) -> Path:
    """Writes the chat model to `path` and returns it; `controls` are more control tokens."""
    writer = _writer(path, controls=controls)
    if template is not None:
        writer.add_chat_template(template)
    return _finished(writer, path, _tensors(np.random.default_rng(seed), len(controls)))


def write_sliding(path: Path, window: int) -> Path:
    """Writes a chat model of Gemma 3's architecture, whose tokens see no further back than `window`."""
    writer = _writer(path, "gemma3")
    writer.add_sliding_window(window)
    random = np.random.default_rng(7)
    names = [f"blk.{layer}.post_{part}_norm.weight" for layer in range(LAYERS) for part in ("attention", "ffw")]
    return _finished(writer, path, [*_tensors(random), *((name, _ones(HIDDEN)) for name in names)])


def write_rotary(
    path: Path,
    architecture: str,
    *,
    base: float = 10000.0,
    factors: Sequence[float] = (),
    scaling: gguf.RopeScalingType = gguf.RopeScalingType.NONE,
) -> Path:
    """Writes a chat model that turns pairs of neighbouring values ("llama"), or of the two halves of a head ("qwen3")."""
    writer = _writer(path, architecture, freq_base=base)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    if scaling != gguf.RopeScalingType.NONE:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    tensors = [
        (name, tensor)
        for name, tensor in _tensors(np.random.default_rng(7))
        if architecture == "qwen3" or not name.endswith(("attn_q_norm.weight", "attn_k_norm.weight"))
    ]
    if factors:
        tensors.append(("rope_freqs.weight", np.asarray(factors, dtype=np.float32)))
    return _finished(writer, path, tensors)


def write_adapter(path: Path, seed: int = 1, *, rank: int = 4) -> Path:
    """Writes a LoRA for the chat model that changes its answers visibly."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2.0 * rank)
    tensors = []
    for layer in range(LAYERS):
        for name, inputs, outputs in (("attn_q", HIDDEN, HEADS * HEAD_WIDTH), ("attn_v", HIDDEN, KV_HEADS * HEAD_WIDTH)):
            base = f"blk.{layer}.{name}.weight"
            tensors.append((f"{base}.lora_a", random.normal(0.0, 0.2, (rank, inputs)).astype(np.float32)))
            tensors.append((f"{base}.lora_b", random.normal(0.0, 0.5, (outputs, rank)).astype(np.float32)))
    return _finished(writer, path, tensors)


def write_embedding(path: Path, *, is_causal: bool = False, seed: int = 7) -> Path:
    """Writes a model that embeds: BERT with the mean of all tokens, or a causal one with its last token."""
    random = np.random.default_rng(seed)
    if is_causal:
        writer = _writer(path)
        writer.add_pooling_type(gguf.PoolingType.LAST)
        writer.add_add_eos_token(True)
        return _finished(writer, path, _tensors(random))
    writer = _bert_writer(path)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    return _finished(writer, path, _bert_tensors(random))


def write_reranker(path: Path, *, is_causal: bool = False, seed: int = 7) -> Path:
    """Writes a model that scores a document for a query: BERT with one output, or a causal one with a template."""
    random = np.random.default_rng(seed)
    writer = _writer(path) if is_causal else _bert_writer(path)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    if is_causal:
        writer.add_chat_template([{"name": "rerank", "template": RERANK_TEMPLATE}])
        writer.add_classifier_output_labels(["yes", "no"])
        head = ("cls.output.weight", random.normal(0.0, 0.3, (2, HIDDEN)).astype(np.float32))
        return _finished(writer, path, [*_tensors(random), head])
    head = ("cls.output.weight", random.normal(0.0, 0.3, (1, HIDDEN)).astype(np.float32))
    bias = ("cls.output.bias", np.zeros(1, dtype=np.float32))
    return _finished(writer, path, [*_bert_tensors(random), head, bias])


def _writer(
    path: Path, architecture: str = "qwen3", controls: Sequence[str] = (), freq_base: float = 10000.0
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(freq_base)
    _add_vocabulary(writer, controls)
    return writer


def _bert_writer(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_name("tiny-bert")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(LAYERS)
    writer.add_context_length(BERT_CONTEXT_TOKENS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-6)
    writer.add_causal_attention(False)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(BERT_VOCABULARY)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token.startswith("[") else gguf.TokenType.NORMAL for token in BERT_VOCABULARY]
    )
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
    return writer


def _finished(writer: gguf.GGUFWriter, path: Path, tensors: Sequence[tuple[str, np.ndarray]]) -> Path:
    for name, tensor in tensors:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, controls: Sequence[str]) -> None:
    tokens = vocabulary(controls)
    special = len(SPECIALS) + len(controls)
    plain = len(tokens) - special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * plain + [gguf.TokenType.CONTROL] * special)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)


def _tensors(random: np.random.Generator, controls: int = 0) -> list[tuple[str, np.ndarray]]:
    def weights(*shape: int) -> np.ndarray:
        return random.normal(0.0, 1.5 / shape[-1] ** 0.5, shape).astype(np.float32)

    words = len(vocabulary()) + controls
    tensors = [
        ("token_embd.weight", random.normal(0.0, 1.0, (words, HIDDEN)).astype(np.float32)),
        ("output.weight", weights(words, HIDDEN)),
        ("output_norm.weight", _ones(HIDDEN)),
    ]
    for layer in range(LAYERS):
        block = {
            "attn_norm": _ones(HIDDEN),
            "attn_q": weights(HEADS * HEAD_WIDTH, HIDDEN),
            "attn_k": weights(KV_HEADS * HEAD_WIDTH, HIDDEN),
            "attn_v": weights(KV_HEADS * HEAD_WIDTH, HIDDEN),
            "attn_output": weights(HIDDEN, HEADS * HEAD_WIDTH),
            "attn_q_norm": _ones(HEAD_WIDTH),
            "attn_k_norm": _ones(HEAD_WIDTH),
            "ffn_norm": _ones(HIDDEN),
            "ffn_gate": weights(FEED_FORWARD, HIDDEN),
            "ffn_up": weights(FEED_FORWARD, HIDDEN),
            "ffn_down": weights(HIDDEN, FEED_FORWARD),
        }
        tensors += [(f"blk.{layer}.{name}.weight", tensor) for name, tensor in block.items()]
    return tensors


def _bert_tensors(random: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    def weights(*shape: int) -> np.ndarray:
        return random.normal(0.0, 1.0 / shape[-1] ** 0.5, shape).astype(np.float32)

    def norm(name: str) -> list[tuple[str, np.ndarray]]:
        return [(f"{name}.weight", _ones(HIDDEN)), (f"{name}.bias", np.zeros(HIDDEN, dtype=np.float32))]

    tensors = [
        ("token_embd.weight", random.normal(0.0, 1.0, (len(BERT_VOCABULARY), HIDDEN)).astype(np.float32)),
        ("token_types.weight", weights(2, HIDDEN)),
        ("position_embd.weight", weights(BERT_CONTEXT_TOKENS, HIDDEN)),
        *norm("token_embd_norm"),
    ]
    for layer in range(LAYERS):
        shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
        shapes |= {"ffn_up": (FEED_FORWARD, HIDDEN), "ffn_down": (HIDDEN, FEED_FORWARD)}
        for name, shape in shapes.items():
            tensors.append((f"blk.{layer}.{name}.weight", weights(*shape)))
            tensors.append((f"blk.{layer}.{name}.bias", np.zeros(shape[0], dtype=np.float32)))
        tensors += norm(f"blk.{layer}.attn_output_norm") + norm(f"blk.{layer}.layer_output_norm")
    return tensors


def _ones(width: int) -> np.ndarray:
    return np.ones(width, dtype=np.float32)
