"""A `Decoder` that counts, and checks everything that llama.cpp would abort on or silently compute wrong; a listener."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from appliance.serving.decoder import (
    MAX_BATCH_DRAFTS,
    Adapter,
    CompiledGrammar,
    Feed,
    Sampled,
    SavedCells,
    SavedPart,
    SnapshotRefused,
    batch_tokens,
)
from appliance.serving.events import RequestStats, StepStats
from appliance.serving.requests import Grammar, SamplingSettings

END = 0
CELL_BYTES = 10


class Listener:
    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []

    def record_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def record_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)


@dataclass(frozen=True, eq=False)
class Cell:
    """One computed token; `digest` stands for it and all that was before it, when it was computed at position `origin`."""

    token: int
    digest: int
    adapter: Adapter | None
    origin: int


@dataclass(frozen=True)
class Forcing:
    """A "grammar" that forces `tokens` after each token `after`."""

    after: int
    tokens: tuple[int, ...]


@dataclass
class Sampler:
    sampling: SamplingSettings
    grammar: CompiledGrammar | None
    top_logprobs: int | None
    last: int = -1


@dataclass
class CountingDecoder:
    """Answers a prompt with the numbers after its last token: 5 → 6 7 8 …, as text "6 7 8 ". 99 is followed by the end.

    `follow` may say otherwise. `gate` holds every decode call until it is set. A cell knows what it was computed from, so
    that a prefix used in the wrong place is noticed when the next token is computed.
    """

    slots: int = 2
    context_tokens: int = 64
    can_share: bool = True
    can_move: bool = False
    follow: Callable[[tuple[int, ...]], int] = lambda history: END if history[-1] == 99 else history[-1] + 1
    cell_bytes: int = CELL_BYTES
    held: dict[int, dict[int, Cell]] = field(default_factory=dict)  # cells by position, by slot
    samplers: dict[int, Sampler] = field(default_factory=dict)
    started: list[Sampler] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    start_failures: list[Exception] = field(default_factory=list)
    remove_failures: list[Exception] = field(default_factory=list)
    sample_failures: list[str] = field(default_factory=list)
    restore_failures: list[str] = field(default_factory=list)
    feeds: list[list[Feed]] = field(default_factory=list)
    adapters: list[Adapter | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    computed: int = 0  # tokens
    copied: int = 0  # tokens saved, joined and restored
    moves: int = 0
    hold_at: int = -1  # closes the gate before this decode call
    aborts: int = 0
    threads: list[tuple[int, int]] = field(default_factory=list)  # by decode call
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)  # one count per decode call begun

    @property
    def batches(self) -> list[list[int]]:
        return [[len(feed.tokens) for feed in feeds] for feeds in self.feeds]

    @property
    def used_cells(self) -> int:
        return sum(len(cells) for cells in self.held.values())

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        raise NotImplementedError

    def start(
        self, slot: int, sampling: SamplingSettings, grammar: CompiledGrammar | None, top_logprobs: int | None
    ) -> None:
        self._require(0 <= slot < self.slots, f"start of slot {slot}")
        self._require(slot not in self.samplers, f"slot {slot} is not free")
        if self.start_failures:
            raise self.start_failures.pop()
        self.samplers[slot] = Sampler(sampling, grammar, top_logprobs)
        self.started.append(self.samplers[slot])

    def decode(self, feeds: Sequence[Feed], adapter: Adapter | None) -> Mapping[int, Sequence[Sampled]] | None:
        before = self.aborts
        if len(self.feeds) == self.hold_at:
            self.gate.clear()
        self.entered.release()
        self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        if self.aborts > before:
            for feed in feeds:  # an unknown part was computed
                self._append(feed.slot, feed.tokens[: len(feed.tokens) // 2], feed.position, adapter)
            return None
        self._require(len({feed.slot for feed in feeds}) == len(feeds) <= self.slots, "a slot is fed twice")
        extent = max(self.samplers) - min(self.samplers) + 1
        self._require(not self.can_share or extent == len(self.samplers), f"answers in slots {sorted(self.samplers)}")
        tokens = sum(len(feed.tokens) for feed in feeds)
        self._require(0 < tokens <= batch_tokens(self.slots), f"batch of {tokens} tokens")
        self._require(sum(feed.drafted for feed in feeds) <= MAX_BATCH_DRAFTS, "too many drafts")
        self.feeds.append(list(feeds))
        self.adapters.append(adapter)
        return {feed.slot: given for feed in feeds if (given := self._compute(feed, adapter))}

    def forced(self, slot: int) -> Sequence[int]:
        sampler = self.samplers[slot]
        if isinstance(sampler.grammar, Forcing) and sampler.last == sampler.grammar.after:
            sampler.last = sampler.grammar.tokens[-1]
            return sampler.grammar.tokens
        return ()

    def remove(self, slot: int, start: int, end: int) -> None:
        self._require(0 <= slot < self.slots and (self.can_share or (start, end) == (0, -1)), f"remove from {slot}")
        if self.remove_failures:
            raise self.remove_failures.pop()
        cells = self.held.get(slot, {})
        for position in [each for each in cells if each >= start and (end == -1 or each < end)]:
            del cells[position]

    def save(self, slot: int) -> bytes:
        self._require(self.can_share, "save in a model that cannot share")
        return self._packed(self.held[slot])

    def join(self, parts: Sequence[SavedPart]) -> bytes:
        return self._packed(self._joined(parts))

    def check(self, cells: SavedCells, tokens: int) -> None:
        self._joined([SavedPart(cells, 0, tokens)])

    def restore(self, slot: int, parts: Sequence[SavedPart]) -> None:
        self._require(self.can_share and 0 <= slot < self.slots, f"restore into slot {slot}")
        self.held.pop(slot, None)
        if self.restore_failures:
            raise SnapshotRefused(self.restore_failures.pop())
        self.held[slot] = self._joined(parts)
        self._require(0 < len(self.held[slot]) <= self.context_tokens, f"restore of {len(self.held[slot])} tokens")

    def move(self, source: int, target: int) -> None:
        self._require(self.can_share and target not in self.samplers, f"move of slot {source} to {target}")
        self.moves += 1
        self.held[target], self.samplers[target] = self.held.pop(source, {}), self.samplers.pop(source)

    def release(self, slot: int, kept: int) -> None:
        self._require(0 <= slot < self.slots, f"release of slot {slot}")
        self.samplers.pop(slot, None)
        cells = self.held.pop(slot, {})
        self._require(self.can_share or not kept, "a model that cannot share keeps nothing")
        self._require(kept <= len(cells), f"{kept} tokens to be kept of {len(cells)}")
        if kept:
            self.held[slot] = {at: cells[at] for at in range(kept)}

    def clear(self) -> None:
        self.held.clear()
        self.samplers.clear()

    def use_threads(self, decode: int, prefill: int) -> None:
        self.threads.append((decode, prefill))

    def abort(self) -> None:
        self.aborts += 1
        self.gate.set()

    def piece(self, token: int) -> bytes:
        return f"{token} ".encode()

    def is_end(self, token: int) -> bool:
        return token == END

    def close(self) -> None:
        self.is_closed = True

    def _compute(self, feed: Feed, adapter: Adapter | None) -> list[Sampled]:
        """Appends the tokens; keeps drafts as far as they are what would have been said anyway."""
        certain = len(feed.tokens) - feed.drafted
        self._require(certain > 0 and (feed.is_sampled or not feed.drafted), "nothing before the drafts")
        self._require(self.can_share or not feed.drafted, "drafts in a model that cannot remove them")
        self._append(feed.slot, feed.tokens, feed.position, adapter)
        if not feed.is_sampled:
            return []
        cells, sampler, given = self.held[feed.slot], self.samplers[feed.slot], []
        for at in range(certain, len(feed.tokens) + 1):
            position = feed.position + at - 1
            token = self.follow(tuple(cells[each].token for each in range(position + 1)))
            given.append(self._sampled(token, sampler))
            token = given[-1].token
            if at == len(feed.tokens) or token != feed.tokens[at]:
                for rejected in [each for each in cells if each > position]:
                    del cells[rejected]
                break
        sampler.last = given[-1].token
        return given

    def _sampled(self, token: int, sampler: Sampler) -> Sampled:
        if self.sample_failures:
            return Sampled(END, failure=self.sample_failures.pop())
        if sampler.top_logprobs is None:
            return Sampled(token)
        return Sampled(token, -0.5, [(token + each, -0.5 - each) for each in range(sampler.top_logprobs)])

    def _append(self, slot: int, tokens: Sequence[int], position: int, adapter: Adapter | None) -> None:
        self._require(slot in self.samplers, f"slot {slot} was not started")
        cells = self.held.setdefault(slot, {})
        self._require(sorted(cells) == list(range(position)), f"position {position} in a sequence of {len(cells)}")
        for at in range(position):  # what is attended to must be what these tokens mean here
            cell = cells[at]
            start = at - cell.origin
            self._require(start == 0 or self.can_move, f"position {at} was computed at {cell.origin}")
            digest = cells[at - 1].digest if at and not start else 0
            for each in range(start if start else at, at + 1):  # one that was moved belongs to a text read by itself
                digest = hash((digest, cells[each].token))
            self._require(cell.digest == digest, f"position {at} was computed from other tokens")
            self._require(cell.adapter == adapter, f"position {at} was computed with another adapter")
        self._extend(cells, tokens, adapter)
        self._require(len(cells) <= self.context_tokens, f"{len(cells)} tokens in a context of {self.context_tokens}")
        self.computed += len(tokens)

    def _extend(self, cells: dict[int, Cell], tokens: Sequence[int], adapter: Adapter | None) -> None:
        for token in tokens:
            before = cells[len(cells) - 1].digest if cells else 0
            cells[len(cells)] = Cell(token, hash((before, token)), adapter, len(cells))

    def _packed(self, cells: Mapping[int, Cell]) -> bytes:
        start = min(cells)
        self._require(sorted(cells) == list(range(start, start + len(cells))), "saved cells with holes")
        self.copied += len(cells)
        adapter = cells[start].adapter
        told = None if adapter is None else [adapter.name, adapter.scale]
        saved = [[cells[at].token, cells[at].digest, cells[at].origin] for at in sorted(cells)]
        return json.dumps([start, told, saved]).encode()

    def _joined(self, parts: Sequence[SavedPart]) -> dict[int, Cell]:
        joined: dict[int, Cell] = {}
        for part in parts:
            at = max(joined, default=part.start - 1) + 1
            self._require(self.can_move or at == part.start < part.end, f"a part begins at {part.start}")
            start, told, saved = json.loads(bytes(part.cells))
            if start > part.start or start + len(saved) < part.end or any(each[0] == -1 for each in saved):
                raise SnapshotRefused("The cells are of another size.")
            adapter = None if told is None else Adapter(*told)
            cells = saved[part.start - start : part.end - start]
            joined |= {
                at + number: Cell(token, digest, adapter, origin) for number, (token, digest, origin) in enumerate(cells)
            }
        self.copied += len(joined)
        return joined

    def _require(self, is_right: bool, problem: str) -> None:
        if not is_right:
            self.problems.append(problem)
            raise AssertionError(problem)
