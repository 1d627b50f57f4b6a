"""Whether an answer begins with the tags that are wanted, such as <think>…</think>, and goes on after them.

Graded by how many of the requirements hold, so that a model that opens a tag learns to close it.
"""

from collections.abc import Sequence

from appliance.reward_settings import FormatTags
from appliance.training.rewards.reward import Prompt, Score


def make(settings: FormatTags, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    return lambda answers: [_share(answer.text, settings.tags) for answer in answers]


def _share(text: str, tags: Sequence[str]) -> float:
    """Of each tag: opened once, closed once after it, begun where the one before ended, filled; at the end: something."""
    held: list[bool] = []
    rest_from = 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start, end = text.find(opening), text.rfind(closing)
        is_closed = text.count(closing) == 1 and start != -1 and end > start
        held += [
            text.count(opening) == 1,
            is_closed,
            start != -1 and not text[rest_from:start].strip(),
            is_closed and bool(text[start + len(opening) : end].strip()),
        ]
        rest_from = end + len(closing) if is_closed else rest_from
    held.append(rest_from > 0 and bool(text[rest_from:].strip()))
    return sum(held) / len(held)
