"""Supervised fine-tuning: a LoRA adapter that learns the assistant's turns of the conversations."""

from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data.check import read_rows
from appliance.data.formats import Row
from appliance.recipe import Recipe
from appliance.training import batches, labels, loop, preferences, processes, run_files, samples, validation
from appliance.training import model as models
from appliance.training.labels import LabelledRow
from appliance.training.model import Base
from appliance.training.validation import Validation

REVISION = 1  # raised when the same data and settings would give another adapter


def plan(recipe: Recipe, dataset: str, base: str) -> Plan:
    config = {"lora": plain(recipe.lora), "sft": plain(recipe.sft), "seed": recipe.seed}
    parents = [dataset, base]
    return Plan(kind="adapter", name=f"{recipe.name}-sft", inputs={"revision": REVISION}, parents=parents, config=config)


def train(recipe: Recipe, dataset: Path, base: Base, root: Path, *, resume: bool, restart: bool) -> Artifact:
    """Trains and keeps the adapter; raises `DataError` for rows that are too long, before any weight is loaded."""
    from transformers import set_seed

    identity = plan(recipe, artifacts.identity(dataset), base.identity)
    checkpoint = processes.from_first(lambda: loop.resume_point(identity, root, resume=resume, restart=restart))
    rows, tokenizer, labelled, heldout = processes.from_first(lambda: _label(recipe, dataset, base, root))
    learned = sum(label != labels.IGNORED for row in labelled for label in row.labels)
    total = sum(len(row.input_ids) for row in labelled)
    processes.note(
        f"sft: {len(rows)} conversations, {total:,} tokens, {learned:,} of them learned (assistant turns only, checked)"
    )
    with processes.draft(identity, root, keep_partial=checkpoint is not None) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = add_adapter(models.load_model(base.path), recipe)
        trainer = _trainer(model, tokenizer, labelled, recipe, draft.path)
        watched = _validation(recipe, dataset, heldout, total)
        if watched:
            watched.watch(trainer, draft.path / loop.CHECKPOINTS)
        recorded = batches.record(trainer)
        outcome = loop.train(trainer, draft.path, "sft", checkpoint, batches=recorded, validation=watched)
        models.save_adapter(model, draft.path)
        samples.write(model, tokenizer, rows, recipe, draft.path)
        draft.results.update(outcome, rows=len(rows), tokens=total, learned_tokens=learned)
        run_files.write(draft, identity, recipe, "sft", dataset, base)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def _label(
    recipe: Recipe, dataset: Path, base: Base, root: Path
) -> tuple[list[Row], Any, list[LabelledRow], list[LabelledRow]]:
    """The conversations, the tokenizer, the conversations as checked tokens and labels, and held-out ones to validate on."""
    loop.require_space(base.path, root)
    rows = read_rows(dataset, "sft")
    tokenizer = models.load_tokenizer(base.path)
    template = models.marked_template(base.path, tokenizer)
    labelled = _label_rows(tokenizer, rows, template, recipe, recipe.data.sft)
    chosen = validation.choose(read_rows(dataset, "heldout"), recipe.sft.validation_rows)
    heldout = _label_rows(tokenizer, chosen, template, recipe, recipe.data.heldout)
    if "dpo" in recipe.phases:  # a triplet that is too long is said now, not after hours of SFT
        preferences.tokenize_checked(tokenizer, dataset, recipe)
    return rows, tokenizer, labelled, heldout


def _label_rows(
    tokenizer: Any, rows: list[Row], template: str | None, recipe: Recipe, file: Path | None
) -> list[LabelledRow]:
    labelled = labels.label_conversations(tokenizer, rows, template)
    lengths = [(row.line, len(row.input_ids)) for row in labelled]
    labels.require_lengths(lengths, recipe.sft.max_tokens, "sft.max_tokens", file.name if file else "")
    labels.verify_labels(tokenizer, rows, labelled)
    return labelled


def _validation(recipe: Recipe, dataset: Path, heldout: list[LabelledRow], train_tokens: int) -> Validation | None:
    """None where the recipe holds no rows out, or wants none measured."""
    if not heldout:
        return None
    return Validation(heldout, len(read_rows(dataset, "heldout")), recipe.sft, train_tokens)


def add_adapter(model: Any, recipe: Recipe) -> Any:
    """A fresh LoRA adapter on every linear layer but the head (Hu et al. 2021; `all-linear` after QLoRA)."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _trainer(model: Any, tokenizer: Any, labelled: list[LabelledRow], recipe: Recipe, folder: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **loop.arguments(folder, recipe.sft, recipe.seed),
        gradient_checkpointing=models.has_gpu(),
        max_length=None,  # lengths were checked; the trainer must not cut
        dataset_kwargs={"skip_prepare_dataset": True},  # tokens and labels are ours, verified
        remove_unused_columns=False,  # `batches` wants the line
    )
    data = Dataset.from_list(
        [{"input_ids": row.input_ids, "labels": row.labels, batches.LINE: row.line} for row in labelled]
    )
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
