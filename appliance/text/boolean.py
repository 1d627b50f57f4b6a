"""Reads Boolean search queries in the dialects of Lucene, PubMed and Ovid, and says what is malformed and where.

Entry: `read`. Reading never stops at a mistake: an expression as a model writes it is graded, not only refused. The
grammars follow the syntax pages of Lucene's classic query parser, PubMed's user guide and Ovid's advanced search. Knows
nothing of what a query finds.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Dialect = Literal["lucene", "pubmed", "ovid"]
# "before" belongs to the operand that follows (a field, a sign), "after" to the one that it follows (a tag, a boost).
Kind = Literal["space", "open", "close", "operator", "before", "term", "after", "wrong"]

SHOWN_CHARACTERS = 24
FEWEST_LETTERS = 4  # that PubMed wants before a *
_TAGS = """
    ti, tiab, tw, ab, all, au, 1au, lastau, fau, cn, auid, ad, ta, journal, jid, is, vi, ip, pg, la, lang, pt, dp,
    pdat, edat, crdt, mhda, dcom, lr, mh, mesh, majr, sh, nm, rn, pa, ps, gr, ir, fir, tt, ot, other, pl, pmid,
    uid, sb, filter, book, ed, isbn, lid, aid, si, ci, cois, title, abstract, title/abstract, text, author,
    affiliation, language, editor, publisher, volume, issue, pagination, mesh terms, mesh subheading, mesh major
    topic, mesh date, publication type, date - publication, date - entry, date - create, text word, text words,
    all fields, other term, substance name, supplementary concept, last author name, first author name, full
    author name, corporate author, investigator, grants and funding, place of publication, ec/rn number
"""
PUBMED_TAGS = frozenset(" ".join(tag.split()) for tag in _TAGS.split(","))
PUBMED_MODIFIERS = re.compile(r":(noexp|~\d+)$", re.IGNORECASE)


class Token(NamedTuple):
    kind: Kind
    text: str
    position: int  # of its first character, counted from 0


@dataclass(frozen=True, slots=True)
class Problem:
    position: int
    what: str

    def __str__(self) -> str:
        return f"character {self.position + 1}: {self.what}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a query consists of, and all that is wrong with it."""

    problems: Sequence[Problem]
    terms: int
    operators: int

    @property
    def score(self) -> float:
        """1 for a well-formed query, 1/2 for one mistake, 1/3 for two and so on; 0 without anything to search for."""
        return 1 / (1 + len(self.problems)) if self.terms else 0.0


def read(query: str, dialect: Dialect) -> Reading:
    """Reads a query to its end, whatever is wrong with it; problems come in the order of the text."""
    reader = _Reader(dialect)
    for token in _tokens(query, dialect):
        reader.take(token)
    reader.finish(len(query))
    problems = sorted(reader.problems, key=lambda problem: problem.position)
    return Reading(problems, reader.terms, reader.operators)


# In order: the first that fits is taken. What is unclosed or belongs to no rule comes last, as "wrong".
_SHARED: Mapping[str, tuple[Kind, str]] = {
    "space": ("space", r"\s+"),
    "open": ("open", r"\("),
    "close": ("close", r"\)"),
}
_UNCLOSED: Mapping[str, tuple[Kind, str]] = {"unclosed": ("wrong", r'".*')}
_PHRASE: Mapping[str, tuple[Kind, str]] = {"phrase": ("term", r'"[^"]*"')}
_GRAMMARS: Mapping[Dialect, Mapping[str, tuple[Kind, str]]] = {
    "lucene": {
        **_SHARED,
        "operator": ("operator", r"(?:AND|OR)(?=[\s()\"]|$)|&&|\|\|"),
        "not": ("before", r"NOT(?=[\s(\"]|$)"),
        "sign": ("before", r"[-+!](?=[^\s)])"),
        "phrase": ("term", r'"(?:\\.|[^"\\])*"'),
        **_UNCLOSED,
        "range": ("term", r"[\[{]\s*[^\s\[\]{}]+\s+TO\s+[^\s\[\]{}]+\s*[\]}]"),
        "bracket": ("wrong", r"[\[{][^\[\]{}]*[\]}]?|[\]}]"),
        "boost": ("after", r"\^\d+(?:\.\d+)?|~\d*(?:\.\d+)?"),
        "mark": ("wrong", r"\^"),
        "field": ("before", r"[A-Za-z_][\w.]*(?::(?:[<>]=?)?|[<>]=?|=)"),
        "pattern": ("term", r"/(?:\\.|[^/\\\s])+/"),
        "word": ("term", r"(?:\\.|[^\s()\"\[\]{}^~\\])+"),
        "escape": ("wrong", r"\\"),
    },
    "pubmed": {
        **_SHARED,
        "operator": ("operator", r"(?:AND|OR|NOT)(?=[\s()\"]|$)|:(?=\s)"),
        **_PHRASE,
        **_UNCLOSED,
        "tag": ("after", r"\[[^\[\]()\"]*\]"),
        "bracket": ("wrong", r"\[[^\s()\"]*|\]"),
        "word": ("term", r"[^\s()\"\[\]]+"),
    },
    "ovid": {
        **_SHARED,
        "command": ("term", r"limit\s+\d+\s+to\s+\S.*"),
        "lines": ("term", r"(?:or|and)/\d+(?:[-,]\d+)*"),
        "operator": ("operator", r"(?:and|or|not|adj\d*)(?=[\s()\"]|$)"),
        "explode": ("before", r"exp\s+(?=[^\s()\"/][^()\"/]*/)|\*(?=[^\s()\"/][^()\"/]*/)"),
        "exp": ("wrong", r"exp(?=\s|$)"),
        **_PHRASE,
        **_UNCLOSED,
        "fields": ("after", r"\.[a-z]{2}(?:,[a-z]{2})*\.?(?![\w.])"),
        "heading": ("after", r"/(?:[a-z]{2}(?:,\s?[a-z]{2})*(?![\w]))?"),
        "bracket": ("wrong", r"[\[\]{}]"),
        "word": ("term", r"(?:(?!\.[a-z]{2}(?:,[a-z]{2})*\.?(?![\w.]))[^\s()\"\[\]{}/])+"),
    },
}
_FLAGS = {"lucene": re.DOTALL, "pubmed": re.DOTALL, "ovid": re.DOTALL | re.IGNORECASE}
_PATTERNS = {
    dialect: re.compile("|".join(f"(?P<{name}>{pattern})" for name, (_, pattern) in grammar.items()), _FLAGS[dialect])
    for dialect, grammar in _GRAMMARS.items()
}
# Words that mean something in another dialect, and nothing in this one.
_ADJACENCY = (re.compile(r"adj\d+", re.IGNORECASE), "adjN is an operator of Ovid only")
_OVID_FIELDS = (
    re.compile(r".*\.(?:ti|ab|tw|mp|kf|kw|sh)(?:,(?:ti|ab|tw|mp|kf|kw|sh))*\."),
    "this way to name fields is Ovid's",
)
_LUCENE_FIELD = (re.compile(r"[A-Za-z_]{2,}:[^\s:/]+"), "field:term is Lucene's way to name a field")
_HEADING = (re.compile(r"[^\W\d]{3,}/"), "a subject heading that ends with / is Ovid's")
_FOREIGN: Mapping[Dialect, Sequence[tuple[re.Pattern[str], str]]] = {
    "lucene": (_ADJACENCY, _OVID_FIELDS, _HEADING),
    "pubmed": (_ADJACENCY, _OVID_FIELDS, _HEADING, _LUCENE_FIELD),
    "ovid": (_LUCENE_FIELD,),
}


def _tokens(query: str, dialect: Dialect) -> Iterator[Token]:
    grammar, pattern = _GRAMMARS[dialect], _PATTERNS[dialect]
    position = 0
    while position < len(query):
        match = pattern.match(query, position)
        assert match is not None  # some rule takes every character
        assert match.lastgroup is not None
        yield Token(grammar[match.lastgroup][0], match.group(), position)
        position = match.end()


class _Reader:
    """One query. An operand is a term or a group; `_wants` says what calls for one that has not come yet."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.problems: list[Problem] = []
        self.terms = self.operators = 0
        self._open: list[Token] = []
        self._wants: Token | None = None
        self._last: Token | None = None  # but for spaces
        self._after_space = False
        self._readers: Mapping[Kind, Callable[[Token], None]] = {
            "open": self._opening,
            "close": self._closing,
            "operator": self._operator,
            "before": self._before,
            "term": self._term,
            "after": self._after,
            "wrong": self._wrong,
        }

    def take(self, token: Token) -> None:
        if token.kind == "space":
            self._after_space = True
            return
        self._readers[token.kind](token)
        self._last, self._after_space = token, False

    def finish(self, end: int) -> None:
        if self._wants is not None:
            self._say(self._wants, "nothing follows it")
        for token in self._open:
            self.problems.append(Problem(token.position, "this ( is never closed"))
        if not self.terms:
            self.problems.append(Problem(end, "there is nothing to search for"))

    def _begins(self) -> bool:
        """Whether nothing stands before, in this group, that an operator could join."""
        return self._last is None or self._last.kind == "open"

    def _opening(self, token: Token) -> None:
        if self._dialect == "ovid" and self._last is not None and self._last.kind in ("close", "after") and not self._wants:
            self._say(token, "an operator is missing before it")
        self._open.append(token)
        self._wants = None

    def _closing(self, token: Token) -> None:
        if self._begins() and self._open:
            self._say(token, "the group is empty")
        elif self._wants is not None:
            self._say(self._wants, "nothing follows it inside the group")
        self._wants = None
        if self._open:
            self._open.pop()
        else:
            self._say(token, "it closes nothing")

    def _operator(self, token: Token) -> None:
        self.operators += 1
        if self._wants is not None:
            self._say(token, f"it follows {_shown(self._wants.text)} directly")
        elif self._begins():
            self._say(token, "nothing stands before it")
        self._wants = token

    def _before(self, token: Token) -> None:
        if token.text == "NOT":
            self.operators += 1
        if self._wants is not None and self._wants.kind == "before" and self._wants.text[-1] in ":=<>":
            self._say(self._wants, "nothing follows it")
        self._wants = token

    def _term(self, token: Token) -> None:
        self.terms += 1
        self._wants = None
        if token.text.startswith('"'):
            if not token.text.strip('"').strip():
                self._say(token, "the phrase is empty")
            return
        for pattern, what in _FOREIGN[self._dialect]:
            if pattern.fullmatch(token.text):
                self._say(token, what)
        stem, star, _ = token.text.partition("*")
        if self._dialect == "pubmed" and star and len(stem) < FEWEST_LETTERS:
            self._say(token, f"PubMed wants at least {FEWEST_LETTERS} letters before *")

    def _after(self, token: Token) -> None:
        is_near = not self._after_space or (self._dialect == "pubmed" and token.text.startswith("["))
        if self._last is None or self._last.kind not in ("term", "close", "after") or not is_near:
            self._say(token, "it belongs to nothing before it")
        if self._dialect == "pubmed" and not _is_pubmed_tag(token.text):
            self._say(token, "PubMed has no such field")

    def _wrong(self, token: Token) -> None:
        if token.text.startswith('"'):
            self._say(token, "the phrase is never closed")
            self.terms += 1
        elif token.text.lower() == "exp":
            self._say(token, "exp wants a subject heading that ends with /")
        elif token.text[0] in "[]{}":
            expected = "a range, [from TO to]" if self._dialect == "lucene" else "used here"
            self._say(token, f"it is not {expected}")
        elif token.text == "^":
            self._say(token, "a boost wants a number, as in ^2")
        else:
            self._say(token, "it escapes nothing")
        self._wants = None

    def _say(self, token: Token, what: str) -> None:
        self.problems.append(Problem(token.position, f"{_shown(token.text)}: {what}"))


def _is_pubmed_tag(text: str) -> bool:
    name = PUBMED_MODIFIERS.sub("", text.strip("[]").strip().lower())
    return name in PUBMED_TAGS


def _shown(text: str) -> str:
    short = text.strip()
    return short if len(short) <= SHOWN_CHARACTERS else f"{short[:SHOWN_CHARACTERS]}…"
