"""One turn of a chat, whatever API asked for it: described, started on an engine, answered as a stream of deltas.

Takes the engine's text apart into reasoning, content and tool calls. Knows nothing of HTTP.
"""

import dataclasses
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal

from appliance.errors import RequestError
from appliance.recipe import Serve
from appliance.serving import answer_grammar
from appliance.serving.deadline import deadline_at
from appliance.serving.engine import Engine, EngineLease, Generation
from appliance.serving.events import Accepted, Finished, TextPiece, TokenLogprob
from appliance.serving.requests import ChatPrompt, Document, GenerationRequest, Grammar, SamplingSettings
from appliance.text import tool_calls
from appliance.text.reasoning import Markers, ReasoningSplitter, markers_of, opening_of
from appliance.text.tool_call_parser import CallArguments, CallStarted, Piece, PlainText, ToolCallParser

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ChoiceReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """`messages` and `tools` as OpenAI's chat API spells them, content as text.

    `named_tool` with `tool_choice` "required" leaves no choice. `reasoning_effort` becomes whatever the template knows:
    its `reasoning_effort`, or `enable_thinking`; a template that knows neither is a `RequestError`. `max_tokens` and
    `deadline_seconds` default to the server's settings.
    """

    messages: tuple[dict[str, Any], ...]
    documents: tuple[Document, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    named_tool: str | None = None
    parallel_tool_calls: bool = True
    response_grammar: Grammar | None = None
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reasoning_effort: Effort | None = None
    sampling: SamplingSettings = SamplingSettings()
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    n: int = 1
    top_logprobs: int | None = None
    deadline_seconds: float | None = None
    adapter_scale: float = 1.0
    ignore_end: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer. Without text only when there are log probabilities to tell."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """The model calls `name`; `call` counts the calls of this answer from 0."""

    index: int
    call: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    call: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """The end of one answer; `reasoning_tokens` is None when it is not known."""

    index: int
    reason: ChoiceReason
    finished: Finished
    reasoning_tokens: int | None = None


Delta = Content | Reasoning | ToolCallStarted | ToolCallArguments | ChoiceFinished


class ChatAnswer:
    """The deltas of every answer, until each has finished. Iterated once."""

    def __init__(self, engine: Engine, generation: Generation, turn: ChatTurn) -> None:
        self.model = engine.model
        self._engine = engine
        self._generation = generation
        opening = generation.accepted.opening
        self._choices = [_Choice(index, self.model.chat_template, opening, turn) for index in range(turn.n)]

    @property
    def accepted(self) -> Accepted:
        return self._generation.accepted

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for event in self._generation:
            choice = self._choices[event.index]
            if isinstance(event, TextPiece):
                for delta in choice.push(event.text, event.logprobs):
                    yield delta
                continue
            for delta in choice.finish():
                yield delta
            reason = "tool_calls" if choice.calls and event.reason == "stop" else event.reason
            yield ChoiceFinished(event.index, reason, event, await self._count(choice.thoughts))

    def cancel(self) -> None:
        """Frees the request's place as soon as the chunk in flight allows; harmless after the end."""
        self._generation.cancel()

    async def _count(self, thoughts: Sequence[str]) -> int | None:
        """Tokens of the reasoning. Tokenised again, for pieces of text do not say how many tokens they were."""
        if not thoughts:
            return 0
        try:
            return len((await self._engine.tokenize("".join(thoughts))).tokens)
        except RequestError:
            return None  # the answer is complete, whatever has become of the engine


async def start(
    lease: EngineLease, turn: ChatTurn, *, serve: Serve, request_id: str, arrived_at: float, tenant: str
) -> ChatAnswer:
    """Returns once the engine has accepted the turn; raises what `Engine.submit` raises."""
    turn = _settled(turn, lease.engine.model.chat_template)
    prompt = ChatPrompt(
        messages=turn.messages,
        tools=turn.tools,
        documents=turn.documents,
        template_variables=dict(turn.template_variables),
    )
    request = GenerationRequest(
        id=request_id,
        prompt=prompt,
        arrived_at=arrived_at,
        max_tokens=turn.max_tokens or serve.max_tokens,
        deadline_at=deadline_at(serve, arrived_at, turn.deadline_seconds),
        n=turn.n,
        stop=turn.stop,
        sampling=turn.sampling,
        grammar=await _grammar(lease.engine, turn, prompt),
        top_logprobs=turn.top_logprobs,
        adapter=lease.adapter,
        adapter_scale=lease.scaled(turn.adapter_scale),
        tenant=tenant,
        ignore_end=turn.ignore_end,
    )
    return ChatAnswer(lease.engine, await lease.engine.submit(request), turn)


def _settled(turn: ChatTurn, template: str) -> ChatTurn:
    """Without tools that may not be called, and with the effort as a template variable."""
    if turn.tool_choice == "none":
        turn = dataclasses.replace(turn, tools=())
    if turn.tool_choice == "required" and not turn.tools:
        raise RequestError("tool_choice asks for a call, but tools is empty; name the tools.", param="tool_choice")
    if turn.named_tool is not None and not _callable(turn):
        raise RequestError("tool_choice names a function that is not among the tools.", param="tool_choice")
    if turn.reasoning_effort is None:
        return turn
    switches = {
        "enable_thinking": turn.reasoning_effort not in ("none", "minimal"),
        "reasoning_effort": turn.reasoning_effort,
    }
    known = {name: value for name, value in switches.items() if re.search(rf"\b{name}\b", template)}
    if not known and turn.reasoning_effort == "none" and not _can_think(template):
        return turn
    if not known:
        raise RequestError(
            "This model's chat template has no switch for reasoning; leave reasoning_effort out.", param="reasoning_effort"
        )
    return dataclasses.replace(turn, template_variables={**known, **turn.template_variables})


def _can_think(template: str) -> bool:
    markers = markers_of(template)
    return markers.opening in template or markers.closing in template


def _callable(turn: ChatTurn) -> Sequence[Mapping[str, Any]]:
    """The tools that this answer may call."""
    names = (turn.named_tool,)
    return [tool for tool in turn.tools if turn.named_tool is None or tool["function"]["name"] in names]


async def _grammar(engine: Engine, turn: ChatTurn, prompt: ChatPrompt) -> Grammar | None:
    template = engine.model.chat_template
    form, is_parallel = tool_calls.detect(template), turn.parallel_tool_calls
    if turn.tool_choice == "required":
        bound = answer_grammar.required_calls(form, _callable(turn), is_parallel=is_parallel and turn.named_tool is None)
    elif turn.response_grammar is not None and turn.tools:
        bound = answer_grammar.calls_or(turn.response_grammar, form, turn.tools, is_parallel=is_parallel)
    elif turn.response_grammar is not None:
        bound = answer_grammar.reply(turn.response_grammar)
    elif turn.tools:
        return answer_grammar.lazy_calls(form, turn.tools, is_parallel=is_parallel)
    else:
        return None
    markers = markers_of(template)
    if markers.closing in template and await _is_thinking(engine, prompt, markers):
        return answer_grammar.after_thinking(bound, markers)
    return bound


async def _is_thinking(engine: Engine, prompt: ChatPrompt, markers: Markers) -> bool:
    """Whether the answer begins with thinking: the prompt has opened it, or the model itself will, unless switched off."""
    opening = opening_of(await engine.apply_template(prompt), markers)
    if opening:
        return markers.closing not in opening
    is_switchable = "enable_thinking" in engine.model.chat_template
    return is_switchable and prompt.template_variables.get("enable_thinking", True) is not False


class _Choice:
    """One answer, taken apart as it grows."""

    def __init__(self, index: int, template: str, opening: str, turn: ChatTurn) -> None:
        self.thoughts: list[str] = []
        self._index = index
        self._reasoning = ReasoningSplitter(markers_of(template), opening)
        self._calls: ToolCallParser | None = None
        if turn.tools:
            is_single = not turn.parallel_tool_calls or turn.named_tool is not None
            self._calls = ToolCallParser(tool_calls.detect(template), turn.tools, is_single=is_single)
        self._logprobs: list[TokenLogprob] = []  # of text that is held back

    @property
    def calls(self) -> int:
        return 0 if self._calls is None else self._calls.calls

    def push(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[Delta]:
        self._logprobs += logprobs
        reasoning, content = self._reasoning.push(text)
        yield from self._thought(reasoning)
        yield from self._told([PlainText(content)] if self._calls is None else self._calls.push(content))
        if self._reasoning.is_thinking or (self._calls is not None and self._calls.is_in_call):
            self._logprobs.clear()  # they are told of the answer's text only

    def finish(self) -> Iterator[Delta]:
        reasoning, content = self._reasoning.finish()
        yield from self._thought(reasoning)
        pieces: list[Piece] = [PlainText(content)]
        if self._calls is not None:
            pieces = [*self._calls.push(content), *self._calls.finish()]
        yield from self._told(pieces)
        if self._logprobs:
            yield Content(self._index, "", self._taken_logprobs())

    def _thought(self, text: str) -> Iterator[Delta]:
        if text:
            self.thoughts.append(text)
            yield Reasoning(self._index, text)

    def _told(self, pieces: Sequence[Piece]) -> Iterator[Delta]:
        for piece in pieces:
            match piece:
                case PlainText(text) if text:
                    yield Content(self._index, text, self._taken_logprobs())
                case CallStarted(call, name):
                    self._logprobs.clear()
                    yield ToolCallStarted(self._index, call, f"call_{secrets.token_hex(12)}", name)
                case CallArguments(call, text):
                    yield ToolCallArguments(self._index, call, text)

    def _taken_logprobs(self) -> tuple[TokenLogprob, ...]:
        taken = tuple(self._logprobs)
        self._logprobs.clear()
        return taken
