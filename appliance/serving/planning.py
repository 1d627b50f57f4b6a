"""Asks the memory plan about a model, with what this machine has just now. Loads nothing."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from appliance import config, device, gpu
from appliance.device import Machine
from appliance.errors import ArtifactError
from appliance.recipe import Serve
from appliance.serving import memory_plan, tuning_file
from appliance.serving.memory_plan import ModelToLoad, Plan
from appliance.serving.memory_prediction import MemoryPrediction
from appliance.serving.served_model import ServedModel
from appliance.serving.tuning_file import MachineIdentity, TunedSettings

SNAPSHOTS = "snapshots"
ASK_LLAMA = """
from appliance.serving.llama import library
library.start()
raise SystemExit(not library.c.llama_supports_gpu_offload())
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """`explicit` names the settings that a person set, `folder` is where snapshots are kept, if it can be written to.

    `tuned` is a file of tuned settings that counts before those that lie beside the models. `machine` is what to plan for
    instead of this machine as it is at the moment.
    """

    explicit: Collection[str]
    folder: Path
    tuned: Path | None = None
    machine: Machine | None = None

    def plan(
        self,
        model: ServedModel,
        serve: Serve,
        others: Sequence[MemoryPrediction],
        freed: MemoryPrediction | None = None,
        *,
        trial: TunedSettings | None = None,
    ) -> Plan:
        """`others` stay loaded, `freed` is loaded now and will not be; a `trial` counts instead of what files say.

        Raises `EnvironmentIncomplete` with the numbers, `ArtifactError` for a damaged file of tuned settings.
        """
        machine = self.machine or device.machine()
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
            proven_reread_tokens=model.proven_reread_tokens,
        )
        cards = gpu.computing()
        folder, note = self._snapshot_folder(serve)
        tuned, tuned_note = (trial, "") if trial is not None else self._tuned_settings(model, machine)
        plan = memory_plan.plan(
            to_load,
            serve,
            machine,
            explicit=self.explicit,
            others=others,
            gpus=cards,
            can_offload=bool(cards) and gpu.is_compiled_for(cards) and _can_offload(),
            snapshot_folder=folder,
            tuned=tuned,
        )
        notes = (*filter(None, (tuned_note,)), *plan.settings.notes, *filter(None, (note,)))
        return dataclasses.replace(plan, settings=msgspec.structs.replace(plan.settings, notes=notes))

    def _tuned_settings(self, model: ServedModel, machine: Machine) -> tuple[TunedSettings | None, str]:
        """What was tuned for this model on this machine, and where that stands or why it is not used.

        Raises `ArtifactError` for a file that is damaged.
        """
        found = [(path, tuning) for path in self._tuned_paths(model) if (tuning := tuning_file.read(path)) is not None]
        note = ""
        for path, tuning in found:
            reason = tuning.belongs_elsewhere(model.sha256, MachineIdentity.of(machine))
            if reason is None:
                return tuning.settings, f"tuned settings: {tuning.settings}, unless set otherwise; {path}, {tuning.made_at}."
            note = note or f"tuned settings: {path} is not used, for {reason}; repeat `appliance bench serve --tune`."
        return None, note

    def _tuned_paths(self, model: ServedModel) -> Sequence[Path]:
        beside, named = tuning_file.path_of(model.path), self.tuned
        if named is None:
            return (beside,)
        if not named.is_file():
            raise ArtifactError(f"{named} does not exist; make it with `appliance bench serve --tune --output {named}`.")
        return (named, beside)

    @property
    def snapshot_folders(self) -> list[Path]:
        """Where prefixes may lie, the first choice first."""
        return list(dict.fromkeys((each / SNAPSHOTS).absolute() for each in (self.folder, config.cache_root())))

    def _snapshot_folder(self, serve: Serve) -> tuple[str | None, str]:
        """The folder, private and made, and what is to be said about it; None where none can be written to.

        A read-only disk is no reason not to serve: artifacts may be mounted so, and then the cache has what is kept.
        """
        if serve.snapshot_mib == 0:
            return None, ""
        refused = []
        for folder in self.snapshot_folders:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.chmod(0o700)
            except OSError as error:
                refused.append(f"{folder} cannot be used ({error.strerror})")
            else:
                return str(folder), f"snapshot_mib: prefixes are kept in {folder}; {refused[0]}." if refused else ""
        return None, f"snapshot_mib: no prefixes are kept on disk; {', and '.join(refused)}."


@functools.cache
def _can_offload() -> bool:
    """Whether this llama.cpp was built for a GPU: asked of a process of its own, as this one must not load it."""
    return subprocess.run([sys.executable, "-c", ASK_LLAMA], env=config.quiet_environment(), check=False).returncode == 0
