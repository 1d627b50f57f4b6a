"""The shapes that rows come in, by their keys, and how each becomes the one normal form of its purpose.

    conversations   {"messages": [{"role", "content"}, ...]}                       sft, heldout
                    and "documents": [{"id", "text"}, ...] where it has some
    preferences     {"prompt": [messages], "chosen": str, "rejected": str}         dpo
    judgements      {"prompt": [messages], "completion": str, "label": bool}       kto
    references      {"prompt": [messages], "reference": str, "columns": {...}}     grpo
    questions       {"question": str, "answer": str, "metadata": {...}}            faq

Which shape a file has is told in `formats.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.data import documents
from appliance.data.defects import Report, Row, SetAside, kind_of
from appliance.data.documents import DOCUMENTS
from appliance.data.messages import (
    SHAREGPT,
    Message,
    read_answer,
    read_messages,
    read_prompt,
    read_text,
    require_answer_last,
    require_turns,
)

Purpose = Literal["conversations", "preferences", "judgements", "references", "questions"]
# What a column of a CSV file, or another program, may have in place of true and false.
YES_AND_NO = {**dict.fromkeys(("true", "1", "yes", "good"), True), **dict.fromkeys(("false", "0", "no", "bad"), False)}


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a row. It has all keys of one of `keys`; others than these and the `optional` ones are stray."""

    name: str
    purpose: Purpose
    keys: tuple[tuple[str, ...], ...]
    parse: Callable[[Row, Report], Row]
    optional: tuple[str, ...] = ()
    keeps_others: bool = False

    @property
    def known(self) -> frozenset[str]:
        return frozenset(self.optional).union(*self.keys)

    def found_in(self, row: Row) -> tuple[str, ...] | None:
        """The longest of `keys` that the row has all of."""
        return max((keys for keys in self.keys if row.keys() >= set(keys)), key=len, default=None)

    def __str__(self) -> str:
        return f"{self.name} ({' or '.join(', '.join(keys) for keys in self.keys)})"


def chat_messages(row: Row, report: Report) -> Row:
    messages = read_messages(row.get("messages"), "messages", report)
    require_answer_last(messages)
    return {"messages": messages, **documents.read(row, report)}


def sharegpt(row: Row, report: Report) -> Row:
    messages = [*_system(row, report), *read_messages(row.get("conversations"), "conversations", report, SHAREGPT)]
    require_turns(messages, "conversations")
    require_answer_last(messages)
    return {"messages": messages, **documents.read(row, report)}


def alpaca(row: Row, report: Report) -> Row:
    """Instruction and input as one question, with a blank line between; the chat template takes Alpaca's own one's place."""
    question = read_text(row.get("instruction"), "instruction", report)
    if row.get("input") not in (None, ""):
        question = f"{question}\n\n{read_text(row['input'], 'input', report)}"
    answer = read_text(row.get("output"), "output", report)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*_system(row, report), *turns], **documents.read(row, report)}


def prompt_and_completion(row: Row, report: Report) -> Row:
    prompt = read_prompt(row.get("prompt"), "prompt", report)
    answer = read_answer(row.get("completion"), "completion", report, prompt)
    messages = [*prompt, {"role": "assistant", "content": answer}]
    return {"messages": messages, **documents.read(row, report)}


def preference_triplet(row: Row, report: Report) -> Row:
    """Without a prompt, the turns that both answers begin with are it."""
    value = row.get("prompt")
    if value is None and isinstance(row.get("chosen"), list):
        value = row["chosen"][:-1]
    prompt = read_prompt(value, "prompt", report)
    return _preference(row, prompt, report)


def sharegpt_preference(row: Row, report: Report) -> Row:
    messages = [*_system(row, report), *read_messages(row.get("conversations"), "conversations", report, SHAREGPT)]
    require_turns(messages, "conversations")
    if messages[-1]["role"] != "user":
        raise SetAside("conversations ends with the assistant's turn; it must end with the user's question")
    return _preference(row, messages, report)


def judged_answer(row: Row, report: Report) -> Row:
    prompt = read_prompt(row.get("prompt"), "prompt", report)
    answer = read_answer(row.get("completion"), "completion", report, prompt)
    label = YES_AND_NO.get(str(row.get("label")).strip().lower())
    if label is None:
        raise SetAside(f"label: expected true or false, found {kind_of(row.get('label'))}")
    return {"prompt": prompt, "completion": answer, "label": label}


def prompt_and_reference(row: Row, report: Report) -> Row:
    prompt = read_prompt(row.get("prompt"), "prompt", report)
    reference = read_text(row.get("reference"), "reference", report)
    columns = {key: value for key, value in row.items() if key not in ("prompt", "reference")}
    return {"prompt": prompt, "reference": reference, "columns": columns}


def question_and_answer(row: Row, report: Report) -> Row:
    question, answer = ("vraag", "antwoord") if "vraag" in row else ("question", "answer")
    texts = {key: read_text(row.get(name), name, report) for key, name in (("question", question), ("answer", answer))}
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise SetAside(f"metadata: expected an object, found {kind_of(metadata)}")
    return {**texts, "metadata": metadata}


def _preference(row: Row, prompt: list[Message], report: Report) -> Row:
    chosen, rejected = (read_answer(row.get(key), key, report, prompt) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise SetAside("chosen and rejected are the same text")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _system(row: Row, report: Report) -> list[Message]:
    if row.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": read_text(row["system"], "system", report)}]


PAIRS = Shape("prompt and completion", "conversations", (("prompt", "completion"),), prompt_and_completion, (DOCUMENTS,))
TRIPLETS = Shape(
    "preference triplets",
    "preferences",
    (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    preference_triplet,
)
JUDGED = Shape("judged answers", "judgements", (("prompt", "completion", "label"),), judged_answer)
REFERENCES = Shape("prompt and reference", "references", (("prompt", "reference"),), prompt_and_reference, keeps_others=True)
SHAPES = (
    Shape("chat messages", "conversations", (("messages",),), chat_messages, (DOCUMENTS,)),
    Shape("ShareGPT conversations", "conversations", (("conversations",),), sharegpt, ("system", DOCUMENTS)),
    Shape("Alpaca instructions", "conversations", (("instruction", "output"),), alpaca, ("input", "system", DOCUMENTS)),
    PAIRS,
    TRIPLETS,
    Shape(
        "ShareGPT preferences",
        "preferences",
        (("conversations", "chosen", "rejected"),),
        sharegpt_preference,
        ("system",),
    ),
    JUDGED,
    REFERENCES,
    Shape(
        "questions and answers",
        "questions",
        (("vraag", "antwoord"), ("question", "answer")),
        question_and_answer,
        ("metadata",),
    ),
)
# What a map of columns leads to.
BY_PURPOSE: Mapping[Purpose, Shape] = {
    "conversations": PAIRS,
    "preferences": TRIPLETS,
    "judgements": JUDGED,
    "references": REFERENCES,
}
