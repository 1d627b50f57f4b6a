"""What was recorded of a run, step by step: `loss.jsonl`, read as `Point`s. Robust statistics of such series.

Pure: neither torch nor a trainer is known here.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from appliance.errors import ArtifactError

T = TypeVar("T")

LOSS = "loss.jsonl"
# The standard deviation of normal noise is 1.4826 times its median absolute deviation (Rousseeuw and Croux 1993), and a
# difference of two values has √2 times the deviation of one.
DEVIATION_OF_DIFFERENCES = 1.4826 / math.sqrt(2)
DEVIATION_OF_MEDIAN = 1.2533  # √(π/2): how much less certain a median is than a mean of as many values
TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One optimizer step. `rows` are the lines, in the data's file, of the rows in its batch."""

    step: int
    loss: float
    epoch: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    validation_loss: float | None = None
    rows: tuple[int, ...] = ()
    reward: float | None = None
    equal_rewards: float | None = None  # share of the groups (GRPO) whose completions all got the same reward
    preferred: float | None = None  # share of the pairs (DPO) whose chosen answer gained on the rejected one
    margin: float | None = None  # by how much, in rewards
    seconds: float | None = None
    validation_seconds: float | None = None

    @property
    def is_empty(self) -> bool:
        """The loss is exactly 0, and so is its gradient: no token had a label, or DPO has nothing left to learn."""
        return self.loss == 0 and not self.gradient_norm

    def __str__(self) -> str:
        rows = f", rows {', '.join(map(str, self.rows))}" if self.rows else ""
        norm = "" if self.gradient_norm is None else f", gradient norm {self.gradient_norm:.2g}"
        return f"step {self.step} (loss {self.loss:.3f}{norm}{rows})"


FIELDS = {  # as trainers name them
    "grad_norm": "gradient_norm",
    "frac_reward_zero_std": "equal_rewards",
    "rewards/accuracies": "preferred",
    "rewards/margins": "margin",
}
MOST_BLOCKS = 1000


def read(folder: Path) -> list[Point]:
    """The points of a run's folder; raises `ArtifactError` when it has none."""
    return [point(line) for line in read_lines(folder)]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of `loss.jsonl` as they are; one that is being written now is left out."""
    path = folder / LOSS
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {LOSS}: nothing was trained there; `appliance runs list` says where.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def point(line: dict[str, Any]) -> Point:
    known = {FIELDS.get(key, key): value for key, value in line.items()}
    values: dict[str, Any] = {key: known[key] for key in Point.__slots__ if key in known}
    if "rows" in values:
        values["rows"] = tuple(values["rows"])
    return Point(**values)


def fifths(steps: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The first and the last fifth of a run's steps, one at least: what is compared where single steps are noisy."""
    size = max(1, len(steps) // 5)
    return steps[:size], steps[-size:]


def noise(values: Sequence[float]) -> float:
    """The standard deviation of the noise of a series, by its differences: a trend does not count, nor do a few outliers."""
    return DEVIATION_OF_DIFFERENCES * median(abs(b - a) for a, b in itertools.pairwise(values))


def trend(values: Sequence[float]) -> float:
    """How surely a series rises (above 0) or falls, in standard deviations: Mann and Kendall's test, on 30 medians."""
    size = max(1, len(values) // 30)
    blocks = [median(values[start : start + size]) for start in range(0, len(values), size)]
    count = len(blocks)
    signs = sum((later > before) - (later < before) for before, later in itertools.combinations(blocks, 2))
    return signs / math.sqrt(max(1, count * (count - 1) * (2 * count + 5) / 18))


def logarithms(values: Sequence[float]) -> list[float]:
    """The noise of a loss grows with the loss, so that it is steady in logarithms."""
    return [math.log(max(value, TINY)) for value in values]


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """A long run as at most a thousand points, with the median loss of as many steps each: a look costs no more than one."""
    size = -(-len(points) // MOST_BLOCKS)
    if size < 2:
        return points
    starts = range(len(points) % size, len(points), size)
    blocks = [points[start : start + size] for start in starts]
    return [dataclasses.replace(block[size // 2], loss=median(point.loss for point in block)) for block in blocks]


def levels(values: Sequence[float], width: int) -> list[float]:
    """Medians of windows of `width` values around each one; half as wide at both ends."""
    half = width // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
