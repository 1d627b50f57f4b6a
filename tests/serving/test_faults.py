"""What happens to a running server when something around it breaks: its engine, its clients, its files, its memory.

A real server, a real engine, a tiny model with a long context: reading a long prompt takes it seconds.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance import artifacts
from tests import tiny_gguf
from tests.serving.serving_process import (
    CHAT,
    COMMAND,
    WAIT_SECONDS,
    RunningServer,
    chat_body,
    descriptors,
    is_alive,
    running_server,
    threads,
    until,
)

CONTEXT_TOKENS = 16384
LONG = "abcd " * 2800  # some 14,000 tokens: seconds of reading
ENDLESS = {"max_tokens": 12_000, "temperature": 1.0, "seed": 1, "logit_bias": {"261": -100, "263": -100}}  # no end token
FLAGS = ("--context-tokens", str(CONTEXT_TOKENS), "--queue-requests", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_gguf, "CONTEXT_TOKENS", CONTEXT_TOKENS)
        return tiny_gguf.write(tmp_path_factory.mktemp("faults") / "long.gguf")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[RunningServer]:
    with running_server(model, *FLAGS, root=model.parent) as server:
        yield server
        assert server.stop() == 0


@contextlib.contextmanager
def stream(server: RunningServer, text: str = "hello", **fields: Any) -> Iterator[httpx.Response]:
    client = httpx.Client(base_url=server.url, timeout=WAIT_SECONDS, trust_env=False)
    with client, client.stream("POST", CHAT, json=chat_body(text, stream=True, **fields)) as response:
        yield response


def in_background(server: RunningServer, text: str, **fields: Any) -> "BackgroundChat":
    return BackgroundChat(server.url, chat_body(text, **fields))


class BackgroundChat(threading.Thread):
    """A chat in a thread of its own; `response` is there once it has been joined."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, body
        self.response = httpx.Response(0)
        self.start()

    def run(self) -> None:
        self.response = httpx.post(self._url + CHAT, json=self._body, timeout=WAIT_SECONDS, trust_env=False)

    def result(self) -> httpx.Response:
        self.join(WAIT_SECONDS)
        return self.response


def is_idle(server: RunningServer) -> bool:
    """Nothing runs or waits."""
    state = server.ready_state()
    return (state["status"], state["running"], state["waiting"]) == ("ready", 0, 0)


def test_engine_killed_in_prefill(server: RunningServer) -> None:
    until(lambda: is_idle(server))
    chat = in_background(server, LONG, max_tokens=5)
    until(lambda: server.ready_state()["running"] == 1)
    os.kill(server.engine, signal.SIGKILL)
    assert server.http.get("/healthz").status_code == 200
    refused = chat.result()
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "engine_restarting"
    assert server.chat(max_tokens=2).status_code == 200


def test_engine_killed_in_decode(server: RunningServer) -> None:
    before = server.metric("appliance_engine_restarts_total")
    with stream(server, **ENDLESS) as response:
        lines = response.iter_lines()
        received = [next(lines) for _ in range(8)]
        os.kill(server.engine, signal.SIGKILL)
        received += list(lines)
    assert response.status_code == 200
    last = [line for line in received if line][-1]
    assert '"engine_failed"' in last
    assert "[DONE]" not in last
    assert server.chat(max_tokens=2).status_code == 200
    assert server.metric("appliance_engine_restarts_total") == before + 1


def test_clients_that_leave_free_their_places(server: RunningServer) -> None:
    """Gone in the queue, while the prompt is read, and while the answer is written."""
    until(lambda: is_idle(server))
    before = {phase: cancelled(server, phase) for phase in ("queue", "prefill", "decode")}
    with stream(server, **ENDLESS) as decoding:
        lines = decoding.iter_lines()
        next(lines)
        with abandoned_request(server.url, chat_body(LONG, max_tokens=5)):
            until(lambda: server.ready_state()["running"] == 2)
            with abandoned_request(server.url, chat_body(max_tokens=5)):
                until(lambda: server.ready_state()["waiting"] == 1)
            until(lambda: server.ready_state()["waiting"] == 0)
        until(lambda: server.ready_state()["running"] == 1)
    until(lambda: is_idle(server))
    assert {phase: cancelled(server, phase) - count for phase, count in before.items()} == {
        "queue": 1.0,
        "prefill": 1.0,
        "decode": 1.0,
    }


def cancelled(server: RunningServer, phase: str) -> float:
    return server.metric("appliance_cancellations_total", phase=phase)


@contextlib.contextmanager
def abandoned_request(url: str, body: dict[str, Any]) -> Iterator[None]:
    """A request whose client closes its connection when the block ends, without having read anything."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(raw_request(url, body))
        yield


def test_a_slow_reader_holds_up_nobody(server: RunningServer) -> None:
    until(lambda: is_idle(server))
    with abandoned_request(server.url, chat_body(stream=True, **{**ENDLESS, "max_tokens": 1500})):
        until(lambda: server.ready_state()["running"] == 1)
        for _ in range(3):
            assert server.chat(max_tokens=2).status_code == 200
        until(lambda: server.ready_state()["running"] == 0)  # its answer is computed, read or not
    until(lambda: is_idle(server))


def disconnecting_clients(server: RunningServer, count: int) -> dict[int, int]:
    """So many requests, most of which are given up at some moment; how often each status was received to the end."""
    seen: dict[int, int] = {}
    dice = random.Random(7)

    async def one() -> None:
        fields = {"max_tokens": dice.choice((1, 20, 200)), "stream": dice.random() < 0.5, "temperature": 1.0}
        body = chat_body("x" * dice.choice((1, 50, 2000)), **fields)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(dice.choice((0.0, 0.01, 0.05, 0.2, WAIT_SECONDS))):
                status = await ask_once(server.url, body)
                seen[status] = seen.get(status, 0) + 1

    async def all_of_them() -> None:
        for start in range(0, count, 12):
            await asyncio.gather(*(one() for _ in range(start, min(start + 12, count))))

    asyncio.run(all_of_them())
    return seen


async def ask_once(url: str, body: dict[str, Any]) -> int:
    """One request on a connection of its own, which is cut when the caller gives up; no client library is in between."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw_request(url, body))
        return int((await reader.read()).split()[1])
    finally:
        writer.transport.abort()


def raw_request(url: str, body: dict[str, Any]) -> bytes:
    request = httpx.Request("POST", url + CHAT, json=body, headers={"Connection": "close"})
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    return f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + request.read()


def check_nothing_is_left_behind(server: RunningServer, count: int) -> None:
    disconnecting_clients(server, 24)  # whatever is made on first use
    until(lambda: is_idle(server))
    processes = (server.process.pid, server.engine)
    before = [(descriptors(pid), threads(pid)) for pid in processes]
    seen = disconnecting_clients(server, count)
    assert seen.keys() <= {200, 503}
    assert seen[200] > 0
    until(lambda: is_idle(server))
    until(lambda: [(descriptors(pid), threads(pid)) for pid in processes] == before)
    assert (server.process.pid, server.engine) == processes
    assert server.chat(max_tokens=2).status_code == 200


def test_random_disconnects_leave_nothing_behind(server: RunningServer) -> None:
    check_nothing_is_left_behind(server, 200)


@pytest.mark.slow
def test_two_thousand_random_disconnects_leave_nothing_behind(server: RunningServer) -> None:
    check_nothing_is_left_behind(server, 2000)


def test_the_engine_ignores_signals_that_are_meant_for_the_server(server: RunningServer) -> None:
    engine = server.engine
    with stream(server, **{**ENDLESS, "max_tokens": 300}) as response:
        lines = response.iter_lines()
        next(lines)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(engine, number)
        assert "data: [DONE]" in list(lines)
    assert server.engine == engine


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_leaves_no_engine(model: Path, number: signal.Signals) -> None:
    """SIGTERM while an answer is read: the answer is complete, and then it leaves with 0."""
    with running_server(model, *FLAGS, root=model.parent) as server:
        engine = server.engine
        with stream(server, **{**ENDLESS, "max_tokens": 500}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(number)
            if number == signal.SIGTERM:
                assert "data: [DONE]" in list(lines)
                assert server.wait() == 0
        until(lambda: not is_alive(engine))


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(model: Path) -> None:
    with running_server(model, *FLAGS, root=model.parent) as server:
        engine = server.engine
        with stream(server, **ENDLESS) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.ready_state()["status"] == "draining")
            assert server.chat(max_tokens=1).status_code == 503
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 0
        until(lambda: not is_alive(engine))


@pytest.mark.slow
def test_a_stopped_engine_is_replaced(model: Path) -> None:
    environ = {"APPLIANCE_SERVE_WATCHDOG_SECONDS": "5"}
    with running_server(model, *FLAGS, root=model.parent, environ=environ) as server:
        engine = server.engine
        os.kill(engine, signal.SIGSTOP)
        chat = in_background(server, "hello", max_tokens=2)
        assert chat.result().status_code == 503
        assert server.chat(max_tokens=2).status_code == 200
        assert server.metric("appliance_engine_restarts_total", reason="hang") == 1
        assert not is_alive(engine)


@pytest.fixture
def promoted(root: Path) -> Path:
    """An artifacts folder with three models of the same name, the first of them promoted."""
    for number in range(3):
        plan = artifacts.Plan(kind="gguf", name="assistant", inputs={"number": number})
        with artifacts.create(plan, root) as draft:
            if number == 2:
                tiny_gguf.write(draft.path / "model.gguf", template="{{ broken")
            else:
                tiny_gguf.write(draft.path / "model.gguf", seed=number)
    promote(root, 0)
    return root


def promote(root: Path, number: int) -> str:
    """Returns the sha256 of the model's file."""
    plan = artifacts.Plan(kind="gguf", name="assistant", inputs={"number": number})
    artifact = plan.existing(root)
    assert artifact is not None
    link = root / ".current.new"
    link.symlink_to(artifact.path.relative_to(root))
    link.replace(root / "current")
    digest: str = artifact.manifest["files"]["model.gguf"]["sha256"]
    return digest


def served_sha256(server: RunningServer) -> str:
    fingerprint: str = server.chat(max_tokens=1).json()["system_fingerprint"]
    return fingerprint.removeprefix("fp_")


@pytest.mark.slow
def test_no_request_fails_while_another_model_is_promoted(promoted: Path) -> None:
    """Nor when what is promoted cannot be loaded, or is not what its manifest says."""
    flags = ("--context-tokens", "512", "--queue-requests", "20")
    with running_server(None, *flags, root=promoted) as server:
        is_over = threading.Event()

        def client(number: int) -> set[int]:
            statuses = set()
            with httpx.Client(base_url=server.url, timeout=WAIT_SECONDS, trust_env=False) as http:
                while not is_over.is_set():
                    body = chat_body(f"client {number}", max_tokens=30, stream=bool(number % 2))
                    response = http.post(CHAT, json=body)
                    statuses.add(response.status_code if '"error"' not in response.text else -1)
            return statuses

        with ThreadPoolExecutor(3) as pool:
            clients = [pool.submit(client, number) for number in range(3)]
            first = served_sha256(server)
            promote(promoted, 2)
            until(lambda: any("promotion_refused" in line for line in server.errors))
            second = promote(promoted, 1)
            until(lambda: second.startswith(served_sha256(server)))
            tamper(promoted, 0)
            promote(promoted, 0)
            until(lambda: sum("promotion_refused" in line for line in server.errors) == 2)
            is_over.set()
            assert [each.result() for each in clients] == [{200}] * 3
        assert first != served_sha256(server)
        until(lambda: len(server.engines) == 1)
        assert server.stop() == 0


def tamper(root: Path, number: int) -> None:
    plan = artifacts.Plan(kind="gguf", name="assistant", inputs={"number": number})
    with (plan.location(root) / "model.gguf").open("ab") as file:
        file.write(b"x")


@pytest.mark.slow
def test_several_models_on_demand(model: Path, tmp_path: Path) -> None:
    other = tiny_gguf.write(tmp_path / "other.gguf", seed=11)
    environ = {"APPLIANCE_SERVE_IDLE_SECONDS": "1"}
    with running_server(model, *FLAGS, "--also", other, root=tmp_path, environ=environ) as server:
        assert len(server.engines) == 1
        answers = {name: server.chat(max_tokens=8, model=name).json() for name in ("long", "other")}
        assert {name: answer["model"] for name, answer in answers.items()} == {"long": "long", "other": "other"}
        assert len(server.engines) == 2
        assert server.chat(model="unheard-of").status_code == 404
        until(lambda: len(server.engines) == 1)
        assert server.chat(max_tokens=8, model="other").json()["model"] == "other"


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A cgroup of its own whose memory can be limited; version 2 or 1."""
    roots = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]
    for folder in (root / f"appliance-test-{os.getpid()}" for root in roots if (root / "cgroup.procs").exists()):
        with contextlib.suppress(OSError):
            folder.mkdir()
            if limit_of(folder).exists():
                yield folder
                until(lambda folder=folder: not (folder / "cgroup.procs").read_text())
                folder.rmdir()
                return
            folder.rmdir()
    pytest.skip("no memory cgroup can be made here")


def limit_of(folder: Path) -> Path:
    version_2 = folder / "memory.max"
    return version_2 if version_2.exists() else folder / "memory.limit_in_bytes"


def private_bytes(folder: Path) -> int:
    """What the kernel cannot take back: file pages, which it can, would leave room for the engine."""
    usage = folder / "memory.current"
    used = int((usage if usage.exists() else folder / "memory.usage_in_bytes").read_text())
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return used - int(facts["file"] if "file" in facts else facts["cache"])


def test_memory_squeeze(model: Path, memory_cgroup: Path) -> None:
    """Where memory runs out, the kernel ends the engine, not the server; that is told apart, and the next request works."""
    into_cgroup = ("sh", "-c", f'echo $$ > {memory_cgroup}/cgroup.procs && exec "$@"', "sh", *COMMAND)
    with running_server(model, *FLAGS, root=model.parent, command=into_cgroup) as server:
        assert server.chat(max_tokens=2).status_code == 200
        used = private_bytes(memory_cgroup)
        limit_of(memory_cgroup).write_text(str(used + (2 << 20)))
        assert server.chat(LONG, max_tokens=5, n=2).status_code == 503
        assert server.metric("appliance_engine_restarts_total", reason="memory") == 1
        limit_of(memory_cgroup).write_text(str(used * 2))
        assert server.chat(max_tokens=2).status_code == 200
