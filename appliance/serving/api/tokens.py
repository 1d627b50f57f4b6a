"""POST /tokenize, /detokenize and /apply-template, as llama-server has them: what a text or a conversation becomes.

Shapes: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md.
"""

from collections.abc import Sequence
from typing import Annotated, Self

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator

from appliance.errors import RequestError
from appliance.serving.api.chat_schema import (
    MAX_MESSAGES,
    MAX_TEMPLATE_VARIABLES,
    MAX_TEXT_CHARACTERS,
    DocumentBody,
    Message,
    TemplateVariables,
    plain_documents,
    require_different,
)
from appliance.serving.api.context import ApiContext
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.fields import ModelName, Strict
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.tools import MAX_TOOLS, Tool, plain_tools
from appliance.serving.engine import Engine
from appliance.serving.requests import ChatPrompt
from appliance.text.passages import MOST_DOCUMENTS

MAX_TOKENS = 1 << 18
MAX_PIECES_CHARACTERS = 1 << 14  # an object for each token: forty times the size of the text

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class TokenizeBody(Strict):
    """The body of POST /tokenize."""

    model: ModelName | None = None
    content: str
    parse_special: bool = Field(True, description="Texts of control tokens become those tokens.")
    with_pieces: bool = Field(False, description="Tell each token's text too; only of a short content.")

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        limit = MAX_PIECES_CHARACTERS if self.with_pieces else MAX_TEXT_CHARACTERS
        if len(self.content) > limit:
            raise ValueError(f"content is longer than the limit of {limit} characters.")
        return self


class Piece(BaseModel):
    """A token; bytes that are no text by themselves are told as numbers."""

    id: int
    piece: str | list[int]


class TokenList(BaseModel):
    tokens: list[int] | list[Piece]


class DetokenizeBody(Strict):
    """The body of POST /detokenize."""

    model: ModelName | None = None
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, fail_fast=True)


class Content(BaseModel):
    content: str


class TemplateBody(Strict):
    """The body of POST /apply-template."""

    model: ModelName | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    documents: list[DocumentBody] = Field(default_factory=list, max_length=MOST_DOCUMENTS, fail_fast=True)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=MAX_TEMPLATE_VARIABLES)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        plain_tools(self.tools)
        require_different(self.documents)
        return self

    def prompt(self) -> ChatPrompt:
        return ChatPrompt(
            messages=tuple(message.plain() for message in self.messages),
            documents=plain_documents(self.documents),
            tools=plain_tools(self.tools),
            template_variables=self.chat_template_kwargs,
        )


class RenderedPrompt(BaseModel):
    prompt: str


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/tokenize", response_model=TokenList)
    async def tokenize(body: TokenizeBody) -> Response:
        async with context.models.lease(body.model) as lease:
            found = await lease.engine.tokenize(body.content, is_special_parsed=body.parse_special)
        if not body.with_pieces:
            return await json_answer({"tokens": found.tokens})
        pieces = zip(found.tokens, found.pieces, strict=True)
        return await json_answer({"tokens": ({"id": token, "piece": _piece(piece)} for token, piece in pieces)})

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Content:
        async with context.models.lease(body.model) as lease:
            require_known_tokens(lease.engine, body.tokens, param="tokens")
            return Content(content=await lease.engine.detokenize(body.tokens))

    @routes.post("/apply-template")
    async def apply_template(body: TemplateBody) -> RenderedPrompt:
        async with context.models.lease(body.model) as lease:
            return RenderedPrompt(prompt=await lease.engine.apply_template(body.prompt()))

    return routes


def require_known_tokens(engine: Engine, tokens: Sequence[int], *, param: str) -> None:
    """Raises `RequestError` for an id beyond the model's vocabulary: llama.cpp would read past its end."""
    size = engine.model.vocabulary_tokens
    if any(token >= size for token in tokens):
        raise RequestError(f"{param}: the model knows {size} tokens, numbered from 0; an id is larger.", param=param)


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
