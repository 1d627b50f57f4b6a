"""Findings on duplicates: equal questions, rows nearly the same, and what of the held-out rows is trained on anyway."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from appliance.data import duplicates, examples
from appliance.data.duplicates import Alike, Leak, Likeness
from appliance.data.texts import Text
from appliance.findings import Finding
from appliance.text.words import normal

HELDOUT = 0.1  # as large as a random split is usually made
MINIMUM_ROWS = 20
LEAKS = 0.02


@dataclass(frozen=True, slots=True)
class Compared:
    findings: Sequence[Finding]
    random_leaks: Mapping[str, Leak]


def find(rows: Sequence[Text], seed: int) -> Compared:
    """Compares the rows of each file with each other, and what is held out with what is trained on."""
    findings: list[Finding] = []
    random_leaks: dict[str, Leak] = {}
    compared = [row for row in rows if row.kind != "faq"]
    likeness = duplicates.compare(compared)
    is_held = any(row.kind == "heldout" for row in compared)
    start = 0
    for file, each in itertools.groupby(compared, key=lambda row: row.file):
        own = list(each)
        here = likeness.among(slice(start, start + len(own)))
        start += len(own)
        if own[0].kind == "heldout":
            continue
        findings += [*_same_prompts(own, here.questions), *_near(own, here.wholes)]
        if len(own) >= MINIMUM_ROWS:
            random_leaks[file] = here.random_leak(round(HELDOUT * len(own)), seed)
            # Who holds rows out already is told by `_heldout` what leaks; of prompts for rewards nobody holds any out.
            if own[0].kind != "grpo" and (own[0].kind != "sft" or not is_held):
                findings += _random_split(file, own, here.groups.tolist(), random_leaks[file])
    findings += _heldout(compared, likeness)
    return Compared(findings, random_leaks)


def _together(rows: Sequence[Text], codes: Sequence[int]) -> list[list[Text]]:
    """Rows of the same code, the largest such groups first."""
    groups: dict[int, list[Text]] = {}
    for row, code in zip(rows, codes, strict=True):
        groups.setdefault(code, []).append(row)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _same_prompts(rows: Sequence[Text], openings: Alike) -> list[Finding]:
    groups = _together(rows, openings.codes.tolist())
    if not groups:
        return []
    repeated = sum(len(group) - 1 for group in groups)
    exact = len(rows) - len({row.opening for row in rows})
    answers = sum(len({normal(row.answer) for row in group}) > 1 for group in groups)
    places = [" = ".join(row.place for row in group[:6]) for group in groups[: examples.MOST]]
    return [
        Finding(
            kind="duplicate_prompts",
            level="notice",
            what=f"{rows[0].file}: the opening question of another row again in {repeated:,} of {len(rows):,} rows"
            f" ({exact:,} to the letter; at most {len(groups[0])} rows share one), with different answers to {answers:,} of"
            f" {len(groups):,} such questions",
            remedy="Keep the best answer to each, or make the questions say what the answers depend on;"
            " `appliance data split` keeps them on one side.",
            count=repeated,
            examples=[f"{rows[0].file}:{place}" for place in places],
            figures={"to_the_letter": exact, "most_alike": len(groups[0])},
        )
    ]


def _near(rows: Sequence[Text], wholes: Alike) -> list[Finding]:
    """Whole rows, question and answer, that are nearly the same."""
    import numpy

    codes = wholes.codes
    is_alike = numpy.bincount(codes, minlength=wholes.distinct) > 1
    is_alike[wholes.pairs.reshape(-1)] = True
    count = int(is_alike[codes].sum())
    if not count:
        return []
    pairs = [(group[0], group[1]) for group in _together(rows, codes.tolist())][: examples.MOST]
    first = {code: row for row, code in zip(reversed(rows), reversed(codes.tolist()), strict=True)}
    _, places = numpy.unique(wholes.pairs[:, 0], return_index=True)  # one of each: a row may be like hundreds of others
    pairs += [(first[one], first[other]) for one, other in wholes.pairs[places[: examples.MOST]].tolist()]
    return [
        Finding(
            kind="near_duplicates",
            level="notice",
            what=f"{rows[0].file}: {count:,} of {len(rows):,} rows are nearly the same as another, question and answer",
            remedy="Keep one of each; copies weigh a row more than others and hide that little was learned.",
            count=count,
            examples=[f"{one.where} ~ {other.place}" for one, other in pairs[: examples.MOST]],
        )
    ]


def _random_split(file: str, rows: Sequence[Text], groups: Sequence[int], leak: Leak) -> list[Finding]:
    if leak.near < LEAKS:
        return []
    together = _together(rows, groups)
    return [
        Finding(
            kind="random_split_leaks",
            level="problem",
            what=f"{file}: of a random {HELDOUT:.0%} held out, {leak.exact:.1%} have the same opening question among the"
            f" rows trained on, and {leak.near:.1%} the same or nearly the same (mean of {duplicates.LEAK_ROUNDS} splits)",
            remedy="Hold out with `appliance data split RECIPE`, which keeps them on one side.",
            count=sum(len(group) for group in together),
            examples=[
                " ~ ".join([group[0].where, *(row.place for row in group[1:6])]) for group in together[: examples.MOST]
            ],
            figures={"exact": leak.exact, "near": leak.near},
        )
    ]


def _heldout(rows: Sequence[Text], likeness: Likeness) -> list[Finding]:
    """Held-out rows that are trained on in all but name."""
    if not any(row.kind == "heldout" for row in rows):
        return []
    import numpy

    is_heldout = numpy.array([row.kind == "heldout" for row in rows])
    leaking = likeness.leaking(is_heldout)
    held = [row for row, is_held, leaks in zip(rows, is_heldout, leaking, strict=True) if is_held and leaks]
    if not held:
        return []
    count = int(is_heldout.sum())
    return [
        Finding(
            kind="heldout_leaks",
            level="problem",
            what=f"{len(held):,} of {count:,} held-out rows have the same or nearly the same row among those trained on",
            remedy="Measure on others: join both files, take data.heldout out of the recipe, and `appliance data split`.",
            count=len(held),
            examples=examples.of(held),
            figures={"share": len(held) / count},
        )
    ]
