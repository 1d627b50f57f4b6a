"""What this machine was measured to do, and what follows from it: chunk sizes, and how long a newcomer waits.

Times of decode calls go in; nothing here reads a clock. Knows nothing of queues, tokens' values or llama.cpp.
"""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Sequence

from appliance.serving.decoder import IDLE_CHUNK_TOKENS, SHORTEST_CHUNK_TOKENS

BUSY_STEP_SECONDS = 0.25  # what running answers may wait for their next token while prompts are read beside them
SHORTEST_BUSY_CHUNK_TOKENS = 16
# With nobody to wait for it a step may take longer, but a cancelled or late request, and a newcomer with a short prompt,
# wait for its end: at 17 tokens/s, chunks of 256 would make that 15 s and save next to nothing.
IDLE_STEP_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 600
WEIGHT = 0.2  # of a new measurement in the running means
FORGETTING = 0.001  # of the way from the best pace to a slower one of today, each step: other work passes, age does not
SHORTEST_STEP_SECONDS = 1e-6  # a clock may stand still; rates are divided by this
MEASURED_ROWS = 1024  # more rows in one step than this are no decode step

# Before anything was measured: a small model on an old machine.
GUESSED_PROMPT_TOKEN_SECONDS = 0.02
GUESSED_STEP_SECONDS = 0.1
GUESSED_ANSWER_TOKENS = 128.0


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What is left to compute for an answer: tokens to read, and tokens to generate as far as one can tell."""

    prompt_tokens: int
    answer_tokens: float


class StepCosts:
    """Running means of what a decode step costs, by its number of rows (tokens computed)."""

    def __init__(self) -> None:
        self._rows: list[int] = []  # sorted
        self._seconds: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        if rows > MEASURED_ROWS:
            return
        seconds = max(seconds, SHORTEST_STEP_SECONDS)
        if rows not in self._seconds:
            bisect.insort(self._rows, rows)
            self._seconds[rows] = seconds
        self._seconds[rows] += WEIGHT * (seconds - self._seconds[rows])

    def seconds(self, rows: int) -> float | None:
        """Measured, or between two that were measured; None where nothing is known."""
        if rows in self._seconds:
            return self._seconds[rows]
        at = bisect.bisect(self._rows, rows)
        if at in (0, len(self._rows)):
            return None
        below, above = self._rows[at - 1], self._rows[at]
        share = (rows - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def nearest(self, rows: int) -> float | None:
        """As `seconds`, and beyond what was measured, the cost of the nearest number of rows."""
        if not self._rows:
            return None
        return self.seconds(min(max(rows, self._rows[0]), self._rows[-1]))


class Pace:
    """Measured rates of one engine, whose batches have room for `longest_chunk` tokens of prompts."""

    def __init__(self, longest_chunk: int = IDLE_CHUNK_TOKENS) -> None:
        self._longest_chunk = longest_chunk
        self.costs = StepCosts()
        self._prompt_token_seconds: float | None = None
        self._best_prompt_token_seconds = GUESSED_PROMPT_TOKEN_SECONDS
        self._answer_tokens = GUESSED_ANSWER_TOKENS

    @property
    def is_measured(self) -> bool:
        return self._prompt_token_seconds is not None

    @property
    def prompt_token_seconds(self) -> float:
        return GUESSED_PROMPT_TOKEN_SECONDS if self._prompt_token_seconds is None else self._prompt_token_seconds

    def step_seconds(self, rows: int) -> float:
        """Of a step that computes `rows` tokens of running answers."""
        known = self.costs.nearest(rows)
        return GUESSED_STEP_SECONDS if known is None else known

    def observe_step(self, seconds: float, *, rows: int, prompt_tokens: int) -> None:
        """A decode call: `rows` tokens of running answers and `prompt_tokens` of prompts."""
        if not prompt_tokens:
            self.costs.observe(rows, seconds)
            return
        known = self.costs.nearest(rows) if rows else 0.0
        per_token = max(seconds - (known or 0.0), 0.0) / prompt_tokens
        if self._prompt_token_seconds is None:
            self._prompt_token_seconds = self._best_prompt_token_seconds = per_token
        # A short end of a prompt says little: most of its step is what every step costs.
        weight = WEIGHT * min(1.0, prompt_tokens / SHORTEST_CHUNK_TOKENS)
        self._prompt_token_seconds += weight * (per_token - self._prompt_token_seconds)
        slower = self._prompt_token_seconds - self._best_prompt_token_seconds
        self._best_prompt_token_seconds += slower * (FORGETTING if slower > 0.0 else 1.0)

    def observe_answer(self, tokens: int) -> None:
        self._answer_tokens += WEIGHT * (tokens - self._answer_tokens)

    def chunk_tokens(self, rows: int, *, is_busy: bool) -> int:
        """How many prompt tokens go into a step beside `rows` tokens of running answers."""
        low = SHORTEST_BUSY_CHUNK_TOKENS if is_busy else SHORTEST_CHUNK_TOKENS
        seconds = BUSY_STEP_SECONDS if is_busy else IDLE_STEP_SECONDS
        left = seconds - (self.step_seconds(rows) if rows else 0.0)
        tokens = left / self.prompt_token_seconds if self.prompt_token_seconds > 0 else math.inf
        return int(max(low, min(self._longest_chunk, tokens)))

    def expected_answer(self, max_tokens: int, generated: int = 0) -> float:
        """Tokens that an answer still has to go, by the mean of those before it."""
        return min(max(self._answer_tokens - generated, 1.0), max_tokens - generated)

    def seconds_until_place(self, running: Sequence[Work], waiting: Sequence[Work], slots: int) -> float:
        """When one more request, behind those that wait, gets a slot.

        A slot's work takes its own time, and longer for what others read beside each of its answers' tokens.
        """
        step = self.step_seconds(max(1, min(slots, len(running) + len(waiting))))
        free: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * (slots - len(running))  # at, tokens to write, reading
        free += [self._after(work, step) for work in running]
        heapq.heapify(free)
        for work in waiting:
            heapq.heapreplace(free, self._after(work, step, *free[0]))
        at, tokens, own = free[0]
        others = sum(self.reading_seconds(work) for work in (*running, *waiting)) - own
        return at + min(others, tokens * max(BUSY_STEP_SECONDS - step, 0.0))

    def _after(
        self, work: Work, step: float, at: float = 0.0, tokens: float = 0.0, reading: float = 0.0
    ) -> tuple[float, float, float]:
        """What there is of a slot after one more request."""
        own = self.reading_seconds(work)
        return at + own + work.answer_tokens * step, tokens + work.answer_tokens, reading + own

    def reading_seconds(self, work: Work) -> float:
        """As fast as prompts are read at present."""
        return work.prompt_tokens * self.prompt_token_seconds

    def best_reading_seconds(self, work: Work) -> float:
        """As fast as this machine reads prompts when nothing else keeps it busy."""
        return work.prompt_tokens * self._best_prompt_token_seconds


def retry_after(seconds: float) -> int:
    """Whole seconds for `Retry-After`."""
    return max(1, min(LONGEST_RETRY_SECONDS, math.ceil(seconds)))
