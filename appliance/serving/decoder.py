"""What the scheduler asks of the thing that computes: the `Decoder` contract. Knows nothing of llama.cpp.

A slot holds one sequence: the tokens of an answer, whose keys and values are cells of the KV memory. Each slot has cells of
its own, `context_tokens` of them: sequences share nothing, so that none is slower for what the others hold.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from appliance.serving.requests import Grammar, SamplingSettings

MAX_DRAFT_TOKENS = 8  # guesses after one token of an answer
MAX_BATCH_DRAFTS = 4 * MAX_DRAFT_TOKENS  # of all answers in one batch: each costs a row of logits, twice
IDLE_CHUNK_TOKENS = 256  # tokens of prompts in one batch, where tuning found nothing better
SHORTEST_CHUNK_TOKENS, LONGEST_CHUNK_TOKENS = 64, 2048  # what it may be tuned to


def batch_tokens(slots: int, chunk_tokens: int = IDLE_CHUNK_TOKENS) -> int:
    """The most tokens of one batch."""
    return slots * (1 + MAX_DRAFT_TOKENS) + chunk_tokens


def batch_drafts(slots: int) -> int:
    """The most guesses in one batch."""
    return min(slots * MAX_DRAFT_TOKENS, MAX_BATCH_DRAFTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Feed:
    """Tokens to append to a slot's sequence from `position` on.

    `is_sampled` asks for what follows the last of them. The last `drafted` tokens are guesses: they are kept only as far as
    sampling agrees with them, and there is at least one token before them.
    """

    slot: int
    tokens: Sequence[int]
    position: int
    is_sampled: bool
    drafted: int = 0

    @property
    def is_read(self) -> bool:
        """Whether it is text that is known already, such as a prompt: more than the next token and guesses."""
        return len(self.tokens) > 1 + self.drafted


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """A token; when asked for, its log probability before bias, grammar and temperature, and the likeliest in its place.

    `failure` says why the answer cannot go on (its grammar leaves no token, or became too complex); `token` then ends it.
    """

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    failure: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, by its name, and how strongly it acts; a sequence is computed with one and the same throughout."""

    name: str
    scale: float


SavedCells = bytes | bytearray | memoryview


@dataclasses.dataclass(frozen=True, slots=True)
class SavedPart:
    """The saved cells of positions `start` to `end`; `cells` may hold others, too."""

    cells: SavedCells
    start: int
    end: int


class SnapshotRefused(Exception):
    """Saved cells do not fit this model, its settings, or the free memory."""


class CompiledGrammar(Protocol):
    """A checked grammar; each answer gets a state of its own from it in `Decoder.start`."""


class Decoder(Protocol):
    """Computes sequences; used from one thread only, but for `abort`, `piece`, `is_end` and `compile`."""

    @property
    def slots(self) -> int: ...

    @property
    def context_tokens(self) -> int:
        """Per sequence."""

    @property
    def cell_bytes(self) -> int:
        """Memory of one cell, for the plan of caches."""

    @property
    def can_share(self) -> bool:
        """Whether `remove` of a tail, `save`, `move` and drafts work: not so for recurrent and sliding-window models."""

    @property
    def can_move(self) -> bool:
        """Whether saved parts may be restored at other positions than those they were computed at."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Any thread. Raises `RequestError` with the position of a mistake, or for what is too large or takes too long."""

    def start(
        self, slot: int, sampling: SamplingSettings, grammar: CompiledGrammar | None, top_logprobs: int | None
    ) -> None:
        """Prepares the sampler of a slot."""

    def decode(self, feeds: Sequence[Feed], adapter: Adapter | None) -> Mapping[int, Sequence[Sampled]] | None:
        """Computes one batch; for each slot that asked, what follows: one token, and one more for each draft that was right.

        Rejected drafts are removed from the slot's sequence, which then holds everything but the last token returned.
        None when aborted: then the sequences hold an unknown part of the feeds, and the caller removes it or releases them.
        Raises `EngineFailed`.
        """

    def use_threads(self, decode: int, prefill: int) -> None:
        """From the next `decode` on: for answers alone, and for batches in which text is read."""

    def forced(self, slot: int) -> Sequence[int]:
        """Tokens that the grammar leaves no choice about, next after the last sampled; they count as sampled from now on.

        At most IDLE_CHUNK_TOKENS: those that follow are sampled as any other. Empty without a grammar, and when log
        probabilities were asked for.
        """

    def remove(self, slot: int, start: int, end: int) -> None:
        """Takes positions out of a sequence; -1 is the end."""

    def save(self, slot: int) -> SavedCells:
        """The cells of a sequence and their positions."""

    def restore(self, slot: int, parts: Sequence[SavedPart]) -> None:
        """Replaces a sequence by saved parts, one behind the other from position 0 on; they are moved where `can_move`.

        Raises `SnapshotRefused`, and then the sequence is empty.
        """

    def join(self, parts: Sequence[SavedPart]) -> SavedCells:
        """Saved cells of all parts, one behind the other; the first stays at its position. Raises `SnapshotRefused`."""

    def check(self, cells: SavedCells, tokens: int) -> None:
        """Raises `SnapshotRefused` unless these are the cells of positions 0 to `tokens` - 1, as this model has them."""

    def move(self, source: int, target: int) -> None:
        """Gives sequence and sampler of one slot to another, which loses its own sequence. It may be empty."""

    def release(self, slot: int, kept: int) -> None:
        """Forgets the slot's sampler, and its sequence but for the first `kept` tokens."""

    def clear(self) -> None:
        """Forgets every sequence and sampler, after a failure."""

    def abort(self) -> None:
        """Makes the decode call now running return early; any thread. Without effect on the next call."""

    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...

    def close(self) -> None: ...
