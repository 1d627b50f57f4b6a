"""How documents stand in a prompt, the same for whoever renders one: training, conversion and serving.

They stand at the end of the system message, in an order that their reader chooses. Each is tokenised by itself, so that its
tokens are the same whatever stands before it: the conversation is rendered with a mark in their place, then parted there.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appliance.text.chat_template import TemplateFailed

MOST_DOCUMENTS = 64  # in one prompt
MOST_ID_CHARACTERS = 512
SEPARATOR = "\n\n"  # between the system prompt and the first document

# Of messages; raises `TemplateFailed` where the template refuses them.
Rendered = Callable[[Sequence[Mapping[str, Any]]], str]


def shown(name: str, text: str) -> str:
    """The text of a document in a prompt, with the name by which an answer may refer to it."""
    return f"<document id={json.dumps(name, ensure_ascii=False)}>\n{text.strip()}\n</document>\n"


def placed(messages: Sequence[Mapping[str, Any]], text: str, rendered: Rendered) -> str:
    """The rendered conversation with a text at the end of its system message, or where a template has none before the first.

    Raises `TemplateFailed`.
    """
    first, *rest = messages
    if first["role"] == "system":
        return rendered([{**first, "content": f"{first['content']}{SEPARATOR}{text}"}, *rest])
    try:
        return rendered([{"role": "system", "content": text}, *messages])
    except TemplateFailed:
        return rendered([{**first, "content": f"{text}{SEPARATOR}{first['content']}"}, *rest])


def parted(text: str, mark: str) -> tuple[str, str]:
    """What stands before the documents, and what follows them; raises `TemplateFailed` unless the mark is there once."""
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise TemplateFailed(
            "This model's chat template does not show the first message just once, so documents have no place in it; "
            "put their text into a message."
        )
    return before, after


def pieces(messages: Sequence[Mapping[str, Any]], documents: Sequence[Mapping[str, str]], rendered: Rendered) -> list[str]:
    """A rendered conversation in what is tokenised each by itself: what stands before the documents, each, what follows.

    A single piece where there are no documents (objects with `id` and `text`). Raises `TemplateFailed`.
    """
    if not documents:
        return [rendered(messages)]
    mark = f"[{secrets.token_hex(8)}:documents]"  # no text has it
    before, after = parted(placed(messages, mark, rendered), mark)
    return [before, *(shown(each["id"], each["text"]) for each in documents), after]


def repeated(documents: Sequence[tuple[str, str]]) -> tuple[int, str, int] | None:
    """The first of documents, given as (id, text), that repeats another: its index, what it repeats, the other's index.

    Which of two texts with one id is meant, nobody could say; the same text twice is only read twice.
    """
    ids: dict[str, int] = {}
    texts: dict[str, int] = {}
    for at, (name, text) in enumerate(documents):
        for known, key, what in ((ids, name, "id"), (texts, text.strip(), "text")):
            if key in known:
                return at, what, known[key]
            known[key] = at
    return None
