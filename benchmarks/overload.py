"""Four times more requests than a server can answer: what it still delivers, how soon, and what it tells the others.

Arrivals are open-loop: a Poisson process with a fixed seed decides when a request is sent, whatever became of those before
it, as with people who know nothing of each other. Each gives up after a while.
"""

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.client import Answer, Request, ask, clock
from benchmarks.figures import Figure, percentile
from benchmarks.prompts import SEED
from benchmarks.servers import Running, running
from benchmarks.workloads import SLOTS, Trial, warm_up

FACTOR = 4.0
SECONDS = 20.0
# A client waits so many times longer than an answer takes with every slot busy, within bounds.
PATIENCE, PATIENCE_SECONDS = 5.0, (20.0, 120.0)
PROMPT_TOKENS, ANSWER_TOKENS = 60, 32
CAPACITY_REQUESTS, CAPACITY_PATIENCE_SECONDS = 16, 300.0
QUICK = 5.0  # so much shorter in the quick form
RETRY_AFTER = "retry-after"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the requests of an open loop; times in seconds, of those served."""

    sent: int
    served: int
    refused: int  # told so, with 503 or 429
    refused_with_time: int  # and told when to come back
    gave_up: int  # the client did
    failed: int
    tokens_per_second: float
    first_token_p50: float | None
    first_token_p95: float | None


def arrivals(label: str, per_second: float, seconds: float) -> Iterator[float]:
    """Times of a Poisson process from 0 on; the label and SEED decide them."""
    random_source = random.Random(f"{SEED} arrivals {label}")
    at = random_source.expovariate(per_second)
    while at < seconds:
        yield at
        at += random_source.expovariate(per_second)


async def open_loop(
    requests: Iterator[Request], times: Iterator[float], *, patience_seconds: float
) -> tuple[Sequence[Answer], float]:
    """Sends a request at each of the times; the answers, and the seconds until the last of them ended."""
    began = clock()
    asking = []
    for at, request in zip(times, requests, strict=False):
        await asyncio.sleep(max(0.0, began + at - clock()))
        asking.append(asyncio.create_task(ask(request, patience_seconds=patience_seconds)))
    answers = await asyncio.gather(*asking)
    return answers, clock() - began


async def closed_loop(
    requests: Iterator[Request], streams: int, *, patience_seconds: float
) -> tuple[Sequence[Answer], float]:
    """So many at a time, each followed by the next, until there are no more requests; the answers, and the seconds."""
    answers: list[Answer] = []

    async def stream() -> None:
        for request in requests:
            answers.append(await ask(request, patience_seconds=patience_seconds))

    began = clock()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return answers, clock() - began


def outcome(answers: Sequence[Answer], seconds: float, max_tokens: int) -> Outcome:
    """Counts; every request is in one of served, refused, gave_up and failed."""
    served = [answer for answer in answers if answer.is_whole]
    refused = [answer for answer in answers if answer.status in (429, 503)]
    gave_up = [answer for answer in answers if not answer.is_whole and answer.problem.startswith("no end within")]
    first = [answer.text_times[0] - answer.sent_at for answer in served if answer.text_times]
    return Outcome(
        sent=len(answers),
        served=len(served),
        refused=len(refused),
        refused_with_time=sum(RETRY_AFTER in answer.headers for answer in refused),
        gave_up=len(gave_up),
        failed=len(answers) - len(served) - len(refused) - len(gave_up),
        tokens_per_second=sum(answer.answer_tokens or max_tokens for answer in served) / seconds,
        first_token_p50=percentile(first, 50) if first else None,
        first_token_p95=percentile(first, 95) if first else None,
    )


async def overload(trial: Trial) -> Sequence[Figure]:
    """Measures the server's capacity, then sends FACTOR times as much."""
    shorter = QUICK if trial.is_quick else 1.0
    async with running(trial.server, trial.launch) as run:
        await warm_up(trial, run)
        count = max(SLOTS, int(CAPACITY_REQUESTS / shorter))
        requests = itertools.islice(_requests(trial, run, "capacity"), count)
        answers, seconds = await closed_loop(requests, SLOTS, patience_seconds=CAPACITY_PATIENCE_SECONDS)
        run.check(answers)
        capacity = outcome(answers, seconds, ANSWER_TOKENS)
        least, most = PATIENCE_SECONDS
        patience = max(least, min(most, PATIENCE * seconds * SLOTS / count)) / shorter
        per_second = FACTOR * count / seconds
        times = arrivals(f"overload {trial.round}", per_second, SECONDS / shorter)
        answers, seconds = await open_loop(_requests(trial, run, "overload"), times, patience_seconds=patience)
        run.check([])
        found = outcome(answers, seconds, ANSWER_TOKENS)
    details: dict[str, Any] = {
        **dataclasses.asdict(found),
        "requests per second": per_second,
        "capacity tokens per second": capacity.tokens_per_second,
        "arrivals for seconds": SECONDS / shorter,
        "patience seconds": patience,
    }
    return [
        trial.figure("overload-held", found.tokens_per_second / capacity.tokens_per_second, **details),
        *([trial.figure("overload-ttft", found.first_token_p50)] if found.first_token_p50 is not None else []),
    ]


def _requests(trial: Trial, run: Running, label: str) -> Iterator[Request]:
    for i in itertools.count():
        yield run.chat(trial.prompts.user(f"{label} {trial.round} {i}", PROMPT_TOKENS), ANSWER_TOKENS)
