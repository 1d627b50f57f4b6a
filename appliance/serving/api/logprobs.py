"""Log probabilities of tokens as OpenAI's chat completions and responses tell them."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from appliance.serving.events import TokenLogprob


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


def content_logprobs(told: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {**_token(each.piece, each.logprob), "top_logprobs": [_token(piece, logprob) for piece, logprob in each.top]}
        for each in told
    ]


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    """A token need not be whole characters; its bytes are."""
    return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}
