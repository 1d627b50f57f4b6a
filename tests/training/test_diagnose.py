"""Planted curves, with noise: each is named, and nothing else; healthy ones yield nothing, whatever the seed."""

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.training import curve as curves
from appliance.training.curve import Point
from appliance.training.diagnose import FEWEST_STEPS, diagnose

STEPS = 300
SEEDS = range(20)
Shape = Callable[[float], float]  # the loss without noise, by the part of the run that is over (0 to 1)


def settled(part: float) -> float:
    """As a good run does: most is learned in the first third."""
    return 1.0 + 1.5 * math.exp(-part * 6)


def rate(part: float) -> float:
    """Warm-up, then a cosine, as the trainers have it."""
    return 2e-4 * (part / 0.03 if part < 0.03 else 0.5 * (1 + math.cos(math.pi * (part - 0.03) / 0.97)))


def curve(
    shape: Shape, seed: int, *, noise: float = 0.1, steps: int = STEPS, validation: Shape | None = None, every: int = 15
) -> list[Point]:
    chance = random.Random(seed)
    points = []
    for step in range(1, steps + 1):
        part = step / steps
        measured = validation(part) * math.exp(chance.gauss(0, 0.01)) if validation and step % every == 0 else None
        points.append(
            Point(
                step=step,
                loss=shape(part) * math.exp(chance.gauss(0, noise)),
                epoch=3 * part,
                learning_rate=rate(part),
                gradient_norm=math.exp(chance.gauss(-0.5, 0.3)),
                validation_loss=measured,
                rows=tuple(chance.sample(range(1, 400), 4)),
            )
        )
    return points


def changed(points: Sequence[Point], at: int, **values: object) -> list[Point]:
    """The points with other values at the index `at`."""
    old = {name: getattr(points[at], name) for name in Point.__slots__}
    return [*points[:at], Point(**{**old, **values}), *points[at + 1 :]]


def spiked(seed: int) -> list[Point]:
    return changed(curve(settled, seed), 149, loss=4.5, gradient_norm=38.0, rows=(17, 203))


def diverged(seed: int) -> list[Point]:
    return curve(lambda part: settled(part) + (6 * (part - 0.6) if part > 0.6 else 0), seed)


def overfitted(seed: int) -> list[Point]:
    return curve(settled, seed, validation=lambda part: 1.05 * settled(part) + (1.2 * (part - 0.4) if part > 0.4 else 0))


def masked(seed: int) -> list[Point]:
    points = curve(settled, seed)
    for at in (40, 111, 207):
        points = changed(points, at, loss=0.0, gradient_norm=0.0)
    return points


def without_advantage(seed: int) -> list[Point]:
    chance = random.Random(seed)
    return [
        Point(
            step=step, loss=chance.gauss(0, 1e-3), reward=chance.gauss(0.5, 0.02), equal_rewards=chance.choice([0.75, 1.0])
        )
        for step in range(1, 101)
    ]


def too_slow(seed: int) -> list[Point]:
    return curve(lambda part: 2.5 - 0.01 * part, seed)


def too_fast(seed: int) -> list[Point]:
    """Up while the rate is at its highest, down again as it decays."""
    return curve(lambda part: 1.2 + 1.3 * math.exp(-part * 40) + 2.5 * math.exp(-(((part - 0.35) / 0.15) ** 2)), seed)


def different(seed: int) -> list[Point]:
    return curve(settled, seed, validation=lambda part: 1.9 * settled(part))


def ended_early(seed: int) -> list[Point]:
    return curve(lambda part: 2.6 - 1.6 * part, seed)


PLANTED = {
    "spike": spiked,
    "divergence": diverged,
    "overfitting": overfitted,
    "masked_rows": masked,
    "zero_advantage": without_advantage,
    "no_learning": too_slow,
    "rate_too_high": too_fast,
    "different_distributions": different,
    "too_early": ended_early,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_curve_is_named_and_nothing_else(kind: str) -> None:
    for seed in SEEDS:
        assert [finding.kind for finding in diagnose(PLANTED[kind](seed))] == [kind], seed


def test_spike_names_step_gradient_norm_and_rows() -> None:
    (finding,) = diagnose(spiked(3))
    assert "at step 150" in finding.what
    assert "gradient norm 38, usually 0." in finding.what
    assert finding.examples == ["step 150 (loss 4.500, gradient norm 38, rows 17, 203)"]
    assert finding.figures["step"] == 150


def test_overfitting_says_the_step_at_which_it_began() -> None:
    for seed in SEEDS:
        (finding,) = diagnose(overfitted(seed))
        assert 90 <= finding.figures["began_step"] <= 150, seed


def test_masked_rows_are_listed() -> None:
    points = masked(0)
    (finding,) = diagnose(points)
    assert finding.count == 3
    assert [f"rows {', '.join(map(str, points[at].rows))}" in finding.examples[i] for i, at in enumerate((40, 111, 207))]
    everything = [Point(step=step, loss=0.0, gradient_norm=0.0) for step in range(1, 6)]
    assert "learned in any of 5 steps" in diagnose(everything)[0].what


def test_low_rate_and_no_gradient_are_told_apart() -> None:
    assert "the learning rate (0.0002 at most) is too low" in diagnose(too_slow(1))[0].what
    frozen = [Point(step=each.step, loss=each.loss, gradient_norm=0.0) for each in too_slow(1)]
    assert "every gradient is 0" in diagnose(frozen)[0].what


def preferences(seed: int, margin: Shape, *, fall: float = 0.02) -> list[Point]:
    """DPO from ln 2 on, whose margins are what `margin` says, and noise."""
    chance = random.Random(seed)
    points = []
    for step in range(1, 101):
        gained = chance.gauss(margin(step / 100), 0.03)
        points.append(
            Point(
                step=step,
                loss=math.log(2) - fall * step / 100 + chance.gauss(0, 0.002),
                gradient_norm=1.0,
                preferred=1.0 if gained > 0 else 0.25,
                margin=gained,
            )
        )
    return points


def test_preferences_are_judged_by_their_margin() -> None:
    """The loss hardly falls from ln 2 while nearly every chosen answer gains."""
    for seed in SEEDS:
        assert "no_learning" not in [finding.kind for finding in diagnose(preferences(seed, lambda part: 0.05 * part))], seed
        from_below = diagnose(preferences(seed, lambda part: 0.3 * part - 0.5))
        assert "no_learning" not in [finding.kind for finding in from_below], seed
        (finding,) = diagnose(preferences(seed, lambda _: -0.01, fall=0.0))
        assert finding.kind == "no_learning"
        assert "(margin of rewards, sure to 0.0" in finding.what
        assert "loss" not in finding.what


def test_preferences_without_anything_left_to_learn() -> None:
    points = preferences(0, lambda part: 3 * part)
    for at in (91, 95, 99):
        points = changed(points, at, loss=0.0, gradient_norm=0.0)
    found = {finding.kind: finding for finding in diagnose(points)}
    assert "masked_rows" not in found
    assert found["saturated"].count == 3
    assert "label" not in found["saturated"].what


@given(st.lists(st.sampled_from([0.0, 1e-12, 0.05, 1.0, 9.0]), min_size=20, max_size=60), st.booleans(), st.booleans())
def test_loss_of_exactly_nothing_is_read(losses: list[float], has_validation: bool, is_running: bool) -> None:
    points = [
        Point(step=step, loss=loss, gradient_norm=0.5, epoch=0.5, validation_loss=loss if has_validation else None)
        for step, loss in enumerate(losses, 1)
    ]
    diagnose(points, is_running=is_running)


@pytest.mark.parametrize("kind", ["divergence", "rate_too_high"])
def test_long_run_is_judged_by_a_thousand_medians(kind: str) -> None:
    shapes: dict[str, Shape] = {
        "divergence": lambda part: settled(part) + (6 * (part - 0.6) if part > 0.6 else 0),
        "rate_too_high": lambda part: 1.2 + 1.3 * math.exp(-part * 40) + 2.5 * math.exp(-(((part - 0.35) / 0.15) ** 2)),
    }
    points = curve(shapes[kind], 0, steps=7001)
    shown = curves.thinned(points)
    assert len(shown) <= 1000
    assert [each.step for each in shown] == sorted({each.step for each in shown})
    assert shown[-1].step > 6990
    assert curves.thinned(points[:1000]) == points[:1000]
    (finding,) = diagnose(points)
    assert finding.kind == kind
    steps = {"divergence": (3900, 4700), "rate_too_high": (2100, 2800)}[kind]
    assert steps[0] <= finding.figures["began_step" if kind == "divergence" else "peak_step"] <= steps[1]


def test_reward_that_does_not_rise() -> None:
    chance = random.Random(0)
    flat = [Point(step=step, loss=0.0, reward=chance.gauss(0.5, 0.1), equal_rewards=0.1) for step in range(1, 101)]
    assert [finding.kind for finding in diagnose(flat)] == ["no_learning"]
    rising = [Point(step=each.step, loss=0.0, reward=(each.reward or 0) + 0.003 * each.step) for each in flat]
    assert diagnose(rising) == []


def test_validation_that_takes_too_long() -> None:
    points = [
        Point(step=step, loss=settled(step / 60), seconds=1.0, validation_seconds=0.3 if step % 2 else None)
        for step in range(1, 61)
    ]
    assert diagnose(points) == []
    slow = [Point(step=each.step, loss=each.loss, seconds=1.0, validation_seconds=0.3) for each in points]
    assert [finding.kind for finding in diagnose(slow)] == ["slow_validation"]


def test_too_short_to_say() -> None:
    assert diagnose([]) == []
    assert diagnose(diverged(0)[: FEWEST_STEPS - 1]) == []


@pytest.mark.parametrize("kind", ["spike", "divergence", "overfitting", "masked_rows", "zero_advantage"])
def test_running_run_is_told_of_what_is_sure(kind: str) -> None:
    points = PLANTED[kind](5)
    said = [next((f.kind for f in diagnose(points[:length], is_running=True)), None) for length in range(20, len(points), 5)]
    assert set(said) == {None, kind} or set(said) == {kind}
    assert said[-1] == kind


@given(
    st.integers(0, 10_000),
    st.floats(0.03, 0.15),
    st.integers(100, 400),
    st.floats(0.3, 5.0),
    st.floats(0.3, 0.9),
    st.floats(5.0, 12.0),
)
def test_healthy_curve_yields_nothing(seed: int, noise: float, steps: int, first: float, fall: float, speed: float) -> None:
    def shape(part: float) -> float:
        return first * (1 - fall * (1 - math.exp(-part * speed)))

    points = curve(
        shape, seed, noise=noise, steps=steps, validation=lambda part: 1.1 * shape(part), every=max(1, steps // 20)
    )
    assert diagnose(points) == []
    assert diagnose(points[: steps // 2], is_running=True) == []
