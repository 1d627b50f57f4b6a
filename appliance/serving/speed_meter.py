"""Processes that load a model and tell how long reading prompts and writing answers takes; for `speed.py` and `tuning.py`.

A `Meter` is one process, with the settings that a model is loaded with; threads and chunk sizes come with each task. A
`Laboratory` holds several meters as far as memory allows, so that settings can be measured in turn. Nobody is answered by
them. Knows nothing of llama.cpp, which `speed_worker.py` runs.
"""

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Self

import msgspec
from msgspec import Struct

from appliance.errors import EngineFailed
from appliance.serving import wire
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.worker_process import engine_environment

COMMAND = (sys.executable, "-m", "appliance.serving.speed_worker")
TASK_SECONDS = 600.0  # one that takes longer has hung: tasks are chosen to take a few
LAST_WORDS_BYTES = 2000


class ReadPrompt(Struct, frozen=True, kw_only=True, tag=True):
    """Random tokens into an empty memory, in chunks; the token that follows is sampled."""

    tokens: int
    chunk_tokens: int
    threads: int


class WriteAnswers(Struct, frozen=True, kw_only=True, tag=True):
    """Greedy answers to prompts of `prompt_tokens`, all in one batch, a token each at every step. The prompts' reading
    is not counted.
    """

    answers: int
    steps: int
    threads: int
    prompt_tokens: int = 0


Task = ReadPrompt | WriteAnswers


class Opened(Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded. Bytes: read for each step; of one token in the KV memory."""

    weight_bytes: int
    cell_bytes: int


class Took(Struct, frozen=True, kw_only=True, tag=True):
    """A task is done."""

    seconds: float


FromMeter = Opened | Took | wire.LoadRefused
TASK: wire.Decoder[Task] = wire.Decoder(Task)
FROM_METER: wire.Decoder[FromMeter] = wire.Decoder(FromMeter)


class Meter:
    """A running process with a loaded model; a context manager.

    Raises `ModelFileError` or `EnvironmentIncomplete` when the model cannot be loaded, `EngineFailed` when the process dies.
    """

    def __init__(self, settings: EngineSettings, command: Sequence[str] = COMMAND) -> None:
        self.settings = settings
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(TASK_SECONDS)
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,
                env=engine_environment(),
            )
        try:
            self._send(settings)
            opened = self._receive()
            assert isinstance(opened, Opened)
            self.opened = opened
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def seconds(self, task: Task) -> float:
        self._send(task)
        took = self._receive()
        assert isinstance(took, Took)
        return took.seconds

    def close(self) -> None:
        """Ends the process: it holds nothing that is worth waiting for."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _send(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # what is received next says why
            self._socket.sendall(wire.pack(message))

    def _receive(self) -> Opened | Took:
        try:
            message = wire.receive(self._socket, FROM_METER)
        except TimeoutError:
            raise EngineFailed(f"Measuring {self.settings.model_path} took more than {TASK_SECONDS:.0f} s.") from None
        if message is None:
            raise EngineFailed(f"Measuring {self.settings.model_path} failed: its process {self._last_words()}")
        if isinstance(message, wire.LoadRefused):
            raise message.error()
        return message

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0, 2)
        self._errors.seek(max(0, self._errors.tell() - LAST_WORDS_BYTES))
        said = self._errors.read().decode(errors="replace").strip()
        return f"ended with code {code}" + (f" and said: {said}" if said else ".")


OpenMeter = Callable[[EngineSettings], Meter]


class Laboratory:
    """Measures settings in turn: a process for each way of loading, as many at a time as memory allows.

    `needed_bytes` predicts what a process takes. Raises as `Meter` does.
    """

    def __init__(
        self, free_bytes: int, needed_bytes: Callable[[EngineSettings], int], open_meter: OpenMeter = Meter
    ) -> None:
        self._free_bytes = free_bytes
        self._needed_bytes = needed_bytes
        self._open_meter = open_meter
        self._meters: dict[bytes, Meter] = {}  # by the way of loading; the one used last is the last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> Sequence[int]:
        return [meter.pid for meter in self._meters.values()]

    def meter(self, settings: EngineSettings) -> Meter:
        """The process that is loaded in this way; threads come with each task."""
        way = msgspec.json.encode(msgspec.structs.replace(settings, threads_decode=0, threads_prefill=0))
        meter = self._meters.pop(way, None)
        if meter is None:
            self._make_room(self._needed_bytes(settings))
            meter = self._open_meter(settings)
        self._meters[way] = meter
        return meter

    def close(self) -> None:
        while self._meters:
            self._meters.popitem()[1].close()

    def _make_room(self, wanted_bytes: int) -> None:
        while self._meters:
            held = sum(self._needed_bytes(meter.settings) for meter in self._meters.values())
            if held + wanted_bytes <= self._free_bytes:
                return
            self._meters.pop(next(iter(self._meters))).close()
