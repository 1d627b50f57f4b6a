"""A GGUF model of a few hundred kilobytes with random weights, built in-process: no network, no torch.

Qwen3 architecture, byte-level vocabulary with a few merges, ChatML. Its answers are noise, and always the same noise.
"""

from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_WIDTH = 2, 64, 128, 2, 1, 32
CONTEXT_TOKENS = 1024
MERGES = ("Ċ Ċ", "Ġ t", "h e", "u s", "us e")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_characters() -> list[str]:
    """The printable character that GPT-2's byte-level BPE writes for each byte 0-255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary() -> list[str]:
    return [*byte_characters(), *(merge.replace(" ", "") for merge in MERGES), *SPECIALS]


def write(path: Path, *, template: str | None = CHATML, seed: int = 7) -> Path:
    """Writes the model to `path` and returns it."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
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
    writer.add_rope_freq_base(10000.0)
    _add_vocabulary(writer, template)
    for name, tensor in _tensors(np.random.default_rng(seed)):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, template: str | None) -> None:
    tokens = vocabulary()
    plain = len(tokens) - len(SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * plain + [gguf.TokenType.CONTROL] * len(SPECIALS))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _tensors(random: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    def weights(*shape: int) -> np.ndarray:
        return random.normal(0.0, 1.5 / shape[-1] ** 0.5, shape).astype(np.float32)

    def ones(width: int) -> np.ndarray:
        return np.ones(width, dtype=np.float32)

    words = len(vocabulary())
    tensors = [
        ("token_embd.weight", random.normal(0.0, 1.0, (words, HIDDEN)).astype(np.float32)),
        ("output.weight", weights(words, HIDDEN)),
        ("output_norm.weight", ones(HIDDEN)),
    ]
    for layer in range(LAYERS):
        block = {
            "attn_norm": ones(HIDDEN),
            "attn_q": weights(HEADS * HEAD_WIDTH, HIDDEN),
            "attn_k": weights(KV_HEADS * HEAD_WIDTH, HIDDEN),
            "attn_v": weights(KV_HEADS * HEAD_WIDTH, HIDDEN),
            "attn_output": weights(HIDDEN, HEADS * HEAD_WIDTH),
            "attn_q_norm": ones(HEAD_WIDTH),
            "attn_k_norm": ones(HEAD_WIDTH),
            "ffn_norm": ones(HIDDEN),
            "ffn_gate": weights(FEED_FORWARD, HIDDEN),
            "ffn_up": weights(FEED_FORWARD, HIDDEN),
            "ffn_down": weights(HIDDEN, FEED_FORWARD),
        }
        tensors += [(f"blk.{layer}.{name}.weight", tensor) for name, tensor in block.items()]
    return tensors
