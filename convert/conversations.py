"""Conversations of a dataset, as conversion reads them: calibration, verification and measurement by language.

`render` and `token_ids` are how all of these write a conversation: with the model's own chat template, as training does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import DataError, ModelFileError
from appliance.text import languages, passages

Messages = Sequence[Mapping[str, str]]
UNTOLD = "untold"  # too short to tell its language
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation that ends with an answer, and the documents that it rests on, each with an `id` and a `text`."""

    messages: Messages
    documents: Sequence[Mapping[str, str]]
    is_held_out: bool = False

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def read(path: Path) -> list[Messages]:
    """The conversations of a dataset's file, JSON lines with messages; raises `DataError`.

    Documents of a row stand in its first message, nearly as in serving, which has their tokens end where they do.
    """
    return [_with_documents(each) for each in read_asked(path)]


def read_asked(path: Path) -> list[Asked]:
    """The same, with documents by themselves."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [
            Asked(row["messages"], [{key: each[key] for key in ("id", "text")} for each in row.get("documents", ())])
            for row in lines
        ]
        lacking = [number for number, row in enumerate(rows, 1) if "user" not in {each["role"] for each in row.messages}]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of conversations ({error}); `appliance data check` makes one.") from error
    if not rows:
        raise DataError(f"{path} holds no conversation, so nothing can be verified.")
    if lacking:
        raise DataError(
            f"{path}: row {lacking[0]} has no user turn; `appliance data check` makes a file that can be verified."
        )
    return rows


def read_preferences(path: Path) -> list[Messages]:
    """The conversations of a dataset's triplets, each with the answer that is preferred and with the other."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return [
            [*row["prompt"], {"role": "assistant", "content": row[answer]}]
            for row in rows
            for answer in ("chosen", "rejected")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of preferences ({error}); `appliance data check` makes one.") from error


def by_language(rows: Sequence[Messages], codes: Sequence[str]) -> dict[str, list[Messages]]:
    """Rows under the language of their assistant's turns, or of all turns where there is none; in the order of `codes`."""
    groups: dict[str, list[Messages]] = {code: [] for code in [*codes, UNTOLD]}
    for messages in rows:
        groups[language_of(messages, codes)].append(messages)
    return {code: group for code, group in groups.items() if group}


def language_of(messages: Messages, codes: Sequence[str]) -> str:
    """The one of `codes` that its answers are in, or `UNTOLD`."""
    answers = [each["content"] for each in messages if each["role"] == "assistant"]
    text = "\n".join(answers or [each["content"] for each in messages])
    return codes[0] if len(codes) == 1 else languages.detect(text, codes) or UNTOLD


def _with_documents(asked: Asked) -> Messages:
    """What follows a system message, and stands before any other."""
    if not asked.documents:
        return asked.messages
    first, *rest = asked.messages
    text = "".join(passages.shown(each["id"], each["text"]) for each in asked.documents)
    parts = (first["content"], text) if first["role"] == "system" else (text, first["content"])
    return [{**first, "content": passages.SEPARATOR.join(parts)}, *rest]


def render(tokenizer: Any, messages: Messages, name: str, *, add_generation_prompt: bool = False, **variables: Any) -> str:
    """The text of a conversation; `name` is what an error calls it (row 3, conversation 7 of nl).

    Raises `ModelFileError` for a model without a chat template, `DataError` where the template refuses the conversation.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelFileError(
            f"{tokenizer.name_or_path} has no chat template, so nothing says how a conversation is written;"
            " put the chat_template.jinja that it was trained with into that folder."
        )
    options = {"add_generation_prompt": add_generation_prompt, **variables}
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        begins = next((each["content"] for each in messages if each["role"] == "user"), "")[:SHOWN_CHARACTERS]
        roles = ", ".join(each["role"] for each in messages)
        raise DataError(
            f"The chat template of {tokenizer.name_or_path} refuses {name} ({roles}; it begins {begins!r}): {error}."
            " Leave such rows out, or only their system message where that is what it refuses."
        ) from error


def token_ids(tokenizer: Any, messages: Messages, name: str, *, add_generation_prompt: bool = False) -> list[int]:
    """The same as token ids; nothing is added around the template's text."""
    text = render(tokenizer, messages, name, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
