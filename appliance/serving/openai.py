"""OpenAI's chat completions in plain data: what a request may say, and the bodies that answer it.

Source: https://platform.openai.com/docs/api-reference/chat. A field that would change the answer and is not supported
is refused, never ignored. One default differs from OpenAI's: temperature is 0, because this server is for facts.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from appliance.errors import ApplianceError
from appliance.serving.engine import Finished, FinishReason, ModelInfo, SamplingSettings

MAX_MESSAGES = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
# Clients send these although they ask for nothing; any other value of them is refused.
WITHOUT_EFFECT: Final[Mapping[str, Sequence[Any]]] = {
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "store": (False,),
    "modalities": (["text"],),
}


class Strict(BaseModel):
    """No unknown fields, no coercion: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @field_validator("content")
    @classmethod
    def _is_unicode(cls, content: str | list[TextPart]) -> str | list[TextPart]:
        _joined(content).encode()  # JSON can spell half a surrogate pair; UnicodeEncodeError is a ValueError
        return content

    def plain(self) -> dict[str, str]:
        """As chat templates know it; "developer" is OpenAI's newer word for "system"."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _joined(self.content)}


class StreamOptions(Strict):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions."""

    model: str | None = Field(None, description="May be left out: one model is served.")
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, description="An answer ends with the context at the latest.")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 keeps all.")
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = Field(None, description="Accepted and not used.")
    metadata: dict[str, str] | None = Field(None, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, body: Any) -> Any:
        """null means "not set" in OpenAI's API."""
        if not isinstance(body, dict):
            return body
        return {key: value for key, value in body.items() if value is not None and value not in WITHOUT_EFFECT.get(key, ())}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message must not be the assistant's; end with the user's.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true.")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them.")
        return self

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )


class Answer:
    """The bodies of one answer, which share id, time and model."""

    def __init__(self, request_id: str, created: int, model: ModelInfo, *, with_usage: bool) -> None:
        self._head = {"id": request_id, "created": created, "model": model.name}
        self._head["system_fingerprint"] = f"fp_{model.sha256[:12]}"
        self._with_usage = with_usage

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(finished)}

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def text_chunk(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, None)

    def last_chunk(self, reason: FinishReason) -> dict[str, Any]:
        return self._chunk({}, reason)

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(finished)}

    def _chunk(self, delta: Mapping[str, str], reason: FinishReason | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        body = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**body, "usage": None} if self._with_usage else body


def usage(finished: Finished) -> dict[str, int]:
    total = finished.prompt_tokens + finished.generated_tokens
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.generated_tokens,
        "total_tokens": total,
    }


def model_list(model: ModelInfo) -> dict[str, Any]:
    entry = {"id": model.name, "object": "model", "created": model.made_at, "owned_by": "appliance"}
    return {"object": "list", "data": [entry]}


def error_body(message: str, *, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def appliance_error_body(error: ApplianceError) -> dict[str, Any]:
    param = getattr(error, "param", None)
    return error_body(str(error), status=error.http_status, code=error.api_code, param=param)


def invalid_body(problems: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The error body of a request that pydantic refused. Names fields, never values: they may be somebody's text."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return error_body("The body is not valid JSON.", status=400, code="invalid_json")
    param = _field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        param = ".".join(filter(None, (_field_path(first["loc"][:-1]), str(first["loc"][-1])[:64])))
        message = f"{param}: this server does not know or not support this field; remove it."
        return error_body(message, status=400, code="unsupported_parameter", param=param)
    if first["type"] == "missing" and param is None:
        return error_body("The body must be a JSON object.", status=400, code="invalid_request")
    said = dict.fromkeys(f"{_field_path(each['loc']) or 'body'}: {each['msg']}" for each in problems)
    return error_body("; ".join(said), status=400, code="invalid_request", param=param)


def _field_path(location: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content", "str")` as `messages[0].content`: pydantic adds names of union branches."""
    models = (ChatRequest, ChatMessage, TextPart, StreamOptions)
    fields = {name for model in models for name in model.model_fields}
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in fields:
            path += f".{part}" if path else part
    return path or None


def _joined(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
