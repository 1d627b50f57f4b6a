"""What Prometheus sees of a training run."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from appliance.errors import EnvironmentIncomplete
from appliance.training import metrics
from tests import tiny_recipe
from tests.running import environment, start


def scrape(port: int) -> dict[tuple[str, str], float]:
    """Values by name and phase."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(sample.name, sample.labels.get("phase", "")): sample.value for family in families for sample in family.samples}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_phase_tells_where_it_is(root: Path) -> None:
    root.mkdir()
    port = free_port()
    with metrics.exposed("127.0.0.1", port):
        phase = metrics.Phase("another", steps=10, done=4)
        phase.take(5, 1.5, 0.001, 900.0)
        phase.take(6, 1.25, 0.0005, 1000.0)
        found = scrape(port)
        said = {name: value for (name, of), value in found.items() if of == "another"}
        assert said["appliance_training_active"] == 1
        assert (said["appliance_training_step"], said["appliance_training_steps"]) == (6, 10)
        assert (said["appliance_training_loss"], said["appliance_training_learning_rate"]) == (1.25, 0.0005)
        assert said["appliance_training_left_seconds"] == pytest.approx(4 * said["appliance_training_step_seconds"])
        assert time.time() - said["appliance_training_last_step_timestamp_seconds"] < 60
        assert said["appliance_training_tokens_total"] == 1000
        assert found["appliance_disk_free_bytes", ""] > 0
        assert any(name == "appliance_process_memory_bytes" for name, _ in found)
        phase.end()
        assert scrape(port)["appliance_training_active", "another"] == 0
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(EnvironmentIncomplete, match=f"127.0.0.1:{port} .*name another --metrics-port"),
            metrics.exposed("127.0.0.1", port),
        ):
            raise AssertionError


def test_a_run_can_be_scraped(tmp_path: Path, root: Path) -> None:
    recipe, port = tiny_recipe.write(tmp_path / "recipe"), free_port()
    process = start(root, "train", recipe, "--phase", "base", "--metrics-port", str(port))
    seen: list[dict[tuple[str, str], float]] = []
    while process.poll() is None:
        try:
            found = scrape(port)
        except OSError:  # not yet, or not any more
            time.sleep(0.02)
            continue
        if ("appliance_training_loss", "starter") in found:
            seen.append(found)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    steps = [found["appliance_training_step", "starter"] for found in seen]
    assert steps == sorted(steps)
    assert steps[-1] > 0
    assert seen[-1]["appliance_training_tokens_total", "starter"] > 0
    assert seen[-1]["appliance_training_loss", "starter"] > 0


def test_the_whole_path_can_be_scraped_as_compose_asks(tmp_path: Path, root: Path) -> None:
    """`appliance run` hands the environment to each `appliance train` that it starts."""
    recipe, port = tiny_recipe.write(tmp_path / "recipe"), free_port()
    asked = {"APPLIANCE_METRICS_HOST": "127.0.0.1", "APPLIANCE_METRICS_PORT": str(port)}
    command = [sys.executable, "-m", "appliance", "run", str(recipe), "--set", "starter.epochs=100000"]
    with subprocess.Popen(command, env={**environment(root), **asked}, stdout=subprocess.DEVNULL) as process:
        found: dict[tuple[str, str], float] = {}
        while ("appliance_training_loss", "starter") not in found:
            assert process.poll() is None
            time.sleep(0.05)
            with contextlib.suppress(OSError):  # not yet
                found = scrape(port)
        process.terminate()
