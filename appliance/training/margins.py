"""What a curve says of DPO and GRPO, whose loss says little: margins between answers, and rewards. Asked by `diagnose`."""

import math
from collections.abc import Sequence
from statistics import mean, median

from appliance.findings import Finding
from appliance.training import curve
from appliance.training.curve import Point

ZERO_ADVANTAGE_SHARE = 0.5  # half the groups give no gradient: half the time is wasted


def saturated(points: Sequence[Point]) -> list[Finding]:
    """A loss of DPO is exactly 0 where its logarithm of a sigmoid underflows."""
    empty = [point for point in points if point.is_empty]
    if not empty:
        return []
    return [
        Finding(
            kind="saturated",
            level="notice",
            what=f"In {len(empty)} of {len(points)} steps the loss is exactly 0, and nothing was learned: the chosen answers"
            " were so much likelier than the rejected ones by then that nothing was left",
            remedy="Train fewer epochs, or lower learning_rate; see whether chosen and rejected answers differ by more than"
            " length or one phrase.",
            count=len(empty),
            examples=[str(point) for point in empty[:5]],
            figures={"saturated_steps": len(empty), "steps": len(points)},
        )
    ]


def no_preference(points: Sequence[Point]) -> list[Finding]:
    """DPO's loss begins at ln 2, and may hardly fall where much is learned: that is the margin, which begins at 0.

    It must exceed 0 by two standard errors in the second half; or, for a loss without a reference, whose margin begins
    anywhere, what it was in the first tenth by three.
    """
    margins = [point.margin for point in points if point.margin is not None]
    later = margins[len(margins) // 2 :]
    if len(later) < 2:
        return []
    first = margins[: max(1, len(margins) // 10)]
    noise, gained = curve.noise(later), mean(later)
    unsure = 2 * noise / math.sqrt(len(later))
    if gained > unsure or gained - mean(first) > 3 * noise * math.sqrt(1 / len(later) + 1 / len(first)):
        return []
    preferred = [point.preferred for point in points[len(points) // 2 :] if point.preferred is not None]
    share = f", and {mean(preferred):.0%} of the pairs gained at all" if preferred else ""
    return [
        Finding(
            kind="no_learning",
            level="problem",
            what=f"Nothing was learned: in the second half of the steps the chosen answers had gained {gained:.2g} on the"
            f" rejected ones (margin of rewards, sure to {unsure:.2g}){share}",
            remedy="Raise learning_rate, or train longer; see whether the chosen answers are the better ones throughout.",
            count=len(points),
            figures={"margin": gained, "standard_errors": gained / unsure * 2 if unsure else 0.0},
        )
    ]


def equal_rewards(points: Sequence[Point]) -> list[Finding]:
    shares = [point.equal_rewards for point in points if point.equal_rewards is not None]
    if len(shares) < 3 or (share := median(shares)) < ZERO_ADVANTAGE_SHARE:
        return []
    return [
        Finding(
            kind="zero_advantage",
            level="problem",
            what=f"In {share:.0%} of the groups all completions got the same reward: their advantage is 0, and nothing is"
            " learned from them",
            remedy="Take a reward with degrees instead of right or wrong, or more completions a prompt.",
            count=sum(each >= ZERO_ADVANTAGE_SHARE for each in shares),
            examples=[str(point) for point in points if (point.equal_rewards or 0) >= ZERO_ADVANTAGE_SHARE][:3],
            figures={"share": share},
        )
    ]


def flat_reward(points: Sequence[Point]) -> list[Finding]:
    """The last fifth's mean reward is not above the first fifth's by two standard errors."""
    rewards = [point.reward for point in points if point.reward is not None]
    parts = curve.fifths(rewards)
    if len(parts[0]) < 5:
        return []
    first, last = map(mean, parts)
    if last - first > 2 * curve.noise(rewards) * math.sqrt(2 / len(parts[0])):
        return []
    return [
        Finding(
            kind="no_learning",
            level="problem",
            what=f"The reward did not rise: {first:.3f} in the first fifth of the steps, {last:.3f} in the last",
            remedy="Raise learning_rate, lower beta, or take more completions a prompt; see what gets which reward.",
            count=len(rewards),
            figures={"first_reward": first, "last_reward": last},
        )
    ]
