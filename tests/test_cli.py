"""The command line itself: which commands there are, what they import, how they refuse."""

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from appliance.cli import COMMANDS, PLANNED, main
from tests.running import call

# DESIGN.md, "The command line": scripts and dashboards depend on it.
DESIGN = """
doctor
init
pull
data check|audit|split|generate
plan
train
convert merge|gguf|imatrix|sensitivity|quantize|adapter|onnx|verify
run
runs list|compare|diagnose
models list|show|promote|rollback|remove|export|import
serve
chat
knowledge add|list|search|warm|remove|prove-erased
desk list|answer
eval run|boolean|truth
select
bench serve|train
keys create|list|revoke
backup
restore
"""
HEAVY = ("torch", "transformers", "trl", "peft", "llama_cpp", "datasets", "numpy")
BLOCKED = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(f"{{name}} was imported")
sys.meta_path.insert(0, Refuse())
"""


def designed() -> Iterator[tuple[str, ...]]:
    for line in DESIGN.strip().splitlines():
        noun, _, verbs = line.partition(" ")
        yield from ((noun, verb) for verb in verbs.split("|")) if verbs else [(noun,)]


def existing(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(command)
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        yield from existing(child, (*path, name))


def planned() -> list[tuple[str, ...]]:
    groups = {(noun,): entry for noun, entry in COMMANDS.items() if isinstance(entry, str)}
    nested = {
        (noun, verb): each for noun, entry in COMMANDS.items() if not isinstance(entry, str) for verb, each in entry.items()
    }
    return [path for path, entry in {**groups, **nested}.items() if entry.startswith(PLANNED)]


def test_commands_are_those_of_the_design() -> None:
    assert [path for path, _ in existing(main)] == list(designed())


def test_every_command_has_help() -> None:
    for path, command in existing(main):
        assert command.help, path
        result = call(*path, "--help")
        assert result.exit_code == 0
        assert " ".join(["Usage: appliance", *path]) in result.stdout


@pytest.mark.parametrize(
    "program",
    [
        "from appliance.cli import main; sys.argv = ['appliance', '--help']; main()",
        "sys.argv = ['appliance', '--help']; runpy.run_module('appliance', run_name='__main__', alter_sys=True)",
        "from appliance.cli import main; main(['convert', 'verify', '--help'])",
        "from appliance.cli import main; main(['train', '--help'])",
        "from appliance.cli import main; main(['run', '--help'])",
    ],
)
def test_help_imports_nothing_heavy(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED + program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_blocker_blocks() -> None:
    result = subprocess.run([sys.executable, "-c", f"{BLOCKED}import torch"], capture_output=True, text=True, check=False)
    assert "torch was imported" in result.stderr


@pytest.mark.parametrize("path", planned(), ids=" ".join)
def test_planned_command_says_so(path: tuple[str, ...]) -> None:
    result = call(*path, "recipe.toml", "--whatever", "3")
    assert result.exit_code == 3
    assert f"`appliance {' '.join(path)}` is not built yet" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["servee"], ["data", "chek"], ["convert"], ["train"], ["run", "a", "b"], ["--what"]])
def test_misuse_is_exit_code_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_error_as_json_goes_to_stdout_too() -> None:
    result = call("data", "check", "nowhere.toml", "--json")
    assert result.exit_code == 2
    assert '"code": "invalid_recipe"' in result.stdout
    assert "nowhere.toml does not exist" in result.stderr


def test_version() -> None:
    assert call("--version").stdout.startswith("appliance, version ")
