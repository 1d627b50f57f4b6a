"""A prompt to token ids, exactly as training saw it, with control tokens that only the template can write.

Training tokenises the rendered template as one string, special tokens parsed, and adds none; so does this: a template
that wants a beginning-of-text token writes it, as in transformers' `apply_chat_template`. Where a client's text (messages,
tools, template variables) contains the text of a control token (`<|im_end|>`), that text alone is tokenised as plain text,
so that nobody can end a turn or open another's. Knows nothing of llama.cpp.
"""

import dataclasses
import itertools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from appliance.errors import PromptTooLong, RequestError
from appliance.serving.passages import Passages
from appliance.serving.requests import ChatPrompt, Prompt, TextPrompt
from appliance.text import passages as passage_texts
from appliance.text import tool_calls
from appliance.text.chat_template import ChatTemplate, TemplateFailed
from appliance.text.reasoning import markers_of, opening_of

RESERVED_VARIABLES = frozenset(("self", "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"))


class Vocabulary(Protocol):
    """What is asked of a tokenizer; thread-safe."""

    @property
    def control_texts(self) -> Sequence[str]:
        """Texts that are parsed as control tokens."""

    @property
    def longest_token_bytes(self) -> int: ...

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """The first `shared_tokens` come from system messages and tools alone, whatever is asked after them.

    `opening` is the end of the rendered prompt that belongs to the answer, such as "<think>\\n"; `passages` are where
    documents lie.
    """

    tokens: tuple[int, ...]
    shared_tokens: int = 0
    opening: str = ""
    passages: Passages | None = None


class PromptEncoder:
    """Renders and tokenises; may be used from several threads."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate, context_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self._context_tokens = context_tokens
        self._format = tool_calls.detect(template.source)
        longest_first = sorted(filter(None, vocabulary.control_texts), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Token ids, for a conversation with the assistant's turn opened; raises `PromptTooLong` or `RequestError`."""
        if isinstance(prompt, ChatPrompt):
            return self._encode_chat(prompt)
        if isinstance(prompt, TextPrompt):
            self._require_room(self._fewest_tokens(prompt.text), "prompt", "at least ")
            tokens = tuple(self._vocabulary.tokenize(prompt.text, parse_special=False))
        else:
            tokens = prompt.tokens
        if not tokens:
            raise RequestError("The prompt is empty; give at least one token.", param="prompt")
        self._require_room(len(tokens), "prompt")
        return EncodedPrompt(tokens)

    def render(self, prompt: ChatPrompt) -> str:
        """The text that a conversation becomes; raises `RequestError`."""
        marks = _Marks(self._control)
        text = marks.restored(self._rendered(self._shown(prompt, marks), add_generation_prompt=True))
        return text.replace(marks.place, "".join(passage_texts.shown(each.id, each.text) for each in prompt.documents))

    def _encode_chat(self, prompt: ChatPrompt) -> EncodedPrompt:
        marks = _Marks(self._control)
        shown = self._shown(prompt, marks)
        text = self._rendered(shown, add_generation_prompt=True)
        self._require_room(self._fewest_tokens(text), "messages", "at least ")
        if prompt.documents:
            told = "".join(each.text for each in prompt.documents)
            self._require_room(self._fewest_tokens(text + told), "documents", "at least ")
            return self._with_documents(prompt, marks, shown, text)
        tokens = self._tokenize(marks, text)
        self._require_room(len(tokens), "messages")
        shared = self._tokenize(marks, self._shared_text(shown))
        return EncodedPrompt(tuple(tokens), _common(tokens, shared), self._opening(shown, text))

    def _with_documents(self, prompt: ChatPrompt, marks: "_Marks", shown: "_Shown", text: str) -> EncodedPrompt:
        """Documents go where their place is marked, each of them tokenised by itself."""
        try:
            before, after = passage_texts.parted(text, marks.place)
        except TemplateFailed as error:
            raise RequestError(str(error), param="documents") from error
        tokens = self._tokenize(marks, before)
        bounds = [len(tokens)]
        for document in prompt.documents:
            tokens += self._tokenize(marks, marks.neutral(passage_texts.shown(document.id, document.text)))
            bounds.append(len(tokens))
        tokens += self._tokenize(marks, after)
        if len(tokens) >= self._context_tokens:
            raise PromptTooLong(
                f"The prompt has {len(tokens)} tokens, {bounds[-1] - bounds[0]} in {len(prompt.documents)} "
                f"documents; the limit is {self._context_tokens} for prompt and answer together. Send fewer or shorter.",
                param="documents",
            )
        passages = Passages(tuple(bounds), tuple(document.score for document in prompt.documents))
        shared = self._tokenize(marks, self._shared_text(shown).partition(marks.place)[0])
        return EncodedPrompt(tuple(tokens), _common(tokens[: bounds[0]], shared), self._opening(shown, text), passages)

    def _shown(self, prompt: ChatPrompt, marks: "_Marks") -> "_Shown":
        reserved = RESERVED_VARIABLES & prompt.template_variables.keys()
        if reserved:
            raise RequestError(
                f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be set; the server gives it to the template.",
                param="chat_template_kwargs",
            )
        variables = marks.neutral(prompt.template_variables)
        place = [marks.place] if prompt.documents else []
        if self._format.is_native:
            messages = marks.neutral(tool_calls.for_template(prompt.messages, self._format))
            return _Shown(messages, marks.neutral(prompt.tools) or None, place, variables)
        added = [marks.neutral(tool_calls.tools_text(prompt.tools))] if prompt.tools else []
        return _Shown(marks.neutral(tool_calls.as_text(prompt.messages)), None, [*added, *place], variables)

    def _shared_text(self, shown: "_Shown") -> str:
        """What two conversations have in common that share the leading system messages and the tools, and no more.

        Two, because many templates refuse a conversation without a user.
        """
        system = list(itertools.takewhile(lambda message: message["role"] == "system", shown.messages))
        if not (system or shown.tools or shown.added):
            return ""
        texts = []
        for question in ("a", "b"):
            asked = dataclasses.replace(shown, messages=[*system, {"role": "user", "content": question}])
            try:
                texts.append(self._rendered(asked, add_generation_prompt=False))
            except RequestError:
                return ""  # the template wants another conversation; a prefix that is not known is only read again
        return texts[0][: _common(*texts)]

    def _opening(self, shown: "_Shown", text: str) -> str:
        opening = opening_of(text, markers_of(self._template.source))
        is_message = bool(opening) and self._rendered(shown, add_generation_prompt=False).endswith(opening)
        return "" if is_message else opening

    def _rendered(self, shown: "_Shown", *, add_generation_prompt: bool) -> str:
        given = {"tools": shown.tools, "add_generation_prompt": add_generation_prompt, **shown.variables}

        def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
            return self._template.render(messages, **given)

        try:
            text = passage_texts.SEPARATOR.join(shown.added)
            return passage_texts.placed(shown.messages, text, rendered) if text else rendered(shown.messages)
        except TemplateFailed as error:
            raise RequestError(str(error), param="messages") from error

    def _tokenize(self, marks: "_Marks", text: str) -> list[int]:
        tokens: list[int] = []
        for part, is_control in marks.parts(text):
            tokens += self._vocabulary.tokenize(part, parse_special=not is_control)
        return tokens

    def _fewest_tokens(self, text: str) -> int:
        return -(-len(text.encode()) // self._vocabulary.longest_token_bytes)

    def _require_room(self, tokens: int, param: str, qualifier: str = "") -> None:
        if tokens >= self._context_tokens:
            raise PromptTooLong(
                f"The prompt has {qualifier}{tokens} tokens; the limit is {self._context_tokens} for prompt and answer "
                "together. Shorten the messages or start a new conversation.",
                param=param,
            )


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """A conversation as the template knows it, without control texts; `added` is what it does not know to show.

    That is a description of the tools, where it knows none, and the place of documents.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    added: list[str]
    variables: dict[str, Any]


class _Marks:
    """Stands marks in for control texts that a client wrote, and finds them again in what was rendered."""

    def __init__(self, control: re.Pattern[str]) -> None:
        self._control = control
        self._nonce = secrets.token_hex(8)  # no client can guess it
        self._found: list[str] = []
        self.place = f"[{self._nonce}:documents]"
        self._mark = re.compile(rf"\[{self._nonce}:(\d+)\]")  # no character that `tojson` or `string` would escape

    def neutral(self, value: Any) -> Any:
        """The same JSON value without control texts, in keys neither."""
        match value:
            case str():
                return self._control.sub(self._note, value)
            case Mapping():
                return {self.neutral(key): self.neutral(each) for key, each in value.items()}
            case list() | tuple():
                return [self.neutral(each) for each in value]
        return value

    def parts(self, text: str) -> list[tuple[str, bool]]:
        """The template's text and, marked True, the control texts of clients, in order."""
        alternating = self._mark.split(text)
        return [(self._found[int(part)], True) if i % 2 else (part, False) for i, part in enumerate(alternating)]

    def restored(self, text: str) -> str:
        return "".join(part for part, _ in self.parts(text))

    def _note(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
        return f"[{self._nonce}:{len(self._found) - 1}]"


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
