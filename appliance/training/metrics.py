"""A training run as Prometheus metrics, for as long as it runs: `exposed` serves them, `Phase` fills them.

Names begin as the server's do, so that one Prometheus and one set of dashboards have both.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server

from appliance import config
from appliance.errors import EnvironmentIncomplete
from appliance.machine_metrics import MachineCollector

RECENT: Final = 0.9  # weight that the time of a step keeps when the next one comes


class _Families:
    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series, which nothing reads
        self.registry = registry

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"appliance_training_{name}", about, ["phase"], registry=registry)

        self.active = gauge("active", "1 while a phase trains.")
        self.steps = gauge("steps", "Optimizer steps of a phase.")
        self.step = gauge("step", "The last optimizer step that was made.")
        self.loss = gauge("loss", "Loss of the last step.")
        self.learning_rate = gauge("learning_rate", "Learning rate of the last step.")
        self.step_seconds = gauge("step_seconds", "Time of recent steps.")
        self.seconds_left = gauge("left_seconds", "Time until the phase ends, if steps take what recent ones took.")
        self.reward = gauge("reward", "Mean reward of the last step's answers.")
        self.reward_spread = gauge("reward_spread", "Standard deviation of the last step's rewards.")
        self.flat_groups = gauge("flat_groups_ratio", "Groups of the last step whose answers all have the same reward.")
        self.last_step_at = gauge("last_step_timestamp_seconds", "When the last step ended, or the phase began.")
        about = "Tokens that were trained on, repetitions included."
        self.tokens = Counter("appliance_training_tokens", about, ["phase"], registry=registry)


_FAMILIES = _Families(CollectorRegistry())


class Phase:
    """One phase, from its first step to its end."""

    def __init__(self, name: str, steps: int, done: int) -> None:
        self._name, self._steps = name, steps
        self._at = time.monotonic()
        self._step_seconds: float | None = None
        self._tokens: float | None = None
        _FAMILIES.active.labels(name).set(1)
        _FAMILIES.steps.labels(name).set(steps)
        _FAMILIES.step.labels(name).set(done)
        _FAMILIES.last_step_at.labels(name).set(time.time())

    def take(self, step: int, loss: float, learning_rate: float | None, tokens: float | None) -> None:
        """A step has ended; `tokens` counts since the beginning of the phase, which may lie before an interruption."""
        name, now = self._name, time.monotonic()
        ran, self._at = now - self._at, now
        self._step_seconds = ran if self._step_seconds is None else RECENT * self._step_seconds + (1 - RECENT) * ran
        _FAMILIES.step.labels(name).set(step)
        _FAMILIES.loss.labels(name).set(loss)
        _FAMILIES.step_seconds.labels(name).set(self._step_seconds)
        _FAMILIES.seconds_left.labels(name).set(self._step_seconds * (self._steps - step))
        _FAMILIES.last_step_at.labels(name).set(time.time())
        if learning_rate is not None:
            _FAMILIES.learning_rate.labels(name).set(learning_rate)
        if tokens is not None:
            _FAMILIES.tokens.labels(name).inc(tokens - (self._tokens if self._tokens is not None else 0))
            self._tokens = tokens

    def judge(self, reward: float, spread: float, flat_groups: float) -> None:
        """How the answers of the step that has ended were judged."""
        _FAMILIES.reward.labels(self._name).set(reward)
        _FAMILIES.reward_spread.labels(self._name).set(spread)
        _FAMILIES.flat_groups.labels(self._name).set(flat_groups)

    def end(self) -> None:
        _FAMILIES.active.labels(self._name).set(0)
        _FAMILIES.seconds_left.labels(self._name).set(0)


@contextlib.contextmanager
def exposed(host: str, port: int | None) -> Iterator[None]:
    """Answers `GET /metrics` while the block runs; without a port nobody listens.

    Raises `EnvironmentIncomplete` when the address cannot be had.
    """
    if port is None:
        yield
        return
    machine = MachineCollector(lambda: {"training": os.getpid()}, folders={"artifacts": config.artifacts_root()})
    try:
        server, thread = start_http_server(port, addr=host, registry=_FAMILIES.registry)
    except OSError as error:
        raise EnvironmentIncomplete(
            f"The metrics of training cannot be served on {host}:{port} ({error.strerror}); name another --metrics-port."
        ) from error
    _FAMILIES.registry.register(machine)
    try:
        yield
    finally:
        _FAMILIES.registry.unregister(machine)
        server.shutdown()
        server.server_close()
        thread.join()
