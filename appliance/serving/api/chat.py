"""POST /v1/chat/completions: a conversation to answer. Request in `chat_schema.py`, bodies in `chat_bodies.py`."""

import contextlib
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from appliance.serving.api import streaming
from appliance.serving.api.chat_bodies import ChatBodies, ChatCompletion
from appliance.serving.api.chat_schema import ChatRequest
from appliance.serving.api.context import ApiContext
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.visit import Visit


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            visit = await Visit.begin(context, request, held, body.model, prefix="chatcmpl-")
            answer = await visit.start(body.turn())
            bodies = ChatBodies(
                visit.id,
                int(time.time()),
                visit.lease,
                n=body.n,
                wants_usage=body.wants_usage,
                wants_logprobs=body.logprobs,
            )
            if body.stream:
                told = streaming.events(bodies.chunks(answer))
                return streaming.HoldingStream(told, held.pop_all(), streaming.EVENTS)
            return await json_answer(await bodies.whole(answer))

    return routes
