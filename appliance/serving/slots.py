"""Which slot is whose: those of running answers, and what the last answers left in the others.

llama.cpp computes neighbouring slots together, and others one after the other, reading all weights each time: so running
answers are kept side by side. Decides only; `prefixes.py` carries it out.
"""

import dataclasses
from collections.abc import Iterator

from appliance.serving.job import Job
from appliance.serving.snapshots import Prefix


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """What an answer that is over has left in its slot; `is_cached`: the prefix cache has it too."""

    prefix: Prefix
    number: int  # counts up
    is_cached: bool = False


class Slots:
    """Of `count` slots. Used from the scheduler's thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.running: dict[int, Job] = {}
        self.left: dict[int, Left] = {}
        self._clock = 0

    @property
    def free(self) -> list[int]:
        return [slot for slot in range(self.count) if slot not in self.running]

    def held(self) -> Iterator[tuple[int, Prefix]]:
        """What is in each slot that is not empty."""
        for slot, left in self.left.items():
            yield slot, left.prefix
        for slot, job in self.running.items():
            if job.computed:
                yield slot, job.prefix(job.computed)

    def choose(self, wanted: int | None) -> int:
        """A free slot, of which there is one: the wanted one, if it is beside the running ones."""
        places = self._places()
        return wanted if wanted in places else min(places, key=self._worth)

    def enter(self, slot: int, job: Job) -> None:
        self.left.pop(slot, None)
        self.running[slot] = job
        job.slot = slot

    def leave(self, job: Job, kept: Prefix) -> None:
        """The slot is free, and holds what is kept."""
        del self.running[job.slot]
        if kept.tokens:
            self._clock += 1
            self.left[job.slot] = Left(kept, self._clock)

    def empty(self, slot: int) -> None:
        """Its cells are lost."""
        self.left.pop(slot, None)

    def note_cached(self, slot: int) -> None:
        self.left[slot] = dataclasses.replace(self.left[slot], is_cached=True)

    def moved(self, source: int, target: int) -> None:
        self.left.pop(target, None)
        job = self.running[target] = self.running.pop(source)
        job.slot = target

    def moves(self) -> list[tuple[int, int]]:
        """Which answers to move, and to which free slots, so that all are side by side again: as few tokens as can be."""
        count = len(self.running)
        if count < 2 or max(self.running) - min(self.running) + 1 == count:
            return []
        outside = (
            [slot for slot in self.running if not start <= slot < start + count] for start in range(self.count - count + 1)
        )
        start, sources = min(enumerate(outside), key=lambda found: sum(self.running[slot].computed for slot in found[1]))
        targets = [slot for slot in range(start, start + count) if slot not in self.running]
        return list(zip(sources, targets, strict=True))

    def clear(self) -> None:
        self.running.clear()
        self.left.clear()

    def _places(self) -> list[int]:
        """Free slots between running ones, or else beside them."""
        free = self.free
        if not self.running:
            return free
        first, last = min(self.running), max(self.running)
        between = [slot for slot in free if first < slot < last]
        return between or [slot for slot in free if slot in (first - 1, last + 1)]

    def _worth(self, slot: int) -> tuple[bool, bool, int]:
        """What would be lost with the slot's content: nothing, what the cache has, the oldest."""
        left = self.left.get(slot)
        return (left is not None, left is not None and not left.is_cached, 0 if left is None else left.number)
