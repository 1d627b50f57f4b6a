"""GET /v1/models: what can be asked for, loaded or not. The default model comes first."""

from fastapi import APIRouter
from pydantic import BaseModel

from appliance.serving.api.errors import REFUSALS
from appliance.serving.engine import ModelCard, Models, no_such_model


class ModelEntry(BaseModel):
    """OpenAI's four fields, and what this server knows beside them."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "appliance"
    parent: str | None
    kind: str
    is_loaded: bool
    context_tokens: int
    size_bytes: int
    quantization: str


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelEntry]


def router(models: Models) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[_entry(card) for card in models.cards()])

    @routes.get("/v1/models/{model_id:path}", responses={404: REFUSALS[404]})
    async def one_model(model_id: str) -> ModelEntry:
        return _entry(find_card(models, model_id))

    return routes


def find_card(models: Models, name: str) -> ModelCard:
    """Raises `ModelNotFound`."""
    cards = models.cards()
    for card in cards:
        if card.id == name:
            return card
    raise no_such_model(cards)


def _entry(card: ModelCard) -> ModelEntry:
    return ModelEntry(
        id=card.id,
        created=card.made_at,
        parent=card.parent,
        kind=card.kind,
        is_loaded=card.is_loaded,
        context_tokens=card.context_tokens,
        size_bytes=card.size_bytes,
        quantization=card.quantization,
    )
