"""The share of an answer's claims that its reference, or its own question, has too: an invented address costs."""

from collections.abc import Sequence

from appliance.reward_settings import GroundedIn
from appliance.text import claims
from appliance.text.languages import detect
from appliance.training.rewards.reward import Answer, Prompt, Score

SILENT = 0.5  # says nothing false, and nothing of what the reference says: saying nothing must not win


def make(settings: GroundedIn, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    def found_in(text: str) -> frozenset[claims.Claim]:
        return claims.find(text, detect(text, languages) if len(languages) > 1 else languages[0])

    def score(answers: Sequence[Answer]) -> list[float]:
        return [_share(answer) for answer in answers]

    def _share(answer: Answer) -> float:
        asked = " ".join(message["content"] for message in answer.prompt.messages)
        said, known = found_in(answer.text), found_in(answer.prompt.reference)
        if not said:
            return SILENT if known else 1.0
        texts = ((answer.prompt.reference, known), (asked, found_in(asked)))
        return sum(any(claims.occurs(claim, *text) for text in texts) for claim in said) / len(said)

    return score
