"""Ollama's API for those who talk it: /api/chat and /api/generate. Nothing here pulls, creates or deletes models."""

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from appliance.serving import chat_turn
from appliance.serving.api import ollama_models, streaming
from appliance.serving.api.context import ApiContext
from appliance.serving.api.deadline import deadline_at
from appliance.serving.api.errors import OLLAMA_REFUSALS
from appliance.serving.api.ollama_bodies import OllamaBodies, OllamaChatAnswer, OllamaGenerateAnswer, Spoken
from appliance.serving.api.ollama_schema import OllamaChatRequest, OllamaGenerateRequest
from appliance.serving.chat_turn import ChatTurn, ChoiceFinished, Content, Delta
from appliance.serving.engine import EngineLease, Generation
from appliance.serving.events import Finished
from appliance.serving.requests import GenerationRequest, TextPrompt


class Answer(Protocol):
    """What is iterated over, and can be broken off."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None: ...


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=OLLAMA_REFUSALS)
    routes.include_router(ollama_models.router(context))

    @routes.post("/api/chat", response_model=OllamaChatAnswer, responses=streaming.MAY_BE_LINES)
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            visit = await _Visit.begin(context, request, held, body.model)
            if not body.messages:
                return JSONResponse(visit.bodies("chat").loaded())
            messages = [message.plain() for message in body.messages]
            turn = body.turn(visit.lease.engine.model, messages, body.tools)
            return await visit.respond("chat", await visit.start(turn), is_streamed=body.stream)

    @routes.post("/api/generate", response_model=OllamaGenerateAnswer, responses=streaming.MAY_BE_LINES)
    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            visit = await _Visit.begin(context, request, held, body.model)
            if not body.prompt:
                return JSONResponse(visit.bodies("generate").loaded())
            if body.raw:
                return await visit.respond("generate", await visit.start_raw(body), is_streamed=body.stream)
            turn = body.turn(visit.lease.engine.model, body.messages)
            return await visit.respond("generate", await visit.start(turn), is_streamed=body.stream)

    return routes


class _Visit:
    """One request with the model it has leased."""

    def __init__(
        self, context: ApiContext, held: contextlib.AsyncExitStack, lease: EngineLease, tenant: str, arrived_at: float
    ) -> None:
        self.lease = lease
        self._context = context
        self._held = held
        self._tenant = tenant
        self._arrived_at = arrived_at
        self._load_seconds = time.monotonic() - arrived_at
        self._id = f"ollama-{secrets.token_hex(12)}"

    @classmethod
    async def begin(cls, context: ApiContext, request: Request, held: contextlib.AsyncExitStack, model: str) -> "_Visit":
        """Leases the model for as long as `held` is open."""
        arrived_at = time.monotonic()
        name = ollama_models.known_name(context.models, model)
        lease = await held.enter_async_context(context.models.lease(name))
        return cls(context, held, lease, context.tenant(request), arrived_at)

    async def start(self, turn: ChatTurn) -> Answer:
        return await chat_turn.start(
            self.lease,
            turn,
            serve=self._context.serve,
            request_id=self._id,
            arrived_at=self._arrived_at,
            tenant=self._tenant,
        )

    async def start_raw(self, body: OllamaGenerateRequest) -> Answer:
        serve = self._context.serve
        request = GenerationRequest(
            id=self._id,
            prompt=TextPrompt(text=body.prompt),
            arrived_at=self._arrived_at,
            max_tokens=body.options.answer_tokens(self.lease.engine.model) or serve.max_tokens,
            deadline_at=deadline_at(serve, self._arrived_at),
            stop=body.options.stops,
            sampling=body.options.sampling(),
            grammar=body.grammar,
            top_logprobs=body.wanted_logprobs,
            adapter=self.lease.adapter,
            tenant=self._tenant,
        )
        return _RawAnswer(await self.lease.engine.submit(request))

    async def respond(self, spoken: Spoken, answer: Answer, *, is_streamed: bool) -> Response:
        self._held.callback(answer.cancel)
        bodies = self.bodies(spoken)
        if not is_streamed:
            return JSONResponse(await bodies.whole(answer))
        return streaming.HoldingStream(streaming.lines(bodies.lines(answer)), self._held.pop_all(), streaming.LINES)

    def bodies(self, spoken: Spoken) -> OllamaBodies:
        return OllamaBodies(spoken, self.lease.name, self._arrived_at, self._load_seconds)


class _RawAnswer:
    """A continued text, told in the words of a chat's answer."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for event in self._generation:
            if isinstance(event, Finished):
                yield ChoiceFinished(event.index, event.reason, event)
            else:
                yield Content(event.index, event.text, event.logprobs)

    def cancel(self) -> None:
        self._generation.cancel()
