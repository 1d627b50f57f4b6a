"""What Ollama's /api/chat and /api/generate answer: one object, or a line for every piece and a last one with the figures.

Durations are nanoseconds. A tool call is told at once, when its arguments are complete; one that the token limit cut off is
not told, and `done_reason` says "length".
"""

import datetime
import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from appliance.errors import EngineFailed
from appliance.serving.chat_turn import (
    ChoiceFinished,
    Content,
    Delta,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
)
from appliance.serving.events import Finished, TokenLogprob

NANOSECONDS = 1_000_000_000
Spoken = Literal["chat", "generate"]


class OllamaFunctionCall(BaseModel):
    name: str
    arguments: dict[str, Any]


class OllamaToolCall(BaseModel):
    id: str
    function: OllamaFunctionCall


class OllamaAnswerMessage(BaseModel):
    role: str
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaToolCall] | None = None


class OllamaLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["OllamaLogprob"] | None = None


class OllamaFigures(BaseModel):
    """Of the last object; token counts and durations are missing when only the model was loaded."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[OllamaLogprob] | None = None


class OllamaChatAnswer(OllamaFigures):
    message: OllamaAnswerMessage


class OllamaGenerateAnswer(OllamaFigures):
    response: str
    thinking: str | None = None


class OllamaBodies:
    """The objects of one answer. `load_seconds` is how long the model took to be ready."""

    def __init__(self, spoken: Spoken, model: str, arrived_at: float, load_seconds: float) -> None:
        self._spoken = spoken
        self._model = model
        self._arrived_at = arrived_at
        self._load_seconds = load_seconds

    async def lines(self, answer: AsyncIterable[Delta]) -> AsyncIterator[dict[str, Any]]:
        """A line for each piece."""
        calls = _Calls()
        async for delta in answer:
            for call in calls.add(delta):
                yield self._line("", calls=[call])
            match delta:
                case Content():
                    yield self._line(delta.text, logprobs=delta.logprobs)
                case Reasoning():
                    yield self._line("", thinking=delta.text)
                case ChoiceFinished():
                    yield self._line("", done=self._figures(delta.finished))

    async def whole(self, answer: AsyncIterable[Delta]) -> dict[str, Any]:
        texts, thoughts, logprobs = [], [], list[TokenLogprob]()
        calls, told = _Calls(), list[dict[str, Any]]()
        done: dict[str, Any] = {}
        async for delta in answer:
            told += calls.add(delta)
            match delta:
                case Content():
                    texts.append(delta.text)
                    logprobs += delta.logprobs
                case Reasoning():
                    thoughts.append(delta.text)
                case ChoiceFinished():
                    done = self._figures(delta.finished)
        return self._line("".join(texts), thinking="".join(thoughts), calls=told, logprobs=logprobs, done=done)

    def loaded(self) -> dict[str, Any]:
        """The answer to a request that only loads the model."""
        return self._line("", done={"done_reason": "load", **self._durations()})

    def _line(
        self,
        text: str,
        *,
        thinking: str = "",
        calls: Sequence[dict[str, Any]] = (),
        logprobs: Sequence[TokenLogprob] = (),
        done: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "created_at": instant(time.time()), "done": done is not None}
        thought = {"thinking": thinking} if thinking else {}
        if self._spoken == "generate":
            body |= {"response": text, **thought}
        else:
            called = {"tool_calls": list(calls)} if calls else {}
            body["message"] = {"role": "assistant", "content": text, **thought, **called}
        if logprobs:
            body["logprobs"] = [_logprob(each) for each in logprobs]
        return {**body, **(done or {})}

    def _figures(self, finished: Finished) -> dict[str, Any]:
        return {
            "done_reason": finished.reason,
            **self._durations(),
            "prompt_eval_count": finished.prompt_tokens,
            "prompt_eval_duration": int(finished.prefill_seconds * NANOSECONDS),
            "eval_count": finished.generated_tokens,
            "eval_duration": int(finished.decode_seconds * NANOSECONDS),
        }

    def _durations(self) -> dict[str, int]:
        total = time.monotonic() - self._arrived_at
        return {
            "total_duration": int(total * NANOSECONDS),
            "load_duration": int(self._load_seconds * NANOSECONDS),
        }


def instant(seconds: float) -> str:
    """A time as Ollama writes it (RFC 3339)."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


class _Calls:
    """Gathers the pieces of tool calls."""

    def __init__(self) -> None:
        self._started: ToolCallStarted | None = None
        self._arguments: list[str] = []

    def add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The call that is complete now, because another one begins or the answer has ended."""
        if isinstance(delta, ToolCallArguments):
            self._arguments.append(delta.text)
        elif isinstance(delta, ToolCallStarted | ChoiceFinished):
            is_cut = isinstance(delta, ChoiceFinished) and delta.finished.reason != "stop"
            arguments = self._parsed(is_cut)
            if self._started is not None and arguments is not None:
                yield {"id": self._started.id, "function": {"name": self._started.name, "arguments": arguments}}
            self._started = delta if isinstance(delta, ToolCallStarted) else None
            self._arguments = []

    def _parsed(self, is_cut: bool) -> Any:
        if self._started is None:
            return None
        try:
            return json.loads("".join(self._arguments))
        except ValueError:
            if is_cut:
                return None
            raise EngineFailed(f"The model called {self._started.name} with arguments that are not JSON.") from None


def _logprob(told: TokenLogprob) -> dict[str, Any]:
    top = [_token(piece, logprob) for piece, logprob in told.top]
    return {**_token(told.piece, told.logprob), **({"top_logprobs": top} if top else {})}


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}
