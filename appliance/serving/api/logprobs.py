"""Log probabilities of tokens as OpenAI's chat completions and responses tell them."""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from appliance.serving.events import TokenLogprob


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


def content_logprobs(told: Sequence[TokenLogprob]) -> Iterator[dict[str, Any]]:
    """One at a time: as objects they take twenty times the room."""
    for each in told:
        top = [_token(piece, logprob) for piece, logprob in each.top]
        yield {**_token(each.piece, each.logprob), "top_logprobs": top}


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    """A token need not be whole characters; its bytes are."""
    return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}
