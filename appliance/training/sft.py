"""Supervised fine-tuning: a LoRA adapter that learns the assistant's turns of the conversations."""

from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data.check import read_rows
from appliance.data.formats import Row
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
    rows, tokenizer, labelled = processes.from_first(lambda: _label(recipe, dataset, base, root))
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
        outcome = loop.train(trainer, draft.path, "sft", checkpoint)
        models.save_adapter(model, draft.path)
        samples.write(model, tokenizer, rows, recipe, draft.path)
        draft.results.update(outcome, rows=len(rows), tokens=total, learned_tokens=learned)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def _label(recipe: Recipe, dataset: Path, base: Base, root: Path) -> tuple[list[Row], Any, list[labels.LabelledRow]]:
    """The conversations, the tokenizer, and the conversations as checked tokens and labels."""
    loop.require_space(base.path, root)
    rows = read_rows(dataset, "sft")
    tokenizer = models.load_tokenizer(base.path)
    labelled = labels.label_conversations(tokenizer, rows, models.marked_template(base.path, tokenizer))
    lengths = [(row.line, len(row.input_ids)) for row in labelled]
    labels.require_lengths(lengths, recipe.sft.max_tokens, "sft.max_tokens", recipe.data.sft.name)
    labels.verify_labels(tokenizer, rows, labelled)
    if "dpo" in recipe.phases:  # a triplet that is too long is said now, not after hours of SFT
        preferences.tokenize_checked(tokenizer, dataset, recipe)
    if "grpo" in recipe.phases:  # the same for prompts, and for rewards that cannot be trained with
        asked = prompts.read_checked(tokenizer, dataset, recipe)
        reward_linter.lint(registry.build(recipe, asked), asked, [], recipe.languages)
    return rows, tokenizer, labelled


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
