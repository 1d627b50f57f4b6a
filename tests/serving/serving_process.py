"""A running `appliance serve` in a process of its own, for tests that need a real server. Main entry: `running_server`."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.running import environment

WAIT_SECONDS = 60.0
CHAT = "/v1/chat/completions"
COMMAND = (sys.executable, "-m", "appliance")


class RunningServer:
    """What a test needs of a server: its address, its process, its metrics, and what it said."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.errors: list[str] = []  # lines of stderr so far
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        assert process.stdout is not None
        self.ready = process.stdout.readline().strip()
        self.url = self.ready.rpartition(" ")[2]
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_SECONDS, trust_env=False)

    @property
    def engines(self) -> list[int]:
        """The processes of its engines."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"appliance.serving.worker" in _command_line(int(pid))]

    @property
    def engine(self) -> int:
        (pid,) = self.engines
        return pid

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        return self.http.post(CHAT, json=chat_body(text, **fields))

    def ready_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.http.get("/readyz").json()
        return state

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code; everything it said is in `errors` then."""
        self.http.close()
        code = self.process.wait(timeout=WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line.rstrip("\n"))


@contextlib.contextmanager
def running_server(
    model: Path | None = None,
    *flags: str | Path,
    root: Path,
    command: Sequence[str] = COMMAND,
    environ: dict[str, str] | None = None,
) -> Iterator[RunningServer]:
    """Serves `model`, or what is promoted in `root`, on a free port; ready when the block begins, gone when it ends."""
    chosen = ["--model", str(model)] if model is not None else []
    arguments = [*command, "serve", "--port", "0", *chosen, *map(str, flags)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, env={**environment(root), **(environ or {})}, **pipes)
    server = RunningServer(process)
    try:
        assert server.ready, "\n".join(server.errors)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        server.wait()


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """False for a zombie, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def threads(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
