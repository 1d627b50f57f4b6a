"""A worker process as its parent sees it: started, written to, read from, killed, and how it died.

Knows nothing of requests: `supervisor.py` decides what a death means for them.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from appliance import config
from appliance.errors import ApplianceError, EnvironmentIncomplete, ModelFileError
from appliance.serving import wire
from appliance.serving.engine import RestartReason
from appliance.serving.engine_settings import EngineSettings

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's, which would be there before the process is confined
COMMAND = (sys.executable, "-m", "appliance.serving.worker")
OOM_SCORE, FIRST_TO_GO = Path("/proc/self/oom_score_adj"), "500"
END_SECONDS = 6.0  # a worker whose socket has closed ends by itself, a little sooner
# Turns of its loop in which a thread of llama.cpp waits for the others before it sleeps, a millisecond or two: they wait for
# each other hundreds of times a token. Without any, decoding is half as fast; 2,000 turns cost up to a fifth with eight
# answers. What spinning costs when other programs want the cores is `thread_choice.py`'s to mend.
SPINS = 100_000

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended: why it is restarted, and what happened, in words that follow "The engine's process"."""

    reason: RestartReason
    story: str
    signal: int | None = None


class WorkerDied(Exception):
    """It died before its model was loaded."""

    def __init__(self, death: Death) -> None:
        super().__init__(death.story)
        self.death = death

    def error(self, model_path: str) -> ApplianceError:
        """The same for a person who starts the server."""
        said = f"Loading {model_path} failed: the engine's process {self.death.story}."
        if self.death.reason == "memory" or self.death.signal == signal.SIGILL:
            return EnvironmentIncomplete(said)
        return ModelFileError(f"{said} Copy the file again or name another model.")


class Workers:
    """Starts workers. Called in the main thread: a worker dies with the thread that started it."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._waiting: _Waiting | None = None

    def prepare(self) -> None:
        """Starts a process ahead of its settings, so that it loads its libraries while this one still loads its own."""
        self._waiting = _Waiting.start(self._command)

    async def start(self, settings: EngineSettings) -> "WorkerProcess":
        """A process with these settings, which begins to load the model. Raises `EnvironmentIncomplete`."""
        if self._waiting is not None and self._waiting.process.poll() is not None:
            self.close()
        waiting, self._waiting = self._waiting or _Waiting.start(self._command), None
        try:
            return await WorkerProcess.take(waiting, settings)
        except BaseException:
            waiting.end()
            raise

    def close(self) -> None:
        """Ends a process that nobody had use for."""
        if self._waiting is not None:
            self._waiting.end()
            self._waiting = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiting:
    """A worker without settings, and our end of its socket."""

    process: "subprocess.Popen[bytes]"
    sock: socket.socket

    @classmethod
    def start(cls, command: Sequence[str]) -> "_Waiting":
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                return cls(_spawn([*command, str(theirs.fileno())], theirs.fileno()), ours)
            except OSError as error:
                ours.close()
                message = f"No process can be started for the engine ({error.strerror}); end others, or raise the limit."
                raise EnvironmentIncomplete(message) from error

    def end(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.communicate()


class WorkerProcess(asyncio.Protocol):
    """A running worker. Made by `Workers.start`; ended by `kill` or `end`, and `death` waits until it is gone."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.pid = process.pid
        self._process = process
        self._frames = wire.Frames(wire.FROM_WORKER)
        self._said: collections.deque[wire.FromWorker] = collections.deque()  # and nobody has listened yet
        self._listener: Callable[[wire.FromWorker], None] | None = None
        self._has_more = asyncio.Event()
        self._is_gone = False
        self._hang: str | None = None
        self._oom_kills = _oom_kills()
        self._log: asyncio.Task[None] | None = None

    @classmethod
    async def take(cls, waiting: "_Waiting", settings: EngineSettings) -> "WorkerProcess":
        """Hands a process that waits for them its settings."""
        loop = asyncio.get_running_loop()
        _, worker = await loop.create_unix_connection(lambda: cls(waiting.process), sock=waiting.sock)
        worker._log = asyncio.create_task(worker._pass_on_log(settings.name))
        worker.send(settings)
        return worker

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.messages(data):
                if self._listener is not None:
                    self._listener(message)
                else:
                    self._said.append(message)
                    self._has_more.set()
        except wire.FrameBroken as error:
            self.kill(f"sent what is no message ({error})")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (however it came)
        self._is_gone = True
        self._has_more.set()

    def send(self, message: Any) -> None:
        """Never waits: what the worker does not read is kept. Raises `FrameBroken` for a message that is too large."""
        frame = wire.pack(message)
        if not self._transport.is_closing():
            self._transport.write(frame)

    async def message(self) -> wire.FromWorker | None:
        """The next thing it says; None when it is gone, or talks nonsense."""
        while not self._said and not self._is_gone:
            self._has_more.clear()
            await self._has_more.wait()
        return self._said.popleft() if self._said else None

    async def listen(self, listener: Callable[[wire.FromWorker], None]) -> None:
        """Tells `listener` everything that it says, as it comes, until it is gone or talks nonsense.

        There is no task to be woken for it: that would cost each token of an answer another turn of the loop.
        """
        while self._said:
            listener(self._said.popleft())
        self._listener = listener
        try:
            while not self._is_gone:
                self._has_more.clear()
                await self._has_more.wait()
        finally:
            self._listener = None

    def kill(self, hang: str) -> None:
        """Ends a worker that is not well, and says why; what it still had to tell is lost."""
        self._hang = hang
        self._signal(signal.SIGKILL)
        self._transport.abort()  # it may be stuck in the kernel; nobody waits for it to let go of the socket

    async def end(self) -> None:
        """Asks the worker to leave by closing its socket; kills it when it stays."""
        self._transport.close()
        deadline = asyncio.get_running_loop().time() + END_SECONDS
        while self._process.poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                self._signal(signal.SIGKILL)
            await asyncio.sleep(0.01)
        await self._clean_up()

    async def death(self) -> Death:
        """Waits for the end of a worker whose messages have ended, and says how it came."""
        deadline = asyncio.get_running_loop().time() + END_SECONDS
        while self._process.poll() is None:
            if asyncio.get_running_loop().time() > deadline and self._hang is None:
                self.kill("closed its socket and did not leave")
            await asyncio.sleep(0.01)
        await self._clean_up()
        if self._hang is not None:
            return Death("hang", self._hang)
        return _story(self._process.returncode, has_oom_kill=_oom_kills() > self._oom_kills)

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _clean_up(self) -> None:
        self._transport.abort()
        if self._log is not None:
            await self._log

    async def _pass_on_log(self, name: str) -> None:
        """The worker's stderr, line by line, into the log of this process."""
        assert self._process.stderr is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 16)
        with self._process.stderr as pipe:
            transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
            try:
                while data := await reader.read(1 << 16):
                    for line in data.decode(errors="replace").splitlines():
                        logger.warning("event=engine_log model=%s pid=%d line=%s", name, self.pid, line)
            finally:
                transport.close()


def engine_environment() -> dict[str, str]:
    """What a process that computes is started with; a GOMP_SPINCOUNT that a person set is kept."""
    return {"GOMP_SPINCOUNT": str(SPINS), **config.quiet_environment(), **ONE_THREAD}


def _spawn(command: Sequence[str], descriptor: int) -> "subprocess.Popen[bytes]":
    with _first_to_go():
        return subprocess.Popen(
            command,
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=engine_environment(),
        )


@contextlib.contextmanager
def _first_to_go() -> Iterator[None]:
    """A process that is started here is what the kernel ends when memory runs out, from its first moment on.

    It inherits the score: while it is still small, the kernel would take this one.
    """
    try:
        before = OOM_SCORE.read_text()
        OOM_SCORE.write_text(FIRST_TO_GO)
    except OSError:  # not in every container; then the larger one goes, which is the engine once it has loaded
        yield
        return
    try:
        yield
    finally:
        OOM_SCORE.write_text(before)


def _story(code: int, *, has_oom_kill: bool) -> Death:
    if code >= 0:
        return Death("exit", f"ended by itself with exit code {code}")
    number = -code
    name = signal.Signals(number).name if number in signal.Signals.__members__.values() else f"signal {number}"
    if number == signal.SIGKILL and has_oom_kill:
        cure = "take fewer --slots or --context-tokens, or a smaller model"
        return Death("memory", f"was ended by the kernel because memory ran out; {cure}", number)
    if number == signal.SIGILL:
        cure = "use an image or a build for every x86-64 CPU"
        return Death("signal", f"was ended by {name}: this CPU lacks what llama.cpp was compiled for; {cure}", number)
    return Death("signal", f"was ended by {name}", number)


def _oom_kills() -> int:
    """Processes that the kernel has ended for want of memory since it started, in any cgroup."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
