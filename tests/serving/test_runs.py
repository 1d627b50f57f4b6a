"""Finding documents in what was read: whole anywhere, at the end also in part, and nothing that is another's."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.serving.runs import Run, finder

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
    assert finder([Run(DOCUMENT, opening=2)])(tokens) == place


def test_bytes_that_are_alike_across_tokens_are_no_document() -> None:
    shifted = [1 << 8, 2 << 8]  # in bytes: 0 1 0 0 | 0 2 0 0, with 1 0 0 0 | 2 in the middle
    assert finder([Run((1, 2 << 8))])(shifted) is None


@given(
    before=st.lists(st.integers(0, 3), max_size=20),
    document=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    after=st.lists(st.integers(0, 3), max_size=20),
)
def test_nothing_of_a_document_is_left_before_its_place(before: list[int], document: list[int], after: list[int]) -> None:
    tokens = [*before, *document, *after]
    place = finder([Run(tuple(document))])(tokens)
    assert place is not None
    assert place <= len(before)
    left = tokens[:place]
    assert not any(left[at : at + len(document)] == document for at in range(len(left)))
    is_whole = tokens[place : place + len(document)] == document
    assert is_whole or tokens[place:] == document[: len(tokens) - place]
