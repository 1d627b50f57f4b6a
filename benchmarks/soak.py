"""Long runs against a real `appliance serve`: does it hold its throughput, keep its deadlines and its memory?

    python -m benchmarks.soak --minutes 60                  a mix of requests at 0.7 of what it can answer
    python -m benchmarks.soak --minutes 10 --factor 4       four times more than it can answer

The mix: streams, whole answers, clients that leave, shared system prompts, long prompts and answers bound to a schema; open
loop, fixed seed. The model is small and random, so that many requests pass. `run` is the entry; `tests/load` judges.
"""

import asyncio
import collections
import dataclasses
import itertools
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from appliance import device
from appliance.console import Command, emit, json_option, note
from benchmarks import about, processes, prompts
from benchmarks.client import Answer, Request, ask, clock
from benchmarks.figures import percentile
from benchmarks.overload import arrivals, closed_loop
from benchmarks.prompts import SEED, Prompts
from benchmarks.servers import SERVERS, Launch, Running, Server, running
from benchmarks.shapes import shaped_model
from benchmarks.workloads import SCHEMA

SLOTS, CONTEXT_TOKENS, CACHE_TOKENS, QUEUE_REQUESTS = 4, 1024, 4096, 128
DEADLINE_SECONDS = 6.0
PATIENCE_SECONDS = 30.0  # longer than the deadline: it is the server that must keep it
LONGEST_STAY_SECONDS = 0.5  # of those who leave
SAMPLE_SECONDS = 1.0
IDLE_SECONDS = 12.0  # until what is kept for a while after a load has gone: threads of pools, connections
WARM_UP_REQUESTS, CAPACITY_REQUESTS = 200, 300
SYSTEM_PROMPTS, SYSTEM_TOKENS = 4, 200
SOON_REPORTED_SECONDS = 30.0
KINDS = {"stream": 6, "whole": 3, "leaves": 2, "shared": 5, "long": 1, "schema": 2}  # and how often


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process at one time, `seconds` after the load began."""

    seconds: float
    anonymous_bytes: int
    open_files: int
    threads: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One request: what kind, what became of it, when it ended, and its seconds from when it was to be sent."""

    kind: str
    outcome: str
    ended: float
    seconds: float
    tokens: int
    lateness: float  # of the client, which shares the cores: sent so much later than the open loop wanted
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What a run found. Processes are "http" and "engine"; idle samples are from before the load and after it."""

    seconds: float
    factor: float
    requests_per_second: float
    ended: Sequence[Ended]
    samples: Mapping[str, Sequence[Sample]]
    idle_before: Mapping[str, Sample]
    idle_after: Mapping[str, Sample]
    log: str

    def count(self, *outcomes: str) -> int:
        return sum(each.outcome in outcomes for each in self.ended)

    def tokens_per_second(self, start: float, end: float) -> float:
        """Of answers that ended within these shares of the run."""
        low, high = start * self.seconds, end * self.seconds
        return sum(each.tokens for each in self.ended if low <= each.ended < high) / (high - low)

    @property
    def held_ratio(self) -> float:
        """Throughput of the second half of the run to that of the first."""
        return self.tokens_per_second(0.5, 1.0) / self.tokens_per_second(0.0, 0.5)

    @property
    def p95_seconds(self) -> float:
        """Of answers that were whole."""
        return percentile([each.seconds for each in self.ended if each.outcome == "served"], 95)

    def growth_bytes(self, process: str) -> float:
        """Anonymous memory gained over the second half, by linear regression over its samples."""
        later = [sample for sample in self.samples[process] if sample.seconds >= self.seconds / 2]
        line = statistics.linear_regression(
            [sample.seconds for sample in later], [float(sample.anonymous_bytes) for sample in later]
        )
        return line.slope * self.seconds / 2

    def summary(self) -> dict[str, Any]:
        outcomes = collections.Counter(each.outcome for each in self.ended)
        return {
            "seconds": round(self.seconds),
            "times the capacity": self.factor,
            "requests per second": round(self.requests_per_second, 2),
            "requests": len(self.ended),
            **dict(sorted(outcomes.items())),
            "tokens per second, first half": round(self.tokens_per_second(0.0, 0.5), 1),
            "tokens per second, second half": round(self.tokens_per_second(0.5, 1.0), 1),
            "throughput held": round(self.held_ratio, 3),
            "p95 seconds of whole answers": round(self.p95_seconds, 2),
            "deadline seconds": DEADLINE_SECONDS,
            "p95 lateness of the client": round(percentile([each.lateness for each in self.ended], 95), 3),
            **{f"{name}, growth in the second half, KiB": round(self.growth_bytes(name) / 1024) for name in self.samples},
            **{
                f"{name}, idle before and after": [dataclasses.asdict(self.idle_before[name]), dataclasses.asdict(after)]
                for name, after in self.idle_after.items()
            },
            "problems": list(dict.fromkeys(each.problem for each in self.ended if each.outcome == "failed"))[:5],
        }


@click.command(cls=Command)
@click.option("--minutes", type=click.FloatRange(min=0.0, min_open=True), default=60.0, show_default=True)
@click.option("--factor", type=click.FloatRange(min=0.0, min_open=True), default=0.7, show_default=True, help="Of capacity.")
@json_option
def soak(minutes: float, factor: float, as_json: bool) -> None:
    """Load a real server for a long time, and say what became of throughput, deadlines and memory."""
    found = asyncio.run(run(shaped_model("tiny", "Q4_K_M"), minutes * 60, factor))
    emit({"command": about.command(), **about.machine(), **about.versions(), **found.summary()}, as_json)


async def run(model: Path, seconds: float, factor: float) -> Soak:
    """Starts a server, measures what it can answer, and asks `factor` times as much for `seconds`."""
    known = prompts.read(model)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        launch = Launch(
            model=model,
            folder=Path(folder),
            threads=device.usable_cores(),
            slots=SLOTS,
            context_tokens=CONTEXT_TOKENS,
            cache_tokens=CACHE_TOKENS,
        )
        async with running(_server(), launch) as server:
            mix = Mix(known, server)
            await _warm_up(mix)
            per_second = factor * await _capacity(mix)
            note(f"soak: {per_second:.1f} requests per second, {factor:g} times what it can answer")
            await asyncio.sleep(IDLE_SECONDS)
            before = _look(server, 0.0)
            ended, samples = await _load(mix, per_second, seconds)
            await asyncio.sleep(IDLE_SECONDS)
            after = _look(server, seconds)
            server.check([await ask(mix.request("stream", "the last"), patience_seconds=PATIENCE_SECONDS)])
            return Soak(
                seconds=seconds,
                factor=factor,
                requests_per_second=per_second,
                ended=ended,
                samples=samples,
                idle_before=before,
                idle_after=after,
                log=server.log.read_text(errors="replace"),
            )


class Mix:
    """Requests of all kinds, drawn with a fixed seed."""

    def __init__(self, known: Prompts, server: Running) -> None:
        self.server = server
        self._known = known
        self._random = random.Random(SEED)
        self._numbers = itertools.count()

    def draw(self) -> tuple[str, Request, float]:
        """A kind, its request, and how long its client stays."""
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        stay = self._random.uniform(0.0, LONGEST_STAY_SECONDS) if kind == "leaves" else PATIENCE_SECONDS
        return kind, self.request(kind, str(next(self._numbers))), stay

    def request(self, kind: str, label: str) -> Request:
        short = self._known.user(label, 24)
        match kind:
            case "whole":
                return self.server.chat(short, 32, stream=None, stream_options=None)
            case "shared":
                system = f"system {self._random.randrange(SYSTEM_PROMPTS)}"
                return self.server.chat(self._known.with_system(system, SYSTEM_TOKENS, label, 12), 24)
            case "long":
                return self.server.chat(self._known.user(label, CONTEXT_TOKENS // 2), 16)
            case "schema":
                form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
                return self.server.chat(short, 300, response_format=form, ignore_eos=None)
        return self.server.chat(short, 32)


def outcome(kind: str, answer: Answer) -> str:
    """What became of a request, in words.

    A request whose deadline cannot be kept is refused at once; one that is overtaken by it hears so when it is over.
    """
    if answer.is_whole:
        return "served"
    is_late = answer.status == 504 or "deadline_exceeded" in answer.problem
    if is_late and answer.ended_at - answer.sent_at > DEADLINE_SECONDS / 2:
        return "overtaken"
    if is_late or answer.status in (429, 503):
        return "refused" if "retry-after" in answer.headers else "refused without a time"
    if kind == "leaves" and answer.problem.startswith("no "):
        return "left"
    return "failed"


def _server() -> Server:
    """Ours with all that is on by default, and a queue in which requests can become late."""
    ours = SERVERS["ours"]

    def environment(launch: Launch) -> Mapping[str, str]:
        changes = {
            "APPLIANCE_SERVE_SPECULATION": "auto",
            "APPLIANCE_SERVE_DEADLINE_SECONDS": str(DEADLINE_SECONDS),
            "APPLIANCE_SERVE_QUEUE_REQUESTS": str(QUEUE_REQUESTS),
            "APPLIANCE_SERVE_SNAPSHOT_MIB": "64",
        }
        return {**ours.environment(launch), **changes}

    return dataclasses.replace(ours, environment=environment)


async def _warm_up(mix: Mix) -> None:
    """All kinds, so that what is loaded, compiled or cached at first use is there before anything is compared."""
    for _ in range(WARM_UP_REQUESTS // 8):
        await asyncio.gather(*(ask(request, patience_seconds=stay) for _, request, stay in (mix.draw() for _ in range(8))))


async def _capacity(mix: Mix) -> float:
    """Requests per second of the mix that are answered, with every slot busy and nobody leaving."""
    drawn = (mix.draw() for _ in itertools.count())
    requests = itertools.islice((request for kind, request, _ in drawn if kind != "leaves"), CAPACITY_REQUESTS)
    answers, seconds = await closed_loop(requests, 2 * SLOTS, patience_seconds=PATIENCE_SECONDS)
    served = [answer for answer in answers if answer.is_whole]
    mix.server.check(served or answers)
    return len(served) / seconds


async def _load(mix: Mix, per_second: float, seconds: float) -> tuple[Sequence[Ended], Mapping[str, Sequence[Sample]]]:
    """The open loop, with the server's processes looked at every second."""
    began = clock()
    samples: dict[str, list[Sample]] = {}
    sampling = asyncio.create_task(_sample(mix.server, began, samples))
    asking: set[asyncio.Task[None]] = set()
    ended: list[Ended] = []
    try:
        for at in arrivals("soak", per_second, seconds):
            await asyncio.sleep(max(0.0, began + at - clock()))
            task = asyncio.create_task(_ask(mix, began, at, ended))
            asking.add(task)
            task.add_done_callback(asking.discard)
        await asyncio.gather(*asking)
    finally:
        sampling.cancel()
    return ended, samples


async def _ask(mix: Mix, began: float, at: float, ended: list[Ended]) -> None:
    kind, request, stay = mix.draw()
    answer = await ask(request, patience_seconds=stay)
    ended.append(
        Ended(
            kind=kind,
            outcome=outcome(kind, answer),
            ended=answer.ended_at - began,
            seconds=answer.ended_at - answer.sent_at,
            tokens=answer.answer_tokens or len(answer.text_times),
            lateness=answer.sent_at - began - at,
            problem=answer.problem or (answer.text[:200] if not answer.is_whole else ""),
        )
    )


async def _sample(server: Running, began: float, samples: dict[str, list[Sample]]) -> None:
    told = clock()
    while True:
        for name, sample in _look(server, clock() - began).items():
            samples.setdefault(name, []).append(sample)
        if clock() - told > SOON_REPORTED_SECONDS:
            told = clock()
            memory = ", ".join(f"{name} {each[-1].anonymous_bytes >> 20} MiB" for name, each in samples.items())
            note(f"soak: {clock() - began:.0f} s, {memory}")
        await asyncio.sleep(SAMPLE_SECONDS)


def _look(server: Running, seconds: float) -> Mapping[str, Sample]:
    """The two processes as they are now."""
    found: dict[str, Sample] = {}
    for pid in processes.tree(server.process.pid):
        if (role := server.role(pid)) in ("http", "engine"):
            found[role] = Sample(
                seconds=seconds,
                anonymous_bytes=processes.anonymous_now(pid),
                open_files=processes.entries(pid, "fd"),
                threads=processes.entries(pid, "task"),
            )
    return found


if __name__ == "__main__":
    soak()
