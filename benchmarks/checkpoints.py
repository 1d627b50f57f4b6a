"""Checkpoints of real shape with random weights, in the Hugging Face format: bases and adapters to be converted or trained.

What is of Qwen3 is written tensor by tensor, as 4B models would not fit beside what is measured; others are made whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.shapes import Shape
from convert import llama_cpp_source, safetensors_file

SHARD_BYTES = 2_000_000_000
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Small enough for a test: a model of two layers, with the whole vocabulary that its tokenizer has.
SMALL = Shape(layers=2, hidden=256, feed_forward=768, heads=4, kv_heads=2, head_width=64)
QWEN3 = {"small": SMALL} | {name: shape for name, shape in shapes.SHAPES.items() if name != "tiny"}
# From the public configurations.
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32} | {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
GEMMA3_1B = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4} | {
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262_144,
    "sliding_window": 512,
}
QWEN25_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28} | {
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
LLAMA_VOCABULARY = (
    "models/ggml-vocab-llama-bpe.gguf",
    "models/templates/meta-llama-Llama-3.2-3B-Instruct.jinja",
    "<|eot_id|>",
)
QWEN_VOCABULARY = (shapes.VOCABULARY_FILE, shapes.TEMPLATE_FILE, "<|im_end|>")
OTHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama-3.2-1B": ("llama", LLAMA_1B),
    "Gemma-3-1B": ("gemma3_text", GEMMA3_1B),
    "Qwen2.5-7B": ("qwen2", QWEN25_7B),
}


def qwen3_config(shape: Shape) -> Any:
    """As transformers describes a Qwen3 model of this shape."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=shape.vocabulary_tokens,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )


def config(name: str) -> Any:
    """Of a model by its name here: one of `QWEN3`, or of `OTHERS`."""
    from transformers import AutoConfig

    if name in QWEN3:
        return qwen3_config(QWEN3[name])
    kind, sizes = OTHERS[name]
    return AutoConfig.for_model(kind, **sizes)


def write_model(folder: Path, shape: Shape) -> None:
    """A Qwen3 checkpoint in bfloat16, in shards, with Qwen's own vocabulary."""
    import torch

    folder.mkdir()
    qwen3_config(shape).save_pretrained(folder)
    write_tokenizer(folder)
    torch.manual_seed(1)
    places: dict[str, str] = {}
    for number, names in enumerate(_shards(shape), 1):
        file = f"model-{number:05}.safetensors"
        safetensors_file.write(folder / file, {each: ("BF16", _shape(each, shape)) for each in names}, _random)
        places.update(dict.fromkeys(names, file))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_other(folder: Path, name: str) -> None:
    """A checkpoint of another architecture, in bfloat16, with Llama's tokenizer or, where there is none, Qwen's."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config(name), dtype=torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder, LLAMA_VOCABULARY if name.startswith("Llama") else QWEN_VOCABULARY)


def write_tokenizer(folder: Path, source: tuple[str, str, str] = QWEN_VOCABULARY) -> None:
    """A vocabulary and a chat template that llama.cpp's source holds, and the token that ends a turn."""
    from transformers import AutoTokenizer

    vocabulary, template, end = source
    name = Path(vocabulary).name
    contents = llama_cpp_source.read_source(vocabulary, template)
    (folder / name).write_bytes(contents[vocabulary])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    (folder / name).unlink()
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.chat_template = contents[template].decode()
    tokenizer.save_pretrained(folder)


def write_adapter(folder: Path, shape: Shape) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM").save_pretrained(folder)
    tensors = {}
    for name in _names(shape):
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            out, into = _shape(name, shape)
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.01 * torch.randn(RANK, into)
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.01 * torch.randn(out, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")


def _random(name: str, dimensions: Sequence[int]) -> Iterator[bytes]:
    import torch

    if len(dimensions) == 1:
        yield torch.ones(dimensions[0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        return
    rows, columns = dimensions
    for start in range(0, rows, 4096):
        piece = torch.randn(min(4096, rows - start), columns) * (0.02 if "embed" in name else columns**-0.5)
        yield piece.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def _shards(shape: Shape) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in _names(shape):
        dimensions = _shape(name, shape)
        size += 2 * dimensions[0] * (dimensions[1] if len(dimensions) > 1 else 1)
        shard.append(name)
        if size > SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _names(shape: Shape) -> Iterator[str]:
    yield "model.embed_tokens.weight"
    for layer in range(shape.layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield f"model.layers.{layer}.self_attn.{part}.weight"
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield f"model.layers.{layer}.mlp.{part}.weight"
        yield f"model.layers.{layer}.input_layernorm.weight"
        yield f"model.layers.{layer}.post_attention_layernorm.weight"
    yield "model.norm.weight"


def _shape(name: str, shape: Shape) -> tuple[int, ...]:
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (shape.vocabulary_tokens, shape.hidden),
        "q_proj": (queries, shape.hidden),
        "k_proj": (keys, shape.hidden),
        "v_proj": (keys, shape.hidden),
        "o_proj": (shape.hidden, queries),
        "q_norm": (shape.head_width,),
        "k_norm": (shape.head_width,),
        "gate_proj": (shape.feed_forward, shape.hidden),
        "up_proj": (shape.feed_forward, shape.hidden),
        "down_proj": (shape.hidden, shape.feed_forward),
    }
    return sizes.get(name.split(".")[-2], (shape.hidden,))
