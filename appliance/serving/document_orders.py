"""What the operator's documents ask of the scheduler: to be read ahead, and to be forgotten without a trace when removed.

Both are done between two steps, when no decode call is in flight.
"""

import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Mapping

from appliance.serving.idle import IdleWork
from appliance.serving.job import Ticket
from appliance.serving.prefixes import Prefixes
from appliance.serving.reading_ahead import Change, ReadingAhead
from appliance.serving.recall import Recall
from appliance.serving.runs import Finder
from appliance.serving.stitcher import Stitcher


@dataclasses.dataclass(frozen=True, slots=True)
class ErasedCells:
    """Of how many tokens in the cache, and in how many slots of answers that are over.

    As many requests as `running` go on with it, to their end, and then leave nothing.
    """

    tokens: int = 0
    slots: int = 0
    running: int = 0


class DocumentOrders:
    """`follow` is for any thread, the rest for the scheduler's, with its lock."""

    def __init__(
        self,
        changed: threading.Condition,
        tickets: Mapping[str, Ticket],
        *,
        ahead: ReadingAhead,
        idle: IdleWork,
        prefixes: Prefixes,
        recall: Recall,
        stitcher: Stitcher,
    ) -> None:
        self._changed = changed
        self._tickets = tickets
        self._ahead = ahead
        self._idle = idle
        self._prefixes = prefixes
        self._recall = recall
        self._stitcher = stitcher
        self._orders: collections.deque[tuple[Change, concurrent.futures.Future[ErasedCells]]] = collections.deque()
        self._is_closed = False

    @property
    def is_stitching(self) -> bool:
        """Whether documents are read by themselves here, as far as is decided at start."""
        return self._stitcher.is_stitching

    @property
    def most_tokens(self) -> int:
        """So many tokens of documents may find place, and no more."""
        return self._ahead.most_tokens

    def follow(self, change: Change) -> "concurrent.futures.Future[ErasedCells]":
        """Carries it out; the outcome is cancelled when the scheduler ends before."""
        outcome: concurrent.futures.Future[ErasedCells] = concurrent.futures.Future()
        with self._changed:
            if self._is_closed:
                outcome.cancel()
            else:
                self._orders.append((change, outcome))
                self._changed.notify()
        return outcome

    def obey(self) -> None:
        while self._orders:
            change, outcome = self._orders.popleft()
            try:
                outcome.set_result(self._follow(change))
            except Exception as error:
                outcome.set_exception(error)
                raise

    def close(self) -> None:
        self._is_closed = True
        for _, outcome in self._orders:
            outcome.cancel()

    def _follow(self, change: Change) -> ErasedCells:
        self._idle.pause()
        self._ahead.keep(change)  # or it would go on with one erased
        return ErasedCells() if change.find is None else self._erase(change.find)

    def _erase(self, find: Finder) -> ErasedCells:
        self._idle.forget(find)
        self._recall.forget(find)
        holding = [ticket for ticket in self._tickets.values() if find(ticket.prompt) is not None]
        for answer in [answer for ticket in holding for answer in ticket.answers if not answer.is_over]:
            self._stitcher.forget(answer)
        tokens, slots = self._prefixes.erase(find)
        return ErasedCells(tokens, slots, len(holding))
