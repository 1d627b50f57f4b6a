"""What the engine's process has to tell the server: collected from any thread, written by one at a time.

Whoever flushes writes, as far as the socket takes it at once: waking another thread for it would cost each token a tenth of
a millisecond. What the socket does not take is left to a thread of its own, so that the one that computes never waits.
Whatever came together since the last frame leaves in one frame: a step of many answers costs one write. Knows nothing
of what the messages mean.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from appliance.serving import wire
from appliance.serving.events import Event, Load, RequestStats, StepStats, TextPiece

SAID_SECONDS = 0.05

logger = logging.getLogger("appliance.serving")


class Outbox:
    """A `StatsListener` too. Nothing leaves before `start`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._changed = threading.Condition()  # guards everything below
        self._events: list[tuple[str, Event]] = []
        self._steps: list[StepStats] = []
        self._requests: list[RequestStats] = []
        self._messages: list[wire.FromWorker] = []
        self._is_due = False
        self._is_being_written = True  # by somebody, who looks again before leaving; until `start`, by nobody
        self._rest = memoryview(b"")  # of a frame; belongs to who writes
        self._said_at = 0.0  # how things stand
        self._is_left = False  # to the thread, because the socket would have to be waited for
        self._thread = threading.Thread(target=self._write_rest, name="outbox", daemon=True)

    def start(self, first: wire.FromWorker, load: Callable[[], Load]) -> None:
        """Begins with `first`; `load` tells how things stand whenever a report leaves. It may take locks of its own."""
        self._load = load
        self._socket.sendall(wire.pack(first))
        self._thread.start()
        with self._changed:
            self._is_being_written = False
        self.flush()

    def deliver(self, request_id: str, event: Event) -> None:
        """Leaves with the next `flush`."""
        with self._changed:
            self._events.append((request_id, event))

    def record_step(self, stats: StepStats) -> None:
        with self._changed:
            self._steps.append(stats)

    def record_request(self, stats: RequestStats) -> None:
        with self._changed:
            self._requests.append(stats)

    def flush(self) -> None:
        """Sends what there is; figures alone wait for what a person waits for, but not long."""
        with self._changed:
            is_waited_for = self._events or self._messages or self._requests
            if not is_waited_for and time.monotonic() < self._said_at + SAID_SECONDS:
                return
            self._is_due = True
            if self._is_being_written:
                return
            self._is_being_written = True
        self._write(socket.MSG_DONTWAIT)

    def send(self, message: wire.FromWorker) -> None:
        """Sends `message` after what there is."""
        with self._changed:
            self._messages.append(message)
        self.flush()

    def _write_rest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_left)
                self._is_left = False
            self._write(0)

    def _write(self, flags: int) -> None:
        """Writes until nothing is due, or the socket would have to be waited for."""
        try:
            while self._has_more():
                self._rest = self._rest[self._socket.send(self._rest, flags) :]
        except BlockingIOError:
            with self._changed:
                self._is_left = True
                self._changed.notify()
        except OSError:
            return  # the server is gone; the reading thread ends this process
        except Exception:
            logger.critical("event=outbox_failed", exc_info=True)
            os._exit(1)  # without its voice the engine is of no use; the server starts another

    def _has_more(self) -> bool:
        """Whether there is something to write, which then is in `_rest`; if not, others may write."""
        while not self._rest:
            with self._changed:
                if not self._is_due:
                    self._is_being_written = False
                    return False
                self._is_due = False
                events, self._events = self._events, []
                steps, self._steps = self._steps, []
                requests, self._requests = self._requests, []
                messages: list[Any] = self._messages
                self._messages = []
            if events or steps or requests:
                # Nobody looks more often than twenty times a second, but what begins or ends a request is seen at once.
                is_news = bool(requests) or not all(isinstance(event, TextPiece) for _, event in events)
                load = self._load() if is_news or time.monotonic() > self._said_at + SAID_SECONDS else None
                self._said_at = self._said_at if load is None else time.monotonic()
                messages = [wire.Report(events=events, steps=steps, requests=requests, load=load), *messages]
            self._rest = memoryview(b"".join(map(wire.pack, messages)))
        return True
