"""Fields that the bodies of several routes share: their types, limits and meaning. Knows nothing of routes.

A field that would change the answer and is not supported is refused, never ignored; null means "not set".
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from appliance.serving.requests import Grammar, SamplingSettings

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_METADATA = 16
MAX_NAME_CHARACTERS = 512
MAX_FIELDS = 100  # of one object: each that is not known makes an error
MAX_TOKENS = 2**31 - 1
FORBIDDEN_BIAS = -100.0
PART_FIELDS = frozenset(("type", "text", "annotations", "logprobs"))  # the last two come back from earlier answers

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARACTERS)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
DeadlineSeconds = Annotated[float, Field(gt=0.0, le=86400.0)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=FORBIDDEN_BIAS, le=100.0)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def few(most: int) -> BeforeValidator:
    """Refuses an object with more members before each of them can make an error of its own."""

    def count(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"must have at most {most} members")
        return value

    return BeforeValidator(count)


Metadata = Annotated[dict[str, str], few(MAX_METADATA), Field(max_length=MAX_METADATA)]


def joined_parts(*types: str) -> BeforeValidator:
    """Makes one text of a list of text parts."""

    def join(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") not in types:
                expected = " or ".join(types)
                raise ValueError(
                    f"part {i} must have the type {expected}: this server reads text, no images, sound or files"
                )
            if not isinstance(part.get("text"), str) or not part.keys() <= PART_FIELDS:
                raise ValueError(f"part {i} must have a text, and no fields but {', '.join(sorted(PART_FIELDS))}")
        return "".join(part["text"] for part in content)

    return BeforeValidator(join)


def parts_schema(*types: str) -> WithJsonSchema:
    fields = {"type": {"enum": list(types)}, "text": {"type": "string"}}
    part = {"type": "object", "properties": fields, "required": ["type", "text"], "additionalProperties": False}
    return WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": part}]})


class Strict(BaseModel):
    """No unknown fields, no coercion: "5" is no number. `without_effect` names values that clients send and that ask for
    nothing; any other value of such a field is refused as unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > MAX_FIELDS:
            raise ValueError(f"an object has more than {MAX_FIELDS} fields")
        idle = cls.without_effect
        return {key: value for key, value in body.items() if value is not None and value not in idle.get(key, ())}


class SamplingFields(Strict):
    """How tokens are chosen. One default differs from OpenAI's: temperature is 0, because this server is for facts."""

    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS, description="0 or less keeps all.")
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repeat_penalty: float = Field(1.0, gt=0.0, le=10.0, description="As in llama.cpp and Ollama; 1 does nothing.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logit_bias: Annotated[dict[TokenId, Bias], few(MAX_LOGIT_BIASES)] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIASES, description="By token id; -100 forbids a token."
    )

    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repeat_penalty=self.repeat_penalty,
            seed=self.seed,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
        )


AdapterScale = Annotated[float, Field(ge=-4.0, le=4.0, description="Of this server: how strongly model:adapter acts.")]


class StreamOptions(Strict):
    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {"include_obfuscation": (False,)}

    include_usage: bool = False


class JsonSchema(Strict):
    """OpenAI's named schema. It binds the answer whether or not it says `strict`."""

    name: Annotated[str, StringConstraints(max_length=MAX_NAME_CHARACTERS)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True

    @field_validator("schema_")
    @classmethod
    def _is_bounded(cls, schema: dict[str, Any]) -> dict[str, Any]:
        return require_bounded(schema)


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarFormat(Strict):
    """This server's own field: an answer bound by a regular expression, a Lark or GBNF grammar, or a schema."""

    type: Literal["regex", "lark", "gbnf", "json_schema"]
    value: str | dict[str, Any]

    @field_validator("value")
    @classmethod
    def _is_bounded(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if len(value if isinstance(value, str) else json.dumps(value)) > MAX_GRAMMAR_BYTES:
            raise ValueError(f"is larger than the limit of {MAX_GRAMMAR_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _is_of_its_type(self) -> "GrammarFormat":
        if isinstance(self.value, str) == (self.type == "json_schema"):
            raise ValueError("value must be an object for a json_schema, and text for every other type")
        return self

    def grammar(self) -> Grammar:
        if isinstance(self.value, dict):
            return schema_grammar(self.value)
        return Grammar(kind=self.type, source=self.value, field="grammar")


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def schema_grammar(schema: Mapping[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(schema, ensure_ascii=False))


def format_grammar(form: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Grammar | None:
    """What a response format binds the answer to."""
    match form:
        case JsonObjectFormat():
            return schema_grammar({"type": "object"})
        case JsonSchemaFormat():
            return schema_grammar(form.json_schema.schema_)
    return None


def require_bounded(schema: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(schema)) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"is larger than the limit of {MAX_GRAMMAR_BYTES} bytes")
    return schema


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
