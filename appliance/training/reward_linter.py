"""Tries a recipe's rewards before anything is trained with them. Entry: `lint`.

Refused is what would teach nothing or the wrong thing whatever the model answers: a reward that does not give one finite
number for each answer, and one that holds every answer against the same row. The rest is reported: rewards without spread,
that follow length, or that keywords win. Rewards are tried on answers made up for it, and on answers sampled from the model.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from appliance.data import examples
from appliance.data.defects import shown
from appliance.errors import VerificationFailed, several
from appliance.findings import Finding
from appliance.text.stop_words import stop_words
from appliance.text.words import PART
from appliance.training.rewards import reward as rewarding
from appliance.training.rewards.reward import Answer, Prompt, Reward, Value

TOTAL = "the weighted sum"
MOST_PROMPTS = 8
TOLERANCE = 1e-4  # an encoder's padding moves the last digits
FLAT = 1e-6  # a smaller spread teaches nothing
FLAT_SHARE = 0.5  # of groups without spread that is a problem
CORRELATION = 0.8  # with length, by rank, from which on a reward counts as driven by it
FEWEST_SAMPLES = 12  # that a correlation is computed from
SOUP_WORDS = (4, 8, 16, 32, 64)
SOUP_EFFECT = 0.5  # of a reward's whole range, that mere length may move it
STUFFED_SHARE = 0.9  # of the reference's reward, that keywords alone may get
REPEATED_GAIN = 1.05
TRICKS = {  # kinds of made-up answers that are no answers, in words
    "keywords": "keywords in any order",
    "padded": "keywords among words that no reference has",
    "repeated": "words three times over",
}
LETTERS = "bcdfghjklmnpqrstvwxz"  # which make no word together


@dataclass(frozen=True, slots=True)
class _Tried:
    """One reward, or their sum, on the same answers: made-up ones by kind, and sampled ones by group."""

    name: str
    made_up: Mapping[str, Sequence[float]]
    sampled: Sequence[Sequence[float]]


def lint(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], groups: Sequence[Sequence[Answer]], languages: Sequence[str]
) -> list[Finding]:
    """What is questionable about the rewards; `groups` are sampled answers, each group to one prompt.

    Raises `VerificationFailed` with every reason for which a reward cannot be trained with.
    """
    chosen = _different(prompts)
    kinds = _made_up(chosen, languages)
    findings = _refuse(rewards, chosen, kinds, groups)
    tried = [
        _Tried(
            each.name,
            {kind: _numbers(each, answers) for kind, answers in kinds.items()},
            [_numbers(each, group) for group in groups],
        )
        for each in rewards
    ]
    tried.append(_summed(rewards, tried))
    lengths = [[len(answer.text.split()) for answer in group] for group in groups]
    for each in tried if len(rewards) > 1 else tried[:1]:
        is_decisive = len(rewards) == 1 or each.name == TOTAL
        found = [*_constant(each), *_spread(each, groups), *_length(each, lengths), *_keywords(each)]
        findings += [_ranked(finding, is_decisive) for finding in found]
    return findings


def _refuse(
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    kinds: Mapping[str, Sequence[Answer]],
    groups: Sequence[Sequence[Answer]],
) -> list[Finding]:
    """Each prompt with its own reference and with its neighbour's, all in one call; and all answers that there are."""
    neighbours = [*prompts[1:], prompts[0]]
    answers = [
        Answer(prompt, text.reference) for pair in (prompts, neighbours) for prompt, text in zip(prompts, pair, strict=True)
    ]
    refused: list[str] = []
    findings: list[Finding] = []
    for each in rewards:
        try:
            together = _scores(each, answers)
            for kind, made_up in kinds.items():
                _scores(each, made_up, f" ({kind})")
            for group in groups:
                _scores(each, group, f" (sampled, line {group[0].prompt.line})")
            if reason := _borrowed(each, answers, together):
                refused.append(f"{each.name}: {reason}.")
            else:
                findings += _unsteady(each, answers, together)
        except VerificationFailed as error:
            refused.append(str(error))
    if refused:
        raise VerificationFailed(several(refused, "A reward cannot be trained with"))
    return findings


def _borrowed(reward: Reward, answers: Sequence[Answer], together: Sequence[Value]) -> str | None:
    """Why a reward is refused whose values follow one certain row of the call, and not the answer's own.

    Rows are exchanged and texts kept: first all rows but that one, which must move something, then that one alone, which
    must not move the others. It holds also where the weights of words are fitted on each call.
    """
    exchanged = [Answer(answers[(i + 1) % len(answers)].prompt, answer.text) for i, answer in enumerate(answers)]
    for row, place in ((0, "first"), (-1, "last")):
        that = row % len(answers)
        others = [i for i in range(len(answers)) if i != that]
        kept = _scores(reward, [answers[i] if i == that else exchanged[i] for i in range(len(answers))])
        moved = _scores(reward, [exchanged[i] if i == that else answers[i] for i in range(len(answers))])
        followed = [i for i in others if not _same(together[i], moved[i])]
        if followed and all(_same(together[i], kept[i]) for i in others):
            return (
                f"{len(followed)} of {len(answers)} answers got another value when only the {place} row of the call had"
                f" another reference, and none when its own had: it holds all against that row, as `answer[{row}]` does. A"
                " call mixes prompts; compare each answer with the reference at its own place in the list"
            )
    return None


def _unsteady(reward: Reward, answers: Sequence[Answer], together: Sequence[Value]) -> list[Finding]:
    again = _scores(reward, answers)
    if not all(map(_same, together, again)):
        what = f"{reward.name} gives the same answers other values when it is asked again"
        return [Finding("not_repeatable", "problem", what, "Take chance out of it, or a resumed run will differ.")]
    alone = [_scores(reward, [answer])[0] for answer in answers]
    moved = [i for i in range(len(answers)) if not _same(together[i], alone[i])]
    if not moved:
        return []
    return [
        Finding(
            "depends_on_batch",
            "problem",
            f"{reward.name} gives {len(moved)} of {len(answers)} answers another value alone than beside others",
            "Fit what it fits (a vectorizer, a mean) once on all rows, not on those of a call.",
            count=len(moved),
            examples=[
                f"line {answers[i].prompt.line}: {_shown(together[i])} beside others, {_shown(alone[i])} alone"
                for i in moved[:3]
            ],
        )
    ]


def _different(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Some prompts, with different references as far as there are any."""
    by_reference = {prompt.reference: prompt for prompt in reversed(prompts)}
    return examples.spread(list(by_reference.values())[::-1], MOST_PROMPTS)


def _made_up(prompts: Sequence[Prompt], languages: Sequence[str]) -> dict[str, list[Answer]]:
    """Answers by kind, one to each prompt: from the reference itself to words without any sense."""
    chance = random.Random(0)  # the same answers each time, so that findings can be compared
    ignored = stop_words(languages)
    vocabulary = [word for prompt in prompts for word in prompt.reference.split()]

    def keywords(text: str) -> list[str]:
        words = [word for word in PART.findall(text) if word.casefold() not in ignored] or text.split()
        return chance.sample(words, len(words))

    def padded(text: str) -> list[str]:
        """As many words as the reference has, though most say nothing."""
        words = keywords(text)
        missing = max(1, len(text.split()) - len(words))
        return [*words, *("".join(chance.choices(LETTERS, k=7)) for _ in range(missing))]

    kinds = {
        "reference": [prompt.reference for prompt in prompts],
        "another": [prompt.reference for prompt in (*prompts[1:], prompts[0])],
        "repeated": [" ".join([prompt.reference] * 3) for prompt in prompts],
        "keywords": [" ".join(keywords(prompt.reference) * 2) for prompt in prompts],
        "padded": [" ".join(padded(prompt.reference)) for prompt in prompts],
        "empty": ["" for _ in prompts],
    }
    kinds |= {f"soup {count}": [" ".join(chance.choices(vocabulary, k=count)) for _ in prompts] for count in SOUP_WORDS}
    return {
        kind: [Answer(prompt, text) for prompt, text in zip(prompts, texts, strict=True)] for kind, texts in kinds.items()
    }


def _summed(rewards: Sequence[Reward], tried: Sequence[_Tried]) -> _Tried:
    weights = [each.weight for each in rewards]

    def total(columns: Sequence[Sequence[float]]) -> list[float]:
        return [
            sum(weight * value for weight, value in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)
        ]

    made_up = {kind: total([each.made_up[kind] for each in tried]) for kind in tried[0].made_up}
    sampled = [total([each.sampled[i] for each in tried]) for i in range(len(tried[0].sampled))]
    return _Tried(TOTAL, made_up, sampled)


def _constant(tried: _Tried) -> list[Finding]:
    every = [value for values in tried.made_up.values() for value in values]
    if max(every) - min(every) > FLAT:
        return []
    what = f"{tried.name} gives {every[0]:.3g} to references, to nonsense and to nothing alike"
    return [Finding("constant", "problem", what, "It cannot teach anything; mend it, or leave it out.")]


def _spread(tried: _Tried, groups: Sequence[Sequence[Answer]]) -> list[Finding]:
    flat = [i for i, values in enumerate(tried.sampled) if max(values) - min(values) < FLAT]
    if not tried.sampled or len(flat) < FLAT_SHARE * len(tried.sampled):
        return []
    share = len(flat) / len(tried.sampled)
    return [
        Finding(
            "no_spread",
            "problem",
            f"{tried.name} gives all answers the same in {len(flat)} of {len(tried.sampled)} groups, which teach nothing",
            "Take a graded reward instead of all or nothing, a higher grpo.temperature, or more grpo.answers.",
            count=len(flat),
            examples=[f"line {groups[i][0].prompt.line}" for i in flat[:3]],
            figures={"flat_share": share},
        )
    ]


def _length(tried: _Tried, lengths: Sequence[Sequence[int]]) -> list[Finding]:
    """By rank among sampled answers, within their groups; and on words without sense, of which only the number varies."""
    if tried.name == "length":
        return []
    centred = [value - sum(values) / len(values) for values in tried.sampled for value in values]
    words = [count - sum(counts) / len(counts) for counts in lengths for count in counts]
    sampled = rank_correlation(centred, words) if len(words) >= FEWEST_SAMPLES else 0.0
    soups = [fmean(tried.made_up[f"soup {count}"]) for count in SOUP_WORDS]
    every = [value for values in tried.made_up.values() for value in values]
    effect = (max(soups) - min(soups)) / (max(every) - min(every)) if max(every) > min(every) else 0.0
    nonsense = rank_correlation(soups, SOUP_WORDS) if effect >= SOUP_EFFECT else 0.0
    if max(abs(sampled), abs(nonsense)) < CORRELATION:
        return []
    more = "longer" if (sampled if abs(sampled) >= CORRELATION else nonsense) > 0 else "shorter"
    return [
        Finding(
            "length_driven",
            "problem",
            f"{tried.name} gives more to {more} answers, nearly whatever they say (rank correlation with length"
            f" {sampled:.2f} among sampled answers, {nonsense:.2f} on words without sense)",
            "The model will learn length; bound it with the reward `length`, or divide by what grows with it.",
            figures={"sampled_correlation": sampled, "nonsense_correlation": nonsense},
        )
    ]


def _keywords(tried: _Tried) -> list[Finding]:
    means = {kind: fmean(values) for kind, values in tried.made_up.items()}
    whole = means["reference"] - means["empty"]
    if whole <= FLAT:
        return []
    shares = {kind: (means[kind] - means["empty"]) / whole for kind in TRICKS}
    limits = {kind: REPEATED_GAIN if kind == "repeated" else STUFFED_SHARE for kind in TRICKS}
    over = {kind: share for kind, share in shares.items() if share >= limits[kind]}
    if not over:
        return []
    best = max(over, key=lambda kind: over[kind])
    return [
        Finding(
            "keyword_stuffing",
            "problem",
            f"{tried.name} gives a reference's {TRICKS[best]} {over[best]:.0%} of what the reference itself gets",
            "The model will learn to pile up words; weigh it beside another reward, or punish repetition.",
            figures={f"{kind}_share": share for kind, share in shares.items()},
        )
    ]


def _ranked(finding: Finding, is_decisive: bool) -> Finding:
    """What holds for one reward among several need not hold for their sum, which is what trains."""
    if is_decisive:
        return finding
    return dataclasses.replace(finding, level="notice")


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, -1 to 1; 0 where one side does not vary."""
    if max(first) - min(first) < FLAT or max(second) - min(second) < FLAT:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def _scores(reward: Reward, answers: Sequence[Answer], which: str = "") -> list[Value]:
    """Raises `VerificationFailed` unless that is one finite number, or None, for each."""
    try:
        found = reward.score(answers)
    except Exception as error:  # the user's own function may raise anything
        what = f"raised {type(error).__name__} ({shown(str(error))}) for {len(answers)} answers"
        raise VerificationFailed(f"{reward.name}: {what}{which}.") from error
    if (wrong := rewarding.malformed(found, len(answers))) is not None:
        raise VerificationFailed(f"{reward.name}: {wrong}{which}.")
    return rewarding.values(found)


def _numbers(reward: Reward, answers: Sequence[Answer]) -> list[float]:
    """Where a reward does not apply it adds nothing, as in training."""
    return [0.0 if value is None else value for value in _scores(reward, answers)]


def _same(first: Value, second: Value) -> bool:
    if first is None or second is None:
        return first is second
    return abs(first - second) <= TOLERANCE * max(1.0, abs(first))


def _shown(value: Value) -> str:
    return "none" if value is None else f"{value:.3f}"
