"""Formats in which models call tools: which one a chat template speaks, and the text for models whose template knows none.

`detect(template)` is the entry; reading calls out of answers is `tool_call_parser.py`. Only formats that can be read back
are used: a template that shows tools in another one is treated as if it knew no tools. Knows nothing of HTTP or engines.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Body = Literal["json", "xml", "args"]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call is `marker`, a body and `closing`. `bare` is what an answer without marker begins with when it is a call.

    Bodies: "json" {"name": …, <arguments_key>: {…}}; "xml" <function=name><parameter=key>…; "args" name[ARGS]{…}.
    """

    body: Body
    marker: str
    closing: str = ""
    arguments_key: str = "arguments"
    bare: str = ""
    separator: str = ""  # between calls that share one marker
    is_native: bool = True  # the template describes the tools itself


HERMES = ToolFormat("json", "<tool_call>", "</tool_call>")
FALLBACK = dataclasses.replace(HERMES, is_native=False)
QWEN_XML = ToolFormat("xml", "<tool_call>", "</tool_call>")
LLAMA = ToolFormat("json", "<|python_tag|>", arguments_key="parameters", bare="{", separator=";")
MISTRAL = ToolFormat("json", "[TOOL_CALLS]", "]", bare="[", separator=",")
MISTRAL_ARGS = ToolFormat("args", "[TOOL_CALLS]")

TOOLS_TEXT = """# Tools

You may call one or more functions to help with the request. Their signatures are in <tools></tools>:
<tools>
{tools}
</tools>

To call one, answer with a JSON object of its name and arguments in <tool_call></tool_call>:
<tool_call>
{{"name": <function name>, "arguments": <arguments object>}}
</tool_call>"""
_READS_TOOLS = re.compile(r"\btools\b")
_HERMES = re.compile(r"""<tool_call>[\s'"+~{}-]*(?:\\n)?[\s'"+~{}-]*\{\\?"name""")
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


@functools.lru_cache(maxsize=64)
def detect(template: str) -> ToolFormat:
    """The format of a chat template's source, found without running it."""
    if not _READS_TOOLS.search(template):
        return FALLBACK
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<function=" in template and "<tool_call>" in template:
        return QWEN_XML
    if _HERMES.search(template):
        return HERMES
    if "ipython" in template and '"parameters"' in template:
        return LLAMA
    return FALLBACK


def for_template(messages: Sequence[Mapping[str, Any]], form: ToolFormat) -> list[dict[str, Any]]:
    """Messages as a template that knows tools wants them: arguments as objects, and ids that Mistral's accepts."""
    shown = []
    for message in messages:
        copy = {**message, "content": message.get("content") or ""}
        if message.get("tool_calls"):
            copy["tool_calls"] = [_call_for_template(call, form) for call in message["tool_calls"]]
        else:
            copy.pop("tool_calls", None)
        if "tool_call_id" in message:
            copy["tool_call_id"] = _id_for_template(message["tool_call_id"], form)
        shown.append(copy)
    return shown


def as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: calls and their results become text of the assistant and the user."""
    shown: list[dict[str, Any]] = []
    was_tool = False
    for message in messages:
        copy = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        copy["content"] = message.get("content") or ""
        is_tool = message["role"] == "tool"
        if is_tool:
            copy = {"role": "user", "content": f"<tool_response>\n{copy['content']}\n</tool_response>"}
        if message.get("tool_calls"):
            calls = "\n".join(_call_as_text(call["function"]) for call in message["tool_calls"])
            copy["content"] = f"{copy['content']}\n{calls}" if copy["content"] else calls
        if is_tool and was_tool:
            shown[-1]["content"] += f"\n{copy['content']}"
        else:
            shown.append(copy)
        was_tool = is_tool
    return shown


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Describes tools to a model whose template cannot; goes into the system message."""
    return TOOLS_TEXT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def _call_for_template(call: Mapping[str, Any], form: ToolFormat) -> dict[str, Any]:
    function = {**call["function"], "arguments": _parsed(call["function"]["arguments"])}
    return {**call, "id": _id_for_template(call.get("id", ""), form), "type": "function", "function": function}


def _id_for_template(call_id: str, form: ToolFormat) -> str:
    """Mistral's templates refuse ids that are not nine letters or digits; any such name for the call will do."""
    if form.marker != MISTRAL.marker or _MISTRAL_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _call_as_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": _parsed(function["arguments"])}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _parsed(arguments: Any) -> Any:
    """Arguments come as JSON text; what an answer cut short has left of it stays text."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments
