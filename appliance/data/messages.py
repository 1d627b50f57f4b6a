"""Messages and texts of rows, as training expects them: known roles in turn, no empty text, no control token."""

import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from appliance.data.defects import Report, Row, SetAside, cut, kind_of

Message = dict[str, str]

# A control token inside a text would be read as the end of a turn: a mistake, or an attack on the template.
CONTROL_TOKEN = re.compile(r"<\|[A-Za-z_]+\|>")


@dataclass(frozen=True, slots=True)
class Spelling:
    """How messages are written: the keys of role and text, and which role each name stands for."""

    role: str
    content: str
    roles: Mapping[str, str]


# Of other formats. Training has no place for them, and any other name may be a person's.
OTHER_ROLES = frozenset(
    {"bot", "developer", "function", "function_call", "model", "observation", "prompter", "tool", "tool_call"}
)
PLAIN_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
CHAT = Spelling("role", "content", PLAIN_ROLES)
SHAREGPT = Spelling("from", "value", {"system": "system", "human": "user", "gpt": "assistant", **PLAIN_ROLES})


def read_messages(value: Any, where: str, report: Report, spelling: Spelling = CHAT) -> list[Message]:
    """A list of messages whose turns alternate."""
    if not isinstance(value, list) or not value:
        raise SetAside(f"{where}: expected a list of messages, found {kind_of(value)}")
    messages = [read_message(each, f"{where}[{position}]", report, spelling) for position, each in enumerate(value)]
    require_turns(messages, where)
    return messages


def read_message(value: Any, place: str, report: Report, spelling: Spelling = CHAT) -> Message:
    if not isinstance(value, dict):
        keys = f"{spelling.role} and {spelling.content}"
        raise SetAside(f"{place}: expected an object with {keys}, found {kind_of(value)}")
    report_stray_keys(value, {spelling.role, spelling.content}, report, f"{place}: ")
    role = _role(value.get(spelling.role), f"{place}.{spelling.role}", report, spelling)
    return {"role": role, "content": read_text(value.get(spelling.content), f"{place}.{spelling.content}", report)}


def require_turns(messages: list[Message], where: str) -> None:
    turns = [message["role"] for message in messages]
    if turns[:1] == ["system"]:
        turns = turns[1:]
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        order = ", ".join(message["role"] for message in messages)
        raise SetAside(f"{where}: turns must alternate user, assistant after at most one system turn; found {order}")


def require_answer_last(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise SetAside(f"no assistant turn among {len(roles)} messages, so there is nothing to learn")
    if roles[-1] != "assistant":
        raise SetAside(f"the last message is from {roles[-1]!r}; a conversation ends with the assistant's answer")


def read_prompt(value: Any, where: str, report: Report, spelling: Spelling = CHAT) -> list[Message]:
    """Messages that end with the user's question; a plain text is one."""
    if isinstance(value, str):
        return [{"role": "user", "content": read_text(value, where, report)}]
    messages = read_messages(value, where, report, spelling)
    if messages[-1]["role"] != "user":
        raise SetAside(f"the {where} ends with {messages[-1]['role']!r}; it must end with the user's question")
    return messages


def read_answer(value: Any, where: str, report: Report, prompt: list[Message]) -> str:
    """The assistant's text: a plain one, a message, or a list that ends with that message after repeating the prompt."""
    if not isinstance(value, list | dict):
        return read_text(value, where, report)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise SetAside(f"{where} is empty")
    messages = []
    for position, each in enumerate(items):
        place = f"{where}[{position}]" if isinstance(value, list) else where
        spelling = SHAREGPT if isinstance(each, dict) and "from" in each else CHAT
        messages.append(read_message(each, place, report, spelling))
    if messages[-1]["role"] != "assistant":
        raise SetAside(f"{where} ends with {messages[-1]['role']!r}; it must end with the assistant's answer")
    if messages[:-1] and messages[:-1] != prompt:
        raise SetAside(f"{where} has other turns before its answer than the prompt")
    return messages[-1]["content"]


def read_text(value: Any, where: str, report: Report) -> str:
    if not isinstance(value, str):
        raise SetAside(f"{where}: expected text, found {kind_of(value)}")
    text = value.strip()
    if not text:
        raise SetAside(f"{where} is empty")
    if text != value:
        report(f"{where} has white space around it, removed", "fixed")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        report(f"{where} has line ends of Windows, which a model would learn to write, replaced", "fixed")
    if (normal := unicodedata.normalize("NFC", text)) != text:
        report(f"{where} is not in Unicode normal form C, normalized", "fixed")
    if token := CONTROL_TOKEN.search(normal):
        raise SetAside(f"{where} holds the control token {cut(token.group())!r}, which would break the chat template")
    return normal


def report_stray_keys(row: Row, known: Collection[str], report: Report, place: str = "") -> None:
    for key in row:
        if key not in known:
            report(f"{place}stray key {cut(key)!r} ignored", "fixed")


def _role(value: Any, place: str, report: Report, spelling: Spelling) -> str:
    if isinstance(value, str) and (name := value.strip().lower()) in spelling.roles:
        if name != value:
            report(f"{place} is {cut(value)!r}, read as {name!r}", "fixed")
        return spelling.roles[name]
    said = f'"{name}"' if isinstance(value, str) and name in OTHER_ROLES else kind_of(value)
    raise SetAside(f"{place} is {said}; known roles: {', '.join(spelling.roles)}")
