"""The phases that learn which answers are better, DPO, KTO and ORPO: each continues the adapter of SFT. Main entry: `train`.

They differ in the trainer (`dpo.py`, `kto.py`, `orpo.py`), not in what is checked before, compared afterwards and left.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data.check import read_rows
from appliance.recipe import Recipe
from appliance.training import (
    adapters,
    batches,
    dpo,
    judgements,
    kto,
    layout,
    loop,
    orpo,
    preferences,
    processes,
    run_files,
    samples,
)
from appliance.training import model as models
from appliance.training.judgements import Judged
from appliance.training.model import Base
from appliance.training.preferences import Triplets

METHODS: dict[str, ModuleType] = {"dpo": dpo, "kto": kto, "orpo": orpo}


def plan(recipe: Recipe, phase: str, dataset: str, base: str, adapter: str) -> Plan:
    config = {"memory": plain(recipe.memory), phase: plain(getattr(recipe, phase)), "seed": recipe.seed}
    inputs = {"revision": METHODS[phase].REVISION}
    return Plan(
        kind="adapter", name=f"{recipe.name}-{phase}", inputs=inputs, parents=[dataset, base, adapter], config=config
    )


def train(
    recipe: Recipe, phase: str, dataset: Path, base: Base, adapter: Path, root: Path, *, resume: bool, restart: bool
) -> Artifact:
    """Trains on the recipe's preferences; `adapter` is the SFT adapter to continue."""
    from transformers import set_seed

    from appliance.training import choice

    identity = plan(recipe, phase, artifacts.identity(dataset), base.identity, artifacts.identity(adapter))
    checkpoint = processes.from_first(lambda: loop.resume_point(identity, root, resume=resume, restart=restart))
    tokenizer, examples = processes.from_first(lambda: _read(recipe, phase, dataset, base, root))
    work = choice.of_preferences(recipe, phase, examples.longest_tokens)
    rung = processes.from_first(lambda: choice.choose(recipe, base, work, checkpoint, adapter))
    with processes.draft(identity, root, keep_partial=checkpoint is not None) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = adapters.continued(base, adapter, rung)
        trainer = METHODS[phase].trainer(model, tokenizer, examples, recipe, draft.path, rung)
        layout.settle(trainer, rung)
        layout.remember(draft.path / loop.CHECKPOINTS, rung)
        outcome = loop.train(trainer, draft.path, phase, checkpoint, batches=batches.record(trainer))
        models.save_adapter(model, draft.path)
        outcome |= examples.compare(*_scores(model, examples))
        processes.note(f"{phase}: {examples.said(outcome)}")
        samples.write(model, tokenizer, read_rows(dataset, "sft"), recipe, draft.path)
        draft.results.update(outcome, **layout.results(rung), rows=len(examples.rows))
        run_files.write(draft, identity, recipe, phase, dataset, base)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def check(tokenizer: Any, dataset: Path, recipe: Recipe, phase: str) -> Triplets | Judged:
    """What the phase will learn from; raises for rows, and settings, that it cannot be trained with."""
    if phase == "kto":
        kto.check(recipe)
    if recipe.triplets is None:
        return judgements.read_checked(tokenizer, dataset, recipe)
    return preferences.read_checked(tokenizer, dataset, recipe, phase)


def _read(recipe: Recipe, phase: str, dataset: Path, base: Base, root: Path) -> tuple[Any, Triplets | Judged]:
    loop.require_space(base.path, root)
    tokenizer = models.load_tokenizer(base.path)
    return tokenizer, check(tokenizer, dataset, recipe, phase)


def _scores(model: Any, examples: Triplets | Judged) -> tuple[Any, Any]:
    """Before, by the frozen copy, and after. Both once training is over: a model that is sharded is so from its first step.

    Every process must call it.
    """
    after = examples.score(model)
    model.set_adapter(adapters.REFERENCE)
    before = examples.score(model)
    model.set_adapter("default")
    return before, after
