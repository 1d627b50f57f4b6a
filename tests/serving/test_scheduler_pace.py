"""Estimates follow from what was measured; nothing here waits."""

import pytest

from appliance.serving.decoder import IDLE_CHUNK_TOKENS, SHORTEST_CHUNK_TOKENS
from appliance.serving.pace import SHORTEST_BUSY_CHUNK_TOKENS, Pace, StepCosts, Work, retry_after


def measured(prompt_token_seconds: float, step_seconds: float, longest_chunk: int = IDLE_CHUNK_TOKENS) -> Pace:
    pace = Pace(longest_chunk)
    for _ in range(50):
        pace.observe_step(step_seconds, rows=1, prompt_tokens=0)
        pace.observe_step(prompt_token_seconds * 100, rows=0, prompt_tokens=100)
    return pace


@pytest.mark.parametrize(
    ("per_token", "busy", "idle"),
    [
        (1 / 17, SHORTEST_BUSY_CHUNK_TOKENS, SHORTEST_CHUNK_TOKENS),  # an old machine
        (0.002, 75, 256),  # (0.25 s - 0.1 s) / 0.002 s
        (0.0, 256, 256),
    ],
)
def test_chunks_keep_a_step_short(per_token: float, busy: int, idle: int) -> None:
    pace = measured(per_token, 0.1)
    assert pace.chunk_tokens(1, is_busy=True) == pytest.approx(busy, abs=1)
    assert pace.chunk_tokens(0, is_busy=False) == idle


@pytest.mark.parametrize("longest", [64, 512])
def test_no_chunk_is_longer_than_the_batches_have_room_for(longest: int) -> None:
    pace = measured(0.0, 0.001, longest)
    assert pace.chunk_tokens(1, is_busy=True) == pace.chunk_tokens(0, is_busy=False) == longest


def test_prompt_rate_leaves_out_what_running_answers_cost() -> None:
    pace = measured(0.01, 0.1)
    for _ in range(50):
        pace.observe_step(0.1 + 0.02 * 64, rows=1, prompt_tokens=64)
    assert pace.prompt_token_seconds == pytest.approx(0.02, rel=0.01)
    pace.observe_step(5.0, rows=0, prompt_tokens=1)  # one token says next to nothing
    assert pace.prompt_token_seconds < 0.05


def test_best_pace_outlasts_other_work_and_follows_a_machine_that_stays_slow() -> None:
    pace, work = measured(0.01, 0.1), Work(prompt_tokens=100, answer_tokens=0)
    for _ in range(50):
        pace.observe_step(10.0, rows=0, prompt_tokens=100)
    assert pace.reading_seconds(work) == pytest.approx(10.0, rel=0.01)
    assert pace.best_reading_seconds(work) < 2.0
    for _ in range(10_000):
        pace.observe_step(10.0, rows=0, prompt_tokens=100)
    assert pace.best_reading_seconds(work) == pytest.approx(10.0, rel=0.01)
    for _ in range(50):
        pace.observe_step(1.0, rows=0, prompt_tokens=100)
    assert pace.best_reading_seconds(work) == pytest.approx(1.0, rel=0.01)


def test_costs_between_two_measurements_are_interpolated() -> None:
    costs = StepCosts()
    assert costs.seconds(1) is None
    assert costs.nearest(1) is None
    costs.observe(1, 0.1)
    costs.observe(5, 0.3)
    assert costs.seconds(3) == pytest.approx(0.2)
    assert costs.seconds(6) is None
    assert costs.nearest(6) == pytest.approx(0.3)
    costs.observe(5, 0.8)
    assert costs.seconds(5) == pytest.approx(0.4)


def test_wait_is_that_of_the_slot_that_comes_free_first() -> None:
    pace = measured(0.01, 0.1)
    running = [Work(0, 30), Work(0, 5)]  # 3 s and 0.5 s
    assert pace.seconds_until_place(running, [], 2) == pytest.approx(0.5)
    assert pace.seconds_until_place(running, [Work(0, 10)], 2) == pytest.approx(1.5)
    assert pace.seconds_until_place(running, [Work(0, 10), Work(0, 20)], 2) == pytest.approx(3.0)
    assert pace.seconds_until_place(running, [], 3) == 0.0


def test_a_slot_comes_free_later_for_what_others_read_beside_it() -> None:
    pace = measured(0.01, 0.1)
    running = [Work(100, 20), Work(0, 5)]  # 1 s of reading; steps of 0.25 s leave 0.15 s for it beside each token
    assert pace.seconds_until_place(running, [], 2) == pytest.approx(0.5 + 5 * 0.15)
    assert pace.seconds_until_place(running, [Work(0, 10)], 2) == pytest.approx(1.5 + 1.0)
    assert pace.seconds_until_place(running, [Work(50, 10)], 2) == pytest.approx(2.0 + 1.0)  # its own is there already
    assert pace.seconds_until_place([Work(100, 20)], [], 1) == pytest.approx(3.0)
    assert pace.seconds_until_place(running, [], 3) == 0.0


def test_expected_answers_follow_those_that_ended() -> None:
    pace = Pace()
    for _ in range(100):
        pace.observe_answer(40)
    assert pace.expected_answer(512) == pytest.approx(40)
    assert pace.expected_answer(10) == 10
    assert pace.expected_answer(512, generated=30) == pytest.approx(10)
    assert pace.expected_answer(512, generated=300) == 1


@pytest.mark.parametrize(("seconds", "answer"), [(0.0, 1), (1.2, 2), (1e9, 600)])
def test_retry_after_is_bounded(seconds: float, answer: int) -> None:
    assert retry_after(seconds) == answer
