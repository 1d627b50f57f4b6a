"""A real Prometheus and Alertmanager on loopback, with the project's own configuration but for addresses and times."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS, ALERTMANAGER = shutil.which("prometheus"), shutil.which("prometheus-alertmanager")
WAIT_SECONDS = 60.0
INTERVAL = "1s"  # of scrapes and rules


class Prometheus:
    def __init__(self, url: str, alertmanager_url: str) -> None:
        self.started_at = time.time()
        self._http = httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False)
        self._alertmanager = httpx.Client(base_url=alertmanager_url, timeout=WAIT_SECONDS, trust_env=False)

    def history(self, expression: str) -> Sequence[Mapping[str, Any]]:
        """The series that an expression had at any second since the start. Raises for what is no PromQL."""
        arguments = {"query": expression, "start": self.started_at, "end": time.time(), "step": "1s"}
        found: list[Mapping[str, Any]] = self._get("/api/v1/query_range", **arguments)["result"]
        return found

    def value(self, expression: str) -> float | None:
        """The first value that it has now."""
        found = self._get("/api/v1/query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def targets(self) -> Mapping[str, str]:
        """The health of each job's target."""
        active = self._get("/api/v1/targets")["activeTargets"]
        return {each["labels"]["job"]: each["health"] for each in active}

    def rules(self) -> Sequence[Mapping[str, Any]]:
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def received_alerts(self) -> Mapping[str, Mapping[str, Any]]:
        """What Alertmanager was told, by the alert's name."""
        return {each["labels"]["alertname"]: each for each in self._alertmanager.get("/api/v2/alerts").json()}

    def close(self) -> None:
        self._http.close()
        self._alertmanager.close()

    def _get(self, path: str, **arguments: Any) -> Any:
        answer = self._http.get(path, params=arguments)
        assert answer.status_code == 200, f"{arguments}: {answer.text}"
        return answer.json()["data"]


@contextlib.contextmanager
def running(folder: Path, targets: Mapping[str, int], metrics_key: Path) -> Iterator[Prometheus]:
    """Scrapes the ports of `targets`, by job; everything lies in `folder`, and ends with the block."""
    assert PROMETHEUS is not None
    assert ALERTMANAGER is not None
    own, alerts = free_port(), free_port()
    config = _configured({**targets, "prometheus": own}, alerts, metrics_key)
    folder.mkdir()
    for name in ("rules.yml", "vllm.yml"):
        shutil.copy(FOLDER / "prometheus" / name, folder)
    (folder / "alerts.yml").write_text(yaml.safe_dump(_at_once(FOLDER / "prometheus/alerts.yml")))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    storage = [f"--storage.tsdb.path={folder / 'data'}", f"--config.file={folder / 'prometheus.yml'}"]
    receiver = [f"--config.file={FOLDER / 'alertmanager/alertmanager.yml'}", f"--storage.path={folder / 'alerts'}"]
    listen = "--web.listen-address=127.0.0.1:"
    with (
        _process(ALERTMANAGER, *receiver, f"{listen}{alerts}", "--cluster.listen-address=", folder=folder),
        _process(PROMETHEUS, *storage, f"{listen}{own}", folder=folder),
    ):
        for port in (alerts, own):
            _wait_until_ready(port)
        with contextlib.closing(Prometheus(f"http://127.0.0.1:{own}", f"http://127.0.0.1:{alerts}")) as prometheus:
            yield prometheus


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _configured(targets: Mapping[str, int], alertmanager: int, metrics_key: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager}"]
    jobs = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    assert {job["job_name"] for job in jobs} == targets.keys()
    for job in jobs:
        job["static_configs"][0]["targets"] = [f"127.0.0.1:{targets[job['job_name']]}"]
        if "authorization" in job:
            job["authorization"]["credentials_file"] = str(metrics_key)
    config["scrape_configs"] = jobs
    return config


def _at_once(path: Path) -> dict[str, Any]:
    """The alerts without the time for which they must last."""
    rules: dict[str, Any] = yaml.safe_load(path.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    return rules


@contextlib.contextmanager
def _process(*command: str, folder: Path) -> Iterator[None]:
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            yield
        finally:
            process.terminate()
            process.wait(WAIT_SECONDS)


def _wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/-/ready", trust_env=False).status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)
