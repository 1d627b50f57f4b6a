"""What requests to Ollama's API may say. Source: https://github.com/ollama/ollama/blob/main/docs/api.md.

A field or option that would change the answer and is not supported is refused, never ignored. One default differs from
Ollama's: temperature is 0, because this server is for facts.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from appliance.errors import RequestError
from appliance.serving.api.embeddings import MAX_INPUTS
from appliance.serving.api.fields import (
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    FunctionName,
    ModelName,
    Stops,
    Strict,
    require_bounded,
    schema_grammar,
    stop_strings,
)
from appliance.serving.api.tokens import Text
from appliance.serving.api.tools import MAX_CALLS, MAX_TOOLS, Tool, plain_tools
from appliance.serving.chat_turn import ChatTurn, Effort
from appliance.serving.events import ModelInfo
from appliance.serving.requests import Grammar, SamplingSettings

MAX_MESSAGES = 1024


class OllamaOptions(Strict):
    """The model options that one request may set; how a model is loaded is the server's own decision."""

    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {
        "mirostat": (0,),
        "tfs_z": (1,),
        "typical_p": (1,),
        "numa": (False,),
        "low_vram": (False,),
        "use_mlock": (False,),
        "vocab_only": (False,),
        "logits_all": (False,),
        "embedding_only": (False,),
    }

    num_predict: int | None = Field(None, ge=-2, le=MAX_TOKENS, description="0 or less: up to the end of the context.")
    num_ctx: int | None = Field(None, ge=1, description="At most the context that is served.")
    num_keep: int | None = Field(None, description="Accepted and not used: the context is never shifted.")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 takes the likeliest token.")
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS, description="0 or less keeps all.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repeat_penalty: float = Field(1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="-1 takes any.")
    stop: Stops | None = None

    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed == -1 else self.seed,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return stop_strings(self.stop)

    def answer_tokens(self, model: ModelInfo) -> int | None:
        """None for the server's default. Raises `RequestError` for a context that this model is not served with."""
        if self.num_ctx is not None and self.num_ctx > model.context_tokens:
            raise RequestError(
                f"options.num_ctx: {self.num_ctx} is more than the {model.context_tokens} tokens that {model.name} "
                "is served with; ask for less, or start the server with a larger context_tokens.",
                param="options.num_ctx",
            )
        if self.num_predict is None:
            return None
        return self.num_predict if self.num_predict > 0 else model.context_tokens


NO_OPTIONS = OllamaOptions.model_validate({})


class OllamaCalledFunction(Strict):
    name: FunctionName
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = Field(None, description="Accepted and not used.")


class OllamaCalledTool(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: OllamaCalledFunction


class OllamaMessage(Strict):
    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {"images": ([],)}

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = Field(None, description="What an earlier answer said here; shown to the template.")
    tool_calls: Annotated[list[OllamaCalledTool], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As OpenAI's API spells it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [_call(number, each) for number, each in enumerate(self.tool_calls)]
        if self.tool_name:
            message["name"] = self.tool_name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class _Asking(Strict):
    """What /api/chat and /api/generate share."""

    model: ModelName
    options: OllamaOptions = NO_OPTIONS
    stream: bool = Field(True, description="One JSON object a line.")
    format: Literal["", "json"] | dict[str, Any] = Field("", description="json, or a JSON schema that binds the answer.")
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = Field(None, description="Accepted and not used: the server decides.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("format")
    @classmethod
    def _is_bounded(cls, form: str | dict[str, Any]) -> str | dict[str, Any]:
        return require_bounded(form) if isinstance(form, dict) else form

    @property
    def grammar(self) -> Grammar | None:
        if isinstance(self.format, dict):
            return schema_grammar(self.format)
        return schema_grammar({"type": "object"}) if self.format == "json" else None

    def effort(self, template: str) -> Effort | None:
        if self.think is False:  # a model that cannot think has nothing to leave out
            return "none" if "enable_thinking" in template or "reasoning_effort" in template else None
        return "medium" if self.think is True else self.think

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def turn(self, model: ModelInfo, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] = ()) -> ChatTurn:
        return ChatTurn(
            messages=tuple(messages),
            tools=plain_tools(tools),
            response_grammar=self.grammar,
            reasoning_effort=self.effort(model.chat_template),
            sampling=self.options.sampling(),
            stop=self.options.stops,
            max_tokens=self.options.answer_tokens(model),
            top_logprobs=self.wanted_logprobs,
        )


class OllamaChatRequest(_Asking):
    """The body of POST /api/chat. Without messages it only loads the model."""

    messages: list[OllamaMessage] = Field(default_factory=list, max_length=MAX_MESSAGES, fail_fast=True)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        plain_tools(self.tools)
        return self


class OllamaGenerateRequest(_Asking):
    """The body of POST /api/generate. Without a prompt it only loads the model."""

    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {
        "suffix": ("",),
        "template": ("",),
        "images": ([],),
        "context": ([],),
    }

    prompt: str = ""
    system: str = ""
    raw: bool = Field(False, description="The prompt is continued as it stands, without the chat template.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.raw and (self.system or self.think is not None):
            raise ValueError("raw prompts have no chat template, so system and think have no place in them.")
        return self

    @property
    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


class OllamaEmbedRequest(Strict):
    """The body of POST /api/embed."""

    model: ModelName
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    truncate: bool = Field(False, description="Cut what is longer than the context; otherwise it is refused.")
    dimensions: int | None = Field(None, ge=1, description="Only the model's own width.")
    options: OllamaOptions = NO_OPTIONS
    keep_alive: float | str | None = Field(None, description="Accepted and not used: the server decides.")


class OllamaEmbeddingsRequest(Strict):
    """The body of POST /api/embeddings, the older way for one text."""

    model: ModelName
    prompt: Text
    options: OllamaOptions = NO_OPTIONS
    keep_alive: float | str | None = Field(None, description="Accepted and not used: the server decides.")


class OllamaShowRequest(Strict):
    """The body of POST /api/show; `name` is the older word for `model`."""

    model: ModelName | None = None
    name: ModelName | None = None
    verbose: bool = Field(False, description="Accepted and not used.")

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.model or self.name) is None:
            raise ValueError("model: name the model to show.")
        return self


def _call(number: int, call: OllamaCalledTool) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": json.dumps(call.function.arguments, ensure_ascii=False)}
    return {"id": call.id or f"call_{number}", "type": call.type, "function": function}
