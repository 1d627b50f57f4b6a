"""From the start of a server's process to its first token, with the model's file in the page cache and without."""

from collections.abc import Sequence

from benchmarks.figures import Figure
from benchmarks.page_cache import cached_ratio, drop
from benchmarks.servers import running
from benchmarks.workloads import SHORT_TOKENS, Trial, answer_of

WARM, COLD = "start-warm", "start-cold"


async def start(trial: Trial) -> Sequence[Figure]:
    """Once each. Ours looks closely at a file that it never saw, and remembers that it did: that start is told apart."""
    details = {"the very first start": await _start(trial, "first")} if trial.round == 1 else {}
    warm = trial.figure(WARM, await _start(trial, WARM), **details)
    drop(trial.launch.model)
    left = cached_ratio(trial.launch.model)
    return [warm, trial.figure(COLD, await _start(trial, COLD), **{"share of the file still cached": left})]


async def _start(trial: Trial, label: str) -> float:
    async with running(trial.server, trial.launch) as run:
        answer = await answer_of(run, trial.prompts.user(f"{label} {trial.round}", SHORT_TOKENS), 2)
        return answer.text_times[0] - run.started_at
