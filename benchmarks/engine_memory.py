"""Measures the memory of one engine's process while it loads and does all kinds of work: `measure`.

The process is the one that `appliance serve` starts, with the settings that its memory plan made. Noise is hardly ever
guessed right, so that the rows of logits for drafts, which the plan counts, stay untouched. Linux only.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import random
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from appliance.errors import EngineFailed
from appliance.serving import wire
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Failed, Finished
from appliance.serving.requests import GenerationRequest, Grammar, SamplingSettings, TokenPrompt
from appliance.serving.worker_process import WorkerProcess, Workers
from benchmarks import processes

COMMAND = (sys.executable, "-m", "benchmarks.talkative_worker")
PROMPT_TOKENS = 2048  # of the prompts that fill the cache
ANSWER_TOKENS = 32
SAVING_SECONDS = 2.0  # until the engine, idle, has copied into the cache what was left in its slots
FIRST_TOKEN = 1000  # prompts are random tokens from here on; those at the end of the vocabulary are not text
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
_BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output) buffer size =\s*([\d.]+) MiB")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`buffers` are llama.cpp's own figures, by device and purpose ("CPU_REPACK model"): what it took, touched or not."""

    buffers: Mapping[str, int]
    after: Mapping[str, int]  # anonymous bytes after loading, and then after each kind of work
    peak_loading: int  # anonymous
    peak: int  # anonymous, from the start to the end
    file: int  # of the model and the libraries, which the kernel may drop and read again
    seconds: float

    @property
    def weights_copied(self) -> int:
        return sum(size for name, size in self.buffers.items() if name.endswith(" model") and "Mapped" not in name)

    @property
    def kv(self) -> int:
        return sum(size for name, size in self.buffers.items() if name.endswith(" KV"))

    @property
    def computing(self) -> int:
        return sum(size for name, size in self.buffers.items() if name.endswith(" compute"))


def measure(settings: EngineSettings, vocabulary_tokens: int) -> Measured:
    """Loads the model, reads a long prompt, answers in all slots together, and gives answers that are bound or drawn.

    Raises `EngineFailed` with what the process said.
    """
    return asyncio.run(_measure(settings, vocabulary_tokens))


async def _measure(settings: EngineSettings, vocabulary_tokens: int) -> Measured:
    started = time.monotonic()
    after = {}
    with _log_of_engine() as lines:
        worker = await Workers(COMMAND).start(settings)
        try:
            async with processes.peak_memory(worker.pid, processes.name) as peak:
                message = await worker.message()
                if not isinstance(message, wire.Ready):
                    said = message.message if isinstance(message, wire.LoadRefused) else "\n".join(lines)
                    raise EngineFailed(f"{settings.model_path} was not loaded: {said}")
                after["loading"] = processes.anonymous_bytes(worker.pid)
                peak_loading = max(peak.anonymous, after["loading"])
                for name, requests in _work(settings, vocabulary_tokens).items():
                    await _answer(worker, requests)
                    await asyncio.sleep(SAVING_SECONDS)
                    after[name] = processes.anonymous_bytes(worker.pid)
        finally:
            await worker.end()
    return Measured(
        buffers=buffer_bytes("\n".join(lines)),
        after=after,
        peak_loading=peak_loading,
        peak=max(peak.anonymous, peak.kernel_resident - peak.file, *after.values()),
        file=peak.resident - peak.anonymous,
        seconds=time.monotonic() - started,
    )


def buffer_bytes(log: str) -> dict[str, int]:
    """What llama.cpp's log says about its buffers; those of the same name are added up."""
    found: dict[str, int] = {}
    for device, purpose, mebibytes in _BUFFER.findall(log):
        name = f"{device} {purpose}"
        found[name] = found.get(name, 0) + round(float(mebibytes) * (1 << 20))
    return found


def _work(settings: EngineSettings, vocabulary_tokens: int) -> Mapping[str, Sequence[GenerationRequest]]:
    """Requests by what they are to show; those of one kind run together."""
    choose = random.Random(1)
    ids = iter(range(1000))

    def request(prompt_tokens: int, answer_tokens: int = ANSWER_TOKENS, **fields: object) -> GenerationRequest:
        last = vocabulary_tokens - vocabulary_tokens // 100
        prompt = tuple(choose.randrange(FIRST_TOKEN, last) for _ in range(prompt_tokens))
        return GenerationRequest(
            id=str(next(ids)),
            prompt=TokenPrompt(tokens=prompt),
            arrived_at=time.monotonic(),
            max_tokens=answer_tokens,
            ignore_end=True,
            **fields,  # type: ignore[arg-type]
        )

    usual = min(settings.context_tokens, PROMPT_TOKENS) - ANSWER_TOKENS
    longest = request(settings.context_tokens - ANSWER_TOKENS)
    twins = [longest, msgspec.structs.replace(longest, id=str(next(ids)))]  # the second one's cells are copied
    drawn = SamplingSettings(temperature=0.7, top_k=40, top_p=0.9, repeat_penalty=1.1, seed=1)
    bound = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
    return {
        "all slots": [request(64) for _ in range(settings.slots)],
        "bound and drawn answers": [request(64, grammar=bound), request(64, sampling=drawn, top_logprobs=5)],
        "more than can be cached": [request(usual, 1) for _ in range(settings.cache_tokens // usual + 1)],
        "a whole context, copied": twins[: settings.slots],
    }


async def _answer(worker: WorkerProcess, requests: Sequence[GenerationRequest]) -> None:
    waiting = {request.id for request in requests}
    for request in requests:
        worker.send(request)
    while waiting:
        message = await worker.message()
        if message is None:
            raise EngineFailed("The engine's process ended while it answered.")
        for request_id, event in message.events if isinstance(message, wire.Report) else ():
            if isinstance(event, Failed):
                raise EngineFailed(f"The engine refused a request: {event.message}")
            if isinstance(event, Finished):
                waiting.discard(request_id)


@contextlib.contextmanager
def _log_of_engine() -> Iterator[list[str]]:
    """What the process writes to stderr, which its parent passes on to its own log."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("appliance.serving")
    handler, propagate = Keep(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
