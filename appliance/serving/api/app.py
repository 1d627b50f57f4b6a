"""The HTTP application: OpenAI's API, Ollama's, and what operators ask. `create_app` puts it together.

Knows nothing of tokens, llama.cpp or processes. Nothing that a client wrote is logged. There are no CORS headers: no page of
another origin may read an answer.
"""

import functools
from typing import Any

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from appliance import __version__
from appliance.recipe import Serve
from appliance.serving.api import (
    chat,
    completions,
    embeddings,
    errors,
    health,
    models,
    ollama,
    rerank,
    responses,
    tokens,
)
from appliance.serving.api.context import ApiContext
from appliance.serving.api.departure import CancelWhenGone
from appliance.serving.api.json_body import JsonBody
from appliance.serving.api.request_id import RequestId
from appliance.serving.api.streaming import MAY_BE_EVENTS
from appliance.serving.api.unexpected import AnswerUnexpected
from appliance.serving.auth import Gate
from appliance.serving.engine import Models
from appliance.serving.metrics import Metrics

NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
STREAMING = (chat, completions, responses)
COMPUTING = (embeddings, rerank, tokens, ollama)


class Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Without FastAPI's 422: what it would say that for is answered 400, as OpenAI does."""
        document = super().openapi()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document


def create_app(served: Models, metrics: Metrics, *, serve: Serve, gate: Gate | None) -> FastAPI:
    """The application; the caller owns the models and closes them.

    Without a gate everybody who can connect may ask.
    """
    metrics.watch(served)
    # No documentation pages: they load scripts from the internet.
    app = Application(title="appliance", version=__version__, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY)
    errors.add_handlers(app, metrics)
    context = ApiContext(models=served, serve=serve)
    for part in STREAMING:
        app.include_router(part.router(context), responses=MAY_BE_EVENTS)
    for part in COMPUTING:
        app.include_router(part.router(context))
    app.include_router(models.router(served))
    app.include_router(health.router(served, metrics))
    # The last one added is the first to see a request.
    app.add_middleware(JsonBody)
    app.add_middleware(CancelWhenGone)
    if gate is not None:
        app.add_middleware(gate.middleware, refuse=functools.partial(errors.counted_response, metrics))
    app.add_middleware(AnswerUnexpected)
    app.add_middleware(RequestId)
    return app
