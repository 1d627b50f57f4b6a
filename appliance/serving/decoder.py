"""What the scheduler asks of the thing that computes: the `Decoder` contract. Knows nothing of llama.cpp.

A sequence is a run of cells of the KV memory, named by a number: 0 to `slots` - 1 are for running answers, the rest up to
`sequences` - 1 are for parked prefixes. Sequences may share cells: `copy` computes nothing and takes no cells.
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


class SnapshotRefused(Exception):
    """Saved cells do not fit this model, its settings, or the free memory."""


class CompiledGrammar(Protocol):
    """A checked grammar; each answer gets a state of its own from it in `Decoder.start`."""


class Decoder(Protocol):
    """Computes sequences; used from one thread only, but for `abort`, `piece`, `is_end` and `compile`."""

    @property
    def slots(self) -> int: ...

    @property
    def sequences(self) -> int: ...

    @property
    def cells(self) -> int:
        """Tokens that all sequences together can hold, shared ones counted once."""

    @property
    def context_tokens(self) -> int:
        """Per sequence."""

    @property
    def cell_bytes(self) -> int:
        """Memory of one cell, for the plan of caches."""

    @property
    def can_share(self) -> bool:
        """Whether `copy`, `remove` of a tail, `save` and drafts work: not so for recurrent and sliding-window models."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Any thread. Raises `RequestError` with the position of a mistake, or for what is too large or takes too long."""

    def start(
        self, slot: int, sampling: SamplingSettings, grammar: CompiledGrammar | None, top_logprobs: int | None
    ) -> None:
        """Prepares the sampler of an empty slot."""

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

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Lets `target` hold the cells of `source` from position `start` to `end` too."""

    def remove(self, sequence: int, start: int, end: int) -> None:
        """Takes positions out of a sequence; -1 is the end. Cells that no other sequence holds are free."""

    def save(self, sequence: int) -> SavedCells:
        """The cells of a sequence and their positions."""

    def restore(self, sequence: int, data: SavedCells) -> None:
        """Fills an empty sequence with what `save` gave, at the same positions. Raises `SnapshotRefused`."""

    def release(self, slot: int) -> None:
        """Forgets the slot's sequence and sampler."""

    def clear(self) -> None:
        """Forgets every sequence and sampler, after a failure."""

    def abort(self) -> None:
        """Makes the decode call now running return early; any thread. Without effect on the next call."""

    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...

    def close(self) -> None: ...
