"""What is done to a row of logits before a token is drawn from it, with numpy alone. Knows nothing of llama.cpp."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]  # (vocabulary,)
TokenIds = NDArray[np.int64] | NDArray[np.int32]

SMALLEST_REPEAT = 1e-6  # a logit that is divided by less may leave the range of float32
HOPELESS = 16.2  # -log(1e-7)
FORBIDDEN_BIAS = -100.0  # OpenAI's: "values of -100 or 100 should result in a ban or exclusive selection"


class LogProbabilities:
    """Natural logarithms of the probabilities of a row as the model gave it, before anything bends it."""

    def __init__(self, logits: Logits, count: int) -> None:
        """Keeps what is needed of a row that is changed afterwards; `count` of the likeliest tokens."""
        highest = float(logits.max())
        self._logits = logits.copy()
        self._log_total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
        self._count = min(count, len(logits))

    def of(self, token: int) -> float:
        return float(self._logits[token]) - self._log_total

    def likeliest(self) -> Sequence[tuple[int, float]]:
        """Token ids and log probabilities, the likeliest first."""
        if self._count == 0:
            return ()
        ids = np.argpartition(self._logits, -self._count)[-self._count :]
        ordered = sorted(map(int, ids), key=lambda token: (-self._logits[token], token))
        return tuple((token, self.of(token)) for token in ordered)


class Bias:
    """OpenAI's `logit_bias`."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = np.array(list(biases), dtype=np.int64)
        values = np.array(list(biases.values()), dtype=np.float32)
        self._values = np.where(values <= FORBIDDEN_BIAS, np.float32(-np.inf), values)

    def apply(self, logits: Logits) -> None:
        """In place."""
        logits[self._ids] += self._values


class Penalties:
    """Makes tokens less likely that this answer has already; llama.cpp's formulas (`llama_sampler_penalties_apply`).

    Here rather than in llama.cpp's sampler because that looks up every token of the vocabulary in a hash table.
    """

    def __init__(self, *, repeat: float, frequency: float, presence: float) -> None:
        self._repeat, self._frequency, self._presence = max(repeat, SMALLEST_REPEAT), frequency, presence
        self._counts: dict[int, int] = {}

    def add(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, logits: Logits) -> None:
        """In place."""
        if not self._counts:
            return
        ids = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
        found = logits[ids]
        found = np.where(found <= 0.0, found * np.float32(self._repeat), found / np.float32(self._repeat))
        logits[ids] = found - counts * np.float32(self._frequency) - np.float32(self._presence)


def without_hopeless(ids: TokenIds, values: Logits, temperature: float) -> tuple[TokenIds, Logits]:
    """The tokens that may be drawn at all, in the same order: sorting and summing 150,000 others takes milliseconds.

    What is left out has, all together, less than a ten-millionth of the probability: llama.cpp's own sum, in float32, is no
    more exact.
    """
    near = values >= values.max() - np.float32(temperature * (HOPELESS + math.log(len(values))))
    return ids[near], values[near]


def forbid(logits: Logits, ids: TokenIds) -> None:
    """In place."""
    logits[ids] = -np.inf


def likeliest(logits: Logits, allowed: TokenIds | None) -> int | None:
    """The token with the highest logit, of several the one with the lowest id; None when every one is forbidden."""
    token = int(logits.argmax()) if allowed is None else int(allowed[logits[allowed].argmax()])
    return None if logits[token] == -np.inf else token
