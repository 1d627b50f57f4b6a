"""Looks at all rows of a recipe together: what is in them, what a model would learn that nobody meant, and what to do.

The report artifact holds `audit.html` for people and `audit.json` for programs. Both name places as `file:line` and show
nothing that is found to be somebody's, or that only a few rows hold. Main entry: `audit`.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.console import note
from appliance.data import (
    check,
    contradictions,
    examples,
    leaks,
    lengths,
    personal,
    report,
    shortcuts,
    spoken,
    texts,
    topics,
)
from appliance.data.formats import Defect
from appliance.data.lengths import Field, Meter
from appliance.data.report import Audit
from appliance.data.texts import Text
from appliance.findings import Finding
from appliance.recipe import Recipe
from appliance.text.words import telling

REVISION = 4  # raised when the same dataset would give another report
FREQUENT_WORDS = 20
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
MOST_KEYS = 10  # of a file, each with a finding of its own
SAMPLE_ROWS = 20_000
MANY_ROWS = 20_000  # take more than half a minute
SCHEMA = 1


def plan(recipe: Recipe, dataset: str, base: Path | None) -> Plan:
    """The report's identity; `dataset` is the dataset's id, `base` the folder whose tokenizer is counted with."""
    tokenizer = artifacts.identity(base) if base else None
    inputs = {"revision": REVISION, "tokenizer": tokenizer, "files": check.file_names(recipe)}
    limits = {phase: getattr(recipe, phase).max_tokens for phase in _phases(recipe).values()}
    others = {"answer_tokens": recipe.grpo.answer_tokens, "truncate": recipe.sft.truncate}
    settings = {"languages": list(recipe.languages), "seed": recipe.seed, "max_tokens": limits, **others}
    return Plan(kind="report", name=f"{recipe.name}-audit", inputs=inputs, parents=[dataset], config=settings)


def audit(recipe: Recipe, dataset: Artifact, base: Path | None, root: Path) -> Artifact:
    """The report on a dataset: made, or found made already."""
    identity = plan(recipe, dataset.id, base)
    if (existing := identity.existing(root)) is not None:
        return existing
    with artifacts.create(identity, root) as draft:
        made = examine(recipe, dataset, Meter(base))
        (draft.path / "audit.json").write_text(_json(made), encoding="utf-8")
        (draft.path / "audit.html").write_text(report.html(recipe.name, made), encoding="utf-8")
        levels = Counter(finding.level for finding in made.findings)
        draft.results.update({"problems": levels["problem"], "notices": levels["notice"], "rows": made.rows})
    return artifacts.load(identity.location(root))


def last_of(dataset: str, root: Path) -> Artifact | None:
    """The newest report on a dataset, by the dataset's id; None where there is none."""
    folders = [each for each in root.glob("report/*-audit-*") if (each / artifacts.MANIFEST).is_file()]
    made = [each for each in map(artifacts.load, folders) if dataset in each.manifest["parents"]]
    return max(made, key=lambda each: str(each.manifest["made_at"]), default=None)


def read_findings(made: Artifact) -> list[Finding]:
    """What an audit found."""
    found = json.loads((made.path / "audit.json").read_text(encoding="utf-8"))["findings"]
    return [Finding(**each) for each in found]


def examine(recipe: Recipe, dataset: Artifact, meter: Meter) -> Audit:
    """Everything that the report says."""
    rows, fields, limited, refused = _read(recipe, dataset, meter)
    if len(rows) > MANY_ROWS:
        note(f"audit: {len(rows):,} rows; this takes some minutes")
    heard = spoken.listen(rows, recipe.languages)
    readings, hard = spoken.read(rows, heard.of_row)
    compared = leaks.find(rows, recipe.seed)
    private = personal.names(rows)
    subjects = topics.find([row.asked for row in rows], heard.of_row, recipe.seed, private)
    findings = [
        *_defects(check.read_defects(dataset)),
        *_too_long(recipe, limited),
        *refused,
        *personal.find(rows, recipe.languages),
        *contradictions.find(rows, personal.regions_of(recipe.languages)),
        *shortcuts.find(rows),
        *heard.findings,
        *compared.findings,
        *hard,
    ]
    return Audit(
        rows=dict(Counter(row.file for row in rows)),
        findings=sorted(findings, key=lambda each: each.level != "problem"),
        unit=meter.about,
        fields=fields,
        suggested_max_tokens=_suggested(recipe, limited, fields),
        languages={file: dict(Counter(counts).most_common()) for file, counts in heard.counts.items()},
        topics=subjects.topics,
        frequent=_frequent(rows, heard.of_row, private),
        blank_lines=_blank_lines(rows),
        readings=readings,
        random_leaks=compared.random_leaks,
        sampled=_sampled(len(rows), meter),
    )


def _read(
    recipe: Recipe, dataset: Artifact, meter: Meter
) -> tuple[list[Text], list[Field], dict[str, Field], list[Finding]]:
    """All rows, their lengths, by phase what must fit into its `max_tokens`, and rows that the chat template refuses.

    Apart, so that the rows as they stand in the dataset are forgotten.
    """
    rows: list[Text] = []
    fields: list[Field] = []
    limited: dict[str, Field] = {}
    refused: list[Finding] = []
    phases = _phases(recipe)
    for kind, file in check.file_names(recipe).items():
        own = check.read_rows(dataset.path, kind)
        if own:
            measured, read = lengths.measure(kind, file, own, meter), texts.read(kind, file, own)
            fields += measured.fields
            if kind in phases and meter.unit == "tokens":
                limited[phases[kind]] = measured.fields[-1]
            refused += lengths.check_template(file, [read[number] for number in measured.refused])
            rows += read
    return rows, fields, limited, refused


def _defects(defects: Sequence[Defect]) -> list[Finding]:
    """What `data check` found, alike defects together: those that differ in numbers, or in many quoted keys."""
    alike: dict[tuple[str, str, str], dict[str, list[Defect]]] = {}
    for defect in defects:
        what = NUMBER.sub("…", defect.what)
        of_form = alike.setdefault((defect.file, QUOTED.sub("…", what), defect.action), {})
        of_form.setdefault(what, []).append(defect)
    kinds: dict[tuple[str, str, str], list[Defect]] = {}
    for (file, form, action), by_key in alike.items():
        for what, each in by_key.items():
            kinds.setdefault((file, what if len(by_key) <= MOST_KEYS else form, action), []).extend(each)
    return [
        Finding(
            kind="defect",
            level="problem" if action == "set aside" else "notice",
            what=f"{file}: {what} ({examples.rows(len(each))}, {'left out' if action == 'set aside' else 'repaired'})",
            remedy="Correct the file; `appliance data check` lists each line.",
            count=len(each),
            examples=examples.first(defect.where for defect in each),
        )
        for (file, what, action), each in kinds.items()
    ]


def _phases(recipe: Recipe) -> dict[str, str]:
    """The phase that reads the rows of a kind, and whose `max_tokens` they must fit into."""
    return {"sft": "sft", "dpo": recipe.preference_phase or "dpo", "kto": "kto", "grpo": "grpo"}


def _answer_tokens(recipe: Recipe, phase: str) -> int:
    """What a row must leave free: a prompt for rewards has no answer yet."""
    return recipe.grpo.answer_tokens if phase == "grpo" else 0


def _too_long(recipe: Recipe, limited: Mapping[str, Field]) -> list[Finding]:
    found = []
    for phase, field in limited.items():
        limit, answer = getattr(recipe, phase).max_tokens, _answer_tokens(recipe, phase)
        is_cut = phase == "sft" and recipe.sft.truncate
        found += lengths.check_limit(phase, field, limit, answer_tokens=answer, is_cut=is_cut)
    return found


def _suggested(recipe: Recipe, limited: Mapping[str, Field], fields: Sequence[Field]) -> dict[str, int]:
    """Limits that hold every row, by the recipe's keys: for training, and for the longest answer when serving."""
    limits = {
        f"{phase}.max_tokens": lengths.suggested(field, _answer_tokens(recipe, phase)) for phase, field in limited.items()
    }
    answers = [field for field in fields if field.name in ("assistant", "chosen", "completion")]
    if limited and answers:
        limits["serve.max_tokens"] = max(lengths.suggested(field) for field in answers)
    return limits


def _frequent(rows: Sequence[Text], of_row: Sequence[str], private: Collection[str]) -> dict[str, list[tuple[str, int]]]:
    """The words that most answers of a language hold, without those that say nothing or are somebody's."""
    counts: dict[str, Counter[str]] = {}
    step = -(-len(rows) // SAMPLE_ROWS)
    for row, language in zip(rows[::step], of_row[::step], strict=True):
        counts.setdefault(language, Counter()).update(set(telling(row.answer)))
    return {
        language: [
            (word, count)
            for word, count in each.most_common(FREQUENT_WORDS + len(private))
            if count > personal.SHARED_ROWS and word not in private
        ][:FREQUENT_WORDS]
        for language, each in sorted(counts.items())
    }


def _blank_lines(rows: Sequence[Text]) -> dict[str, dict[str, float]]:
    """Shares of answers with a blank line, by file: a form that a model copies."""
    shares: dict[str, dict[str, float]] = {}
    for file in dict.fromkeys(row.file for row in rows):
        own = [row for row in rows if row.file == file]
        shares[file] = {"answer": sum("\n\n" in row.answer for row in own) / len(own)}
        if own[0].kind == "dpo":
            shares[file]["rejected"] = sum("\n\n" in row.rejected for row in own) / len(own)
    return shares


def _sampled(rows: int, meter: Meter) -> list[str]:
    """What was not counted over all rows."""
    limits = [
        (lengths.SAMPLE_ROWS, f"lengths in tokens (the {lengths.LONGEST_ROWS:,} longest rows are measured too)"),
        (topics.SAMPLE_ROWS, "the words and clusters of topics"),
        (SAMPLE_ROWS, "frequent words"),
        (shortcuts.SAMPLE_ROWS, "words that dominate few rows"),
        (spoken.SAMPLE_ROWS, "readability, of each language"),
    ]
    if meter.unit != "tokens":
        limits = limits[1:]
    return [f"{what}: at most {limit:,} rows" for limit, what in limits if rows > limit]


def _json(made: Audit) -> str:
    fields = [
        {
            "file": field.file,
            "field": field.name,
            "rows": len(field.values),
            "percentiles": dict(zip(map(str, lengths.PERCENTILES), field.percentiles, strict=True)),
            "longest": field.longest,
        }
        for field in made.fields
    ]
    value: dict[str, Any] = {"schema": SCHEMA, **asdict(replace(made, fields=[])), "fields": fields}
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
