"""How long rows are: in tokens of the base where its tokenizer lies here, in characters where it does not.

Above `SAMPLE_ROWS` rows tokens are counted for a sample and for the longest rows by characters, among which the longest by
tokens is looked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data import examples
from appliance.data.formats import Row
from appliance.findings import Finding
from appliance.text.chat_template import ChatTemplate, TemplateFailed

PERCENTILES = (5, 25, 50, 75, 95, 99)
SAMPLE_ROWS = 10_000
LONGEST_ROWS = 1_000
ROUND_TO = 64
CHUNK_ROWS = 1_000


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

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as one text."""
        if self._template:
            return self._template.render(messages, add_generation_prompt=False)
        return "".join(message["content"] for message in messages)


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
    return Tokenizer.from_file(str(file)), _template(source, settings) if isinstance(source, str) else None


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


def measure(kind: str, file: str, rows: Sequence[Row], meter: Meter) -> list[Field]:
    """The lengths of each field of a file's rows, the whole row last."""
    fields = _fields(kind, rows, meter)
    whole = fields["whole row"]
    wanted = list(range(len(rows)))
    if meter.unit == "tokens" and len(rows) > SAMPLE_ROWS:
        by_length = sorted(wanted, key=lambda number: -len(whole[number]))
        longest = by_length[:LONGEST_ROWS]
        sample = wanted[:: -(-len(rows) // SAMPLE_ROWS)]
    else:
        longest, sample = [], wanted
    measured = []
    for name, texts in fields.items():
        values = meter.count([texts[number] for number in sample])
        counted = dict(zip(longest, meter.count([texts[number] for number in longest]), strict=True))
        counted |= zip(sample, values, strict=True)
        order = sorted(counted, key=lambda number: -counted[number])[:LONGEST_ROWS]
        measured.append(Field(file, name, values, [(f"{file}:{rows[number]['line']}", counted[number]) for number in order]))
    return measured


def _fields(kind: str, rows: Sequence[Row], meter: Meter) -> dict[str, Sequence[str]]:
    if kind == "faq":
        return {
            "question": [row["question"] for row in rows],
            "answer": [row["answer"] for row in rows],
            "whole row": [f"{row['question']}\n{row['answer']}" for row in rows],
        }
    if kind == "dpo":
        # Training joins the prompt with either answer; the longer of the two must fit.
        longer = [max(row["chosen"], row["rejected"], key=len) for row in rows]
        return {
            "prompt": [_said(row["prompt"]) for row in rows],
            "chosen": [row["chosen"] for row in rows],
            "rejected": [row["rejected"] for row in rows],
            "whole row": [
                meter.render([*row["prompt"], {"role": "assistant", "content": answer}])
                for row, answer in zip(rows, longer, strict=True)
            ],
        }
    fields = {role: [_said(row["messages"], role) for row in rows] for role in ("system", "user", "assistant")}
    if not any(fields["system"]):
        del fields["system"]
    return {**fields, "whole row": [meter.render(row["messages"]) for row in rows]}


def _said(messages: Sequence[Mapping[str, str]], role: str | None = None) -> str:
    return "\n".join(message["content"] for message in messages if role in (None, message["role"]))


def suggested(field: Field) -> int:
    """The `max_tokens` that holds every row."""
    return -(-field.longest // ROUND_TO) * ROUND_TO


def check_limit(kind: str, field: Field, limit_tokens: int, *, is_cut: bool) -> list[Finding]:
    """Rows that training would refuse, or cut where the recipe says so."""
    if field.longest <= limit_tokens:
        return []
    places = [place for place, length in field.longest_rows if length > limit_tokens]
    over = max(len(places), sum(value > limit_tokens for value in field.values))
    fate = "cut at its end, and the end of the answer is not learned" if is_cut else "refused"
    return [
        Finding(
            kind="too_long",
            level="notice" if is_cut else "problem",
            what=f"{field.file}: the longest row has {field.longest:,} tokens, {kind}.max_tokens is {limit_tokens:,};"
            f" what is longer is {fate}: {examples.rows(over)} of {len(field.values):,} measured",
            remedy=f"Set {kind}.max_tokens = {suggested(field)}, or shorten those rows; 99 % fit into"
            f" {field.percentiles[-1]:,}.",
            count=over,
            examples=examples.first(places),
            figures={"longest": field.longest, "suggested": suggested(field)},
        )
    ]
