"""Checks every row of a recipe's files and writes the dataset that all later steps read.

The dataset holds `sft.jsonl`, `heldout.jsonl`, `dpo.jsonl`, `kto.jsonl`, `grpo.jsonl`, `faq.jsonl`, each in its
normal form (`shapes.py`), and `defects.jsonl`. Rows are read and written one by one, so a large file needs little memory.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data import formats, texts
from appliance.data.columns import Map
from appliance.data.defects import place
from appliance.data.documents import DOCUMENTS
from appliance.data.formats import Defect, Reading, Row
from appliance.errors import ApplianceError, DataError, several
from appliance.recipe import Recipe
from appliance.text import languages

REVISION = 4  # raised when the same files would give another dataset
MOST_SHOWN = 5  # of the defects of a file that cannot be used
MOST_REFUSED = 100


def plan(recipe: Recipe) -> Plan:
    """The dataset's identity; raises `DataError` naming every file that is missing."""
    sources = files(recipe)
    missing = [
        f"{path} {'is no file' if path.exists() else 'does not exist'} (data.{name})"
        for name, path in sources.items()
        if not path.is_file()
    ]
    if missing:
        raise DataError(several(missing, "Training data is missing"))
    digests = {name: artifacts.digest_file(path) for name, path in sources.items()}
    maps = {name: found for name in sources if (found := columns(recipe, name))}
    inputs = {"revision": REVISION, "files": digests, "languages": list(recipe.languages), "columns": maps}
    return Plan(kind="dataset", name=recipe.name, inputs=inputs)


def check(recipe: Recipe, root: Path, *, strict: bool) -> Artifact:
    """Reads, repairs and normalizes the files of a recipe.

    Raises `DataError` with everything found when a file yields no usable row, or when `strict` and there is any defect.
    """
    identity = plan(recipe)
    artifact = identity.existing(root)
    if artifact is None:
        languages.require_known(recipe.languages)
        with artifacts.create(identity, root) as draft:
            defects: list[Defect] = []
            draft.results.update(_write(recipe, draft.path, defects))
            if strict:
                _refuse(defects)
            _write_lines(draft.path / "defects.jsonl", map(asdict, defects))
        artifact = artifacts.load(identity.location(root))
    elif strict:
        _refuse(read_defects(artifact))
    return artifact


def read_defects(dataset: Artifact) -> list[Defect]:
    return [Defect(**row) for row in read_rows(dataset.path, "defects")]


def read_rows(dataset: Path, name: str) -> list[Row]:
    """The rows of one file of a dataset artifact; none when the recipe has no such file."""
    return list(each_row(dataset, name))


def each_row(dataset: Path, name: str) -> Iterator[Row]:
    """The same, one by one.

    Not by `splitlines`, which would also cut at characters that JSON leaves inside a text, such as U+2028.
    """
    path = dataset / f"{name}.jsonl"
    if path.exists():
        with path.open("rb") as stream:
            yield from map(json.loads, stream)


def files(recipe: Recipe) -> dict[str, Path]:
    """The recipe's files of rows, by their key in `[data]`; of phases that it has."""
    data = recipe.data
    kto = data.kto if "kto" in recipe.phases else None
    grpo = data.grpo if "grpo" in recipe.phases else None
    every = {"sft": data.sft, "heldout": data.heldout, "dpo": recipe.triplets, "kto": kto, "grpo": grpo, "faq": data.faq}
    return {name: path for name, path in every.items() if path is not None}


def file_names(recipe: Recipe) -> dict[str, str]:
    """What the files are called in reports: two of one name, in several folders or the same one, are told apart by key."""
    names = {key: path.name for key, path in files(recipe).items()}
    several_times = {name for name, count in Counter(names.values()).items() if count > 1}
    return {key: f"{name} ({key})" if name in several_times else name for key, name in names.items()}


def columns(recipe: Recipe, name: str) -> Map | None:
    """The map of columns that a recipe has for a file; held-out rows may be a part of those trained on, and have its map."""
    maps: Mapping[str, Map | None] = plain(recipe.data.columns)
    if name == "heldout" and maps.get(name) is None and recipe.data.heldout is not None:
        shared = maps.get("sft")
        return shared if shared and formats.fits(recipe.data.heldout, shared) else None
    return maps.get(name)


def _write(recipe: Recipe, folder: Path, defects: list[Defect]) -> dict[str, Any]:
    """Writes every file's rows; returns what they are. Raises `DataError` with all that is wrong with all files."""
    tally = _Tally(recipe.languages)
    problems: list[str] = []
    names = file_names(recipe)
    for name, path in files(recipe).items():
        found: list[Defect] = []
        try:
            reading = formats.examine(path, name, columns(recipe, name))
            rows = tally.counted(name, reading, reading.rows(found))
            _write_lines(folder / f"{name}.jsonl", rows)
        except ApplianceError as error:
            problems.append(str(error))
            continue
        finally:
            defects += [replace(defect, file=names[name]) for defect in found]
        if not tally.rows[name]:
            shown = "; ".join(f"line {place(defect.line, defect.item)}: {defect.what}" for defect in found[:MOST_SHOWN])
            problems.append(f"{path}: no usable row (data.{name}). {len(found)} defects, first: {shown}")
    if tally.shared:
        problems.append(
            f"{recipe.data.heldout}: {tally.shared} conversations are in {recipe.data.sft} too; held out is what is not."
        )
    if problems:
        raise DataError(several(problems, "Training data cannot be used"))
    return tally.results(defects)


class _Tally:
    """What passes by on its way into the dataset."""

    def __init__(self, candidates: Sequence[str]) -> None:
        self.rows: Counter[str] = Counter()
        self.shared = 0  # conversations that are both trained on and held out
        self._formats: dict[str, Mapping[str, Any]] = {}
        self._languages: Counter[str] = Counter()
        self._candidates = candidates
        self._trained: set[bytes] = set()

    def counted(self, name: str, reading: Reading, rows: Iterator[Row]) -> Iterator[Row]:
        self.rows[name] = 0
        self._formats[name] = {
            "file": reading.source.path.name,
            "shape": reading.shape.name,
            "kind": reading.source.kind,
            "columns": reading.columns,
            "unused": list(reading.unused),
            "text": str(reading),
        }
        for row in rows:
            self.rows[name] += 1
            if name == "sft":
                text = texts.read_one(name, reading.source.path.name, row)
                self._languages[languages.of_row(text.answer, text.asked, self._candidates)] += 1
                self._trained.add(_conversation(row))
            elif name == "heldout":
                self.shared += _conversation(row) in self._trained
            yield row

    def results(self, defects: Sequence[Defect]) -> dict[str, Any]:
        actions = Counter(defect.action for defect in defects)
        return {
            "rows": dict(self.rows),
            "formats": self._formats,
            "languages": dict(sorted(self._languages.items())),
            "fixed": actions["fixed"],
            "set_aside": actions["set aside"],
        }


def _conversation(row: Row) -> bytes:
    """What tells it apart, wherever it stands in a file: the same question over other documents is another one."""
    return formats.digest((row["messages"], row.get(DOCUMENTS)))


def _refuse(defects: Sequence[Defect]) -> None:
    if defects:
        raise DataError(several([*map(str, defects)], "--strict, and the data has defects", MOST_REFUSED))


def _write_lines(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
