"""POST /v1/completions: text to continue as it stands. Shape: https://platform.openai.com/docs/api-reference/completions."""

import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from appliance.serving.api import streaming
from appliance.serving.api.completion_bodies import Completion, CompletionBodies
from appliance.serving.api.context import ApiContext
from appliance.serving.api.embeddings import TokenIds, several_inputs
from appliance.serving.api.errors import REFUSALS
from appliance.serving.api.fields import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    AdapterScale,
    DeadlineSeconds,
    ModelName,
    SamplingFields,
    Stops,
    StreamOptions,
    TokenCount,
    stop_strings,
)
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.tokens import Text, require_known_tokens
from appliance.serving.api.visit import Visit
from appliance.serving.deadline import deadline_at
from appliance.serving.engine import EngineLease
from appliance.serving.events import Finished
from appliance.serving.prompt_batch import PromptBatch
from appliance.serving.requests import GenerationRequest, TextPrompt, TokenPrompt

MAX_PROMPTS = 128


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {"suffix": ("",)}

    model: ModelName | None = Field(None, description="May be left out: the default model.")
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: TokenCount | None = Field(None, description="An answer ends with the context at the latest.")
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, description="Only the value of n: every answer is returned.")
    echo: bool = Field(False, description="The answer begins with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stop: Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    deadline_seconds: DeadlineSeconds | None = Field(None, description="Of this server: time for the whole request.")
    adapter_scale: AdapterScale = 1.0
    user: str | None = Field(None, description="Accepted and not used.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be the same as n: this server returns every answer it makes.")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs cannot be combined: the prompt's own log probabilities are not computed.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true.")
        return self

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        return several_inputs(self.prompt)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def router(context: ApiContext) -> APIRouter:
    routes = APIRouter(responses=REFUSALS)

    @routes.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            visit = await Visit.begin(context, request, held, body.model, prefix="cmpl-")
            lease = visit.lease
            echoes = [await _echo(lease, prompt) if body.echo else "" for prompt in body.prompts]
            batch = PromptBatch(lease.engine, _requests(visit, body))
            held.push_async_callback(batch.close)
            await batch.start()
            bodies = CompletionBodies(visit.id, int(time.time()), lease, echoes, n=body.n, wants_usage=body.wants_usage)
            if body.stream:
                told = streaming.events(_chunks(batch, bodies))
                return streaming.HoldingStream(told, held.pop_all(), streaming.EVENTS)
            async for number, event in batch:
                bodies.add(number, event)
            return await json_answer(bodies.whole())

    return routes


async def _echo(lease: EngineLease, prompt: str | tuple[int, ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    require_known_tokens(lease.engine, prompt, param="prompt")
    return await lease.engine.detokenize(prompt)


def _requests(visit: Visit, body: CompletionRequest) -> list[GenerationRequest]:
    lease, serve = visit.lease, visit.context.serve
    made = []
    for number, prompt in enumerate(body.prompts):
        if not isinstance(prompt, str):
            require_known_tokens(lease.engine, prompt, param="prompt")
        made.append(
            GenerationRequest(
                id=f"{visit.id}-{number}",
                prompt=TextPrompt(text=prompt) if isinstance(prompt, str) else TokenPrompt(tokens=prompt),
                arrived_at=visit.arrived_at,
                max_tokens=body.max_tokens or serve.max_tokens,
                deadline_at=deadline_at(serve, visit.arrived_at, body.deadline_seconds),
                n=body.n,
                stop=stop_strings(body.stop),
                sampling=body.sampling(),
                top_logprobs=body.logprobs,
                adapter=lease.adapter,
                adapter_scale=lease.scaled(body.adapter_scale),
                tenant=visit.tenant,
            )
        )
    return made


async def _chunks(batch: PromptBatch, bodies: CompletionBodies) -> AsyncIterator[dict[str, Any]]:
    for chunk in bodies.opening():
        yield chunk
    async for number, event in batch:
        bodies.add(number, event)
        yield bodies.last(number, event) if isinstance(event, Finished) else bodies.piece(number, event)
    if bodies.wants_usage:
        yield bodies.usage_chunk()
