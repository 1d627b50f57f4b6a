"""What `appliance plan` predicts beside what `appliance train` takes: `python -m benchmarks.training_memory FOLDER`.

For each case a model of real shape and random weights is trained for two steps of two micro-batches, on the rung that is
named. Compared is the most anonymous memory of the whole process, with what it has mapped of the base.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from appliance import allocator, config
from appliance.console import Command, emit, human_bytes, human_seconds, json_option, note
from benchmarks import about, timed, training_rows

TARGET = 0.10  # how far measured bytes may be from the predicted ones, of the latter
STEPS, ACCUMULATE = 2, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """What is trained: a base, a phase, micro-batches of so many rows of up to so many tokens, a rung."""

    base: str
    phase: str
    rows: int
    tokens: int
    rung: str

    def __str__(self) -> str:
        return f"{self.base}, {self.phase} {self.rows} x {self.tokens}, {self.rung}"


CASES: Sequence[Case] = (
    Case("0.6B", "sft", 1, 512, "lora"),
    Case("0.6B", "sft", 4, 256, "lora"),
    Case("0.6B", "sft", 1, 1024, "lora-recomputed"),
    Case("0.6B", "sft", 1, 512, "qlora"),
    Case("0.6B", "dpo", 1, 512, "lora"),
    Case("0.6B", "dpo", 1, 512, "lora-recomputed"),
    Case("1.7B", "sft", 1, 512, "lora-recomputed"),
    Case("1.7B", "sft", 1, 512, "qlora"),
    Case("Llama-3.2-1B", "sft", 1, 512, "lora"),
    Case("Gemma-3-1B", "sft", 1, 512, "lora-recomputed"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A case that was measured; sizes are bytes."""

    case: Case
    weights: str
    predicted: int
    parts: Mapping[str, int]
    measured: int
    allocator: str
    seconds: float

    @property
    def ratio(self) -> float:
        """Measured to predicted: above 1, the plan promised too little."""
        return self.measured / self.predicted


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--case", "chosen", multiple=True, help="Only cases whose name holds this; may be repeated.")
@click.option("--plain", is_flag=True, help="With the system's allocator, where tcmalloc is there too.")
@json_option
def training_memory(folder: Path, chosen: tuple[str, ...], plain: bool, as_json: bool) -> None:
    """Train in FOLDER, and compare the memory that it takes with the plan."""
    cases = [case for case in CASES if not chosen or any(part in str(case) for part in chosen)]
    rows = []
    for case in cases:
        rows.append(measure(case, folder, plain=plain))
        note(f"training memory: {case}: {rows[-1].ratio:.3f} ({human_seconds(rows[-1].seconds)})")
    result = {**about.machine(), **about.versions(about.TRAINING), "rows": [dataclasses.asdict(row) for row in rows]}
    emit(result, as_json, "\n".join(table(rows)))
    if any(abs(row.ratio - 1) > TARGET for row in rows):
        sys.exit(4)


def measure(case: Case, folder: Path, *, plain: bool = False) -> Row:
    """Plans and trains one case, in processes of their own."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    base = training_rows.base(folder.resolve(), case.base)
    count = case.rows * ACCUMULATE * STEPS
    recipe = training_rows.write_recipe(work, base, case.phase, (case.rows, case.tokens), count, ACCUMULATE)
    environment = {**os.environ, **config.quiet_environment(), "APPLIANCE_ARTIFACTS": str(work / "artifacts")}
    if not plain:
        environment = allocator.preloaded(environment)
    sets = training_rows.flags([f"memory.rung={case.rung}"])
    planned = training_rows.answer(environment, "plan", recipe, *sets)
    (phase,) = (each for each in planned["phases"] if each["phase"] == case.phase)
    (rung,) = (each for each in phase["rungs"] if each["name"] == case.rung)
    if case.phase == "dpo":
        training_rows.answer(environment, "train", recipe, "--phase", "sft", *sets)
    command = training_rows.appliance("train", recipe, "--phase", case.phase, *sets)
    done = timed.run(command, environment)
    used = "tcmalloc" if "tcmalloc" in environment.get(allocator.PRELOAD, "") else "glibc"
    return Row(
        case=case,
        weights=rung["weights"],
        predicted=phase["process_bytes"] + rung["needed_bytes"],
        parts=rung["parts"],
        measured=done.held_bytes,
        allocator=used,
        seconds=done.seconds,
    )


def table(rows: Sequence[Row]) -> list[str]:
    lines = ["| Case | Weights | Allocator | Predicted | Measured | Ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        sizes = f"{human_bytes(row.predicted)} | {human_bytes(row.measured)}"
        lines.append(f"| {row.case} | {row.weights} | {row.allocator} | {sizes} | {row.ratio:.3f} |")
    worst = max((abs(row.ratio - 1) for row in rows), default=0.0)
    return [*lines, "", f"At most {worst:.1%} off (wanted: {TARGET:.0%})."]


if __name__ == "__main__":
    training_memory()
