"""The application over fake engines, its metrics, and an in-process client."""

import asyncio
import json
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from appliance.recipe import Serve
from appliance.serving.api.app import create_app
from appliance.serving.auth import Gate
from appliance.serving.metrics import Metrics
from tests.serving.fakes import FakeEngine, FakeModels

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


class Site:
    def __init__(self, *engines: FakeEngine, serve: Serve | None = None, gate: Gate | None = None) -> None:
        self.engine = engines[0]
        self.models = FakeModels(*engines)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.serve = serve or Serve(max_tokens=33)
        self.app = create_app(self.models, self.metrics, serve=self.serve, gate=gate)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(asyncio.wait_for(go(), timeout=20))

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.ask("POST", path, json=body)

    def leave(self, path: str, body: Any) -> list[dict[str, Any]]:
        """Posts, goes away while an engine is busy with it, and returns what was sent back until everything was over."""
        return asyncio.run(asyncio.wait_for(self._leave(path, json.dumps(body).encode()), timeout=20))

    async def _leave(self, path: str, body: bytes) -> list[dict[str, Any]]:
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json"), (b"host", b"test")], "scheme": "http"}
        scope |= {"server": ("test", 80), "client": ("test", 1), "root_path": ""}
        task = asyncio.ensure_future(self.app(scope, messages.get, send))  # type: ignore[arg-type]
        while not any(engine.running for engine in self.models.engines.values()):
            assert not task.done(), sent
            await asyncio.sleep(0)
        for _ in range(50):  # until the route waits for what the engine says
            await asyncio.sleep(0)
        messages.put_nowait({"type": "http.disconnect"})
        await task
        return sent

    def refusals(self, reason: str) -> float:
        for family in text_string_to_metric_families(self.metrics.exposition().decode()):
            for sample in family.samples:
                if sample.name == "appliance_rejections_total" and sample.labels.get("reason") == reason:
                    return sample.value
        return 0.0


def ask_chat(site: Site, **fields: Any) -> httpx.Response:
    return site.post(CHAT, {"model": "fake", "messages": [USER], **fields})
