"""Writes the curve of a run, `loss.jsonl`: one line a step; and says, once each, what the curve shows while it grows.

The trainer's figures come in as it logs them; what is known here beside them is the machine's memory and the clock.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance import console
from appliance.training import curve, diagnose
from appliance.training.curve import LOSS, Point

CHECK_STEPS = (
    10  # between two looks at the curve, and a fiftieth of the run at least: a look costs in proportion to the steps
)


class Recorder:
    """The curve of one phase; in the first process only."""

    def __init__(self, folder: Path, label: str, steps: int, say: Callable[[str], None] = console.note) -> None:
        self._path, self._label, self._tell = folder / LOSS, label, say
        self._interval = max(CHECK_STEPS, steps // 50)
        self._points: list[Point] = curve.read(folder) if self._path.exists() else []
        self._said = self._known(self._points)
        self._at = time.monotonic()
        self._tokens: float | None = None

    def write(self, step: int, logs: dict[str, Any], rows: list[int]) -> None:
        """One more step, with the trainer's figures and the lines of its rows."""
        now = time.monotonic()
        seconds, self._at = now - self._at, now
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)}
        line: dict[str, Any] = {"step": step, **numbers, "seconds": round(seconds, 4), "memory_bytes": memory_bytes()}
        tokens = logs.get("num_tokens")
        if tokens is not None and self._tokens is not None and seconds > 0:
            line["tokens_per_second"] = round((tokens - self._tokens) / seconds, 1)
        self._tokens = tokens
        if rows:
            line["rows"] = rows
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._points.append(curve.point(line))
        if step % self._interval == 0 or "validation_loss" in line:
            self._say()

    def _say(self) -> None:
        """Says each finding once; a spike once each."""
        for finding in diagnose.diagnose(self._points, is_running=True):
            before = self._said.get(finding.kind)
            if before is None or (finding.kind == "spike" and finding.count > before):
                self._tell(f"{self._label}: {finding}")
            self._said[finding.kind] = finding.count

    @staticmethod
    def _known(points: list[Point]) -> dict[str, int]:
        """What an interrupted run has said already."""
        return {finding.kind: finding.count for finding in diagnose.diagnose(points, is_running=True)}


def memory_bytes() -> int:
    """The most that was held so far: of the card by torch's allocator, where one trains; else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and (on_card := torch.cuda.max_memory_allocated()):
        return int(on_card)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
