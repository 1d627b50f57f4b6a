"""A conversation with documents as token ids, the very ones that serving gives a model for it, and where documents lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from appliance.text import passages
from appliance.text.chat_template import TemplateFailed


@dataclass(frozen=True, slots=True)
class Tokens:
    """`bounds` are positions: of each document's first token, and of what follows the last; none without documents."""

    input_ids: list[int]
    bounds: tuple[int, ...] = ()


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    documents: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
) -> Tokens:
    """Each document is tokenised by itself, as what stands before them and what follows; without any, all is one string.

    Raises `TemplateFailed` where the chat template refuses the conversation, or has no place for documents.
    """

    def rendered(each: Sequence[Mapping[str, Any]]) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                [dict(message) for message in each], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"The chat template refuses these messages: {error}") from error
        return text

    pieces = passages.pieces(messages, documents, rendered)
    input_ids: list[int] = []
    bounds = []
    for piece in pieces:
        input_ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        bounds.append(len(input_ids))
    return Tokens(input_ids, tuple(bounds[:-1]) if documents else ())
