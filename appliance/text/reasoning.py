"""Splits what a reasoning model thinks (`<think>…</think>` before its answer) from the answer, while it is streamed.

What comes out does not depend on how the text was cut into pieces. Knows nothing of models or templates but these markers.
"""

import dataclasses
from enum import Enum, auto

from appliance.text.partial import partial_end


@dataclasses.dataclass(frozen=True, slots=True)
class Markers:
    opening: str
    closing: str


THINK = Markers("<think>", "</think>")
MISTRAL_THINK = Markers("[THINK]", "[/THINK]")


def markers_of(template: str) -> Markers:
    """Those that a chat template mentions; models whose template knows none use `<think>` when they think at all."""
    return MISTRAL_THINK if MISTRAL_THINK.opening in template and THINK.closing not in template else THINK


def opening_of(prompt: str, markers: Markers) -> str:
    """The end of a rendered prompt that is the beginning of the answer's thinking, such as "<think>\\n"; "" without one."""
    bare = prompt.rstrip()
    if bare.endswith(markers.closing):
        bare = bare[: -len(markers.closing)].rstrip()
    return prompt[len(bare) - len(markers.opening) :] if bare.endswith(markers.opening) else ""


class _State(Enum):
    START = auto()
    THINKING = auto()
    CLOSED = auto()  # only white space has followed the closing marker
    ANSWER = auto()


class ReasoningSplitter:
    """Thinking is recognised at the very beginning only. White space around it belongs to neither part."""

    def __init__(self, markers: Markers, opening: str = "") -> None:
        self._markers = markers
        self._state = _State.START
        self._held = ""
        self._has_thought = False
        self.push(opening)

    @property
    def is_thinking(self) -> bool:
        """Thinking has begun, and nothing of the answer has followed it."""
        return self._state in (_State.THINKING, _State.CLOSED)

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and answer that are certain after this text."""
        self._held += text
        reasoning = content = ""
        if self._state is _State.START:
            self._begin()
        if self._state is _State.THINKING:
            reasoning = self._think()
        if self._state is _State.CLOSED:
            self._held = self._held.lstrip()
            self._state = _State.ANSWER if self._held else _State.CLOSED
        if self._state is _State.ANSWER:
            content, self._held = self._held, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """What is still held back, once no more can follow."""
        held, self._held = self._held, ""
        return (self._trimmed(held.rstrip()), "") if self._state is _State.THINKING else ("", held)

    def _begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._markers.opening):
            self._state = _State.THINKING
            self._held = text[len(self._markers.opening) :]
        elif not self._markers.opening.startswith(text):
            self._state = _State.ANSWER

    def _think(self) -> str:
        thought, is_closed, rest = self._held.partition(self._markers.closing)
        if is_closed:
            self._state = _State.CLOSED
            self._held = rest
            return self._trimmed(thought.rstrip())
        certain = self._held[: len(self._held) - partial_end(self._held, self._markers.closing)].rstrip()
        self._held = self._held[len(certain) :]
        return self._trimmed(certain)

    def _trimmed(self, thought: str) -> str:
        if not self._has_thought:
            thought = thought.lstrip()
            self._has_thought = bool(thought)
        return thought
