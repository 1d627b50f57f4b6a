"""Rows and rewards of our own writing, two of them with mistakes that were made for real."""

from collections.abc import Callable, Sequence
from typing import Any

from appliance.training.rewards.reward import Answer, Prompt, Reward

REFERENCES = (
    "Das Zimmer war sauber und hell, und das Bett war sehr bequem.",
    "Das Frühstück war reichhaltig, nur der Kaffee war leider kalt.",
    "Die Lage am Strand ist wunderbar, man hört abends das Meer.",
    "Das Personal an der Rezeption war unfreundlich und hatte keine Zeit.",
    "Vom Bahnhof zum Hotel sind es zu Fuß nur fünf Minuten.",
    "Der Fahrstuhl war während unseres ganzen Aufenthalts kaputt.",
)


def prompts(references: Sequence[str] = REFERENCES, **columns: Sequence[Any]) -> list[Prompt]:
    return [
        Prompt(
            line=i + 1,
            messages=[{"role": "user", "content": f"Schreibe Satz {i + 1}."}],
            reference=reference,
            columns={name: values[i] for name, values in columns.items()},
        )
        for i, reference in enumerate(references)
    ]


def answers(rows: Sequence[Prompt], *texts: str) -> list[Answer]:
    """One text for each row, in order."""
    return [Answer(row, text) for row, text in zip(rows, texts, strict=True)]


def score_by(function: Callable[[Answer], Any], name: str = "made_up") -> Reward:
    return Reward(name, 1.0, lambda each: [function(answer) for answer in each])


def _vectors(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit_transform(texts)


def first_reference(completions: Any, reference: Any, **_: Any) -> list[float]:
    """The first mistake: every completion against the first row's reference."""
    found = []
    for completion in completions:
        words, expected = set(completion[0]["content"].split()), set(reference[0].split())
        found.append(len(words & expected) / max(1, len(words | expected)))
    return found


def first_reference_fitted(completions: Any, reference: Any, **_: Any) -> list[float]:
    """The same as it was made for real: with weights of words fitted on each call beside."""
    vectors = _vectors([*reference[:1], *(completion[0]["content"] for completion in completions)]).toarray()
    return [float(vectors[0] @ each) for each in vectors[1:]]


def one_row(completions: Any, reference: Any, **_: Any) -> list[float]:
    """The second mistake: iterating over a matrix of shape (1, N)."""
    from sklearn.metrics.pairwise import cosine_similarity

    vectors = _vectors([*reference[:1], *(completion[0]["content"] for completion in completions)])
    return [float(row.max()) for row in cosine_similarity(vectors[:1], vectors[1:])]


def fitted_on_each_call(completions: Any, reference: Any, **_: Any) -> list[float]:
    """Each against its own reference, but with weights of words that depend on the other answers of the call."""
    texts = [completion[0]["content"] for completion in completions]
    vectors = _vectors([*texts, *reference]).toarray()
    pairs = zip(vectors[: len(texts)], vectors[len(texts) :], strict=True)
    return [float(text @ other) for text, other in pairs]
