"""POST /v1/chat/completions: a conversation to answer. Request in `chat_schema.py`, bodies in `chat_bodies.py`."""

import contextlib
import secrets
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from appliance.serving import chat_turn
from appliance.serving.api import streaming
from appliance.serving.api.chat_bodies import ChatBodies, ChatCompletion
from appliance.serving.api.chat_schema import ChatRequest
from appliance.serving.api.context import ApiContext
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.keep_alive import with_keep_alive


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        arrived_at = time.monotonic()
        answer_id = f"chatcmpl-{secrets.token_hex(12)}"
        async with contextlib.AsyncExitStack() as held:
            lease = await held.enter_async_context(context.models.lease(body.model))
            answer = await chat_turn.start(
                lease,
                body.turn(),
                serve=context.serve,
                request_id=answer_id,
                arrived_at=arrived_at,
                tenant=context.tenant(request),
            )
            held.callback(answer.cancel)
            bodies = ChatBodies(
                answer_id,
                int(time.time()),
                lease,
                n=body.n,
                wants_usage=body.wants_usage,
                wants_logprobs=body.logprobs,
            )
            if body.stream:
                told = with_keep_alive(streaming.events(bodies.chunks(answer)))
                return streaming.HoldingStream(told, held.pop_all(), streaming.EVENTS)
            return await json_answer(await bodies.whole(answer))

    return routes
