"""The body of POST /v1/responses, and the turn that it asks for.

Source: https://platform.openai.com/docs/api-reference/responses. Nothing is stored here: the client sends every turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from appliance.serving.api.chat_schema import MAX_MESSAGES, MAX_TEMPLATE_VARIABLES, MAX_TEXT_CHARACTERS, TemplateVariables
from appliance.serving.api.fields import (
    MAX_TOP_LOGPROBS,
    DeadlineSeconds,
    FunctionName,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchema,
    Metadata,
    ModelName,
    SamplingFields,
    Stops,
    Strict,
    TextFormat,
    TokenCount,
    format_grammar,
    joined_parts,
    parts_schema,
    schema_grammar,
    stop_strings,
)
from appliance.serving.api.tools import MAX_TOOLS, CallId, Function, Tool, plain_tools
from appliance.serving.chat_turn import ChatTurn, Effort
from appliance.serving.requests import Grammar

TEXT_PARTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"

Content = Annotated[str, joined_parts(*TEXT_PARTS), parts_schema(*TEXT_PARTS)]
ReasoningContent = Annotated[str, joined_parts("reasoning_text", "summary_text"), parts_schema("reasoning_text")]
ItemId = Annotated[str, StringConstraints(max_length=128)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _Item(Strict):
    """With the fields of items that come back from earlier answers, which mean nothing here."""

    id: ItemId | None = Field(None, description="Accepted and not used.")
    status: ItemStatus | None = Field(None, description="Accepted and not used.")


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    content: ReasoningContent = ""
    summary: ReasoningContent = ""


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str


class CallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Content


def _item_type(item: Any) -> Any:
    """Messages may leave their type out."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(_item_type),
]


class FunctionTool(Function):
    """A function, not wrapped as in chat completions. Tools of OpenAI's own, such as web_search, do not exist here."""

    type: Literal["function"]


class NamedFunctionTool(Strict):
    type: Literal["function"]
    name: FunctionName


class JsonSchemaTextFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Strict):
    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {"verbosity": ("medium",)}

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaTextFormat, Field(discriminator="type")] | None = None

    def grammar(self) -> Grammar | None:
        if isinstance(self.format, JsonSchemaTextFormat):
            return schema_grammar(self.format.schema_)
        return format_grammar(self.format)


class ReasoningOptions(Strict):
    effort: Effort | None = None


class ResponsesRequest(SamplingFields):
    """The body of POST /v1/responses."""

    without_effect: ClassVar[Mapping[str, Sequence[Any]]] = {
        "background": (False,),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "prompt_cache_retention": ("in_memory", "24h"),
        "logit_bias": ({},),
        "stream_options": ({}, {"include_obfuscation": False}),
    }

    model: ModelName | None = Field(None, description="May be left out: the default model.")
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    grammar: GrammarFormat | None = Field(None, description="Of this server: what else an answer can be bound to.")
    reasoning: ReasoningOptions = ReasoningOptions()
    max_output_tokens: TokenCount | None = Field(None, description="An answer ends with the context at the latest.")
    stop: Stops | None = Field(None, description="Of this server.")
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list, max_length=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool = False
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, max_length=MAX_TEMPLATE_VARIABLES)
    deadline_seconds: DeadlineSeconds | None = Field(None, description="Of this server: time for the whole request.")
    user: str | None = Field(None, description="Accepted and not used.")
    metadata: Metadata | None = Field(None, description="Comes back with the answer.")
    safety_identifier: str | None = Field(None, description="Accepted and not used.")
    prompt_cache_key: str | None = Field(None, description="Accepted and not used: equal prompts are found anyway.")

    store: bool = Field(False, description="Only false: this server stores no conversation.")
    previous_response_id: str | None = Field(None, description="Refused: this server stores no conversation.")

    @field_validator("store", "previous_response_id")
    @classmethod
    def _stores_nothing(cls, value: bool | str | None) -> bool | str | None:
        if value:
            raise ValueError("this server stores no conversation; send store = false, and every turn in input")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        messages = self.messages()
        if messages[-1]["role"] not in ("user", "tool"):
            raise ValueError("input must end with a message of the user's or the output of a function.")
        if sum(len(message["content"]) for message in messages) > MAX_TEXT_CHARACTERS:
            raise ValueError(f"input is longer than the limit of {MAX_TEXT_CHARACTERS} characters.")
        if self.grammar is not None and self.text.grammar() is not None:
            raise ValueError("grammar and text.format both bind the answer; give one of them.")
        if self.top_logprobs and not self.include:
            raise ValueError(f"top_logprobs is only allowed when include has {LOGPROBS}.")
        self.plain_tools()
        return self

    def messages(self) -> list[dict[str, Any]]:
        """As chat completions spell them: an answer and the calls that follow it are one message."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        return [*messages, *_messages(self.input)]

    def plain_tools(self) -> tuple[dict[str, Any], ...]:
        wrapped = [
            Tool.model_validate({"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_unset=True)})
            for tool in self.tools
        ]
        return plain_tools(wrapped)

    def turn(self) -> ChatTurn:
        named = self.tool_choice.name if isinstance(self.tool_choice, NamedFunctionTool) else None
        return ChatTurn(
            messages=tuple(self.messages()),
            tools=self.plain_tools(),
            tool_choice="required" if isinstance(self.tool_choice, NamedFunctionTool) else self.tool_choice,
            named_tool=named,
            parallel_tool_calls=self.parallel_tool_calls,
            response_grammar=self.grammar.grammar() if self.grammar else self.text.grammar(),
            template_variables=self.chat_template_kwargs,
            reasoning_effort=self.reasoning.effort,
            sampling=self.sampling(),
            stop=stop_strings(self.stop),
            max_tokens=self.max_output_tokens,
            top_logprobs=(self.top_logprobs or 0) if self.include else None,
            deadline_seconds=self.deadline_seconds,
        )


def _messages(items: Sequence[MessageItem | ReasoningItem | CallItem | CallOutputItem]) -> Iterator[dict[str, Any]]:
    answer: dict[str, Any] = {}  # the assistant's message that is being put together
    for item in items:
        is_assistant = isinstance(item, ReasoningItem | CallItem) or (
            isinstance(item, MessageItem) and item.role == "assistant"
        )
        if answer and (not is_assistant or ("tool_calls" in answer and not isinstance(item, CallItem))):
            yield answer
            answer = {}
        if is_assistant:
            answer = _added({"role": "assistant", "content": "", **answer}, item)
        elif isinstance(item, CallOutputItem):
            yield {"role": "tool", "content": item.output, "tool_call_id": item.call_id}
        elif isinstance(item, MessageItem):
            yield {"role": "system" if item.role == "developer" else item.role, "content": item.content}
    if answer:
        yield answer


def _added(answer: dict[str, Any], item: MessageItem | ReasoningItem | CallItem | CallOutputItem) -> dict[str, Any]:
    match item:
        case ReasoningItem():
            return {**answer, "reasoning_content": answer.get("reasoning_content", "") + (item.content or item.summary)}
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            return {**answer, "tool_calls": [*answer.get("tool_calls", []), call]}
        case MessageItem():
            return {**answer, "content": answer["content"] + item.content}
    return answer
