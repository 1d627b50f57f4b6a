"""The probability that a classifier on ONNX Runtime gives the label wanted of an answer.

The probability and not a match of labels: a group whose answers are all judged alike would have no spread to learn from.
"""

from collections.abc import Mapping, Sequence

from appliance.data import examples
from appliance.data.defects import shown
from appliance.encoders import Encoder
from appliance.errors import DataError, ModelFileError, several
from appliance.reward_settings import SentimentMatch
from appliance.training.rewards.reward import Answer, Prompt, Score

MOST_SHOWN = 5


def make(settings: SentimentMatch, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    """Raises `DataError` naming the rows that want no label of the classifier."""
    encoder = Encoder.load(settings.encoder, settings.precision)
    if encoder.settings.kind != "classifier":
        raise ModelFileError(
            f"{settings.encoder} is of kind {encoder.settings.kind}; grpo.rewards.sentiment_match needs a classifier."
        )
    labels = {label.casefold(): label for label in encoder.settings.labels}
    _require_labels(prompts, settings, labels)

    def score(answers: Sequence[Answer]) -> list[float]:
        # What is beyond the classifier's longest input is not judged: an answer is cut by `grpo.answer_tokens` as well.
        judged = encoder.classify([answer.text for answer in answers], truncate=True)
        wanted = [labels[str(answer.prompt.columns[settings.column]).casefold()] for answer in answers]
        return [found[label] for found, label in zip(judged, wanted, strict=True)]

    return score


def _require_labels(prompts: Sequence[Prompt], settings: SentimentMatch, labels: Mapping[str, str]) -> None:
    wrong = [
        f"line {prompt.line}: {shown(prompt.columns.get(settings.column))}"
        for prompt in prompts
        if str(prompt.columns.get(settings.column)).casefold() not in labels
    ]
    if wrong:
        listed = examples.some(wrong, MOST_SHOWN)
        known = ", ".join(labels.values())
        raise DataError(
            several(listed, f"Column {settings.column!r} must hold a label of {settings.encoder.name} ({known})")
        )
