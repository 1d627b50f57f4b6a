"""Guesses are found where something repeats, and made only while they pay; costs and acceptance are made up here."""

import random

import pytest

from appliance.serving.decoder import MAX_BATCH_DRAFTS, MAX_DRAFT_TOKENS
from appliance.serving.pace import StepCosts
from appliance.serving.speculation import FIRST_PAUSE, LONGEST_PAUSE, Gate, Lookup, Proposal, Record


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 50, 1, 2, 3])
    assert lookup.drafts() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert lookup.drafts(2) == [4, 5]
    lookup.extend([4, 99])
    assert lookup.drafts() == []


def test_longest_and_latest_match_wins() -> None:
    assert Lookup([1, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3]).drafts(1) == [10]
    assert Lookup([2, 3, 10, 2, 3, 20, 2, 3]).drafts(1) == [20]


def test_repetition_is_guessed_to_go_on() -> None:
    assert Lookup([5, 5, 5]).drafts() == [5] * MAX_DRAFT_TOKENS
    assert Lookup([1, 2, 1, 2, 1]).drafts(4) == [2, 1, 2, 1]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2]])
def test_nothing_repeats_in_a_few_tokens(tokens: list[int]) -> None:
    assert Lookup(tokens).drafts() == []


class Machine:
    """Decodes `answers` answers with made-up costs; a share of guesses is right."""

    def __init__(self, row_seconds: float, answers: int = 1) -> None:
        self.costs = StepCosts()
        self.gate = Gate(self.costs)
        self.row_seconds = row_seconds
        self.records = [self.gate.record() for _ in range(answers)]
        self.random = random.Random(1)
        self.drafted = self.tokens = 0
        self.seconds = 0.0

    def run(self, steps: int, share: float, may_try: bool = True) -> int:
        """Returns how many guesses were made."""
        before = self.drafted
        for _ in range(steps):
            answers = len(self.records)
            proposals = [Proposal(record, MAX_DRAFT_TOKENS) for record in self.records]
            counts = self.gate.choose(proposals, rows=answers, answers=answers, may_try=may_try)
            rows = answers + sum(counts)
            seconds = 0.1 + self.row_seconds * rows
            self.costs.observe(rows, seconds)
            self.seconds += seconds
            for record, count in zip(self.records, counts, strict=True):
                accepted = 0
                while accepted < count and self.random.random() < share:
                    accepted += 1
                if count:
                    self.gate.learn(record, count, accepted)
                self.drafted += count
                self.tokens += 1 + accepted
        return self.drafted - before


def test_first_step_is_measured_without_guesses() -> None:
    machine = Machine(0.0)
    assert machine.run(1, 1.0) == 0
    assert machine.run(1, 1.0) == MAX_DRAFT_TOKENS


def test_right_guesses_that_cost_little_are_made_always() -> None:
    machine = Machine(row_seconds=0.005)
    assert machine.run(100, 1.0) > 90 * MAX_DRAFT_TOKENS
    assert machine.gate.is_on


@pytest.mark.parametrize(("row_seconds", "share"), [(0.005, 0.0), (0.1, 0.3)])
def test_guesses_that_do_not_pay_are_nearly_never_made(row_seconds: float, share: float) -> None:
    machine = Machine(row_seconds)
    machine.run(300, share)
    assert machine.run(1000, share) <= 12 * MAX_DRAFT_TOKENS
    assert not machine.gate.is_on


def test_guesses_come_back_when_they_pay_again() -> None:
    machine = Machine(row_seconds=0.005)
    machine.run(400, 0.0)
    assert not machine.gate.is_on
    machine.run(LONGEST_PAUSE + 50, 1.0)
    assert machine.gate.is_on
    assert machine.run(50, 1.0) == 50 * MAX_DRAFT_TOKENS


def test_try_that_went_well_is_repeated_at_once() -> None:
    machine = Machine(row_seconds=0.05)
    machine.run(400, 0.0)
    while not machine.run(1, 1.0):
        pass
    assert machine.run(20, 1.0) >= 20 * MAX_DRAFT_TOKENS


def test_no_tries_while_prompts_are_read() -> None:
    machine = Machine(row_seconds=0.2)
    machine.run(50, 0.0)
    before = machine.drafted
    machine.run(1000, 0.0, may_try=False)
    assert machine.drafted == before


def test_only_answers_whose_guesses_pay_make_them() -> None:
    costs = StepCosts()
    gate = Gate(costs)
    for rows in range(1, 40):
        costs.observe(rows, 0.1 + 0.02 * rows)
    good, bad = Record(0.95), Record(0.02)
    counts = gate.choose([Proposal(bad, 8), Proposal(good, 8)], rows=2, answers=2, may_try=True)
    assert counts == [0, 8]
    assert (bad.pause, good.pause) == (FIRST_PAUSE, 0)


def test_guesses_of_one_step_are_bounded() -> None:
    machine = Machine(row_seconds=0.0, answers=10)
    machine.run(2, 1.0)
    assert 0 < machine.drafted <= MAX_BATCH_DRAFTS
    for record in machine.records:
        record.share, record.pause, record.skipped = 0.0, 1, 1
    assert 0 < machine.run(1, 0.0) <= MAX_BATCH_DRAFTS


def test_new_answers_begin_with_what_all_others_taught() -> None:
    machine = Machine(row_seconds=0.005)
    machine.run(300, 0.0)
    assert machine.gate.record().share < 0.2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("row_seconds", [0.0, 0.01, 0.05])
def test_speculation_is_never_much_slower_than_none(row_seconds: float, share: float) -> None:
    machine = Machine(row_seconds)
    machine.run(2000, share)
    plain = machine.tokens * (0.1 + row_seconds)
    assert machine.seconds < 1.05 * plain
