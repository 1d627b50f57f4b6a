"""Small models with random weights of the families that users name: real shapes scaled down, real tokenizers and templates.

Tokenizers are rebuilt from the vocabularies in llama.cpp's source where they are there (all but Phi-3's with their first
tokens alone, for speed; the whole ones are in test_pre_tokenizer.py), and trained on the spot elsewhere, with the family's
own way of splitting, special tokens and chat template. Widths are multiples of 256, as K-quants need.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import llama_cpp_source, pre_tokenizer
from tests.convert import tokenizer_files as files

HIDDEN, FEED_FORWARD, LAYERS = 256, 512, 2
# Meta's, of Llama-2-7b-chat-hf, but for the system message.
LLAMA_2_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"
)
# Microsoft's, of phi-4.
PHI_4_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
FALCON_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What makes a model one of a family."""

    write_tokenizer: Callable[[Path], None]
    settings: Callable[[int], Any]  # transformers' configuration, for so many tokens
    template: str  # the name of a file in models/templates, or the template
    pre_tokenizer: str | None
    targets: Sequence[str]  # of an adapter
    dtype: str = "bfloat16"


def template(name: str) -> str:
    """A family's chat template: the text itself, or a file of llama.cpp's."""
    path = llama_cpp_source.converter_dir() / "models" / "templates" / name
    return path.read_text(encoding="utf-8") if name.endswith(".jinja") else name


LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PHI_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# Mistral's, of Mistral-7B-Instruct-v0.3, without its tools.
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"
)


def _shape(tokens: int, **more: Any) -> dict[str, Any]:
    """What most configurations have, scaled down."""
    common = {"vocab_size": tokens, "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS}
    return {**common, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, **more}


def _llama_2(tokens: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_shape(tokens, num_key_value_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=False))


def _llama_3(tokens: int, factor: float, *, is_tied: bool) -> Any:
    from transformers import LlamaConfig

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    special = {"bos_token_id": None, "eos_token_id": None}
    shape = _shape(tokens, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=is_tied)
    return LlamaConfig(**shape, head_dim=64, rope_parameters=rope, **special)


def _qwen_25(tokens: int) -> Any:
    from transformers import Qwen2Config

    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return Qwen2Config(
        **_shape(tokens, tie_word_embeddings=True, rope_parameters=rope, bos_token_id=None, eos_token_id=None)
    )


def _qwen_3(tokens: int) -> Any:
    from transformers import Qwen3Config

    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    shape = _shape(tokens, head_dim=128, tie_word_embeddings=True, rope_parameters=rope)
    return Qwen3Config(**shape, bos_token_id=None, eos_token_id=None)


def _mistral(tokens: int, **more: Any) -> Any:
    from transformers import MistralConfig

    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return MistralConfig(**_shape(tokens, sliding_window=None, rope_parameters=rope, rms_norm_eps=1e-5, **more))


def _ministral(tokens: int) -> Any:
    from transformers import Ministral3Config

    yarn = {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    rope = {**yarn, "rope_theta": 1000000.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    shape = _shape(tokens, head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return Ministral3Config(**shape, rope_parameters=rope)


def _falcon(tokens: int) -> Any:
    from transformers import FalconConfig

    shape = {"vocab_size": tokens, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return FalconConfig(
        **shape, multi_query=True, parallel_attn=True, bias=False, alibi=False, new_decoder_architecture=False
    )


def _gemma_2(tokens: int) -> Any:
    from transformers import Gemma2Config

    shape = _shape(tokens, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, max_position_embeddings=8192)
    return Gemma2Config(**shape, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, pad_token_id=0)


def _gemma_3(tokens: int) -> Any:
    from transformers import Gemma3TextConfig

    layers = [*["sliding_attention"] * 5, "full_attention"]  # llama.cpp knows no other order
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    window = {"sliding_window": 512, "max_position_embeddings": 32768}
    shape = _shape(tokens, num_hidden_layers=6, head_dim=256, query_pre_attn_scalar=256, **window)
    return Gemma3TextConfig(**shape, layer_types=layers, rope_parameters=rope, pad_token_id=0)


def _phi_3(tokens: int) -> Any:
    from transformers import Phi3Config

    return Phi3Config(**_shape(tokens, num_key_value_heads=4, sliding_window=2047, pad_token_id=0))


def _phi_4(tokens: int) -> Any:
    from transformers import Phi3Config

    shape = _shape(tokens, max_position_embeddings=16384, original_max_position_embeddings=16384, sliding_window=None)
    rope = {"rope_type": "default", "rope_theta": 250000.0}
    return Phi3Config(**shape, rope_parameters=rope, pad_token_id=0, bos_token_id=None, eos_token_id=None)


def _gpt_2(tokens: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=tokens, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=1024)


def _llama_2_tokenizer(folder: Path) -> None:
    pieces = files.pieces_rebuilt("llama-spm", merged=4000)
    files.write_pieces(folder, pieces, prefix="always", bos="<s>", eos="</s>", cls="LlamaTokenizer", legacy=False)


def _llama_3_tokenizer(folder: Path) -> None:
    way = functools.partial(files.split, pre_tokenizer.LLAMA3)
    options = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "cls": "PreTrainedTokenizerFast"}
    files.write_rebuilt(folder, "llama-bpe", way, looks_up=True, merges_kept=8000, **options)


def _deepseek_tokenizer(folder: Path) -> None:
    way = functools.partial(files.split, pre_tokenizer.LLAMA3)
    options = {"bos": files.DEEPSEEK_SPECIAL[0], "eos": files.DEEPSEEK_SPECIAL[1], "cls": "LlamaTokenizerFast"}
    files.write_trained(folder, way, files.DEEPSEEK_SPECIAL, looks_up=True, ordinary=files.DEEPSEEK_SPECIAL[2:], **options)


def _qwen_tokenizer(folder: Path) -> None:
    way = functools.partial(files.split, pre_tokenizer.QWEN2)
    files.write_rebuilt(
        folder, "qwen2", way, bos=None, eos="<|im_end|>", cls="Qwen2Tokenizer", is_nfc=True, merges_kept=8000
    )


def _mistral_tokenizer(folder: Path) -> None:
    pieces = files.pieces_trained(control=files.TEKKEN_SPECIAL[3:10])
    files.write_pieces(folder, pieces, prefix="first", bos="<s>", eos="</s>", cls="LlamaTokenizer", legacy=False)


def _tekken_tokenizer(folder: Path) -> None:
    way = functools.partial(files.split, pre_tokenizer.TEKKEN)
    options = {"bos": "<s>", "eos": "</s>", "cls": "PreTrainedTokenizerFast"}
    files.write_trained(folder, way, files.TEKKEN_SPECIAL, looks_up=True, special_first=True, **options)


def _falcon_tokenizer(folder: Path) -> None:
    special = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    files.write_rebuilt(folder, "falcon", files.falcon_split, cls="PreTrainedTokenizerFast", merges_kept=8000, **special)


def _gemma_tokenizer(folder: Path) -> None:
    own = ["<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>"]
    files.write_pieces(
        folder,
        files.pieces_trained(control=["<mask>"], own=own, gemma=True),
        prefix="never",
        bos="<bos>",
        eos="<eos>",
        cls="GemmaTokenizer",
    )


def _phi_4_tokenizer(folder: Path) -> None:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|fim_prefix|>")
    way = functools.partial(files.split, pre_tokenizer.LLAMA3)
    files.write_trained(folder, way, special, bos="<|endoftext|>", eos="<|im_end|>", cls="GPT2Tokenizer")


def _gpt_2_tokenizer(folder: Path) -> None:
    special = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    files.write_rebuilt(folder, "gpt-2", files.words, cls="GPT2Tokenizer", merges_kept=8000, **special)


FAMILIES: Mapping[str, Family] = {
    "Llama 2": Family(
        write_tokenizer=_llama_2_tokenizer,
        settings=_llama_2,
        template=LLAMA_2_CHAT,
        pre_tokenizer=None,
        targets=LLAMA_TARGETS,
        dtype="float16",
    ),
    "Llama 3.2": Family(
        write_tokenizer=_llama_3_tokenizer,
        settings=functools.partial(_llama_3, factor=32.0, is_tied=True),
        template="meta-llama-Llama-3.2-3B-Instruct.jinja",
        pre_tokenizer="llama-bpe",
        targets=LLAMA_TARGETS,
    ),
    "Qwen2.5": Family(
        write_tokenizer=_qwen_tokenizer,
        settings=_qwen_25,
        template="Qwen-Qwen2.5-7B-Instruct.jinja",
        pre_tokenizer="qwen2",
        targets=LLAMA_TARGETS,
    ),
    "Qwen3": Family(
        write_tokenizer=_qwen_tokenizer,
        settings=_qwen_3,
        template="Qwen-Qwen3-0.6B.jinja",
        pre_tokenizer="qwen2",
        targets=LLAMA_TARGETS,
    ),
    "Mistral": Family(
        write_tokenizer=_mistral_tokenizer,
        settings=_mistral,
        template=MISTRAL_CHAT,
        pre_tokenizer=None,
        targets=LLAMA_TARGETS,
    ),
    "Mistral Nemo": Family(
        write_tokenizer=_tekken_tokenizer,
        settings=functools.partial(_mistral, head_dim=128),
        template="mistralai-Mistral-Nemo-Instruct-2407.jinja",
        pre_tokenizer="tekken",
        targets=LLAMA_TARGETS,
    ),
    "Ministral 3": Family(
        write_tokenizer=_tekken_tokenizer,
        settings=_ministral,
        template="mistralai-Ministral-3-14B-Reasoning-2512.jinja",
        pre_tokenizer="tekken",
        targets=LLAMA_TARGETS,
    ),
    "Falcon": Family(
        write_tokenizer=_falcon_tokenizer,
        settings=_falcon,
        template=FALCON_CHAT,
        pre_tokenizer="falcon",
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "DeepSeek-R1-Distill-Llama": Family(
        write_tokenizer=_deepseek_tokenizer,
        settings=functools.partial(_llama_3, factor=8.0, is_tied=False),
        template="deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja",
        pre_tokenizer="llama-bpe",
        targets=LLAMA_TARGETS,
    ),
    "Gemma 2": Family(
        write_tokenizer=_gemma_tokenizer,
        settings=_gemma_2,
        template="google-gemma-2-2b-it.jinja",
        pre_tokenizer=None,
        targets=LLAMA_TARGETS,
    ),
    "Gemma 3": Family(
        write_tokenizer=_gemma_tokenizer,
        settings=_gemma_3,
        template="google-gemma-2-2b-it.jinja",  # of Gemma 3's own, llama.cpp's source has none; turns are the same
        pre_tokenizer=None,
        targets=LLAMA_TARGETS,
    ),
    "Phi-3": Family(
        write_tokenizer=files.write_phi_3,
        settings=_phi_3,
        template="microsoft-Phi-3.5-mini-instruct.jinja",
        pre_tokenizer=None,
        targets=PHI_TARGETS,
    ),
    "Phi-4": Family(
        write_tokenizer=_phi_4_tokenizer,
        settings=_phi_4,
        template=PHI_4_CHAT,
        pre_tokenizer="dbrx",
        targets=PHI_TARGETS,
    ),
    "GPT-2": Family(
        write_tokenizer=_gpt_2_tokenizer,
        settings=_gpt_2,
        template=FALCON_CHAT,
        pre_tokenizer="gpt-2",
        targets=("c_attn", "c_proj", "c_fc"),
        dtype="float32",
    ),
}


def write_model(family: Family, folder: Path) -> Path:
    """A model of the family with random weights, as its makers publish one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    family.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template(family.template), encoding="utf-8")
    tokens = max(each for each in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    settings = family.settings(max([tokens - 1, *(each["id"] for each in added)]) + 1)
    settings.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    spread(model)
    model.to(getattr(torch, family.dtype)).save_pretrained(folder)
    if settings.model_type == "falcon":  # Falcon 7B's own says nothing of it
        table = json.loads((folder / "config.json").read_text())
        del table["num_kv_heads"]
        (folder / "config.json").write_text(json.dumps(table))
    return folder


def spread(model: Any) -> None:
    """Weights wide enough that the likeliest token stands out, and norms and biases that matter."""
    import torch

    outer = {id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                value.normal_(std=0.2 if id(value) in outer else 0.05)
            elif "norm" in name or "ln_" in name:
                value.add_(torch.randn_like(value), alpha=0.1)
            else:
                value.normal_(std=0.05)
