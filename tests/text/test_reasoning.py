"""Thinking is told apart from the answer, however the text was cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.text.reasoning import MISTRAL_THINK, THINK, ReasoningSplitter, markers_of, opening_of

TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "nk>", " ", "\n\n", "é😀", "a", "b c"])).map("".join)


def split(pieces: list[str], opening: str = "") -> tuple[str, str]:
    splitter = ReasoningSplitter(THINK, opening)
    told = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(each[0] for each in told), "".join(each[1] for each in told)


@pytest.mark.parametrize(
    ("text", "opening", "expected"),
    [
        ("<think>\nHm.\n\nYes.\n</think>\n\nHello", "", ("Hm.\n\nYes.", "Hello")),
        ("Hm.\n</think>\n\nHello\n", "<think>\n", ("Hm.", "Hello\n")),
        ("Hello </think>", "<think>\n\n</think>\n\n", ("", "Hello </think>")),
        ("\n\n<think>x</think>", "", ("x", "")),
        (" Hello <think>x</think>", "", ("", " Hello <think>x</think>")),
        ("<think>never ends </th", "", ("never ends </th", "")),
        ("<think>\n\n</think>\n\n5 < 6", "", ("", "5 < 6")),
        ("<thin", "", ("", "<thin")),
        ("  ", "", ("", "  ")),
    ],
)
def test_parts(text: str, opening: str, expected: tuple[str, str]) -> None:
    assert split([text], opening) == expected


@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 500), max_size=20),
    opening=st.sampled_from(["", "<think>\n", "<think></think>"]),
)
def test_parts_do_not_depend_on_pieces(text: str, cuts: list[int], opening: str) -> None:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(at)]
    assert split(pieces, opening) == split([text], opening)


@given(text=TEXTS)
def test_nothing_but_markers_and_white_space_is_lost(text: str) -> None:
    reasoning, content = split([text])
    if not text.lstrip().startswith("<think>"):
        assert (reasoning, content) == ("", text)
    elif "</think>" in text:
        thought, _, answer = text.lstrip().removeprefix("<think>").partition("</think>")
        assert (reasoning, content) == (thought.strip(), answer.lstrip())


def test_opening_of_a_prompt() -> None:
    for opening in ("<think>\n", "<think>\n\n</think>\n\n", "<think>"):
        assert opening_of(f"<|user|>x<think></think>y<|assistant|>\n{opening}", THINK) == opening
    assert opening_of("<|assistant|>\n", THINK) == ""
    assert opening_of("<|assistant|></think>", THINK) == ""
    assert opening_of("x[THINK]", MISTRAL_THINK) == "[THINK]"


def test_markers_of_a_template() -> None:
    assert markers_of("{{ '[THINK]' }}") == MISTRAL_THINK
    assert markers_of("{{ '<think></think>' }}") == THINK
    assert markers_of("") == THINK
