"""Merges a LoRA adapter into its base model, tensor by tensor: `python -m convert.merge`, `appliance convert merge`.

W' = W + s * B @ A with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021; Kalajdzievski 2023), computed in
float32 and rounded once to the type of W. Shards are read and written one at a time, so memory holds one shard. What
cannot be merged exactly is refused. Needs safetensors and torch, not the model's code.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, emit, json_option, note
from appliance.errors import ModelFileError

REVISION = 1  # raised when the same inputs would give other files
PREFIX = "base_model.model."
NOT_COPIED = {artifacts.MANIFEST, "README.md", "training_template.jinja", "loss.jsonl", "loss.png"}


@dataclass(frozen=True, slots=True)
class Adapter:
    """The two factors of each changed weight, by the name of the weight in the base, and their common scale."""

    factors: Mapping[str, tuple[Any, Any]]
    scale: float


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), required=True, help="The folder of the base model.")
@click.option("--name", help="Name of the result; default: the adapter's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def merge(adapter: Path, base: Path, name: str | None, dry_run: bool, as_json: bool) -> None:
    """Merge ADAPTER (a folder) into its base model."""
    root = config.artifacts_root()
    parents = [artifacts.identity(adapter), artifacts.identity(base)]
    plan = Plan(kind="merged", name=name or adapter.name, inputs={"revision": REVISION}, parents=parents)
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        _make(plan, adapter, base, root)
    emit({"artifact": plan.location(root), "state": state}, as_json, f"{plan.location(root)} ({state})")


def _make(plan: Plan, adapter: Path, base: Path, root: Path) -> None:
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise ModelFileError(f"{base} has no .safetensors file to merge into.")
    artifacts.require_space(root, sum(shard.stat().st_size for shard in shards) + 50_000_000, "The merged model")
    for folder in (adapter, base):
        artifacts.check_input(folder)
    _require_same_base(adapter, base)
    lora = read_adapter(adapter)
    with artifacts.create(plan, root) as draft:
        used: set[str] = set()
        for shard in shards:
            used |= merge_shard(shard, draft.path / shard.name, lora)
        if missing := sorted(lora.factors.keys() - used):
            raise ModelFileError(f"{adapter} changes {missing[0]} ({len(missing)} such), which {base} does not have.")
        for file in base.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in NOT_COPIED:
                shutil.copyfile(file, draft.path / file.name)
        draft.results.update(merged_weights=len(used), scale=lora.scale)
        note(f"merge: {len(used)} weights changed, scale {lora.scale:g}")


def _require_same_base(adapter: Path, base: Path) -> None:
    """An adapter fits any base of the same shapes; its manifest says which one it was trained on."""
    if (adapter / artifacts.MANIFEST).exists():
        parents = artifacts.load(adapter).manifest["parents"]
        if (given := artifacts.identity(base.resolve())) not in parents:
            raise ModelFileError(f"{adapter} was trained on {', '.join(parents)}, not on {given}; name its own base.")


def read_adapter(folder: Path) -> Adapter:
    """Reads a PEFT adapter; raises `ModelFileError` for what cannot be merged exactly, with the reason."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise ModelFileError(f"{folder} is no adapter: {error.filename} is missing.") from error
    except (ValueError, SafetensorError) as error:
        raise ModelFileError(f"The adapter in {folder} is damaged ({error}); train it again.") from error
    if reason := _unmergeable(settings):
        raise ModelFileError(f"{folder} cannot be merged exactly: {reason}.")
    factors = {}
    for key, tensor in tensors.items():
        module, separator, _ = key.removeprefix(PREFIX).partition(".lora_A.")
        if separator and (partner := tensors.get(key.replace(".lora_A.", ".lora_B."))) is not None:
            factors[f"{module}.weight"] = (tensor, partner)
    if 2 * len(factors) != len(tensors):
        raise ModelFileError(f"{folder} holds tensors that are no pairs of LoRA factors; it cannot be merged exactly.")
    rank, alpha = settings["r"], settings["lora_alpha"]
    return Adapter(factors, alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank)


def merge_shard(source: Path, target: Path, lora: Adapter) -> set[str]:
    """Writes one shard with its weights changed; returns the names of those."""
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    tensors, used = {}, set()
    try:
        with safe_open(source, framework="pt") as shard:
            metadata = shard.metadata()
            for name in shard.keys():  # noqa: SIM118 (a safetensors handle, not a dictionary)
                weight = shard.get_tensor(name)
                if name in lora.factors:
                    a, b = (factor.to(torch.float32) for factor in lora.factors[name])
                    if weight.shape != (b.shape[0], a.shape[1]):
                        shapes = f"{tuple(weight.shape)} in the base, {(b.shape[0], a.shape[1])} in the adapter"
                        raise ModelFileError(f"{name} has another shape: {shapes}; this adapter is for another base.")
                    weight = (weight.to(torch.float32) + lora.scale * (b @ a)).to(weight.dtype)
                    used.add(name)
                tensors[name] = weight
    except SafetensorError as error:
        raise ModelFileError(f"{source} is damaged ({error}); fetch the base model again.") from error
    save_file(tensors, target, metadata=metadata)
    return used


def _unmergeable(settings: Mapping[str, Any]) -> str | None:
    if settings.get("peft_type") != "LORA":
        return f"it is of type {settings.get('peft_type')!r}, not LORA"
    # PiSSA, OLoRA, CorDA and LoftQ change the base weights themselves, which the adapter does not hold.
    initial = str(settings.get("init_lora_weights", True)).lower()
    if initial.startswith(("pissa", "olora", "corda", "loftq")):
        return f"it belongs to a changed base (init_lora_weights = {initial!r})"
    for key, meaning in {
        "use_dora": "DoRA scales whole weights",
        "modules_to_save": "it replaces whole modules",
        "alpha_pattern": "alpha differs between layers",
        "rank_pattern": "rank differs between layers",
        "alora_invocation_tokens": "it is active in part of a text only",
        "fan_in_fan_out": "its weights are transposed",
    }.items():
        if settings.get(key):
            return f"{meaning} ({key})"
    return None if settings.get("bias", "none") == "none" else "it trains biases (bias)"


if __name__ == "__main__":
    merge()
