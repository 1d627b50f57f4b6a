"""Checks every row of a recipe's files and writes the dataset that all later steps read.

The dataset artifact holds `sft.jsonl`, `heldout.jsonl`, `dpo.jsonl`, `faq.jsonl` in one normal form, and `defects.jsonl`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.data import formats
from appliance.data.formats import Defect, Row
from appliance.errors import ApplianceError, DataError, several
from appliance.recipe import Recipe
from appliance.text import languages

REVISION = 1  # raised when the same files would give another dataset
READERS = {
    "sft": formats.read_conversations,
    "heldout": formats.read_conversations,
    "dpo": formats.read_preferences,
    "faq": formats.read_faq,
}
MOST_SHOWN = 5


def plan(recipe: Recipe) -> Plan:
    """The dataset's identity; raises `DataError` naming every file that is missing."""
    files = _files(recipe)
    missing = [
        f"{path} {'is no file' if path.exists() else 'does not exist'} (data.{name})"
        for name, path in files.items()
        if not path.is_file()
    ]
    if missing:
        raise DataError(several(missing, "Training data is missing"))
    digests = {name: artifacts.digest_file(path) for name, path in files.items()}
    inputs = {"revision": REVISION, "files": digests, "languages": list(recipe.languages)}
    return Plan(kind="dataset", name=recipe.name, inputs=inputs)


def check(recipe: Recipe, root: Path, *, strict: bool) -> Artifact:
    """Reads, repairs and normalizes the files of a recipe.

    Raises `DataError` with everything found when a file yields no usable row, or when `strict` and there is any defect.
    """
    identity = plan(recipe)
    artifact = identity.existing(root)
    defects: list[Defect] = []
    if artifact is None:
        languages.require_known(recipe.languages)
        rows = _read_all(recipe, defects)
        if strict:
            _refuse(defects)
        with artifacts.create(identity, root) as draft:
            for name, each in rows.items():
                _write_lines(draft.path / f"{name}.jsonl", each)
            _write_lines(draft.path / "defects.jsonl", [asdict(defect) for defect in defects])
            draft.results.update(_statistics(rows, defects, recipe.languages))
        artifact = artifacts.load(identity.location(root))
    elif strict:
        _refuse(read_defects(artifact))
    return artifact


def read_defects(dataset: Artifact) -> list[Defect]:
    return [Defect(**row) for row in read_rows(dataset.path, "defects")]


def read_rows(dataset: Path, name: str) -> list[Row]:
    """The rows of one file of a dataset artifact; none when the recipe has no such file.

    Not by `splitlines`, which would also cut at characters that JSON leaves inside a text, such as U+2028.
    """
    path = dataset / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _files(recipe: Recipe) -> dict[str, Path]:
    dpo = recipe.data.dpo if "dpo" in recipe.phases else None
    files = {"sft": recipe.data.sft, "heldout": recipe.data.heldout, "dpo": dpo, "faq": recipe.data.faq}
    return {name: path for name, path in files.items() if path is not None}


def _read_all(recipe: Recipe, defects: list[Defect]) -> dict[str, list[Row]]:
    rows, problems = {}, []
    for name, path in _files(recipe).items():
        found: list[Defect] = []
        try:
            rows[name] = READERS[name](path, found)
        except ApplianceError as error:
            problems.append(str(error))
            continue
        defects += found
        if not rows[name]:
            shown = "; ".join(f"line {defect.line}: {defect.what}" for defect in found[:MOST_SHOWN])
            problems.append(f"{path}: no usable row (data.{name}). {len(found)} defects, first: {shown}")
    trained = {json.dumps(row["messages"]) for row in rows.get("sft", [])}
    if shared := sum(json.dumps(row["messages"]) in trained for row in rows.get("heldout", [])):
        problems.append(
            f"{recipe.data.heldout}: {shared} conversations are in {recipe.data.sft} too; held out is what is not."
        )
    if problems:
        raise DataError(several(problems, "Training data cannot be used"))
    return rows


def _refuse(defects: Sequence[Defect]) -> None:
    if defects:
        raise DataError(several([str(defect) for defect in defects], "--strict, and the data has defects"))


def _statistics(rows: dict[str, list[Row]], defects: list[Defect], candidates: Sequence[str]) -> dict[str, Any]:
    spoken = Counter(
        languages.detect(row["messages"][-1]["content"], candidates) or "unknown" for row in rows.get("sft", [])
    )
    actions = Counter(defect.action for defect in defects)
    return {
        "rows": {name: len(each) for name, each in rows.items()},
        "languages": dict(sorted(spoken.items())),
        "fixed": actions["fixed"],
        "set_aside": actions["set aside"],
    }


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
