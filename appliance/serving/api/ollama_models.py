"""Ollama's API about models, /api/tags, /api/ps, /api/show and /api/version, and vectors: /api/embed, /api/embeddings."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from appliance import __version__
from appliance.serving.api.context import ApiContext
from appliance.serving.api.embeddings import floats, pool, require_width
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.models import find_card
from appliance.serving.api.ollama_bodies import NANOSECONDS, instant
from appliance.serving.api.ollama_schema import OllamaEmbeddingsRequest, OllamaEmbedRequest, OllamaShowRequest
from appliance.serving.deadline import deadline_at
from appliance.serving.engine import Engine, EngineLease, ModelCard, Models

LATEST = ":latest"  # what clients of Ollama append to a name without a tag
CAPABILITIES = {"chat": ["completion", "tools"], "embedding": ["embedding"], "rerank": []}


class OllamaDetails(BaseModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    modified_at: str | None = None
    context_length: int | None = None


class OllamaModels(BaseModel):
    models: list[OllamaModel]


class OllamaModelInfo(BaseModel):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(BaseModel):
    version: str


class OllamaEmbeddings(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbedding(BaseModel):
    embedding: list[float]


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter()
    models = context.models

    @routes.get("/api/version")
    async def version() -> OllamaVersion:
        """This server's own version, not one of Ollama."""
        return OllamaVersion(version=__version__)

    @routes.get("/api/tags", response_model_exclude_none=True)
    async def tags() -> OllamaModels:
        return OllamaModels(models=[_model(card, modified_at=instant(card.made_at)) for card in models.cards()])

    @routes.get("/api/ps", response_model_exclude_none=True)
    async def running() -> OllamaModels:
        loaded = [card for card in models.cards() if card.is_loaded]
        return OllamaModels(models=[_model(card, context_length=card.context_tokens) for card in loaded])

    @routes.post("/api/show")
    async def show(body: OllamaShowRequest) -> OllamaModelInfo:
        card = find_card(models, known_name(models, body.model or body.name or ""))
        return await _info(models, card)

    @routes.post("/api/embed", response_model=OllamaEmbeddings)
    async def embed(body: OllamaEmbedRequest) -> Response:
        arrived_at = time.monotonic()
        async with models.lease(known_name(models, body.model), "embedding") as lease:
            loaded_at = time.monotonic()
            body.options.answer_tokens(lease.engine.model)  # refuses a context that is not served
            require_width(lease.engine, body.dimensions)
            texts = [body.input] if isinstance(body.input, str) else body.input
            inputs = await _cut(lease.engine, texts) if body.truncate else texts
            pooled = await pool(
                lease.engine, inputs, arrived_at=arrived_at, deadline_at=deadline_at(context.serve, arrived_at)
            )
            return await json_answer(
                {
                    "model": lease.name,
                    "embeddings": map(floats, pooled.vectors),
                    "total_duration": int((time.monotonic() - arrived_at) * NANOSECONDS),
                    "load_duration": int((loaded_at - arrived_at) * NANOSECONDS),
                    "prompt_eval_count": pooled.prompt_tokens,
                }
            )

    @routes.post("/api/embeddings", response_model=OllamaEmbedding)
    async def embeddings(body: OllamaEmbeddingsRequest) -> JSONResponse:
        arrived_at = time.monotonic()
        async with models.lease(known_name(models, body.model), "embedding") as lease:
            body.options.answer_tokens(lease.engine.model)
            ends_at = deadline_at(context.serve, arrived_at)
            pooled = await pool(lease.engine, [body.prompt], arrived_at=arrived_at, deadline_at=ends_at)
            return JSONResponse({"embedding": list(floats(pooled.vectors[0]))})

    return routes


def known_name(models: Models, name: str) -> str:
    """`name` without Ollama's ":latest", unless a model is called so."""
    if name.endswith(LATEST) and name not in {card.id for card in models.cards()}:
        return name.removesuffix(LATEST)
    return name


async def _cut(engine: Engine, texts: Sequence[str]) -> list[str | tuple[int, ...]]:
    """As many tokens of each text as the model reads. A token is a byte at least, so that short texts fit."""
    limit = engine.model.context_tokens
    cut: list[str | tuple[int, ...]] = []
    for text in texts:
        if len(text.encode()) <= limit // 2:
            cut.append(text)
            continue
        tokens = (await engine.tokenize(text)).tokens
        cut.append(tokens[:limit] if len(tokens) > limit else text)
    return cut


async def _info(models: Models, card: ModelCard) -> OllamaModelInfo:
    """The template is only known of a model that is loaded; showing one does not load it."""
    template, facts = "", {}
    if card.is_loaded:
        async with models.lease(card.id, card.kind) as lease:
            template, facts = lease.engine.model.chat_template, _loaded_facts(lease)
    return OllamaModelInfo(
        modelfile="",
        parameters="",
        template=template,
        details=_details(card),
        model_info={
            "general.architecture": card.architecture,
            f"{card.architecture}.context_length": card.context_tokens,
            **facts,
        },
        capabilities=CAPABILITIES[card.kind],
        modified_at=instant(card.made_at),
    )


def _loaded_facts(lease: EngineLease) -> dict[str, int]:
    model = lease.engine.model
    return {f"{model.architecture}.embedding_length": model.embedding_width} if model.embedding_width else {}


def _model(card: ModelCard, **facts: Any) -> OllamaModel:
    return OllamaModel(
        name=card.id, model=card.id, size=card.size_bytes, digest=card.sha256, details=_details(card), **facts
    )


def _details(card: ModelCard) -> OllamaDetails:
    return OllamaDetails(
        parent_model=card.parent or "",
        format="gguf",
        family=card.architecture,
        families=[card.architecture],
        parameter_size="",
        quantization_level=card.quantization,
    )
