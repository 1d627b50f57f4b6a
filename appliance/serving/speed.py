"""How fast a model is on this machine: reading prompts, writing answers, the first token, starting, memory.

`measure` is the entry: rounds of short tasks in turn, in a process of their own, and then the engine itself as `appliance
serve` runs it, without HTTP. What came of it is told by `speed_report.py`. Chooses nothing; `tuning.py` does.
"""

import asyncio
import dataclasses
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from appliance import device
from appliance.serving.engine import RestartReason, StatsListener
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Finished, ModelInfo, RequestStats, StepStats
from appliance.serving.requests import GenerationRequest, TokenPrompt
from appliance.serving.speed_meter import Meter, ReadPrompt, Task, WriteAnswers
from appliance.serving.supervisor import Supervisor

PROMPT_TOKENS = (128, 512, 1024)
ANSWERS = (1, 2, 4, 8)
ANSWER_PROMPT_TOKENS = 128  # read before an answer whose speed is measured
ANSWER_STEPS = 32
FIRST_TOKEN_PROMPT_TOKENS = 1000
SHORT_PROMPT_TOKENS = 8
FEWEST_ROUNDS, MOST_ROUNDS = 3, 7
SECONDS = 60.0  # for all rounds together, as far as the fewest rounds allow
ROUNDS_SHARE = 0.8  # of the progress

Progress = Callable[[float, str], None]  # the share that is done, 0 to 1, and what is being done


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second, one value for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """Of an engine as it serves: seconds from its process's start to its first token, then those of long prompts alone."""

    start_seconds: float
    prompt_tokens: int
    first_token_seconds: tuple[float, ...]
    anonymous_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """By tokens of a prompt, and by answers at once. `read_bytes` is what memory delivers for a step of one answer."""

    reading: Mapping[int, Rate]
    writing: Mapping[int, Rate]
    answer_prompt_tokens: int
    engine: EngineTimes
    read_bytes: int
    bandwidth: float  # bytes per second, measured beforehand
    others_ratio: float  # of the machine's CPU time, taken by other programs meanwhile

    @property
    def read_bytes_per_second(self) -> float:
        return self.read_bytes * self.writing[1].median

    @property
    def bandwidth_ratio(self) -> float:
        return self.read_bytes_per_second / self.bandwidth


def measuring_settings(
    settings: EngineSettings, *, answers: int, prompt_tokens: int, answer_tokens: int, chunk_tokens: int | None = None
) -> EngineSettings:
    """The same way of loading, with room for what is measured and no more."""
    return msgspec.structs.replace(
        settings,
        slots=answers,
        context_tokens=max(prompt_tokens, answer_tokens) + 1,
        cache_tokens=0,
        chunk_tokens=chunk_tokens or settings.chunk_tokens,
        adapters={},
        snapshot_folder=None,
        snapshot_bytes=0,
        system_prompts=(),
        is_speculating=False,
    )


def measure(
    settings: EngineSettings,
    *,
    bandwidth: float,
    fits: Callable[[EngineSettings], bool],
    on_progress: Progress = lambda share, what: None,  # noqa: ARG005
    seconds: float = SECONDS,
) -> Speed:
    """`fits` tells whether memory is free for a process; fewer answers are tried where it is not.

    Raises as `Meter` and `Supervisor.start` do.
    """
    others = Others()
    extent = _extent(settings, fits)
    with Meter(extent.settings(settings)) as meter:
        reading, writing = _rounds(meter, extent, settings, seconds, on_progress)
        opened = meter.opened
    on_progress(ROUNDS_SHARE, "starting the engine")
    engine = asyncio.run(_engine_times(settings, on_progress))
    on_progress(1.0, "done")
    return Speed(
        reading=reading,
        writing=writing,
        answer_prompt_tokens=extent.answer_prompt_tokens,
        engine=engine,
        read_bytes=opened.weight_bytes + (extent.answer_prompt_tokens + extent.steps // 2) * opened.cell_bytes,
        bandwidth=bandwidth,
        others_ratio=others.ratio(),
    )


class Others:
    """How much of the CPU time other programs took since this was made, the hypervisor's other guests among them."""

    def __init__(self, proc: Path = device.PROC) -> None:
        self._proc = proc
        self._started = self._ticks()

    def ratio(self) -> float:
        """Of all cores' time. Processes that this one has started must have ended. 0 where the kernel does not say."""
        (all_before, busy_before, own_before), (all_now, busy_now, own_now) = self._started, self._ticks()
        others = (busy_now - busy_before) - (own_now - own_before)
        return max(0.0, others / (all_now - all_before)) if all_now > all_before else 0.0

    def _ticks(self) -> tuple[float, float, float]:
        """All, busy, and this process's with its children's: proc_stat(5); guests are counted in user time already."""
        line = (device.read_text(self._proc / "stat") or "").partition("\n")[0]
        ticks = [int(each) for each in line.split()[1:9]]
        if len(ticks) < 5:
            return 0.0, 0.0, 0.0
        own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Extent:
    """What is measured: as much as the context and the memory allow."""

    prompts: Sequence[int]
    answers: Sequence[int]
    answer_prompt_tokens: int
    steps: int

    def settings(self, settings: EngineSettings) -> EngineSettings:
        answer_tokens = self.answer_prompt_tokens + self.steps
        return measuring_settings(
            settings, answers=max(self.answers), prompt_tokens=max(self.prompts), answer_tokens=answer_tokens
        )


def _extent(settings: EngineSettings, fits: Callable[[EngineSettings], bool]) -> _Extent:
    context = settings.context_tokens
    whole = _Extent(
        prompts=[tokens for tokens in PROMPT_TOKENS if tokens < context] or [context // 2],
        answers=ANSWERS,
        answer_prompt_tokens=min(ANSWER_PROMPT_TOKENS, context // 2),
        steps=min(ANSWER_STEPS, context // 4),
    )
    fewer = (dataclasses.replace(whole, answers=ANSWERS[:count]) for count in range(len(ANSWERS), 0, -1))
    return next((each for each in fewer if fits(each.settings(settings))), dataclasses.replace(whole, answers=ANSWERS[:1]))


def _rounds(
    meter: Meter, extent: _Extent, settings: EngineSettings, seconds: float, on_progress: Progress
) -> tuple[dict[int, Rate], dict[int, Rate]]:
    """All tasks in turn, round by round; a first round that is not counted brings the weights into the caches."""
    reads = [
        ReadPrompt(tokens=tokens, chunk_tokens=settings.chunk_tokens, threads=settings.threads_prefill)
        for tokens in extent.prompts
    ]
    # Most answers first: their prompts are read once and stay, and fewer answers find theirs among them.
    writes = [
        WriteAnswers(
            answers=count,
            steps=extent.steps,
            threads=settings.threads_decode,
            prompt_tokens=extent.answer_prompt_tokens,
        )
        for count in reversed(extent.answers)
    ]
    tasks: list[Task] = [*reads, *writes]
    meter.seconds(msgspec.structs.replace(reads[0], tokens=min(extent.prompts)))
    rates: dict[Task, list[float]] = {task: [] for task in tasks}
    started, rounds, number = time.monotonic(), MOST_ROUNDS, 0
    while number < rounds:
        for task in tasks:
            on_progress(ROUNDS_SHARE * (number + tasks.index(task) / len(tasks)) / rounds, _said(task))
            rates[task].append(tokens_of(task) / meter.seconds(task))
        number += 1
        if number == 1:
            rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / (time.monotonic() - started))))
    reading = {task.tokens: Rate(values=tuple(rates[task])) for task in reads}
    return reading, {task.answers: Rate(values=tuple(rates[task])) for task in reversed(writes)}


def tokens_of(task: Task) -> int:
    """Those whose time is taken."""
    return task.tokens if isinstance(task, ReadPrompt) else task.answers * task.steps


def _said(task: Task) -> str:
    return f"a prompt of {task.tokens} tokens" if isinstance(task, ReadPrompt) else f"{task.answers} answers at once"


async def _engine_times(settings: EngineSettings, on_progress: Progress) -> EngineTimes:
    """The engine as it is served, but for what it would do at start: system prompts, and prefixes from disk."""
    plain = msgspec.structs.replace(settings, snapshot_folder=None, snapshot_bytes=0, system_prompts=())
    prompt_tokens = min(FIRST_TOKEN_PROMPT_TOKENS, settings.context_tokens - 1)
    started = time.monotonic()
    engine = Supervisor(plain, listener=Silence())
    try:
        await engine.start()
        await _first_token(engine, SHORT_PROMPT_TOKENS)
        start_seconds = time.monotonic() - started
        first_token_seconds = []
        for number in range(FEWEST_ROUNDS):
            share = ROUNDS_SHARE + (1 - ROUNDS_SHARE) * (number + 1) / (FEWEST_ROUNDS + 1)
            on_progress(share, f"the first token after {prompt_tokens}")
            first_token_seconds.append(await _first_token(engine, prompt_tokens))
        assert engine.pid is not None
        anonymous_bytes = _anonymous_bytes(engine.pid)
    finally:
        await engine.close()
    return EngineTimes(
        start_seconds=start_seconds,
        prompt_tokens=prompt_tokens,
        first_token_seconds=tuple(first_token_seconds),
        anonymous_bytes=anonymous_bytes,
    )


async def _first_token(engine: Supervisor, prompt_tokens: int) -> float:
    """Seconds until the first token of an answer to noise, which nobody has asked before."""
    noise = random.Random()
    tokens = tuple(noise.randrange(engine.model.vocabulary_tokens) for _ in range(prompt_tokens))
    asked_at = time.monotonic()
    request = GenerationRequest(
        id=f"{asked_at}", prompt=TokenPrompt(tokens=tokens), arrived_at=asked_at, max_tokens=1, ignore_end=True
    )
    async for event in await engine.submit(request):
        if isinstance(event, Finished):
            break
    return time.monotonic() - asked_at


def _anonymous_bytes(pid: int) -> int:
    """smaps_rollup walks the page tables: https://docs.kernel.org/filesystems/proc.html. 0 where it may not be read."""
    for line in (device.read_text(device.PROC / str(pid) / "smaps_rollup") or "").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return 0


class Silence:
    """An `EngineListener` that nobody asks for anything."""

    def of_model(self, name: str) -> StatsListener:  # noqa: ARG002 (the interface of EngineListener, here and below)
        return self

    def record_step(self, stats: StepStats) -> None: ...

    def record_request(self, stats: RequestStats) -> None: ...

    def record_load(self, model: ModelInfo, seconds: float) -> None: ...

    def record_first_token_after_load(self, name: str, seconds: float) -> None: ...

    def record_unload(self, name: str) -> None: ...

    def record_restart(self, name: str, reason: RestartReason) -> None: ...
