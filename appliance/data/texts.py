"""Rows of every kind in one shape, as those that look at data read them: what is asked, answered and rejected."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.data import documents
from appliance.data.defects import Row, place
from appliance.text.words import normal

SHORT_CHARACTERS = 12  # "Hello" opens many conversations without making them alike


@dataclass(frozen=True, slots=True)
class Text:
    """One row. `asked` has all turns of the user, `answer` all of the assistant, the chosen answer of a triplet, one judged
    good, or the reference; `beside` what stands with them: system turns, further columns, names of documents, the metadata
    of the FAQ. An answer rests on its `documents`."""

    kind: str  # sft, heldout, dpo, kto, grpo, faq
    file: str
    line: int
    opening: str
    asked: str
    answer: str
    rejected: str = ""
    beside: str = ""
    item: int = 0  # among the rows that begin on its line, where there are several
    documents: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return place(self.line, self.item)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.place}"

    @property
    def whole(self) -> str:
        return f"{self.asked}\n{self.answer}"

    @property
    def everything(self) -> str:
        return "\n".join((self.asked, self.answer, self.rejected, self.beside, *self.documents))


def read(kind: str, file: str, rows: Sequence[Row]) -> list[Text]:
    """The rows of one file of a dataset; `file` is the name that a person knows it by."""
    return [read_one(kind, file, row) for row in rows]


def read_one(kind: str, file: str, row: Row) -> Text:
    """One row of a dataset."""
    if kind == "faq":
        opening, asked, rejected = row["question"], row["question"], ""
        answer, beside = row["answer"], "\n".join(_strings(row["metadata"]))
    else:
        messages = row["messages"] if "messages" in row else row["prompt"]
        opening, asked = _questions(messages)
        rejected = row.get("rejected", "")
        said = _said(messages, "assistant")
        wanted = row.get("chosen", row.get("reference"))
        if kind == "kto":
            wanted, rejected = (row["completion"], "") if row["label"] else ("", row["completion"])
        # The assistant's turns inside a prompt are not what is learned.
        answer, earlier = ("\n".join(said), []) if wanted is None else (wanted, said)
        beside = "\n".join([*_said(messages, "system"), *earlier, *documents.names(row), *_strings(row.get("columns", {}))])
    told = tuple(documents.texts(row))
    return Text(kind, file, row["line"], opening, asked, answer, rejected, beside, row.get("item", 0), told)


def _questions(messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """What opens a conversation, and all that is asked.

    An opening that is only a greeting is taken together with what the user says next.
    """
    said = _said(messages, "user")
    asked = "\n".join(said)
    return said[0] if said and len(normal(said[0])) >= SHORT_CHARACTERS else asked, asked


def _said(messages: Sequence[Mapping[str, str]], role: str) -> list[str]:
    return [message["content"] for message in messages if message["role"] == role]


def _strings(value: Any) -> Iterator[str]:
    """The texts and numbers inside a value of JSON, without the keys."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
    elif value is not None:
        yield str(value)
