"""What POST /v1/completions answers: one body, or a chunk for every piece. Log probabilities in their older shape."""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from appliance.serving.api.usage import PromptDetails, Usage, usage
from appliance.serving.engine import EngineLease
from appliance.serving.events import Finished, TextPiece, TokenLogprob


class CompletionLogprobs(BaseModel):
    """`text_offset` is where each token's text begins, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class _Choice:
    """One answer as it grows."""

    def __init__(self, index: int, echo: str) -> None:
        self.index = index
        self.texts = [echo]
        self.logprobs: list[TokenLogprob] = []
        self.finished: Finished | None = None
        self.offset = len(echo)  # of the next token


class CompletionBodies:
    """The bodies of one request, whose choices are the `n` answers to the first prompt, then those to the second, ..."""

    def __init__(
        self, answer_id: str, created: int, lease: EngineLease, echoes: Sequence[str], *, n: int, wants_usage: bool
    ) -> None:
        self.wants_usage = wants_usage
        self._n = n
        self._choices = [_Choice(index, echo) for index, echo in enumerate(echo for echo in echoes for _ in range(n))]
        self._head = {
            "id": answer_id,
            "object": "text_completion",
            "created": created,
            "model": lease.name,
            "system_fingerprint": f"fp_{lease.engine.model.sha256[:12]}",
        }

    def add(self, number: int, event: TextPiece | Finished) -> None:
        choice = self._choice(number, event)
        if isinstance(event, Finished):
            choice.finished = event
        else:
            choice.texts.append(event.text)
            choice.logprobs += event.logprobs

    def whole(self) -> dict[str, Any]:
        choices = []
        for choice in self._choices:
            assert choice.finished is not None, "an answer has not finished"
            body = {"text": "".join(choice.texts), "index": choice.index, "finish_reason": choice.finished.reason}
            choices.append({**body, "logprobs": self._logprobs(choice, choice.logprobs)})
        return {**self._head, "choices": choices, "usage": self._usage().model_dump(exclude_none=True)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What is echoed."""
        for choice in self._choices:
            if echo := choice.texts[0]:
                yield self._chunk(choice, echo, None, None)

    def piece(self, number: int, event: TextPiece) -> dict[str, Any]:
        choice = self._choice(number, event)
        return self._chunk(choice, event.text, self._logprobs(choice, event.logprobs), None)

    def last(self, number: int, event: Finished) -> dict[str, Any]:
        return self._chunk(self._choice(number, event), "", None, event.reason)

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": self._usage().model_dump(exclude_none=True)}

    def _choice(self, number: int, event: TextPiece | Finished) -> _Choice:
        return self._choices[number * self._n + event.index]

    def _chunk(self, choice: _Choice, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        told = {"text": text, "index": choice.index, "logprobs": logprobs, "finish_reason": reason}
        body = {**self._head, "choices": [told]}
        return {**body, "usage": None} if self.wants_usage else body

    def _usage(self) -> Usage:
        """Each prompt is counted once, however many answers it has."""
        finished = [choice.finished for choice in self._choices if choice.finished is not None]
        each = [usage(finished[start : start + self._n]) for start in range(0, len(finished), self._n)]
        return Usage(
            prompt_tokens=sum(one.prompt_tokens for one in each),
            completion_tokens=sum(one.completion_tokens for one in each),
            total_tokens=sum(one.total_tokens for one in each),
            prompt_tokens_details=PromptDetails(cached_tokens=sum(one.prompt_tokens_details.cached_tokens for one in each)),
        )

    def _logprobs(self, choice: _Choice, told: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not told:
            return None
        tokens = [_token_text(each.piece) for each in told]
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in told],
            "top_logprobs": [{_token_text(piece): logprob for piece, logprob in each.top} for each in told],
            "text_offset": offsets,
        }


def _token_text(piece: bytes) -> str:
    """Bytes that are no text by themselves are spelled as OpenAI does, so that different tokens stay different."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
