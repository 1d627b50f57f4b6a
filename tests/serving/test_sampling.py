"""Arithmetic on rows of logits: probabilities, biases, penalties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from appliance.serving.sampling import Bias, LogProbabilities, Penalties, likeliest

rows = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-80, 80, width=32))


@given(rows, st.integers(0, 80))
def test_log_probabilities(logits: NDArray[np.float32], count: int) -> None:
    kept = LogProbabilities(logits, count)
    row = logits.copy()
    logits[:] = 0.0  # what happens to the row later does not matter
    told = kept.likeliest()
    assert len(told) == min(count, len(row))
    assert sum(math.exp(logprob) for _, logprob in told) <= 1.0 + 1e-4
    assert math.isclose(sum(math.exp(kept.of(token)) for token in range(len(row))), 1.0, rel_tol=1e-4)
    assert [token for token, _ in told] == sorted(range(len(row)), key=lambda token: (-row[token], token))[: len(told)] or (
        len(set(row)) < len(row)
    )
    if told:
        assert row[told[0][0]] == row.max()


def test_bias_shifts_and_forbids() -> None:
    logits = np.zeros(5, dtype=np.float32)
    Bias({1: 2.5, 3: -100.0, 4: -99.0}).apply(logits)
    assert logits.tolist() == [0.0, 2.5, 0.0, -math.inf, -99.0]


def test_penalties_are_of_tokens_that_came() -> None:
    penalties = Penalties(repeat=2.0, frequency=0.5, presence=0.25)
    logits = np.array([4.0, -4.0, 1.0, -np.inf], dtype=np.float32)
    penalties.apply(logits)
    assert logits.tolist() == [4.0, -4.0, 1.0, -math.inf]
    for token in (0, 1, 1, 3):
        penalties.add(token)
    penalties.apply(logits)
    assert logits.tolist() == [1.25, -9.25, 1.0, -math.inf]


@pytest.mark.parametrize(("allowed", "expected"), [(None, 2), ([0, 1], 1), ([3], None), ([0, 3], 0), ([0, 1, 2, 3], 2)])
def test_likeliest_token(allowed: list[int] | None, expected: int | None) -> None:
    logits = np.array([1.0, 2.0, 3.0, -np.inf, 3.0], dtype=np.float32)
    assert likeliest(logits, None if allowed is None else np.array(allowed)) == expected
    assert likeliest(np.full(3, -np.inf, dtype=np.float32), None) is None
