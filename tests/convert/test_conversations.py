"""What conversion renders: a template that refuses a conversation, or is not there, is an error with the place in it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result

from tests.convert.test_merge import make_adapter
from tests.running import Trained, call

REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [{"role": "user", "content": "Waar is de balie?"}, {"role": "assistant", "content": "Aan de Lindekade."}]


def model_with(template: str | None, source: Path, target: Path) -> Path:
    """A model with another chat template, or with none."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("manifest.json"))
    file = target / "chat_template.jinja"
    file.write_text(template) if template is not None else file.unlink()
    return target


def rows_in(folder: Path, *conversations: Sequence[dict[str, str]]) -> Path:
    folder.mkdir()
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    return path


def convert(command: str, trained: Trained, model: Path, rows: Path, tmp_path: Path) -> Result:
    """A command that renders conversations."""
    if command == "merge":
        make_adapter(model, tmp_path / "adapter")
    arguments: dict[str, tuple[str | Path, ...]] = {
        "imatrix": (model,),
        "verify": (trained.full, "--merged", model),
        "sensitivity": (trained.full, "--merged", model),
        "merge": (tmp_path / "adapter", "--base", model, "--trained-on", "nf4"),
    }
    return call("convert", command, *arguments[command], "--conversations", rows)


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("imatrix", "conversation 2 of those in en"),
        ("verify", "conversation 2"),
        ("sensitivity", "turn 3 of conversation 2 of its language"),
        ("merge", "turn 3 of conversation 2 of those compared"),
    ],
)
def test_refused_conversation_is_named(trained: Trained, root: Path, tmp_path: Path, command: str, place: str) -> None:
    model = model_with(REFUSES, trained.made["merge"], tmp_path / "model")
    rows = rows_in(tmp_path / "data", TURNS, [{"role": "system", "content": "Antwoord kort."}, *TURNS])
    result = convert(command, trained, model, rows, tmp_path)
    assert result.exit_code == (4 if command == "verify" else 1), result.stderr
    said = " ".join(result.stderr.split())
    assert f"refuses {place} (system, user" in said
    assert "'Waar is de balie?'): System role not supported. Leave such rows out" in said
    assert not list(root.rglob("manifest.json"))


@pytest.mark.parametrize("command", ["imatrix", "verify", "sensitivity", "merge"])
def test_model_without_a_template_is_named(trained: Trained, root: Path, tmp_path: Path, command: str) -> None:
    model = model_with(None, trained.made["merge"], tmp_path / "model")
    result = convert(command, trained, model, rows_in(tmp_path / "data", TURNS), tmp_path)
    assert result.exit_code == 1, result.stderr
    assert f"{model} has no chat template" in " ".join(result.stderr.split())
    assert not list(root.rglob("manifest.json"))
