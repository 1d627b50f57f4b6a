"""Tools as OpenAI's chat completions spell them. Knows nothing of routes."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from appliance.serving.api.fields import MAX_GRAMMAR_BYTES, FunctionName, Strict

MAX_TOOLS = 128
MAX_CALLS = 128
CallId = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; without one, the function has no arguments.")
    strict: bool | None = Field(
        None, description="Arguments always follow the schema; with true, one that cannot be enforced is refused."
    )

    @field_validator("parameters")
    @classmethod
    def _is_of_an_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters is not None and parameters.get("type", "object") != "object":
            raise ValueError("must be the schema of an object")
        if parameters is not None and not isinstance(parameters.get("properties", {}), dict):
            raise ValueError("properties must be an object")
        return parameters


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Strict):
    name: FunctionName
    arguments: str = Field(description="JSON text.")


class CalledTool(Strict):
    """A call that an earlier answer made."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="Accepted and not used.")

    def plain(self) -> dict[str, Any]:
        return {"id": self.id, "type": self.type, "function": self.function.model_dump()}


def plain_tools(tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """For the chat template, in the client's words. Raises `ValueError`."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError("tools: two functions have the same name.")
    plain = tuple(tool.model_dump(exclude_unset=True) for tool in tools)
    size = len(json.dumps(plain))
    if size > MAX_GRAMMAR_BYTES:
        raise ValueError(f"tools: {size} bytes are more than the limit of {MAX_GRAMMAR_BYTES}.")
    return plain
