"""The answers that wait for a slot, first come first served, and when one more is refused.

Used with the scheduler's lock held.
"""

from collections.abc import Callable, Iterator, Sequence

from appliance.errors import DeadlineExceeded, DeadlineTooShort, QueueFull
from appliance.serving.job import Answer, Ticket
from appliance.serving.pace import Pace, Work, retry_after


class Backlog:
    """At most `queue_requests` requests may wait, with at most `queue_tokens` prompt tokens between them."""

    def __init__(self, slots: int, queue_requests: int, queue_tokens: int) -> None:
        self._slots = slots
        self._queue_requests = queue_requests
        self._queue_tokens = queue_tokens
        self._answers: list[Answer] = []

    def __iter__(self) -> Iterator[Answer]:
        return iter(self._answers)

    def __bool__(self) -> bool:
        return bool(self._answers)

    @property
    def requests(self) -> int:
        """Requests of which no answer has begun."""
        return len(self._tickets())

    @property
    def tokens(self) -> int:
        """Prompt tokens of those."""
        return sum(len(ticket.prompt) for ticket in self._tickets())

    def add(self, answers: Sequence[Answer]) -> None:
        self._answers += answers

    def remove(self, answer: Answer) -> None:
        self._answers.remove(answer)

    def of(self, ticket: Ticket) -> list[Answer]:
        return [answer for answer in self._answers if answer.ticket is ticket]

    def require_place(self, prompt_tokens: int, running: Sequence[Work], work: Callable[[Answer], Work], pace: Pace) -> None:
        """Raises `QueueFull` unless one more request may wait. A request that would wait alone may be of any size."""
        tickets = self._tickets()
        idle = max(0, self._slots - len(running))
        tokens = sum(len(ticket.prompt) for ticket in tickets)
        too_many = len(tickets) + 1 - idle - self._queue_requests
        must_go, left = 0, tokens
        while must_go < len(tickets) and left + prompt_tokens > self._queue_tokens:
            left -= len(tickets[must_go].prompt)
            must_go += 1
        if too_many <= 0 and must_go == 0:
            return
        ahead = tickets[: max(too_many, must_go) - 1]
        waiting = [work(answer) for answer in self._answers if answer.ticket in ahead]
        seconds = retry_after(pace.seconds_until_place(running, waiting, self._slots))
        if too_many > 0:
            problem = (
                f"{len(running)} answers are running and {len(tickets)} requests wait; the limit is {self._slots} running "
                f"and {self._queue_requests} waiting"
            )
        else:
            limit = self._queue_tokens
            problem = f"Prompts of {tokens} tokens wait and this one has {prompt_tokens}; the limit is {limit} tokens"
        raise QueueFull(f"{problem}. Try again in {seconds} s.", retry_after_seconds=seconds)

    def require_time(
        self, left: float, own: Work, running: Sequence[Work], work: Callable[[Answer], Work], pace: Pace
    ) -> None:
        """Raises when `own` work finds too little time in the seconds `left`.

        `DeadlineExceeded` when its answer could not begin even if it were alone and nothing else kept this machine busy.
        `DeadlineTooShort` when others are in its way, or the machine is slower than it was, so that it could not begin, or
        would be cut off where it would not be alone. One that is alone is tried at the best pace: a slow moment that nothing
        measures again would never end.
        """
        waiting = [work(answer) for answer in self._answers]
        place = pace.seconds_until_place(running, waiting, self._slots)
        best, writing = pace.best_reading_seconds(own), own.answer_tokens * pace.step_seconds(self._slots)
        reading = pace.reading_seconds(own) if running or waiting else best
        told = f"The answer could begin in {place + reading:.1f} s, and the deadline is in {max(left, 0.0):.1f} s."
        if left <= 0.0 or (pace.is_measured and left < best):
            raise DeadlineExceeded(f"{told} Allow more time.")
        whole = reading + writing if reading + writing <= left else reading
        if pace.is_measured and left < place + whole:
            told = f"The answer could be complete in {place + reading + writing:.1f} s, and the deadline is in {left:.1f} s."
            again = retry_after(place + whole - left)
            raise DeadlineTooShort(f"{told} Allow more time, or try again in {again} s.", retry_after_seconds=again)

    def _tickets(self) -> list[Ticket]:
        tickets = dict.fromkeys(answer.ticket for answer in self._answers)
        return [ticket for ticket in tickets if ticket.started_at is None]
