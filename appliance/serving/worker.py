"""The engine's own process: `python -m appliance.serving.worker FD`, where FD is its end of a socket pair.

Loads its libraries, reads `EngineSettings`, locks itself in, loads the model, answers `Ready` or `LoadRefused`, and then
does what the server asks until the socket closes: a server that ends in whatever way leaves no engine behind. Signals that
are meant for the server (Ctrl-C, a service manager's SIGTERM to every process) are ignored, so that a drain can finish.
Knows nothing of llama.cpp.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from appliance.errors import ApplianceError, EnvironmentIncomplete
from appliance.serving import sandbox, wire
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Load, ModelInfo
from appliance.serving.outbox import Outbox
from appliance.serving.requests import Request

PR_SET_PDEATHSIG = 1
CLOSE_SECONDS = 5.0

logger = logging.getLogger("appliance.serving")


class Host(Protocol):
    """What the process is for; `accept` and `cancel` return at once, and answers go to the outbox."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def encoding_since(self) -> float | None:
        """Since when the oldest request is being rendered, tokenised and compiled."""

    def accept(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def load(self) -> Load: ...

    def drain(self, grace_seconds: float) -> None: ...

    def keep(self, documents: wire.Documents) -> None:
        """Follows what is in the operator's folder now."""

    def close(self) -> None: ...


def main() -> None:
    behave()
    # Before the settings come, since it takes a while: the server starts this process ahead of them. It starts no thread.
    from appliance.serving.hosted import Hosted

    code = run(int(sys.argv[1]), Hosted, confine)
    logging.shutdown()
    os._exit(code)  # a thread that hangs in a template would hold up an ordinary exit


def run(
    descriptor: int,
    make_host: Callable[[EngineSettings, Outbox], Host],
    confine: Callable[[EngineSettings], None] | None = None,
) -> int:
    """Serves one model over the socket; returns the exit code. `confine` is called before there is a second thread."""
    with socket.socket(fileno=descriptor) as sock:
        settings = wire.receive(sock, wire.SETTINGS)
        if settings is None:
            return 0
        try:
            if confine is not None:
                confine(settings)
            outbox = Outbox(sock)
            host = make_host(settings, outbox)
        except ApplianceError as error:
            sock.sendall(wire.pack(wire.LoadRefused(code=error.api_code, message=str(error))))
            return error.exit_code
        gc.freeze()  # what loading left stays for good: not to be looked through between two tokens
        outbox.start(wire.Ready(model=host.model), host.load)
        try:
            while (message := wire.receive(sock, wire.TO_WORKER)) is not None:
                if isinstance(message, wire.Ping) and host.load().state == "stopped":
                    logger.critical("event=engine_thread_ended")
                    return 1  # nothing would be answered any more; the server starts another
                _obey(message, host, outbox)
        finally:
            _close_in_time(host)
    return 0


def behave() -> None:
    """Dies with the server, leaves no core file of private prompts, and says where a crash was."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def confine(settings: EngineSettings) -> None:
    """From here on the process can read the model's files, write its snapshots, compute, and nothing else."""
    if len(threads := list(Path("/proc/self/task").iterdir())) > 1:
        message = f"The engine cannot be confined: a library has started {len(threads) - 1} threads, which would stay free."
        raise EnvironmentIncomplete(message)
    snapshots = [Path(settings.snapshot_folder)] if settings.snapshot_folder is not None else []
    files = [Path(settings.model_path), *map(Path, settings.adapters.values())]
    try:
        report = sandbox.enter(files, snapshots, needs_gpu=settings.gpu_layers > 0)
    except OSError as error:
        message = f"The engine cannot be confined to its files: {error.strerror}, {error.filename or 'no file'}."
        raise EnvironmentIncomplete(message) from error
    if not report.is_complete:
        logger.warning("event=sandbox_incomplete report=%r", str(report))


def _obey(message: wire.ToWorker, host: Host, outbox: Outbox) -> None:
    if isinstance(message, wire.Ping):
        outbox.send(wire.Pong(at=time.monotonic(), load=host.load(), encoding_since=host.encoding_since))
    elif isinstance(message, wire.Cancel):
        host.cancel(message.id)
    elif isinstance(message, wire.Drain):
        host.drain(message.grace_seconds)
    elif isinstance(message, wire.Documents):
        host.keep(message)
    else:
        host.accept(message)


def _close_in_time(host: Host) -> None:
    """Closing may wait for a decode call that never returns; this process ends all the same."""
    timer = threading.Timer(CLOSE_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()
    host.close()
    timer.cancel()


if __name__ == "__main__":
    main()
