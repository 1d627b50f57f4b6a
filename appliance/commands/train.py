"""`appliance train`: the starter base, SFT and DPO; each phase continues the one before."""

from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance import recipe as recipes
from appliance.artifacts import Plan
from appliance.commands.options import dry_run_option, recipe_argument, set_option
from appliance.console import Command, emit, json_option
from appliance.errors import ArtifactError, NotAvailableYet, RecipeError
from appliance.recipe import STARTER, Recipe

PHASES = ("base", "sft", "dpo", "grpo", "passages")


@click.command(cls=Command)
@recipe_argument
@click.option("--phase", type=click.Choice(PHASES), help="Only this phase; by default all phases of the recipe.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run from its last checkpoint.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), envvar="APPLIANCE_METRICS_PORT", help="Serve /metrics there meanwhile."
)
@click.option("--metrics-host", default="127.0.0.1", envvar="APPLIANCE_METRICS_HOST", show_default=True)
@set_option
@dry_run_option
@json_option
def train(
    recipe: Path,
    phase: str | None,
    resume: bool,
    restart: bool,
    metrics_port: int | None,
    metrics_host: str,
    sets: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the phases of a recipe: base (the starter only), sft, dpo."""
    if phase in ("grpo", "passages"):
        raise NotAvailableYet(f"`appliance train --phase {phase}` is not built yet.")
    loaded = recipes.load(recipe, sets)
    if phase == "base" and loaded.base != STARTER:
        raise RecipeError(f"--phase base makes the starter only; this recipe's base is {loaded.base!r}.")
    if phase not in (None, "base", *loaded.phases):
        raise RecipeError(f"--phase {phase}: the recipe's phases are {', '.join(loaded.phases)}.")
    if not dry_run:
        config.apply_quiet_environment()
    steps = [phase] if phase else [*(["base"] if loaded.base == STARTER else []), *loaded.phases]
    result: dict[str, Any] = {}
    from appliance.training import metrics

    with metrics.exposed(metrics_host, None if dry_run else metrics_port):
        for step in steps:
            result = _run_phase(step, loaded, resume=resume, restart=restart, dry_run=dry_run)
            if phase is None and not as_json:
                click.echo(f"{step}: {result['artifact']} ({result['state']})")
    if phase or as_json:
        emit(result, as_json, f"{result['artifact']} ({result['state']})")


def _run_phase(phase: str, recipe: Recipe, *, resume: bool, restart: bool, dry_run: bool) -> dict[str, Any]:
    root = config.artifacts_root()
    plans = _plans(recipe, root)
    plan = plans[phase]
    existing = plan.existing(root)
    state = "unchanged" if existing else "to make" if dry_run else "made"
    if existing is None and not dry_run:
        existing = _make(phase, recipe, root, plans, resume=resume, restart=restart)
    results = dict(existing.results) if existing else {}
    return {"artifact": plan.location(root), "state": state, "results": results}


def _plans(recipe: Recipe, root: Path) -> dict[str, Plan]:
    """What each phase will make; nothing is loaded for it."""
    from appliance.data import check
    from appliance.training import dpo, model, sft, starter

    plans = {"data": check.plan(recipe)}
    dataset = artifacts.identity(plans["data"].location(root))
    if recipe.base == STARTER:
        plans["base"] = starter.plan(recipe, dataset)
        base = artifacts.identity(plans["base"].location(root))
    else:
        base = model.locate(recipe.base, root).identity
    plans["sft"] = sft.plan(recipe, dataset, base)
    plans["dpo"] = dpo.plan(recipe, dataset, base, artifacts.identity(plans["sft"].location(root)))
    return plans


def _make(
    phase: str, recipe: Recipe, root: Path, plans: dict[str, Plan], *, resume: bool, restart: bool
) -> artifacts.Artifact:
    from appliance.training import model

    with model.gpu_lease():
        return _train(phase, recipe, root, plans, resume=resume, restart=restart)


def _train(
    phase: str, recipe: Recipe, root: Path, plans: dict[str, Plan], *, resume: bool, restart: bool
) -> artifacts.Artifact:
    from appliance.data import check
    from appliance.training import dpo, model, sft, starter

    dataset = check.check(recipe, root, strict=False).path
    if phase == "base":
        return starter.make(recipe, dataset, root, resume=resume, restart=restart)
    base = model.locate(str(_whole(plans["base"], root, "base")) if recipe.base == STARTER else recipe.base, root)
    if phase == "sft":
        artifacts.check_input(base.path)
        return sft.train(recipe, dataset, base, root, resume=resume, restart=restart)
    adapter = _whole(plans["sft"], root, "sft")
    for each in (base.path, adapter):
        artifacts.check_input(each)
    return dpo.train(recipe, dataset, base, adapter, root, resume=resume, restart=restart)


def _whole(plan: Plan, root: Path, phase: str) -> Path:
    location = plan.location(root)
    if plan.existing(root) is None:
        raise ArtifactError(f"{location} is not made yet; run `appliance train RECIPE --phase {phase}` first.")
    return location
