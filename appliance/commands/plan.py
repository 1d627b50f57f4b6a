"""`appliance plan`: will it fit, on which rung, how long; before a weight is loaded."""

from pathlib import Path

import click

from appliance import config
from appliance import recipe as recipes
from appliance.commands.options import recipe_argument, set_option
from appliance.console import Command, Memory, emit, human_bytes, json_option
from appliance.errors import EnvironmentIncomplete
from appliance.recipe import STARTER


@click.command(cls=Command)
@recipe_argument
@click.option("--vram", type=Memory(), help="Plan for a card of this size, instead of what is free here: 4GiB.")
@set_option
@json_option
def plan(recipe: Path, vram: int | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Will training fit here, laid out how, and how long will it take. Exits with 3 where nothing fits."""
    config.apply_quiet_environment()
    from appliance.data import check
    from appliance.training import loop, model, starter
    from appliance.training import plan as planning

    root = config.artifacts_root()
    loaded = recipes.load(recipe, sets)
    dataset = check.check(loaded, root, strict=False)
    if loaded.base == STARTER:
        made = starter.plan(loaded, dataset.id).existing(root)
        if made is None:
            raise EnvironmentIncomplete(f"The starter is not made yet; run `appliance train {recipe} --phase base` first.")
        base = model.locate(str(made.path), root)
    else:
        base = model.locate(loaded.base, root)
    loop.prepare()
    found = planning.plan(loaded, dataset.path, base, vram)
    text = "\n\n".join(planning.in_words(each) for each in found)
    emit({"phases": [planning.as_data(each) for each in found]}, as_json, text)
    misfits = [each.phase for each in found if each.chosen is None]
    if misfits:
        free = human_bytes(found[0].fits[0].available_bytes)
        raise EnvironmentIncomplete(f"{', '.join(misfits)} fits on no rung in the {free} that are free.")
