"""Guessing the next tokens from what was already said (prompt lookup), and whether that pays on this machine.

`Lookup` finds guesses in an answer's own tokens. `Gate` lets them through while the tokens that they win are worth the
time that their rows cost, both measured. Knows nothing of models; what is guessed never changes what is sampled.
"""

import dataclasses
from collections.abc import Sequence

from appliance.serving.decoder import MAX_BATCH_DRAFTS, MAX_DRAFT_TOKENS
from appliance.serving.pace import StepCosts

LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2
WEIGHT, OVERALL_WEIGHT = 0.2, 0.1  # of a new observation in the running means
FIRST_GUESS = 0.5  # share of guesses that are right, before any was tried
MARGIN = 1.05  # a smaller gain is noise
DRAFT_LENGTHS = (MAX_DRAFT_TOKENS, 4, 2)
FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # guesses not made before one is tried again


class Lookup:
    """The tokens of one answer, prompt included, searchable by their last few."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._follow: dict[tuple[int, ...], int] = {}  # n-gram to the position of what followed it last
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            at = len(self._tokens)
            for length in range(SHORTEST_NGRAM, min(LONGEST_NGRAM, at) + 1):
                self._follow[tuple(self._tokens[at - length :])] = at
            self._tokens.append(token)

    def drafts(self, limit: int = MAX_DRAFT_TOKENS) -> list[int]:
        """What followed the last few tokens when they were last seen; a repetition is guessed to go on."""
        for length in range(min(LONGEST_NGRAM, len(self._tokens)), SHORTEST_NGRAM - 1, -1):
            if (at := self._follow.get(tuple(self._tokens[-length:]))) is not None:
                period = len(self._tokens) - at
                return [self._tokens[at + offset % period] for offset in range(limit)]
        return []


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """How guesses fared in one answer; `pause` is how many are skipped before the next try."""

    share: float  # running mean of the share that was right
    pause: int = 0
    skipped: int = 0

    @property
    def is_due(self) -> bool:
        """Whether a try is due although it does not seem to pay."""
        return self.pause > 0 and self.skipped >= self.pause


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    """Up to `tokens` guesses for the answer that `record` is of."""

    record: Record
    tokens: int


class Gate:
    """Decides how many guesses a step computes."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._share = FIRST_GUESS
        self.is_on = False  # whether the last guesses offered seemed to pay

    def record(self) -> Record:
        """For a new answer."""
        return Record(self._share)

    def choose(self, proposals: Sequence[Proposal], *, rows: int, answers: int, may_try: bool) -> list[int]:
        """How many guesses of each proposal to compute in a step of `rows` tokens for `answers` answers.

        `may_try` allows guesses that do not seem to pay, now and then, to see whether that has changed.
        """
        chosen = [0] * len(proposals)
        plain = self._costs.seconds(rows)
        if plain is None or not proposals:
            return chosen  # the first step of its kind is measured without guesses
        order = sorted(range(len(proposals)), key=lambda at: -proposals[at].record.share)
        best = MARGIN * answers / plain
        for length in DRAFT_LENGTHS:
            extra, gain = 0, 0.0
            for rank, at in enumerate(order):
                tokens = min(proposals[at].tokens, length)
                if extra + tokens > MAX_BATCH_DRAFTS:
                    break
                extra, gain = extra + tokens, gain + tokens * proposals[at].record.share
                seconds = self._costs.seconds(rows + extra)
                if seconds is None:
                    seconds = plain  # never measured: optimism measures it
                if (answers + gain) / seconds > best:
                    best = (answers + gain) / seconds
                    chosen = [0] * len(proposals)
                    for each in order[: rank + 1]:
                        chosen[each] = min(proposals[each].tokens, length)
        self.is_on = any(chosen)
        self._pause(proposals, chosen, may_try)
        return chosen

    def learn(self, record: Record, drafted: int, accepted: int) -> None:
        share = accepted / drafted
        record.share += WEIGHT * (share - record.share)
        self._share += OVERALL_WEIGHT * (share - self._share)
        if record.pause and 2 * accepted >= drafted:  # a try that went well is repeated at once
            record.pause = record.skipped = FIRST_PAUSE

    def _pause(self, proposals: Sequence[Proposal], chosen: list[int], may_try: bool) -> None:
        """Lets those that were left out try when it is their time; a pause doubles until guesses pay again."""
        for at, proposal in enumerate(proposals):
            record = proposal.record
            if chosen[at]:
                record.pause = record.skipped = 0
            elif record.is_due and may_try and sum(chosen) + proposal.tokens <= MAX_BATCH_DRAFTS:
                chosen[at] = proposal.tokens
                record.pause, record.skipped = min(2 * record.pause, LONGEST_PAUSE), 0
            else:
                record.pause = record.pause or FIRST_PAUSE
                record.skipped += 1
