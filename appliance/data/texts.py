"""Rows of every kind in one shape, as those that look at data read them: what is asked, answered and rejected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.data.formats import Row
from appliance.text.words import normal

SHORT_CHARACTERS = 12  # "Hello" opens many conversations without making them alike


@dataclass(frozen=True, slots=True)
class Text:
    """One row. `asked` has all turns of the user, `answer` all of the assistant, or the chosen answer of a triplet."""

    kind: str  # sft, heldout, dpo, faq
    file: str
    line: int
    opening: str
    asked: str
    answer: str
    rejected: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def whole(self) -> str:
        return f"{self.asked}\n{self.answer}"


def read(kind: str, file: str, rows: Sequence[Row]) -> list[Text]:
    """The rows of one file of a dataset; `file` is the name that a person knows it by."""
    shape = {"dpo": _triplet, "faq": _faq}.get(kind, _conversation)
    return [shape(kind, file, row) for row in rows]


def _conversation(kind: str, file: str, row: Row) -> Text:
    opening, asked, answer = _turns(row["messages"])
    return Text(kind, file, row["line"], opening, asked, answer)


def _triplet(kind: str, file: str, row: Row) -> Text:
    opening, asked, _ = _turns(row["prompt"])
    return Text(kind, file, row["line"], opening, asked, row["chosen"], row["rejected"])


def _faq(kind: str, file: str, row: Row) -> Text:
    return Text(kind, file, row["line"], row["question"], row["question"], row["answer"])


def _turns(messages: Sequence[Mapping[str, str]]) -> tuple[str, str, str]:
    """What opens a conversation, all that is asked and all that is answered.

    An opening that is only a greeting is taken together with what the user says next.
    """
    said = [message["content"] for message in messages if message["role"] == "user"]
    asked = "\n".join(said)
    opening = said[0] if said and len(normal(said[0])) >= SHORT_CHARACTERS else asked
    return opening, asked, "\n".join(message["content"] for message in messages if message["role"] == "assistant")
