"""The LoRA adapter that SFT begins with (`add`): which layers it is on, and of which kind; and the one that is continued.

LoRA after Hu et al. 2021, on every linear layer but the head after QLoRA; rsLoRA after Kalajdzievski 2023; DoRA after Liu et
al. 2024. What `convert` can do with each is in docs/training.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.errors import RecipeError
from appliance.training import layout
from appliance.training.model import Base
from appliance.training.rungs import Rung
from appliance.training_settings import Lora

ALL = "all-linear"
REFERENCE = "ref"  # the name that TRL gives the frozen copy
# Groups of layers, by what the module around them is called in transformers: self_attn, attention; mlp, feed_forward.
GROUPS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn")}


def add(model: Any, lora: Lora, *, is_skeleton: bool = False) -> Any:
    """The model with a fresh adapter; raises `RecipeError` as `targets` does.

    `is_skeleton`: the model has no contents, and the adapter needs none.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=targets(linear_layers(model), lora),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings, low_cpu_mem_usage=is_skeleton)


def check(base: Path, lora: Lora) -> None:
    """Raises `RecipeError` for targets that this base does not have; no weight is loaded for it."""
    if lora.targets == ALL:
        return
    from appliance.training import skeletons

    targets(linear_layers(skeletons.make(skeletons.load_config(base))), lora)


def continued(base: Base, adapter: Path, rung: Rung) -> Any:
    """The base with the adapter, trainable: without it TRL would start from, and compare with, the bare base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(layout.load(base.path, rung), adapter, is_trainable=True)


def copy_as_reference(model: Any) -> None:
    """Gives the model a frozen copy of its adapter, as TRL's trainers do that have a reference."""
    model.add_adapter(REFERENCE, model.peft_config["default"])
    _copy(model, "default", REFERENCE)


def take_back(model: Any) -> None:
    """Makes the adapter what its frozen copy is."""
    _copy(model, REFERENCE, "default")


def _copy(model: Any, source: str, target: str) -> None:
    import torch

    with torch.no_grad():
        for name, value in model.named_parameters():
            if f".{source}." in name:
                model.get_parameter(name.replace(f".{source}.", f".{target}.")).copy_(value)


def linear_layers(model: Any) -> list[str]:
    """The names of all linear layers but the head: what PEFT takes for `all-linear`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [name for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D) and each is not head]


def targets(layers: Sequence[str], lora: Lora) -> str | list[str]:
    """As PEFT wants them: `all-linear`, or ends of names. Raises `RecipeError` for what names no layer."""
    asked = (lora.targets,) if isinstance(lora.targets, str) else lora.targets
    if ALL in asked:
        return ALL
    chosen = {each: _group(layers, GROUPS[each]) if each in GROUPS else _ending(layers, each) for each in asked}
    unknown = [name for name, found in chosen.items() if not found]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise RecipeError(
            f"lora.targets: {', '.join(map(repr, unknown))} names no linear layer of this base but for its head; it has"
            f" {', '.join(known)}. Or take {ALL!r}, {' or '.join(map(repr, GROUPS))}."
        )
    return sorted(set().union(*chosen.values()))


def _group(layers: Sequence[str], marks: Sequence[str]) -> set[str]:
    """The ends of names from the module of the group on, such as `self_attn.q_proj`: the last part may be in both groups."""
    found = set()
    for name in layers:
        parts = name.split(".")
        start = next((i for i, part in enumerate(parts[:-1]) if any(mark in part for mark in marks)), None)
        if start is not None:
            found.add(".".join(parts[start:]))
    return found


def _ending(layers: Sequence[str], name: str) -> set[str]:
    return {name} if any(each == name or each.endswith(f".{name}") for each in layers) else set()
