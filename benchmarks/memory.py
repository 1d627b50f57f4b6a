"""What the memory plan predicts beside what an engine takes: `python -m benchmarks.memory`.

For each case the plan is made as `appliance serve` makes it, and the engine is started and put to work. Compared are
anonymous bytes, which the kernel cannot drop; pages of the model's file come and go. Models have random weights.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from appliance import device
from appliance.console import Command, emit, human_seconds, json_option, note
from appliance.errors import ApplianceError
from appliance.recipe import Serve
from appliance.serving import gguf_file, memory_plan
from appliance.serving.memory_plan import ModelToLoad, Plan
from appliance.serving.memory_prediction import MIB
from benchmarks import shapes
from benchmarks.engine_memory import Measured, measure

MEASURED_SHAPES = ("0.6B", "1.7B", "4B")
MEASURED_QUANTIZATIONS = ("Q4_K_M", "Q8_0")
TARGET = 0.05  # how far measured bytes may be from the predicted ones, of the latter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and how it is served; what is not said here is as `appliance serve` has it by default."""

    shape: str
    quantization: str
    slots: int = 4
    context_tokens: int = 2048
    kv_type: str = "f16"
    mmap: str = "on"
    repack: str = "on"

    def __str__(self) -> str:
        said = f"{self.shape} {self.quantization}, {self.slots} x {self.context_tokens}, KV {self.kv_type}"
        return said + "".join(f", {name} off" for name in ("mmap", "repack") if getattr(self, name) == "off")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case that was measured; all sizes are bytes."""

    case: Case
    plan: Plan
    measured: Measured

    @property
    def ratio(self) -> float:
        """Measured to predicted: above 1, the plan promised too little."""
        return self.measured.peak / self.plan.memory.anonymous_bytes

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        """Predicted and measured. For computing, llama.cpp's figure is without the CPU's own work area, a few MiB."""
        predicted, measured = self.plan.memory, self.measured
        known = measured.weights_copied + measured.kv + measured.computing
        return {
            "weights copied": (predicted.weights_copied_bytes, measured.weights_copied),
            "KV": (predicted.kv_bytes, measured.kv),
            "computing": (predicted.compute_bytes, measured.computing),
            "the rest": (predicted.process_bytes + predicted.output_bytes + predicted.cache_bytes, measured.peak - known),
        }


def cases(shape_names: Sequence[str], quantizations: Sequence[str]) -> Iterator[Case]:
    """Two lengths of context for each model; and for the first, each other way to hold it."""
    for shape in shape_names:
        for quantization in quantizations:
            yield Case(shape=shape, quantization=quantization)
            yield Case(shape=shape, quantization=quantization, slots=2, context_tokens=8192)
    first = Case(shape=shape_names[0], quantization=quantizations[0])
    yield dataclasses.replace(first, kv_type="q8_0")
    yield dataclasses.replace(first, mmap="off")
    yield dataclasses.replace(first, repack="off")
    yield dataclasses.replace(first, mmap="off", repack="off")


@click.command(cls=Command)
@click.option("--shape", "shape_names", type=click.Choice(list(shapes.SHAPES)), multiple=True, default=MEASURED_SHAPES)
@click.option("--quantization", "quantizations", type=click.Choice(list(shapes.FILE_TYPES)), multiple=True)
@json_option
def memory(shape_names: Sequence[str], quantizations: Sequence[str], as_json: bool) -> None:
    """Measure how much memory an engine takes, beside what the memory plan predicts."""
    rows, failures = [], {}
    for case in cases(shape_names, quantizations or MEASURED_QUANTIZATIONS):
        try:
            row = measure_case(case)
        except ApplianceError as error:  # the others go on
            failures[str(case)] = str(error)
            note(f"{case}: {error}")
            continue
        rows.append(row)
        note(f"{case}: {row.ratio:.3f} in {human_seconds(row.measured.seconds)}")
    emit({"target": TARGET, "rows": [_plain(row) for row in rows], "failures": failures}, as_json, table(rows))


def measure_case(case: Case) -> Row:
    """Raises `EnvironmentIncomplete` when the case does not fit into free memory."""
    path = shapes.shaped_model(case.shape, case.quantization)
    header = gguf_file.check(path)
    model = ModelToLoad(name=case.shape, path=path, header=header, sha256="0" * 64, made_at=0, kind="chat")
    settings = {name: value for name, value in dataclasses.asdict(case).items() if name not in ("shape", "quantization")}
    # All is explicit, so that the case is measured or refused, and never another in its place.
    explicit = {*settings, "cache_tokens"}
    plan = memory_plan.plan(model, Serve(**settings), device.machine(), explicit=explicit)
    return Row(case=case, plan=plan, measured=measure(plan.settings, header.vocabulary_tokens))


def table(rows: Sequence[Row]) -> str:
    """Markdown, in MiB; part by part as predicted / measured."""
    names = list(rows[0].parts) if rows else []
    titles = ["case", "predicted", "measured", "ratio", *names, "peak loading", "file pages"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for row in rows:
        measured = row.measured
        parts = (f"{_mib(predicted)} / {_mib(found)}" for predicted, found in row.parts.values())
        sizes = [_mib(row.plan.memory.anonymous_bytes), _mib(measured.peak), f"{row.ratio:.3f}"]
        lines.append([str(row.case), *sizes, *parts, _mib(measured.peak_loading), _mib(measured.file)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(row: Row) -> dict[str, Any]:
    return {
        "case": dataclasses.asdict(row.case),
        "predicted": dataclasses.asdict(row.plan.memory),
        "predicted_anonymous": row.plan.memory.anonymous_bytes,
        "measured": dataclasses.asdict(row.measured),
        "ratio": row.ratio,
    }


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f}"


if __name__ == "__main__":
    memory()
