"""Boolean queries of three dialects: what is well-formed, what is not and why, and that reading never stops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.text.boolean import Dialect, read

WELL_FORMED: dict[Dialect, list[str]] = {
    "lucene": [
        "aspirin",
        '("heart attack" OR infarction) AND aspirin',
        'title:"heart attack"~2^3 AND date:[2001 TO 2003]',
        "title:(a OR b) && !c || {a TO *}",
        "+aspirin -placebo te?t tit* roam~0.8",
        "NOT aspirin",
        "(a OR b) AND NOT c",
        r"\(1\+1\)\:2 AND /joh?n(ath[oa]n)/",
        "yearPublished>=2024 AND yearPublished<=2025",
    ],
    "pubmed": [
        "aspirin[tiab]",
        'aspirin [ti] AND ("heart attack"[MeSH Terms:noexp] OR mi[tw])',
        '"2010/01/01"[dp] : "2020"[dp]',
        "2010:2020[dp] NOT review[pt]",
        '"blood pressure"[tiab:~2] AND random*',
        "#1 AND #2",
    ],
    "ovid": [
        "exp Heart Failure/ and (aspirin or asa).ti,ab.",
        "heart adj3 attack*",
        "*Aspirin/ OR Aspirin/dt, ae",
        "random$.tw. not wom?n.mp.",
        "or/1-4",
        "1 and 2",
        "limit 5 to english language",
        "U.S. policy",
    ],
}

MALFORMED: list[tuple[Dialect, str, int, str]] = [
    ("lucene", "(a OR b", 1, "this ( is never closed"),
    ("lucene", "a OR b) AND c", 7, "it closes nothing"),
    ("lucene", ")a(", 1, "it closes nothing"),
    ("lucene", 'a AND "b c', 7, "the phrase is never closed"),
    ("lucene", 'a AND ""', 7, "the phrase is empty"),
    ("lucene", "a AND", 3, "nothing follows it"),
    ("lucene", "(a AND) OR b", 4, "nothing follows it inside the group"),
    ("lucene", "OR b", 1, "nothing stands before it"),
    ("lucene", "a AND OR b", 7, "it follows AND directly"),
    ("lucene", "a AND ()", 8, "the group is empty"),
    ("lucene", "title: AND b", 8, "it follows title: directly"),
    ("lucene", "aspirin[tiab]", 8, "it is not a range"),
    ("lucene", "a adj3 b", 3, "operator of Ovid only"),
    ("lucene", "aspirin.ti,ab.", 1, "is Ovid's"),
    ("lucene", "a^ b", 2, "a boost wants a number"),
    ("pubmed", "aspirin[nonsense]", 8, "PubMed has no such field"),
    ("pubmed", "[ti] AND aspirin", 1, "it belongs to nothing"),
    ("pubmed", "asp* AND b", 1, "at least 4 letters"),
    ("pubmed", "title:aspirin", 1, "Lucene's way"),
    ("pubmed", "exp Aspirin/", 5, "is Ovid's"),
    ("pubmed", "a AND NOT b", 7, "it follows AND directly"),
    ("pubmed", "NOT a", 1, "nothing stands before it"),
    ("ovid", "exp aspirin", 1, "exp wants a subject heading"),
    ("ovid", "(a or b) (c or d)", 10, "an operator is missing"),
    ("ovid", "aspirin[tiab]", 8, "it is not used here"),
    ("ovid", "heart adj3", 7, "nothing follows it"),
]


@pytest.mark.parametrize(("dialect", "query"), [(dialect, query) for dialect, all_ in WELL_FORMED.items() for query in all_])
def test_well_formed(dialect: Dialect, query: str) -> None:
    reading = read(query, dialect)
    assert [str(problem) for problem in reading.problems] == []
    assert reading.score == 1


@pytest.mark.parametrize(("dialect", "query", "character", "said"), MALFORMED)
def test_malformed(dialect: Dialect, query: str, character: int, said: str) -> None:
    reading = read(query, dialect)
    assert any(problem.position + 1 == character and said in problem.what for problem in reading.problems), reading.problems
    assert reading.score < 1


def test_parts_are_counted() -> None:
    reading = read('("a b" OR c) AND (d OR (e AND f))', "lucene")
    assert (reading.terms, reading.operators) == (5, 4)


def test_every_mistake_costs() -> None:
    scores = [read(query, "lucene").score for query in ("(a OR b)", "(a OR b", "((a OR b", "((a OR b AND")]
    assert scores == [1, 1 / 2, 1 / 3, 1 / 4]
    for nothing in ("", "  ", "()", "AND"):
        assert read(nothing, "lucene").score == 0


def test_a_query_cut_off_anywhere_in_its_groups_is_malformed() -> None:
    """As a limit of tokens cuts them: what most queries of a published run had."""
    whole = '("bath bombs" OR "body wash") AND ("skin care" OR soap)'
    assert read(whole, "lucene").score == 1
    for end in range(1, len(whole)):
        if whole[:end].count("(") > whole[:end].count(")"):
            assert read(whole[:end], "lucene").score <= 1 / 2


@given(
    query=st.text(alphabet='ab ()"[]:/*.,^~-+!\\ANDORTnot', max_size=60),
    dialect=st.sampled_from(["lucene", "pubmed", "ovid"]),
)
def test_reading_never_stops(query: str, dialect: Dialect) -> None:
    reading = read(query, dialect)
    assert 0 <= reading.score <= 1
    assert all(0 <= problem.position <= len(query) for problem in reading.problems)
    assert (reading.score == 1) == (not reading.problems)


@given(
    parts=st.recursive(
        st.sampled_from(["aspirin", '"heart attack"', "random"]),
        lambda inner: st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(lambda each: f"({' '.join(each)})"),
        max_leaves=12,
    ),
    dialect=st.sampled_from(["lucene", "pubmed", "ovid"]),
)
def test_what_is_built_from_whole_groups_is_well_formed(parts: str, dialect: Dialect) -> None:
    assert read(parts, dialect).score == 1
    if parts.endswith(")"):
        assert read(parts[:-1], dialect).score < 1
        assert read(f"{parts})", dialect).score < 1
