"""POST /v1/rerank: documents sorted by what they have to do with a query. Shape: https://api.jina.ai/redoc#tag/rerank."""

import math
import time
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from appliance.errors import EngineFailed
from appliance.serving.api.context import ApiContext
from appliance.serving.api.embeddings import EmbeddingUsage, pool
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.fields import ModelName, Strict
from appliance.serving.api.tokens import Text
from appliance.serving.deadline import deadline_at

MAX_DOCUMENTS = 1024


class TextDocument(Strict):
    text: Text


class RerankRequest(Strict):
    """The body of POST /v1/rerank."""

    model: ModelName | None = Field(None, description="May be left out: the server's reranking model.")
    query: Text
    documents: Annotated[list[Text | TextDocument], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)]
    top_n: int | None = Field(None, ge=1, description="So many of the best; by default all.")
    return_documents: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(each if isinstance(each, str) else each.text for each in self.documents)


class RankedText(BaseModel):
    text: str


class Ranked(BaseModel):
    """`index` is the document's place in the request."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class RerankAnswer(BaseModel):
    model: str
    object: str = "list"
    results: list[Ranked]
    usage: EmbeddingUsage


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/rerank", response_model=RerankAnswer)
    @routes.post("/v1/rerank", response_model=RerankAnswer)
    async def rerank(body: RerankRequest) -> JSONResponse:
        arrived_at = time.monotonic()
        async with context.models.lease(body.model, "rerank") as lease:
            ends_at = deadline_at(context.serve, arrived_at)
            pooled = await pool(lease.engine, body.texts, arrived_at=arrived_at, deadline_at=ends_at, query=body.query)
            answer = RerankAnswer(
                model=lease.name,
                results=_ranked(body, pooled.scores),
                usage=EmbeddingUsage(prompt_tokens=pooled.prompt_tokens, total_tokens=pooled.prompt_tokens),
            )
            return JSONResponse(answer.model_dump(exclude_none=True))

    return routes


def _ranked(body: RerankRequest, scores: tuple[float, ...]) -> list[Ranked]:
    if not all(map(math.isfinite, scores)):
        raise EngineFailed("The model computed a score that is no number; its file may be damaged.")
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    texts = body.texts
    return [
        Ranked(
            index=index,
            relevance_score=scores[index],
            document=RankedText(text=texts[index]) if body.return_documents else None,
        )
        for index in best
    ]
