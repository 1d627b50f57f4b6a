"""What POST /v1/chat/completions answers: one body, or a chunk for every delta."""

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

from pydantic import BaseModel

from appliance.serving.api.logprobs import ContentLogprob, content_logprobs
from appliance.serving.api.usage import Usage, usage
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


class ChoiceLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class AnswerFunction(BaseModel):
    name: str
    arguments: str


class AnswerCall(BaseModel):
    id: str
    type: str
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """`reasoning_content` is what the model thought before it answered."""

    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class _Choice:
    """One answer as it grows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] = []
        self.finished: ChoiceFinished | None = None

    def add(self, delta: Delta) -> None:
        match delta:
            case Content():
                self.texts.append(delta.text)
                self.logprobs += delta.logprobs
            case Reasoning():
                self.thoughts.append(delta.text)
            case ToolCallStarted():
                call = {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
                self.calls.append(call)
            case ToolCallArguments():
                self.calls[delta.call]["function"]["arguments"] += delta.text
            case ChoiceFinished():
                self.finished = delta

    def message(self) -> dict[str, Any]:
        text = "".join(self.texts)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if self.calls else ""), "refusal": None}
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        return {**message, "tool_calls": self.calls} if self.calls else message


class ChatBodies:
    """The bodies of one request, which share id, time and model."""

    def __init__(
        self, answer_id: str, created: int, lease: EngineLease, *, n: int, wants_usage: bool, wants_logprobs: bool
    ) -> None:
        fingerprint = f"fp_{lease.engine.model.sha256[:12]}"
        self._head = {"id": answer_id, "created": created, "model": lease.name, "system_fingerprint": fingerprint}
        self._n = n
        self._wants_usage = wants_usage
        self._wants_logprobs = wants_logprobs

    async def whole(self, answer: AsyncIterable[Delta]) -> dict[str, Any]:
        """For `json_answer`."""
        choices = [_Choice() for _ in range(self._n)]
        async for delta in answer:
            choices[delta.index].add(delta)
        told = [self._choice(index, choice) for index, choice in enumerate(choices)]
        finished = [choice.finished for choice in choices if choice.finished is not None]
        return {**self._head, "object": "chat.completion", "choices": told, "usage": _usage(finished)}

    async def chunks(self, answer: AsyncIterable[Delta]) -> AsyncIterator[dict[str, Any]]:
        for index in range(self._n):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        finished = []
        async for delta in answer:
            if isinstance(delta, ChoiceFinished):
                finished.append(delta)
                yield self._chunk(delta.index, {}, reason=delta.reason)
            else:
                logprobs = delta.logprobs if isinstance(delta, Content) else ()
                yield self._chunk(delta.index, _delta_body(delta), logprobs=logprobs)
        if self._wants_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(finished)}

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        assert choice.finished is not None, "an answer has not finished"
        told = {"content": content_logprobs(choice.logprobs), "refusal": None}
        return {
            "index": index,
            "message": choice.message(),
            "logprobs": told if self._wants_logprobs else None,
            "finish_reason": choice.finished.reason,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], *, reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        told = {"content": list(content_logprobs(logprobs)), "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}
        body = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**body, "usage": None} if self._wants_usage else body


def _delta_body(delta: Content | Reasoning | ToolCallStarted | ToolCallArguments) -> dict[str, Any]:
    match delta:
        case Content():
            return {"content": delta.text}
        case Reasoning():
            return {"reasoning_content": delta.text}
        case ToolCallStarted():
            function = {"name": delta.name, "arguments": ""}
            return {"tool_calls": [{"index": delta.call, "id": delta.id, "type": "function", "function": function}]}
        case ToolCallArguments():
            return {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.text}}]}


def _usage(choices: Sequence[ChoiceFinished]) -> dict[str, Any]:
    counts = [choice.reasoning_tokens for choice in choices if choice.reasoning_tokens is not None]
    reasoning = sum(counts) if len(counts) == len(choices) else None
    return usage([choice.finished for choice in choices], reasoning).model_dump(exclude_none=True)
