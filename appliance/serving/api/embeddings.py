"""POST /v1/embeddings: texts or token ids to vectors. Shape: https://platform.openai.com/docs/api-reference/embeddings."""

import base64
import math
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, Field

from appliance.errors import EngineFailed, RequestError
from appliance.serving.api.context import ApiContext
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.fields import ModelName, Strict
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.request_id import engine_id
from appliance.serving.api.tokens import MAX_TOKENS, Text, TokenId, require_known_tokens
from appliance.serving.deadline import deadline_at
from appliance.serving.engine import Engine
from appliance.serving.events import Pooled
from appliance.serving.requests import PoolingRequest

MAX_INPUTS = 2048

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]


class EmbeddingRequest(Strict):
    """The body of POST /v1/embeddings."""

    model: ModelName | None = Field(None, description="May be left out: the server's embedding model.")
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the model's own width.")
    user: str | None = Field(None, description="Accepted and not used.")

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        return several_inputs(self.input)


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest) -> Response:
        arrived_at = time.monotonic()
        async with context.models.lease(body.model, "embedding") as lease:
            require_width(lease.engine, body.dimensions)
            pooled = await pool(
                lease.engine, body.inputs, arrived_at=arrived_at, deadline_at=deadline_at(context.serve, arrived_at)
            )
            encode = _floats if body.encoding_format == "float" else _base64
            data = (
                {"object": "embedding", "index": index, "embedding": encode(vector)}
                for index, vector in enumerate(pooled.vectors)
            )
            usage = {"prompt_tokens": pooled.prompt_tokens, "total_tokens": pooled.prompt_tokens}
            return await json_answer({"object": "list", "model": lease.name, "data": data, "usage": usage})

    return routes


async def pool(
    engine: Engine,
    inputs: Sequence[str | tuple[int, ...]],
    *,
    arrived_at: float,
    deadline_at: float | None = None,
    query: str | None = None,
) -> Pooled:
    """Embeds the inputs, or scores them against the query. Raises as `Engine.pool`, and for unknown token ids."""
    for each in inputs:
        if not isinstance(each, str):
            require_known_tokens(engine, each, param="input")
    request = PoolingRequest(
        id=engine_id("pool-"),
        inputs=tuple(inputs),
        arrived_at=arrived_at,
        deadline_at=deadline_at,
        query=query,
    )
    return await engine.pool(request)


def several_inputs(given: str | Sequence[Any]) -> tuple[str | tuple[int, ...], ...]:
    """One text, texts, one list of tokens or several, as OpenAI's API lets them be written."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given[0], int):
        return (tuple(given),)
    return tuple(each if isinstance(each, str) else tuple(each) for each in given)


def require_width(engine: Engine, dimensions: int | None) -> None:
    """Raises `RequestError`: cutting vectors is only sound for models trained for it, and nothing tells which are."""
    width = engine.model.embedding_width
    if dimensions is not None and dimensions != width:
        raise RequestError(
            f"dimensions: {engine.model.name} has vectors of {width} numbers and they cannot be cut; "
            f"leave dimensions out or set it to {width}.",
            param="dimensions",
        )


def floats(vector: bytes) -> tuple[float, ...]:
    """Raises `EngineFailed` for what is no number."""
    numbers = struct.unpack(f"<{len(vector) // 4}f", vector)
    if not all(map(math.isfinite, numbers)):
        raise EngineFailed("The model computed a vector that holds no numbers; its file may be damaged.")
    return numbers


def _floats(vector: bytes) -> list[float]:
    return list(floats(vector))


def _base64(vector: bytes) -> str:
    floats(vector)
    return base64.b64encode(vector).decode()
