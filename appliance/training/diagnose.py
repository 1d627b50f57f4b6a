"""What a loss curve says, in words and with evidence: points in, findings out. Main entry: `diagnose`.

Pure: no torch, no files. The same function looks at a run while it trains (`is_running`) and afterwards.
"""

import math
from collections.abc import Sequence
from statistics import median

from appliance.findings import Finding
from appliance.training import curve, margins
from appliance.training.curve import DEVIATION_OF_MEDIAN, Point

# Fewer steps say nothing: the noise itself is estimated from about as many.
FEWEST_STEPS = 20
# A single step stands out where it exceeds the usual by six deviations of the noise. Outliers are usually named from 3.5
# on (Iglewicz and Hoaglin 1993), which normal noise alone passes once in 4,000 steps, and losses have heavier tails.
SPIKE_DEVIATIONS = 6.0
SPIKE_FACTOR = 2.0  # and where it is worth a look: less than twice the usual is a hard batch, as every data set has them
SPIKE_BACK_STEPS = 5  # a spike is over by then; what stays up is no spike
BEFORE_STEPS, NOISE_STEPS = 20, 100  # the usual loss follows the curve; its noise changes slowly
# A level is lost where a quarter of what had been learned is gone again, by more than medians of that many values vary.
LOST_SHARE = 0.25
LEVEL_DEVIATIONS = 6.0
# Prechelt 1998 ("Early stopping - but when?"): generalization loss of 5 % over the best validation loss (GL5).
OVERFIT_SHARE = 0.05
OVERFIT_DEVIATIONS = 3.0
FEWEST_VALIDATIONS = 4
# In the first epoch no row was seen before, so that training and validation loss measure the same; by half as much again
# they differ only where the rows do (a mean over 32 conversations varies by about a tenth).
DIFFERENT_FACTOR = 1.5
FLAT_SHARE = 0.03  # of the first loss: less is not learning; at most a tenth where the noise hides that much and more
FLAT_MOST = 0.10
FAST_SHARE = 0.2  # what is learned at once, in warm-up, shows in the first three steps alone
SURE_TREND = -3.0
KNOWN_LOSS = 0.1  # nats per token: who starts there knows the answers, and has nothing to learn
# A curve that settles (exponentially, within a third of the run) makes 5 % of its way in the last quarter, a straight line
# 25 %.
STILL_FALLING_SHARE = 0.15
VALIDATION_SHARE = 0.2


def diagnose(points: Sequence[Point], *, is_running: bool = False) -> list[Finding]:
    """The findings, the gravest first; none for a run that is as it should be, or too short to say."""
    if any(point.reward is not None for point in points):
        findings = [*margins.equal_rewards(points)]
        return findings or (margins.flat_reward(points) if not is_running else [])
    is_preference = any(point.margin is not None for point in points)
    learning = [point for point in points if not point.is_empty]
    findings = [*(margins.saturated(points) if is_preference else _masked(points)), *_slow_validation(points)]
    if len(learning) < FEWEST_STEPS:
        return findings
    findings += [*_spikes(learning), *_different_distributions(learning)]
    if lost := _lost_level(curve.thinned(learning), is_running=is_running):
        return [lost, *findings]
    findings += _overfitting(learning)
    if is_running or any(finding.kind == "overfitting" for finding in findings):
        return findings
    return [*findings, *((margins.no_preference if is_preference else _no_learning)(learning) or _too_early(learning))]


def _masked(points: Sequence[Point]) -> list[Finding]:
    empty = [point for point in points if point.is_empty]
    if not empty:
        return []
    every = len(empty) == len(points)
    return [
        Finding(
            kind="masked_rows",
            level="problem",
            what=f"Nothing was learned in {'any' if every else len(empty)} of {len(points)} steps: the loss is exactly 0,"
            " because no token of these rows has a label",
            remedy="Look at the rows: the assistant's turn is missing or empty, or was cut off, or the chat template"
            " marks nothing as the assistant's.",
            count=len(empty),
            examples=[str(point) for point in empty[:5]],
            figures={"masked_steps": len(empty), "steps": len(points)},
        )
    ]


def _spikes(points: Sequence[Point]) -> list[Finding]:
    logs = curve.logarithms([point.loss for point in points])
    found: list[tuple[float, int]] = []  # how many times the usual loss, and where
    last = -SPIKE_BACK_STEPS
    for i in range(FEWEST_STEPS, len(points)):
        usual = median(logs[max(0, i - BEFORE_STEPS) : i])
        if logs[i] - usual <= math.log(SPIKE_FACTOR):
            continue
        limit = max(SPIKE_DEVIATIONS * curve.noise(logs[max(0, i - NOISE_STEPS) : i]), math.log(SPIKE_FACTOR))
        after = logs[i + 1 : i + 1 + 2 * SPIKE_BACK_STEPS]
        is_back = len(after) >= SPIKE_BACK_STEPS and median(after) - usual < limit / 2
        if logs[i] - usual <= limit or not is_back:
            continue
        factor = math.exp(logs[i] - usual)
        if i - last < SPIKE_BACK_STEPS and found:  # the same one, over several steps
            found[-1] = max(found[-1], (factor, i))
        else:
            found.append((factor, i))
        last = i
    if not found:
        return []
    factor, worst = max(found)
    return [
        Finding(
            kind="spike",
            level="notice",
            what=f"The loss jumped to {factor:.1f} times the usual at step {points[worst].step}{_norm(points, worst)}"
            + (f", and {len(found) - 1} more times" if len(found) > 1 else "")
            + "; it came back within a few steps",
            remedy="Read these rows: a wrong language, a broken answer or a text unlike the others makes such a step."
            " If they are right, lower max_gradient_norm.",
            count=len(found),
            examples=[str(points[i]) for _, i in sorted(found, reverse=True)[:5]],
            figures={"step": points[worst].step, "loss": points[worst].loss, "times_usual": factor},
        )
    ]


def _lost_level(points: Sequence[Point], *, is_running: bool) -> Finding | None:
    """Divergence where what was learned is lost at the end, a learning rate that is too high where it came back."""
    losses = [point.loss for point in points]
    width = max(5, len(points) // 20) | 1
    level = curve.levels(losses, width)
    sigma = DEVIATION_OF_MEDIAN * curve.noise(curve.logarithms(losses)) / math.sqrt(width)
    best, lost, best_at = level[0], [], 0
    bests = []
    for i, value in enumerate(level):
        if value < best:
            best, best_at = value, i
        is_sure = value - best > LEVEL_DEVIATIONS * sigma * value
        learned = max(level[0] - best, 0.1 * level[0], curve.TINY)
        lost.append((value - best) / learned if is_sure else 0.0)
        bests.append(best_at)
    if lost[-1] >= LOST_SHARE:
        return _divergence(points, level, bests[-1], width) if not is_running or min(lost[-width:]) >= LOST_SHARE else None
    peak = max(range(len(points)), key=lost.__getitem__)
    lasting = sum(value >= LOST_SHARE / 2 for value in lost)
    if lost[peak] < LOST_SHARE or lasting < max(2 * width, len(points) // 10):
        return None
    return _rate_too_high(points, level, bests[peak], peak)


def _divergence(points: Sequence[Point], level: Sequence[float], began: int, width: int) -> Finding:
    return Finding(
        kind="divergence",
        level="problem",
        what=f"Training diverged: the loss was {level[began]:.3f} around step {points[began].step} and rose to"
        f" {level[-1]:.3f}{_norm(points, len(points) - 1, width)}; what was learned is being lost",
        remedy="Lower learning_rate (to a third), lengthen warmup_ratio, and repeat with --restart.",
        count=points[-1].step - points[began].step,
        examples=[f"step {points[began].step}"],
        figures={"began_step": points[began].step, "best_loss": level[began], "last_loss": level[-1]},
    )


def _rate_too_high(points: Sequence[Point], level: Sequence[float], before: int, peak: int) -> Finding | None:
    rates = [point.learning_rate for point in points if point.learning_rate is not None]
    rate = points[peak].learning_rate
    if rates and rate is not None and rate < max(rates) / 2:
        return None  # the rate had decayed: it was something else
    back = next((i for i in range(peak, len(points)) if level[i] <= level[before]), len(points) - 1)
    at = "" if rate is None else f", at a learning rate of {rate:.2g}"
    decayed = points[back].learning_rate
    when = "" if decayed is None else f", when the rate had fallen to {decayed:.2g}"
    return Finding(
        kind="rate_too_high",
        level="problem",
        what=f"The learning rate is too high: the loss rose from {level[before]:.3f} (step {points[before].step}) to"
        f" {level[peak]:.3f} (step {points[peak].step}{at}) and was back only at step {points[back].step}{when}",
        remedy="Lower learning_rate to a third; the steps between were lost.",
        count=points[back].step - points[before].step,
        examples=[f"step {points[peak].step}"],
        figures={"peak_step": points[peak].step, "peak_loss": level[peak], "back_step": points[back].step},
    )


def _overfitting(points: Sequence[Point]) -> list[Finding]:
    measured = [(i, point.validation_loss) for i, point in enumerate(points) if point.validation_loss is not None]
    if len(measured) < FEWEST_VALIDATIONS:
        return []
    values = [value for _, value in measured]
    best = min(range(len(values)), key=values.__getitem__)
    later = values[best + 1 :]
    if len(later) < 2:
        return []
    last, lowest = median(later[-3:]), max(values[best], curve.TINY)
    is_sure = math.log(max(last, curve.TINY) / lowest) > OVERFIT_DEVIATIONS * curve.noise(curve.logarithms(values[best:]))
    began = measured[best][0]
    width = max(3, len(points) // 20)
    then, now = (median(_around(points, i, width)) for i in (began, len(points) - 1))
    if last / lowest - 1 < OVERFIT_SHARE or (len(later) > 3 and not is_sure) or now > then * (1 + OVERFIT_SHARE):
        return []
    return [
        Finding(
            kind="overfitting",
            level="problem",
            what=f"Overfitting since step {points[began].step}: the validation loss was {values[best]:.3f} there and is"
            f" {last:.3f}, while the training loss went on from {then:.3f} to {now:.3f}",
            remedy='Train fewer epochs, or set patience; keep = "best" takes the adapter of that step. More, or more varied,'
            " rows help most.",
            count=len(later),
            examples=[f"step {points[began].step}"],
            figures={"began_step": points[began].step, "best_validation": values[best], "last_validation": last},
        )
    ]


def _different_distributions(points: Sequence[Point]) -> list[Finding]:
    first_epoch = [
        (i, point.validation_loss)
        for i, point in enumerate(points)
        if point.validation_loss is not None and point.epoch is not None and point.epoch <= 1
    ]
    width = max(3, len(points) // 40)
    factors = [value / max(median(_around(points, i, width)), curve.TINY) for i, value in first_epoch]
    if not factors or 1 / DIFFERENT_FACTOR < (factor := median(factors)) < DIFFERENT_FACTOR:
        return []
    kind = "harder" if factor > 1 else "easier"
    return [
        Finding(
            kind="different_distributions",
            level="notice",
            what=f"The held-out rows are {kind} than the training rows from the start: in the first epoch, when no row had"
            f" been seen before, their loss was {factor:.1f} times that of training",
            remedy="They differ in topic, language or length, so that the validation loss says little about what is trained"
            " for; `appliance data split` draws both alike.",
            count=len(factors),
            examples=[f"step {points[i].step}" for i, _ in first_epoch[:3]],
            figures={"factor": factor},
        )
    ]


def _no_learning(points: Sequence[Point]) -> list[Finding]:
    losses = [point.loss for point in points]
    count = max(5, len(losses) // 10)
    first, last = median(losses[:count]), median(losses[len(losses) // 2 :])
    if first < KNOWN_LOSS:
        return []
    unsure = 3 * DEVIATION_OF_MEDIAN * curve.noise(curve.logarithms(losses)) / math.sqrt(count)
    fell = 1 - last / first
    is_hidden = fell <= min(unsure, FLAT_MOST) and curve.trend(losses) > SURE_TREND
    was_fast = 1 - last / max(median(losses[:3]), curve.TINY) > FAST_SHARE
    if was_fast or not (fell <= FLAT_SHARE or is_hidden):
        return []
    norms = [point.gradient_norm for point in points if point.gradient_norm is not None]
    rates = [point.learning_rate for point in points if point.learning_rate is not None]
    rate = f" ({max(rates):.2g} at most)" if rates else ""
    if norms and not any(norms):
        why, remedy = "every gradient is 0", "No weight that is trained has a part in the answer: see lora's targets."
    else:
        strength = f", though there are gradients (norm {median(norms):.2g})" if norms else ""
        why, remedy = f"the learning rate{rate} is too low{strength}", "Raise learning_rate tenfold, or train longer."
    return [
        Finding(
            kind="no_learning",
            level="problem",
            what=f"Nothing was learned: the loss is {last:.3f} after {first:.3f} at the start; {why}",
            remedy=remedy,
            count=len(points),
            figures={"first_loss": first, "last_loss": last, **({"learning_rate": max(rates)} if rates else {})},
        )
    ]


def _too_early(points: Sequence[Point]) -> list[Finding]:
    losses = [point.loss for point in points]
    total, count = len(losses), max(3, len(losses) // 10)
    first, last = median(losses[:count]), median(losses[-count:])
    before = median(losses[int(0.7 * total) - count // 2 : int(0.7 * total) + count - count // 2])
    unsure = 3 * DEVIATION_OF_MEDIAN * curve.noise(curve.logarithms(losses)) * before * math.sqrt(2 / count)
    share = (before - last) / max(first - last, curve.TINY)
    validations = [point.validation_loss for point in points if point.validation_loss is not None]
    is_settled = bool(validations) and validations[-1] > 1.01 * min(validations)
    if share < STILL_FALLING_SHARE or before - last < unsure or is_settled:
        return []
    return [
        Finding(
            kind="too_early",
            level="notice",
            what=f"Training ended while the loss was still falling: from {before:.3f} to {last:.3f} in the last quarter,"
            f" {share:.0%} of all it learned",
            remedy="Train more epochs, or with a higher learning_rate; with data.heldout set, overfitting would be seen.",
            figures={"share_in_last_quarter": share, "last_loss": last},
        )
    ]


def _slow_validation(points: Sequence[Point]) -> list[Finding]:
    spent = sum(point.validation_seconds or 0 for point in points)
    total = sum(point.seconds or 0 for point in points)
    if not total or len(points) < FEWEST_STEPS or (share := spent / total) <= VALIDATION_SHARE:
        return []
    return [
        Finding(
            kind="slow_validation",
            level="notice",
            what=f"Validation takes {share:.0%} of the time",
            remedy="Lower sft.validation_rows.",
            figures={"share": share},
        )
    ]


def _norm(points: Sequence[Point], at: int, width: int = 1) -> str:
    """How the gradient there compares with what it was before."""
    norms = [point.gradient_norm for point in points[max(0, at - NOISE_STEPS - width) : max(1, at - width + 1)]]
    usual = [norm for norm in norms if norm is not None]
    here = [norm for point in points[at - width + 1 : at + 1] if (norm := point.gradient_norm) is not None]
    return f" (gradient norm {median(here):.2g}, usually {median(usual):.2g})" if usual and here else ""


def _around(points: Sequence[Point], at: int, width: int) -> list[float]:
    return [point.loss for point in points[max(0, at - width) : at + width + 1]]
