"""Reads training files row by row and says of every defect where it is, what is wrong and what was done.

A row is either repaired (`fixed`) or left out (`set aside`); nothing is dropped in silence. Formats: conversations
`{"messages": [{"role", "content"}]}`, preference triplets `{"prompt", "chosen", "rejected"}` (strings, or a list of
messages as prompt), and FAQ lists `[{"vraag", "antwoord", "metadata"}]` (or `question`, `answer`). Knows nothing of tokens.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.errors import DataError

Row = dict[str, Any]
Report = Callable[[str, Literal["fixed", "set aside"]], None]

ROLES = ("system", "user", "assistant")
# A control token inside a text would be read as the end of a turn: a mistake, or an attack on the template.
CONTROL_TOKEN = re.compile(r"<\|[A-Za-z_]+\|>")
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing wrong in one row. `line` is 1-based."""

    file: str
    line: int
    what: str
    action: Literal["fixed", "set aside"]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}; {self.action}."


class _SetAside(Exception):
    """This row cannot be used; the text says why."""


def read_conversations(path: Path, defects: list[Defect]) -> list[Row]:
    """Rows `{"messages": [...]}` with the roles and contents that training expects."""
    return _read_rows(path, defects, _conversation)


def read_preferences(path: Path, defects: list[Defect]) -> list[Row]:
    """Rows `{"prompt": [messages], "chosen": str, "rejected": str}`; a string prompt becomes one user message."""
    return _read_rows(path, defects, _preference)


def read_faq(path: Path, defects: list[Defect]) -> list[Row]:
    """Rows `{"question", "answer", "metadata"}`."""
    rows: list[Row] = []
    text = _decode(_read_bytes(path), path)
    for line, item in _list_items(text, path):
        _take(item, path, line, defects, _faq_item, rows)
    return _without_copies(rows, path, defects)


def _read_rows(path: Path, defects: list[Defect], parse: Callable[[Row, Report], Row]) -> list[Row]:
    rows: list[Row] = []
    lines = _read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            if number < len(lines):
                defects.append(Defect(path.name, number, "the line is empty", "fixed"))
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            defects.append(Defect(path.name, number, f"not UTF-8 at byte {error.start} of the line", "set aside"))
        except (ValueError, RecursionError) as error:
            defects.append(Defect(path.name, number, f"invalid JSON ({error})", "set aside"))
        else:
            _take(value, path, number, defects, parse, rows)
    return _without_copies(rows, path, defects)


def _take(
    value: Any, path: Path, line: int, defects: list[Defect], parse: Callable[[Row, Report], Row], rows: list[Row]
) -> None:
    def report(what: str, action: Literal["fixed", "set aside"]) -> None:
        defects.append(Defect(path.name, line, what, action))

    try:
        if not isinstance(value, dict):
            raise _SetAside(f"expected an object, found {_shown(value)}")
        _require_whole_characters(value)
        rows.append({**parse(value, report), "line": line})
    except _SetAside as reason:
        report(str(reason), "set aside")


def _require_whole_characters(value: Row) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        raise _SetAside(f"holds {half!a}, half of a character: a text was cut inside an emoji") from None


def _without_copies(rows: list[Row], path: Path, defects: list[Defect]) -> list[Row]:
    first_line: dict[str, int] = {}
    kept = []
    for row in rows:
        content = json.dumps({key: value for key, value in row.items() if key != "line"}, sort_keys=True)
        if content in first_line:
            what = f"an exact copy of line {first_line[content]}"
            defects.append(Defect(path.name, row["line"], what, "set aside"))
        else:
            first_line[content] = row["line"]
            kept.append(row)
    return kept


def _conversation(row: Row, report: Report) -> Row:
    _report_stray_keys(row, {"messages"}, report)
    messages = _messages(row.get("messages"), "messages", report)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise _SetAside(f"no assistant turn among {len(roles)} messages, so there is nothing to learn")
    if roles[-1] != "assistant":
        raise _SetAside(f"the last message is from {roles[-1]!r}; a conversation ends with the assistant's answer")
    return {"messages": messages}


def _preference(row: Row, report: Report) -> Row:
    _report_stray_keys(row, {"prompt", "chosen", "rejected"}, report)
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = _messages(prompt, "prompt", report)
    if messages[-1]["role"] != "user":
        raise _SetAside(f"the prompt ends with {messages[-1]['role']!r}; it must end with the user's question")
    chosen, rejected = (_text(row.get(key), key, report) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise _SetAside("chosen and rejected are the same text")
    return {"prompt": messages, "chosen": chosen, "rejected": rejected}


def _faq_item(item: Row, report: Report) -> Row:
    question, answer = ("vraag", "antwoord") if "vraag" in item else ("question", "answer")
    _report_stray_keys(item, {question, answer, "metadata"}, report)
    texts = {key: _text(item.get(name), name, report) for key, name in (("question", question), ("answer", answer))}
    metadata = item.get("metadata", {})
    if not isinstance(metadata, dict):
        raise _SetAside(f"metadata: expected an object, found {_shown(metadata)}")
    return {**texts, "metadata": metadata}


def _messages(value: Any, where: str, report: Report) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _SetAside(f"{where}: expected a list of messages, found {_shown(value)}")
    messages = []
    for position, message in enumerate(value):
        place = f"{where}[{position}]"
        if not isinstance(message, dict):
            raise _SetAside(f"{place}: expected an object with role and content, found {_shown(message)}")
        _report_stray_keys(message, {"role", "content"}, report, f"{place}: ")
        role = _role(message.get("role"), place, report)
        messages.append({"role": role, "content": _text(message.get("content"), f"{place}.content", report)})
    turns = [message["role"] for message in messages]
    if turns[0] == "system":
        turns = turns[1:]
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        order = ", ".join(message["role"] for message in messages)
        raise _SetAside(f"{where}: turns must alternate user, assistant after at most one system turn; found {order}")
    return messages


def _role(value: Any, place: str, report: Report) -> str:
    if isinstance(value, str) and (role := value.strip().lower()) in ROLES:
        if role != value:
            report(f"{place}.role is {value!r}, read as {role!r}", "fixed")
        return role
    raise _SetAside(f"{place}.role is {_shown(value)}; known roles: {', '.join(ROLES)}")


def _text(value: Any, where: str, report: Report) -> str:
    if not isinstance(value, str):
        raise _SetAside(f"{where}: expected text, found {_shown(value)}")
    text = value.strip()
    if not text:
        raise _SetAside(f"{where} is empty")
    if text != value:
        report(f"{where} has white space around it, removed", "fixed")
    if (normal := unicodedata.normalize("NFC", text)) != text:
        report(f"{where} is not in Unicode normal form C, normalized", "fixed")
    if token := CONTROL_TOKEN.search(normal):
        raise _SetAside(f"{where} holds the control token {token.group()!r}, which would break the chat template")
    return normal


def _report_stray_keys(row: Mapping[str, Any], known: set[str], report: Report, place: str = "") -> None:
    for key in row:
        if key not in known:
            report(f"{place}stray key {key!r} ignored", "fixed")


def _list_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list with the line each begins on; the standard parser alone keeps no positions."""
    blank = re.compile(r"[\s,]*")
    decoder = json.JSONDecoder()
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(whole, list):
        raise DataError(f"{path}: expected a JSON list of questions and answers, found {_shown(whole)}.")
    position = text.index("[") + 1
    for _ in whole:
        position = _end(blank, text, position)
        item, end = decoder.raw_decode(text, position)
        yield text.count("\n", 0, position) + 1, item
        position = end


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; correct the path in the recipe's [data] table.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise DataError(f"{path} is empty; it must hold at least one row.")
    return content


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error


def _shown(value: Any) -> str:
    """A value for an error message; long ones are cut, since rows may hold personal data."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
