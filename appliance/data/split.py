"""Divides a recipe's rows into those to train on and those held out, so that near-duplicates never cross.

Rows that belong together (`duplicates`) are held out together or not at all, across the files of all phases. Among
such groups those are chosen that bring every language and topic nearest to the wanted share. Main entry: `divide`.
"""

import random
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.data import check, duplicates, personal, source_rows, texts, topics
from appliance.data.duplicates import Leak, Likeness
from appliance.data.formats import Row
from appliance.data.texts import Text
from appliance.errors import ArtifactError, DataError, RecipeError, several
from appliance.recipe import Recipe
from appliance.text import languages

LEAST_GAIN = 1e-9  # what rounding could make of none
KINDS = ("sft", "dpo", "kto", "grpo")
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One of the recipe's files, divided. Leaks: of this split, and of random splits of the same size."""

    kind: str  # of KINDS
    rows: Sequence[Text]
    is_heldout: Sequence[bool]
    strata: Sequence[tuple[str, str]]  # language, topic
    leak: Leak
    random_leak: Leak

    @property
    def heldout_rows(self) -> int:
        return sum(self.is_heldout)

    def shares(self) -> dict[str, tuple[int, int]]:
        """Rows and rows held out, by language and by topic."""
        every: Counter[str] = Counter()
        held: Counter[str] = Counter()
        for (language, topic), is_held in zip(self.strata, self.is_heldout, strict=True):
            for name in (language, topic):
                every[name] += 1
                held[name] += is_held
        return {name: (every[name], held[name]) for name in sorted(every)}


def divide(parts: Mapping[str, Sequence[Text]], spoken: Sequence[str], share: float, seed: int) -> list[Part]:
    """Divides rows by kind (`KINDS`); `spoken` are the languages to tell apart.

    Raises `DataError` when the rows of a kind are so alike that none can be held out. Prompts for rewards may be: they are
    divided so that none is held out in another file, and a few may repeat without end.
    """
    rows = [row for each in parts.values() for row in each]
    likeness = duplicates.compare(rows)
    strata = _strata(rows, spoken, seed)
    held = _choose(likeness, [row.kind for row in rows], strata, share, seed)
    made, start = [], 0
    for kind, each in parts.items():
        here = slice(start, start + len(each))
        start = here.stop
        made.append(_part(kind, each, likeness, held, strata[here], here, seed))
    empty = [
        f"{part.rows[0].file}: {len(part.rows)} rows"
        for part in made
        if part.heldout_rows == len(part.rows) or (not part.heldout_rows and part.kind != "grpo")
    ]
    if empty:
        what = "Too few, or too much alike (near-duplicates stay together), to hold any out; add rows or raise --validation"
        raise DataError(several(empty, what))
    return made


def _part(
    kind: str,
    rows: Sequence[Text],
    likeness: Likeness,
    held: Sequence[bool],
    strata: Sequence[tuple[str, str]],
    here: slice,
    seed: int,
) -> Part:
    import numpy

    everywhere = numpy.array(held, dtype=bool)
    # What leaks is looked for among all that is trained on; the random split is of this file, as one would make it.
    outside = numpy.zeros(len(held), dtype=bool)
    outside[here] = True
    leak = likeness.leak(everywhere, of=outside)
    random_leak = likeness.among(here).random_leak(int(everywhere[here].sum()), seed)
    return Part(kind, rows, list(held[here]), strata, leak, random_leak)


def _strata(rows: Sequence[Text], spoken: Sequence[str], seed: int) -> list[tuple[str, str]]:
    detected = [languages.of_row(row.answer, row.asked, spoken) for row in rows]
    found = topics.find([row.asked for row in rows], detected, seed, personal.names(rows))
    return list(zip(detected, found.of_row, strict=True))


def _choose(
    likeness: Likeness, kinds: Sequence[str], strata: Sequence[tuple[str, str]], share: float, seed: int
) -> list[bool]:
    """Holds groups out, or takes them back, the largest first, as long as that brings the counts nearer to what is wanted.

    Taken back, because those that come first are held out while everything is short: their topics get more than a share.
    """
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(likeness.groups.tolist()):
        groups.setdefault(group, []).append(row)
    keys = [list(_keys(kind, *stratum)) for kind, stratum in zip(kinds, strata, strict=True)]
    wanted = {key: count * share for key, count in Counter(key for each in keys for key in each).items()}
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    order.sort(key=len, reverse=True)
    sizes = [Counter(key for row in group for key in keys[row]) for group in order]
    counts: Counter[Key] = Counter()
    held = [False] * len(kinds)
    has_changed = True
    while has_changed:  # it ends: every change brings the sum of the distances down
        has_changed = False
        for group, size in zip(order, sizes, strict=True):
            sign = -1 if held[group[0]] else 1
            if _gain(size.items(), sign, counts, wanted) <= LEAST_GAIN:
                continue
            has_changed = True
            for key, rows in size.items():
                counts[key] += sign * rows
            for row in group:
                held[row] = not held[row]
    return held


def _keys(kind: str, language: str, topic: str) -> Iterable[Key]:
    """What is counted of a row; a topic belongs to one language."""
    return (kind,), (kind, language), (kind, language, topic)


def _gain(size: Iterable[tuple[Key, int]], sign: int, counts: Mapping[Key, int], wanted: Mapping[Key, float]) -> float:
    """By how much the squared distances to the wanted counts, each in units of what is wanted, become smaller."""
    gain = 0.0
    for key, rows in size:
        before = counts.get(key, 0) - wanted[key]
        after = before + sign * rows
        gain += (before * before - after * after) / wanted[key]
    return gain


def read(recipe: Recipe, dataset: Mapping[str, Sequence[Row]]) -> dict[str, list[Text]]:
    """The rows that are divided, by kind."""
    names = check.file_names(recipe)
    return {kind: texts.read(kind, names[kind], dataset[kind]) for kind in _sources(recipe)}


def plan_files(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Where the parts of each file of the recipe go; raises `RecipeError` for a recipe that already holds rows out."""
    if recipe.data.heldout is not None:
        raise RecipeError(
            f"data.heldout is {recipe.data.heldout} already; take it out of the recipe to divide data.sft anew (its rows"
            " are not mixed in), or see with `appliance data audit` whether what is held out is trained on."
        )
    sources = _sources(recipe)
    stems = {kind: path.stem for kind, path in sources.items()}
    if len(set(stems.values())) < len(stems):  # files of one name, in several folders
        stems = {kind: kind for kind in sources}
    return {f"{kind}.{part}": folder / f"{stems[kind]}.{part}.jsonl" for kind in sources for part in ("train", "validation")}


def _sources(recipe: Recipe) -> dict[str, Path]:
    return {kind: path for kind, path in check.files(recipe).items() if kind in KINDS}


def write(recipe: Recipe, parts: Sequence[Part], files: Mapping[str, Path], *, force: bool) -> str:
    """Writes the rows as they stand in the user's files; returns whether files were "made" or are "unchanged".

    Raises `ArtifactError` rather than overwrite other rows, unless `force`.
    """
    contents: dict[str, bytes] = {}
    for part in parts:
        own = source_rows.read(recipe, part.kind, _sources(recipe)[part.kind])
        for name, wanted in (("train", False), ("validation", True)):
            chosen = (line for line, is_held in zip(own, part.is_heldout, strict=True) if is_held == wanted)
            contents[f"{part.kind}.{name}"] = "".join(f"{line}\n" for line in chosen).encode()
    differing = [str(path) for name, path in files.items() if path.exists() and path.read_bytes() != contents[name]]
    if differing and not force:
        raise ArtifactError(several(differing, "These files exist and hold other rows; --force replaces them"))
    if not differing and all(path.exists() for path in files.values()):
        return "unchanged"
    for name, path in files.items():
        artifacts.write_atomically(path, contents[name].decode())
    return "made"


def in_words(part: Part) -> str:
    """A part's figures, the random split's leak beside its own."""
    lines = [
        f"{part.rows[0].file}: {len(part.rows):,} rows, {part.heldout_rows:,} held out"
        f" ({part.heldout_rows / len(part.rows):.1%})",
        f"  {'among the rows trained on too':<44} {'this split':>10} {'a random one':>13}",
        f"  {'the same opening question':<44} {part.leak.exact:>10.1%} {part.random_leak.exact:>13.1%}",
        f"  {'the same or nearly the same':<44} {part.leak.near:>10.1%} {part.random_leak.near:>13.1%}",
    ]
    for name, (every, held) in part.shares().items():
        lines.append(f"  {name[:44]:<44} {held:>4,} of {every:,}")
    return "\n".join(lines)


def next_step(recipe_path: Path, files: Mapping[str, Path], state: str) -> str:
    """What was written, and what to put into the recipe and to type next."""
    settings = {"data.sft": "sft.train", "data.heldout": "sft.validation"}
    settings |= {f"data.{kind}": f"{kind}.train" for kind in KINDS}
    named = {key: files[name] for key, name in settings.items() if name in files}
    lines = [f"{path} ({state})" for path in files.values()]
    lines += ["", f"To train on it, in {recipe_path}:", "[data]"]
    lines += [f'{key.removeprefix("data.")} = "{path.name}"' for key, path in named.items()]
    lines += ["", "or without changing the recipe:"]
    sets = " ".join(f"--set {key}={shlex.quote(str(path))}" for key, path in named.items())
    lines.append(f"appliance run {shlex.quote(str(recipe_path))} {sets}")
    return "\n".join(lines)


def as_data(part: Part) -> dict[str, Any]:
    """A part's figures for JSON."""
    return {
        "rows": len(part.rows),
        "validation_rows": part.heldout_rows,
        "leak": {"exact": part.leak.exact, "near": part.leak.near},
        "random_leak": {"exact": part.random_leak.exact, "near": part.random_leak.near},
        "strata": {name: {"rows": every, "validation": held} for name, (every, held) in part.shares().items()},
    }
