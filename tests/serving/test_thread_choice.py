"""The number of threads by simulated machines: what a step costs is what the test says."""

from collections import Counter
from collections.abc import Callable

import pytest

from appliance.serving.thread_choice import TRIAL_COST, ThreadChoice
from tests.serving.counting_decoder import CountingDecoder
from tests.serving.scheduler_bench import Bench

Costs = Callable[[int], float]  # seconds of a step by its number of threads


def quiet(threads: int) -> float:
    return {4: 0.010, 3: 0.012, 2: 0.017, 1: 0.024}[threads]


def shared(threads: int) -> float:
    """Another program has a core of two."""
    return {4: 0.2, 3: 0.1, 2: 0.047, 1: 0.024}[threads]


def steps(choice: ThreadChoice, costs: Costs, count: int, rows: int = 1) -> Counter[int]:
    """How often each number of threads was chosen."""
    chosen: Counter[int] = Counter()
    for _ in range(count):
        threads = choice.choose(rows)
        chosen[threads] += 1
        choice.observe(rows, threads, costs(threads))
    return chosen


def test_all_threads_while_the_machine_is_its_own() -> None:
    choice = ThreadChoice(2)
    assert choice.choose(1) == 2
    chosen = steps(choice, quiet, 3000)
    lost = chosen[1] * (quiet(1) - quiet(2)) / (3000 * quiet(2))
    assert 0 < lost < 2 * TRIAL_COST


def test_fewer_at_once_when_others_want_a_core_and_more_again_later() -> None:
    choice = ThreadChoice(2)
    steps(choice, quiet, 500)
    assert steps(choice, shared, 20)[2] <= 5
    assert steps(choice, shared, 1000)[2] < 20
    assert steps(choice, quiet, 1000)[2] > 600, "it is found out that the core is free again"
    assert steps(choice, quiet, 100)[2] > 95


def test_one_disturbed_step_changes_nothing() -> None:
    choice = ThreadChoice(2)
    steps(choice, quiet, 100)
    choice.observe(1, 2, 5.0)
    assert choice.choose(1) == 2


@pytest.mark.parametrize("rows", [1, 4, 30])
def test_several_numbers_are_tried(rows: int) -> None:
    choice = ThreadChoice(4)
    chosen = steps(choice, shared, 400, rows)
    assert set(chosen) == {4, 3, 2}
    assert chosen[2] > 350


def test_each_number_of_answers_has_a_choice_of_its_own() -> None:
    choice = ThreadChoice(2)
    steps(choice, shared, 200, rows=1)
    steps(choice, quiet, 200, rows=8)
    assert (choice.choose(1), choice.choose(8)) == (1, 2)


def test_one_thread_is_never_none() -> None:
    choice = ThreadChoice(1)
    assert steps(choice, quiet, 50) == {1: 50}


def test_the_scheduler_uses_what_is_chosen() -> None:
    decoder = CountingDecoder(context_tokens=400)
    with Bench(decoder, threads_decode=2, threads_prefill=3, is_speculating=False) as bench:
        assert bench.client(1, 2, 3, max_tokens=50).reason() == "length"
    assert {prefill for _, prefill in decoder.threads} == {3}
    assert {decode for decode, _ in decoder.threads} == {1, 2}


def test_what_one_number_of_rows_has_shown_is_not_tried_again_for_each_other() -> None:
    choice = ThreadChoice(2)
    steps(choice, quiet, 50)
    for rows in (2, 4, 8):
        assert steps(choice, quiet, 12, rows)[1] == 0


def test_fewer_threads_that_were_faster_are_tried_at_once_for_other_rows() -> None:
    choice = ThreadChoice(2)
    steps(choice, shared, 50)
    assert steps(choice, shared, 20, rows=8)[2] <= 7
