"""Conversations of a dataset, as conversion reads them: calibration, verification and measurement by language.

`render` and `token_ids` are how all of these write a conversation: with the model's own chat template, as training does.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.errors import DataError, ModelFileError
from appliance.text import languages

Messages = Sequence[Mapping[str, str]]
UNTOLD = "untold"  # too short to tell its language
SHOWN_CHARACTERS = 40


def read(path: Path) -> list[Messages]:
    """The conversations of a dataset's file, JSON lines with messages; raises `DataError`."""
    try:
        rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        lacking = [number for number, messages in enumerate(rows, 1) if "user" not in {each["role"] for each in messages}]
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
        answers = [each["content"] for each in messages if each["role"] == "assistant"]
        text = "\n".join(answers or [each["content"] for each in messages])
        code = codes[0] if len(codes) == 1 else languages.detect(text, codes)
        groups[code or UNTOLD].append(messages)
    return {code: group for code, group in groups.items() if group}


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
