"""What a benchmark of servers yields: figures of rows, and how they are computed from answers. Starts and prints nothing."""

import bisect
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.errors import ServerError
from benchmarks.client import Answer

# Streams that decode together for less than this share of their tokens do not decode together.
SHARED_RATIO = 0.25
TOLD_RATIO = 0.5  # events with text, of tokens: with fewer, they do not tell when tokens came


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of one server in one round: one value or more of the same kind, or the problem that kept it from being had."""

    row: str
    server: str
    round: int
    values: Sequence[float] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""

    @property
    def value(self) -> float | None:
        """The median of the round."""
        return statistics.median(self.values) if self.values else None


def generated_tokens(answer: Answer, max_tokens: int) -> int:
    """By the server's own count; some tell none, and then an answer that was cut at the limit has reached it."""
    if answer.answer_tokens is not None:
        return answer.answer_tokens
    if answer.finish_reason == "length":
        return max_tokens
    raise ServerError(
        f"An answer without usage ended by itself ({answer.finish_reason}): its tokens cannot be counted; "
        "the server must be told to ignore the end of text."
    )


def decode_rate(answers: Sequence[Answer], max_tokens: int) -> tuple[float, str]:
    """Tokens per second of streams that were sent at the same time, all together, and over which time that was taken.

    The time is that in which all of them decode: from the last stream's first token to the first stream's last. Reading
    prompts is outside it, and so is the end, when some streams are done. A server that answers one after the other has no
    such time: there it is all time in which a stream decodes, so that prompts read between two answers do not count
    against it.
    """
    streams = [_Stream.of(answer, generated_tokens(answer, max_tokens)) for answer in answers]
    start, end = max(stream.start for stream in streams), min(stream.end for stream in streams)
    if min(stream.share(start, end) for stream in streams) >= SHARED_RATIO:
        return sum(stream.tokens * stream.share(start, end) for stream in streams) / (end - start), "all streams"
    tokens = sum(stream.tokens * stream.share(stream.start, stream.end) for stream in streams)
    return tokens / _covered_seconds([(stream.start, stream.end) for stream in streams]), "any stream"


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest values."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """The tokens of one answer in time, from the first on."""

    tokens: int
    start: float
    end: float
    times: Sequence[float]

    @classmethod
    def of(cls, answer: Answer, tokens: int) -> "_Stream":
        times = answer.text_times
        end = max(filter(None, (answer.finished_at, *times[-1:])), default=0.0)
        if not times or tokens < 2 or end <= times[0]:
            raise ServerError(f"An answer cannot be measured: {tokens} tokens, and {len(times)} events brought text.")
        if len(times) < TOLD_RATIO * tokens:
            return cls(tokens=tokens, start=times[0], end=end, times=())
        return cls(tokens=tokens, start=times[0], end=times[-1], times=times)

    def share(self, start: float, end: float) -> float:
        """The share of its tokens that came after `start`, up to and with `end`.

        By events with text: a token that completes no character brings none. Where text was withheld (the example server
        stays silent after bytes that are no text, which a model of noise does write), by the time alone.
        """
        if self.times:
            return (bisect.bisect_right(self.times, end) - bisect.bisect_right(self.times, start)) / len(self.times)
        return (end - start) / (self.end - self.start) * (self.tokens - 1) / self.tokens


def _covered_seconds(spans: Sequence[tuple[float, float]]) -> float:
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
