"""Direct preference optimization (Rafailov et al. 2023), continuing the SFT adapter with its frozen copy as reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data.check import read_rows
from appliance.recipe import Recipe
from appliance.training import batches, loop, preferences, processes, run_files, samples
from appliance.training import model as models
from appliance.training.model import Base
from appliance.training.preferences import Pair, Score

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
    checkpoint = processes.from_first(lambda: loop.resume_point(identity, root, resume=resume, restart=restart))
    tokenizer, pairs = processes.from_first(lambda: _tokenize(recipe, dataset, base, root))
    rows = read_rows(dataset, "dpo")
    with processes.draft(identity, root, keep_partial=checkpoint is not None) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = continue_adapter(base, adapter)
        trainer = _trainer(model, tokenizer, rows, recipe, draft.path)
        outcome = loop.train(trainer, draft.path, "dpo", checkpoint, batches=batches.record(trainer))
        models.save_adapter(model, draft.path)
        outcome |= preferences.compare(pairs, *_scores(model, pairs))
        _report(outcome, len(rows))
        samples.write(model, tokenizer, read_rows(dataset, "sft"), recipe, draft.path)
        draft.results.update(outcome, rows=len(rows))
        run_files.write(draft, identity, recipe, "dpo", dataset, base)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def _tokenize(recipe: Recipe, dataset: Path, base: Base, root: Path) -> tuple[Any, list[Pair]]:
    loop.require_space(base.path, root)
    tokenizer = models.load_tokenizer(base.path)
    return tokenizer, preferences.tokenize_checked(tokenizer, dataset, recipe)


def _scores(model: Any, pairs: Sequence[Pair]) -> tuple[list[Score], list[Score]]:
    """Before, by the frozen copy, and after. Both once training is over: a model that is sharded is so from its first step.

    Every process must call it.
    """
    after = preferences.score(model, pairs)
    model.set_adapter(REFERENCE)
    before = preferences.score(model, pairs)
    model.set_adapter("default")
    return before, after


def continue_adapter(base: Base, adapter: Path) -> Any:
    """The base with the adapter, trainable: without it TRL would start from, and compare with, the bare base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(models.load_model(base.path), adapter, is_trainable=True)


def _report(outcome: dict[str, Any], rows: int) -> None:
    before, after = outcome["accuracy_before"], outcome["accuracy_after"]
    processes.note(f"dpo: chosen answer preferred in {before:.0%} of {rows} rows before, {after:.0%} after")


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
        remove_unused_columns=False,  # `batches` wants the line
    )
    data = Dataset.from_list([{**preferences.conversational(row), batches.LINE: row["line"]} for row in rows])
    return DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
