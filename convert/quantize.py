"""Quantizes a GGUF file with llama.cpp's own call: `python -m convert.quantize`, `appliance convert quantize`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance import recipe as recipes
from appliance.artifacts import Plan
from appliance.console import Command, Memory, emit, human_bytes, json_option, note
from appliance.errors import ModelFileError
from appliance.recipe import Serve
from convert import fitting, llama_cpp_source
from convert import imatrix as matrices
from convert.quantizer import TENSOR_TYPES, TYPES, Settings, quantize_file, tensor_types

REVISION = 2  # raised when the same input would give another file
# What --for-memory chooses from: by quality, none that needs an importance matrix, none that another beats at its size.
LADDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
SIXTEEN_BITS = ("-F16", "-BF16", "-F32")


class TensorType(click.ParamType[tuple[str, str]]):
    """`PATTERN=TYPE`: a regular expression for names of tensors, and the type that they get."""

    name = "PATTERN=TYPE"

    def convert(self, value: Any, _parameter: click.Parameter | None, _context: click.Context | None) -> tuple[str, str]:
        pattern, separator, kind = str(value).rpartition("=")
        if not separator or not pattern or kind.upper() not in TENSOR_TYPES:
            self.fail(f"{value!r} is no PATTERN=TYPE with a type out of {', '.join(TENSOR_TYPES)}.")
        try:
            re.compile(pattern)
        except re.error as error:
            self.fail(f"{pattern!r} is no regular expression: {error}.")
        return pattern, kind.upper()


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--type", "types", type=click.Choice(list(TYPES)), multiple=True, default=("Q4_K_M",), show_default=True,
    help="Repeat for several files.",
)  # fmt: skip
@click.option("--for-memory", type=Memory(), help="Choose the best type that a machine with so much memory can serve.")
@click.option("--serve", "serve_json", default="{}", help="Serving settings, as JSON, for --for-memory.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="An importance matrix (a file, or its artifact folder).")
@click.option("--tensor", "overrides", type=TensorType(), multiple=True, help="Another type for some tensors.")
@click.option("--name", help="Name of the result; default: the file's, without its number type.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def quantize(
    model: Path,
    types: tuple[str, ...],
    for_memory: int | None,
    serve_json: str,
    imatrix: Path | None,
    overrides: tuple[tuple[str, str], ...],
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL, a 16-bit GGUF file or its artifact folder."""
    source = model if model.suffix == ".gguf" else model / f"{model.name[:-13]}.gguf"
    folder = source.parent if (source.parent / artifacts.MANIFEST).exists() or model.suffix != ".gguf" else source
    stem = name or source.stem.removesuffix(next((end for end in SIXTEEN_BITS if source.stem.endswith(end)), ""))
    importance = None if imatrix is None else imatrix if imatrix.suffix == ".gguf" else imatrix / matrices.FILE
    if for_memory is not None:
        serve = recipes.build_serve(recipes.parse_serve(serve_json, "--serve"), "--serve")
        types = (_choose(source, for_memory, serve, overrides),)
    made = [_one(source, folder, stem, kind, importance, overrides, is_dry=dry_run) for kind in dict.fromkeys(types)]
    text = "\n".join(f"{each['file']} ({each['state']})" for each in made)
    emit({**made[-1], "made": made}, as_json, text)


def _choose(source: Path, memory_bytes: int, serve: Serve, overrides: Sequence[tuple[str, str]]) -> str:
    """The best type for a machine with so much memory; says what each would take."""
    _require(source)
    types = {kind: tensor_types(source, Settings(type=kind, overrides=overrides)) for kind in LADDER}
    offers = fitting.offers(source, types, serve, fitting.machine_with(memory_bytes))
    for each in offers:
        needed = "does not fit" if each.fit.needed_bytes is None else f"{human_bytes(each.fit.needed_bytes)} to serve"
        smaller = "" if each.fit.is_whole or each.fit.needed_bytes is None else " (with smaller settings)"
        note(f"quantize: {each.type:<7} {human_bytes(each.size_bytes):>10}, {needed}{smaller}")
    chosen = fitting.best(offers)
    note(f"quantize: {chosen.type} is the best that fits into {human_bytes(memory_bytes)}")
    return chosen.type


def _one(
    source: Path,
    folder: Path,
    stem: str,
    kind: str,
    importance: Path | None,
    overrides: Sequence[tuple[str, str]],
    *,
    is_dry: bool,
) -> dict[str, Any]:
    root = config.artifacts_root()
    parents = [folder] if importance is None else [folder, _folder(importance)]
    settings: dict[str, Any] = {"type": kind}
    if overrides:
        settings["tensors"] = [list(each) for each in overrides]
    plan = Plan(
        kind="gguf",
        name=f"{stem}-{kind}",
        inputs={"revision": REVISION, "llama_cpp_python": llama_cpp_source.VERSION},
        parents=[artifacts.identity(each) for each in parents],
        config=settings,
    )
    file = plan.location(root) / f"{plan.name}.gguf"
    state = "unchanged" if plan.existing(root) else "to make" if is_dry else "made"
    if state == "made":
        _make(plan, source, importance, Settings(type=kind, overrides=overrides), root)
    return {"type": kind, "artifact": plan.location(root), "file": file, "state": state}


def _make(plan: Plan, source: Path, importance: Path | None, settings: Settings, root: Path) -> None:
    _require(source)
    for given in (source, *([] if importance is None else [importance])):
        artifacts.check_input(given)
    artifacts.require_space(root, source.stat().st_size, "The quantized file")
    means = {} if importance is None else matrices.read(importance)
    with artifacts.create(plan, root) as draft:
        target = draft.path / f"{plan.name}.gguf"
        quantize_file(source, target, Settings(type=settings.type, overrides=settings.overrides, imatrix=means))
        draft.results.update(size_bytes=target.stat().st_size, imatrix=importance is not None)
        sizes = f"{human_bytes(source.stat().st_size)} to {human_bytes(target.stat().st_size)}"
        with_imatrix = "" if importance is None else f", with {len(means)} matrices' importance"
        note(f"quantize: {target.name}, {sizes}{with_imatrix}")


def _require(source: Path) -> None:
    if not source.is_file():
        raise ModelFileError(f"{source} does not exist; name a GGUF file or the folder of one.")


def _folder(file: Path) -> Path:
    return file.parent if artifacts.is_location(file.parent) else file


if __name__ == "__main__":
    quantize()
