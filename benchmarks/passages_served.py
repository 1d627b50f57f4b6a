"""Asks questions over documents of a server that runs one GGUF file, as any client would, and gives the answers' texts."""

from collections.abc import Sequence
from pathlib import Path

from appliance import device
from appliance.errors import ServerError
from benchmarks.client import ask
from benchmarks.passages_exam import ANSWER_TOKENS
from benchmarks.passages_world import Question, Scene, row
from benchmarks.servers import SERVERS, Launch, running

CONTEXT_TOKENS, CACHE_TOKENS = 1024, 4096
PATIENCE_SECONDS = 60.0
HOW = "appliance_document_requests_total"


async def answers(file: Path, folder: Path, documents: str, asked: Sequence[tuple[Scene, Question]]) -> list[str]:
    """In the order of the questions. Raises `ServerError` where one failed, or was not read as `documents` says."""
    launch = Launch(
        model=file,
        folder=folder,
        threads=device.usable_cores(),
        slots=1,
        context_tokens=CONTEXT_TOKENS,
        cache_tokens=CACHE_TOKENS,
        documents=documents,
    )
    texts = []
    async with running(SERVERS["ours"], launch) as run:
        for scene, question in asked:
            body = row(scene, question)
            request = run.chat(body["messages"][:1], ANSWER_TOKENS, documents=body["documents"], ignore_eos=None)
            answer = await ask(request, patience_seconds=PATIENCE_SECONDS)
            run.check([answer])
            texts.append(answer.text.strip())
        metrics = (await ask(run.get("/metrics"), patience_seconds=PATIENCE_SECONDS)).text
    lines = [line for line in metrics.splitlines() if line.startswith(HOW) and f'reading="{documents}"' in line]
    count = sum(float(line.split()[-1]) for line in lines)
    if count != len(asked):
        raise ServerError(f"Documents were read as {documents!r} for {count:g} of {len(asked)} questions.")
    return texts
