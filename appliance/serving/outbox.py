"""What the engine's process has to tell the server: collected from any thread, written by one thread of its own.

The thread that computes never waits for the socket. Whatever came together since the last frame leaves in one frame, so
that a step of many answers costs one write. Knows nothing of what the messages mean.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from appliance.serving import wire
from appliance.serving.events import Event, Load, RequestStats, StepStats

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
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self, first: wire.FromWorker, load: Callable[[], Load]) -> None:
        """Begins with `first`; `load` tells how things stand whenever a report leaves."""
        self._load = load
        self._socket.sendall(wire.pack(first))
        self._thread.start()

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
        """Sends what there is."""
        with self._changed:
            self._is_due = True
            self._changed.notify()

    def send(self, message: wire.FromWorker) -> None:
        """Sends `message` after what there is."""
        with self._changed:
            self._messages.append(message)
            self._is_due = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._write()
        except Exception:
            logger.critical("event=outbox_failed", exc_info=True)
            os._exit(1)  # without its voice the engine is of no use; the server starts another

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_due)
                self._is_due = False
                events, self._events = self._events, []
                steps, self._steps = self._steps, []
                requests, self._requests = self._requests, []
                messages: list[Any] = self._messages
                self._messages = []
            if events or steps or requests:
                messages = [wire.Report(events=events, steps=steps, requests=requests, load=self._load()), *messages]
            try:
                self._socket.sendall(b"".join(map(wire.pack, messages)))
            except OSError:
                return  # the server is gone; the reading thread ends this process
