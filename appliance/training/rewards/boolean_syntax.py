"""How well-formed an answer is as a Boolean search query of one dialect."""

from collections.abc import Sequence

from appliance.reward_settings import BooleanSyntax
from appliance.text.boolean import read
from appliance.training.rewards.reward import Answer, Prompt, Score


def make(settings: BooleanSyntax, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    def score(answers: Sequence[Answer]) -> list[float]:
        readings = [read(answer.text, settings.dialect) for answer in answers]
        # A few words, or a sentence, are well-formed too: what makes a query Boolean are its operators.
        return [each.score * min(1.0, (1 + each.operators) / (1 + settings.least_operators)) for each in readings]

    return score
