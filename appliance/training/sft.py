"""Supervised fine-tuning: a LoRA adapter that learns the assistant's turns of the conversations."""

from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data.check import read_rows
from appliance.data.formats import Row
from appliance.errors import DataError
from appliance.recipe import Recipe
from appliance.training import labels, loop, preferences, processes, prompts, reward_linter, samples
from appliance.training import model as models
from appliance.training.model import Base
from appliance.training.rewards import registry

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
    rows, tokenizer, labelled, left_out = processes.from_first(lambda: _label(recipe, dataset, base, root))
    cut = {"cut_rows": sum(row.cut_tokens > 0 for row in labelled), "left_out_rows": left_out} if recipe.sft.truncate else {}
    learned = sum(row.learned_tokens for row in labelled)
    total = sum(len(row.input_ids) for row in labelled)
    processes.note(
        f"sft: {len(rows)} conversations, {total:,} tokens, {learned:,} of them learned (assistant turns only, checked)"
    )
    with processes.draft(identity, root, keep_partial=checkpoint is not None) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = add_adapter(models.load_model(base.path), recipe)
        trainer = _trainer(model, tokenizer, labelled, recipe, draft.path)
        outcome = loop.train(trainer, draft.path, "sft", checkpoint)
        models.save_adapter(model, draft.path)
        samples.write(model, tokenizer, rows, recipe, draft.path)
        draft.results.update(outcome, rows=len(rows), tokens=total, learned_tokens=learned, **cut)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def _label(recipe: Recipe, dataset: Path, base: Base, root: Path) -> tuple[list[Row], Any, list[labels.LabelledRow], int]:
    """The conversations, the tokenizer, the conversations as checked tokens and labels, and how many were left out."""
    loop.require_space(base.path, root)
    rows = read_rows(dataset, "sft")
    tokenizer = models.load_tokenizer(base.path)
    labelled = labels.label_conversations(tokenizer, rows, models.marked_template(base.path, tokenizer))
    if not recipe.sft.truncate:
        lengths = [(row.line, len(row.input_ids)) for row in labelled]
        limit, file = recipe.sft.max_tokens, recipe.data.sft.name
        labels.require_lengths(lengths, limit, "sft.max_tokens", file, ", or set sft.truncate = true to have it cut")
    labels.verify_labels(tokenizer, rows, labelled)
    before = len(rows)
    if recipe.sft.truncate:
        rows, labelled = _cut(tokenizer, rows, labelled, recipe)
    if "dpo" in recipe.phases:  # a triplet that is too long is said now, not after hours of SFT
        preferences.tokenize_checked(tokenizer, dataset, recipe)
    if "grpo" in recipe.phases:  # the same for prompts, and for rewards that cannot be trained with
        asked = prompts.read_checked(tokenizer, dataset, recipe)
        reward_linter.lint(registry.build(recipe, asked), asked, [], recipe.languages)
    return rows, tokenizer, labelled, before - len(rows)


def _cut(
    tokenizer: Any, rows: list[Row], labelled: list[labels.LabelledRow], recipe: Recipe
) -> tuple[list[Row], list[labels.LabelledRow]]:
    """Rows that fit, those that were cut, and none of which no answer is left; raises `DataError` where that is all."""
    limit = recipe.sft.max_tokens
    both = list(zip(rows, labels.truncate(labelled, limit), strict=True))
    kept = [(row, cut) for row, cut in both if cut.learned_tokens]
    without = [f"{cut.line}" for _, cut in both if not cut.learned_tokens]
    file = recipe.data.sft.name
    if not kept:
        raise DataError(
            f"{file}: every answer begins after sft.max_tokens = {limit} tokens; raise it, nothing would be learned."
        )
    rows, labelled = [row for row, _ in kept], [cut for _, cut in kept]
    labels.verify_labels(tokenizer, rows, labelled)
    if cut_rows := sum(row.cut_tokens > 0 for row in labelled):
        lost = sum(row.cut_tokens for row in labelled)
        processes.note(f"sft: {cut_rows} of {len(both)} conversations cut at sft.max_tokens = {limit}, {lost:,} tokens less")
    if without:
        listed = ", ".join([*without[: labels.MOST_SHOWN], *(["…"] if len(without) > labels.MOST_SHOWN else [])])
        processes.note(
            f"sft: {len(without)} conversations left out, since no answer begins within it: {file} lines {listed}"
        )
    return rows, labelled


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


def _trainer(model: Any, tokenizer: Any, labelled: list[labels.LabelledRow], recipe: Recipe, folder: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **loop.arguments(folder, recipe.sft, recipe.seed),
        gradient_checkpointing=models.has_gpu(),
        max_length=None,  # lengths were checked; the trainer must not cut
        dataset_kwargs={"skip_prepare_dataset": True},  # tokens and labels are ours, verified
    )
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in labelled])
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
