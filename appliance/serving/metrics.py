"""The engine's facts as Prometheus metrics. Labels are bounded; no request, user or text ever becomes one.

Buckets reach over an hour: on the machines this is for, reading a long prompt takes minutes.
"""

from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from appliance.serving.engine import Engine, Outcome, RequestStats, StepStats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640, 2560)
REQUEST_BUCKETS = (0.1, 0.3, 0.5, 1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 3840, 7680)

Refusal = Literal["rejected", "invalid"]


class Metrics:
    """A `StatsListener` that fills the metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._duration = Histogram(
            "appliance_request_duration_seconds",
            "From arrival to the end of the answer.",
            ["outcome"],
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._first_token = Histogram(
            "appliance_time_to_first_token_seconds",
            "From arrival to the first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._inter_token = Histogram(
            "appliance_inter_token_seconds", "Between two tokens.", buckets=TOKEN_BUCKETS, registry=registry
        )
        self._queue = Histogram(
            "appliance_queue_seconds", "From arrival to a slot.", buckets=REQUEST_BUCKETS, registry=registry
        )
        self._prompt_tokens = Counter("appliance_prompt_tokens", "Prompt tokens computed.", registry=registry)
        self._generated_tokens = Counter("appliance_generated_tokens", "Tokens generated.", registry=registry)
        self._requests = Counter(
            "appliance_requests",
            "Chat requests by outcome; rejected: no place in the queue, invalid: refused for what it says.",
            ["outcome"],
            registry=registry,
        )
        self._cancelled = Counter(
            "appliance_cancellations", "Requests whose client went away, by phase.", ["phase"], registry=registry
        )

    def record_step(self, stats: StepStats) -> None:
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generated_tokens.inc(stats.generated_tokens)
        for seconds in stats.first_token_seconds:
            self._first_token.observe(seconds)
        for seconds in stats.inter_token_seconds:
            self._inter_token.observe(seconds)

    def record_request(self, stats: RequestStats) -> None:
        self._count(stats.outcome)
        self._duration.labels(stats.outcome).observe(stats.duration_seconds)
        self._queue.observe(stats.queue_seconds)
        if stats.cancelled_in is not None:
            self._cancelled.labels(stats.cancelled_in).inc()

    def record_refusal(self, reason: Refusal) -> None:
        """A request that never reached the engine's queue."""
        self._count(reason)

    def watch(self, engine: Engine) -> None:
        """Adds what is read from the engine at each scrape, and what is said about its model."""
        registry = self._registry
        running = Gauge("appliance_requests_running", "Requests being answered.", registry=registry)
        running.set_function(lambda: engine.load().running)
        waiting = Gauge("appliance_requests_waiting", "Requests in the queue.", registry=registry)
        waiting.set_function(lambda: engine.load().waiting)
        slots = Gauge("appliance_slots", "Requests that can be answered at the same time.", registry=registry)
        slots.set_function(lambda: engine.load().slots)
        ready = Gauge("appliance_engine_ready", "1 while new requests are accepted.", registry=registry)
        ready.set_function(lambda: float(engine.load().is_accepting))
        model = engine.model
        facts = {"name": model.name, "quantization": model.quantization, "sha256": model.sha256[:12]}
        Info("appliance_model", "The served model.", registry=registry).info(facts)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def _count(self, outcome: Outcome | Refusal) -> None:
        self._requests.labels(outcome).inc()
