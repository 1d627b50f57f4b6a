"""Quantizes a GGUF file with llama.cpp's own call: `python -m convert.quantize`, `appliance convert quantize`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance import recipe as recipes
from appliance.artifacts import Plan
from appliance.console import Command, Memory, emit, human_bytes, json_option, note
from appliance.recipe import Serve
from convert import fitting, gguf_source, llama_cpp_source
from convert import imatrix as matrices
from convert import sensitivity as sensitivities
from convert.gguf_source import Source
from convert.quantizer import TENSOR_TYPES, TYPES, Settings, quantize_file, tensor_types
from convert.sensitivity import Sensitivity

REVISION = 2  # raised when the same input would give another file
# What --for-memory chooses from: by quality, none that needs an importance matrix, none that another beats at its size.
LADDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
SPEND_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Order:
    """What is quantized, whatever the type: the file, the result's name, and what was measured for it."""

    source: Source
    stem: str
    importance: Path | None
    overrides: Sequence[tuple[str, str]]
    sensitivity: Path | None
    spend_bytes: int


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
@click.option("--sensitivity", type=click.Path(path_type=Path), help="A report of `convert sensitivity`, for --spend.")
@click.option("--spend", type=Memory(), help="On better types, where they save most; default: 64MiB.")
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
    sensitivity: Path | None,
    spend: int | None,
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL, a 16-bit GGUF file or its artifact folder."""
    if spend is not None and sensitivity is None:
        raise click.UsageError("--spend goes with --sensitivity, which says where bytes save most.")
    if for_memory is not None and sensitivity is not None:
        raise click.UsageError("--for-memory chooses a type; give --type, the one that --sensitivity was measured for.")
    source = gguf_source.find(model)
    importance = None if imatrix is None else matrices.file_of(imatrix)
    if for_memory is not None:
        serve = recipes.build_serve(recipes.parse_serve(serve_json, "--serve"), "--serve")
        types = (_choose(source, for_memory, serve, overrides),)
    order = Order(
        source=source,
        stem=name or source.stem,
        importance=importance,
        overrides=overrides,
        sensitivity=sensitivities.file_of(sensitivity),
        spend_bytes=SPEND_BYTES if spend is None else spend,
    )
    if order.sensitivity is not None and order.sensitivity.exists():  # else it is to be made, too
        _check(sensitivities.read(order.sensitivity), source, types)
    made = [_one(order, kind, is_dry=dry_run) for kind in dict.fromkeys(types)]
    text = "\n".join(f"{each['file']} ({each['state']})" for each in made)
    emit({**made[-1], "made": made}, as_json, text)


def _choose(source: Source, memory_bytes: int, serve: Serve, overrides: Sequence[tuple[str, str]]) -> str:
    """The best type for a machine with so much memory; says what each would take."""
    gguf_source.require(source)
    types = {kind: tensor_types(source.file, Settings(type=kind, overrides=overrides)) for kind in LADDER}
    offers = fitting.offers(source.file, types, serve, fitting.machine_with(memory_bytes))
    for each in offers:
        needed = "does not fit" if each.fit.needed_bytes is None else f"{human_bytes(each.fit.needed_bytes)} to serve"
        smaller = "" if each.fit.is_whole or each.fit.needed_bytes is None else " (with smaller settings)"
        note(f"quantize: {each.type:<7} {human_bytes(each.size_bytes):>10}, {needed}{smaller}")
    chosen = fitting.best(offers)
    note(f"quantize: {chosen.type} is the best that fits into {human_bytes(memory_bytes)}")
    return chosen.type


def _one(order: Order, kind: str, *, is_dry: bool) -> dict[str, Any]:
    root = config.artifacts_root()
    measured = [artifacts.origin(each) for each in (order.importance, order.sensitivity) if each is not None]
    settings: dict[str, Any] = {"type": kind}
    if order.overrides:
        settings["tensors"] = [list(each) for each in order.overrides]
    if order.sensitivity is not None:
        settings["spend_bytes"] = order.spend_bytes
    plan = Plan(
        kind="gguf",
        name=f"{order.stem}-{kind}",
        inputs={"revision": REVISION, "llama_cpp_python": llama_cpp_source.VERSION},
        parents=[artifacts.identity(each) for each in (order.source.origin, *measured)],
        config=settings,
    )
    file = plan.location(root) / f"{plan.name}.gguf"
    state = "unchanged" if plan.existing(root) else "to make" if is_dry else "made"
    if state == "made":
        _make(plan, order, kind, root)
    return {"type": kind, "artifact": plan.location(root), "file": file, "state": state}


def _make(plan: Plan, order: Order, kind: str, root: Path) -> None:
    source = order.source.file
    gguf_source.require(order.source)
    for given in (source, order.importance, order.sensitivity):
        if given is not None:
            artifacts.check_input(given)
    means = {} if order.importance is None else matrices.read(order.importance)
    better = {} if order.sensitivity is None else _spent(order, kind)
    overrides = [*order.overrides, *((sensitivities.pattern_of(role), other) for role, other in better.items())]
    settings = Settings(type=kind, overrides=overrides, imatrix=means)
    types = tensor_types(source, settings)
    would_be = fitting.with_types(fitting.read(source), types)
    artifacts.require_space(root, would_be.size_bytes + 1_000_000, "The quantized file")  # its metadata grows a little
    with artifacts.create(plan, root) as draft:
        target = draft.path / f"{plan.name}.gguf"
        quantize_file(source, target, settings)
        draft.results.update(size_bytes=target.stat().st_size, imatrix=order.importance is not None)
        if order.sensitivity is not None:
            draft.results["better"] = better
        sizes = f"{human_bytes(source.stat().st_size)} to {human_bytes(target.stat().st_size)}"
        with_imatrix = "" if order.importance is None else f", with {len(means)} matrices' importance"
        note(f"quantize: {target.name}, {sizes}{with_imatrix}")


def _check(found: Sensitivity, source: Source, types: Sequence[str]) -> None:
    """Raises a usage error for a report of another type or another model."""
    if other := [kind for kind in types if kind != found.type]:
        raise click.BadParameter(
            f"it was measured for {found.type}, not for {', '.join(other)}; measure that.", param_hint="--sensitivity"
        )
    if (given := artifacts.identity(source.origin)) != found.model:
        raise click.BadParameter(f"it was measured on {found.model}, not on {given}.", param_hint="--sensitivity")


def _spent(order: Order, kind: str) -> dict[str, str]:
    """The better types that are worth their bytes, by role; says what each brings. What `--tensor` names is left alone."""
    assert order.sensitivity is not None
    found = sensitivities.read(order.sensitivity)
    _check(found, order.source, [kind])
    taken = {role.role for role in found.roles for pattern, _ in order.overrides if re.search(pattern, role.tensor)}
    chosen = sensitivities.choose([role for role in found.roles if role.role not in taken], found.kl, order.spend_bytes)
    for role in chosen:
        note(f"quantize: {role.role} in {found.better}: {sensitivities.told(found, role)}")
    if not chosen:
        note(f"quantize: nothing that {human_bytes(order.spend_bytes)} buy makes {found.type} better")
    return {role.role: found.better for role in chosen}


if __name__ == "__main__":
    quantize()
