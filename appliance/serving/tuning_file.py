"""`<model>.gguf.tuned.json`: the settings that were found fastest for one model on one machine, and what was measured.

Written beside the model by `appliance bench serve --tune`, read by `appliance serve`. It is no part of an artifact: the
manifest does not list it, and whoever copies the folder elsewhere copies a file that says where it belongs. Measures
nothing.
"""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from appliance import artifacts, config, device
from appliance.device import Machine
from appliance.errors import ArtifactError
from appliance.recipe import Serve
from appliance.serving.decoder import LONGEST_CHUNK_TOKENS, SHORTEST_CHUNK_TOKENS

SCHEMA = 1
CPU_FIELDS = ("model name", "Model", "Hardware", "CPU implementer", "CPU part")  # of /proc/cpuinfo: x86, and ARM's kinds

Choice = Literal["on", "off"]


class TunedSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """By the names of a recipe's `[serve]`; None is what the server would take by itself."""

    threads: int | None = None
    prefill_threads: int | None = None
    chunk_tokens: int | None = None
    mmap: Choice | None = None
    repack: Choice | None = None
    slots: int | None = None

    def named(self) -> dict[str, Any]:
        """Those that are set."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.named().items()) or "nothing but the defaults"


class MachineIdentity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a measurement depends on. Cores are those that may be used, by affinity and quota."""

    cpu: str
    usable_cores: int
    physical_cores: int
    features: tuple[str, ...]

    @classmethod
    def of(cls, machine: Machine) -> "MachineIdentity":
        return cls(
            cpu=cpu_name(),
            usable_cores=machine.usable_cores,
            physical_cores=machine.physical_cores,
            features=tuple(sorted(machine.cpu_features)),
        )


class Trial(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One value of a setting beside the one before it, in rounds: seconds for the same work."""

    setting: str
    value: int | str
    instead_of: int | str
    work: str
    seconds: tuple[float, ...]
    seconds_before: tuple[float, ...]
    gain: float  # median over the rounds of `seconds_before` / `seconds`, less 1
    spread: float  # between the quartiles of the same
    is_taken: bool
    reason: str


class FileTrial(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another file of the same model, with the tuned settings: tokens per second, one value for each round."""

    quantization: str
    size_bytes: int
    remark: str
    reading: tuple[float, ...]
    writing: tuple[float, ...]


class Tuning(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    schema: int = SCHEMA
    settings: TunedSettings
    model: str
    model_sha256: str
    machine: MachineIdentity
    llama_cpp_python: str
    appliance: str
    made_at: str
    seconds: float = 0.0
    rule: str
    trials: tuple[Trial, ...]
    proposals: tuple[str, ...] = ()  # what would change answers, and is for a person to decide
    notes: tuple[str, ...] = ()
    files: tuple[FileTrial, ...] = ()  # the model's own first
    others_ratio: float = 0.0  # of the machine's CPU time, taken by other programs meanwhile

    def belongs_elsewhere(self, sha256: str, machine: MachineIdentity) -> str | None:
        """Why these settings are not for this model on this machine; None when they are."""
        if self.model_sha256 != sha256:
            return f"it was measured for another model (sha256 {self.model_sha256[:12]}…, this one is {sha256[:12]}…)"
        if self.llama_cpp_python != (version := library_version()):
            return f"it was measured with llama-cpp-python {self.llama_cpp_python}, this is {version}"
        for field in MachineIdentity.__struct_fields__:
            there, here = getattr(self.machine, field), getattr(machine, field)
            if there != here:
                said = "other CPU features" if field == "features" else f"{field} {there}, here {here}"
                return f"it was measured on another machine ({said})"
        return None


def path_of(model: Path) -> Path:
    return model.with_name(model.name + artifacts.TUNED)


def read(path: Path) -> Tuning | None:
    """None where there is none; raises `ArtifactError` for a file that is damaged or of another schema."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; {_remedy(path)}") from error
    try:
        tuning = msgspec.json.decode(data, type=Tuning)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {_remedy(path)}") from error
    if problems := _problems(tuning):
        raise ArtifactError(f"{path} is damaged ({', '.join(problems)}); {_remedy(path)}")
    return tuning


def write(path: Path, tuning: Tuning) -> None:
    """Raises `ArtifactError` for a folder that cannot be written to."""
    text = msgspec.json.format(msgspec.json.encode(tuning), indent=2).decode() + "\n"
    try:
        artifacts.write_atomically(path, text)
    except OSError as error:
        raise not_writable(path.parent, error) from error


def not_writable(folder: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"The settings cannot be written to {folder} ({error.strerror}); name a file elsewhere with --output, and tell the "
        "server of it with `appliance serve --tuned FILE`."
    )


def library_version() -> str:
    return importlib.metadata.version("llama-cpp-python")


def cpu_name(proc: Path = device.PROC) -> str:
    """As the kernel names the first core; on ARM, where there is no name, its implementer and part."""
    found: dict[str, str] = {}
    for line in (device.read_text(proc / "cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return " ".join(found[name] for name in CPU_FIELDS if name in found) or "unknown"


def _problems(tuning: Tuning) -> Sequence[str]:
    """What no measurement can have found."""
    if tuning.schema != SCHEMA:
        return [f"schema {tuning.schema}, this version reads {SCHEMA}"]
    problems: list[str] = []
    settings = tuning.settings.named()
    chunk_tokens = settings.pop("chunk_tokens", SHORTEST_CHUNK_TOKENS)
    if isinstance(chunk_tokens, int) and not SHORTEST_CHUNK_TOKENS <= chunk_tokens <= LONGEST_CHUNK_TOKENS:
        problems.append(f"chunk_tokens: {chunk_tokens} is not from {SHORTEST_CHUNK_TOKENS} to {LONGEST_CHUNK_TOKENS}")
    config.build(Serve, settings, "settings", problems)
    return problems


def _remedy(path: Path) -> str:
    return f"remove it, or make it again with `appliance bench serve --tune` ({path.name.removesuffix(artifacts.TUNED)})."
