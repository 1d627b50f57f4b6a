"""What `appliance bench serve` measures: a model, and how `appliance serve` would load it on this machine now."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance import __version__, config
from appliance.commands.serve import serve_settings
from appliance.errors import EnvironmentIncomplete, ModelFileError
from appliance.recipe import Recipe, Serve

if TYPE_CHECKING:
    from appliance.serving import tuning
    from appliance.serving.engine_settings import EngineSettings
    from appliance.serving.memory_plan import Plan
    from appliance.serving.speed_files import OtherFile
    from appliance.serving.speed_meter import Task
    from appliance.serving.speed_report import Setting
    from appliance.serving.tuning_file import TunedSettings

SLOT_MEMORY_RATIO = 0.5  # of what is free: more slots are no reason to fill the machine


class Subject:
    """A model, and how `appliance serve` would load it here and now."""

    def __init__(self, named: str | None) -> None:
        from appliance import device
        from appliance.serving import served_model
        from appliance.serving.digests import Digests
        from appliance.serving.planning import Planner
        from appliance.serving.tried import Tried

        self.root = config.artifacts_root()
        folder = self.root if self.root.is_dir() else config.cache_root()
        digests = Digests(folder)
        self.model = served_model.find(named, self.root, digests)
        if self.model.kind != "chat":
            raise ModelFileError(f"{self.model.path} is a model for {self.model.kind}; name one that writes text.")
        self.machine = device.machine()
        self.tried = Tried(folder, digests)
        if self.model.is_foreign:
            self.tried.check(self.model.path)
        self._environment = config.environment_table(Recipe).get("serve", {})
        # No prefixes on disk, no system prompts: they would be read before anything is measured.
        self._serve = dataclasses.replace(serve_settings(self.model.serve, {}), snapshot_mib=0, system_prompts=())
        # For the memory that is free now: what measures takes some of it.
        self._planner = Planner(explicit=self._environment, folder=folder, machine=self.machine)

    @property
    def head(self) -> str:
        from appliance.serving import tuning_file

        header, machine = self.model.header, self.machine
        cores = f"{machine.usable_cores} of its cores, {machine.physical_cores} physical"
        return f"{self.model.name} ({header.quantization}) on {tuning_file.cpu_name()}, {cores}"

    def facts(self) -> dict[str, Any]:
        from appliance.serving import tuning_file

        return {
            "model": {"name": self.model.name, "path": self.model.path, "sha256": self.model.sha256},
            "machine": {
                "cpu": tuning_file.cpu_name(),
                "usable_cores": self.machine.usable_cores,
                "physical_cores": self.machine.physical_cores,
                "memory_total_bytes": self.machine.memory_total_bytes,
            },
            "versions": {"appliance": __version__, "llama_cpp_python": tuning_file.library_version()},
        }

    def plan(self, trial: "TunedSettings | None" = None) -> "Plan":
        return self._planner.plan(self.model, self._serve, (), trial=trial)

    def needed_bytes(self, settings: "EngineSettings") -> int:
        """For a process with these settings, which may be about another file."""
        from appliance.serving import gguf_file, memory_plan

        path = Path(settings.model_path)
        header = self.model.header if path == self.model.path.absolute() else gguf_file.check(path)
        return memory_plan.needed_bytes(header, settings, self.machine)

    def sources(self, plan: "Plan") -> "dict[str, Setting]":
        """Who chose each setting of a plan."""
        from appliance.serving import speed_report

        default = Serve()
        stepped_down = {note.partition(":")[0] for note in plan.settings.notes}
        found = {}
        for name, value in speed_report.settings_of(plan.settings).items():
            is_recipes = getattr(self._serve, name, None) != getattr(default, name, None)
            ways = {
                "memory": name in stepped_down,
                "environment": name in self._environment,
                "tuned": name in plan.tuned,
                "recipe": is_recipes,
            }
            found[name] = speed_report.Setting(value=value, source=next((way for way in ways if ways[way]), "default"))
        return found

    def to_tune(self) -> "tuning.Subject":
        """Starts from what the server would do without any tuning, an earlier one included."""
        from appliance.serving import tuning
        from appliance.serving.memory_prediction import can_quantize_kv, repackable_bytes
        from appliance.serving.tuning_file import TunedSettings

        default = Serve()
        undecided = {
            name
            for name in TunedSettings.__struct_fields__
            if name not in self._environment and getattr(self._serve, name, None) == getattr(default, name, None)
        }
        return tuning.Subject(
            settings=self.plan(TunedSettings()).settings,
            undecided=undecided,
            usable_cores=self.machine.usable_cores,
            physical_cores=self.machine.physical_cores,
            can_repack=repackable_bytes(self.model.header, self.machine.cpu_features) > 0,
            can_quantize_kv=can_quantize_kv(self.model.header),
            fits=self._fits,
        )

    @contextlib.contextmanager
    def laboratory(self, settings: "EngineSettings") -> "Iterator[tuning.Measure]":
        """Something that measures settings, of this file and others, in processes that fit into memory beside each other.

        Raises `EnvironmentIncomplete` when not even one does.
        """
        from appliance.serving import tuning
        from appliance.serving.memory_prediction import mib
        from appliance.serving.speed_meter import Laboratory

        free_bytes, needed_bytes = self.plan().free_bytes, self.needed_bytes(tuning.with_room(settings))
        if needed_bytes > free_bytes:
            raise EnvironmentIncomplete(
                f"Tuning {self.model.name} needs {mib(needed_bytes)} MiB, {mib(free_bytes)} MiB are free; end the server or "
                "other programs, or tune a smaller model."
            )
        with Laboratory(free_bytes, self.needed_bytes) as laboratory:

            def measure(settings: "EngineSettings", task: "Task") -> float:
                return laboratory.meter(tuning.with_room(settings)).seconds(task)

            yield measure

    def require_usable(self, file: "OtherFile", settings: "EngineSettings") -> None:
        """Raises `ModelFileError` for a file that is damaged, `EnvironmentIncomplete` for one that is too large."""
        import msgspec

        from appliance.serving import tuning
        from appliance.serving.memory_prediction import mib

        needed_bytes = self.needed_bytes(tuning.with_room(msgspec.structs.replace(settings, model_path=str(file.path))))
        if needed_bytes > (free_bytes := self.plan().free_bytes):
            raise EnvironmentIncomplete(f"it needs {mib(needed_bytes)} MiB, {mib(free_bytes)} MiB are free.")
        if file.is_foreign:
            self.tried.check(file.path)

    def _fits(self, tuned: "TunedSettings") -> bool:
        plan = self.plan(tuned)
        if not tuned.named().keys() <= plan.tuned:
            return False
        return tuned.slots is None or plan.memory.total_bytes <= SLOT_MEMORY_RATIO * plan.free_bytes
