"""A real Prometheus beside a real server under load and a real training run: every expression of every dashboard and rule
has data or says why not, quantiles agree with what clients saw, and faults reach a real Alertmanager.
"""

import bisect
import dataclasses
import itertools
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml

from appliance.serving.metrics import FIRST_TOKEN_BUCKETS, REQUEST_BUCKETS, TOKEN_BUCKETS
from deploy import pictures, vllm
from deploy.dashboards import DASHBOARDS
from deploy.panels import Panel, Query
from tests import tiny_gguf, tiny_recipe
from tests.deploy import prometheus_process
from tests.deploy.prometheus_process import ALERTMANAGER, FOLDER, PROMETHEUS, WAIT_SECONDS, Prometheus, free_port
from tests.running import start
from tests.serving.serving_process import CHAT, RunningServer, chat_body, running_server, until

pytestmark = pytest.mark.skipif(
    PROMETHEUS is None or ALERTMANAGER is None,
    reason="Prometheus or Alertmanager is not installed (Debian packages prometheus and prometheus-alertmanager)",
)
CONTEXT_TOKENS = 8192
FLAGS = ("--slots", "2", "--queue-requests", "2", "--context-tokens", str(CONTEXT_TOKENS))
LONG = "abcd " * 800  # some 4,000 tokens: what reading them takes is more than what it takes a client to ask
LONG_QUESTIONS = 12
SYSTEM = {"role": "system", "content": "You are kind. " * 20}
BUCKETS = {
    "time_to_first_token_seconds": FIRST_TOKEN_BUCKETS,
    "request_duration_seconds": REQUEST_BUCKETS,
    "inter_token_seconds": TOKEN_BUCKETS,
}
# The slowest of the gaps, a few milliseconds, are those in which either side had to wait for a core.
QUANTILES = [(name, each) for name in BUCKETS for each in (0.5, 0.95) if (name, each) != ("inter_token_seconds", 0.95)]
CAUSED = {"Refused at the door": {"queue_full", "unauthorized"}}  # by `rush`, so that no reason for its absence counts
EXPRESSIONS = [
    pytest.param(board.uid, panel, query, id=f"{name}: {panel.title} {number}")
    for name, board in DASHBOARDS.items()
    for panel in board.panels
    for number, query in enumerate(panel.queries)
]
RECORDED = [
    rule["record"]
    for name in ("rules.yml", "vllm.yml")
    for group in yaml.safe_load((FOLDER / "prometheus" / name).read_text())["groups"]
    for rule in group["rules"]
]


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """One streamed answer, as its client saw it."""

    first_token_seconds: float
    seconds: float
    inter_token_seconds: Sequence[float]


@dataclasses.dataclass(frozen=True, slots=True)
class Observed:
    """`reported` has quantiles by metric, as they were when clients had seen `seen` and no other answer: of all that the
    histogram counted, and as the rule recorded it.
    """

    prometheus: Prometheus
    server: RunningServer
    seen: Sequence[Seen]
    reported: Mapping[tuple[str, float], tuple[float, float]]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("observed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_gguf, "CONTEXT_TOKENS", CONTEXT_TOKENS)
        model = tiny_gguf.write(folder / "tiny.gguf")
    recipe = tiny_recipe.write(folder / "recipe")
    training_port, keys = free_port(), folder / "keys"
    # Each token leaves by itself, so that clients see the gaps between tokens that the server counts.
    environ = {"APPLIANCE_MAKE_KEYS": str(keys), "APPLIANCE_SERVE_STREAM_SECONDS": "0"}
    long = ("--set", "starter.epochs=100000")
    with running_server(model, *FLAGS, root=folder / "serving", environ=environ) as server, ExitStack() as later:
        server.http.headers["Authorization"] = f"Bearer {(keys / 'chat.key').read_text().strip()}"
        targets = {"appliance": int(server.url.rpartition(":")[2]), "training": training_port}
        with prometheus_process.running(folder / "prometheus", targets, keys / "metrics.key") as prometheus:
            until(lambda: prometheus.value("sum(appliance_requests_total)") is not None)
            seen = [streamed(server, f"{number} {LONG}") for number in range(LONG_QUESTIONS)]
            until(lambda: prometheus.value("sum(appliance_requests_total)") == len(seen))
            time.sleep(3)  # rules, a second later
            reported = {(name, each): quantiles(prometheus, name, each) for name, each in QUANTILES}
            # Only now: beside a training, either side of an answer may wait for a core while the other counts on.
            run = ("train", recipe, "--phase", "base", *long, "--metrics-port", str(training_port))
            training = start(folder / "training", *run)
            later.callback(ended, training)
            rush(server, prometheus)
            until(lambda: prometheus.value("max(appliance_training_tokens_total)") is not None)
            time.sleep(3)  # rules that rest on rules, each a second later
            yield Observed(prometheus, server, [each for each in seen if each is not None], reported)


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def rush(server: RunningServer, prometheus: Prometheus) -> None:
    """Twelve seconds of more questions than slots and queue hold, wrong keys and empty requests; longer on a machine that is
    so busy that Prometheus comes too seldom to see them.
    """
    ends_at = time.monotonic() + 12
    wanted = {reason for reasons in CAUSED.values() for reason in reasons}
    while time.monotonic() < ends_at or not wanted <= refused(prometheus):
        assert time.monotonic() < ends_at + WAIT_SECONDS
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: streamed(server, f"question {number}"), range(8)))
        httpx.post(f"{server.url}{CHAT}", json=chat_body(), headers={"Authorization": "Bearer wrong"}, trust_env=False)
        server.http.post(CHAT, json={"messages": []})


def refused(prometheus: Prometheus) -> set[str]:
    found = prometheus.history(filled_in("sum by (reason) (rate(appliance_rejections_total[$__rate_interval])) > 0"))
    return {each["metric"]["reason"] for each in found}


def quantiles(prometheus: Prometheus, name: str, quantile: float) -> tuple[float, float]:
    counted = f"histogram_quantile({quantile}, sum by (le) (appliance_{name}_bucket))"
    return known(prometheus, counted), known(prometheus, f"model:appliance_{name}:p{quantile * 100:.0f}_5m")


def known(prometheus: Prometheus, expression: str) -> float:
    """Its value, as soon as it has one: a scrape that came too late leaves a gap."""
    found: list[float | None] = []
    until(lambda: found.append(prometheus.value(expression)) or found[-1] is not None)
    assert found[-1] is not None
    return found[-1]


def streamed(server: RunningServer, question: str) -> Seen | None:
    """None for one that was refused."""
    messages = [SYSTEM, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 8, "stream": True, "ignore_eos": True}
    started, at = time.monotonic(), []
    with server.http.stream("POST", CHAT, json=body) as answer:
        for line in answer.iter_lines():
            if answer.status_code == 200 and line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"]
                if delta and delta[0]["delta"].get("content"):
                    at.append(time.monotonic())
    if not at:
        return None
    gaps = [after - before for before, after in itertools.pairwise(at)]
    return Seen(at[0] - started, time.monotonic() - started, gaps)


def filled_in(expression: str) -> str:
    """With Grafana's variables as it would fill them in."""
    return expression.replace("$instance", ".*").replace("$__rate_interval", "20s")


def test_everything_is_scraped(observed: Observed) -> None:
    until(lambda: set(observed.prometheus.targets().values()) == {"up"})
    assert observed.prometheus.targets().keys() == {"appliance", "training", "prometheus"}


@pytest.mark.parametrize(("board", "panel", "query"), EXPRESSIONS)
def test_panel_has_data_or_says_why_not(board: str, panel: Panel, query: Query, observed: Observed) -> None:
    series = observed.prometheus.history(filled_in(query.expr))
    if panel.title in CAUSED:
        assert CAUSED[panel.title] <= {each["metric"]["reason"] for each in series}
    assert series or query.may_be_empty, f"{board}, {panel.title}: {query.expr}"
    for label in [part.partition("}}")[0] for part in query.legend.split("{{")[1:]]:
        assert all(label in each["metric"] for each in series), f"{panel.title}: the legend's {label} is no label"


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_rule_has_data(name: str, observed: Observed) -> None:
    until(lambda: observed.prometheus.history(name))
    if name.startswith("vllm:"):
        assert all(each["metric"]["model_name"] == "tiny" for each in observed.prometheus.history(name))


def test_rules_have_no_error(observed: Observed) -> None:
    rules = observed.prometheus.rules()
    assert {rule["name"] for rule in rules} > {*RECORDED, "ApplianceDown"}
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []


def test_vllm_names_count_the_same(observed: Observed) -> None:
    pairs = {"vllm:generation_tokens_total": "appliance_generated_tokens_total"}
    pairs |= {f"vllm:{theirs}_count": f"appliance_{ours}_count" for theirs, ours in vllm.HISTOGRAMS.items()}
    for theirs, ours in pairs.items():
        until(lambda theirs=theirs, ours=ours: value(observed, f"sum({theirs})") == value(observed, f"sum({ours})"))  # type: ignore[misc]
        assert value(observed, f"sum({theirs})")


def value(observed: Observed, expression: str) -> float | None:
    return observed.prometheus.value(expression)


@pytest.mark.parametrize(("name", "quantile"), QUANTILES)
def test_quantiles_are_those_that_clients_saw(name: str, quantile: float, observed: Observed) -> None:
    """As exactly as buckets can tell: within the bucket, or the next. As counted, and as rules and dashboards show it."""
    assert len(observed.seen) == LONG_QUESTIONS
    values = {
        "time_to_first_token_seconds": [each.first_token_seconds for each in observed.seen],
        "request_duration_seconds": [each.seconds for each in observed.seen],
        "inter_token_seconds": [gap for each in observed.seen for gap in each.inter_token_seconds],
    }[name]
    by_client = sorted(values)[math.ceil(quantile * len(values)) - 1]  # of this rank is histogram_quantile's, too
    for what, reported in zip(("counted", "recorded"), observed.reported[name, quantile], strict=True):
        places = [bisect.bisect_left(BUCKETS[name], each) for each in (reported, by_client)]
        assert abs(places[0] - places[1]) <= 1, f"p{quantile}: {reported} {what}, {by_client} seen"


def test_dashboards_can_be_drawn(observed: Observed, tmp_path: Path) -> None:
    """DASHBOARD_PICTURES names a folder for them: docs/pictures has such a run."""
    folder = Path(os.environ.get("DASHBOARD_PICTURES", tmp_path))
    for name, board in DASHBOARDS.items():
        pictures.draw(board, lambda expression: observed.prometheus.history(filled_in(expression)), folder / f"{name}.png")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_faults_reach_the_alertmanager(observed: Observed) -> None:
    """The last one: it ends the server."""
    received = observed.prometheus.received_alerts
    until(lambda: "ApplianceQueueFull" in received())
    assert "ApplianceDown" not in received()
    observed.server.process.kill()
    until(lambda: "ApplianceDown" in received())
    annotations = received()["ApplianceDown"]["annotations"]
    assert "does not answer at all" in annotations["summary"]
    assert annotations["runbook"] == "docs/runbook.md#appliancedown"
