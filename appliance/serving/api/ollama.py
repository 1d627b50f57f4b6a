"""Ollama's API for those who talk it: /api/chat and /api/generate. Nothing here pulls, creates or deletes models."""

import contextlib
from collections.abc import AsyncIterable, AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from appliance.serving.api import ollama_models, streaming
from appliance.serving.api.context import ApiContext
from appliance.serving.api.errors import OLLAMA_REFUSALS
from appliance.serving.api.ollama_bodies import OllamaBodies, OllamaChatAnswer, OllamaGenerateAnswer, Spoken
from appliance.serving.api.ollama_schema import OllamaChatRequest, OllamaGenerateRequest
from appliance.serving.api.visit import Visit
from appliance.serving.chat_turn import ChoiceFinished, Content, Delta
from appliance.serving.deadline import deadline_at
from appliance.serving.engine import Generation
from appliance.serving.events import Finished
from appliance.serving.requests import GenerationRequest, TextPrompt


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=OLLAMA_REFUSALS)
    routes.include_router(ollama_models.router(context))

    @routes.post("/api/chat", response_model=OllamaChatAnswer, responses=streaming.MAY_BE_LINES)
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            visit = await _begin(context, request, held, body.model)
            if not body.messages:
                return JSONResponse(_bodies(visit, "chat").loaded())
            messages = [message.plain() for message in body.messages]
            turn = body.turn(visit.lease.engine.model, messages, body.tools)
            return await _respond(visit, "chat", await visit.start(turn), is_streamed=body.stream)

    @routes.post("/api/generate", response_model=OllamaGenerateAnswer, responses=streaming.MAY_BE_LINES)
    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            visit = await _begin(context, request, held, body.model)
            if not body.prompt:
                return JSONResponse(_bodies(visit, "generate").loaded())
            if body.raw:
                return await _respond(visit, "generate", await _start_raw(visit, body), is_streamed=body.stream)
            turn = body.turn(visit.lease.engine.model, body.messages)
            return await _respond(visit, "generate", await visit.start(turn), is_streamed=body.stream)

    return routes


async def _begin(context: ApiContext, request: Request, held: contextlib.AsyncExitStack, model: str) -> Visit:
    name = ollama_models.known_name(context.models, model)
    return await Visit.begin(context, request, held, name, prefix="ollama-")


async def _start_raw(visit: Visit, body: OllamaGenerateRequest) -> "_RawAnswer":
    lease, serve = visit.lease, visit.context.serve
    request = GenerationRequest(
        id=visit.id,
        prompt=TextPrompt(text=body.prompt),
        arrived_at=visit.arrived_at,
        max_tokens=body.options.answer_tokens(lease.engine.model) or serve.max_tokens,
        deadline_at=deadline_at(serve, visit.arrived_at),
        stop=body.options.stops,
        sampling=body.options.sampling(),
        grammar=body.grammar,
        top_logprobs=body.wanted_logprobs,
        adapter=lease.adapter,
        tenant=visit.tenant,
    )
    generation = await lease.engine.submit(request)
    visit.held.callback(generation.cancel)
    return _RawAnswer(generation)


async def _respond(visit: Visit, spoken: Spoken, answer: AsyncIterable[Delta], *, is_streamed: bool) -> Response:
    bodies = _bodies(visit, spoken)
    if not is_streamed:
        return JSONResponse(await bodies.whole(answer))
    return streaming.HoldingStream(streaming.lines(bodies.lines(answer)), visit.held.pop_all(), streaming.LINES)


def _bodies(visit: Visit, spoken: Spoken) -> OllamaBodies:
    return OllamaBodies(spoken, visit.lease.name, visit.arrived_at, visit.load_seconds)


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
