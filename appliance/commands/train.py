"""`appliance train`: the starter base, SFT, DPO (KTO, ORPO), GRPO and passages; each phase continues the one before."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance import artifacts, config
from appliance import recipe as recipes
from appliance.artifacts import Plan
from appliance.commands import launching
from appliance.commands.options import dry_run_option, set_option
from appliance.console import Command, emit, json_option
from appliance.errors import ArtifactError, RecipeError
from appliance.recipe import STARTER, Recipe
from appliance.training import processes
from appliance.training_settings import ORDER, PREFERENCES, Phase

if TYPE_CHECKING:
    from appliance.training.lock import Lock
    from appliance.training.model import Base

PHASES = ("base", *ORDER)


@click.command(cls=Command)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--phase", type=click.Choice(PHASES), help="Only this phase; by default all phases of the recipe.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run from its last checkpoint.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), envvar="APPLIANCE_METRICS_PORT", help="Serve /metrics there meanwhile."
)
@click.option("--metrics-host", default="127.0.0.1", envvar="APPLIANCE_METRICS_HOST", show_default=True)
@click.option(
    "--from-lock",
    type=click.Path(path_type=Path),
    help="Repeat the run of this run.lock.json, instead of training a RECIPE.",
)
@click.option(
    "--launch",
    type=click.Path(path_type=Path),
    metavar="YAML",
    help="Run this command in the processes of an accelerate configuration, as deploy/accelerate has some.",
)
@click.option(
    "--report-to",
    multiple=True,
    default=["none"],
    show_default=True,
    metavar="TRACKER",
    help="Also report to this tracker, which may use the network: one that transformers knows; may be repeated.",
)
@set_option
@dry_run_option
@json_option
def train(
    recipe: Path | None,
    phase: str | None,
    resume: bool,
    restart: bool,
    metrics_port: int | None,
    metrics_host: str,
    from_lock: Path | None,
    launch: Path | None,
    report_to: tuple[str, ...],
    sets: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the phases of a recipe: base (the starter only), sft, dpo (or kto, orpo), grpo, passages. --launch: on cards."""
    if launch is not None:
        launching.launch(launch, sys.argv[1:])
    if not dry_run or processes.count() > 1:
        config.apply_quiet_environment()
    with processes.together():
        loaded, steps, locked = processes.from_first(lambda: _asked(recipe, sets, phase, from_lock))
        if not dry_run:
            processes.from_first(lambda: _require(loaded, steps))
        result: dict[str, Any] = {}
        from appliance.training import metrics, trackers

        port = metrics_port if processes.is_first() and not dry_run else None
        with metrics.exposed(metrics_host, port), trackers.reported_to(report_to):
            for step in steps:
                result = _run_phase(step, loaded, resume=resume, restart=restart, dry_run=dry_run)
                if phase is None and not as_json and processes.is_first():
                    click.echo(f"{step}: {result['artifact']} ({result['state']})")
        if locked and not dry_run and processes.is_first():
            result |= _compared(result["artifact"], locked)
        if (phase or as_json) and processes.is_first():
            emit(result, as_json, f"{result['artifact']} ({result['state']})")


def _asked(
    path: Path | None, sets: tuple[str, ...], phase: str | None, from_lock: Path | None
) -> tuple[Recipe, list[str], "Lock | None"]:
    """The recipe, which of its phases are to be run, and the lock file that it came from, if it did."""
    if from_lock is not None:
        if path is not None or phase is not None:
            raise RecipeError("--from-lock repeats one run: give neither a RECIPE nor a --phase.")
        locked = _locked(from_lock, sets)
        return locked.recipe, locked.phases, locked
    if path is None:
        raise click.UsageError("Missing argument 'RECIPE'.")
    return *_asked_of_recipe(path, sets, phase), None


def _locked(file: Path, sets: tuple[str, ...]) -> "Lock":
    """A lock file whose data and base are here; says what else here differs from where it was written."""
    from appliance.training import lock, model

    locked = lock.read(file, sets)
    name = locked.recipe.base
    lock.require_inputs(locked, None if name == STARTER else model.locate(name, config.artifacts_root()).path)
    for difference in lock.differences(locked, _plans(locked.recipe, config.artifacts_root())[locked.written["phase"]]):
        processes.note(f"differs here: {difference}")
    return locked


def _compared(made: Path, locked: "Lock") -> dict[str, Any]:
    """Whether the adapter has the weights of the one that was locked."""
    from appliance.training.lock import WEIGHTS

    is_same = artifacts.digest_file(made / WEIGHTS) == locked.written["weights_sha256"]
    processes.note(f"{made / WEIGHTS} {'is the same, to the byte, as' if is_same else 'differs from'} what was locked")
    return {"same_weights": is_same}


def _asked_of_recipe(path: Path, sets: tuple[str, ...], phase: str | None) -> tuple[Recipe, list[str]]:
    recipe = recipes.load(path, sets)
    if phase == "base" and recipe.base != STARTER:
        raise RecipeError(f"--phase base makes the starter only; this recipe's base is {recipe.base!r}.")
    if phase not in (None, "base", *recipe.phases):
        raise RecipeError(f"--phase {phase}: the recipe's phases are {', '.join(recipe.phases)}.")
    steps = [phase] if phase else [*(["base"] if recipe.base == STARTER else []), *recipe.phases]
    for section, settings in _sections(recipe, steps).items():
        processes.share(settings.batch_rows, settings.accumulate, section)
    return recipe, steps


def _sections(recipe: Recipe, steps: Sequence[str]) -> dict[str, Phase]:
    """The recipe's settings of phases; the base has some of its own."""
    return {step: getattr(recipe, step) for step in steps if step != "base"}


def _require(recipe: Recipe, steps: Sequence[str]) -> None:
    """Raises for settings that this machine cannot do, of all phases: not after hours of the first."""
    from appliance.training import kernels

    for section, settings in _sections(recipe, steps).items():
        kernels.require(section, settings)


def _run_phase(phase: str, recipe: Recipe, *, resume: bool, restart: bool, dry_run: bool) -> dict[str, Any]:
    root = config.artifacts_root()
    plans, existing = processes.from_first(lambda: _found(phase, recipe, root))
    state = "unchanged" if existing else "to make" if dry_run else "made"
    if existing is None and not dry_run:
        existing = _make(phase, recipe, root, plans, resume=resume, restart=restart)
    results = dict(existing.results) if existing else {}
    return {"artifact": plans[phase].location(root), "state": state, "results": results}


def _found(phase: str, recipe: Recipe, root: Path) -> tuple[dict[str, Plan], artifacts.Artifact | None]:
    """What each phase will make, and the artifact of this one, if it is there."""
    plans = _plans(recipe, root)
    existing = plans[phase].existing(root)
    if phase == "base" and existing is None and processes.count() > 1:
        raise ArtifactError(
            f"{plans[phase].location(root)} is not made yet, and one process makes it:"
            " run `appliance train RECIPE --phase base` first, without a launcher."
        )
    return plans, existing


def _plans(recipe: Recipe, root: Path) -> dict[str, Plan]:
    """What each phase will make; nothing is loaded for it."""
    from appliance.data import check
    from appliance.training import grpo, model, passages, preference_phase, sft, starter

    plans = {"data": check.plan(recipe)}
    dataset = artifacts.identity(plans["data"].location(root))
    if recipe.base == STARTER:
        plans["base"] = starter.plan(recipe, dataset)
        base = artifacts.identity(plans["base"].location(root))
    else:
        base = model.locate(recipe.base, root).identity
    plans["sft"] = sft.plan(recipe, dataset, base)
    if name := recipe.preference_phase:
        continued = plans["sft"].location(root)
        plans[name] = preference_phase.plan(recipe, name, dataset, base, artifacts.identity(continued))
    if "grpo" in recipe.phases:
        continued = _continued("grpo", recipe, root, plans)
        plans["grpo"] = grpo.plan(recipe, dataset, base, artifacts.identity(continued))
    if "passages" in recipe.phases:
        continued = _continued("passages", recipe, root, plans)
        plans["passages"] = passages.plan(recipe, dataset, base, artifacts.identity(continued))
    return plans


def _continued(phase: str, recipe: Recipe, root: Path, plans: dict[str, Plan]) -> Path:
    """Where the adapter lies, or will lie, that a phase after SFT continues."""
    if phase == "grpo" and recipe.grpo.adapter is not None:
        return recipe.grpo.adapter
    before = [each for each in ORDER[: ORDER.index(phase)] if each in plans]
    return plans[before[-1]].location(root)


def _make(
    phase: str, recipe: Recipe, root: Path, plans: dict[str, Plan], *, resume: bool, restart: bool
) -> artifacts.Artifact:
    from appliance.training import model

    for problem in model.gpu_problems():
        processes.note(f"warning: {problem}")
    with model.gpu_lease():
        return _train(phase, recipe, root, plans, resume=resume, restart=restart)


def _train(
    phase: str, recipe: Recipe, root: Path, plans: dict[str, Plan], *, resume: bool, restart: bool
) -> artifacts.Artifact:
    from appliance.data import check
    from appliance.training import grpo, passages, preference_phase, sft, starter

    dataset = processes.from_first(lambda: check.check(recipe, root, strict=False).path)
    if phase == "base":
        return starter.make(recipe, dataset, root, resume=resume, restart=restart)

    base, adapter = processes.from_first(lambda: _inputs(phase, recipe, root, plans))
    if phase == "sft":
        return sft.train(recipe, dataset, base, root, resume=resume, restart=restart)
    if phase in PREFERENCES:
        return preference_phase.train(recipe, phase, dataset, base, adapter, root, resume=resume, restart=restart)
    if phase == "passages":
        return passages.train(recipe, dataset, base, adapter, root, resume=resume, restart=restart)
    return grpo.train(recipe, dataset, base, adapter, root, resume=resume, restart=restart)


def _inputs(phase: str, recipe: Recipe, root: Path, plans: dict[str, Plan]) -> tuple["Base", Path]:
    """The base, and the adapter that a later phase continues (SFT starts from the base alone), both as they were made."""
    from appliance.training import model

    base = model.locate(str(_whole(plans["base"], root, "base")) if recipe.base == STARTER else recipe.base, root)
    artifacts.check_input(base.path)
    if phase == "sft":
        return base, base.path
    adapter = _continued(phase, recipe, root, plans)
    for before in [name for name in ORDER if name in plans and name != phase]:
        if adapter == plans[before].location(root):
            _whole(plans[before], root, before)
    if not (adapter / "adapter_config.json").is_file():
        raise ArtifactError(f"{adapter} is no adapter: it has no adapter_config.json (grpo.adapter).")
    artifacts.check_input(adapter)
    return base, adapter


def _whole(plan: Plan, root: Path, phase: str) -> Path:
    location = plan.location(root)
    if plan.existing(root) is None:
        raise ArtifactError(f"{location} is not made yet; run `appliance train RECIPE --phase {phase}` first.")
    return location
