"""The requests that an engine's process has and has not ended: who gets its answers, and who is told of its death.

Knows nothing of the process.
"""

import dataclasses
import time
from collections.abc import Callable

from appliance.errors import EngineFailed, EngineRestarting, RequestError
from appliance.serving.events import Event, Failed, Finished, Pooled, RequestStats, Text, TextPiece, Tokens
from appliance.serving.requests import GenerationRequest, PoolingRequest, Request


@dataclasses.dataclass(slots=True)
class _Asked:
    request: Request
    deliver: Callable[[Event], None]
    answers: int  # not finished
    is_accepted: bool = False
    has_text: bool = False
    is_cancelled: bool = False


class InHand:
    """By request id."""

    def __init__(self) -> None:
        self._asked: dict[str, _Asked] = {}

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def unread(self) -> int:
        """Requests that the process has said nothing about."""
        return sum(1 for each in self._asked.values() if not each.is_accepted)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._asked

    def add(self, request: Request, deliver: Callable[[Event], None]) -> None:
        answers = request.n if isinstance(request, GenerationRequest) else 1
        self._asked[request.id] = _Asked(request, deliver, answers)

    def cancel(self, request_id: str) -> bool:
        """Whether the process is to be told."""
        asked = self._asked.get(request_id)
        if asked is None or asked.is_cancelled:
            return False
        asked.is_cancelled = True
        return True

    def pass_on(self, request_id: str, event: Event) -> None:
        """To whoever asked; the request is out of hand after its last event."""
        asked = self._asked.get(request_id)
        if asked is None:
            return
        asked.is_accepted = True
        if isinstance(event, TextPiece):
            asked.has_text = True
        elif isinstance(event, Finished):
            asked.answers -= 1
        if isinstance(event, Failed | Pooled | Tokens | Text) or asked.answers == 0:
            del self._asked[request_id]
        asked.deliver(event)

    def fail(self, story: str, retry_after_seconds: int) -> list[RequestStats]:
        """All of them, because the process `story`: those that had begun to answer for good, the others until later.

        Returns what those that had been accepted leave behind.
        """
        asked, self._asked = self._asked, {}
        lost = []
        for each in asked.values():
            error: RequestError
            if each.has_text:
                error = EngineFailed(f"The engine's process {story}; the rest of this answer is lost. Ask again.")
            else:
                again = f"try again in {retry_after_seconds} s"
                message = f"The engine's process {story}, and this request was not answered; {again}."
                error = EngineRestarting(message, retry_after_seconds=retry_after_seconds)
            each.deliver(Failed.of(error))
            if each.is_accepted:
                lost.append(_stats(each.request, error))
        return lost


def _stats(request: Request, error: RequestError) -> RequestStats:
    now = time.monotonic()
    arrived_at = request.arrived_at if isinstance(request, GenerationRequest | PoolingRequest) else now
    seconds = now - arrived_at
    return RequestStats(
        id=request.id, outcome="failed", duration_seconds=seconds, queue_seconds=0.0, failure_code=error.api_code
    )
