"""From the start of a server's process to its first token, with the model's file in the page cache and without."""

from collections.abc import Sequence

from benchmarks.figures import Figure
from benchmarks.page_cache import cached_ratio, drop
from benchmarks.servers import Running, running
from benchmarks.workloads import SHORT_TOKENS, Trial, answer_of


async def start(trial: Trial, run: Running) -> Sequence[Figure]:
    """The first request to a server that was started while its file was in the page cache."""
    return [trial.figure("start-warm", await _first_token(trial, run))]


async def cold_start(trial: Trial) -> Sequence[Figure]:
    """The same after the file was dropped from the page cache."""
    drop(trial.launch.model)
    left = cached_ratio(trial.launch.model)
    async with running(trial.server, trial.launch) as run:
        seconds = await _first_token(trial, run)
    return [trial.figure("start-cold", seconds, **{"share of the file still cached": left})]


async def first_start(trial: Trial) -> float:
    """Of a file that the server never saw: ours looks closely at it, and remembers that it did."""
    async with running(trial.server, trial.launch) as run:
        return await _first_token(trial, run)


async def _first_token(trial: Trial, run: Running) -> float:
    answer = await answer_of(run, trial.prompts.user(f"start {trial.round}", SHORT_TOKENS), 2)
    return answer.text_times[0] - run.started_at
