"""Conversations of a dataset, as conversion reads them: calibration, verification and measurement by language.

`pieces` and `token_ids` are how all of these write a conversation: with the model's own chat template, as training does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import DataError, ModelFileError
from appliance.text import languages, passages
from appliance.text.chat_template import TemplateFailed

Messages = Sequence[Mapping[str, Any]]  # one of which may have `documents`, each with an `id` and a `text`
DOCUMENTS = "documents"
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
        return str(self.messages[-1]["content"])


def read(path: Path) -> list[Messages]:
    """The conversations of a dataset's file, JSON lines with messages; the first of a row holds its documents.

    Raises `DataError`.
    """
    asked = read_asked(path)
    return [
        [{**each.messages[0], DOCUMENTS: each.documents}, *each.messages[1:]] if each.documents else each.messages
        for each in asked
    ]


def read_asked(path: Path) -> list[Asked]:
    """The same, with documents by themselves."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [
            Asked(row["messages"], [{key: each[key] for key in ("id", "text")} for each in row.get(DOCUMENTS, ())])
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


def pieces(
    tokenizer: Any, messages: Messages, name: str, *, add_generation_prompt: bool = False, **variables: Any
) -> list[str]:
    """A conversation in what is tokenised each by itself: one text, or, with documents, what is before, each, what follows.

    `name` is what an error calls it (row 3, conversation 7 of nl). Raises `ModelFileError` for a model without a chat
    template, `DataError` where the template refuses the conversation, or has no place for documents.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelFileError(
            f"{tokenizer.name_or_path} has no chat template, so nothing says how a conversation is written;"
            " put the chat_template.jinja that it was trained with into that folder."
        )
    options = {"add_generation_prompt": add_generation_prompt, **variables}

    def rendered(each: Messages) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(each), tokenize=False, **options))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateFailed(str(error)) from error

    try:
        return passages.pieces(*parted(messages), rendered)
    except TemplateFailed as error:
        begins = next((each["content"] for each in messages if each["role"] == "user"), "")[:SHOWN_CHARACTERS]
        roles = ", ".join(each["role"] for each in messages)
        raise DataError(
            f"The chat template of {tokenizer.name_or_path} refuses {name} ({roles}; it begins {begins!r}): {error}."
            " Leave such rows out, or only their system message where that is what it refuses."
        ) from error


def parted(messages: Messages) -> tuple[Messages, Sequence[Mapping[str, str]]]:
    """Messages as a template knows them, and the documents that one of them held."""
    documents = next((each[DOCUMENTS] for each in messages if DOCUMENTS in each), ())
    return [{key: value for key, value in each.items() if key != DOCUMENTS} for each in messages], documents


def token_ids(tokenizer: Any, messages: Messages, name: str, *, add_generation_prompt: bool = False) -> list[int]:
    """The same as token ids; nothing is added around the template's text."""
    return ids_of(tokenizer, pieces(tokenizer, messages, name, add_generation_prompt=add_generation_prompt))


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Of pieces, each by itself."""
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
