"""The worker's loop over a socket, in this process and without a model."""

import concurrent.futures
import functools
import socket

import msgspec
import pytest

from appliance.serving import wire, worker
from appliance.serving.events import EngineState, Load
from tests.serving.stand_in_worker import StandIn
from tests.serving.test_supervisor import settings


class Standing(StandIn):
    state: EngineState = "ready"

    def load(self) -> Load:
        return msgspec.structs.replace(super().load(), state=self.state)


class Stopped(Standing):
    state = "stopped"


@pytest.mark.parametrize(("host", "code"), [(Standing, 0), (Stopped, 1)])
def test_process_ends_when_its_thread_has_ended(host: type[Standing], code: int) -> None:
    ours, theirs = socket.socketpair()
    with concurrent.futures.ThreadPoolExecutor() as threads, ours:
        ours.settimeout(20.0)
        descriptor = theirs.detach()
        ended = threads.submit(worker.run, descriptor, functools.partial(host, descriptor))
        ours.sendall(wire.pack(settings("well")) + wire.pack(wire.Ping()))
        first = wire.receive(ours, wire.FROM_WORKER)
        answer = wire.receive(ours, wire.FROM_WORKER)
        assert isinstance(first, wire.Ready)
        assert isinstance(answer, wire.Pong) if code == 0 else answer is None
        ours.shutdown(socket.SHUT_RDWR)
        assert ended.result(20.0) == code
