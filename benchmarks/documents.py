"""Time to first token of a question over ten documents that were read before, in other combinations.

Every server gets the same text. llama-server is measured as it comes, and with `--cache-reuse`, by which it moves parts of a
prompt that it holds; ours with documents read in their place, and with each read by itself (`serve.documents = "stitched"`).
"""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.text import passages
from benchmarks.client import Answer
from benchmarks.figures import Figure
from benchmarks.servers import Running, running
from benchmarks.workloads import IDLE_SECONDS, Trial, answer_of, first_token_seconds, warm_up

SYSTEM_TOKENS, DOCUMENT_TOKENS, QUESTION_TOKENS = 30, 100, 24
KNOWN, ASKED = 14, 10
QUESTIONS = 2  # in the two ways that are compared; one in the others
TAG_TOKENS = 16  # of a document's frame, about
SLOTS, CONTEXT_TOKENS, CACHE_TOKENS = 1, 2048, 4096
REUSE_TOKENS = 32  # the least that llama-server moves with --cache-reuse
WRITING_SECONDS = 60.0
STITCHED, AS_IT_COMES = COMPARED = ("stitched", "as it comes")
Documents = Sequence[tuple[str, str]]


async def documents(trial: Trial) -> Sequence[Figure]:
    """Never seen; in a new combination; and, of those that were read by themselves, after a restart."""
    trial = trial.with_launch(slots=SLOTS, context_tokens=CONTEXT_TOKENS, cache_tokens=CACHE_TOKENS)
    is_ours = bool(trial.server.engine_word)
    figures = list(await _measured(trial, "exact" if is_ours else AS_IT_COMES, cold=True))
    if is_ours:
        stitched = trial.with_launch(documents=STITCHED)
        figures += await _measured(stitched, STITCHED, cold=False)
        figures.append(await _restarted(stitched))
    else:
        figures += await _measured(trial.with_launch(reuse_tokens=REUSE_TOKENS), "with --cache-reuse", cold=False)
    return figures


async def _measured(trial: Trial, how: str, *, cold: bool) -> Sequence[Figure]:
    chance = random.Random(trial.round)
    before = _files(trial)
    async with running(trial.server, trial.launch) as run:
        await warm_up(trial, run)
        known = _known(trial)
        first = await _ask(trial, run, known[:ASKED], "first")
        await _ask(trial, run, known[-ASKED:], "second")
        if trial.launch.documents == STITCHED:  # each was seen twice then, and comes to disk
            await _ask(trial, run, [*known[: KNOWN - ASKED], *known[ASKED:]], "third")
        seconds, told = [], []
        for number in range(QUESTIONS if how in COMPARED else 1):
            await asyncio.sleep(IDLE_SECONDS)
            answer = await _ask(trial, run, chance.sample(known, ASKED), f"{how} {number}")
            seconds.append(first_token_seconds(answer))
            told.append(answer.prompt_tokens)
        if trial.launch.documents == STITCHED:
            await _written(trial, before)
    row = {"exact": "documents-exact", "with --cache-reuse": "documents-reuse"}.get(how, "documents-new")
    figures = [trial.figure(row, *seconds, how=how, prompt_tokens=told)]
    if cold:
        figures.append(trial.figure("documents-cold", first_token_seconds(first), prompt_tokens=first.prompt_tokens))
    return figures


async def _restarted(trial: Trial) -> Figure:
    async with running(trial.server, trial.launch) as run:
        await warm_up(trial, run)
        answer = await _ask(trial, run, random.Random(f"restart {trial.round}").sample(_known(trial), ASKED), "restarted")
    return trial.figure("documents-restart", first_token_seconds(answer), prompt_tokens=answer.prompt_tokens)


async def _written(trial: Trial, before: set[Path]) -> None:
    """Waits until each document has a file."""
    for _ in range(int(WRITING_SECONDS / IDLE_SECONDS)):
        if len(_files(trial) - before) >= KNOWN:
            return
        await asyncio.sleep(IDLE_SECONDS)


def _files(trial: Trial) -> set[Path]:
    return set(trial.launch.folder.rglob("*.prefix"))


def _known(trial: Trial) -> Documents:
    words = DOCUMENT_TOKENS - TAG_TOKENS
    return [(f"{at}.md", trial.prompts.text(f"document {trial.round} {at}", words)) for at in range(KNOWN)]


async def _ask(trial: Trial, run: Running, chosen: Documents, label: str) -> Answer:
    system = trial.prompts.text(f"documents {trial.round}", SYSTEM_TOKENS)
    question = {"role": "user", "content": trial.prompts.text(f"question {trial.round} {label}", QUESTION_TOKENS)}
    fields: dict[str, Any] = {}
    if trial.server.engine_word:
        fields = {"documents": [{"id": name, "text": text} for name, text in chosen]}
    else:
        system += passages.SEPARATOR + "".join(passages.shown(name, text) for name, text in chosen)
    return await answer_of(run, [{"role": "system", "content": system}, question], 2, **fields)
