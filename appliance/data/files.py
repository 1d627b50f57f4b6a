"""Files of rows, one row at a time: JSON lines, one JSON list, CSV, and lines with fastText labels.

A row comes with the physical line that it begins on. What a row means is told elsewhere (`formats.py`). No file is ever held
in memory as a whole.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.data.defects import Action, shown_keys
from appliance.errors import DataError

Kind = Literal["JSON lines", "a JSON list", "CSV", "fastText labels"]

CHUNK_BYTES = 1 << 20
FIRST_LINE_BYTES = 1 << 16
FIELD_CHARACTERS = 1 << 20  # of one field of CSV; a longer one is a quote that was left open
DELIMITERS = ",;\t"  # the last two as spreadsheets write them where the comma is the decimal sign
BYTE_ORDER_MARK = codecs.BOM_UTF8
LABEL = "__label__"


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in its file, or what is wrong with it; `item` is its number on a line with several, else 0."""

    line: int
    value: Any = None
    defect: tuple[str, Action] | None = None
    item: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A file of rows and how it is written; `columns` are the names in the head of a CSV file."""

    path: Path
    kind: Kind
    columns: tuple[str, ...] = ()

    def records(self) -> Iterator[Record]:
        """Every row from the first on; raises `DataError` where nothing after a mistake could be trusted."""
        readers = {"JSON lines": _json_lines, "a JSON list": _json_list, "CSV": _csv_rows, "fastText labels": _label_lines}
        return readers[self.kind](self.path)


def find(path: Path) -> Source:
    """How a file is written: CSV by its name, the others by how they begin; raises `DataError`."""
    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            return Source(path, "CSV", _csv_head(path))
        with path.open("rb") as stream:
            begin = stream.readline(FIRST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK)
            while begin and not begin.strip():
                begin = stream.readline(FIRST_LINE_BYTES)
            if not begin:
                raise DataError(f"{path} is empty; it must hold at least one row.")
            if begin.lstrip().startswith(LABEL.encode()):
                return Source(path, "fastText labels")
            # A first row that is a list, with others below it, is a line that is no object.
            is_list = begin.lstrip().startswith(b"[") and not (_is_json(begin) and any(line.strip() for line in stream))
            return Source(path, "a JSON list" if is_list else "JSON lines")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; correct the path in the recipe's [data] table.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        try:
            yield Record(number, json.loads(line.decode()))
        except UnicodeDecodeError as error:
            yield Record(number, defect=(f"not UTF-8 at byte {error.start} of the line", "set aside"))
        except (ValueError, RecursionError) as error:
            yield Record(number, defect=(f"invalid JSON ({error})", "set aside")) if line.strip() else _blank(number)


def _label_lines(path: Path) -> Iterator[Record]:
    """`__label__ASPECT:polarity … text` as labels, aspects, polarities (each joined by commas) and text."""
    for number, line in _lines(path):
        try:
            words = line.decode().strip()
        except UnicodeDecodeError as error:
            yield Record(number, defect=(f"not UTF-8 at byte {error.start} of the line", "set aside"))
            continue
        labels = []
        while words.startswith(LABEL):
            label, *rest = words.split(maxsplit=1)
            labels.append(label.removeprefix(LABEL))
            words = rest[0] if rest else ""
        if not words and not labels:
            yield _blank(number)
        elif not labels:
            yield Record(number, defect=(f"the line does not begin with {LABEL}", "set aside"))
        else:
            parts = [label.partition(":") for label in labels]
            columns = {
                "labels": [f"{aspect}: {polarity}" if polarity else aspect for aspect, _, polarity in parts],
                "aspects": [aspect for aspect, _, _ in parts],
                "polarities": [polarity for _, _, polarity in parts if polarity],
            }
            value = {name: ", ".join(dict.fromkeys(each)) for name, each in columns.items()}
            yield Record(number, {**value, "text": words})


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            line = line.rstrip(b"\r\n")
            yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def _blank(number: int) -> Record:
    return Record(number, defect=("the line is empty", "fixed"))


def _csv_head(path: Path) -> tuple[str, ...]:
    """The names of the columns, checked; raises `DataError`."""
    for line in _csv_lines(path):
        if line.value:
            names = tuple(name.strip() for name in line.value)
            if not all(names) or len(set(names)) < len(names):
                found = shown_keys(list(names))
                raise DataError(
                    f"{path}:{line.line}: a head with a name for each column is needed, each once; found {found}."
                )
            return names
    raise DataError(f"{path} is empty; it must hold a head with the names of its columns, and rows.")


def _csv_rows(path: Path) -> Iterator[Record]:
    names: list[str] = []
    for record in _csv_lines(path):
        if record.defect or not record.value:
            yield record if record.defect else _blank(record.line)
        elif not names:
            names = [name.strip() for name in record.value]
        elif len(record.value) != len(names):
            what = f"has {len(record.value)} fields, and the head names {len(names)} columns"
            yield Record(record.line, defect=(what, "set aside"))
        else:
            yield Record(record.line, dict(zip(names, record.value, strict=True)))


def _csv_lines(path: Path) -> Iterator[Record]:
    """Lists of fields with the physical line that they begin on, since a field may hold line ends."""
    csv.field_size_limit(FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        first = stream.readline(FIRST_LINE_BYTES)
        stream.seek(0)
        rows = csv.reader(stream, delimiter=max(DELIMITERS, key=first.count), strict=True)
        while True:
            line = rows.line_num + 1
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{path}:{line}: not valid CSV ({error}); a quote is left open, or one inside a text is not doubled."
                ) from error
            try:
                "".join(fields).encode()
            except UnicodeEncodeError as error:
                if line == 1:
                    raise DataError(f"{path}:1: not UTF-8 (character {error.start}); save the file as UTF-8.") from None
                yield Record(line, defect=("not UTF-8", "set aside"))
            else:
                yield Record(line, fields)


def _json_list(path: Path) -> Iterator[Record]:
    text = _Text(path)
    text.take("[")
    if text.next_character() == "]":
        raise DataError(f"{path} is an empty list; it must hold at least one row.")
    line = item = 0  # of the row before
    while True:
        text.next_character()
        begins, value = text.line, text.value()
        is_last = text.next_character() == "]"
        if not is_last:
            text.take(",")
            text.next_character()
        # Two rows share a line only if the first also ends there.
        is_shared = begins == line or (not is_last and begins == text.line)
        line, item = begins, (item + 1 if begins == line else 1) if is_shared else 0
        yield Record(begins, value, item=item)
        if is_last:
            break
    text.take("]")
    if text.next_character():
        raise DataError(f"{path}:{text.line}: is not valid JSON: there is more after the end of the list.")


class _Text:
    """The text of a JSON file, of which only what is being read is in memory; the standard parser wants all of it."""

    BLANK = re.compile(r"[ \t\n\r]*")
    CUT_CHARACTERS = 16  # an error this near to the end of what was read may be due to that end

    def __init__(self, path: Path) -> None:
        self.line = 1
        self._path, self._decoder = path, json.JSONDecoder()
        self._stream = _decoded(path)
        self._text, self._at, self._is_whole = "", 0, False

    def next_character(self) -> str:
        """The next one that is no white space; empty at the end."""
        while True:
            match = self.BLANK.match(self._text, self._at)
            self._advance(match.end() if match else self._at)
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def take(self, wanted: str) -> None:
        if self.next_character() != wanted:
            raise self._invalid(f"expected {wanted!r}", self._at)
        self._advance(self._at + 1)

    def value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - self.CUT_CHARACTERS
                if self._is_whole or not is_cut:
                    raise self._invalid(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._invalid(str(error), self._at) from error
            else:
                if end < len(self._text) or self._is_whole:  # a number could go on
                    self._advance(end)
                    return value
            self._read_more()

    def _invalid(self, what: str, position: int) -> DataError:
        line = self.line + self._text.count("\n", self._at, position)
        return DataError(f"{self._path}:{line}: is not valid JSON: {what}.")

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _read_more(self) -> None:
        """At least as much again as is held, so that a long row is not parsed anew for each piece."""
        pieces, size = [self._text[self._at :]], 0
        while size <= len(pieces[0]):
            piece = next(self._stream, None)
            if piece is None:
                self._is_whole = True
                break
            pieces.append(piece)
            size += len(piece)
        self._text, self._at = "".join(pieces), 0


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = 1
    with path.open("rb") as stream:
        while True:
            piece = stream.read(CHUNK_BYTES)
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n")
                raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error
            if not piece:
                return
            lines += piece.count(b"\n")
