"""Each command of `convert` runs as a module of its own, as the documentation says."""

import subprocess
import sys

import pytest

from appliance import config
from appliance.cli import COMMANDS

GROUP = COMMANDS["convert"]
assert not isinstance(GROUP, str)


@pytest.mark.parametrize("name", sorted(each.partition(":")[0] for each in GROUP.values()))
def test_module_shows_its_help(name: str) -> None:
    command = [sys.executable, "-m", name, "--help"]
    done = subprocess.run(command, env=config.quiet_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: python -m {name} [OPTIONS]")
    assert done.stderr == ""
