"""Whether an answer has as many words as wanted: 1 between the bounds, less in proportion outside."""

from collections.abc import Sequence

from appliance.reward_settings import Length
from appliance.training.rewards.reward import Answer, Prompt, Score


def make(settings: Length, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    def score(answers: Sequence[Answer]) -> list[float]:
        counts = [len(answer.text.split()) for answer in answers]
        return [min(1.0, count / max(1, settings.least_words), settings.most_words / max(1, count)) for count in counts]

    return score
