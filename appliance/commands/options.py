"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def recipe_argument(function: F) -> F:
    return click.argument("recipe", type=click.Path(path_type=Path))(function)


def set_option(function: F) -> F:
    about = "Override a recipe value, for example --set sft.epochs=3; may be repeated."
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help=about)(function)


def dry_run_option(function: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")(function)


def strict_option(function: F) -> F:
    return click.option("--strict", is_flag=True, help="Any defect in the data is an error.")(function)
