"""OpenAI's count of tokens. Knows nothing of routes."""

from collections.abc import Sequence

from pydantic import BaseModel

from appliance.serving.events import Finished, Reading


class PromptDetails(BaseModel):
    """`cached_tokens` had been read for an earlier request and cost nothing; the rest is of requests with documents.

    Of the cached tokens `stitched_tokens` are of documents that had been read by themselves and were moved for this request;
    `restored_tokens` came with a beginning that was known as a whole, however that was made. The answer of an "exact"
    reading is that of a prompt without any cache. Of several answers the first one counts: the others share its prompt.
    """

    cached_tokens: int
    reading: Reading | None = None
    computed_tokens: int | None = None
    restored_tokens: int | None = None
    stitched_tokens: int | None = None


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
        prompt_tokens_details=_details(min(answers, key=lambda answer: answer.index)),
        completion_tokens_details=details,
    )


def _details(answer: Finished) -> PromptDetails:
    if answer.documents is None:
        return PromptDetails(cached_tokens=answer.cached_tokens)
    return PromptDetails(
        cached_tokens=answer.cached_tokens,
        reading=answer.documents,
        computed_tokens=answer.prompt_tokens - answer.cached_tokens,
        restored_tokens=answer.cached_tokens - answer.stitched_tokens,
        stitched_tokens=answer.stitched_tokens,
    )
