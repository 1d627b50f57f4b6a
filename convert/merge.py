"""Merges a LoRA adapter into its base model: `python -m convert.merge`, `appliance convert merge`.

Sums are computed in float32 and rounded once to the type of the base. Files are rewritten tensor by tensor and large tensors
some rows at a time, so that memory does not grow with the model. What cannot be merged exactly is refused, with the reason
and what else can be done. An adapter that was trained on four bits is merged into the 16-bit weights and into what four bits
made of them, and the way that stays closer to what was trained is taken.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, emit, json_option, note
from appliance.errors import ModelFileError
from convert import checkpoint, conversations, pre_tokenizer, safetensors_file
from convert import nf4 as four_bits
from convert.checkpoint import Checkpoint
from convert.lora import Adapter, merged_rows, read_adapter
from convert.mapped_model import MappedModel
from convert.nf4 import Nf4, widened

REVISION = 3  # raised when the same inputs would give other files
NOT_COPIED = {artifacts.MANIFEST, "README.md", "training_template.jinja", "loss.jsonl", "loss.png"}
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
}
COMPARED = 8  # conversations on which both ways of merging are compared
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), required=True, help="The folder of the base model.")
@click.option("--trained-on", type=click.Choice(["16-bit", "nf4"]), help="What training computed with; default: as it says.")
@click.option(
    "--conversations", "rows", type=click.Path(path_type=Path), help="For nf4: text to compare both ways of merging on."
)
@click.option("--name", help="Name of the result; default: the adapter's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def merge(
    adapter: Path, base: Path, trained_on: str | None, rows: Path | None, name: str | None, dry_run: bool, as_json: bool
) -> None:
    """Merge ADAPTER (a folder) into its base model."""
    root = config.artifacts_root()
    parents = [artifacts.identity(adapter), artifacts.identity(base)]
    trained_on = trained_on or _trained_on(adapter)
    settings: dict[str, Any] = {}
    if trained_on == "nf4":
        settings = {"trained_on": trained_on, "rows": None if rows is None else artifacts.identity(rows.parent)}
    plan = Plan(kind="merged", name=name or adapter.name, inputs={"revision": REVISION}, parents=parents, config=settings)
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        _make(plan, adapter, base, root, rows, is_nf4=trained_on == "nf4")
    emit({"artifact": plan.location(root), "state": state}, as_json, f"{plan.location(root)} ({state})")


def _trained_on(adapter: Path) -> str:
    """What the adapter's manifest says; an adapter from elsewhere counts as trained on 16 bits."""
    if not (adapter / artifacts.MANIFEST).exists():
        return "16-bit"
    return str(artifacts.load(adapter).results.get("trained_on", "16-bit"))


def _make(plan: Plan, adapter: Path, base: Path, root: Path, rows: Path | None, *, is_nf4: bool) -> None:
    model = checkpoint.read(base)
    artifacts.require_space(root, model.size_bytes + 50_000_000, "The merged model")
    for folder in (adapter, base):
        artifacts.check_input(folder)
    _require_same_base(adapter, base)
    lora = _tied(read_adapter(adapter), model)
    check_fit(lora, model, adapter)
    nf4, ways = _better_way(base, lora, rows) if is_nf4 else (None, {})
    with artifacts.create(plan, root) as draft:
        for shard in model.shards:
            merge_shard(shard, draft.path / shard.name, lora, nf4)
        draft.results.update(ways)
        _copy_the_rest(adapter, base, lora, draft.path)
        scales = sorted({change.scale for change in lora.changes.values()})
        draft.results.update(merged_weights=len(lora.changes), replaced_weights=len(lora.replaced), scales=scales)
        said = ", ".join(f"{scale:g}" for scale in scales) or "none"
        replaced = f", {len(lora.replaced)} replaced" if lora.replaced else ""
        note(f"merge: {len(lora.changes)} weights changed (scale {said}){replaced}")


def _better_way(base: Path, lora: Adapter, rows: Path | None) -> tuple[Nf4 | None, dict[str, Any]]:
    """Both ways of merging an adapter that was trained on four bits, and how far each is from what was trained."""
    config.apply_quiet_environment()
    nf4 = four_bits.as_trained(MappedModel(base))
    found = four_bits.divergences(base, lora, nf4, _texts(base, rows))
    way = four_bits.better(found)
    said = ", ".join(f"{name} {value:.5f}" for name, value in found.items())
    note(f"merge: KL divergence to the adapter as it was trained (nats): {said}; taken: {way}")
    return nf4 if way == "round trip" else None, {"merged_into": way, "kl_to_trained": found}


def _texts(base: Path, rows: Path | None) -> list[list[int]]:
    """Some conversations, or the probe text where none are given."""
    tokenizer = pre_tokenizer.load(base)
    if rows is None:
        return [list(tokenizer(pre_tokenizer.PROBE, add_special_tokens=False)["input_ids"])]
    found = conversations.read(rows)
    chosen = found[:: max(1, len(found) // COMPARED)][:COMPARED]
    return [conversations.token_ids(tokenizer, each, f"row {found.index(each) + 1} of {rows.name}") for each in chosen]


def _require_same_base(adapter: Path, base: Path) -> None:
    """An adapter fits any base of the same shapes; its manifest says which one it was trained on."""
    if (adapter / artifacts.MANIFEST).exists():
        parents = artifacts.load(adapter).manifest["parents"]
        if (given := artifacts.identity(base.resolve())) not in parents:
            raise ModelFileError(f"{adapter} was trained on {', '.join(parents)}, not on {given}; name its own base.")


def _tied(lora: Adapter, model: Checkpoint) -> Adapter:
    """Where the base has one matrix for embeddings and head, PEFT saves it twice: once is enough, if the two are equal."""
    import torch

    replaced = {next((end for end in (EMBEDDING, HEAD) if name.endswith(end)), name): name for name in lora.replaced}
    if not model.is_tied or not {EMBEDDING, HEAD} <= replaced.keys():
        return lora
    if not torch.equal(lora.replaced[replaced[EMBEDDING]], lora.replaced[replaced[HEAD]]):
        return lora
    kept = {name: tensor for name, tensor in lora.replaced.items() if name != replaced[HEAD]}
    return dataclasses.replace(lora, replaced=kept, is_tied=True)


def check_fit(lora: Adapter, model: Checkpoint, adapter: Path) -> None:
    """Raises `ModelFileError`, with names and shapes, for an adapter that is another base's, or cannot be merged."""
    wanted = {**{name: each.shape for name, each in lora.changes.items()}, **_shapes(lora)}
    if missing := sorted(wanted.keys() - model.tensors.keys()):
        if model.is_tied and any(name.endswith(HEAD) for name in missing):
            raise ModelFileError(
                f"{adapter} changes {HEAD}, and {model.folder} has one matrix for embeddings and head (tie_word_embeddings):"
                " merged, it would change the embeddings too; train without lm_head among target_modules."
            )
        raise ModelFileError(f"{adapter} changes {missing[0]} ({len(missing)} such), which {model.folder} does not have.")
    if model.is_tied and not lora.is_tied and any(name.endswith(EMBEDDING) for name in wanted):
        raise ModelFileError(
            f"{adapter} trains the embeddings, and {model.folder} has one matrix for embeddings and head"
            " (tie_word_embeddings): merged, it would change the head too; train with ensure_weight_tying, or without them."
        )
    for name, change in lora.changes.items():
        if (found := tuple(model.tensors[name].shape)) != change.shape:
            raise ModelFileError(
                f"{name} has another shape: {found} in the base, {change.shape} in the adapter;"
                " this adapter is for another base."
            )
    for name, shape in _shapes(lora).items():
        found = tuple(model.tensors[name].shape)
        if found[1:] != shape[1:] or (found != shape and not name.endswith((EMBEDDING, HEAD))):
            raise ModelFileError(
                f"{name} has another shape: {found} in the base, {shape} in the adapter; this adapter is for another base."
            )


def _shapes(lora: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in lora.replaced.items()}


def merge_shard(source: Path, target: Path, lora: Adapter, nf4: Nf4 | None = None) -> None:
    """Writes one shard with its weights changed; `nf4` merges into what four bits made of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as shard:

            def pieces(name: str) -> Iterator[bytes] | None:
                if name in lora.replaced:
                    return iter([_bytes(lora.replaced[name].to(shard.get_tensor(name).dtype))])
                change = lora.changes.get(name)
                if nf4 is not None and name in nf4.covered:
                    matrix = widened(shard.get_tensor(name), name, nf4)
                    return (_bytes(rows) for rows in ([matrix] if change is None else merged_rows(matrix, change)))
                return None if change is None else (_bytes(rows) for rows in merged_rows(shard.get_slice(name), change))

            safetensors_file.rewrite(source, target, _shapes(lora), pieces)
    except SafetensorError as error:
        raise ModelFileError(f"{source} is damaged ({error}); fetch the base model again.") from error


def _bytes(tensor: Any) -> bytes:
    import torch

    content: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return content


def _copy_the_rest(adapter: Path, base: Path, lora: Adapter, target: Path) -> None:
    """Settings, tokenizer, template: the base's, but for a tokenizer that was saved with the adapter and its vocabulary."""
    own_tokenizer = adapter if (adapter / "tokenizer.json").exists() or (adapter / "tokenizer.model").exists() else base
    for file in base.iterdir():
        is_taken = file.suffix != ".safetensors" and file.name not in NOT_COPIED
        if file.is_file() and is_taken and not (file.name in TOKENIZER_FILES and own_tokenizer is adapter):
            shutil.copyfile(file, target / file.name)
    if own_tokenizer is adapter:
        for name in sorted(TOKENIZER_FILES):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, target / name)
    rows = next((tensor.shape[0] for name, tensor in lora.replaced.items() if name.endswith(EMBEDDING)), None)
    settings: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    text: Any = settings.get("text_config") if isinstance(settings.get("text_config"), Mapping) else settings
    if rows is not None and text.get("vocab_size") != rows:
        text["vocab_size"] = rows
        (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    merge()
