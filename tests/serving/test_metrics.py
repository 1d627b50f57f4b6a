"""Metrics: what engines say ends in the right series, and no label ever comes from a request."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from appliance import errors
from appliance.errors import RequestError
from appliance.serving.engine import EngineLease, ModelCard, RestartReason
from appliance.serving.events import (
    DocumentCounts,
    EngineState,
    Load,
    ModelInfo,
    ModelKind,
    Outcome,
    Phase,
    RequestStats,
    StepStats,
)
from appliance.serving.metrics import MAX_MODELS, REASONS, Metrics, Refusal

MODEL = ModelInfo(
    name="shelter",
    kind="chat",
    sha256="a" * 64,
    template_sha256="b" * 64,
    quantization="Q4_K_M",
    architecture="qwen3",
    size_bytes=400,
    context_tokens=2048,
    slots=2,
    made_at=0,
    adapters={"polite": "c" * 64},
    kv_bytes_per_token=114688,
    weight_bytes=380,
    threads_decode=2,
    threads_prefill=4,
    load_seconds=1.5,
)
STEP = StepStats(
    seconds=0.5,
    prompt_tokens=0,
    generated_tokens=3,
    first_token_seconds=(90.0,),
    inter_token_seconds=(0.25, 0.25),
    drafted_tokens=4,
    accepted_tokens=1,
    forced_tokens=2,
    read_bytes=1000,
)
REQUEST = RequestStats(
    id="r1",
    outcome="stop",
    duration_seconds=100.0,
    queue_seconds=10.0,
    prefill_seconds=80.0,
    decode_seconds=10.0,
    prompt_tokens=1500,
    cached_tokens=500,
    generated_tokens=40,
    max_tokens=512,
)


class FakeModels:
    """`Models` that only says what it has."""

    def __init__(self, load: Load, cards: Sequence[ModelCard] = ()) -> None:
        self._load, self._cards = load, cards

    def cards(self) -> Sequence[ModelCard]:
        return self._cards

    def load(self) -> Load:
        return self._load

    def lease(self, name: str | None, kind: ModelKind = "chat") -> AbstractAsyncContextManager[EngineLease]:
        raise NotImplementedError

    def drain(self, grace_seconds: float) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def filled(registry: CollectorRegistry) -> Metrics:
    """With every kind of fact that there is."""
    metrics = Metrics(registry)
    metrics.record_peak_bandwidth(4000.0)
    metrics.record_load(MODEL, 1.5)
    metrics.record_first_token_after_load("shelter", 2.5)
    metrics.record_load(ModelInfo(**{**as_dict(MODEL), "name": "second", "adapters": {}}), 1.0)
    metrics.record_unload("second")
    listener = metrics.of_model("shelter")
    listener.record_step(STEP)
    for prompt_tokens, generated_tokens in ((256, 0), (200, 2), (0, 1)):
        listener.record_step(StepStats(seconds=2.0, prompt_tokens=prompt_tokens, generated_tokens=generated_tokens))
    listener.record_request(REQUEST)
    for phase in get_args(Phase):
        listener.record_request(ended("cancelled", cancelled_in=phase))
        listener.record_request(ended("length", missed_deadline_in=phase))
    listener.record_request(ended("failed", failure_code="engine_failed"))
    for reason in get_args(RestartReason):
        metrics.record_restart("shelter", reason)
    for refusal in get_args(Refusal):
        metrics.record_refusal(refusal)
    cards = [
        ModelCard(id="shelter", kind="chat", made_at=0, size_bytes=1, sha256="a", is_loaded=True),
        ModelCard(id="shelter:polite", kind="chat", made_at=0, size_bytes=1, sha256="c", is_loaded=True, parent="shelter"),
        ModelCard(id="minilm", kind="embedding", made_at=0, size_bytes=1, sha256="d", is_loaded=False),
    ]
    load = Load(
        state="draining", running=2, waiting=3, slots=2, waiting_tokens=700, kv_cells=100, kv_cells_used=80,
        kv_cells_running=40, is_speculating=True,
        documents=DocumentCounts(known=5, waiting=2, refused=1, erased=4, unerased=3),
    )  # fmt: skip
    metrics.watch(FakeModels(load, cards))
    return metrics


def ended(outcome: Outcome, **facts: Any) -> RequestStats:
    return RequestStats(id="r1", outcome=outcome, duration_seconds=1, queue_seconds=1, **facts)


def as_dict(info: ModelInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__struct_fields__}


def test_each_fact_in_its_series() -> None:
    registry = CollectorRegistry()
    filled(registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"appliance_{name}", labels)

    model = {"model": "shelter"}
    assert value("time_to_first_token_seconds_sum", **model) == 90
    assert value("inter_token_seconds_count", **model) == 2
    assert value("request_duration_seconds_sum", **model, outcome="stop") == 100
    assert value("queue_seconds_count", **model) == 8
    assert value("prefill_seconds_sum", **model) == 80
    assert value("decode_seconds_count", **model) == 1
    assert value("prompt_tokens_total", **model, source="computed") == 456
    assert value("prompt_tokens_total", **model, source="cached") == 500
    assert value("generated_tokens_total", **model) == 6
    assert value("forced_tokens_total", **model) == 2
    assert value("speculation_drafted_tokens_total", **model) == 4
    assert value("speculation_accepted_tokens_total", **model) == 1
    assert value("requests_total", **model, outcome="cancelled") == 3
    assert value("failures_total", **model, code="engine_failed") == 1
    assert value("cancellations_total", **model, phase="prefill") == 1
    assert value("deadline_misses_total", **model, phase="queue") == 1
    assert value("rejections_total", reason="queue_full") == 1
    assert value("engine_restarts_total", **model, reason="hang") == 1
    assert value("model_load_seconds_sum", **model) == 1.5
    assert value("first_token_after_load_seconds_sum", **model) == 2.5
    assert value("model_unloads_total", model="second") == 1
    assert value("steps_total", **model, kind="decode") == 2
    assert value("step_seconds_total", **model, kind="prefill") == 2
    assert value("step_seconds_total", **model, kind="mixed") == 2
    assert value("memory_bandwidth_bytes_per_second", **model) == 2000
    assert value("memory_bandwidth_ratio", **model) == 0.5
    assert value("memory_bandwidth_peak_bytes_per_second") == 4000
    facts = {"kind": "chat", "quantization": "Q4_K_M", "architecture": "qwen3"}
    assert value("model_info", **model, sha256="a" * 64, template_sha256="b" * 64, **facts) == 1
    assert value("adapter_info", **model, adapter="polite", sha256="c" * 64) == 1
    assert value("model_kv_token_bytes", **model) == 114688
    assert value("model_kv_token_bytes", model="second") is None, "it is not loaded any more"
    assert (value("requests_running"), value("requests_waiting"), value("waiting_tokens")) == (2, 3, 700)
    assert (value("kv_use_ratio"), value("kv_running_ratio"), value("speculation_active")) == (0.8, 0.4, 1)
    assert [value("engine_state", state=state) for state in get_args(EngineState)].count(1) == 1
    assert (value("engine_state", state="draining"), value("engine_ready")) == (1, 0)
    assert (value("model_loaded", **model), value("model_loaded", model="minilm")) == (1, 0)
    assert value("model_loaded", model="shelter:polite") is None
    assert [value("documents", state=state) for state in ("known", "waiting", "refused")] == [5, 2, 1]
    assert (value("documents_erased"), value("documents_unerased")) == (4, 3)


def test_the_bandwidth_is_that_of_recent_steps() -> None:
    registry = CollectorRegistry()
    listener = Metrics(registry).of_model("shelter")
    for read_bytes in [1000] * 5 + [3000] * 500:
        listener.record_step(StepStats(seconds=1.0, prompt_tokens=0, generated_tokens=1, read_bytes=read_bytes))
    name = "appliance_memory_bandwidth_bytes_per_second"
    assert registry.get_sample_value(name, {"model": "shelter"}) == pytest.approx(3000, rel=0.01)
    assert registry.get_sample_value("appliance_memory_bandwidth_ratio", {"model": "shelter"}) is None, "no peak is known"


def test_series_exist_before_anything_happened() -> None:
    """So that a rate over the first rejection or restart is not lost."""
    registry = CollectorRegistry()
    Metrics(registry).of_model("shelter")
    assert registry.get_sample_value("appliance_rejections_total", {"reason": "queue_full"}) == 0
    assert registry.get_sample_value("appliance_engine_restarts_total", {"model": "shelter", "reason": "hang"}) == 0
    assert registry.get_sample_value("appliance_memory_bandwidth_peak_bytes_per_second") is None


def test_every_error_before_the_engine_has_its_reason() -> None:
    codes = {kind.api_code for kind in _subclasses(RequestError)} - {errors.TryAgain.api_code, errors.EngineFailed.api_code}
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for code in codes | set(REASONS):
        metrics.record_refusal(code)
    assert registry.get_sample_value("appliance_rejections_total", {"reason": "other"}) == 0
    metrics.record_refusal("engine_failed")
    assert registry.get_sample_value("appliance_rejections_total", {"reason": "other"}) == 1


def test_the_exposition_is_read_back_whole() -> None:
    """By the parser that Prometheus's own client has; every name and unit as the project wants them."""
    registry = CollectorRegistry()
    exposition = filled(registry).exposition().decode()
    families = list(text_string_to_metric_families(exposition))
    samples = {(sample.name, tuple(sorted(sample.labels.items()))) for family in families for sample in family.samples}
    expected = {
        (sample.name, tuple(sorted(sample.labels.items()))) for family in registry.collect() for sample in family.samples
    }
    assert samples == expected
    assert all(family.name.startswith("appliance_") and ":" not in family.name for family in families)
    assert all(family.documentation for family in families)
    assert "_created" not in exposition


words = st.text(max_size=30) | st.sampled_from([*get_args(Refusal), *REASONS, "stop", "prefill", "engine_failed"])


@given(
    names=st.lists(words, min_size=1, max_size=200),
    reasons=st.lists(words, max_size=50),
    facts=st.lists(st.tuples(words, words, words, words), max_size=50),
)
def test_labels_are_bounded_whatever_comes(
    names: list[str], reasons: list[str], facts: list[tuple[str, str, str, str]]
) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    listeners = [metrics.of_model(name) for name in names]
    for reason in reasons:
        metrics.record_refusal(reason)
        metrics.record_restart(names[0], reason)  # type: ignore[arg-type]
    for outcome, cancelled, missed, code in facts:
        listeners[-1].record_request(
            RequestStats(
                id="r1",
                outcome=outcome,  # type: ignore[arg-type]
                duration_seconds=1,
                queue_seconds=1,
                cancelled_in=cancelled,  # type: ignore[arg-type]
                missed_deadline_in=missed,  # type: ignore[arg-type]
                failure_code=code,
            )
        )
    seen: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            for label, text in sample.labels.items():
                seen.setdefault(label, set()).add(text)
    assert len(seen["model"]) <= MAX_MODELS + 1
    assert seen["model"] <= {*names, "other"}
    assert seen["reason"] <= {*get_args(Refusal), *get_args(RestartReason)}
    assert seen["outcome"] <= {*get_args(Outcome), "other"}
    assert seen["phase"] <= {*get_args(Phase), "other"}
    assert seen.get("code", set()) <= {*(kind.api_code for kind in _subclasses(RequestError)), "other"}
    list(text_string_to_metric_families(metrics.exposition().decode()))


def _subclasses(kind: type[RequestError]) -> set[type[RequestError]]:
    return {kind}.union(*(_subclasses(each) for each in kind.__subclasses__()))
