"""Asks a served model its own training questions over HTTP, as any client would, and reads the latency it measured.

Starts `appliance serve` on a free port of this machine and ends it again. Main entry: `ask_served_model`.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance import config
from appliance.data.questions import Question
from appliance.errors import ServerError
from appliance.evaluation.scores import chrf

READY = "serving "
STOP_SECONDS = 60.0
HISTOGRAMS = {
    "time to first token": "appliance_time_to_first_token_seconds",
    "between two tokens": "appliance_inter_token_seconds",
    "whole answer": "appliance_request_duration_seconds",
    "waiting in the queue": "appliance_queue_seconds",
}


@dataclass(frozen=True, slots=True)
class Answered:
    """A training question, what was answered and how close that is to what was trained for (chrF, 0 to 100)."""

    question: Question
    answer: str
    chrf: float


@dataclass(frozen=True, slots=True)
class Session:
    """All answers, and the mean seconds of each latency histogram that `/metrics` showed afterwards."""

    model: str
    answers: Sequence[Answered]
    latency_seconds: Mapping[str, float]
    tokens: Mapping[str, int]


def ask_served_model(questions: Sequence[Question]) -> Session:
    """Serves the promoted model, asks every question once and reads the metrics; raises `ServerError`."""
    import httpx

    with _server() as url, httpx.Client(base_url=url, timeout=None, trust_env=False) as client:
        model: str = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        answers = [_ask(client, model, question) for question in questions]
        samples = _samples(client.get("/metrics").raise_for_status().text)
    latency = {
        label: samples[f"{name}_sum"] / samples[f"{name}_count"]
        for label, name in HISTOGRAMS.items()
        if samples.get(f"{name}_count")
    }
    tokens = {kind: int(samples.get(f"appliance_{kind}_tokens_total", 0)) for kind in ("prompt", "generated")}
    return Session(model, answers, latency, tokens)


def _ask(client: Any, model: str, question: Question) -> Answered:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.question}],
        "documents": question.documents,
        "temperature": 0,
    }
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise ServerError(f"The server answered {response.status_code}: {response.text[:200]}")
    answer: str = response.json()["choices"][0]["message"]["content"]
    return Answered(question, answer, chrf(answer, question.answer))


@contextlib.contextmanager
def _server() -> Iterator[str]:
    # For a moment, for this machine, and whatever keys were made for the server that stays.
    command = [sys.executable, "-m", "appliance", "serve", "--port", "0", "--host", "127.0.0.1", "--insecure-no-key"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=config.quiet_environment())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith(READY):
            raise ServerError(f"`appliance serve` did not start (exit {process.wait()}); see above.")
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.communicate()  # and closes what it wrote to


def _samples(exposition: str) -> dict[str, float]:
    """Every sample of a Prometheus exposition, labels summed."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals
