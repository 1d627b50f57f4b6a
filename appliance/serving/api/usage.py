"""OpenAI's count of tokens. Knows nothing of routes."""

from collections.abc import Sequence

from pydantic import BaseModel

from appliance.serving.events import Finished


class PromptDetails(BaseModel):
    """`cached_tokens` had been read for an earlier request and cost nothing."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | None = None


def usage(answers: Sequence[Finished], reasoning_tokens: int | None = None) -> Usage:
    """Of all answers to one prompt, which is read and counted once."""
    prompt = answers[0].prompt_tokens
    generated = sum(answer.generated_tokens for answer in answers)
    details = None if reasoning_tokens is None else CompletionDetails(reasoning_tokens=reasoning_tokens)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptDetails(cached_tokens=max(answer.cached_tokens for answer in answers)),
        completion_tokens_details=details,
    )
