"""POST /v1/responses: OpenAI's newer shape of a chat, stateless. Request in `responses_schema.py`, bodies in
`responses_bodies.py`."""

import contextlib
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from appliance.serving.api import streaming
from appliance.serving.api.context import ApiContext
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.responses_bodies import ModelResponse, ResponseBodies
from appliance.serving.api.responses_schema import ResponsesRequest
from appliance.serving.api.visit import Visit


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/v1/responses", response_model=ModelResponse)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            visit = await Visit.begin(context, request, held, body.model, prefix="resp_")
            answer = await visit.start(body.turn())
            bodies = ResponseBodies(visit.id, int(time.time()), visit.lease, body)
            if body.stream:
                return streaming.HoldingStream(bodies.told(answer), held.pop_all(), streaming.EVENTS)
            return await json_answer(await bodies.whole(answer))

    return routes
