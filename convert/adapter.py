"""Converts a LoRA adapter to GGUF, for swapping at run time: `python -m convert.adapter`, `appliance convert adapter`.

llama.cpp multiplies `B @ A` by alpha / rank, one alpha for the file (src/llama-adapter.cpp, `get_scale`). Its converter
writes PEFT's `lora_alpha` there, which is wrong for rsLoRA (too weak by the root of the rank) and where alpha differs
between layers. So it is given an adapter whose scales were folded into that form before: alpha is the most frequent scale
times rank, and what is left of other layers' scales goes into their `B`.
"""

import collections
import json
import tempfile
from pathlib import Path

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, emit, human_bytes, json_option, note
from appliance.errors import ModelFileError
from convert import checkpoint, converter, gguf_names, llama_cpp_source, staged_model
from convert.checkpoint import EMBEDDINGS, Checkpoint
from convert.lora import CONFIG, FACTOR_A, FACTOR_B, PREFIX, WEIGHTS, Adapter, read_adapter
from convert.merge import check_fit, in_file_names

REVISION = 1  # raised when the same inputs would give another file
SCRIPT = "convert_lora_to_gguf.py"
TYPES = ("f32", "f16")


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), required=True, help="The folder of the base model.")
@click.option("--type", "number_type", type=click.Choice(TYPES), default="f32", show_default=True)
@click.option("--name", help="Name of the result; default: the adapter's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def adapter(adapter: Path, base: Path, number_type: str, name: str | None, dry_run: bool, as_json: bool) -> None:
    """Convert ADAPTER (a folder) to a GGUF file that a served model of the same base can switch on and off."""
    root = config.artifacts_root()
    plan = Plan(
        kind="gguf",
        name=f"{name or adapter.name}-lora-{number_type.upper()}",
        inputs={"revision": REVISION, "llama_cpp_python": llama_cpp_source.VERSION},
        parents=[artifacts.identity(adapter), artifacts.identity(base)],
        config={"type": number_type.upper(), "what": "lora"},
    )
    file = plan.location(root) / f"{plan.name}.gguf"
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        _make(plan, adapter, base, number_type, root)
    emit({"artifact": plan.location(root), "file": file, "state": state}, as_json, f"{file} ({state})")


def _make(plan: Plan, adapter: Path, base: Path, number_type: str, root: Path) -> None:
    model = checkpoint.read(base)
    for folder in (adapter, base):
        artifacts.check_input(folder)
    lora = in_file_names(read_adapter(adapter), model)
    if reason := unswappable(lora):
        raise ModelFileError(
            f"{adapter} cannot be switched on at run time: {reason}. Merge it instead: `appliance convert merge {adapter}"
            f" --base {base}`."
        )
    check_fit(lora, model, adapter)
    size = sum(each.a.numel() + each.b.numel() for each in lora.changes.values()) * 4
    artifacts.require_space(root, size + 50_000_000, "The adapter's GGUF file")
    with artifacts.create(plan, root) as draft, tempfile.TemporaryDirectory() as scratch:
        target = draft.path / f"{plan.name}.gguf"
        alpha = write_folded(lora, Path(scratch))
        write(Path(scratch), adapter, model, target, number_type)
        check_whole(target, lora, adapter)
        draft.results.update(size_bytes=target.stat().st_size, alpha=alpha, weights=len(lora.changes))
        note(f"adapter: {target.name}, {human_bytes(target.stat().st_size)}, {len(lora.changes)} weights, alpha {alpha:g}")


def write(folded: Path, adapter: Path, model: Checkpoint, target: Path, number_type: str) -> None:
    """Converts `folded`, which has one alpha, and is `adapter`; of its base only settings and names of tensors are read."""
    with staged_model.staged(model, None) as base:
        arguments = [str(folded), "--base", str(base), "--outfile", str(target), "--outtype", number_type]
        converter.run(SCRIPT, adapter, arguments, target)


def check_whole(target: Path, lora: Adapter, adapter: Path) -> None:
    """Raises `ModelFileError` for a file that is no adapter, or lacks a weight: the converter drops some without a word."""
    reader = gguf_names.gguf_package().GGUFReader(target)
    kind = reader.get_field("general.type")
    weights = sum(each.name.endswith(".lora_a") for each in reader.tensors)
    if kind is None or kind.contents() != "adapter" or weights != len(lora.changes):
        raise ModelFileError(
            f"{adapter} changes {len(lora.changes)} weights, and llama.cpp's converter made a file of {weights}: it does not"
            " know adapters of this architecture, or of all of these weights. Merge it instead: `appliance convert merge`."
        )


def unswappable(lora: Adapter) -> str | None:
    """Why llama.cpp cannot apply this adapter at run time; None where it can."""
    if any(name.endswith(EMBEDDINGS) or change.is_embedding for name, change in lora.changes.items()):
        return "it changes the embeddings"
    if lora.replaced and lora.replaced.keys() <= lora.changes.keys():
        return (
            f"it changes {min(lora.replaced)}, and PEFT saved all of that weight beside the change (save_embedding_layers);"
            " llama.cpp would add the change to its own copy"
        )
    if lora.replaced:
        return f"it replaces whole tensors, {next(iter(sorted(lora.replaced)))} among them"
    if any(change.magnitude is not None for change in lora.changes.values()):
        return "DoRA scales whole weights"
    return None


def write_folded(lora: Adapter, folder: Path) -> float:
    """Writes the adapter in PEFT's format with one alpha for all layers, each change oriented as the base's file is."""
    import torch
    from safetensors.torch import save_file

    alphas = collections.Counter(change.scale * change.rank for change in lora.changes.values())
    alpha = alphas.most_common(1)[0][0]
    tensors = {}
    for name, change in lora.changes.items():
        factor = change.scale * change.rank / alpha if alpha else 0.0
        stem = PREFIX + name.removesuffix(".weight")
        a, b = change.a.to(torch.float32), change.b.to(torch.float32) * factor
        tensors[stem + FACTOR_A] = (b.T if change.is_transposed else a).contiguous()
        tensors[stem + FACTOR_B] = (a.T if change.is_transposed else b).contiguous()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha}), encoding="utf-8")
    return alpha


if __name__ == "__main__":
    adapter()
