"""Asks the memory plan about a model, with what this machine has just now. Loads nothing."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from appliance import config, device, gpu
from appliance.recipe import Serve
from appliance.serving import memory_plan
from appliance.serving.memory_plan import ModelToLoad, Plan
from appliance.serving.memory_prediction import MemoryPrediction
from appliance.serving.served_model import ServedModel

SNAPSHOTS = "snapshots"
ASK_LLAMA = """
from appliance.serving.llama import library
library.start()
raise SystemExit(not library.c.llama_supports_gpu_offload())
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """`explicit` names the settings that a person set, `folder` is where snapshots are kept."""

    explicit: Collection[str]
    folder: Path

    def plan(
        self, model: ServedModel, serve: Serve, others: Sequence[MemoryPrediction], freed: MemoryPrediction | None = None
    ) -> Plan:
        """`others` stay loaded, `freed` is loaded now and will not be. Raises `EnvironmentIncomplete` with the numbers."""
        machine = device.machine()
        if freed is not None:
            available = min(machine.memory_total_bytes, machine.memory_available_bytes + freed.anonymous_bytes)
            machine = dataclasses.replace(machine, memory_available_bytes=available)
        to_load = ModelToLoad(
            name=model.name,
            path=model.path,
            header=model.header,
            sha256=model.sha256,
            made_at=model.made_at,
            kind=model.kind,
            adapters=model.adapters,
        )
        cards = gpu.gpus()
        folder, note = self._snapshot_folder(serve)
        plan = memory_plan.plan(
            to_load,
            serve,
            machine,
            explicit=self.explicit,
            others=others,
            gpus=cards,
            can_offload=bool(cards) and _can_offload(),
            snapshot_folder=folder,
        )
        if note:
            settings = msgspec.structs.replace(plan.settings, notes=(*plan.settings.notes, note))
            plan = dataclasses.replace(plan, settings=settings)
        return plan

    def _snapshot_folder(self, serve: Serve) -> tuple[str | None, str]:
        """The folder, private and made; or None and why not: a read-only disk is no reason not to serve."""
        folder = (self.folder / SNAPSHOTS).absolute()
        if serve.snapshot_mib == 0:
            return None, ""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            return None, f"snapshot_mib: no prefixes are kept on disk; {folder} cannot be used ({error.strerror})."
        return str(folder), ""


@functools.cache
def _can_offload() -> bool:
    """Whether this llama.cpp was built for a GPU: asked of a process of its own, as this one must not load it."""
    return subprocess.run([sys.executable, "-c", ASK_LLAMA], env=config.quiet_environment(), check=False).returncode == 0
