"""Traces of a real server, as a collector receives them: what each answer waited for, and no word of it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests import tiny_gguf
from tests.serving.serving_process import running_server

SECRET = "my-very-own-words"


class Collector:
    """An OTLP receiver over HTTP on loopback."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def spans(self) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for each in requests for of in each.resource_spans for scope in of.scope_spans for span in scope.spans]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_each_answer_is_a_trace_with_its_phases(collector: Collector, root: Path, tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    with running_server(model, "--traces", collector.url, root=root) as server:
        answer = server.chat(SECRET, max_tokens=4)
        assert server.stop() == 0
    parent, *phases = sorted(collector.spans, key=lambda span: bool(span.parent_span_id))
    said = {each.key: each.value for each in parent.attributes}
    assert parent.name == "chat tiny"
    assert said["gen_ai.response.id"].string_value == answer.json()["id"]
    assert said["gen_ai.usage.input_tokens"].int_value == answer.json()["usage"]["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"].int_value == answer.json()["usage"]["completion_tokens"]
    phases.sort(key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert {span.parent_span_id for span in phases} == {parent.span_id}
    assert phases[0].start_time_unix_nano == parent.start_time_unix_nano
    assert abs(phases[-1].end_time_unix_nano - parent.end_time_unix_nano) < 1_000_000
    assert not any(SECRET.encode() in body for body in collector.bodies)


def test_collector_that_is_away_holds_nothing_up(root: Path, tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    with running_server(model, "--traces", "http://127.0.0.1:9", root=root) as server:
        assert server.chat(max_tokens=4).status_code == 200
        assert server.stop() == 0
