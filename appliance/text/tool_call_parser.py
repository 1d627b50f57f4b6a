"""Finds tool calls in an answer while it is streamed, in any format of `tool_calls.py`.

Never raises, whatever the text: what turns out to be no call is text. What comes out does not depend on how the text was
cut into pieces. White space around calls belongs to neither.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.text.call_readers import ArgsReader, CallReader, JsonReader, Signatures, XmlReader
from appliance.text.partial import partial_end
from appliance.text.tool_calls import ToolFormat


@dataclasses.dataclass(frozen=True, slots=True)
class PlainText:
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStarted:
    """`call` counts from 0."""

    call: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    call: int
    text: str


Piece = PlainText | CallStarted | CallArguments


class ToolCallParser:
    """`tools` as OpenAI spells them: only calls of these are calls. With `is_single`, all that follows a call is dropped."""

    def __init__(self, form: ToolFormat, tools: Sequence[Mapping[str, Any]], *, is_single: bool = False) -> None:
        self._form = form
        self._signatures: Signatures = {tool["function"]["name"]: _properties(tool["function"]) for tool in tools}
        self._is_single = is_single
        self._held = ""
        self._space = ""  # white space that is text only if more text follows
        self._state = "start"  # start → text → after → text …, or over after a single call
        self._reader: CallReader | None = None
        self._raw = ""  # of a call that may yet turn out to be none
        self._is_announced = False
        self._is_fresh = False  # nothing but white space has followed a call
        self.calls = 0

    @property
    def is_in_call(self) -> bool:
        return self._reader is not None

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What is still held back, once no more can follow."""
        pieces: list[Piece] = []
        if self._reader is not None and not self._is_announced:
            self._held = self._raw + self._held
            self._tell(self._held, pieces)
        elif self._reader is None and self._state != "over":
            self._tell(self._held, pieces)
        if self._space and not self._is_fresh:
            pieces.append(PlainText(self._space))
        self._held = self._space = ""
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Goes on as far as the held text allows; True when there may be more to do."""
        if self._reader is not None:
            return self._in_call(self._reader, pieces)
        if self._state == "start":
            return self._at_start()
        if self._state == "after":
            return self._after_call()
        if self._state == "over":
            self._held = ""
            return False
        return self._in_text(pieces)

    def _at_start(self) -> bool:
        """Some models leave the marker out, or it is a token without text."""
        text = self._held.lstrip()
        if self._form.marker.startswith(text) and text != self._form.marker:
            return False
        self._state = "text"
        if self._form.bare and not text.startswith(self._form.marker) and text.startswith(self._form.bare):
            head = len(self._held) - len(text) + (self._form.bare == "[")
            self._open(head, needs_arguments=True)
        return True

    def _in_text(self, pieces: list[Piece]) -> bool:
        marker = self._form.marker
        before, is_marked, _ = self._held.partition(marker)
        if not is_marked:
            certain = len(self._held) - partial_end(self._held, marker)
            text, self._held = self._held[:certain], self._held[certain:]
            self._tell(text, pieces)
            return False
        self._tell(before, pieces)
        self._held = self._held[len(before) :]
        self._open(len(marker), needs_arguments=False)
        return True

    def _open(self, head: int, *, needs_arguments: bool) -> None:
        """Reads a call after the first `head` characters."""
        self._raw, self._held = self._held[:head], self._held[head:]
        self._is_announced = False
        match self._form.body:
            case "xml":
                self._reader = XmlReader(self._signatures)
            case "args":
                self._reader = ArgsReader(self._signatures)
            case "json":
                key = self._form.arguments_key
                self._reader = JsonReader(self._signatures, key, needs_arguments=needs_arguments)

    def _in_call(self, reader: CallReader, pieces: list[Piece]) -> bool:
        if self._raw == self._form.marker == "[TOOL_CALLS]" and self._form.body == "json":
            text = self._held.lstrip()
            if not text:
                return False
            if text[0] == "[":
                head = len(self._held) - len(text) + 1
                self._raw, self._held = self._raw + self._held[:head], self._held[head:]
        taken = reader.feed(self._held)
        consumed, self._held = self._held[:taken], self._held[taken:]
        if not self._is_announced:
            self._raw += consumed
        if reader.name is not None and not self._is_announced:
            self._is_announced = True
            self._space = self._raw = ""
            pieces.append(CallStarted(self.calls, reader.name))
            self.calls += 1
        arguments = reader.take()
        if arguments:
            pieces.append(CallArguments(self.calls - 1, arguments))
        if not (reader.is_done or reader.is_failed):
            return False
        self._reader = None
        if self._is_announced:
            self._state = "over" if self._is_single else "after"
            self._is_fresh = True
        else:
            self._state = "text"
            self._tell(self._raw, pieces)
        return True

    def _after_call(self) -> bool:
        """Reads over what closes a call, and finds the next one that shares its marker."""
        text = self._held.lstrip()
        closing, separator = self._form.closing, self._form.separator
        if not text or (closing.startswith(text) and text != closing):
            return False
        self._held = text
        if closing and text.startswith(closing):
            self._held = text[len(closing) :]
        elif separator and text.startswith(separator):
            following = text[len(separator) :].lstrip()
            if not following:
                return False
            if following.startswith("{"):
                self._open(len(text) - len(following), needs_arguments=True)
        self._state = "text"
        return True

    def _tell(self, text: str, pieces: list[Piece]) -> None:
        text = self._space + text
        if self._is_fresh:
            text = text.lstrip()
        told = text.rstrip()
        self._space = text[len(told) :]
        if told:
            self._is_fresh = False
            pieces.append(PlainText(told))


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties", {})
    return properties if isinstance(properties, dict) else {}
