"""Finding documents in what was read: whole anywhere, at the end also in part, and nothing that is another's."""

import sys
from collections.abc import Callable, Sequence
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.serving.runs import finder

DOCUMENT = (1, 2, 50, 51, 52, 3)  # 1, 2 begin every document


@pytest.mark.parametrize(
    ("tokens", "place"),
    [
        (DOCUMENT, 0),
        ((9, 9, *DOCUMENT, 9), 2),
        ((9, *DOCUMENT[:4]), 1),
        (DOCUMENT[:3], 0),
        (DOCUMENT[:2], None),
        ((9, 1), None),
        ((1, 2, 50, 51, 60, 3), None),
        ((), None),
        ((256, 1 << 8, 50, 51), None),
    ],
)
def test_a_document_is_found_whole_or_in_part_at_the_end(tokens: Sequence[int], place: int | None) -> None:
    assert finder([DOCUMENT], opening=2)(tokens) == place


def test_bytes_that_are_alike_across_tokens_are_no_document() -> None:
    shifted = [1 << 8, 2 << 8]  # in bytes: 0 1 0 0 | 0 2 0 0, with 1 0 0 0 | 2 in the middle
    assert finder([(1, 2 << 8)])(shifted) is None


@given(
    before=st.lists(st.integers(0, 3), max_size=20),
    document=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    after=st.lists(st.integers(0, 3), max_size=20),
)
def test_nothing_of_a_document_is_left_before_its_place(before: list[int], document: list[int], after: list[int]) -> None:
    tokens = [*before, *document, *after]
    place = finder([document], opening=0)(tokens)
    assert place is not None
    assert place <= len(before)
    left = tokens[:place]
    assert not any(left[at : at + len(document)] == document for at in range(len(left)))
    is_whole = tokens[place : place + len(document)] == document
    assert is_whole or tokens[place:] == document[: len(tokens) - place]


runs = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=6)


@given(runs=runs, tokens=st.lists(st.integers(0, 2), max_size=60), opening=st.none() | st.integers(0, 3))
def test_many_documents_are_found_where_one_after_the_other_would_be(
    runs: list[list[int]], tokens: list[int], opening: int | None
) -> None:
    """`tokens` are of few kinds, so that documents overlap, and are long enough for a whole key."""
    whole = [at for run in runs for at in range(len(tokens)) if tokens[at : at + len(run)] == run]
    tails = range(len(tokens) - opening) if opening is not None else ()
    begun = [at for run in runs for at in tails if run[: len(tokens) - at] == tokens[at:]]
    assert finder(runs, opening)(tokens) == min([*whole, *begun], default=None)


@given(runs=runs, tokens=st.lists(st.integers(0, 2), max_size=60), opening=st.integers(0, 3))
def test_what_all_begin_with_hides_none(runs: list[list[int]], tokens: list[int], opening: int) -> None:
    begins = [7] * opening
    all_begin = [[*begins, *run] for run in runs]
    for at, run in enumerate(all_begin):
        assert finder(all_begin, opening)([*tokens, *run]) == finder([*all_begin[at:], *all_begin[:at]], opening)(
            [*tokens, *run]
        )
        place = finder(all_begin, opening)([*tokens, *run, 9])
        assert place is not None
        assert place <= len(tokens)


def test_a_position_costs_as_much_however_many_documents_there_are() -> None:
    """Counted in steps of the interpreter, not in time."""
    steps = []
    tokens = list(range(500, 1500))
    for count in (10, 5000):
        find = finder([(1, 2, *divmod(number, 70), *range(5, 40)) for number in range(count)], opening=2)
        steps.append(_steps(lambda: find([*tokens, 1, 2, 3, *tokens, 1, 2])))  # noqa: B023
    assert steps[1] < 2 * steps[0]


def _steps(work: Callable[[], object]) -> int:
    found = 0

    def trace(frame: FrameType, _: str, __: object) -> object:
        nonlocal found
        found += 1
        frame.f_trace_opcodes = True
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return found
