"""Opens tiny models, and decodes one answer the way the scheduler does, one sequence at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appliance.serving.decoder import Adapter, CompiledGrammar, Feed, Sampled
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.llama import Context, Model
from appliance.serving.requests import SamplingSettings
from tests import tiny_gguf

PROMPT = list(b"What do dogs eat?")
ALL = len(tiny_gguf.vocabulary())
GREEDY = SamplingSettings()

Drafter = Callable[[Sequence[int]], Sequence[int]]


def engine_settings(path: Path, **changes: Any) -> EngineSettings:
    facts: dict[str, Any] = {
        "name": "tiny",
        "model_path": str(path),
        "sha256": "",
        "made_at": 0,
        "kind": "chat",
        "slots": 3,
        "context_tokens": 256,
        "threads_decode": 1,
        "threads_prefill": 2,
        "kv_type": "f16",
        "is_mapped": True,
        "is_repacked": False,
        "queue_requests": 1,
        "queue_tokens": 1,
    }
    return EngineSettings(**{**facts, **changes})


def open_model(path: Path) -> Model:
    return Model(path, is_mapped=True, is_repacked=False)


def open_context(path: Path, **changes: Any) -> Context:
    return Context(open_model(path), engine_settings(path, **changes))


def generate(
    context: Context,
    sampling: SamplingSettings = GREEDY,
    *,
    grammar: CompiledGrammar | None = None,
    prompt: Sequence[int] = PROMPT,
    tokens: int = 24,
    slot: int = 0,
    drafts: Drafter | None = None,
    top_logprobs: int | None = None,
) -> list[Sampled]:
    """Until an end token, a failure or `tokens`; forced tokens are `Sampled` without anything else."""
    context.start(slot, sampling, grammar, top_logprobs)
    told: list[Sampled] = []
    pending, position = list(prompt), 0
    while len(told) < tokens:
        guesses = list(drafts([each.token for each in told])) if drafts else []
        feed = Feed(slot, [*pending, *guesses], position, is_sampled=True, drafted=len(guesses))
        found = decode(context, [feed])[slot]
        position += len(pending) + len(found) - 1
        forced = context.forced(slot)
        told += [*found, *map(Sampled, forced)]
        pending = [found[-1].token, *forced]
        if found[-1].failure or any(context.is_end(each.token) for each in told):
            break
    context.release(slot)
    return told


def decode(context: Context, feeds: Sequence[Feed], adapter: Adapter | None = None) -> dict[int, Sequence[Sampled]]:
    found = context.decode(feeds, adapter)
    assert found is not None
    return dict(found)


def logprobs(context: Context, tokens: Sequence[int], *, slot: int = 0, adapter: Adapter | None = None) -> np.ndarray:
    """Log probabilities of every token of the vocabulary after `tokens`; the slot is released."""
    context.start(slot, GREEDY, None, ALL)
    sampled = decode(context, [Feed(slot, tokens, 0, is_sampled=True)], adapter)[slot][0]
    context.release(slot)
    return in_order(sampled)


def in_order(sampled: Sampled) -> np.ndarray:
    row = np.empty(ALL)
    for token, logprob in sampled.top:
        row[token] = logprob
    return row


def text_of(context: Context, told: Sequence[Sampled]) -> str:
    return b"".join(context.piece(each.token) for each in told).decode(errors="replace")
