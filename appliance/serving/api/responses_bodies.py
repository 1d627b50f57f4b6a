"""What POST /v1/responses answers: a response, or the typed events that build it. The response is the last event's."""

import secrets
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from appliance.errors import ApplianceError
from appliance.serving import sse
from appliance.serving.api.errors import appliance_error_body
from appliance.serving.api.logprobs import content_logprobs
from appliance.serving.api.responses_schema import ResponsesRequest
from appliance.serving.api.usage import usage
from appliance.serving.chat_turn import (
    ChoiceFinished,
    Content,
    Delta,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
)
from appliance.serving.engine import EngineLease
from appliance.serving.events import TokenLogprob


class Incomplete(BaseModel):
    reason: str


class ResponseFailure(BaseModel):
    code: str
    message: str


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ModelResponse(BaseModel):
    """OpenAI's response; `output` has items of the types reasoning, message and function_call."""

    id: str
    object: str
    created_at: int
    status: str
    error: ResponseFailure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: str
    usage: ResponseUsage | None


class _Item:
    """An item of the output as it grows: its events, and what it is in the end."""

    def __init__(self, place: int, kind: str, **fields: Any) -> None:
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        self.kind = kind
        self.fields = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, **fields}
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self._place = {"item_id": self.fields["id"], "output_index": place}
        self._place_of_part = {**self._place, "content_index": 0}

    def begin(self) -> Iterator[dict[str, Any]]:
        empty: dict[str, Any] = {"arguments": ""} if self.kind == "function_call" else {"content": []}
        item = {**self.fields, **empty, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._place["output_index"], "item": item}
        if self.kind != "function_call":
            yield {"type": "response.content_part.added", **self._place_of_part, "part": self._part()}

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        self.texts.append(text)
        if self.kind == "function_call":
            return {"type": "response.function_call_arguments.delta", **self._place, "delta": text}
        if self.kind == "reasoning":
            return {"type": "response.reasoning_text.delta", **self._place_of_part, "delta": text}
        told = list(content_logprobs(logprobs))
        self.logprobs += told
        return {"type": "response.output_text.delta", **self._place_of_part, "delta": text, "logprobs": told}

    def end(self, status: str) -> Iterator[dict[str, Any]]:
        text = "".join(self.texts)
        if self.kind == "function_call":
            called = {"name": self.fields["name"], "arguments": text}
            yield {"type": "response.function_call_arguments.done", **self._place, **called}
        else:
            is_reasoning = self.kind == "reasoning"
            done: dict[str, Any] = {"text": text} if is_reasoning else {"text": text, "logprobs": self.logprobs}
            name = "response.reasoning_text.done" if is_reasoning else "response.output_text.done"
            yield {"type": name, **self._place_of_part, **done}
            yield {"type": "response.content_part.done", **self._place_of_part, "part": self._part()}
        item = self.whole(status)
        yield {"type": "response.output_item.done", "output_index": self._place["output_index"], "item": item}

    def whole(self, status: str) -> dict[str, Any]:
        said = {"arguments": "".join(self.texts)} if self.kind == "function_call" else {"content": [self._part()]}
        return {**self.fields, **said, "status": status}

    def _part(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}


class ResponseBodies:
    """The bodies of one request. `told` and `whole` may each be used once, and only one of them."""

    def __init__(self, response_id: str, created_at: int, lease: EngineLease, asked: ResponsesRequest) -> None:
        self._response = _beginning(response_id, created_at, lease, asked)
        self._output: list[dict[str, Any]] = []
        self._item: _Item | None = None

    async def whole(self, answer: AsyncIterable[Delta]) -> dict[str, Any]:
        response: dict[str, Any] = {}
        async for event in self._events(answer):
            response = event.get("response", response)
        return response

    async def told(self, answer: AsyncIterable[Delta]) -> AsyncIterator[bytes]:
        """Server-sent events. Once the status is sent, an error can only be events of its own."""
        number = 0
        try:
            async for event in self._events(answer):
                yield _encoded({**event, "sequence_number": number})
                number += 1
        except ApplianceError as error:
            said = appliance_error_body(error)["error"]
            fields = {"code": said["code"], "message": said["message"], "param": said["param"]}
            yield _encoded({"type": "error", **fields, "sequence_number": number})
            failure = {"code": "server_error", "message": said["message"]}
            response = {**self._response, "output": self._output, "status": "failed", "error": failure}
            yield _encoded({"type": "response.failed", "response": response, "sequence_number": number + 1})

    async def _events(self, answer: AsyncIterable[Delta]) -> AsyncIterator[dict[str, Any]]:
        for kind in ("response.created", "response.in_progress"):
            yield {"type": kind, "response": {**self._response, "output": []}}
        async for delta in answer:
            for event in self._finished(delta) if isinstance(delta, ChoiceFinished) else self._grown(delta):
                yield event

    def _grown(self, delta: Content | Reasoning | ToolCallStarted | ToolCallArguments) -> Iterator[dict[str, Any]]:
        match delta:
            case ToolCallStarted():
                yield from self._begun("function_call", call_id=delta.id, name=delta.name)
            case ToolCallArguments():
                assert self._item is not None, "arguments before their call"
                yield self._item.add(delta.text)
            case Content() | Reasoning():
                kind = "message" if isinstance(delta, Content) else "reasoning"
                if self._item is None or self._item.kind != kind:
                    fields: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
                    yield from self._begun(kind, **fields)
                assert self._item is not None
                yield self._item.add(delta.text, delta.logprobs if isinstance(delta, Content) else ())

    def _finished(self, delta: ChoiceFinished) -> Iterator[dict[str, Any]]:
        if self._item is None:
            yield from self._begun("message", role="assistant")
        is_cut = delta.reason == "length"
        yield from self._ended("incomplete" if is_cut else "completed")
        response = {
            **self._response,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output,
            "usage": _usage(delta),
        }
        yield {"type": "response.incomplete" if is_cut else "response.completed", "response": response}

    def _begun(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        yield from self._ended("completed")
        self._item = _Item(len(self._output), kind, **fields)
        yield from self._item.begin()

    def _ended(self, status: str) -> Iterator[dict[str, Any]]:
        if self._item is not None:
            yield from self._item.end(status)
            self._output.append(self._item.whole(status))
            self._item = None


def _beginning(response_id: str, created_at: int, lease: EngineLease, asked: ResponsesRequest) -> dict[str, Any]:
    said = asked.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": lease.name,
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": asked.reasoning.effort, "summary": None},
        "store": False,
        "temperature": asked.temperature,
        "text": said["text"] if asked.text.format else {"format": {"type": "text"}},
        "tool_choice": said["tool_choice"],
        "tools": said["tools"],
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _usage(choice: ChoiceFinished) -> dict[str, Any]:
    counts = usage([choice.finished])
    details = counts.prompt_tokens_details
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens or 0},
        "total_tokens": counts.total_tokens,
    }


def _encoded(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + sse.encode(event)
