"""Whether an engine takes new requests: open, then draining for a while, then closed. For those who queue requests.

Used with its owner's lock held.
"""

import time

from appliance.errors import EngineFailed, ShuttingDown
from appliance.serving.events import EngineState
from appliance.serving.pace import retry_after


class Intake:
    def __init__(self) -> None:
        self.is_closed = False
        self._drain_deadline: float | None = None

    @property
    def state(self) -> EngineState:
        if self.is_closed:
            return "stopped"
        return "ready" if self._drain_deadline is None else "draining"

    @property
    def is_grace_over(self) -> bool:
        """Whether a drain has begun, and what is left has to end now."""
        return self._drain_deadline is not None and time.monotonic() >= self._drain_deadline

    def drain(self, grace_seconds: float) -> None:
        self._drain_deadline = time.monotonic() + grace_seconds

    def close(self) -> None:
        self.is_closed = True

    def require_open(self) -> None:
        """Raises `EngineFailed` when closed, `ShuttingDown` while draining."""
        if self.is_closed:
            raise EngineFailed("The engine is not running; restart the server.")
        if self._drain_deadline is not None:
            left = retry_after(self._drain_deadline - time.monotonic())
            raise ShuttingDown(
                f"The server is shutting down and takes no new requests. Try again in {left} s.", retry_after_seconds=left
            )
