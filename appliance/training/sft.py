"""Supervised fine-tuning: a LoRA adapter that learns the assistant's turns of the conversations."""

from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data.check import read_rows
from appliance.recipe import Recipe
from appliance.training import adapters, batches, conversations, layout, loop, packing, processes, run_files, samples
from appliance.training import model as models
from appliance.training.conversations import Conversations
from appliance.training.labels import LabelledRow
from appliance.training.model import Base
from appliance.training.rungs import Rung
from appliance.training.validation import Validation

REVISION = 1  # raised when the same data and settings would give another adapter


def plan(recipe: Recipe, dataset: str, base: str) -> Plan:
    config = {"memory": plain(recipe.memory), "lora": plain(recipe.lora), "sft": plain(recipe.sft), "seed": recipe.seed}
    parents = [dataset, base]
    return Plan(kind="adapter", name=f"{recipe.name}-sft", inputs={"revision": REVISION}, parents=parents, config=config)


def train(recipe: Recipe, dataset: Path, base: Base, root: Path, *, resume: bool, restart: bool) -> Artifact:
    """Trains and keeps the adapter; raises `DataError` for rows that are too long, before any weight is loaded."""
    from transformers import set_seed

    from appliance.training import choice

    identity = plan(recipe, artifacts.identity(dataset), base.identity)
    checkpoint = processes.from_first(lambda: loop.resume_point(identity, root, resume=resume, restart=restart))
    read = processes.from_first(lambda: _read(recipe, dataset, base, root))
    processes.note(
        f"sft: {len(read.rows)} conversations, {read.tokens:,} tokens, {read.learned_tokens:,} of them learned"
        " (assistant turns only, checked)"
    )
    rung = processes.from_first(lambda: choice.choose(recipe, base, choice.of_sft(recipe, read.labelled), checkpoint))
    with processes.draft(identity, root, keep_partial=checkpoint is not None) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = adapters.add(layout.load(base.path, rung), recipe.lora)
        trainer = _trainer(model, read.tokenizer, read.labelled, recipe, draft.path, rung)
        layout.settle(trainer, rung)
        layout.remember(draft.path / loop.CHECKPOINTS, rung)
        watched = _validation(recipe, dataset, read)
        if watched:
            watched.watch(trainer, draft.path / loop.CHECKPOINTS)
        recorded = batches.record(trainer)
        outcome = loop.train(trainer, draft.path, "sft", checkpoint, batches=recorded, validation=watched)
        models.save_adapter(model, draft.path)
        samples.write(model, read.tokenizer, read.rows, recipe, draft.path)
        samples.write_learned(read.tokenizer, read.labelled, recipe, draft.path)
        if recipe.sft.truncate:
            outcome |= {"cut_rows": read.cut_rows, "left_out_rows": read.left_out}
        draft.results.update(
            outcome, **layout.results(rung), rows=len(read.rows), tokens=read.tokens, learned_tokens=read.learned_tokens
        )
        run_files.write(draft, identity, recipe, "sft", dataset, base)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def _read(recipe: Recipe, dataset: Path, base: Base, root: Path) -> Conversations:
    loop.require_space(base.path, root)
    adapters.check(base.path, recipe.lora)
    return conversations.read(recipe, dataset, base)


def _validation(recipe: Recipe, dataset: Path, read: Conversations) -> Validation | None:
    """None where the recipe holds no rows out, or wants none measured."""
    if not read.heldout:
        return None
    return Validation(read.heldout, len(read_rows(dataset, "heldout")), recipe.sft, read.tokens)


def _trainer(model: Any, tokenizer: Any, labelled: list[LabelledRow], recipe: Recipe, folder: Path, rung: Rung) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **loop.arguments(folder, recipe.sft, recipe.seed, rung),
        max_length=None,  # lengths were checked; the trainer must not cut
        dataset_kwargs={"skip_prepare_dataset": True},  # tokens and labels are ours, verified
        padding_free=recipe.sft.packing,
        remove_unused_columns=False,  # `batches` wants the line
    )
    data = Dataset.from_list(
        [{"input_ids": row.input_ids, "labels": row.labels, batches.LINE: row.line} for row in labelled]
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    if recipe.sft.packing:
        packing.require_apart(trainer)
    return trainer
