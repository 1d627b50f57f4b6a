"""Trackers that a run also reports to, by the names that transformers knows them by: none unless a person names one."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from appliance.errors import EnvironmentIncomplete, RecipeError

_NAMES: ContextVar[Sequence[str]] = ContextVar("trackers", default=())


@contextlib.contextmanager
def reported_to(names: Sequence[str]) -> Iterator[None]:
    """Trainers that start in the block report to these; raises `RecipeError` for a name that transformers does not know."""
    chosen = [name for name in names if name != "none"]
    if chosen:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

        if unknown := [name for name in chosen if name not in KNOWN]:
            raise RecipeError(f"--report-to {', '.join(unknown)}: transformers knows {', '.join(sorted(KNOWN))}.")
    token = _NAMES.set(chosen)
    try:
        yield
    finally:
        _NAMES.reset(token)


def add(trainer: Any) -> None:
    """Has the trainer report; raises `EnvironmentIncomplete` when a tracker's package is not installed."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for name in _NAMES.get():
        try:
            trainer.add_callback(*get_reporting_integration_callbacks(name))
        except (RuntimeError, ImportError) as error:
            raise EnvironmentIncomplete(f"--report-to {name}: {error} Install it beside the appliance.") from error
