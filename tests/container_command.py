"""Command lines that `make serve` and `make train` would run in a container, of a caller who has nothing set."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance import containers
from appliance.containers import Place

CPU = "edge-appliance:cpu"


def alone(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's in `folder`, and nothing of the environment's that could be passed on."""
    patch.delenv("APPLIANCE_MAKE_KEYS", raising=False)
    patch.setenv("APPLIANCE_CACHE", str(folder / "cache"))
    return folder / "cache"


def command_for(verb: str, *arguments: str) -> list[str]:
    return containers.command(verb, Place(engine="docker", image=CPU), arguments)


def values(command: Sequence[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == option]
