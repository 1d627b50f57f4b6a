"""The exposition before Prometheus's own judge: syntax, names, units, help texts."""

import os
import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from appliance.gpu import Gpu
from appliance.machine_metrics import MachineCollector
from tests.serving.test_metrics import filled

PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")


def complaints(exposition: bytes) -> str:
    assert PROMTOOL is not None
    result = subprocess.run([PROMTOOL, "check", "metrics"], input=exposition, capture_output=True, check=False)
    return result.stdout.decode() + result.stderr.decode() + (f"exit {result.returncode}" if result.returncode else "")


def test_promtool_has_no_complaint() -> None:
    registry = CollectorRegistry()
    card = Gpu(index=0, vendor="amd", name='a "card"\n', memory_total_bytes=8, memory_used_bytes=2, utilisation_ratio=0.5)
    registry.register(MachineCollector(lambda: {"api": os.getpid()}, read_gpus=lambda: [card]))
    exposition = filled(registry).exposition()
    assert b"appliance_gpu_memory_used_bytes" in exposition
    assert b"appliance_process_memory_bytes" in exposition
    assert complaints(exposition) == ""


def test_promtool_does_complain() -> None:
    registry = CollectorRegistry()
    Counter("camelCase_milliseconds", "", registry=registry).inc()
    assert "camelCase" in complaints(generate_latest(registry))
