"""Rows picked out of many: as many as asked for, and every part of the file has its share."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from appliance.data.examples import spread


def test_each_part_has_its_share() -> None:
    assert spread(range(100), 4) == [12, 37, 62, 87]
    assert spread(range(11), 6) == [0, 2, 4, 6, 8, 10]
    assert spread(range(3), 32) == [0, 1, 2]
    assert spread(range(3), 0) == spread([], 32) == []


@given(st.integers(1, 300), st.integers(1, 60))
def test_no_row_twice_and_no_gap_twice_as_wide(rows: int, count: int) -> None:
    chosen = spread(range(rows), count)
    assert len(chosen) == min(rows, count)
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert all(gap >= 1 for gap in gaps)
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
