"""What is tuned, by the rules: on a machine that is a formula, with a clock that only measuring moves."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from appliance.serving import tuning
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.speed import Progress
from appliance.serving.speed_meter import Task
from appliance.serving.tuning import Outcome, Subject
from appliance.serving.tuning_file import Trial, TunedSettings
from tests.serving.llama_decoding import engine_settings

SETTINGS = engine_settings(
    Path("/nowhere.gguf"), slots=2, threads_decode=2, threads_prefill=4, is_repacked=True, chunk_tokens=256
)
EVERYTHING = frozenset(TunedSettings.__struct_fields__)


def everything_fits(_: TunedSettings) -> bool:
    return True


Cost = float | Callable[[SimpleNamespace], float]


class World:
    """A machine by formula: seconds for a token read and for a step, of a way that has the fields of settings and task.

    `noise` is the share by which a single measurement is off at most.
    """

    def __init__(self, *, token_seconds: Cost = 0.005, step_seconds: Cost = 0.02, noise: float = 0.0) -> None:
        self._token_seconds, self._step_seconds, self._noise = token_seconds, step_seconds, noise
        self._random = random.Random(5)
        self.now = 0.0
        self.ways: list[SimpleNamespace] = []

    def measure(self, settings: EngineSettings, task: Task) -> float:
        way = SimpleNamespace(**{**msgspec.structs.asdict(settings), "answers": 0, **msgspec.structs.asdict(task)})
        self.ways.append(way)
        cost, count = (self._step_seconds, way.steps) if way.answers else (self._token_seconds, way.tokens)
        seconds: float = count * (cost if isinstance(cost, float) else cost(way))
        seconds *= 1 + self._noise * self._random.uniform(-1, 1)
        self.now += seconds
        return seconds

    def tune(self, seconds: float = 300.0, on_progress: Progress | None = None, **changes: Any) -> Outcome:
        facts: dict[str, Any] = {"settings": SETTINGS, "undecided": EVERYTHING, "usable_cores": 4, "physical_cores": 2}
        facts |= {"can_repack": True, "can_quantize_kv": True, "fits": lambda tuned: tuned.slots is None}
        subject = Subject(**{**facts, **changes})
        progress = {"on_progress": on_progress} if on_progress is not None else {}
        return tuning.tune(subject, self.measure, seconds=seconds, clock=lambda: self.now, **progress)


def of(outcome: Outcome, setting: str) -> dict[int | str, Trial]:
    return {trial.value: trial for trial in outcome.trials if trial.setting == setting}


@pytest.mark.parametrize(
    ("expected", "world"),
    [
        (TunedSettings(threads=1), World(step_seconds=lambda way: 0.01 * way.threads)),
        (
            TunedSettings(prefill_threads=2),
            World(token_seconds=lambda way: 0.005 + 0.001 * abs(way.threads - 2)),
        ),
        (
            TunedSettings(chunk_tokens=128),
            World(token_seconds=lambda way: 0.004 + 1e-5 * abs(way.chunk_tokens - 128)),
        ),
        (TunedSettings(repack="off"), World(step_seconds=lambda way: 0.02 + 0.01 * way.is_repacked)),
        (TunedSettings(mmap="off"), World(token_seconds=lambda way: 0.005 + 0.001 * way.is_mapped)),
    ],
)
def test_what_is_faster_is_taken(expected: TunedSettings, world: World) -> None:
    outcome = world.tune()
    assert outcome.settings == expected
    (name,) = expected.named()
    assert [trial.value for trial in outcome.trials if trial.is_taken] == [getattr(expected, name), "tuned"]
    assert all(trial.reason for trial in outcome.trials)


def test_ties_keep_the_defaults() -> None:
    outcome = World().tune()
    assert outcome.settings == TunedSettings()
    assert {trial.setting for trial in outcome.trials} >= {"repack", "mmap", "threads", "prefill_threads", "chunk_tokens"}
    assert not of(outcome, "all together")


def test_less_than_two_percent_is_no_gain() -> None:
    assert World(step_seconds=lambda way: 0.02 + 0.0001 * way.threads).tune().settings == TunedSettings()


def test_what_drowns_in_noise_is_no_gain() -> None:
    """One thread is a tenth faster; single measurements are off by up to 40 %."""

    def step_seconds(way: SimpleNamespace) -> float:
        return 0.02 * (0.9 if way.threads == 1 else 1.0)

    assert World(step_seconds=step_seconds).tune().settings.threads == 1
    noisy = World(step_seconds=step_seconds, noise=0.4).tune()
    assert noisy.settings.threads is None
    trial = of(noisy, "threads")[1]
    assert tuning.SMALLEST_GAIN < trial.gain < trial.spread
    assert "the rounds differ by" in trial.reason


def test_gain_is_the_median_of_rounds_that_take_turns() -> None:
    world = World(step_seconds=lambda way: 0.01 * way.threads)
    trial = of(world.tune(), "threads")[1]
    assert trial.instead_of == 2
    assert trial.gain == pytest.approx(1.0)
    assert len(trial.seconds) == len(trial.seconds_before) >= tuning.FEWEST_ROUNDS
    threads = [way.threads for way in world.ways if way.answers]
    first = threads.index(1)
    assert threads[first : first + 8] == [1, 1, 4, 4, 4, 4, 1, 1]  # two tasks each; the second round goes backwards


def test_what_was_set_by_hand_is_left_alone() -> None:
    world = World(step_seconds=lambda way: 0.01 * way.threads)
    outcome = world.tune(undecided=EVERYTHING - {"threads", "repack"})
    assert outcome.settings == TunedSettings()
    assert {way.threads for way in world.ways if way.answers} == {2}
    assert {"threads: left as it was set.", "repack: left as it was set."} <= set(outcome.notes)


def test_what_does_not_fit_is_never_tried() -> None:
    world = World(token_seconds=lambda way: 0.005 + 0.001 * way.is_mapped)
    outcome = world.tune(fits=lambda tuned: tuned.mmap is None and tuned.slots is None)
    assert outcome.settings == TunedSettings()
    assert all(way.is_mapped for way in world.ways)
    assert any("mmap off: not tried" in note for note in outcome.notes)


def test_kv_in_q8_0_is_only_proposed() -> None:
    world = World(step_seconds=lambda way: 0.02 if way.kv_type == "f16" else 0.01)
    outcome = world.tune()
    assert outcome.settings == TunedSettings()
    assert not of(outcome, "kv_type")["q8_0"].is_taken
    assert "100.0% faster" in outcome.proposals[0]
    assert "changes answers" in outcome.proposals[0]
    assert not World().tune(can_quantize_kv=False).proposals


@pytest.mark.parametrize(
    ("slots", "step_seconds"),
    [
        (None, lambda way: 0.02 * way.answers),  # nothing gained by batching
        (4, lambda way: 0.02 * max(1.0, way.answers / 4)),
        (8, 0.02),
        (4, lambda way: 0.15 if way.answers <= 4 else 0.21),  # eight: too slow to read along
    ],
)
def test_slots_as_many_as_pay(slots: int | None, step_seconds: Cost) -> None:
    outcome = World(step_seconds=step_seconds).tune(fits=everything_fits)
    assert outcome.settings.slots == slots
    assert set(of(outcome, "slots")) <= {4, 8}  # two is what there is


def test_what_does_not_hold_together_is_dropped() -> None:
    """Not repacking is a gain when it is tried, and a loss later: what disturbed the trial has ended."""

    def step_seconds(way: SimpleNamespace) -> float:
        return 0.02 if way.is_repacked else 0.015 if len(world.ways) < 60 else 0.03

    world = World(step_seconds=step_seconds)
    outcome = world.tune()
    assert of(outcome, "repack")["off"].is_taken
    assert not of(outcome, "all together")["tuned"].is_taken
    assert outcome.settings == TunedSettings()
    assert any("so the defaults stay" in note for note in outcome.notes)


@pytest.mark.parametrize("speed", [0.1, 1.0, 20.0])
def test_time_is_kept_on_fast_and_slow_machines(speed: float) -> None:
    """A machine that reads 10 tokens a second, one of 200, one of 4000."""
    world = World(token_seconds=0.005 / speed, step_seconds=0.02 / speed)
    outcome = world.tune(seconds=300.0, fits=everything_fits)
    assert world.now < 1.5 * 300 if speed < 1 else world.now < 1.1 * 300
    assert of(outcome, "threads")


def test_machine_that_slows_down_is_given_up_in_time() -> None:
    """A hundred times slower after a while, as beside another program; what was found by then is not confirmed."""

    def step_seconds(way: SimpleNamespace) -> float:
        return (0.02 if way.is_repacked else 0.015) * (100 if world.now > 30 else 1)

    world = World(step_seconds=step_seconds)
    outcome = world.tune(seconds=60.0)
    longest_task = max(tuning.STEPS) * 2.0
    assert world.now < 60 * tuning.OVERTIME + 2 * longest_task
    assert of(outcome, "repack")["off"].is_taken
    assert outcome.settings == TunedSettings()
    assert "before this could be confirmed" in outcome.notes[-1]


def test_stages_without_time_are_named() -> None:
    outcome = World(token_seconds=1.0).tune(seconds=100.0)
    assert any(note.endswith("not measured, the time was over.") for note in outcome.notes)


def test_chunks_that_a_newcomer_would_have_to_wait_for_are_not_tried() -> None:
    outcome = World(token_seconds=0.0025).tune()
    assert set(of(outcome, "chunk_tokens")) == {64, 128}  # 256 is the default, 512 tokens would be 1.3 s


def test_progress_never_goes_back() -> None:
    seen: list[tuple[float, str]] = []
    World().tune(seconds=60.0, on_progress=lambda *said: seen.append(said))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
