"""Whether this server lives and may be sent requests, and its metrics."""

from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from appliance.serving.api.errors import ErrorBody, error_body
from appliance.serving.engine import Models
from appliance.serving.metrics import CONTENT_TYPE, Metrics

GREETING = "appliance is running"


class Health(BaseModel):
    status: str


class DocumentState(BaseModel):
    """Of the folder that is read ahead: how many documents are known, wait to be read, were refused, and were erased."""

    known: int
    waiting: int
    refused: int
    erased: int


class Readiness(BaseModel):
    """`status` is the state of the default model's engine; the rest counts requests, and documents if there is a folder."""

    status: str
    running: int
    waiting: int
    slots: int
    documents: DocumentState | None = None


def router(models: Models, metrics: Metrics) -> APIRouter:
    routes = APIRouter()

    @routes.api_route("/", methods=["GET", "HEAD"], response_class=PlainTextResponse, include_in_schema=False)
    async def root() -> str:
        """Clients of Ollama ask here whether anybody is there."""
        return GREETING

    @routes.head("/healthz", include_in_schema=False)
    @routes.get("/healthz")
    async def healthz() -> Health:
        """The process answers, whatever its engines do."""
        return Health(status="ok")

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> JSONResponse:
        """Whether new requests are taken."""
        load = models.load()
        state: dict[str, Any] = {"status": load.state, "running": load.running, "waiting": load.waiting}
        state["slots"] = load.slots
        if load.documents is not None:
            state["documents"] = msgspec.structs.asdict(load.documents)
        return JSONResponse(state, 200 if load.is_accepting else 503)

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", response_model=Health, responses={503: {"model": ErrorBody}})
    async def health() -> JSONResponse:
        """The same as llama-server says it."""
        load = models.load()
        if load.is_accepting:
            return JSONResponse({"status": "ok"})
        message = f"The engine is not ready for requests: {load.state}."
        return JSONResponse(error_body(message, status=503, code=f"engine_{load.state}"), 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def expose_metrics() -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    return routes
