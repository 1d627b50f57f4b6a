"""Merges a LoRA adapter into its base model: `python -m convert.merge`, `appliance convert merge`.

Sums are computed in float32 and rounded once to the type of the base. Files are rewritten tensor by tensor and large tensors
some rows at a time, so that memory does not grow with the model. What cannot be merged exactly is refused, with the reason
and what else can be done. An adapter that was trained on four bits is merged into the 16-bit weights and into what four bits
made of them, and the way that stays closer to what was trained is taken.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, emit, json_option, note
from appliance.errors import ModelFileError
from convert import checkpoint, conversations, divergence, pre_tokenizer, safetensors_file
from convert import nf4 as four_bits
from convert.checkpoint import EMBEDDINGS, HEADS, Checkpoint
from convert.divergence import Answer
from convert.lora import Adapter, merged_rows, read_adapter, rows_as
from convert.mapped_model import MappedModel
from convert.nf4 import Nf4, widened

REVISION = 5  # raised when the same inputs would give other files
NOT_COPIED = {artifacts.MANIFEST, "README.md", "training_template.jinja", "loss.jsonl", "loss.png"}
# A hub repository has the same weights in other formats, too: unmerged, and gigabytes. With them go their indexes and data.
FOREIGN_WEIGHTS = {
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".npz", ".tflite"),
    *(".mlmodel", ".mlpackage", ".safetensors"),
}
INDEXES = {checkpoint.INDEX}
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"}
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_SETTINGS = {TOKENIZER_CONFIG, "special_tokens_map.json"}
TEMPLATES = {"chat_template.jinja", "chat_template.json"}
TOKENIZER_FILES = VOCABULARIES | TOKENIZER_SETTINGS | TEMPLATES
COMPARED = 8  # conversations on which both ways of merging are compared
NAMES_SHOWN = 5


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
        said = None if rows is None else f"{artifacts.identity(rows.parent)}/{rows.name}"
        settings = {"trained_on": trained_on, "rows": said}
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
    rest = _rest(adapter, base)
    rest_bytes = sum(file.stat().st_size for file in rest.values())
    artifacts.require_space(root, model.size_bytes + rest_bytes + 50_000_000, "The merged model")
    for folder in (adapter, base):
        artifacts.check_input(folder)
    _require_same_base(adapter, base)
    lora = _tied(in_file_names(read_adapter(adapter), model), model)
    check_fit(lora, model, adapter)
    nf4, ways = _better_way(base, lora, rows) if is_nf4 else (None, {})
    with artifacts.create(plan, root) as draft:
        for shard in model.shards:
            merge_shard(shard, draft.path / shard.name, lora, nf4)
        draft.results.update(ways)
        _copy(rest, base, lora, draft.path)
        scales = sorted({change.scale for change in lora.changes.values()})
        draft.results.update(merged_weights=len(lora.changes), replaced_weights=len(lora.replaced), scales=scales)
        said = ", ".join(f"{scale:g}" for scale in scales) or "none"
        replaced = f", {len(lora.replaced)} replaced" if lora.replaced else ""
        note(f"merge: {len(lora.changes)} weights changed (scale {said}){replaced}")


def _better_way(base: Path, lora: Adapter, rows: Path | None) -> tuple[Nf4 | None, dict[str, Any]]:
    """Both ways of merging an adapter that was trained on four bits, and how far each is from what was trained."""
    config.apply_quiet_environment()
    mapped = MappedModel(base)
    nf4 = _in_file_names(four_bits.as_trained(mapped), mapped.checkpoint)
    found = four_bits.divergences(base, lora, nf4, _texts(base, rows))
    way = four_bits.better(found)
    said = ", ".join(f"{name} {value:.5f}" for name, value in found.items())
    note(f"merge: KL divergence to the adapter as it was trained (nats): {said}; taken: {way}")
    return nf4 if way == "round trip" else None, {"merged_into": way, "kl_to_trained": found}


def _texts(base: Path, rows: Path | None) -> list[Answer]:
    """The last answers of some conversations, or the probe text where none are given."""
    tokenizer = pre_tokenizer.load(base)
    if rows is None:
        return [Answer(tokenizer(pre_tokenizer.PROBE, add_special_tokens=False)["input_ids"], 1)]
    found = conversations.read(rows)
    chosen = found[:: max(1, len(found) // COMPARED)][:COMPARED]
    last = {each.row: each for each in divergence.answers(tokenizer, chosen, sys.maxsize, "of those compared")}
    if last:
        return list(last.values())
    note(f"merge: no answer of {rows.name} can be told from what stands before it; whole conversations are compared")
    named = [(each, f"row {found.index(each) + 1} of {rows.name}") for each in chosen]
    return [Answer(conversations.token_ids(tokenizer, each, name), 1) for each, name in named]


def _require_same_base(adapter: Path, base: Path) -> None:
    """An adapter fits any base of the same shapes; its manifest says which one it was trained on."""
    if (adapter / artifacts.MANIFEST).exists():
        parents = artifacts.load(adapter).manifest["parents"]
        if (given := artifacts.identity(base.resolve())) not in parents:
            raise ModelFileError(f"{adapter} was trained on {', '.join(parents)}, not on {given}; name its own base.")


def in_file_names(lora: Adapter, model: Checkpoint) -> Adapter:
    """The adapter by the names that the base's files have; a weight that they lack keeps its own."""
    changes = {model.stored_name(name) or name: change for name, change in lora.changes.items()}
    replaced = {model.stored_name(name) or name: tensor for name, tensor in lora.replaced.items()}
    return dataclasses.replace(lora, changes=changes, replaced=replaced)


def _in_file_names(nf4: Nf4, model: Checkpoint) -> Nf4:
    covered, transposed = (
        frozenset(model.stored_name(name) or name for name in names) for names in (nf4.covered, nf4.transposed)
    )
    return dataclasses.replace(nf4, covered=covered, transposed=transposed)


def _tied(lora: Adapter, model: Checkpoint) -> Adapter:
    """Where the base has one matrix for embeddings and head, PEFT saves it twice: fine, if the two are equal.

    Files that have the head in spite of it get it in both places.
    """
    import torch

    heads, embeddings = ([name for name in lora.replaced if name.endswith(end)] for end in (HEADS, EMBEDDINGS))
    if not model.is_tied or not heads or not embeddings or lora.changes.keys() & {*heads, *embeddings}:
        return lora
    if not torch.equal(lora.replaced[embeddings[0]], lora.replaced[heads[0]]):
        return lora
    kept = {name: tensor for name, tensor in lora.replaced.items() if name not in heads or name in model.tensors}
    return dataclasses.replace(lora, replaced=kept, is_tied=True)


def check_fit(lora: Adapter, model: Checkpoint, adapter: Path) -> None:
    """Raises `ModelFileError`, with names and shapes, for an adapter that is another base's, or cannot be merged.

    Its names are those of the base's files (`in_file_names`).
    """
    wanted = {**{name: each.shape for name, each in lora.changes.items()}, **_shapes(lora)}
    if model.is_tied and not lora.is_tied:
        _require_untied(lora, model, adapter)
    problems = []
    for name, shape in sorted(wanted.items()):
        change = lora.changes.get(name)
        found = tuple(model.tensors[name].shape) if name in model.tensors else None
        if found is None:
            problems.append(f"{name} {shape}, which the base does not have")
        elif not _fits(name, shape, found, lora):
            problems.append(f"{name} has another shape: {found} in the base, {shape} in the adapter")
        elif change is not None and change.shape != shape:
            problems.append(f"{name} has another shape: {shape} where the adapter replaces it, {change.shape} where it adds")
    if problems:
        more = f"; and {len(problems) - NAMES_SHOWN} more" if len(problems) > NAMES_SHOWN else ""
        raise ModelFileError(
            f"{adapter} does not fit {model.folder}: {'; '.join(problems[:NAMES_SHOWN])}{more}."
            " This adapter is for another base; name its own."
        )


def _fits(name: str, shape: Sequence[int], found: Sequence[int], lora: Adapter) -> bool:
    """Embeddings and heads that are saved whole may have other rows: tokens were added."""
    return shape == found or (shape[1:] == found[1:] and name in lora.replaced and name.endswith((*EMBEDDINGS, *HEADS)))


def _require_untied(lora: Adapter, model: Checkpoint, adapter: Path) -> None:
    """Raises `ModelFileError` for a change of what embeddings and head share that was trained on one side only."""
    names = {*lora.changes, *lora.replaced}
    if head := next((name for name in sorted(names) if name.endswith(HEADS)), None):
        raise ModelFileError(
            f"{adapter} changes {head}, and {model.folder} has one matrix for embeddings and head (tie_word_embeddings):"
            " merged, it would change the embeddings too; train without the head among target_modules."
        )
    if any(name.endswith(EMBEDDINGS) for name in names) or any(each.is_embedding for each in lora.changes.values()):
        raise ModelFileError(
            f"{adapter} trains the embeddings, and {model.folder} has one matrix for embeddings and head"
            " (tie_word_embeddings): merged, it would change the head too; train with ensure_weight_tying, or without them."
        )


def _shapes(lora: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in lora.replaced.items()}


def merge_shard(source: Path, target: Path, lora: Adapter, nf4: Nf4 | None = None) -> None:
    """Writes one shard with its weights changed; `nf4` merges into what four bits made of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="pt") as shard:

            def pieces(name: str) -> Iterator[bytes] | None:
                change = lora.changes.get(name)
                if (new := lora.replaced.get(name)) is not None:
                    dtype = shard.get_tensor(name).dtype
                    changed = rows_as(new, dtype) if change is None else merged_rows(new, change, dtype)
                    return map(_bytes, changed)
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


def _rest(adapter: Path, base: Path) -> dict[str, Path]:
    """Settings, tokenizer, template: the base's, but for a tokenizer that was saved with the adapter, and its vocabulary.

    What such a tokenizer lacks (settings, template) is the base's again.
    """
    found = {file.name: file for file in base.iterdir() if file.is_file() and _is_taken(file)}
    own = {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    if own.keys() & {"tokenizer.json", "tokenizer.model"}:
        lacking = TOKENIZER_FILES - VOCABULARIES - own.keys()
        if TOKENIZER_CONFIG in own:
            lacking -= TOKENIZER_SETTINGS
        if own.keys() & TEMPLATES or _template(adapter):
            lacking -= TEMPLATES
        found = {name: file for name, file in found.items() if name not in TOKENIZER_FILES or name in lacking} | own
    return found


def _is_taken(file: Path) -> bool:
    is_weights = not FOREIGN_WEIGHTS.isdisjoint(each.lower() for each in file.suffixes)
    return file.name not in NOT_COPIED and (not is_weights or file.name in INDEXES)


def _template(folder: Path) -> Any:
    """The chat template in the settings of the tokenizer, where it was before it got a file of its own; None without."""
    path = folder / TOKENIZER_CONFIG
    return json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None


def _copy(rest: Mapping[str, Path], base: Path, lora: Adapter, target: Path) -> None:
    for name, file in rest.items():
        shutil.copyfile(file, target / name)
    if not TEMPLATES & rest.keys() and (template := _template(base)) and not _template(target):
        _change_json(target / TOKENIZER_CONFIG, chat_template=template)
    rows = next((tensor.shape[0] for name, tensor in lora.replaced.items() if name.endswith(EMBEDDINGS)), None)
    settings = checkpoint.read_settings(target)
    inner = settings.get("text_config")
    text = inner if isinstance(inner, Mapping) else settings
    if rows is not None and text.get("vocab_size") != rows:
        changed = {"vocab_size": rows}
        _change_json(target / "config.json", **({"text_config": {**text, **changed}} if text is inner else changed))


def _change_json(path: Path, **changes: Any) -> None:
    settings = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    merge()
