"""`appliance data ...`: check, audit and divide training data before anything is trained."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from appliance import bases, config
from appliance import recipe as recipes
from appliance.commands.options import dry_run_option, recipe_argument, set_option, strict_option
from appliance.console import Command, emit, json_option, note
from appliance.errors import EnvironmentIncomplete
from appliance.recipe import STARTER, Recipe

MOST_SHOWN = 100  # defects; a large file may have one in every row


@click.command(cls=Command)
@recipe_argument
@set_option
@strict_option
@dry_run_option
@json_option
def check(recipe: Path, sets: tuple[str, ...], strict: bool, dry_run: bool, as_json: bool) -> None:
    """Check every row of a recipe's files; report each defect with its line."""
    from appliance.data import check as checking
    from appliance.data import examples

    root = config.artifacts_root()
    loaded = recipes.load(recipe, sets)
    plan = checking.plan(loaded)
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    result = {"artifact": plan.location(root), "state": state}
    if not dry_run:
        dataset = checking.check(loaded, root, strict=strict)
        defects = checking.read_defects(dataset)
        for each in dataset.results["formats"].values():
            note(each["text"])
        where = f", all in {dataset.path / 'defects.jsonl'}"
        for line in examples.some([str(defect) for defect in defects], MOST_SHOWN, where):
            note(f"  {line}")
        rows = ", ".join(f"{count} {name}" for name, count in dataset.results["rows"].items())
        aside, fixed = dataset.results["set_aside"], dataset.results["fixed"]
        note(f"data: {rows} rows usable; {len(defects)} defects, {fixed} fixed, {aside} rows set aside")
        result |= {"results": dict(dataset.results), "defects": [str(defect) for defect in defects]}
    emit(result, as_json, f"{result['artifact']} ({state})")


@click.command(cls=Command)
@recipe_argument
@set_option
@dry_run_option
@json_option
def audit(recipe: Path, sets: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Lengths, languages, duplicates, personal data, shortcuts and contradictions: audit.html and audit.json."""
    from appliance.data import audit as auditing
    from appliance.data import check as checking

    root = config.artifacts_root()
    loaded = recipes.load(recipe, sets)
    dataset = checking.plan(loaded)
    base = _base_folder(loaded, f"{dataset.kind}/{dataset.location(root).name}", root)
    plan = auditing.plan(loaded, f"{dataset.kind}/{dataset.location(root).name}", base)
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    result: dict[str, Any] = {"artifact": plan.location(root), "state": state}
    if not dry_run:
        made = auditing.audit(loaded, checking.check(loaded, root, strict=False), base, root)
        findings = auditing.read_findings(made)
        for finding in findings:
            note(f"  {finding}")
        page = made.path / "audit.html"
        note(f"audit: {made.results['problems']} problems, {made.results['notices']} notices; the page: {page}")
        result |= {"page": page, "results": dict(made.results), "findings": [asdict(finding) for finding in findings]}
    emit(result, as_json, f"{result['artifact']} ({state})")


def _base_folder(loaded: Recipe, dataset: str, root: Path) -> Path | None:
    """The base whose tokenizer lengths are counted with; none while it was neither pulled nor made."""
    if loaded.base == STARTER:
        from appliance.training import starter

        made = starter.plan(loaded, dataset).existing(root)
        return made.path if made else None
    try:
        return bases.locate(loaded.base, root)
    except EnvironmentIncomplete:
        return None


@click.command(cls=Command)
@recipe_argument
@click.option(
    "--validation",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Of the rows, to hold out.",
)
@click.option("--seed", type=click.IntRange(0), help="Which rows; by default the recipe's seed.")
@click.option("--force", is_flag=True, help="Replace files of an earlier split that hold other rows.")
@set_option
@dry_run_option
@json_option
def split(
    recipe: Path, validation: float, seed: int | None, force: bool, sets: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Train and validation rows beside the recipe, by language and topic; near-duplicates never cross."""
    from appliance.data import check as checking
    from appliance.data import split as splitting

    loaded = recipes.load(recipe, sets)
    files = splitting.plan_files(loaded, recipe.parent)
    if dry_run:
        state = "there" if all(path.exists() for path in files.values()) else "to make"
        emit({"state": state, "files": files}, as_json, "\n".join(f"{path} ({state})" for path in files.values()))
        return
    dataset = checking.check(loaded, config.artifacts_root(), strict=False)
    rows = splitting.read(loaded, {kind: checking.read_rows(dataset.path, kind) for kind in splitting.KINDS})
    chosen_seed = loaded.seed if seed is None else seed
    parts = splitting.divide(rows, loaded.languages, validation, chosen_seed)
    state = splitting.write(loaded, parts, files, force=force)
    for part in parts:
        note(splitting.in_words(part))
    if aside := dataset.results["set_aside"]:
        note(f"in neither file: {aside:,} that `appliance data check {recipe}` sets aside, each with its reason")
    figures = {part.kind: splitting.as_data(part) for part in parts}
    emit({"state": state, "files": files, "figures": figures}, as_json, splitting.next_step(recipe, files, state))
