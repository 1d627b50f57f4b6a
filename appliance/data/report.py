"""What an audit found, as a page for people. Main entry: `html`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance import page
from appliance.data import duplicates, personal
from appliance.data.duplicates import Leak
from appliance.data.lengths import PERCENTILES, WHOLE, Field
from appliance.data.spoken import Reading
from appliance.data.topics import Topic
from appliance.findings import Finding
from appliance.page import Chart, Found, Part, Section, Table

MOST_TOPICS = 40


@dataclass(frozen=True, slots=True)
class Audit:
    """Everything that is said of a recipe's data."""

    rows: Mapping[str, int]  # by file
    findings: Sequence[Finding]
    unit: str
    fields: Sequence[Field]
    suggested_max_tokens: Mapping[str, int]
    languages: Mapping[str, Mapping[str, int]]
    topics: Sequence[Topic]
    frequent: Mapping[str, Sequence[tuple[str, int]]]
    blank_lines: Mapping[str, Mapping[str, float]]
    readings: Sequence[Reading]
    random_leaks: Mapping[str, Leak]
    sampled: Sequence[str]


def html(name: str, audit: Audit) -> str:
    """The page of an audit; of rows it shows words and facts that many hold, and keys."""
    sections = [
        Section("Findings", _findings(audit)),
        Section("Lengths", _lengths(audit)),
        Section("Languages", [_languages(audit)]),
        Section("Topics", _topics(audit)),
        Section("Frequent words", [_frequent(audit)]),
        Section("Form and readability", [_blank_lines(audit), _readings(audit)]),
        Section("Duplicates", _leaks(audit)),
        Section("How it was measured", _method(audit)),
    ]
    return page.html(f"Data of {name}", sections)


def _findings(audit: Audit) -> list[Part]:
    rows = ", ".join(f"{file} {count:,}" for file, count in audit.rows.items())
    problems = sum(finding.level == "problem" for finding in audit.findings)
    said = f"Rows: {rows}. {problems} problems, {len(audit.findings) - problems} things worth knowing. Places are file:line."
    return [said, *(Found(finding) for finding in audit.findings)]


def _lengths(audit: Audit) -> list[Part]:
    columns = ["file", "field", *(f"{percent} %" for percent in PERCENTILES), "longest"]
    rows: list[list[str | int | float]] = [
        [field.file, field.name, *field.percentiles, field.longest] for field in audit.fields
    ]
    parts: list[Part] = [f"In {audit.unit}. Of several turns of one role in a row, the longest counts."]
    if audit.suggested_max_tokens:
        parts.append(
            "To hold every row: " + ", ".join(f"{key} = {value}" for key, value in audit.suggested_max_tokens.items()) + "."
        )
    parts.append(Table(columns, rows))
    return [*parts, *(_histogram(field, audit.unit) for field in audit.fields if field.name == WHOLE and field.values)]


def _histogram(field: Field, unit: str) -> Chart:
    return page.histogram(
        field.values, x=unit.partition(" ")[0].rstrip(":"), y="rows", caption=f"Lengths of the rows of {field.file}"
    )


def _languages(audit: Audit) -> Table:
    rows = [
        (file, language, count, f"{count / sum(counts.values()):.1%}")
        for file, counts in audit.languages.items()
        for language, count in counts.items()
    ]
    return Table(["file", "language of the answer", "rows", "share"], rows)


def _topics(audit: Audit) -> list[Part]:
    rows = [(topic.language, ", ".join(topic.words), topic.rows) for topic in audit.topics[:MOST_TOPICS]]
    return ["What is asked about, by clusters of the questions' words.", Table(["language", "its own words", "rows"], rows)]


def _frequent(audit: Audit) -> Table:
    rows = [(language, ", ".join(f"{word} {count:,}" for word, count in each)) for language, each in audit.frequent.items()]
    return Table(["language", "words, and how many answers hold them"], rows)


def _blank_lines(audit: Audit) -> Table:
    rows = [(file, field, f"{share:.1%}") for file, shares in audit.blank_lines.items() for field, share in shares.items()]
    return Table(["file", "field", "with a blank line"], rows)


def _readings(audit: Audit) -> Table:
    rows = [
        (
            each.language,
            each.answers,
            each.method,
            "" if each.median_score is None else f"{each.median_score:.0f}",
            "" if each.hard_share is None else f"{each.hard_share:.0%}",
        )
        for each in audit.readings
    ]
    return Table(["language", "answers", "method", "median", "hard to read"], rows, caption="Readability of the answers")


def _leaks(audit: Audit) -> list[Part]:
    rows = [(file, f"{leak.exact:.1%}", f"{leak.near:.1%}") for file, leak in audit.random_leaks.items()]
    about = f"What a random tenth, held out, has in common with the rest (mean of {duplicates.LEAK_ROUNDS} splits)."
    return (
        [about, Table(["file", "same opening question", "same or nearly the same"], rows)]
        if rows
        else ["Too few rows to tell."]
    )


def _method(audit: Audit) -> list[Part]:
    return [
        f"Nearly the same: {duplicates.SIMILAR:.0%} or more of the runs of {duplicates.SHINGLE_CHARACTERS} characters in"
        f" common (Jaccard, estimated by MinHash), case and punctuation aside. What opens over"
        f" {duplicates.INSTRUCTION_SHARE:.0%} of the rows, or nearly, is taken for an instruction: those rows are compared"
        " by their answers.",
        "Languages by py3langid; short texts are left out of what it decides. Addresses, numbers and names are found by"
        " their form: what is written otherwise is not seen.",
        f"No value of personal data is shown that was found as such, no address or number that neither the FAQ nor more than"
        f" {personal.SHARED_ROWS} rows give, and no word that only so few rows hold. A name that many rows hold, without a"
        " label, is taken for a word.",
        f"Sampled: {'; '.join(audit.sampled)}." if audit.sampled else "Nothing was sampled: every row was read.",
    ]
