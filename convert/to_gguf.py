"""Converts a model folder to GGUF with llama.cpp's own converter, the copy inside the pinned source distribution.

`python -m convert.to_gguf`, `appliance convert gguf`. The converter runs in a subprocess, without network, on the folder in
a form that it reads rightly (`convert.staged_model`). Its guess of the tokenizer is replaced by what the tokenizer's
structure says (`convert.pre_tokenizer`), and the file that comes out must give the same token ids as the model's own
tokenizer, or it is refused.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, emit, human_bytes, json_option, note
from appliance.errors import ModelFileError
from convert import checkpoint, converter, llama_cpp_source, pre_tokenizer, staged_model
from convert.checkpoint import Checkpoint
from convert.pre_tokenizer import Table

REVISION = 2  # raised when the same inputs would give another file
SCRIPT = "convert_hf_to_gguf.py"
TYPES = {"f16": 2, "bf16": 2, "f32": 4}  # bytes of a weight


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--type", "number_type", type=click.Choice(list(TYPES)), default="f16", show_default=True)
@click.option("--name", help="Name of the result; default: the model folder's.")
@click.option("--check", is_flag=True, help="Only say whether this model's architecture can be converted.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def gguf(model: Path, number_type: str, name: str | None, check: bool, dry_run: bool, as_json: bool) -> None:
    """Convert MODEL (a folder in the Hugging Face format) to one GGUF file."""
    if check:
        require_known_architecture(checkpoint.read(model))
        emit({"artifact": model, "state": "convertible"}, as_json, f"{model} (convertible)")
        return
    root = config.artifacts_root()
    plan = Plan(
        kind="gguf",
        name=f"{name or model.name}-{number_type.upper()}",
        inputs={"revision": REVISION, "llama_cpp_python": llama_cpp_source.VERSION},
        parents=[artifacts.identity(model)],
        config={"type": number_type.upper()},
    )
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        _make(plan, model, number_type, root)
    file = plan.location(root) / file_name(plan)
    emit({"artifact": plan.location(root), "file": file, "state": state}, as_json, f"{file} ({state})")


def file_name(plan: Plan) -> str:
    return f"{plan.name}.gguf"


def _make(plan: Plan, model: Path, number_type: str, root: Path) -> None:
    source = checkpoint.read(model)
    require_known_architecture(source)
    artifacts.check_input(model)
    config.apply_quiet_environment()
    tokenizer = pre_tokenizer.load(model)
    checkpoint.check_vocabulary(source, pre_tokenizer.token_count(tokenizer))
    pre_tokenizer.renderings(tokenizer)  # so that a template that fails is told before the weights are written
    if tokenizer.chat_template is None:
        note(
            f"gguf: {model} has no chat template, so neither has the file: served, it can only continue text. Put its"
            " template into chat_template.jinja in that folder and repeat, if it is to chat."
        )
    artifacts.require_space(root, size_bytes(source, number_type) + 50_000_000, "The GGUF file")
    with artifacts.create(plan, root) as draft:
        target = draft.path / file_name(plan)
        name = convert(source, tokenizer, target, number_type)
        draft.results.update(size_bytes=target.stat().st_size, pre_tokenizer=name)
        if name in pre_tokenizer.PART_MARKS:
            note(
                f"gguf: llama.cpp's {name!r} parts letters from combining marks (vowel signs of Hindi, Thai, Khmer), and"
                " this tokenizer does not: texts of such scripts are served other tokens than they were trained with;"
                " `appliance convert verify` tells whether yours are"
            )
        note(f"gguf: {target.name}, {human_bytes(target.stat().st_size)}")


def size_bytes(model: Checkpoint, number_type: str) -> int:
    """Of a file with weights of this type; vectors are in 32 bits in any file."""
    wide = TYPES[number_type]
    return sum(math.prod(each.shape) * (wide if len(each.shape) > 1 else 4) for each in model.tensors.values())


def convert(model: Checkpoint, tokenizer: Any, target: Path, number_type: str) -> str | None:
    """Writes the file and proves its tokenizer; returns the name of its pre-tokenizer, None where it needs none.

    Raises `ModelFileError` when no pre-tokenizer of llama.cpp gives the token ids of the model's own tokenizer.
    """
    table = pre_tokenizer.table(tokenizer)
    names: Sequence[str | None] = pre_tokenizer.candidates(table) or [None]
    first, *others = names
    shown = staged_model.shown_name(model, tokenizer)
    options = ["--outtype", number_type, *(["--model-name", shown] if shown else [])]
    with staged_model.staged(model, tokenizer) as folder:

        def write(file: Path, name: str | None, *more: str) -> None:
            converter.run(SCRIPT, model.folder, [str(folder), "--outfile", str(file), *options, *more], file, name)

        try:
            write(target, first)
        except ModelFileError as error:
            if first is None and "pre-tokenizer was not recognized" in str(error):
                raise _unknown_tokenizer(model.folder, table) from error
            raise
        if (problem := pre_tokenizer.difference(target, tokenizer)) is None:
            return first
        tried = [f"{first or 'as the converter recognized it'} ({problem})"]
        for name in others:
            small = target.with_suffix(".vocabulary")
            write(small, name, "--vocab-only")
            problem = pre_tokenizer.difference(small, tokenizer)
            small.unlink()
            if problem is None:
                write(target, name)
                return name
            tried.append(f"{name} ({problem})")
    raise ModelFileError(
        f"{model.folder}: llama.cpp splits texts otherwise than its tokenizer does, so that what was trained would be served"
        f" other tokens. Tried: {'; '.join(tried)}. Take a base model of a family that llama.cpp knows."
    )


def _unknown_tokenizer(model: Path, table: Table | None) -> ModelFileError:
    steps = " → ".join(pre_tokenizer.structure(table)) or "unknown"
    known = ", ".join(sorted({name for names in pre_tokenizer.NAMES.values() for name in names}))
    return ModelFileError(
        f"{model}: its tokenizer splits texts in a way that llama.cpp has no name for ({steps}); known are {known}."
        " Take a base model with one of those."
    )


def require_known_architecture(model: Checkpoint) -> None:
    """Raises `ModelFileError` when the pinned converter does not know the model's architecture."""
    names = model.settings.get("architectures") or []
    table = (llama_cpp_source.converter_dir() / "conversion" / "__init__.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^\s+"(\w+)":\s+"\w+"', table, re.MULTILINE))
    if not known.intersection(names):
        raise ModelFileError(
            f"Architecture {names or 'unnamed'} cannot be converted to GGUF; known are: {', '.join(sorted(known))}."
        )


if __name__ == "__main__":
    gguf()
