"""Direct preference optimization (Rafailov et al. 2023), continuing the SFT adapter with its frozen copy as reference."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.console import note
from appliance.data.check import read_rows
from appliance.recipe import Recipe
from appliance.training import loop, preferences, samples
from appliance.training import model as models
from appliance.training.model import Base

REVISION = 1  # raised when the same data and settings would give another adapter
REFERENCE = "ref"  # the name that TRL gives the frozen copy


def plan(recipe: Recipe, dataset: str, base: str, adapter: str) -> Plan:
    config = {"dpo": plain(recipe.dpo), "seed": recipe.seed}
    parents = [dataset, base, adapter]
    return Plan(kind="adapter", name=f"{recipe.name}-dpo", inputs={"revision": REVISION}, parents=parents, config=config)


def train(recipe: Recipe, dataset: Path, base: Base, adapter: Path, root: Path, *, resume: bool, restart: bool) -> Artifact:
    """Trains on the preference triplets; `adapter` is the SFT adapter to continue."""
    from transformers import set_seed

    identity = plan(recipe, artifacts.identity(dataset), base.identity, artifacts.identity(adapter))
    checkpoint = loop.resume_point(identity, root, resume=resume, restart=restart)
    loop.require_space(base.path, root)
    rows = read_rows(dataset, "dpo")
    tokenizer = models.load_tokenizer(base.path)
    pairs = preferences.tokenize_checked(tokenizer, dataset, recipe)
    with artifacts.create(identity, root, keep_partial=checkpoint is not None, is_resumable=True) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = continue_adapter(base, adapter)
        before = preferences.score(model, pairs)
        trainer = _trainer(model, tokenizer, rows, recipe, draft.path)
        outcome = loop.train(trainer, draft.path, "dpo", checkpoint)
        after = preferences.score(model, pairs)
        outcome |= preferences.compare(pairs, before, after)
        _report(outcome, len(rows))
        model.save_pretrained(draft.path, selected_adapters=["default"])
        shutil.rmtree(draft.path / REFERENCE, ignore_errors=True)
        samples.write(model, tokenizer, read_rows(dataset, "sft"), recipe, draft.path)
        draft.results.update(outcome, rows=len(rows))
        loop.finish(draft.path)
    return artifacts.load(identity.location(root))


def continue_adapter(base: Base, adapter: Path) -> Any:
    """The base with the adapter, trainable: without it TRL would start from, and compare with, the bare base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(models.load_model(base.path), adapter, is_trainable=True)


def _report(outcome: dict[str, Any], rows: int) -> None:
    before, after = outcome["accuracy_before"], outcome["accuracy_after"]
    note(f"dpo: chosen answer preferred in {before:.0%} of {rows} rows before, {after:.0%} after")


def _trainer(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], recipe: Recipe, folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    weight = recipe.dpo.sft_weight
    arguments = DPOConfig(
        **loop.arguments(folder, recipe.dpo, recipe.seed),
        gradient_checkpointing=models.has_gpu(),
        max_length=None,  # lengths were checked; the trainer must not cut
        beta=recipe.dpo.beta,
        loss_type=["sigmoid", "sft"] if weight else ["sigmoid"],
        loss_weights=[1.0, weight] if weight else None,
    )
    data = Dataset.from_list([preferences.conversational(row) for row in rows])
    return DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
