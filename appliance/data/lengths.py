"""How long rows are: in tokens of the base where its tokenizer lies here, in characters where it does not. Entry: `measure`.

Above `SAMPLE_ROWS` rows tokens are counted for a sample and for the longest rows by characters, among which the longest by
tokens is looked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data import documents, examples
from appliance.data.defects import Row, place
from appliance.data.texts import Text
from appliance.findings import Finding
from appliance.text import passages
from appliance.text.chat_template import ChatTemplate, TemplateFailed

PERCENTILES = (5, 25, 50, 75, 95, 99)
SAMPLE_ROWS = 10_000
LONGEST_ROWS = 1_000
ROUND_TO = 64
CHUNK_ROWS = 1_000
Pieces = Sequence[str]
WHOLE = "whole row"
ANSWERS = {"dpo": ("chosen", "rejected"), "kto": ("completion",), "grpo": ("reference",)}


@dataclass(frozen=True, slots=True)
class Field:
    """Lengths of one field of one file's rows, as it is named in the report."""

    file: str
    name: str
    values: Sequence[int]
    longest_rows: Sequence[tuple[str, int]]  # place and length, the longest first; of all rows, also where `values` are not

    @property
    def longest(self) -> int:
        return self.longest_rows[0][1]

    @property
    def percentiles(self) -> list[int]:
        ordered = sorted(self.values)
        return [ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] for percent in PERCENTILES]


@dataclass(frozen=True, slots=True)
class Measured:
    """The fields of a file's rows, last what must fit into `max_tokens`, and which rows the chat template refuses."""

    fields: Sequence[Field]
    refused: Sequence[int]


class Meter:
    """Counts the length of texts, and of conversations as training renders them."""

    def __init__(self, base: Path | None) -> None:
        loaded: tuple[Any, ChatTemplate | None] = _load(base) if base else (None, None)
        self._tokenizer, self._template = loaded

    @property
    def unit(self) -> str:
        return "tokens" if self._tokenizer else "characters"

    @property
    def about(self) -> str:
        """What is counted, in words."""
        if not self._tokenizer:
            return "characters: the base's tokenizer is not here (`appliance pull`, or train the starter, for tokens)"
        return "tokens of the base" + ("" if self._template else ", without its chat template, which has none or fails")

    def count(self, texts: Sequence[str]) -> list[int]:
        if not self._tokenizer:
            return [len(text) for text in texts]
        counts: list[int] = []
        for start in range(0, len(texts), CHUNK_ROWS):
            encoded = self._tokenizer.encode_batch_fast(list(texts[start : start + CHUNK_ROWS]), add_special_tokens=False)
            counts += [len(each) for each in encoded]
        return counts

    def render(
        self, messages: Sequence[Mapping[str, str]], told: Sequence[Mapping[str, str]] = (), *, is_prompt: bool = False
    ) -> Pieces:
        """A conversation with its documents, in pieces that are tokenised each by itself; a prompt with what announces its
        answer. Raises `TemplateFailed`."""
        template = self._template
        if not template:
            return plain(messages, told)
        return passages.pieces(messages, told, lambda each: template.render(each, add_generation_prompt=is_prompt))


def _load(base: Path) -> tuple[Any, ChatTemplate | None]:
    """The tokenizer and, if it renders a plain conversation, the chat template of a model folder."""
    file = base / "tokenizer.json"
    if not file.is_file():
        return None, None
    from tokenizers import Tokenizer

    settings_file = base / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    separate = base / "chat_template.jinja"
    source = separate.read_text(encoding="utf-8") if separate.is_file() else settings.get("chat_template")
    tokenizer = Tokenizer.from_file(str(file))
    # Some are saved as they were last used: everything would have the same length.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, _template(source, settings) if isinstance(source, str) else None


def joined(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(message["content"] for message in messages)


def plain(messages: Sequence[Mapping[str, str]], told: Sequence[Mapping[str, str]]) -> Pieces:
    """The texts alone, where no template shows them."""
    return [joined(messages), *(passages.shown(each["id"], each["text"]) for each in told)]


def _template(source: str, settings: Mapping[str, Any]) -> ChatTemplate | None:
    values = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items() if value}
    try:
        template = ChatTemplate(source, tokens)
        template.render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], add_generation_prompt=False
        )
    except TemplateFailed:
        return None
    return template


def measure(kind: str, file: str, rows: Sequence[Row], meter: Meter) -> Measured:
    """The lengths of each field of a file's rows; a field's length in a row is that of the longest of its texts there."""
    read = [_whole(kind, row, meter) for row in rows]
    wholes = [texts for texts, _ in read]
    wanted = list(range(len(rows)))
    longest, sample = [], wanted
    if meter.unit == "tokens" and len(rows) > SAMPLE_ROWS:
        longest = sorted(wanted, key=lambda number: -max(sum(map(len, pieces)) for pieces in wholes[number]))[:LONGEST_ROWS]
        sample = wanted[:: -(-len(rows) // SAMPLE_ROWS)]
    fields = {name: texts for name, texts in _fields(kind, rows).items() if any(any(each) for each in texts)}
    measured = []
    named: dict[str, Sequence[Sequence[Pieces]]] = {
        name: [[[text] for text in row] for row in each] for name, each in fields.items()
    }
    for name, texts in {**named, "prompt" if kind == "grpo" else WHOLE: wholes}.items():
        values = _longest(meter, [texts[number] for number in sample])
        counted = dict(zip(longest, _longest(meter, [texts[number] for number in longest]), strict=True))
        counted |= zip(sample, values, strict=True)
        order = sorted(counted, key=lambda number: -counted[number])[:LONGEST_ROWS]
        places = [
            (f"{file}:{place(rows[number]['line'], rows[number].get('item', 0))}", counted[number]) for number in order
        ]
        measured.append(Field(file, name, values, places))
    return Measured(measured, [number for number, (_, is_refused) in enumerate(read) if is_refused])


def _longest(meter: Meter, texts: Sequence[Sequence[Pieces]]) -> list[int]:
    """The length of the longest text of each row; by tokens, which need not be the one with most characters."""
    counts = iter(meter.count([piece for each in texts for pieces in each for piece in pieces]))
    return [max((sum(next(counts) for _ in pieces) for pieces in each), default=0) for each in texts]


def _whole(kind: str, row: Row, meter: Meter) -> tuple[list[Pieces], bool]:
    """What training reads of a row, each on its own, and whether the chat template refuses it: then the plain texts."""
    if kind == "faq":
        return [[f"{row['question']}\n{row['answer']}"]], False
    if kind == "dpo":  # the prompt is joined with either answer
        conversations = [[*row["prompt"], {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")]
    elif kind == "kto":
        conversations = [[*row["prompt"], {"role": "assistant", "content": row["completion"]}]]
    else:
        conversations = [row["prompt"] if kind == "grpo" else row["messages"]]
    told = row.get(documents.DOCUMENTS, ())
    try:
        return [meter.render(each, told, is_prompt=kind == "grpo") for each in conversations], False
    except TemplateFailed:
        return [plain(each, told) for each in conversations], True


def _fields(kind: str, rows: Sequence[Row]) -> dict[str, Sequence[Sequence[str]]]:
    """The texts of each field, row by row; several turns of one role are answers, or questions, of their own."""
    if kind in ANSWERS:
        prompts = {} if kind == "grpo" else {"prompt": [[joined(row["prompt"])] for row in rows]}
        return {**prompts, **{name: [[row[name]] for row in rows] for name in ANSWERS[kind]}}
    if kind == "faq":
        return {name: [[row[name]] for row in rows] for name in ("question", "answer")}
    said = {role: [_said(row["messages"], role) for row in rows] for role in ("system", "user", "assistant")}
    return {**said, "document": [documents.texts(row) for row in rows]}


def _said(messages: Sequence[Mapping[str, str]], role: str) -> list[str]:
    return [message["content"] for message in messages if message["role"] == role]


def suggested(field: Field, answer_tokens: int = 0) -> int:
    """The `max_tokens` that holds every row."""
    return -(-(field.longest + answer_tokens) // ROUND_TO) * ROUND_TO


def check_limit(
    phase: str, field: Field, limit_tokens: int, *, answer_tokens: int = 0, is_cut: bool = False
) -> list[Finding]:
    """Rows that training would refuse, or cut where the recipe says so; `answer_tokens` are to be left for an answer."""
    if field.longest + answer_tokens <= limit_tokens:
        return []
    places = [place for place, length in field.longest_rows if length + answer_tokens > limit_tokens]
    over = max(len(places), sum(value + answer_tokens > limit_tokens for value in field.values))
    rest = f" and {phase}.answer_tokens {answer_tokens:,}" if answer_tokens else ""
    fate = "cut at its end, and the end of the answer is not learned" if is_cut else "refused"
    return [
        Finding(
            kind="too_long",
            level="notice" if is_cut else "problem",
            what=f"{field.file}: the longest {field.name.removeprefix('whole ')} has {field.longest:,} tokens,"
            f" {phase}.max_tokens is {limit_tokens:,}{rest}; what is longer is {fate}: {examples.rows(over)} of"
            f" {len(field.values):,} measured",
            remedy=f"Set {phase}.max_tokens = {suggested(field, answer_tokens)}, or shorten those rows; 99 % fit into"
            f" {field.percentiles[-1] + answer_tokens:,}.",
            count=over,
            examples=examples.first(places),
            figures={"longest": field.longest, "suggested": suggested(field, answer_tokens)},
        )
    ]


def check_template(file: str, refused: Sequence[Text]) -> list[Finding]:
    """Rows that cannot be rendered as the base's template wants them."""
    if not refused:
        return []
    return [
        Finding(
            kind="template_refuses",
            level="problem",
            what=f"{file}: the base's chat template refuses {examples.rows(len(refused))}, and training will stop at them;"
            " their lengths here are those of their texts alone",
            remedy="Some templates know no system turn: put what it says into the first question, or take another base.",
            count=len(refused),
            examples=examples.of(refused),
        )
    ]
