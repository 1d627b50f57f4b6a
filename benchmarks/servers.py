"""The servers that are compared: how each is started on the same model file, and what it calls the same things.

Every server gets the same file, threads, context and KV type, and keeps its own defaults otherwise. `running` starts one
on a free port and ends it, with all its processes. Which rows they run is in `workloads.py`.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.errors import EnvironmentIncomplete, ServerError
from benchmarks import peers, processes
from benchmarks.client import Answer, Request, ask, clock
from convert import llama_cpp_source

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
CHAT = "/v1/chat/completions"
START_SECONDS = 180.0
POLL_SECONDS = 0.01
END_SECONDS = 10.0  # llama-server was seen to ignore a signal for minutes after clients had vanished
DYING_SECONDS = 1.0
LOG_LINES_SHOWN = 12
PR_SET_PDEATHSIG = 1  # prctl(2)
NEVER = -100.0  # logit bias: OpenAI's way to forbid a token
EXAMPLE = "examples/server/server.py"
# Our wheel is built without the library for pictures and sound. The example imports its binding and uses it for these only.
EXAMPLE_START = (
    "import runpy, sys, types; sys.modules['llama_cpp.mtmd_cpp'] = types.ModuleType('mtmd_cpp'); "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
# What a person has set for other programs must not reach one server and miss another.
FOREIGN_PREFIXES = ("APPLIANCE_", "LLAMA_", "GGML_", "OMP_", "GOMP_", "UVICORN_")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a server is to hold, whatever its own words for it are.

    `context_tokens` is for one request; `cache_tokens` are kept beside the slots, and `cell_bytes` (KV memory of a token)
    turns them into bytes for servers that count so. `folder` is for files of this run: a restart finds them again.
    `peer_spins` bounds for how long the peers' threads spin at a barrier (GOMP_SPINCOUNT); None leaves OpenMP's default,
    which is the fastest on an idle machine and 10 to 50 times slower as soon as anything else wants a core.
    """

    model: Path
    folder: Path
    binaries: Path | None = None  # of the peers that are no Python; None: what `make bench-peers` built
    threads: int
    slots: int
    context_tokens: int
    cache_tokens: int = 0
    cell_bytes: int = 0
    end_tokens: Sequence[int] = ()
    peer_spins: int | None = None
    documents: str = "exact"  # ours: how they are read
    reuse_tokens: int = 0  # llama-server: the shortest part of a prompt that it moves

    @property
    def total_tokens(self) -> int:
        return self.slots * self.context_tokens

    @property
    def cache_mib(self) -> int:
        return self.cache_tokens * self.cell_bytes >> 20


def _peer_environment(launch: Launch) -> Mapping[str, str]:
    return {} if launch.peer_spins is None else {"GOMP_SPINCOUNT": str(launch.peer_spins)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One of those compared. `fields` are added to each request so that it runs to `max_tokens`."""

    name: str
    command: Callable[[Launch, int], Sequence[str]]
    environment: Callable[[Launch], Mapping[str, str]] = _peer_environment
    fields: Callable[[Launch], Mapping[str, Any]]
    ready_path: str
    engine_word: str = ""  # in the command line of the process that computes, where that is not the server's own


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that answers; `started_at` is when its process was, by the client's clock."""

    server: Server
    launch: Launch
    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    command: Sequence[str]
    started_at: float

    def chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int, **fields: Any) -> Request:
        """A greedy streamed answer of exactly `max_tokens`, unless `fields` say otherwise."""
        body = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.server.fields(self.launch),
            **fields,
        }
        return Request(host=HOST, port=self.port, path=CHAT, body={k: v for k, v in body.items() if v is not None})

    def get(self, path: str) -> Request:
        return Request(host=HOST, port=self.port, path=path)

    def check(self, answers: Sequence[Answer]) -> None:
        """Raises `ServerError` with the end of its log when it died, or an answer is not whole."""
        broken = next((answer for answer in answers if not answer.is_whole), None)
        if broken is not None and broken.problem:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DYING_SECONDS)  # its connections end a moment before it does
        if (code := self.process.poll()) is not None:
            raise ServerError(f"{self.server.name} ended with exit code {code}; the end of its log:\n{tail(self.log)}")
        if broken is not None:
            told = broken.problem or f"status {broken.status}: {broken.text[:300]}"
            raise ServerError(f"{self.server.name} did not answer: {told}; the end of its log:\n{tail(self.log)}")

    def role(self, pid: int) -> str:
        """What one of its processes does."""
        if not self.server.engine_word:
            return "all in one"
        if self.server.engine_word in processes.name(pid):
            return "engine"
        return "http" if pid == self.process.pid else "other"

    def server_cpu_seconds(self) -> float:
        """Of all its processes but the one that computes; of the whole where they are the same."""
        pids = processes.tree(self.process.pid)
        return sum(processes.cpu_seconds(pid) for pid in pids if self.role(pid) != "engine")

    def total_cpu_seconds(self) -> float:
        return sum(processes.cpu_seconds(pid) for pid in processes.tree(self.process.pid))


@contextlib.asynccontextmanager
async def running(server: Server, launch: Launch) -> AsyncIterator[Running]:
    """Starts the server and waits until it is ready. Raises `ServerError` with the end of its log when it does not come up.

    However the block ends, none of the server's processes is left.
    """
    with started(server, launch) as run:
        await ready(run)
        yield run


@contextlib.contextmanager
def started(server: Server, launch: Launch) -> Iterator[Running]:
    """The same without waiting, for those who watch it start."""
    port = free_port()
    command = list(server.command(launch, port))
    log = launch.folder / f"{server.name}-{port}.log"
    with log.open("wb") as stream:
        started_at = clock()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**_environment(), **server.environment(launch)},
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is for this process, which ends the server in its own time
            preexec_fn=_die_with_parent,
        )
    try:
        yield Running(
            server=server, launch=launch, process=process, port=port, log=log, command=command, started_at=started_at
        )
    finally:
        end(process)


async def ready(run: Running) -> None:
    """Waits until it answers; raises `ServerError` with the end of its log when it does not."""
    request = run.get(run.server.ready_path)
    while (await ask(request, patience_seconds=START_SECONDS)).status != 200:
        if (code := run.process.poll()) is not None:
            raise ServerError(f"{run.server.name} did not start (exit code {code}); the end of its log:\n{tail(run.log)}")
        if clock() - run.started_at > START_SECONDS:
            raise ServerError(
                f"{run.server.name} was not ready within {START_SECONDS:g} s; the end of its log:\n{tail(run.log)}"
            )
        await asyncio.sleep(POLL_SECONDS)


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL for whatever is left of the tree after a while."""
    if process.poll() is not None:
        return
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_handle(pid)) for pid in processes.tree(process.pid)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        for child in children:
            if child is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(child, signal.SIGKILL)
                _await_end(child)
        process.wait()


def _await_end(handle: int) -> None:
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)  # readable once it has ended
    waiting.poll(END_SECONDS * 1000)


@contextlib.contextmanager
def _handle(pid: int) -> Iterator[int | None]:
    """A descriptor that means this process and never another that gets its number later; None when it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def tail(log: Path, lines: int = LOG_LINES_SHOWN) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """Of this moment: some servers cannot take port 0 and say which one they got."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def _ours(launch: Launch, port: int) -> Sequence[str]:
    return [
        *(sys.executable, "-m", "appliance", "serve", "--model", str(launch.model), "--host", HOST, "--port", str(port)),
        *("--slots", str(launch.slots), "--context-tokens", str(launch.context_tokens)),
        *("--threads", str(launch.threads), "--kv-type", "f16"),
    ]


def _our_environment(launch: Launch) -> Mapping[str, str]:
    """Guessing is off: a model of noise repeats itself, and guesses that come true would flatter this server."""
    artifacts = launch.folder / "artifacts"  # prefixes on disk and what is known of files: a restart finds them
    artifacts.mkdir(exist_ok=True)
    return {
        "APPLIANCE_ARTIFACTS": str(artifacts),
        "APPLIANCE_SERVE_CACHE_TOKENS": str(launch.cache_tokens),
        "APPLIANCE_SERVE_PREFILL_THREADS": str(launch.threads),
        "APPLIANCE_SERVE_SPECULATION": "off",
        "APPLIANCE_SERVE_DOCUMENTS": launch.documents,
    }


def _llama_server(launch: Launch, port: int) -> Sequence[str]:
    return [
        *(str(_binary(launch)), "--model", str(launch.model), "--host", HOST, "--port", str(port)),
        *("--parallel", str(launch.slots), "--ctx-size", str(launch.total_tokens)),
        *("--threads", str(launch.threads), "--threads-batch", str(launch.threads)),
        *("--cache-ram", str(launch.cache_mib), "--cache-reuse", str(launch.reuse_tokens)),
    ]


def _llama_cpp_server(launch: Launch, port: int) -> Sequence[str]:
    """It answers one request at a time; by default a second request would cut the first one short."""
    return [
        *(sys.executable, "-m", "llama_cpp.server", "--model", str(launch.model), "--host", HOST, "--port", str(port)),
        *("--n_ctx", str(launch.total_tokens), "--interrupt_requests", "false"),
        *("--n_threads", str(launch.threads), "--n_threads_batch", str(launch.threads)),
    ]


def _example_server(launch: Launch, port: int) -> Sequence[str]:
    """Its file is in the source distribution, not in the wheel."""
    script, settings = launch.folder / "example_server.py", launch.folder / "example_server.json"
    if not script.exists():
        script.write_bytes(_from_source(EXAMPLE))
    model = {
        "path": str(launch.model),
        "n_ctx": launch.total_tokens,
        "n_seq_max": launch.slots,
        "threads": launch.threads,
        "threads_batch": launch.threads,
        "store_logits": False,  # as in every configuration that is shipped with it
    }
    settings.write_text(json.dumps({"server": {"host": HOST, "port": port}, "model": model}))
    return [sys.executable, "-c", EXAMPLE_START, str(script), "-C", str(settings)]


SERVERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server(
            name="ours",
            command=_ours,
            environment=_our_environment,
            fields=lambda _: {"ignore_eos": True},
            ready_path="/readyz",
            engine_word="appliance.serving.worker",
        ),
        Server(name="llama-server", command=_llama_server, fields=lambda _: {"ignore_eos": True}, ready_path="/health"),
        Server(
            name="llama_cpp.server",
            command=_llama_cpp_server,
            fields=lambda launch: {"logit_bias": {str(token): NEVER for token in launch.end_tokens}, "stream_options": None},
            ready_path="/v1/models",
        ),
        Server(
            name="example-server",
            command=_example_server,
            fields=lambda launch: {"logit_bias": {str(token): NEVER for token in launch.end_tokens}, "stream_options": None},
            ready_path="/healthz",
        ),
    )
}


def missing(server: Server, launch: Launch) -> str | None:
    """Why this server cannot be started here; None when it can."""
    try:
        server.command(launch, 0)
    except EnvironmentIncomplete as error:
        return str(error)
    return None


def shown(server: Server, launch: Launch) -> str:
    """The command line as a person would type it, without this machine's paths."""
    settings = [f"{key}={value}" for key, value in server.environment(launch).items() if str(launch.folder) not in value]
    words = [*settings, *server.command(launch, 0)]
    short = {sys.executable: "python", str(launch.model): launch.model.name, EXAMPLE_START: "…"}
    return " ".join(short.get(word, Path(word).name if word.startswith("/") else word) for word in words)


def _binary(launch: Launch) -> Path:
    if launch.binaries is None:
        return peers.binary("llama-server")
    path = launch.binaries / "llama-server"
    if not path.is_file():
        raise EnvironmentIncomplete(f"{path} does not exist; name the folder that holds llama-server.")
    return path


def _from_source(name: str) -> bytes:
    """A file of llama-cpp-python's source distribution, which setup has downloaded."""
    with tarfile.open(llama_cpp_source.ensure_source()) as archive:
        stem = llama_cpp_source.SOURCE_NAME.removesuffix(".tar.gz")
        content = archive.extractfile(f"{stem}/{name}")
        if content is None:
            raise EnvironmentIncomplete(f"{llama_cpp_source.SOURCE_NAME} has no {name}; the pin needs a new layout.")
        return content.read()


def _die_with_parent() -> None:
    """In the child: a benchmark that is killed leaves no server behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _environment() -> Mapping[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    return {**kept, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"}
