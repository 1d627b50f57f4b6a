"""Two servers that are both up, asked in turn: `python -m benchmarks.pairs`. For differences below this machine's moods.

Rounds of `benchmarks.serve` are minutes apart, and a shared machine may be half as fast by then. Here the second server is
asked seconds after the first, with the same request, while the first is idle; who is first is drawn by a fixed seed. What
is told is the median of the pairs' ratios, with quartiles.
"""

import asyncio
import dataclasses
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from appliance import device
from appliance.console import Command, emit, json_option, note
from benchmarks import about, prompts, servers, workloads
from benchmarks.figures import percentile
from benchmarks.prompts import SEED
from benchmarks.servers import HOST, SERVERS, Running, Server, running
from benchmarks.shapes import FILE_TYPES, SHAPES, shaped_model
from benchmarks.workloads import SHORT_TOKENS, SYSTEM_TOKENS, Trial

OURS, PEER = "ours", "llama-server"
PAIRS = 20
NOT_CHOSEN = ("APPLIANCE_ARTIFACTS", "APPLIANCE_SERVE_SPECULATION")  # where to write, and what would measure noise
Ask = Callable[[Trial, Running], Awaitable[float]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is asked. `is_rate`: tokens per second, of which more is better; otherwise seconds to the first token."""

    title: str
    ask: Ask
    is_rate: bool = False


def _decode(streams: int) -> Row:
    async def ask(trial: Trial, run: Running) -> float:
        return (await workloads.decode(trial, run, streams))[0].values[0]

    return Row(title=f"decode, {streams} at once, tokens/s", ask=ask, is_rate=True)


async def _cold(trial: Trial, run: Running) -> float:
    return (await workloads.cold(trial, run))[0].values[0]


async def _short(trial: Trial, run: Running) -> float:
    """A prompt of a few words."""
    answer = await workloads.answer_of(run, trial.prompts.user(f"short {trial.round}", SHORT_TOKENS), 2)
    return workloads.first_token_seconds(answer)


async def _held(trial: Trial, run: Running) -> float:
    """Behind a system prompt that every pair before had, too: the first of all reads it."""
    messages = trial.prompts.with_system("pairs", SYSTEM_TOKENS, f"visitor {trial.round}", SHORT_TOKENS)
    return workloads.first_token_seconds(await workloads.answer_of(run, messages, 8))


ROWS: Mapping[str, Row] = {
    "decode-1": _decode(1),
    "decode-4": _decode(4),
    "decode-8": _decode(8),
    "short": Row(title="first token, a short prompt, s", ask=_short),
    "cold": Row(title=f"first token, {workloads.COLD_TOKENS} tokens never seen, s", ask=_cold),
    "held": Row(title=f"first token, prefix of {SYSTEM_TOKENS:,} tokens held, s", ask=_held),
}


@click.command(cls=Command)
@click.option("--pairs", type=click.IntRange(2), default=PAIRS, show_default=True, help="Of requests, for each row.")
@click.option("--row", "rows", type=click.Choice(list(ROWS)), multiple=True, help="[default: all]")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="0.6B", show_default=True, help="Of the random model.")
@click.option("--quantization", type=click.Choice(list(FILE_TYPES)), default="Q4_K_M", show_default=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="This file, and no random one.")
@click.option("--as-they-come", is_flag=True, help="No settings for either: ours as tuned, if it was, the peer's defaults.")
@json_option
def pairs(
    pairs: int,
    rows: tuple[str, ...],
    shape: str,
    quantization: str,
    model: Path | None,
    as_they_come: bool,
    as_json: bool,
) -> None:
    """Ask this server and llama-server in turn, request by request."""
    path = model or shaped_model(shape, quantization)
    known = prompts.read(path)
    with tempfile.TemporaryDirectory(prefix="bench-pairs-") as folder:
        launch = workloads.launch(path, Path(folder), device.usable_cores(), known)
        both = [as_it_comes(SERVERS[name]) if as_they_come else SERVERS[name] for name in (OURS, PEER)]
        trials = [Trial(server=server, launch=launch, prompts=known, round=0) for server in both]
        head = {
            "command": about.command(),
            "date": about.now(),
            **about.machine(),
            **about.versions(),
            "model": path.name,
            "load average before": about.load(),
            **{server.name: servers.shown(server, launch) for server in both},
        }
        taken = asyncio.run(_measure(trials, rows or tuple(ROWS), pairs))
    result = {"head": head, "rows": {name: _summary(values, ROWS[name]) for name, values in taken.items()}}
    emit(result, as_json, _table(result))


def as_it_comes(server: Server) -> Server:
    """Only the file, beside which tuning left its settings, and where to listen; what is kept goes with this run.

    Guessing stays off, as in `servers`: guesses that come true are noise here.
    """

    def command(launch: servers.Launch, port: int) -> Sequence[str]:
        words = server.command(launch, port)
        return [*words[: words.index("--model")], "--model", str(launch.model), "--host", HOST, "--port", str(port)]

    def environment(launch: servers.Launch) -> Mapping[str, str]:
        return {key: value for key, value in server.environment(launch).items() if key in NOT_CHOSEN}

    return dataclasses.replace(server, command=command, environment=environment)


async def _measure(trials: Sequence[Trial], rows: Sequence[str], count: int) -> Mapping[str, Sequence[tuple[float, float]]]:
    """Pairs of ours and the peer's, by row."""
    first = random.Random(SEED)
    ours, peer = trials
    taken: dict[str, list[tuple[float, float]]] = {}
    async with running(ours.server, ours.launch) as our_run, running(peer.server, peer.launch) as peer_run:
        for name in rows:
            for number in range(-1, count):  # the first pair is not counted: it touches memory that no later one has to
                pair: dict[str, float] = {}
                turns = [(ours, our_run), (peer, peer_run)]
                for trial, run in turns if first.random() < 0.5 else reversed(turns):
                    pair[trial.server.name] = await ROWS[name].ask(dataclasses.replace(trial, round=number), run)
                if number >= 0:
                    taken.setdefault(name, []).append((pair[OURS], pair[PEER]))
            told = _summary(taken[name], ROWS[name])  # at once: an interrupted run has told this much
            note(f"{told['title']}: {_spread(told)}")
    return taken


def _summary(values: Sequence[tuple[float, float]], row: Row) -> Mapping[str, Any]:
    ratios = [ours / peer for ours, peer in values]
    return {
        "title": row.title,
        OURS: statistics.median(ours for ours, _ in values),
        PEER: statistics.median(peer for _, peer in values),
        "ratio": statistics.median(ratios),
        "quartiles": [percentile(ratios, 25), percentile(ratios, 75)],
        "pairs": len(values),
        "more is better": row.is_rate,
        "values": values,
    }


def _table(result: Mapping[str, Any]) -> str:
    lines = [f"- {key}: {value}" for key, value in result["head"].items()]
    lines += ["", f"| | {OURS} | {PEER} | ratio (quartiles, pairs) | better is |", "|---|---:|---:|---|---|"]
    for row in result["rows"].values():
        wanted = "more" if row["more is better"] else "less"
        lines.append(f"| {row['title']} | {row[OURS]:.3g} | {row[PEER]:.3g} | {_spread(row)} | {wanted} |")
    return "\n".join(lines)


def _spread(row: Mapping[str, Any]) -> str:
    low, high = row["quartiles"]
    return f"{row['ratio']:.3f} ({low:.2f}–{high:.2f}, {row['pairs']})"


if __name__ == "__main__":
    pairs()
