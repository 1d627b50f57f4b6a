"""The HTTP API over an engine: chat completions, models, health, metrics. Every error body has OpenAI's shape.

`create_app(engine, ...)` is the entry. Knows nothing of models, tokens or llama.cpp. Nothing a client wrote is logged.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from appliance import __version__
from appliance.errors import ApplianceError, ModelNotFound, QueueFull
from appliance.serving import sse
from appliance.serving.body_limit import BodyLimit
from appliance.serving.engine import Engine, Finished, Generation, GenerationRequest
from appliance.serving.metrics import CONTENT_TYPE, Metrics
from appliance.serving.openai import (
    Answer,
    ChatRequest,
    appliance_error_body,
    error_body,
    invalid_body,
    model_list,
)

CHAT_PATH = "/v1/chat/completions"
MAX_BODY_BYTES = 1 << 20
CLIENT_CLOSED = 499  # nginx's number for it; nobody is left to read the answer
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def create_app(engine: Engine, metrics: Metrics, *, default_max_tokens: int) -> FastAPI:
    """The application; the caller owns the engine and closes it."""
    metrics.watch(engine)
    # No documentation pages: they load scripts from the internet.
    app = FastAPI(title="appliance", version=__version__, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    _add_error_handlers(app, metrics)

    @app.post(CHAT_PATH)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        generation, answer = await _start(engine, body, default_max_tokens)
        watcher = asyncio.create_task(_cancel_when_gone(request, generation))
        if body.stream:
            stream = _stream(generation, answer, watcher, with_usage=body.wants_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await _whole(generation, answer, watcher)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return model_list(engine.model)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        load = engine.load()
        state = {"status": "ready" if load.is_accepting else "not ready", "running": load.running}
        return JSONResponse({**state, "waiting": load.waiting}, 200 if load.is_accepting else 503)

    @app.get("/metrics")
    def expose_metrics() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    return app


async def _start(engine: Engine, body: ChatRequest, default_max_tokens: int) -> tuple[Generation, Answer]:
    """Queues the request; raises `RequestError` while the response can still have its status."""
    arrived_at = time.monotonic()
    if body.model is not None and body.model != engine.model.name:
        raise ModelNotFound(f"This server has no model of that name; it serves {engine.model.name!r}.", param="model")
    prompt = await engine.encode([message.plain() for message in body.messages])
    request = GenerationRequest(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        prompt=prompt,
        max_tokens=body.answer_tokens or default_max_tokens,
        arrived_at=arrived_at,
        stop=body.stops,
        sampling=body.sampling(),
    )
    answer = Answer(request.id, int(time.time()), engine.model, with_usage=body.wants_usage)
    return engine.submit(request), answer


async def _cancel_when_gone(request: Request, generation: Generation) -> None:
    """The body has been read, so the next message is the client's departure."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


async def _whole(generation: Generation, answer: Answer, watcher: asyncio.Task[None]) -> Response:
    parts: list[str] = []
    try:
        async for event in generation:
            if not isinstance(event, Finished):
                parts.append(event.text)
            elif event.reason != "cancelled":
                return JSONResponse(answer.whole("".join(parts), event))
        return Response(status_code=CLIENT_CLOSED)
    finally:
        watcher.cancel()
        generation.cancel()


async def _stream(
    generation: Generation, answer: Answer, watcher: asyncio.Task[None], *, with_usage: bool
) -> AsyncIterator[bytes]:
    """The answer's events. Once the status is sent, an error can only be an event of its own; no [DONE] follows it."""
    try:
        yield sse.encode(answer.first_chunk())
        async for event in generation:
            if not isinstance(event, Finished):
                yield sse.encode(answer.text_chunk(event.text))
                continue
            yield sse.encode(answer.last_chunk(event.reason))
            if with_usage:
                yield sse.encode(answer.usage_chunk(event))
        yield sse.DONE
    except ApplianceError as error:
        yield sse.encode(appliance_error_body(error))
    finally:
        watcher.cancel()
        generation.cancel()


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApplianceError)
    async def appliance_error(_: Request, error: ApplianceError) -> JSONResponse:
        headers = {}
        if isinstance(error, QueueFull):
            metrics.record_refusal("rejected")
            headers["Retry-After"] = str(error.retry_after_seconds)
        elif error.http_status < 500:
            metrics.record_refusal("invalid")
        return JSONResponse(appliance_error_body(error), error.http_status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        metrics.record_refusal("invalid")
        return JSONResponse(invalid_body(error.errors()), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        status = error.status_code
        if request.url.path == CHAT_PATH and status in (400, 413):  # a body that could not be read
            metrics.record_refusal("invalid")
        said = {
            404: "This server has no such route.",
            405: f"{request.method} is not allowed here.",
            413: f"The body is larger than the limit of {MAX_BODY_BYTES} bytes.",
        }
        message = said.get(status, error.detail)
        code = HTTP_CODES.get(status, "invalid_request")
        return JSONResponse(error_body(message, status=status, code=code), status, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        message = "The server met an unexpected error; its log has the details."
        return JSONResponse(error_body(message, status=500, code="internal_error"), 500)
