"""How many threads compute the next tokens: as many as there are cores, or fewer while other programs want some of them.

llama.cpp's threads wait for each other hundreds of times a token. When another program takes a core from one of them, all
wait for it: two threads on two cores beside one busy program were half as fast as one thread. So the choice is measured,
step by step. The number of threads changes no result.
"""

import collections
import itertools
import statistics

MEASURED_STEPS = 5  # the median of so many counts: one step that was disturbed changes no choice
TRIAL_STEPS = 2
TRIAL_COST = 0.0025  # share of the time that may be lost by trying numbers of threads that are slower
LONGEST_PAUSE_STEPS = 1000
EXACT_ROWS = 8  # more rows than this are measured together with others of about as many


class ThreadChoice:
    """Chooses among `most` threads, one fewer, and half of them; used from one thread."""

    def __init__(self, most: int) -> None:
        self._counts = sorted({most, max(1, most - 1), max(1, most // 2)}, reverse=True)
        self._measured: dict[tuple[int, int], collections.deque[float]] = {}  # by rows and threads
        self._costs: dict[int, dict[int, float]] = {}  # seconds for a token by rows, by threads where enough is known
        self._steps = 0  # since the last trial
        self._turn = itertools.cycle(self._counts)
        self._trial: tuple[int, int] | None = None  # threads, and how many steps are left
        self._last: dict[int, float] = {}  # costs by threads, of the number of rows that was compared last

    def choose(self, rows: int) -> int:
        """Threads for a step that computes `rows` tokens of running answers."""
        if len(self._counts) == 1:
            return self._counts[0]
        best = self.best(rows)
        if self._trial is None and self._is_due(rows, best):
            other = next(count for count in self._turn if count != best)
            self._trial = (other, TRIAL_STEPS)
            bucket = _bucket(rows)  # what it cost long ago says nothing
            self._measured.pop((bucket, other), None)
            self._costs.get(bucket, {}).pop(other, None)
        return best if self._trial is None else self._trial[0]

    def observe(self, rows: int, threads: int, seconds: float) -> None:
        """How long a step took."""
        if len(self._counts) == 1:
            return
        bucket = _bucket(rows)
        if (measured := self._measured.get((bucket, threads))) is None:
            measured = self._measured[bucket, threads] = collections.deque(maxlen=MEASURED_STEPS)
        measured.append(seconds / rows)
        if len(measured) >= TRIAL_STEPS:
            costs = self._costs.setdefault(bucket, {})
            costs[threads] = statistics.median(measured)
            if len(costs) == len(self._counts):
                self._last = costs.copy()
        self._steps += 1
        if self._trial is not None and self._trial[0] == threads:
            left = self._trial[1] - 1
            self._trial = (threads, left) if left else None
            self._steps = 0 if left == 0 else self._steps

    def best(self, rows: int) -> int:
        """The fastest as far as it is known; for a step that is not measured."""
        known = self._costs.get(_bucket(rows))
        return min(known, key=known.__getitem__) if known else self._counts[0]

    def _is_due(self, rows: int, best: int) -> bool:
        """Whether to try another number again: the slower it was, the more seldom.

        What is not known for so many rows is taken to be as it was for others.
        """
        known = self._costs.get(_bucket(rows), {})
        if self._steps < MEASURED_STEPS or best not in known:
            return False
        costs = known if len(known) == len(self._counts) else self._last
        if not costs or min(costs.values()) < costs[best]:
            return True
        lost_steps = TRIAL_STEPS * (max(costs.values()) / costs[best] - 1)
        return self._steps >= min(lost_steps / TRIAL_COST, LONGEST_PAUSE_STEPS)


def _bucket(rows: int) -> int:
    return rows if rows <= EXACT_ROWS else EXACT_ROWS + rows.bit_length()
