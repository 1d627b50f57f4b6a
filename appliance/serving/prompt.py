"""A conversation to token ids, exactly as training saw it, with control tokens that only the template can write.

Training tokenises the rendered template as one string, special tokens parsed, and adds none; so does this: a template
that wants a beginning-of-text token writes it, as in transformers' `apply_chat_template`. When a message contains the
text of a control token (`<|im_end|>`), that text alone is tokenised as plain text, so that no message can end its
turn or open another's. Knows nothing of llama.cpp.
"""

import re
import secrets
from collections.abc import Sequence
from typing import Protocol

from appliance.errors import PromptTooLong, RequestError
from appliance.serving.engine import Message
from appliance.text.chat_template import ChatTemplate, TemplateFailed


class Vocabulary(Protocol):
    """What is asked of a tokenizer; thread-safe."""

    @property
    def control_texts(self) -> Sequence[str]:
        """Texts that are parsed as control tokens."""

    @property
    def longest_token_bytes(self) -> int: ...

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]: ...


class PromptEncoder:
    """Renders and tokenises; may be used from several threads."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate, context_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self._context_tokens = context_tokens
        longest_first = sorted(filter(None, vocabulary.control_texts), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids with the assistant's turn opened; raises `PromptTooLong` or `RequestError`."""
        nonce = secrets.token_hex(8)  # no client can guess it
        controls: list[str] = []

        def mark(match: re.Match[str]) -> str:
            controls.append(match[0])
            return f"\ue000{nonce}:{len(controls) - 1}\ue001"

        neutral = [{**message, "content": self._control.sub(mark, message["content"])} for message in messages]
        try:
            text = self._template.render(neutral, add_generation_prompt=True)
        except TemplateFailed as error:
            raise RequestError(str(error), param="messages") from error
        self._require_room(-(-len(text.encode()) // self._vocabulary.longest_token_bytes), "at least ")
        tokens = self._tokenize(re.split(f"\ue000{nonce}:(\\d+)\ue001", text), controls)
        self._require_room(len(tokens))
        return tuple(tokens)

    def _tokenize(self, parts: Sequence[str], controls: Sequence[str]) -> list[int]:
        """`parts` alternates the template's text with indices into `controls`, which are tokenised as plain text."""
        tokens: list[int] = []
        for i, part in enumerate(parts):
            is_control = i % 2 == 1
            text = controls[int(part)] if is_control else part
            tokens += self._vocabulary.tokenize(text, parse_special=not is_control)
        return tokens

    def _require_room(self, tokens: int, qualifier: str = "") -> None:
        if tokens >= self._context_tokens:
            raise PromptTooLong(
                f"The prompt has {qualifier}{tokens} tokens; the limit is {self._context_tokens} for prompt and answer "
                "together. Shorten the messages or start a new conversation.",
                param="messages",
            )
