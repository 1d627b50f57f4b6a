"""Reads training files: detects the shape of their rows, says of every defect where it is, and yields the normal form.

Main entry: `examine`, which looks at the first rows, then `Reading.rows`. Shapes and normal forms are in `shapes.py`, how a
file is written in `files.py`. Knows nothing of tokens.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data import columns as column_maps
from appliance.data import files
from appliance.data.columns import Map
from appliance.data.defects import (
    Action,
    Defect,
    Report,
    Row,
    SetAside,
    kind_of,
    place,
    require_whole_characters,
    shown_keys,
)
from appliance.data.files import Record, Source
from appliance.data.messages import CONTROL_TOKEN, report_stray_keys
from appliance.data.shapes import BY_PURPOSE, SHAPES, Purpose, Shape
from appliance.errors import DataError

__all__ = ["CONTROL_TOKEN", "Defect", "Reading", "Row", "digest", "examine"]

SAMPLE_ROWS = 20
PURPOSES: Mapping[str, Purpose] = {
    "sft": "conversations",
    "heldout": "conversations",
    "dpo": "preferences",
    "kto": "judgements",
    "grpo": "references",
    "faq": "questions",
}
# Lines with labels are asked for by their labels and answered by their text.
LABEL_MAPS: Mapping[Purpose, Map] = {
    "conversations": {"prompt": "labels", "completion": "text"},
    "references": {"prompt": "labels", "reference": "text"},
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A file whose rows are understood: how it is written, their shape, and the keys that all have and none needs."""

    source: Source
    shape: Shape
    columns: Map | None = None
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`sft.csv: prompt and completion from columns (CSV); prompt = LLM, completion = human; not used: language`."""
        by_columns = " from columns" if self.columns else ""
        parts = [f"{self.source.path.name}: {self.shape.name}{by_columns} ({self.source.kind})"]
        if self.columns:
            parts.append(", ".join(f"{key} = {text}" for key, text in self.columns.items()))
        if self.unused:
            parts.append(f"not used: {shown_keys(list(self.unused))}")
        return "; ".join(parts)

    def rows(self, defects: list[Defect]) -> Iterator[Row]:
        """Rows in normal form without exact copies; what is wrong is appended to `defects`.

        Each has its `line`, and its `item` where the line has several.
        """
        for record, row in self.usable(defects):
            yield {**row, "line": record.line, **({"item": record.item} if record.item else {})}

    def usable(self, defects: list[Defect]) -> Iterator[tuple[Record, Row]]:
        """The same, each row in normal form beside the record that it was made of."""
        first: dict[bytes, str] = {}
        for record in self.source.records():
            report = self._reporter(record, defects)
            row = self._row(record, report)
            if row is None:
                continue
            if (content := digest(row)) in first:
                report(f"an exact copy of line {first[content]}", "set aside")
            else:
                first[content] = place(record.line, record.item)
                yield record, row

    def _reporter(self, record: Record, defects: list[Defect]) -> Report:
        def report(what: str, action: Action) -> None:
            defects.append(Defect(self.source.path.name, record.line, what, action, record.item))

        return report

    def _row(self, record: Record, report: Report) -> Row | None:
        if record.defect:
            report(*record.defect)
            return None
        try:
            row = record.value
            if not isinstance(row, dict):
                raise SetAside(f"expected an object, found {kind_of(row)}")
            require_whole_characters(row)
            if self.columns:
                row = column_maps.apply(self.columns, row, report, keeps_others=self.shape.keeps_others)
            elif not self.shape.keeps_others:
                report_stray_keys(row, self.shape.known.union(self.unused), report)
            return self.shape.parse(row, report)
        except SetAside as reason:
            report(str(reason), "set aside")
            return None


def examine(path: Path, name: str, columns: Map | None = None) -> Reading:
    """What the file is, by its first rows; `name` is its key in the recipe's `[data]`, `columns` a map from there.

    Raises `DataError` for a shape that is unknown or ambiguous, with the keys found and the shapes known, and for columns
    that the file does not have.
    """
    purpose = PURPOSES[name]
    source = files.find(path)
    sample = list(itertools.islice(_objects(source), SAMPLE_ROWS))
    if source.kind == "fastText labels" and columns is None:
        if purpose not in LABEL_MAPS:
            raise DataError(f"{path}: lines with labels cannot be read as data.{name}; they can as data.sft or data.grpo.")
        columns = LABEL_MAPS[purpose]
    if columns is not None:
        return _by_columns(source, sample, purpose, columns, f"data.columns.{name}")
    if not sample:  # nothing to go by: reading will say of each row what is wrong with it
        return Reading(source, next(shape for shape in SHAPES if shape.purpose == purpose))
    shape = _detect(path, sample, purpose, name)
    unused = () if shape.keeps_others or len(sample) < 2 else _in_all(sample, shape)
    return Reading(source, shape, unused=unused)


def fits(path: Path, columns: Map) -> bool:
    """Whether the first row of a file has all columns of a map."""
    source = files.find(path)
    known = source.columns or next((tuple(row) for _, row in _objects(source)), ())
    return all(name in known for text in columns.values() for name in column_maps.named(text))


def digest(value: Any) -> bytes:
    """Of a row's content, to tell copies apart without holding the rows."""
    content = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _objects(source: Source) -> Iterator[tuple[int, Row]]:
    return ((record.line, record.value) for record in source.records() if isinstance(record.value, dict))


def _by_columns(source: Source, sample: list[tuple[int, Row]], purpose: Purpose, columns: Map, where: str) -> Reading:
    known = source.columns or tuple(dict.fromkeys(key for _, row in sample for key in row))
    if known:
        column_maps.require_columns(columns, known, source.path, where)
    shape = BY_PURPOSE[purpose]
    used = {name for text in columns.values() for name in column_maps.named(text)}
    unused = () if shape.keeps_others else tuple(name for name in known if name not in used)
    return Reading(source, shape, columns, unused)


def _detect(path: Path, sample: list[tuple[int, Row]], purpose: Purpose, name: str) -> Shape:
    first_line: dict[str, int] = {}
    found: dict[str, Shape] = {}
    for line, row in sample:
        matching = [shape for shape in _shapes_of(row) if shape.purpose == purpose]
        if len(matching) > 1:
            shapes = " and as ".join(map(str, matching))
            raise DataError(f"{path}:{line}: can be read as {shapes}; {_remedy(name, 'leave one of them out')}")
        for shape in matching:
            first_line.setdefault(shape.name, line)
            found[shape.name] = shape
    if not found:
        raise DataError(_unknown(path, sample, purpose, name))
    if len(found) > 1:
        lines = "; ".join(f"line {line}: {shape}" for shape, line in first_line.items())
        raise DataError(f"{path} has rows of several shapes ({lines}); give each shape a file of its own.")
    (shape,) = found.values()
    return shape


def _shapes_of(row: Row) -> list[Shape]:
    """Shapes whose keys the row has, but for those that ask for less than another one."""
    found = {shape.name: (shape, set(keys)) for shape in SHAPES if (keys := shape.found_in(row))}
    return [shape for shape, keys in found.values() if not any(keys < others for _, others in found.values())]


def _unknown(path: Path, sample: list[tuple[int, Row]], purpose: Purpose, name: str) -> str:
    line, row = sample[0]
    others = {f"{shape}: that is read as data.{other}" for shape in _shapes_of(row) for other in _names(shape.purpose)}
    seems = f" They are those of {min(others)}." if others else ""
    known = "; ".join(str(shape) for shape in SHAPES if shape.purpose == purpose)
    found = f"{path}:{line}: no known shape of row; keys found: {shown_keys(list(row))}.{seems}"
    return f"{found} Known for data.{name}: {known}; {_remedy(name, 'or rename the keys')}"


def _remedy(name: str, otherwise: str) -> str:
    if PURPOSES[name] not in BY_PURPOSE:
        return f"{otherwise}."
    return f"name the columns in [data.columns.{name}], {otherwise}."


def _names(purpose: Purpose) -> list[str]:
    return [name for name, each in PURPOSES.items() if each == purpose and name != "heldout"]


def _in_all(sample: list[tuple[int, Row]], shape: Shape) -> tuple[str, ...]:
    """Keys without a use that every row has: said once of the file, not of each row."""
    (_, first), *rest = sample
    return tuple(key for key in first if key not in shape.known and all(key in row for _, row in rest))
