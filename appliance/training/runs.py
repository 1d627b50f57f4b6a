"""Training runs that lie among the artifacts, finished or not: found, summed up, and set side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.errors import ArtifactError
from appliance.page import Part, Section, Table, curves, html
from appliance.training import curve, run_files
from appliance.training.curve import LOSS
from appliance.training.lock import LOCK

KINDS = ("adapter", "base")  # a starter is trained too
# Figures of a manifest that say how a run went, as `compare` shows them; each phase has its own.
FIGURES = (
    *("rows", "steps", "final_loss", "best_validation_loss", "kept_step"),
    *("accuracy_before", "accuracy_after", "margin_before_nats", "margin_after_nats", "reward_accuracy"),
    *("reward_first", "reward_last", "reward_spread", "flat_groups"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run. `manifest` and `locked` are empty where it is not finished, or has no lock file."""

    path: Path
    manifest: dict[str, Any]
    locked: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(artifacts.PARTIAL)

    @property
    def is_finished(self) -> bool:
        return bool(self.manifest)

    def summary(self) -> dict[str, Any]:
        """One line of `runs list`."""
        results = self.manifest.get("results", {})
        points = curve.read(self.path)
        seconds = sum(point.seconds or 0 for point in points) or self.manifest.get("seconds")
        validations = [point.validation_loss for point in points if point.validation_loss is not None]
        machine = self.locked.get("machine", {})
        return {
            "name": self.name,
            "phase": self.locked.get("phase") or self.name.rpartition("-")[0].rpartition("-")[2],
            "state": "finished" if self.is_finished else "unfinished",
            "made_at": self.manifest.get("made_at"),
            "rows": results.get("rows"),
            "steps": results.get("steps", len(points)),
            "final_loss": results.get("final_loss", points[-1].loss if points else None),
            "reward": results.get("reward_last", points[-1].reward if points else None),
            "validation_loss": results.get("best_validation_loss", min(validations, default=None)),
            "seconds": None if seconds is None else round(seconds, 1),
            "machine": f"{machine['device']} ({machine['threads']} threads)" if machine else None,
        }


def found(root: Path) -> list[Run]:
    """The runs that trained an adapter, the newest last; those that were interrupted, or train now, among them."""
    folders = [path.parent for path in (root / "adapter").glob(f"*/{LOSS}")]
    return [load(folder) for folder in sorted(folders, key=lambda each: (each / LOSS).stat().st_mtime)]


def load(folder: Path) -> Run:
    manifest = dict(artifacts.load(folder).manifest) if (folder / artifacts.MANIFEST).is_file() else {}
    lock = folder / LOCK
    return Run(folder, manifest, json.loads(lock.read_text(encoding="utf-8")) if lock.is_file() else {})


def find(name: str, root: Path) -> Run:
    """A run by its folder, its name or its id; also one that is not finished. Raises `ArtifactError`."""
    places = [Path(name), root / name, *(root / kind / name for kind in KINDS)]
    whole = [path.resolve() for path in places]
    for place in (each for path in whole for each in (path, path.parent / f"{path.name}{artifacts.PARTIAL}")):
        if (place / LOSS).is_file():
            return load(place)
    raise ArtifactError(f"There is no training run {name} in {root}; `appliance runs list` says which there are.")


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, by their dotted names; None where a run does not have it."""
    settings = [_settings(run) for run in runs]
    names = sorted({name for each in settings for name in each})
    rows = {name: [each.get(name) for each in settings] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def figures(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """What the runs measured, side by side; left out is what none of them has."""
    rows = {name: [run.manifest.get("results", {}).get(name) for run in runs] for name in FIGURES}
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def compared_page(runs: Sequence[Run]) -> str:
    """The curves of all runs in one chart each, and what differs."""
    lines = {run.name: curve.read_lines(run.path) for run in runs}
    parts: list[Part] = []
    for title, key in (("Loss", "loss"), ("Validation loss", "validation_loss"), ("Reward", "reward")):
        series = {name: points for name, each in lines.items() if (points := run_files.series(each, key))}
        if series:
            parts.append(curves(series, x="step", y=title.lower(), caption=f"{title}, by step"))
    names = [run.name for run in runs]
    tables: list[Part] = [
        Table(("", *names), [(name, *map(shown, values)) for name, values in rows.items()], caption)
        for caption, rows in (("Settings that differ", differing(runs)), ("Figures", figures(runs)))
        if rows
    ]
    return html("Training runs side by side", [Section("Curves", parts), Section("Settings and figures", tables)])


def shown(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(run: Run) -> dict[str, Any]:
    """The resolved recipe where there is a lock file, else the settings in the manifest; and the hashes of the data."""
    table = {**run.locked.get("recipe", run.manifest.get("config", {}))}
    columns = table.pop("data", {}).get("columns")  # not where the files lay: what was in them counts, and how it was read
    table["data"] = {"columns": columns}
    hashes = {f"data.{name}": sha256[:12] for name, sha256 in run.locked.get("data", {}).items()}
    return {**_flat(table, ""), **hashes}


def _flat(table: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
