"""The engines' facts as Prometheus metrics. Labels are bounded; no request, user or text ever becomes one.

Buckets reach over two hours: on the machines this is for, reading a long prompt takes minutes. What the machine itself says
is in `machine_metrics.py`.
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.errors import RequestError
from appliance.serving.engine import Models, RestartReason
from appliance.serving.events import DocumentCounts, EngineState, ModelInfo, Outcome, Phase, Reading, RequestStats, StepStats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
FIRST_TOKEN_BUCKETS = (
    *(0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560),
)
REQUEST_BUCKETS = (
    *(0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 3840, 7680),
)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
LOAD_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
MAX_MODELS: Final = 64  # names beyond it share a label: a server that runs for years sees many promoted models
OTHER: Final = "other"
STEPS_HELD: Final = 256  # before they are counted, if nobody scrapes: counting at once would hold up each token
RECENT: Final = 0.98  # weight that a decode step keeps in the measured bandwidth when the next one comes

Refusal = Literal[
    "queue_full", "rate_limited", "invalid", "too_long", "unauthorized", "forbidden", "not_found", "deadline",
    "shutting_down", "engine_restarting", "no_memory", "other",
]  # fmt: skip
REASONS: Final = {  # of the codes of errors
    "rate_limit_exceeded": "rate_limited",
    "invalid_request": "invalid",
    "context_length_exceeded": "too_long",
    "invalid_api_key": "unauthorized",
    "not_allowed": "forbidden",
    "model_not_found": "not_found",
    "deadline_exceeded": "deadline",
    "deadline_too_short": "deadline",
    "unsupported_parameter": "invalid",
    "request_too_large": "invalid",
    "no_memory_for_model": "no_memory",
}
StepKind = Literal["prefill", "decode", "mixed"]


class Metrics:
    """An `EngineListener` that fills the metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each counter, which nothing reads
        self._registry = registry
        self._models: dict[str, ModelMetrics] = {}
        registry.register(_CountFirst(self._models))
        self._families = _Families(registry)
        self._lock = threading.Lock()
        self._loaded: dict[str, ModelInfo] = {}
        registry.register(_LoadedModels(self._loaded))
        for reason in get_args(Refusal):
            self._families.refusals.labels(reason)

    def of_model(self, name: str) -> "ModelMetrics":
        """The listener of one model; `name` is a configured one, never what a request says."""
        with self._lock:
            label = name if name in self._models or len(self._models) < MAX_MODELS else OTHER
            if label not in self._models:
                self._models[label] = ModelMetrics(self._families, label)
            return self._models[label]

    def record_load(self, model: ModelInfo, seconds: float) -> None:
        self._families.load.labels(self.of_model(model.name).label).observe(seconds)
        self._loaded[model.name] = model

    def record_first_token_after_load(self, name: str, seconds: float) -> None:
        self._families.first_token_after_load.labels(self.of_model(name).label).observe(seconds)

    def record_unload(self, name: str) -> None:
        model = self.of_model(name)
        model.count_steps()
        label = model.label
        self._families.unloads.labels(label).inc()
        for gauge in (self._families.bandwidth, self._families.bandwidth_ratio):
            gauge.remove_by_labels({"model": label})
        self._loaded.pop(name, None)

    def record_restart(self, name: str, reason: RestartReason) -> None:
        self._families.restarts.labels(self.of_model(name).label, _bounded(reason, get_args(RestartReason))).inc()

    def record_refusal(self, reason: str) -> None:
        """A request that never reached an engine's queue; `reason` is one of `Refusal`, or the code of an error."""
        self._families.refusals.labels(_bounded(REASONS.get(reason, reason), get_args(Refusal))).inc()

    def record_peak_bandwidth(self, bytes_per_second: float) -> None:
        """What this machine's memory delivers at most; measured once, at start."""
        self._families.peak_bandwidth = bytes_per_second
        about = "What memory delivers at most, measured at start."
        Gauge("appliance_memory_bandwidth_peak_bytes_per_second", about, registry=self._registry).set(bytes_per_second)

    def watch(self, models: Models) -> None:
        """Adds what is read from the engines at each scrape."""
        self._registry.register(_ModelsNow(models))

    def exposition(self) -> bytes:
        """Called on the event loop's thread, as `Models` must be."""
        return generate_latest(self._registry)


class _CountFirst(Collector):
    """The first that a scrape asks: has the steps counted that the others tell of."""

    def __init__(self, models: Mapping[str, "ModelMetrics"]) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for model in self._models.values():
            model.count_steps()
        return ()


class _Families:
    """Every metric that is counted as it happens."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, about: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"appliance_{name}", about, ["model", *labels], buckets=tuple(buckets), registry=registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"appliance_{name}", about, ["model", *labels], registry=registry)

        self.duration = histogram(
            "request_duration_seconds", "From arrival to the end of the answer.", REQUEST_BUCKETS, "outcome"
        )
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS)
        self.inter_token = histogram("inter_token_seconds", "Between two tokens.", TOKEN_BUCKETS)
        self.queue = histogram("queue_seconds", "From arrival to a slot.", REQUEST_BUCKETS)
        self.prefill = histogram("prefill_seconds", "From the slot to the first token.", REQUEST_BUCKETS)
        self.decode = histogram("decode_seconds", "From the first token to the last.", REQUEST_BUCKETS)
        self.prompt_length = histogram("request_prompt_tokens", "Length of prompts.", LENGTH_BUCKETS)
        self.answer_length = histogram("request_generated_tokens", "Length of answers.", LENGTH_BUCKETS)
        self.max_length = histogram("request_max_tokens", "Length that answers were allowed.", LENGTH_BUCKETS)
        self.answers = histogram("request_answers", "Answers asked for by one request.", (1, 2, 5, 10, 20))
        self.load = histogram("model_load_seconds", "Loading a model.", LOAD_BUCKETS)
        self.first_token_after_load = histogram(
            "first_token_after_load_seconds", "From the start of loading to the first token.", LOAD_BUCKETS
        )
        self.requests = counter("requests", "Requests that an engine accepted, by outcome.", "outcome")
        self.failures = counter("failures", "Requests that failed after they were accepted, by error code.", "code")
        self.cancelled = counter("cancellations", "Requests whose client went away, by phase.", "phase")
        self.missed = counter("deadline_misses", "Requests that ran out of time, by phase.", "phase")
        about = "Prompt tokens: computed, cached, or stitched from documents that had been read by themselves."
        self.prompt_tokens = counter("prompt_tokens", about, "source")
        self.document_requests = counter("document_requests", "Requests with documents, by how these were read.", "reading")
        self.generated_tokens = counter("generated_tokens", "Tokens generated.")
        self.forced_tokens = counter("forced_tokens", "Tokens that a grammar left no choice about.")
        self.drafted_tokens = counter("speculation_drafted_tokens", "Tokens guessed from the prompt.")
        self.accepted_tokens = counter("speculation_accepted_tokens", "Guessed tokens that were right.")
        self.steps = counter("steps", "Decode calls, by what was in the batch.", "kind")
        self.step_seconds = counter("step_seconds", "Time in decode calls, by what was in the batch.", "kind")
        self.read_bytes = counter("decode_read_bytes", "Memory that steps of kind decode had to read.")
        self.restarts = counter("engine_restarts", "Restarts of an engine's process, by reason.", "reason")
        self.unloads = counter("model_unloads", "Models unloaded.")
        self.refusals = Counter(
            "appliance_rejections", "Requests refused before an engine's queue, by reason.", ["reason"], registry=registry
        )
        self.bandwidth = Gauge(
            "appliance_memory_bandwidth_bytes_per_second",
            "Memory read by recent steps of kind decode, per second.",
            ["model"],
            registry=registry,
        )
        self.bandwidth_ratio = Gauge(
            "appliance_memory_bandwidth_ratio", "The same as a share of the peak.", ["model"], registry=registry
        )
        self.peak_bandwidth = 0.0  # not measured


class ModelMetrics:
    """A `StatsListener`: the metrics of one model. Its methods are called by one thread at a time."""

    def __init__(self, families: _Families, label: str) -> None:
        self.label = label
        self._families = families
        self._first_token = families.first_token.labels(label)
        self._inter_token = families.inter_token.labels(label)
        self._generated_tokens = families.generated_tokens.labels(label)
        self._forced_tokens = families.forced_tokens.labels(label)
        self._drafted_tokens = families.drafted_tokens.labels(label)
        self._accepted_tokens = families.accepted_tokens.labels(label)
        self._computed_tokens = families.prompt_tokens.labels(label, "computed")
        self._cached_tokens = families.prompt_tokens.labels(label, "cached")
        self._stitched_tokens = families.prompt_tokens.labels(label, "stitched")
        self._document_requests = {each: families.document_requests.labels(label, each) for each in get_args(Reading)}
        kinds = get_args(StepKind)
        self._steps = {kind: families.steps.labels(label, kind) for kind in kinds}
        self._step_seconds = {kind: families.step_seconds.labels(label, kind) for kind in kinds}
        self._held: list[StepStats] = []
        self._recent_bytes = self._recent_seconds = 0.0
        for outcome in get_args(Outcome):
            families.requests.labels(label, outcome)
        for phase in get_args(Phase):
            families.cancelled.labels(label, phase)
            families.missed.labels(label, phase)
        for reason in get_args(RestartReason):
            families.restarts.labels(label, reason)

    def record_step(self, stats: StepStats) -> None:
        self._held.append(stats)
        if len(self._held) >= STEPS_HELD:
            self.count_steps()

    def count_steps(self) -> None:
        """Brings the metrics up to the last step."""
        held, self._held = self._held, []
        for stats in held:
            self._count(stats)

    def _count(self, stats: StepStats) -> None:
        self._computed_tokens.inc(stats.prompt_tokens)
        self._generated_tokens.inc(stats.generated_tokens)
        self._forced_tokens.inc(stats.forced_tokens)
        self._drafted_tokens.inc(stats.drafted_tokens)
        self._accepted_tokens.inc(stats.accepted_tokens)
        for seconds in stats.first_token_seconds:
            self._first_token.observe(seconds)
        for seconds in stats.inter_token_seconds:
            self._inter_token.observe(seconds)
        kind: StepKind = "decode" if not stats.prompt_tokens else "mixed" if stats.generated_tokens else "prefill"
        self._steps[kind].inc()
        self._step_seconds[kind].inc(stats.seconds)
        if kind == "decode" and stats.read_bytes and stats.seconds > 0:
            self._measure_bandwidth(stats)

    def record_request(self, stats: RequestStats) -> None:
        families, label = self._families, self.label
        outcome = _bounded(stats.outcome, get_args(Outcome))
        families.requests.labels(label, outcome).inc()
        families.duration.labels(label, outcome).observe(stats.duration_seconds)
        families.queue.labels(label).observe(stats.queue_seconds)
        if stats.prefill_seconds is not None:
            families.prefill.labels(label).observe(stats.prefill_seconds)
        if stats.decode_seconds is not None:
            families.decode.labels(label).observe(stats.decode_seconds)
        families.prompt_length.labels(label).observe(stats.prompt_tokens)
        families.answer_length.labels(label).observe(stats.generated_tokens)
        families.max_length.labels(label).observe(stats.max_tokens)
        families.answers.labels(label).observe(stats.n)
        self._cached_tokens.inc(stats.cached_tokens - stats.stitched_tokens)
        self._stitched_tokens.inc(stats.stitched_tokens)
        if stats.documents is not None:
            self._document_requests[stats.documents].inc()
        if stats.cancelled_in is not None:
            families.cancelled.labels(label, _bounded(stats.cancelled_in, get_args(Phase))).inc()
        if stats.missed_deadline_in is not None:
            families.missed.labels(label, _bounded(stats.missed_deadline_in, get_args(Phase))).inc()
        if stats.failure_code is not None:
            families.failures.labels(label, _bounded(stats.failure_code, _CODES)).inc()

    def _measure_bandwidth(self, stats: StepStats) -> None:
        families, label = self._families, self.label
        families.read_bytes.labels(label).inc(stats.read_bytes)
        self._recent_bytes = RECENT * self._recent_bytes + stats.read_bytes
        self._recent_seconds = RECENT * self._recent_seconds + stats.seconds
        bandwidth = self._recent_bytes / self._recent_seconds
        families.bandwidth.labels(label).set(bandwidth)
        if families.peak_bandwidth:
            families.bandwidth_ratio.labels(label).set(bandwidth / families.peak_bandwidth)


class _LoadedModels:
    """What is known of each loaded model: its hashes as info, its sizes as gauges."""

    def __init__(self, loaded: dict[str, ModelInfo]) -> None:
        self._loaded = loaded

    def collect(self) -> Iterator[Metric]:
        info = InfoMetricFamily("appliance_model", "A loaded model.", labels=["model"])
        adapters = InfoMetricFamily("appliance_adapter", "A LoRA adapter of a loaded model.", labels=["model", "adapter"])
        sizes = {name: GaugeMetricFamily(f"appliance_{name}", about, labels=["model"]) for name, about in _SIZES.items()}
        for name, model in sorted(self._loaded.copy().items())[:MAX_MODELS]:
            facts = {
                "sha256": model.sha256,
                "template_sha256": model.template_sha256,
                "quantization": model.quantization,
                "architecture": model.architecture,
                "kind": model.kind,
            }
            info.add_metric([name], facts)
            for adapter, sha256 in sorted(model.adapters.items()):
                adapters.add_metric([name, adapter], {"sha256": sha256})
            for size, value in _sizes(model).items():
                sizes[size].add_metric([name], value)
        yield from (info, adapters, *sizes.values())


_SIZES: Final = {
    "model_file_bytes": "Size of the model's file.",
    "model_weight_bytes": "Weights read for every token.",
    "model_context_tokens": "Longest prompt and answer together.",
    "model_kv_token_bytes": "KV memory of one token.",
    "model_gpu_layers": "Layers computed on a GPU.",
    "model_decode_threads": "Threads for decoding.",
    "model_prefill_threads": "Threads for reading prompts.",
}


def _sizes(model: ModelInfo) -> dict[str, float]:
    values = (model.size_bytes, model.weight_bytes, model.context_tokens, model.kv_bytes_per_token, model.gpu_layers)
    return dict(zip(_SIZES, (*values, model.threads_decode, model.threads_prefill), strict=True))


class _ModelsNow:
    """What all engines together are doing, read when somebody asks."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would ask the engines

    def collect(self) -> Iterator[Metric]:
        load = self._models.load()
        yield _gauge("requests_running", "Requests being answered.", load.running)
        yield _gauge("requests_waiting", "Requests in the queue.", load.waiting)
        yield _gauge("waiting_tokens", "Prompt tokens in the queue.", load.waiting_tokens)
        yield _gauge("slots", "Requests that can be answered at the same time.", load.slots)
        yield _gauge("engine_ready", "1 while new requests are accepted.", load.is_accepting)
        yield _gauge("speculation_active", "1 while tokens are guessed, because it pays.", load.is_speculating)
        if load.kv_cells:
            about = "Share of the KV memory in use, what the last requests left included."
            yield _gauge("kv_use_ratio", about, load.kv_cells_used / load.kv_cells)
            yield _gauge("kv_running_ratio", "Share in use by running requests.", load.kv_cells_running / load.kv_cells)
        if load.cache_tokens:
            about = "Share of the memory for prefixes kept for later (cache_tokens) that is full."
            yield _gauge("prefix_cache_use_ratio", about, load.cached_tokens / load.cache_tokens)
        state = GaugeMetricFamily("appliance_engine_state", "1 for the state of the default model.", labels=["state"])
        for each in get_args(EngineState):
            state.add_metric([each], load.state == each)
        yield state
        loaded = GaugeMetricFamily("appliance_model_loaded", "1 while a model is loaded.", labels=["model"])
        for card in [card for card in self._models.cards() if card.parent is None][:MAX_MODELS]:
            loaded.add_metric([card.id], card.is_loaded)
        yield loaded
        if load.documents is not None:
            yield from _documents(load.documents)


def _documents(counts: DocumentCounts) -> Iterator[Metric]:
    about = "Documents of the folder that is read ahead: known, waiting to be read, or refused, as the log says."
    states = GaugeMetricFamily("appliance_documents", about, labels=["state"])
    for state, count in (("known", counts.known), ("waiting", counts.waiting), ("refused", counts.refused)):
        states.add_metric([state], count)
    yield states
    about = "Documents that were removed, with files that could not be deleted yet; it is tried again."
    yield _gauge("documents_unerased", about, counts.unerased)
    yield _gauge("documents_erased", "Documents erased since the engine started: removed, or edited.", counts.erased)


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"appliance_{name}", about, value=value)


def _bounded(value: str, known: Collection[str]) -> str:
    return value if value in known else OTHER


def _codes(kind: type[RequestError]) -> set[str]:
    return {kind.api_code}.union(*(_codes(each) for each in kind.__subclasses__()))


_CODES: Final = frozenset(_codes(RequestError))
