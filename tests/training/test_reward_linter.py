"""The linter refuses rewards that teach nothing or the wrong thing, reports what is questionable, passes what is sound."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance import reward_settings as settings
from appliance.errors import VerificationFailed
from appliance.findings import Finding
from appliance.text.stop_words import stop_words
from appliance.training import reward_linter
from appliance.training.rewards import own, registry
from appliance.training.rewards.reward import Answer, Reward
from tests.training.reward_samples import REFERENCES, prompts, score_by

ROWS = prompts()
SOUND = registry.MAKERS["tfidf_similarity"](settings.TfidfSimilarity(), ROWS, ["de"])


def groups(texts: Sequence[str] = REFERENCES) -> list[list[Answer]]:
    """Answers as a model that knows some words would sample them: pieces of the sentences, of many lengths."""
    chance = random.Random(5)
    words = [word for text in texts for word in text.split()]
    return [[Answer(row, " ".join(chance.sample(words, chance.randint(3, 15)))) for _ in range(4)] for row in ROWS]


def lint(*rewards: Reward, sampled: Sequence[Sequence[Answer]] | None = None) -> dict[str, Finding]:
    found = reward_linter.lint(rewards, ROWS, groups() if sampled is None else sampled, ["de"])
    assert not [finding.what for finding in found if finding.what.endswith(".")]  # who shows it ends the sentence
    return {finding.kind: finding for finding in found}


def refused(*rewards: Reward) -> str:
    with pytest.raises(VerificationFailed) as caught:
        lint(*rewards)
    return str(caught.value)


def owned(name: str) -> Reward:
    function = settings.OwnReward(function=Path(f"tests.training.reward_samples:{name}"))
    return Reward(name, 1.0, own.make(function, ROWS, ["de"]))


@pytest.mark.parametrize("name", ["first_reference", "first_reference_fitted"])
def test_first_row_for_all_is_refused(name: str) -> None:
    said = refused(owned(name))
    assert f"{name}: " in said
    assert "when only the first row of the call had another reference, and none when its own had" in said
    assert "as `answer[0]` does" in said


def test_one_value_for_all_is_refused() -> None:
    said = refused(owned("one_row"))
    assert "one_row: returned 1 value for 12 answers" in said
    assert "a matrix of similarities of shape (1, N) gives its one row" in said


def test_both_are_said_at_once() -> None:
    said = refused(owned("first_reference"), Reward("sound", 1.0, SOUND), owned("one_row"))
    assert "2 problems" in said
    assert "sound" not in said


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda _: float("nan"), "returned nan for answer 1"),
        (lambda answer: answer.text, "which is no number"),
        (lambda answer: answer.nothing, "raised AttributeError"),
    ],
)
def test_what_is_no_number_is_refused(function: Callable[[Answer], Any], said: str) -> None:
    assert said in refused(score_by(function))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda answer: len(answer.prompt.reference) / len(answer.text), 'raised ZeroDivisionError ("division by zero")'),
        (lambda answer: len(answer.text) or float("nan"), "returned nan for answer 1"),
    ],
)
def test_what_fails_on_no_answer_is_refused(function: Callable[[Answer], Any], said: str) -> None:
    """A model may say nothing at any step, also in the last one of a night."""
    text = refused(score_by(function))
    assert said in text
    assert text.endswith("(empty).")


def test_what_fails_on_a_sampled_answer_is_refused() -> None:
    sampled = groups()
    odd = sampled[3][2].text
    said = refused(score_by(lambda answer: 1 / (answer.text != odd)))
    assert "raised ZeroDivisionError" in said
    said_with_samples = f"(sampled, line {sampled[3][0].prompt.line})"
    assert said_with_samples in said


def test_refusal_shows_no_whole_row() -> None:
    """An exception's text is the function's, and may be a reference with all that is in it."""

    def looking_up(answer: Answer) -> float:
        return {"nothing": 1.0}[answer.prompt.reference]

    said = refused(score_by(looking_up))
    assert "raised KeyError" in said
    assert REFERENCES[0] not in said


def test_prompts_are_tried_from_the_whole_file() -> None:
    rows = prompts([f"Antwort Nummer {i}" for i in range(15)])
    seen: set[int] = set()
    reward = score_by(lambda answer: seen.add(answer.prompt.line) or float(len(answer.text)))
    reward_linter.lint([reward], rows, [], ["de"])
    assert len(seen) == reward_linter.MOST_PROMPTS
    assert max(seen) >= 14


def test_last_row_for_all_is_refused() -> None:
    def last(each: Sequence[Answer]) -> list[float]:
        expected = set(each[-1].prompt.reference.split())
        return [len(expected & set(answer.text.split())) / len(expected) for answer in each]

    assert "when only the last row of the call had another reference" in refused(Reward("last", 1.0, last))


def test_dependence_on_the_call_is_reported() -> None:
    finding = lint(owned("fitted_on_each_call"))["depends_on_batch"]
    assert finding.level == "problem"
    assert finding.count > 0
    assert finding.examples[0].startswith("line 1: ")


def test_chance_is_reported() -> None:
    chance = random.Random(1)
    assert lint(score_by(lambda _: chance.random()))["not_repeatable"].level == "problem"


def test_sound_reward_passes() -> None:
    assert lint(Reward("tfidf_similarity", 1.0, SOUND)) == {}


def test_constant() -> None:
    found = lint(score_by(lambda _: 0.7))
    assert found["constant"].what == "made_up gives 0.7 to references, to nonsense and to nothing alike"
    assert found["no_spread"].figures == {"flat_share": 1.0}


def test_all_or_nothing_has_no_spread() -> None:
    found = lint(score_by(lambda answer: float(answer.text == answer.prompt.reference)))
    assert found.keys() == {"no_spread"}
    assert found["no_spread"].count == len(ROWS)
    assert found["no_spread"].examples == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize(("sign", "more"), [(1, "longer"), (-1, "shorter")])
def test_length_driven(sign: int, more: str) -> None:
    found = lint(score_by(lambda answer: 1.0 + sign * len(answer.text) / 1000))
    assert f"gives more to {more} answers" in found["length_driven"].what
    assert abs(found["length_driven"].figures["sampled_correlation"]) > 0.9


def test_length_driven_is_seen_without_samples() -> None:
    found = lint(score_by(lambda answer: min(1.0, len(answer.text) / 400)), sampled=[])
    assert found["length_driven"].figures["sampled_correlation"] == 0
    assert found["length_driven"].figures["nonsense_correlation"] > 0.9


def test_reward_for_length_may_follow_length() -> None:
    score = registry.MAKERS["length"](settings.Length(least_words=60, most_words=80), ROWS, ["de"])
    assert "length_driven" not in lint(Reward("length", 1.0, score))


def test_keyword_stuffing() -> None:
    plain = registry.MAKERS["tfidf_similarity"](settings.TfidfSimilarity(guard=False), ROWS, ["de"])
    finding = lint(Reward("tfidf_similarity", 1.0, plain))["keyword_stuffing"]
    assert finding.level == "problem"
    assert finding.figures["keywords_share"] > 0.9


def test_words_without_sense_do_not_hide_keywords() -> None:
    """A cosine that passes over what no reference has, though it asks for as many different words as the reference has."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(stop_words=sorted(stop_words(["de"]))).fit(REFERENCES)

    def known_words(answer: Answer) -> float:
        both = vectors.transform([answer.text, answer.prompt.reference]).toarray()
        words, expected = answer.text.split(), answer.prompt.reference.split()
        return float(both[0] @ both[1]) * min(1.0, len({*words}) / len(expected)) * len({*words}) / max(1, len(words))

    finding = lint(score_by(known_words))["keyword_stuffing"]
    assert "keywords among words that no reference has" in finding.what
    assert finding.figures["padded_share"] > 0.9 > finding.figures["keywords_share"]


def test_repetition_pays() -> None:
    found = lint(score_by(lambda answer: sum(word in answer.prompt.reference for word in answer.text.split()) / 60))
    assert "words three times over" in found["keyword_stuffing"].what


def test_what_holds_for_one_of_several_is_a_notice() -> None:
    constant = score_by(lambda _: 0.5, "constant")
    findings = reward_linter.lint([Reward("sound", 2.0, SOUND), constant], ROWS, groups(), ["de"])
    assert {(each.kind, each.level) for each in findings} == {("constant", "notice"), ("no_spread", "notice")}
    assert all(each.what.startswith("constant ") for each in findings)


def test_rows_that_share_one_reference_can_be_tried() -> None:
    same = prompts([REFERENCES[0]] * 4)
    assert reward_linter.lint([Reward("sound", 1.0, SOUND)], same, [], ["de"]) == []


def test_not_applicable_is_no_mistake() -> None:
    assert "not_repeatable" not in lint(score_by(lambda answer: None if answer.prompt.line == 1 else len(answer.text) / 500))
