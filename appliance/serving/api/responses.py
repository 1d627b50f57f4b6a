"""POST /v1/responses: OpenAI's newer shape of a chat, stateless. Request in `responses_schema.py`, bodies in
`responses_bodies.py`."""

import contextlib
import secrets
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from appliance.serving import chat_turn
from appliance.serving.api import streaming
from appliance.serving.api.context import ApiContext
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.keep_alive import with_keep_alive
from appliance.serving.api.responses_bodies import ModelResponse, ResponseBodies
from appliance.serving.api.responses_schema import ResponsesRequest


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/v1/responses", response_model=ModelResponse)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        arrived_at = time.monotonic()
        response_id = f"resp_{secrets.token_hex(12)}"
        async with contextlib.AsyncExitStack() as held:
            lease = await held.enter_async_context(context.models.lease(body.model))
            answer = await chat_turn.start(
                lease,
                body.turn(),
                serve=context.serve,
                request_id=response_id,
                arrived_at=arrived_at,
                tenant=context.tenant(request),
            )
            held.callback(answer.cancel)
            bodies = ResponseBodies(response_id, int(time.time()), lease, body)
            if body.stream:
                return streaming.HoldingStream(with_keep_alive(bodies.told(answer)), held.pop_all(), streaming.EVENTS)
            return await json_answer(await bodies.whole(answer))

    return routes
