"""Every reward on answers made up for it, and that each answer is judged by its own row alone."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import reward_settings as settings
from appliance.errors import DataError, ModelFileError, RecipeError
from appliance.training.rewards import own, registry, sentiment_match
from appliance.training.rewards.reward import Answer, Prompt, Score, malformed
from tests.tiny_encoders import Exported
from tests.training import reward_samples
from tests.training.reward_samples import REFERENCES, answers, prompts

ROWS = prompts(language=["de"] * len(REFERENCES))
# A reward without files, with settings under which it says more than one thing about German sentences.
PLAIN: dict[str, Any] = {
    "tfidf_similarity": settings.TfidfSimilarity(),
    "language_match": settings.LanguageMatch(),
    "format_tags": settings.FormatTags(),
    "boolean_syntax": settings.BooleanSyntax(),
    "readability": settings.Readability(),
    "grounded_in": settings.GroundedIn(),
    "length": settings.Length(least_words=4, most_words=8),
}


def made(name: str, rows: Sequence[Prompt] = ROWS, languages: Sequence[str] = ("de", "en"), **changes: Any) -> Score:
    return registry.MAKERS[name](dataclasses.replace(PLAIN[name], **changes), rows, languages)


def judged(name: str, *texts: str, rows: Sequence[Prompt] = ROWS, **changes: Any) -> list[Any]:
    """Each text as an answer to the first row."""
    return list(made(name, rows, **changes)([Answer(rows[0], text) for text in texts]))


def test_every_setting_has_a_reward() -> None:
    names = {field.name for field in dataclasses.fields(settings.Rewards)} - {"own"}
    assert names == registry.MAKERS.keys() == {*PLAIN, "sentiment_match"}


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data())
def test_each_answer_is_judged_by_its_own_row_alone(name: str, data: st.DataObject) -> None:
    score = made(name)
    texts = st.one_of(st.sampled_from(REFERENCES), st.text(max_size=60))
    pairs = st.lists(st.tuples(st.sampled_from(ROWS), texts), min_size=1, max_size=6)
    asked = [Answer(row, text) for row, text in data.draw(pairs)]
    together = score(asked)
    assert malformed(together, len(asked)) is None
    assert together == [score([each])[0] for each in asked]
    assert list(reversed(together)) == score(asked[::-1])
    assert all(value is None or 0 <= value <= 1 + 1e-9 for value in together)


def test_tfidf_takes_the_reference_of_the_row() -> None:
    score = made("tfidf_similarity")
    own_reference = score(answers(ROWS, *REFERENCES))
    assert own_reference == pytest.approx([1.0] * len(ROWS))
    another = score(answers(ROWS, *REFERENCES[1:], REFERENCES[0]))
    assert max(another) < 0.5


def test_tfidf_gives_nothing_for_words_that_no_reference_has() -> None:
    """They would fill the length that the guard asks for."""
    rows = prompts()
    keywords = "Zimmer sauber hell Bett bequem"
    padded = f"{keywords} qua qub quc qud que quf qug"
    for guard in (True, False):
        alone, beside = judged("tfidf_similarity", keywords, padded, rows=rows, guard=guard)
        assert beside < 0.8, guard
        assert guard or beside < alone
    letters = judged("tfidf_similarity", f"{keywords} a b c d e f g", rows=rows)
    assert letters[0] < 0.8
    assert judged("tfidf_similarity", REFERENCES[0], rows=rows) == pytest.approx([1.0])


def test_tfidf_is_fitted_once() -> None:
    """Fitted on each call, the same pair would score differently beside other answers."""
    score = made("tfidf_similarity")
    pair = Answer(ROWS[0], "Das Zimmer war hell.")
    assert score([pair]) == score([pair, *answers(ROWS, *REFERENCES)])[:1]


def test_tfidf_ignores_function_words_of_the_language() -> None:
    words = [Answer(ROWS[0], "das war und sehr")]
    german, english = (made("tfidf_similarity", languages=[code], guard=False)(words)[0] for code in ("de", "en"))
    assert german == 0
    assert english > 0.3


def test_tfidf_guards_against_keywords() -> None:
    stuffed = "Zimmer sauber hell Bett bequem Zimmer sauber hell Bett bequem"
    plain, guarded = (judged("tfidf_similarity", stuffed, guard=guard)[0] for guard in (False, True))
    assert plain > 0.95
    assert guarded < 0.6
    assert judged("tfidf_similarity", REFERENCES[0]) == pytest.approx([1.0])
    assert judged("tfidf_similarity", "") == [0.0]


def test_tfidf_wants_words() -> None:
    with pytest.raises(DataError, match="hold no word beside function words"):
        made("tfidf_similarity", prompts(["und das", "der die"]))


def test_language() -> None:
    german, english, short, nothing = judged("language_match", REFERENCES[1], "The room was clean and bright.", "Ja.", "  ")
    assert german > 0.9
    assert english < 0.1
    assert (short, nothing) == (0.5, 0.0)


def test_language_of_a_column_and_with_one_language() -> None:
    rows = prompts(language=["en", "de", "de", "de", "de", "de"])
    assert judged("language_match", REFERENCES[1], rows=rows, column="language")[0] < 0.1
    score = registry.MAKERS["language_match"](settings.LanguageMatch(), ROWS, ["de"])
    assert score([Answer(ROWS[0], "The room was clean and bright.")])[0] < 0.1
    with pytest.raises(DataError, match="grpo line 1: column 'nowhere' must hold a language"):
        made("language_match", rows, column="nowhere")


def test_language_is_that_of_the_own_row_where_rows_share_a_line() -> None:
    """As in a JSON list on one line."""
    english = "The room was clean and bright."
    rows = [dataclasses.replace(row, line=1) for row in prompts([REFERENCES[0], english])]
    score = made("language_match", rows)
    assert min(score(answers(rows, REFERENCES[1], english))) > 0.9
    assert max(score(answers(rows, english, REFERENCES[1]))) < 0.1


def test_refused_values_are_cut() -> None:
    whole = ["my address is", "Lindekade 3, and I am called nobody"] * 9
    with pytest.raises(DataError, match="line 1: column 'code' must hold a language, found ") as caught:
        made("language_match", prompts(code=[whole] * len(REFERENCES)), column="code")
    assert len(str(caught.value)) < 120
    chosen = settings.SentimentMatch(encoder=Path("mood"))
    with pytest.raises(DataError, match="must hold a label of mood") as refused:
        sentiment_match._require_labels(prompts(sentiment=whole[:6]), chosen, {"good": "good"})
    assert 'line 1: "my address is"' in str(refused.value)
    with pytest.raises(DataError) as refused:
        sentiment_match._require_labels(prompts(sentiment=[" ".join(whole)] * 6), chosen, {"good": "good"})
    assert "called nobody" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think>weighing</think>Yes.", 5),
        ("  <think>\nweighing\n</think>\n\nYes.", 5),
        ("<think>weighing</think>", 4),
        ("<think> </think>Yes.", 4),
        ("Well <think>weighing</think>Yes.", 4),
        ("<think>weighing. Yes.", 2),
        ("<think>a</think><think>b</think>Yes.", 1),
        ("Yes.", 0),
        ("", 0),
        ("</think>Yes.<think>", 1),
    ],
)
def test_format_tags(text: str, share: int) -> None:
    assert judged("format_tags", text) == [share / 5]


def test_several_format_tags() -> None:
    both = {"tags": ("think", "check")}
    assert judged("format_tags", "<think>a</think> <check>b</check> Yes.", **both) == [1.0]
    assert judged("format_tags", "<check>b</check> <think>a</think> Yes.", **both)[0] < 1


def test_boolean_syntax() -> None:
    found = judged("boolean_syntax", '("bath bomb" OR soap) AND skin', '("bath bomb" OR soap AND', "bath bomb soap", "")
    assert found == [1.0, pytest.approx(1 / 3), 0.5, 0.0]
    assert judged("boolean_syntax", "bath bomb", least_operators=0) == [1.0]
    assert judged("boolean_syntax", "heart adj3 attack", dialect="ovid") == [1.0]


def test_readability() -> None:
    easy = "Das Bett ist gut. Der Tee ist warm."
    hard = "Unternehmensverantwortungsübergreifende Verwaltungsvereinfachungsmaßnahmen erfordern Abstimmungsgespräche."
    assert judged("readability", easy, hard, "") == [1.0, 0.0, 0.0]
    with pytest.raises(RecipeError, match="the recipe's languages are none of them"):
        made("readability", languages=("ar",))


def test_grounded_in() -> None:
    rows = prompts(["De balie is aan de Lindekade 3, open van 9 tot 16 uur.", "Ja, dat mag."])
    score = made("grounded_in", rows, ("nl",))

    def of(row: int, *texts: str) -> list[float]:
        return list(score([Answer(rows[row], text) for text in texts]))

    right, wrong, half, silent = of(
        0, "Kom naar Lindekade 3.", "Kom naar Lindekade 30.", "Kom naar Lindekade 3 om 7 uur.", "Kom maar langs."
    )
    assert (right, wrong, half, silent) == (1.0, 0.0, 0.5, 0.5)
    assert of(1, "Ja hoor.", "Ja, om 12 uur.", "Antwoord op satz 2.") == [1.0, 0.0, 1.0]  # the question says 2


def test_length() -> None:
    assert judged("length", "a b c d", "a b", "", " ".join("a" * 16)) == [1.0, 0.5, 0.0, 0.5]


def test_sentiment_is_the_probability_of_the_wanted_label(exported: Exported) -> None:
    from appliance.encoders import Encoder

    folder = exported.encoder("classifier")
    wanted = ["positive", "NEGATIVE", "neutral", "positive", "negative", "neutral"]
    rows = prompts(sentiment=wanted)
    asked = answers(rows, *REFERENCES)
    score = registry.MAKERS["sentiment_match"](settings.SentimentMatch(encoder=folder), rows, ["de"])
    found = score(asked)
    expected = Encoder.load(folder, "fp32").classify(REFERENCES, truncate=True)
    assert found == pytest.approx([each[label.lower()] for each, label in zip(expected, wanted, strict=True)], abs=1e-6)
    assert [score([each])[0] for each in asked] == pytest.approx(found, abs=1e-5)
    assert not all(value in (0, 1) for value in found)


def test_sentiment_wants_labels_of_the_classifier(exported: Exported) -> None:
    chosen = settings.SentimentMatch(encoder=exported.encoder("classifier"))
    rows = prompts(sentiment=["positive", "good", None, "neutral", "negative", "positive"])
    with pytest.raises(DataError, match="Column 'sentiment' must hold a label") as caught:
        registry.MAKERS["sentiment_match"](chosen, rows, ["de"])
    assert 'line 2: "good"' in str(caught.value)
    assert "line 3: nothing" in str(caught.value)
    with pytest.raises(ModelFileError, match="needs a classifier"):
        registry.MAKERS["sentiment_match"](settings.SentimentMatch(encoder=exported.encoder("embedding")), ROWS, ["de"])


OWN = """
def short(prompts, completions, reference, language, **columns):
    assert prompts[0][0]["role"] == "user"
    return [1 / (1 + len(each[0]["content"])) for each in completions]
value = 3
"""


def test_own_function_is_called_as_trl_would(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    score = own.make(settings.OwnReward(function=tmp_path / "mine:short"), ROWS, ["de"])
    assert score(answers(ROWS[:2], "abc", "")) == [0.25, 1.0]


def test_own_function_of_an_installed_module(tmp_path: Path) -> None:
    chosen = settings.OwnReward(function=tmp_path / "tests.training.reward_samples:first_reference")
    assert own.make(chosen, ROWS, ["de"])(answers(ROWS[:1], REFERENCES[0])) == [1.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("mine", "names no function; write it as module:function"),
        ("mine:nothing", "mine has no function 'nothing'"),
        ("mine:value", "mine has no function 'value'"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("broken:f", "broken.py cannot be imported"),
    ],
)
def test_own_function_that_cannot_be_had(tmp_path: Path, function: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(RecipeError, match=said):
        own.make(settings.OwnReward(function=tmp_path / function), ROWS, ["de"])


def test_another_text_of_an_own_function_is_another_reward(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    before = own.identity(tmp_path / "mine:short")
    assert before.startswith("mine:short@")
    (tmp_path / "mine.py").write_text(f"{OWN}\n")
    assert own.identity(tmp_path / "mine:short") != before


def test_malformed_values() -> None:
    import numpy as np

    assert malformed([1, 0.5, None], 3) is None
    assert malformed(np.array([1.0, 2.0]), 2) is None
    for found, said in (
        (np.zeros((1, 4)), "a matrix of shape (1, 4) for 4 answers"),
        ([0.3], "returned 1 value for 4 answers"),
        (0.3, "returned float instead of a list"),
        ([0.1, 0.2, math.nan, 0.3], "returned nan for answer 3"),
        ([0.1, 0.2, math.inf, 0.3], "returned inf for answer 3"),
        ([0.1, "much", 0.2, 0.3], "'much' for answer 2, which is no number"),
        ([np.zeros(4), 1, 2, 3], "for answer 1, which is no number"),
    ):
        assert said in (malformed(found, 4) or ""), found


def test_what_can_be_read_once_only_is_malformed() -> None:
    assert "returned map instead of a list" in (malformed(map(float, [1, 2]), 2) or "")


def test_known_mistakes_are_what_they_are_said_to_be() -> None:
    rows = prompts()[:4]
    call = {"completions": [[{"content": text}] for text in REFERENCES[:4]], "reference": [row.reference for row in rows]}
    assert len(reward_samples.one_row(**call)) == 1
    assert reward_samples.first_reference(**call)[0] == 1
    assert max(reward_samples.first_reference(**call)[1:]) < 0.5
