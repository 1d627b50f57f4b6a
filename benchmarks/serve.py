"""`make bench-serve`: this server beside llama-server and the Python servers of llama.cpp, on one model file, in one run.

    python -m benchmarks.serve                                           everything, about 20 minutes on two cores
    python -m benchmarks.serve --rows decode --servers ours,llama-server
    python -m benchmarks.serve --quick                                   a tiny model, one round, under 90 s: what CI runs

Each round runs every phase with each server in turn, one at a time. The report (JSON and Markdown) says what was run, on
what, and which targets are reached. The exit code is 0 whatever the figures are: a benchmark is no test.
"""

import asyncio
import dataclasses
import json
import os
import signal
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from appliance import artifacts, device
from appliance.console import JSON_SCHEMA, Command, emit, human_bytes, human_seconds, json_option, note
from appliance.errors import EnvironmentIncomplete
from benchmarks import about, plan, prompts, report, servers, workloads
from benchmarks.figures import Figure
from benchmarks.plan import Turn
from benchmarks.prompts import Prompts
from benchmarks.servers import SERVERS, Launch
from benchmarks.shapes import FILE_TYPES, SHAPES, shaped_model
from benchmarks.workloads import Trial

ROUNDS = 5
QUICK_SHAPE, QUICK_ROWS = "tiny", ("decode", "cold", "beside", "start")
SECOND_ROW, SECOND_QUANTIZATION = "q4_0", "Q4_0"
OUTPUT = Path("build/bench-serve")
BUSY_RATIO = 0.3  # load average to threads
JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What was asked for. `launches` holds those of rows with a model of their own; `launch` is for all others."""

    launch: Launch
    launches: Mapping[str, Launch]
    prompts: Prompts
    turns: Sequence[Turn]
    is_quick: bool

    def trial(self, turn: Turn) -> Trial:
        return Trial(
            server=SERVERS[turn.server],
            launch=self.launches.get(turn.rows[0], self.launch),
            prompts=self.prompts,
            round=turn.round,
            is_quick=self.is_quick,
        )


def _names(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A list with commas of names that are known; all of them when there is none."""
    known = tuple(SERVERS) if parameter.name == "names" else tuple(plan.ROWS)
    chosen = tuple(dict.fromkeys(value.split(","))) if value else ()
    if unknown := [name for name in chosen if name not in known]:
        raise click.BadParameter(f"{', '.join(unknown)} is none of {', '.join(known)}.")
    return chosen


@click.command(cls=Command)
@click.option(
    "--rounds", type=click.IntRange(1), help=f"Interleaved rounds [default: {ROUNDS}, in some rows fewer; with --quick 1]."
)
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Of the random model [default: 0.6B, with --quick tiny].")
@click.option("--quantization", type=click.Choice(list(FILE_TYPES)), default="Q4_K_M", show_default=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="This file, and no random one.")
@click.option("--servers", "names", callback=_names, help=f"Some of {','.join(SERVERS)} [default: all that are here].")
@click.option("--rows", callback=_names, help=f"Some of {','.join(plan.ROWS)} [default: all].")
@click.option("--threads", type=click.IntRange(1), help="Of every server [default: the usable cores].")
@click.option("--peer-spins", type=click.IntRange(0), help="GOMP_SPINCOUNT of the peers [default: OpenMP's own].")
@click.option("--quick", is_flag=True, help="A tiny model, few rows, one round: shows that all of it runs, not how fast.")
@click.option("--peer-binaries", type=click.Path(path_type=Path, exists=True), help="Instead of make bench-peers'.")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True, help="Folder of the report.")
@json_option
def serve(
    rounds: int | None,
    shape: str | None,
    quantization: str,
    model: Path | None,
    names: tuple[str, ...],
    rows: tuple[str, ...],
    threads: int | None,
    peer_spins: int | None,
    quick: bool,
    peer_binaries: Path | None,
    output: Path,
    as_json: bool,
) -> None:
    """Measure this server beside others, on one model file."""
    shape = shape or (QUICK_SHAPE if quick else "0.6B")
    are_all = bool(rows and rounds)  # who names both gets them
    rows = rows or (QUICK_ROWS if quick else tuple(plan.ROWS))
    if model is not None and SECOND_ROW in rows:
        note(f"{SECOND_ROW}: left out; it needs the model in {SECOND_QUANTIZATION} too, and --model names one file")
        rows = tuple(row for row in rows if row != SECOND_ROW)
    path = model or shaped_model(shape, quantization)
    known = prompts.read(path)
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        launch = workloads.launch(path, Path(folder), threads or device.usable_cores(), known)
        launch = dataclasses.replace(launch, binaries=peer_binaries, peer_spins=peer_spins)
        second = {SECOND_ROW: shaped_model(shape, SECOND_QUANTIZATION)} if SECOND_ROW in rows else {}
        present = _present(names or tuple(SERVERS), launch)
        job = Job(
            launch=launch,
            launches={row: dataclasses.replace(launch, model=file) for row, file in second.items()},
            prompts=known,
            turns=list(plan.turns(rounds or (1 if quick else ROUNDS), rows, present, are_all=are_all)),
            is_quick=quick,
        )
        _warn_of_load(launch)
        head = _head(job, present, quantization if model is None else path.stem)
        output.mkdir(parents=True, exist_ok=True)
        result = asyncio.run(_until_interrupted(_measure(job, head, output)))
    emit(result, as_json, report.markdown(result))


def _warn_of_load(launch: Launch) -> None:
    if launch.peer_spins is None and os.getloadavg()[0] > BUSY_RATIO * launch.threads:
        note(
            f"warning: the load average is {about.load()}: others use the cores. The peers' threads spin at barriers and "
            "collapse then, which makes this server look better than it is: use an idle machine, or --peer-spins 1000."
        )


def _present(names: Sequence[str], launch: Launch) -> Sequence[str]:
    """The servers that can be started here; each of the others is told with what it lacks."""
    lacking = {name: missing for name in names if (missing := servers.missing(SERVERS[name], launch))}
    for name, what in lacking.items():
        note(f"{name} is left out: {what}")
    if not (found := [name for name in names if name not in lacking]):
        raise EnvironmentIncomplete("None of the servers asked for is here; see above.")
    return found


def _head(job: Job, present: Sequence[str], quantization: str) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    return {
        "command": about.command(),
        "date": about.now(),
        **about.machine(),
        **about.versions(),
        "model": f"{job.launch.model.name}, {human_bytes(job.launch.model.stat().st_size)}",
        "quantization": quantization,
        "GOMP_SPINCOUNT of the peers": "not set" if job.launch.peer_spins is None else job.launch.peer_spins,
        "rounds": max(turn.round for turn in job.turns),
        "load average before": about.load(),
        "servers": {name: servers.shown(SERVERS[name], job.launch) for name in present},
    }


async def _until_interrupted(measuring: Coroutine[Any, Any, T]) -> T:
    """SIGTERM does what Ctrl-C does: it stops at the next wait, where the servers are ended."""
    task = asyncio.create_task(measuring)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _measure(job: Job, head: Mapping[str, Any], output: Path) -> Mapping[str, Any]:
    """Takes every turn. The report is written after each, so that an interrupted run leaves what it has."""
    figures: list[Figure] = []
    began = time.monotonic()
    result: Mapping[str, Any] = {}
    for done, turn in enumerate(job.turns):
        gone = time.monotonic() - began
        left = f"; {human_seconds(gone)} gone, {human_seconds(gone / done * (len(job.turns) - done))} left" if done else ""
        note(f"{done + 1}/{len(job.turns)} round {turn.round}, {turn.server}: {', '.join(turn.rows)}{left}")
        taken = await plan.take(turn, job.trial(turn))
        for figure in taken:
            if figure.problem:
                note(f"  {figure.row}: {figure.problem}")
        figures += taken
        now = {**head, "load average after": about.load(), "seconds": round(time.monotonic() - began)}
        result = report.result(figures, now, is_judged=not job.is_quick)
        _write(output, result)
    return result


def _write(output: Path, result: Mapping[str, Any]) -> None:
    text = json.dumps({"schema": JSON_SCHEMA, **result}, indent=1, ensure_ascii=False)
    artifacts.write_atomically(output / JSON_NAME, f"{text}\n")
    artifacts.write_atomically(output / MARKDOWN_NAME, report.markdown(result))


if __name__ == "__main__":
    serve()
