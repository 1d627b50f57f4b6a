"""The gate: names, keys, scopes, limits, and that nothing slips past it."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import config, keys, store_key
from appliance.errors import ApplianceError, RecipeError
from appliance.keys import KeyBook
from appliance.recipe import Serve
from appliance.serving.api.errors import error_response
from appliance.serving.auth import WRONG_KEYS_PER_MINUTE, Gate, gate_for
from appliance.store import Store

PATHS = {"/v1/chat/completions": "chat", "/v1/models": "chat", "/": "chat", "/openapi.json": "chat", "/api/tags": "chat"}
PATHS |= {"/metrics": "metrics", "/metrics/x": "metrics", "/admin": "admin", "/admin/keys": "admin"}
PATHS |= {"/metricsx": "chat", "/healthz/x": "chat", "//metrics": "chat", "/nowhere": "chat", "": "chat", "*": "chat"}
OPEN = ("/healthz", "/readyz", "/health")


class Reply:
    def __init__(self) -> None:
        self.status, self.body, self.headers, self.state = 0, b"", dict[str, str](), dict[str, str]()

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


def ask(
    gate: Gate, path: str = "/v1/models", *, client: str = "10.0.0.9", server: str = "127.0.0.1", **headers: str
) -> Reply:
    """A request as uvicorn hands it over; `headers` with _ for -."""
    reply, refused = Reply(), list[ApplianceError]()

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        reply.state = scope["state"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        reply.body += message.get("body", b"")

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    fields = {"host": "localhost:8080", **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in fields.items() if value != "ABSENT"]
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": raw,
        "client": (client, 5000),
        "server": (server, 8080),
    }

    def refuse(error: ApplianceError, path: str) -> Any:
        refused.append(error)
        return error_response(error, path)

    asyncio.run(gate.middleware(app, refuse)(scope, receive, send))
    assert len(refused) == (reply.status != 200)
    return reply


@pytest.fixture(autouse=True)
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "secret" / "store.key"
    monkeypatch.setenv("APPLIANCE_KEY_FILE", str(file))
    return file


@pytest.fixture
def store(key_file: Path) -> Iterator[Store]:
    store_key.create(key_file, config.store_file())
    with Store.open(config.store_file(), key_file) as store:
        yield store


@pytest.fixture
def texts(store: Store) -> dict[str, str]:
    """A key of each scope."""
    return {scope: keys.create(store, scope, [scope])[1] for scope in keys.SCOPES}


def gate_with_keys(*, requests_per_minute: int = 0, allowed_hosts: frozenset[str] = frozenset()) -> Gate:
    book = KeyBook(config.store_file(), config.store_key_file(), refresh_seconds=0.0)
    return Gate(keys=book, allowed_hosts=allowed_hosts | {"localhost"}, requests_per_minute=requests_per_minute)


def open_gate(*names: str, requests_per_minute: int = 0) -> Gate:
    allowed = frozenset({"localhost", *names})
    return Gate(keys=None, allowed_hosts=allowed, requests_per_minute=requests_per_minute)


def test_every_path_needs_its_scope(texts: dict[str, str]) -> None:
    gate = gate_with_keys()
    for path, needed in PATHS.items():
        assert ask(gate, path).status == 401, path
        for scope, text in texts.items():
            expected = 200 if scope in (needed, "admin") else 403
            assert ask(gate, path, authorization=f"Bearer {text}").status == expected, (path, scope)
    for path in OPEN:
        assert ask(gate, path).status == 200
    gate.close()


def test_request_knows_its_key(store: Store) -> None:
    key, text = keys.create(store, "desk", ["chat"])
    gate = gate_with_keys()
    expected = {"tenant": key.id, "key_id": key.id}
    for headers in ({"authorization": f"Bearer {text}"}, {"authorization": f"bearer  {text} "}, {"x_api_key": text}):
        assert ask(gate, **headers).state == expected
    assert ask(gate, "/healthz").state == {"tenant": "", "key_id": ""}
    gate.close()


def test_wrong_keys(texts: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    gate = gate_with_keys()
    chat = texts["chat"]
    for wrong in (f"Bearer {chat}x", f"Basic {chat}", chat, "Bearer ", "Bearer", "", f"Bearer {'x' * 5000}", "Bearer \xff"):
        reply = ask(gate, authorization=wrong)
        assert reply.status == 401, wrong
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.error["code"] == "invalid_api_key"
    assert ask(gate, x_api_key=f"{chat}x").status == 401
    assert ask(gate, "/api/tags").error.startswith("This server needs an API key")
    assert chat not in caplog.text
    assert not re.search("[0-9a-f]{32}", caplog.text)
    gate.close()


def test_revoked_key_is_refused_at_once(store: Store) -> None:
    key, text = keys.create(store, "desk", ["chat"])
    gate = gate_with_keys()
    assert ask(gate, authorization=f"Bearer {text}").status == 200
    keys.revoke(store, key.id)
    assert ask(gate, authorization=f"Bearer {text}").status == 401
    assert ask(gate).status == 401, "no key at all is not better than an ended one"
    gate.close()


def test_address_that_guesses_is_slowed_and_nobody_else(texts: dict[str, str]) -> None:
    gate = gate_with_keys()
    statuses = [ask(gate, authorization="Bearer ak_guess").status for _ in range(WRONG_KEYS_PER_MINUTE + 2)]
    assert statuses == [401] * WRONG_KEYS_PER_MINUTE + [429] * 2
    slowed = ask(gate, authorization="Bearer ak_guess")
    assert int(slowed.headers["retry-after"]) >= 1
    assert slowed.error["code"] == "rate_limit_exceeded"
    assert ask(gate, authorization=f"Bearer {texts['chat']}").status == 200, "a right key passes from there too"
    assert ask(gate, client="10.0.0.10", authorization="Bearer ak_guess").status == 401
    gate.close()


def test_guesser_has_one_bucket_for_its_whole_network(texts: dict[str, str]) -> None:
    assert texts
    gate = gate_with_keys()
    replies = [
        ask(gate, client=f"2001:db8::{n:x}", authorization="Bearer ak_g").status for n in range(WRONG_KEYS_PER_MINUTE + 1)
    ]
    assert replies[-1] == 429
    assert ask(gate, client="2001:db8:0:1::1", authorization="Bearer ak_g").status == 401
    gate.close()


def test_rate_limit_is_per_key_and_for_models_only(store: Store, texts: dict[str, str]) -> None:
    _, other = keys.create(store, "other", ["admin"])
    gate = gate_with_keys(requests_per_minute=3)
    chat = {"authorization": f"Bearer {texts['chat']}"}
    assert [ask(gate, **chat).status for _ in range(4)] == [200, 200, 200, 429]
    assert ask(gate, **chat).headers["retry-after"] == "20"
    for _ in range(9):
        assert ask(gate, "/metrics", authorization=f"Bearer {other}").status == 200
    assert ask(gate, authorization=f"Bearer {other}").status == 200
    gate.close()


def test_rate_limit_without_keys_is_per_address() -> None:
    gate = open_gate(requests_per_minute=1)
    assert [ask(gate).status, ask(gate).status, ask(gate, client="10.0.0.10").status] == [200, 429, 200]


def test_an_address_made_up_by_a_proxy_is_neither_a_bucket_nor_logged(
    texts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert texts
    gate = gate_with_keys()
    statuses = [
        ask(gate, client=f"my text {n}", authorization="Bearer ak_g").status for n in range(WRONG_KEYS_PER_MINUTE + 1)
    ]
    assert statuses[-1] == 429
    assert "my text" not in caplog.text
    gate.close()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "127.0.0.1:8080",
        "127.8.8.8",
        "[::1]:8080",
        "pc.lan:1",
        "192.168.1.5:8080",
    ],
)
def test_own_names(host: str) -> None:
    assert ask(open_gate("pc.lan"), server="192.168.1.5", host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil.example:8080", "ABSENT", "", ":8080", "192.168.1.6", "[::2]", "[::1"]
    + [
        "pc.lan.",
        "localhost@evil.example",
        "evil@localhost",
        "localhost/x",
        "localhost:999999",
        "localhost:x",
        "127.0.0.1.evil.example",
    ]
    + ["l" * 600, "0x7f.1", "2130706433", "localhost#"],
)
def test_names_of_others(host: str) -> None:
    for path in ("/v1/models", "/healthz"):
        reply = ask(open_gate("lan"), path, server="192.168.1.5", host=host)
        assert reply.status == 403
        assert reply.error["code"] == "not_allowed"
        assert host == "ABSENT" or len(host) < 12 or host not in reply.error["message"]


def test_two_hosts_are_none() -> None:
    gate = open_gate()
    scope: dict[str, Any] = {"type": "http", "path": "/", "headers": [(b"host", b"localhost"), (b"host", b"evil.example")]}
    with pytest.raises(ApplianceError, match="Host"):
        gate._admit(scope)


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:3000", 200), ("http://pc.lan", 200), ("https://evil.example", 403), ("null", 403), ("", 403)]
    + [("http://localhost.evil.example", 403), ("file://", 403), ("http://evil.example@localhost", 403)],
)
def test_pages_of_other_sites(origin: str, status: int) -> None:
    reply = ask(open_gate("pc.lan"), origin=origin)
    assert reply.status == status
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_open_gate_ignores_keys() -> None:
    reply = ask(open_gate(), authorization="Bearer sk-anything")
    assert reply.status == 200
    assert reply.state == {"tenant": "", "key_id": ""}


def test_other_kinds_of_connection() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        seen.append(scope["type"])

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    guarded = open_gate().middleware(app, error_response)
    asyncio.run(guarded({"type": "lifespan"}, receive, send))
    asyncio.run(guarded({"type": "websocket", "path": "/", "headers": [(b"host", b"localhost")]}, receive, send))
    assert seen == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_on_this_machine_keys_are_needed_once_there_is_one(key_file: Path) -> None:
    gate = gate_for(Serve(), "127.0.0.1", 8080, is_keyless_allowed=False)
    assert ask(gate).status == 200
    store_key.create(key_file, config.store_file())
    with Store.open(config.store_file(), key_file) as store:
        _, text = keys.create(store, "desk", ["chat"])
    gate.close()
    closed = gate_for(Serve(), "127.0.0.1", 8080, is_keyless_allowed=False)
    assert ask(closed).status == 401
    assert ask(closed, authorization=f"Bearer {text}").status == 200
    closed.close()
    assert ask(gate_for(Serve(), "127.0.0.1", 8080, is_keyless_allowed=True)).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_beyond_this_machine_a_valid_key_must_exist(host: str, key_file: Path) -> None:
    with pytest.raises(RecipeError, match="appliance keys create --label"):
        gate_for(Serve(), host, 8080, is_keyless_allowed=False)
    gate_for(Serve(), host, 8080, is_keyless_allowed=True)
    store_key.create(key_file, config.store_file())
    with Store.open(config.store_file(), key_file) as store:
        key, _ = keys.create(store, "desk", ["chat"])
        gate = gate_for(Serve(), host, 8080, is_keyless_allowed=False)
        assert ask(gate).status == 401
        gate.close()
        keys.revoke(store, key.id)
        with pytest.raises(RecipeError, match="no valid API key"):
            gate_for(Serve(), host, 8080, is_keyless_allowed=False)


def test_configured_names() -> None:
    gate = gate_for(Serve(allowed_hosts=("PC.lan", "fd00::1")), "localhost", 8080, is_keyless_allowed=False)
    assert [ask(gate, host=host).status for host in ("pc.lan:8080", "[fd00::1]", "other.lan")] == [200, 200, 403]
    for wrong in ("http://pc.lan", "pc.lan:8080", "pc.lan/", "*", "a b", "user@pc.lan"):
        with pytest.raises(RecipeError, match=r"serve\.allowed_hosts"):
            gate_for(Serve(allowed_hosts=(wrong,)), "localhost", 8080, is_keyless_allowed=False)


def test_store_that_cannot_be_read_closes_the_server(key_file: Path) -> None:
    gate = gate_for(Serve(), "127.0.0.1", 8080, is_keyless_allowed=False)
    config.store_file().parent.mkdir(parents=True)
    config.store_file().write_bytes(b"no store at all")
    gate._keys._next_refresh = 0.0  # type: ignore[union-attr]
    reply = ask(gate)
    assert reply.status == 500
    assert str(key_file) not in reply.error["message"]
    assert ask(gate, "/healthz").status == 200
