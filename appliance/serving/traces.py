"""Each answer as an OpenTelemetry trace: what it waited for, read and said, and never a word of it. Off unless asked for.

Spans are made when an answer is over, from the figures that the metrics count, so that tracing costs an answer nothing.
Names: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/. The only file that imports opentelemetry.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context

from appliance import __version__
from appliance.serving.engine import EngineListener, RestartReason, StatsListener
from appliance.serving.events import ModelInfo, RequestStats, StepStats

PROVIDER = "edge_appliance"
OPERATIONS = {"pool": "embeddings", "cmpl": "text_completion"}  # by how the id of a request begins; all else chats


@contextlib.contextmanager
def sent_to(endpoint: str, inner: EngineListener) -> Iterator["Traced"]:
    """A listener that tells `inner` everything, and a collector at `endpoint` (OTLP over HTTP) of each answer.

    What the collector has not taken within seconds after the block is lost; a collector that is away slows nothing down.
    """
    resource = Resource.create({"service.name": "edge-appliance", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5))
    )
    try:
        yield Traced(inner, provider.get_tracer("appliance", __version__))
    finally:
        provider.shutdown()


class Traced:
    """An `EngineListener`."""

    def __init__(self, inner: EngineListener, tracer: Tracer) -> None:
        self._inner, self._tracer = inner, tracer

    def of_model(self, name: str) -> StatsListener:
        return _TracedModel(self._inner.of_model(name), name, self._tracer)

    def record_load(self, model: ModelInfo, seconds: float) -> None:
        self._inner.record_load(model, seconds)

    def record_first_token_after_load(self, name: str, seconds: float) -> None:
        self._inner.record_first_token_after_load(name, seconds)

    def record_unload(self, name: str) -> None:
        self._inner.record_unload(name)

    def record_restart(self, name: str, reason: RestartReason) -> None:
        self._inner.record_restart(name, reason)


class _TracedModel:
    """A `StatsListener`."""

    def __init__(self, inner: StatsListener, name: str, tracer: Tracer) -> None:
        self._inner, self._name, self._tracer = inner, name, tracer

    def record_step(self, stats: StepStats) -> None:
        self._inner.record_step(stats)

    def record_request(self, stats: RequestStats) -> None:
        self._inner.record_request(stats)
        ended = time.time_ns()
        started = ended - _nanoseconds(stats.duration_seconds)
        operation = OPERATIONS.get(stats.id.partition("-")[0], "chat")
        span = self._tracer.start_span(
            f"{operation} {self._name}",
            kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, "gen_ai.request.model": self._name, **_attributes(stats)},
            start_time=started,
        )
        within = set_span_in_context(span)
        begins = started
        for phase, seconds in (
            ("queue", stats.queue_seconds),
            ("prefill", stats.prefill_seconds),
            ("decode", stats.decode_seconds),
        ):
            if seconds is None:
                break
            ends = begins + _nanoseconds(seconds)
            self._tracer.start_span(phase, context=within, start_time=begins).end(end_time=ends)
            begins = ends
        if stats.failure_code is not None:
            span.set_status(StatusCode.ERROR, stats.failure_code)
        span.end(end_time=ended)


def _attributes(stats: RequestStats) -> Mapping[str, Any]:
    said = {
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.response.id": stats.id,
        "gen_ai.request.choice.count": stats.n,
        "gen_ai.request.max_tokens": stats.max_tokens,
        "gen_ai.usage.input_tokens": stats.prompt_tokens,
        "gen_ai.usage.output_tokens": stats.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": stats.cached_tokens,
        "gen_ai.response.finish_reasons": [stats.outcome],
    }
    return said if stats.failure_code is None else {**said, "error.type": stats.failure_code}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
