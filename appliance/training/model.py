"""Finds and loads base models: the starter, a model that was pulled, or a local folder. Never downloads.

The only file of this package that calls transformers' loaders, and translates their errors.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import artifacts, bases, device, gpu, gpu_access
from appliance.errors import EnvironmentIncomplete, ModelFileError
from appliance.training import processes

TRAINING_TEMPLATE = "training_template.jinja"
KEPT = "trained.safetensors"  # weights that `take_weights` may want back
BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}  # as the kernel names what x86 and ARM have
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on disk; `identity` is how manifests name it."""

    path: Path
    identity: str


def locate(name: str, root: Path) -> Base:
    """A pulled Hugging Face id, an artifact or a local folder, checked for everything that training needs of it."""
    path = bases.locate(name, root)
    check_folder(path)
    return Base(path, artifacts.identity(path.resolve()))


def check_folder(path: Path) -> None:
    """Raises `ModelFileError` when a model folder has no configuration, tokenizer or safetensors, or is not causal."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} has no config.json, so it is no model in the Hugging Face format.") from None
    except ValueError as error:
        raise ModelFileError(f"{path / 'config.json'} is not valid JSON: {error}.") from error
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = config.get("model_type")
        raise ModelFileError(f"{path} is of type {kind!r}, which transformers cannot load as a causal language model.")
    if config.get("quantization_config"):
        raise ModelFileError(f"{path} holds quantized weights; take the 16-bit original, which can be merged exactly.")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelFileError(f"{path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files.")
    if not list(path.glob("*.safetensors")):
        raise ModelFileError(f"{path} has no .safetensors file; other weight formats can run code and are not loaded.")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer, with a chat template and an end-of-turn token; raises `ModelFileError` without them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"The tokenizer in {path} cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise ModelFileError(f"The tokenizer in {path} has no chat template; use an instruction-tuned model, or add one.")
    if tokenizer.eos_token_id is None:
        raise ModelFileError(f"The tokenizer in {path} names no end-of-turn token (eos_token).")
    rows = _embedding_rows(path)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token  # padding never has a label, so the choice cannot be learned
    _check_ids(path, tokenizer, rows)
    return tokenizer


def _embedding_rows(path: Path) -> int:
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(path, local_files_only=True).get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{path / 'config.json'} cannot be read: {error}") from error


def _check_ids(path: Path, tokenizer: Any, rows: int) -> None:
    """Raises `ModelFileError` where the model has no embedding for a token that any text can have.

    Tokens that were added and that no conversation uses do not matter: Gemma 3 1B has one for images.
    """
    from jinja2 import TemplateError

    used: list[int] = []
    with contextlib.suppress(TemplateError):  # one that wants another conversation; data will show
        probe = [{"role": "user", "content": "?"}]
        used = tokenizer.apply_chat_template(probe, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    highest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id, *used)
    if highest >= rows:
        raise ModelFileError(
            f"The tokenizer in {path} gives token ids up to {highest}, the model has embeddings for {rows}: it belongs to "
            "another model, or tokens were added without resizing the embeddings. Copy the tokenizer of this model."
        )


def marked_template(path: Path, tokenizer: Any) -> str | None:
    """The chat template with generation markers: the model's own, or the file beside it."""
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        return str(tokenizer.chat_template)
    file = path / TRAINING_TEMPLATE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def load_model(path: Path, weights: str = "float32", *, is_nf4: bool = False, in_memory: bool = False) -> Any:
    """The model in the type `weights` (torch's name); raises `ModelFileError` when files are damaged.

    On this process's card; in memory where several cards share one model, each of which then takes its part, and where
    `in_memory` asks for it. `is_nf4`: linear layers but the head in four bits, scales quantized too (Dettmers et al. 2023).
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    on_card = has_gpu() and not processes.is_sharded() and not in_memory
    how: dict[str, Any] = _four_bits(processes.local_index() if on_card else "cpu", weights) if is_nf4 else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=weights, local_files_only=True, **how)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelFileError(f"The model in {path} cannot be loaded: {error}") from error
    return model.to(f"cuda:{processes.local_index()}") if on_card and not is_nf4 else model


def _four_bits(place: int | str, weights: str) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=weights,
    )
    return {"quantization_config": config, "device_map": {"": place}}


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the adapter, whole, from the first process. Every process must call it."""
    weights = processes.whole_weights(model)
    if processes.is_first():
        model.save_pretrained(folder, state_dict=weights, selected_adapters=["default"])


def keep_weights(model: Any, file: Path) -> None:
    """Writes the weights that are trained, whole, from the first process: all or nothing. Every process must call it."""
    from safetensors.torch import save_file

    weights = processes.whole_weights(model)
    if not processes.is_first():
        return
    if weights is None:
        weights = {name: each.detach().cpu().contiguous() for name, each in model.named_parameters() if each.requires_grad}
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".half")
    save_file(weights, half)
    half.replace(file)


def take_weights(model: Any, file: Path) -> None:
    """Puts what `keep_weights` wrote back into the model. Every process must call it."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(file) if processes.is_first() or not processes.is_sharded() else {}
    if processes.is_sharded():
        processes.put_weights(model, weights)
        return
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, each in weights.items():
            trained[name].copy_(each)


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available()) and not processes.is_kept_on_cpu()


def torch_build() -> gpu_access.TorchBuild:
    import torch

    return gpu_access.TorchBuild(
        version=str(torch.__version__),
        backend="rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu",
        finds_card=torch.cuda.is_available(),
        architectures=torch.cuda.get_arch_list(),
    )


def gpu_problems() -> Sequence[gpu_access.Problem]:
    """What keeps this machine's cards from being trained on; nothing where the CPU was chosen."""
    return [] if processes.is_kept_on_cpu() else gpu.problems(torch=torch_build())


def gpu_lease() -> contextlib.AbstractContextManager[None]:
    """Holds this process's card while a phase trains, so that no server loads a model onto it; nothing on the CPU.

    Raises `EnvironmentIncomplete` naming the server or training run that has it, for a card that torch finds and cannot
    compute on, and where one process sees several cards, over which transformers' Trainer would spread it.
    """
    import torch

    if not has_gpu():
        return contextlib.nullcontext()
    if processes.count() == 1 and (seen := torch.cuda.device_count()) > 1:
        raise EnvironmentIncomplete(
            f"{seen} cards are visible, and one process trains on one: name it with CUDA_VISIBLE_DEVICES=0 (or another"
            " number), or start a process for each with --launch (docs/scaling.md)."
        )
    return _leased(processes.local_index())


@contextlib.contextmanager
def _leased(index: int) -> Iterator[None]:
    import torch

    vendor: gpu_access.Vendor = "amd" if torch.version.hip else "nvidia"
    with gpu.lease(vendor, gpu.number_of(index, vendor, os.environ, gpu.gpus()), "training"):
        _compute_on(f"cuda:{index}")
        yield


def _compute_on(device: str) -> None:
    """One product of matrices: torch finds cards that it has no code for, and says so only when they are to compute."""
    import torch

    try:
        ones = torch.ones(16, 16, dtype=getattr(torch, card_type()), device=device)
        (ones @ ones).sum().item()
    except RuntimeError as error:
        built = torch_build()
        names = ", ".join(built.architectures) or "no card"
        raise EnvironmentIncomplete(
            f"torch {built.version} finds the card {device} and cannot compute on it: {str(error).strip().splitlines()[0]} "
            f"It was compiled for {names}; take a build that has this card (TORCH_INDEX of `make setup` or of the image), "
            "see what else uses it, or train on the CPU with CUDA_VISIBLE_DEVICES= set to nothing."
        ) from error


def weight_type(base: Path) -> str:
    """The type that this device trains the base in, as torch names it: `card_type`, or on a CPU float32.

    There bfloat16 is for a base that is stored in 16 bits, where the CPU multiplies in it: half the memory, and several
    times as fast. Without such instructions it would be slower than 32 bits.
    """
    from appliance.training import skeletons

    if has_gpu():
        return card_type()
    stored = str(skeletons.load_config(base).dtype).removeprefix("torch.")
    return "bfloat16" if stored in ("bfloat16", "float16") and has_bfloat16() else "float32"


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return bool(device.cpu_features() & BFLOAT16_FEATURES)


def card_type() -> str:
    """bfloat16 where the card computes in it, float16 on older ones.

    By compute capability: `torch.cuda.is_bf16_supported()` counts emulation and says yes on a T4 or P100.
    """
    import torch

    is_recent = torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8
    return "bfloat16" if is_recent else "float16"
