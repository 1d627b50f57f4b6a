"""`appliance data ...`: check training data before anything is trained."""

from pathlib import Path

import click

from appliance import config
from appliance import recipe as recipes
from appliance.commands.options import dry_run_option, recipe_argument, set_option, strict_option
from appliance.console import Command, emit, json_option, note

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
        for defect in defects[:MOST_SHOWN]:
            note(f"  {defect}")
        if len(defects) > MOST_SHOWN:
            note(f"  and {len(defects) - MOST_SHOWN} more, all in {dataset.path / 'defects.jsonl'}")
        rows = ", ".join(f"{count} {name}" for name, count in dataset.results["rows"].items())
        aside, fixed = dataset.results["set_aside"], dataset.results["fixed"]
        note(f"data: {rows} rows usable; {len(defects)} defects, {fixed} fixed, {aside} rows set aside")
        result |= {"results": dict(dataset.results), "defects": [str(defect) for defect in defects]}
    emit(result, as_json, f"{result['artifact']} ({state})")
