"""Readers of one tool call's body, fed with text as it arrives; one per kind of body. Used by `tool_call_parser.py`.

A reader takes characters until the call is done, or until it can be none (`is_failed`). Arguments come out as JSON text as
soon as they are certain; `name` is known before the first of them.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

SPACE = " \t\r\n"
MAX_NAME_CHARACTERS = 200
PARAMETER_END = "</parameter>"
# By name, the types that each parameter's schema admits.
Signatures = Mapping[str, Mapping[str, Any]]


class CallReader(Protocol):
    name: str | None
    is_done: bool
    is_failed: bool

    def feed(self, text: str) -> int:
        """Returns how many characters were taken; all of them unless the call is done or failed."""

    def take(self) -> str:
        """Arguments that have become certain since the last time."""


class _Reader:
    """Feeds characters one by one to `_read`, which says whether it took the character."""

    def __init__(self, signatures: Signatures) -> None:
        self.name: str | None = None
        self.is_done = self.is_failed = False
        self._signatures = signatures
        self._arguments: list[str] = []

    def feed(self, text: str) -> int:
        for i, char in enumerate(text):
            is_taken = self._read(char)
            if self.is_done or self.is_failed:
                return i + is_taken
        return len(text)

    def take(self) -> str:
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _read(self, char: str) -> bool:
        raise NotImplementedError

    def _fail(self) -> bool:
        self.is_failed = True
        return False


class JsonReader(_Reader):
    """{"name": "…", "arguments": {…}} with the keys in any order; other keys are read over."""

    def __init__(self, signatures: Signatures, arguments_key: str, *, needs_arguments: bool) -> None:
        super().__init__(signatures)
        self._keys = {"arguments", "parameters", arguments_key}
        self._needs_arguments = needs_arguments
        self._phase = "start"
        self._key = ""
        self._text: list[str] = []
        self._value = _ValueEnd()
        self._known: str | None = None
        self._early: str | None = None  # arguments that came before the name
        self._has_arguments = False

    def _read(self, char: str) -> bool:
        if self._phase == "key":
            return self._read_key(char)
        if self._phase == "value":
            return self._read_value(char)
        if char in SPACE:
            return True
        if self._phase == "colon" and char == ":":
            self._phase = "before value"
            return True
        if self._phase == "before value":
            self._phase = "value"
            self._text, self._value = [], _ValueEnd()
            return self._read_value(char)
        if self._phase == "next" and char == ",":
            self._phase = "member"
            return True
        if char == "}" and self._phase in ("member", "next"):
            return self._finish()
        if self._phase == "start" and char == "{":
            self._phase = "member"
            return True
        if self._phase == "member" and char == '"':
            self._phase, self._text, self._value = "key", ['"'], _ValueEnd()
            self._value.feed(char)
            return True
        return self._fail()

    def _read_key(self, char: str) -> bool:
        self._text.append(char)
        if self._value.feed(char):
            key = _loaded("".join(self._text))
            self._key = key if isinstance(key, str) else ""
            self._phase = "colon"
        return True

    def _read_value(self, char: str) -> bool:
        is_first = not self._text
        is_ended = self._value.feed(char)
        is_scalar_end = is_ended and self._value.is_scalar
        if not is_scalar_end:
            self._text.append(char)
        if self._key in self._keys and self._known is not None and not self._has_arguments:
            if is_first and char == "{":
                self.name = self._known
            if self.name is not None and self._text[0] == "{":
                self._arguments.append(char)
        if not is_ended:
            return True
        if not self._end_of_value("".join(self._text)):
            return self._fail()
        self._phase = "next"
        return self._read(char) if is_scalar_end else True

    def _end_of_value(self, text: str) -> bool:
        if self._key == "name" and self._known is None:
            name = _loaded(text)
            if not isinstance(name, str) or name not in self._signatures:
                return False
            self._known = name
            if self._early is not None:
                self._start(self._early)
        elif self._key in self._keys and not self._has_arguments and self._early is None:
            if self.name is not None:
                self._has_arguments = True
                return True
            arguments = _object_text(text)
            if arguments is None:
                return False
            if self._known is None:
                self._early = arguments
            else:
                self._start(arguments)
        return True

    def _start(self, arguments: str) -> None:
        self.name, self._has_arguments = self._known, True
        self._arguments.append(arguments)

    def _finish(self) -> bool:
        if not self._has_arguments:
            if self._known is None or self._needs_arguments:
                return self._fail()
            self._start("{}")
        self.is_done = True
        return True


class ArgsReader(_Reader):
    """name[ARGS]{…}, or name[CALL_ID]id[ARGS]{…}."""

    _HEAD = re.compile(r"\s*([a-zA-Z0-9_.-]+)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]")

    def __init__(self, signatures: Signatures) -> None:
        super().__init__(signatures)
        self._head = ""
        self._value = _ValueEnd()
        self._is_open = False

    def _read(self, char: str) -> bool:
        if self.name is None:
            return self._read_head(char)
        if not self._is_open:
            if char in SPACE:
                return True
            if char != "{":
                self._arguments.append("{}")
                self.is_done = True
                return False
            self._is_open = True
        self._arguments.append(char)
        self.is_done = self._value.feed(char)
        return True

    def _read_head(self, char: str) -> bool:
        self._head += char
        if char != "]" or not self._head.endswith("[ARGS]"):
            return True if len(self._head) < MAX_NAME_CHARACTERS else self._fail()
        head = self._HEAD.fullmatch(self._head)
        if head is None or head[1] not in self._signatures:
            self.is_failed = True
            return True
        self.name = head[1]
        return True


class XmlReader(_Reader):
    """<function=name>, <parameter=key>⏎value⏎</parameter> any number of times, </function>."""

    def __init__(self, signatures: Signatures) -> None:
        super().__init__(signatures)
        self._held = ""  # of a tag
        self._key: str | None = None
        self._text: list[str] = []  # of a parameter
        self._count = 0

    def _read(self, char: str) -> bool:
        if self._key is not None:
            self._text.append(char)
            if char == ">" and "".join(self._text[-len(PARAMETER_END) :]) == PARAMETER_END:
                self._add(self._key, "".join(self._text[: -len(PARAMETER_END)]))
                self._text, self._key = [], None
            return True
        if not self._held and char in SPACE:
            return True
        expected = ("<function=",) if self.name is None else ("<parameter=", "</function>")
        held = self._held + char
        if not any(tag.startswith(held) or (held.startswith(tag) and len(held) < MAX_NAME_CHARACTERS) for tag in expected):
            return self._fail()
        self._held = held
        if char == ">":
            self._held = ""
            return self._tag(held)
        return True

    def _tag(self, tag: str) -> bool:
        if tag == "</function>":
            self._arguments.append("}" if self._count else "{}")
            self.is_done = True
        elif self.name is None:
            name = tag.removeprefix("<function=").removesuffix(">").strip()
            self.is_failed = name not in self._signatures
            self.name = None if self.is_failed else name
        else:
            self._key = tag.removeprefix("<parameter=").removesuffix(">").strip()
        return True

    def _add(self, key: str, text: str) -> None:
        text = text.removeprefix("\n").removesuffix("\n")
        assert self.name is not None
        schema = self._signatures[self.name].get(key, {})
        kind = schema.get("type") if isinstance(schema, dict) else None
        value = text if kind == "string" else _loaded(text, text)
        told = json.dumps(value, ensure_ascii=False)
        self._arguments.append(f"{', ' if self._count else '{'}{json.dumps(key, ensure_ascii=False)}: {told}")
        self._count += 1


class _ValueEnd:
    """Finds where a JSON value ends: on its last character; for a number or word, on the first that is not part of it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._is_first = True
        self.is_scalar = False

    def feed(self, char: str) -> bool:
        if self._is_first:
            self._is_first = False
            self.is_scalar = char not in '{["'
        if self.is_scalar:
            return char in ",]}" or char in SPACE
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
                return self._depth == 0
            return False
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def _object_text(text: str) -> str | None:
    """The JSON text of an arguments object, which some models write as text within text, or as null."""
    value = _loaded(text)
    if isinstance(value, str):
        text, value = value, _loaded(value)
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None


def _loaded(text: str, default: Any = "") -> Any:
    """The JSON value of `text`, line breaks in strings allowed, or `default`."""
    try:
        return json.loads(text, strict=False, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return default


def _not_json(word: str) -> Any:
    raise ValueError(word)
