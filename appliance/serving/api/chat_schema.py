"""The body of POST /v1/chat/completions, and the turn that it asks for.

Source: https://platform.openai.com/docs/api-reference/chat, with fields of this server's own where it has none.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from appliance.serving.api.fields import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    AdapterScale,
    DeadlineSeconds,
    GrammarFormat,
    Metadata,
    ModelName,
    ResponseFormat,
    SamplingFields,
    Stops,
    StreamOptions,
    Strict,
    TokenCount,
    few,
    format_grammar,
    joined_parts,
    parts_schema,
    stop_strings,
)
from appliance.serving.api.tools import MAX_CALLS, MAX_TOOLS, CalledTool, CallId, NamedTool, Tool, plain_tools
from appliance.serving.chat_turn import ChatTurn, Effort
from appliance.serving.requests import Document
from appliance.text import passages

MAX_MESSAGES = 1024
MAX_TEXT_CHARACTERS = 512 * 1024
MAX_TEMPLATE_VARIABLES = 32
MAX_SCORE = 1e9

Content = Annotated[str, joined_parts("text"), parts_schema("text")]
Name = Annotated[str, StringConstraints(max_length=64)]
VariableName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")]
TemplateVariables = Annotated[
    dict[VariableName, Any], few(MAX_TEMPLATE_VARIABLES), Field(description="Reach the chat template by name.")
]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it; "developer" is OpenAI's newer word for "system"."""
        return {"role": "system", "content": self.content, **_named(self.name)}


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: Name | None = None

    def plain(self) -> dict[str, Any]:
        return {"role": "user", "content": self.content, **_named(self.name)}


class AssistantMessage(Strict):
    """What an earlier answer said, with the fields that such an answer has."""

    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {"annotations": ([],), "tool_calls": ([],)}

    role: Literal["assistant"]
    content: Content = ""
    reasoning_content: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    name: Name | None = None

    def plain(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, **_named(self.name)}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message


class ToolMessage(Strict):
    """What a function that was called returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: CallId
    name: Name | None = None

    def plain(self) -> dict[str, Any]:
        return {"role": "tool", "content": self.content, "tool_call_id": self.tool_call_id, **_named(self.name)}


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class DocumentBody(Strict):
    """What an answer may rest on."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=passages.MOST_ID_CHARACTERS)]
    text: Annotated[str, StringConstraints(min_length=1)]
    score: Annotated[float, Field(ge=-MAX_SCORE, le=MAX_SCORE, allow_inf_nan=False)] | None = None


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {
        "store": (False,),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
        "prompt_cache_retention": ("in_memory", "24h"),  # of a cache that this server keeps in its own way
        "logit_bias": ({},),
        "functions": ([],),
        "function_call": ("none", "auto"),
    }

    model: ModelName | None = Field(None, description="May be left out: the default model.")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    documents: list[DocumentBody] = Field(
        default_factory=list,
        max_length=passages.MOST_DOCUMENTS,
        fail_fast=True,
        description="Of this server: texts that stand between system prompt and conversation. With scores, those that are "
        "about as relevant may change places, so that more of what was read before can be used.",
    )
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    grammar: GrammarFormat | None = Field(None, description="Of this server: what else an answer can be bound to.")
    max_tokens: TokenCount | None = Field(None, description="The older name of max_completion_tokens.")
    max_completion_tokens: TokenCount | None = Field(None, description="An answer ends with the context at the latest.")
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stops | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = Field(None, description="Refused when the model's template has no such switch.")
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=MAX_TEMPLATE_VARIABLES)
    deadline_seconds: DeadlineSeconds | None = Field(None, description="Of this server: time for the whole request.")
    adapter_scale: AdapterScale = 1.0
    ignore_eos: bool = Field(False, description="For benchmarks: the answer goes on to max_tokens.")
    user: str | None = Field(None, description="Accepted and not used.")
    metadata: Metadata | None = Field(None, description="Accepted and not used.")
    safety_identifier: str | None = Field(None, description="Accepted and not used.")
    prompt_cache_key: str | None = Field(None, description="Accepted and not used: equal prompts are found anyway.")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message must not be the assistant's; end with the user's or a tool's.")
        texts = [*(message.content for message in self.messages), *(document.text for document in self.documents)]
        if sum(map(len, texts)) > MAX_TEXT_CHARACTERS:
            raise ValueError(
                f"messages and documents are longer than the limit of {MAX_TEXT_CHARACTERS} characters together."
            )
        _require_different(self.documents)
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true.")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them.")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true.")
        if self.grammar is not None and format_grammar(self.response_format) is not None:
            raise ValueError("grammar and response_format both bind the answer; give one of them.")
        plain_tools(self.tools)
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def turn(self) -> ChatTurn:
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return ChatTurn(
            messages=tuple(message.plain() for message in self.messages),
            documents=tuple(Document(id=each.id, text=each.text, score=each.score) for each in self.documents),
            tools=plain_tools(self.tools),
            tool_choice="required" if isinstance(self.tool_choice, NamedTool) else self.tool_choice,
            named_tool=named,
            parallel_tool_calls=self.parallel_tool_calls,
            response_grammar=self.grammar.grammar() if self.grammar else format_grammar(self.response_format),
            template_variables=self.chat_template_kwargs,
            reasoning_effort=self.reasoning_effort,
            sampling=self.sampling(),
            stop=stop_strings(self.stop),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            n=self.n,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            deadline_seconds=self.deadline_seconds,
            adapter_scale=self.adapter_scale,
            ignore_end=self.ignore_eos,
        )


def _require_different(documents: Sequence[DocumentBody]) -> None:
    for at, document in enumerate(documents):
        if not document.text.strip():
            raise ValueError(f"documents[{at}] is empty; leave it out.")
    if found := passages.repeated([(document.id, document.text) for document in documents]):
        at, what, earlier = found
        raise ValueError(f"documents[{at}] has the {what} of documents[{earlier}]; give each document once.")


def _named(name: str | None) -> dict[str, str]:
    return {} if name is None else {"name": name}
