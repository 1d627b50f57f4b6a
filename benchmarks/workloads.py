"""What the servers are put through: one function for each row, on a server that is running or that it starts itself.

A function measures once and returns figures; rounds, order and statistics are not its business. Prompts are named by row and
round, so every server gets the same ones, and none of them twice unless the row is about that.
"""

import asyncio
import dataclasses
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from appliance.errors import ServerError
from appliance.serving import gguf_file
from appliance.serving.memory_prediction import kv_cell_bytes
from benchmarks import processes
from benchmarks.client import Answer, ask, exchange, read
from benchmarks.figures import Figure, decode_rate, generated_tokens
from benchmarks.prompts import Prompts
from benchmarks.servers import Launch, Running, Server, ready, running, started

PATIENCE_SECONDS = 300.0
DECODE_TOKENS: Mapping[int, int] = {1: 128, 4: 64, 8: 48}  # answer length by the number of streams: some seconds each
SHORT_TOKENS = 24
COLD_TOKENS, COLD_PROMPTS = 500, 1
SYSTEM_TOKENS, VISITORS = 1000, 2
# One slot and a cache as large: what pushes a prefix out of both must be read, which takes the most time of all.
PREFIX_SLOTS, PREFIX_CONTEXT_TOKENS, PREFIX_CACHE_TOKENS = 1, 1152, 1152
OTHER_TOKENS = 1120  # where one of them is, the prefix has no place
IDLE_SECONDS = 1.0  # between visitors, as in life: enough to write a prefix to disk
LONG_TOKENS, HEAD_START_SECONDS = 2000, 0.3
MEMORY_SLOTS = 2  # as `appliance serve` has by default
SLOTS, CONTEXT_TOKENS, CACHE_TOKENS = 8, 2304, 4096  # where nothing else is said

SCHEMA_TOKENS = 400  # more than such an answer has
# Every field has a bounded length, so that answers of noise end too, and are about as long whoever wrote them.
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "minLength": 12, "maxLength": 24},
        "number": {"type": "integer", "minimum": 1, "maximum": 999},
        "city": {"type": "string", "enum": ["Amsterdam", "Rotterdam", "Utrecht", "Den Haag"]},
        "open": {"type": "boolean"},
        "languages": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"enum": ["nl", "en", "ar", "uk"]}},
        "remark": {"type": "string", "minLength": 40, "maxLength": 80},
    },
    "required": ["street", "number", "city", "open", "languages", "remark"],
    "additionalProperties": False,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One server's turn in one round."""

    server: Server
    launch: Launch
    prompts: Prompts
    round: int
    is_quick: bool = False

    def failed(self, row: str, error: ServerError) -> Figure:
        return Figure(row=row, server=self.server.name, round=self.round, problem=str(error))

    def figure(self, row: str, *values: float, **details: Any) -> Figure:
        return Figure(row=row, server=self.server.name, round=self.round, values=values, details=details)

    def with_launch(self, **changes: Any) -> "Trial":
        return dataclasses.replace(self, launch=dataclasses.replace(self.launch, **changes))


def launch(model: Path, folder: Path, threads: int, known: Prompts) -> Launch:
    """How servers are started where a row says nothing else."""
    header = gguf_file.check(model)
    cell_bytes = sum(kv_cell_bytes(header, layer, "f16") for layer in range(header.block_count))
    return Launch(
        model=model.absolute(),
        folder=folder,
        threads=threads,
        slots=SLOTS,
        context_tokens=CONTEXT_TOKENS,
        cache_tokens=CACHE_TOKENS,
        cell_bytes=cell_bytes,
        end_tokens=known.end_tokens,
    )


async def warm_up(trial: Trial, run: Running) -> None:
    """The first answer after a start touches memory that no later one has to."""
    await answer_of(run, trial.prompts.user(f"warm-up {trial.round}", SHORT_TOKENS), 4)


async def decode(trial: Trial, run: Running, streams: int) -> Sequence[Figure]:
    """Tokens per second of so many streams, greedy, and what they cost in CPU time."""
    tokens = DECODE_TOKENS[streams] // (4 if trial.is_quick else 1)
    label = f"decode {streams} {trial.round}"
    requests = [run.chat(trial.prompts.user(f"{label} {i}", SHORT_TOKENS), tokens) for i in range(streams)]
    steps = await _step_seconds(run)
    client, server, total = _own_cpu_seconds(), run.server_cpu_seconds(), run.total_cpu_seconds()
    exchanges = await asyncio.gather(*(exchange(request, patience_seconds=PATIENCE_SECONDS) for request in requests))
    client, server, total = (
        _own_cpu_seconds() - client,
        run.server_cpu_seconds() - server,
        run.total_cpu_seconds() - total,
    )
    steps = await _step_seconds(run) - steps
    answers = [read(request, each) for request, each in zip(requests, exchanges, strict=True)]
    run.check(answers)
    rate, over = decode_rate(answers, tokens)
    generated = sum(generated_tokens(answer, tokens) for answer in answers)
    details = {
        "taken over": over,
        "tokens": generated,
        "coalesced events": sum(answer.coalesced for answer in answers),
        "texts": [answer.text[:40] for answer in answers[:1]],
    }
    row = f"decode-{streams}"
    figures = [
        trial.figure(row, rate, **details),
        trial.figure(f"cpu-total-{streams}", total / generated * 1000),
        trial.figure(f"cpu-client-{streams}", client / generated * 1000),
    ]
    if run.server.engine_word:
        figures.append(trial.figure(f"cpu-http-{streams}", server / generated * 1000))
    if streams == 1 and run.server.engine_word:
        figures.append(trial.figure("own-cost", _outside_steps_ms(answers[0], generated, steps)))
    return figures


async def cold(trial: Trial, run: Running) -> Sequence[Figure]:
    """Time to first token of prompts that were never seen."""
    seconds = []
    for i in range(COLD_PROMPTS):
        answer = await answer_of(run, trial.prompts.user(f"cold {trial.round} {i}", COLD_TOKENS), 2)
        seconds.append(first_token_seconds(answer))
    return [trial.figure("ttft-cold", *seconds, prompt_tokens=answer.prompt_tokens)]


async def beside(trial: Trial, run: Running) -> Sequence[Figure]:
    """Time to first token of a short request that comes while a long prompt is being read."""
    long = run.chat(trial.prompts.user(f"long {trial.round}", LONG_TOKENS), 4)
    reading = asyncio.create_task(ask(long, patience_seconds=PATIENCE_SECONDS))
    details: dict[str, Any] = {}
    try:
        await asyncio.sleep(HEAD_START_SECONDS)
        short = await answer_of(run, trial.prompts.user(f"beside {trial.round}", SHORT_TOKENS), 4)
        # How long the long one takes beside it; later rounds have better use for the time, where it is still being read.
        if trial.round == 1 or reading.done():
            long_answer = await reading
            run.check([long_answer])
            details["the long prompt's own seconds"] = first_token_seconds(long_answer)
            details["came while it was read"] = short.sent_at < long_answer.text_times[0]
    finally:
        reading.cancel()
    return [trial.figure("ttft-beside-long", first_token_seconds(short), **details)]


async def schema(trial: Trial, run: Running) -> Sequence[Figure]:
    """Tokens per second of an answer that is bound to a JSON schema, from the first to the last."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    messages = trial.prompts.user(f"schema {trial.round}", SHORT_TOKENS)
    request = run.chat(messages, SCHEMA_TOKENS, response_format=form, ignore_eos=None, logit_bias=None)
    answer = await ask(request, patience_seconds=PATIENCE_SECONDS)
    run.check([answer])
    tokens = generated_tokens(answer, SCHEMA_TOKENS)
    seconds = answer.text_times[-1] - answer.text_times[0]
    return [trial.figure("schema", (tokens - 1) / seconds, seconds=seconds, tokens=tokens, text=answer.text)]


async def prefix(trial: Trial) -> Sequence[Figure]:
    """Time to first token behind a system prompt of 1,000 tokens that two visitors brought before.

    Held: nothing else came between. Pushed out: conversations came that fill slots and cache. After a
    restart: the process is a new one.
    """
    trial = trial.with_launch(slots=PREFIX_SLOTS, context_tokens=PREFIX_CONTEXT_TOKENS, cache_tokens=PREFIX_CACHE_TOKENS)
    capacity = trial.launch.total_tokens + trial.launch.cache_tokens
    async with running(trial.server, trial.launch) as run:
        await warm_up(trial, run)
        for i in range(2):
            first = await _visit(trial, run, f"first {i}")
            await asyncio.sleep(IDLE_SECONDS)
        held = [first_token_seconds(await _visit(trial, run, f"held {i}")) for i in range(VISITORS)]
        for i in range(capacity // OTHER_TOKENS):
            await answer_of(run, trial.prompts.user(f"other {trial.round} {i}", OTHER_TOKENS), 2)
        await asyncio.sleep(IDLE_SECONDS)
        pushed = await _visit(trial, run, "pushed")
    async with running(trial.server, trial.launch) as run:
        await warm_up(trial, run)
        restarted = await _visit(trial, run, "restarted")
    shared = {"prompt_tokens": first.prompt_tokens, "cache_mib": trial.launch.cache_mib, "tokens held at most": capacity}
    return [
        trial.figure("ttft-prefix-held", *held, **shared),
        trial.figure("ttft-prefix-pushed", first_token_seconds(pushed), **shared),
        trial.figure("ttft-prefix-restart", first_token_seconds(restarted), **shared),
    ]


async def memory(trial: Trial) -> Sequence[Figure]:
    """The peak of all processes from start to the end of a full prompt and of answers in every slot; no host caches."""
    trial = trial.with_launch(slots=MEMORY_SLOTS, cache_tokens=0)
    tokens = trial.launch.context_tokens - 256
    with started(trial.server, trial.launch) as run:
        async with processes.peak_memory(run.process.pid, run.role) as peak:
            await ready(run)
            await _fill(trial, run, tokens)
    details = {"at the end, by process": peak.by_process, "samples": peak.samples}
    return [
        trial.figure("memory-anonymous", max(peak.anonymous, peak.exact_anonymous), **details),
        trial.figure("memory-resident", peak.resident, kernel_peaks=peak.kernel_resident),
    ]


async def _fill(trial: Trial, run: Running, prompt_tokens: int) -> None:
    """A prompt of so many tokens, then an answer in every slot."""
    await answer_of(run, trial.prompts.user(f"memory {trial.round}", prompt_tokens), 4)
    requests = [
        run.chat(trial.prompts.user(f"memory {trial.round} {i}", SHORT_TOKENS), 16) for i in range(trial.launch.slots)
    ]
    run.check(await asyncio.gather(*(ask(request, patience_seconds=PATIENCE_SECONDS) for request in requests)))


async def _visit(trial: Trial, run: Running, label: str) -> Answer:
    """One visitor behind the shared system prompt of this round."""
    messages = trial.prompts.with_system(
        f"system {trial.round}", SYSTEM_TOKENS, f"visitor {trial.round} {label}", SHORT_TOKENS
    )
    return await answer_of(run, messages, 8)


async def answer_of(run: Running, messages: Sequence[Mapping[str, str]], max_tokens: int, **fields: Any) -> Answer:
    """Asks and reads to the end; raises `ServerError` when the answer is not whole or has no text."""
    answer = await ask(run.chat(messages, max_tokens, **fields), patience_seconds=PATIENCE_SECONDS)
    run.check([answer])
    first_token_seconds(answer)
    return answer


def first_token_seconds(answer: Answer) -> float:
    """Raises `ServerError` for an answer without text."""
    if answer.first_token_seconds is None:
        raise ServerError("An answer had no text, so its first token was not seen.")
    return answer.first_token_seconds


async def _step_seconds(run: Running) -> float:
    """Time in decode calls so far, by the server's own metrics; 0 for servers that do not tell."""
    if not run.server.engine_word:
        return 0.0
    metrics = await ask(run.get("/metrics"), patience_seconds=PATIENCE_SECONDS)
    families = text_string_to_metric_families(metrics.text)
    samples = [sample for family in families for sample in family.samples if sample.name == "appliance_step_seconds_total"]
    return sum(sample.value for sample in samples if sample.labels["kind"] == "decode")


def _outside_steps_ms(answer: Answer, tokens: int, step_seconds: float) -> float:
    """What a token costs beside its decode call, by the clock of the client."""
    return (answer.text_times[-1] - answer.text_times[0] - step_seconds) / (tokens - 1) * 1000


def _own_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
