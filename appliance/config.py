"""Settings: frozen dataclasses filled from TOML, the environment and flags, every mistake reported at once.

Order of precedence: defaults < TOML < environment < flags. A default is stated once, in the dataclass. This file is
the only one that reads the environment; it does not know which settings exist (`recipe.py` does).
"""

import dataclasses
import difflib
import logging
import math
import os
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
ENVIRONMENT_PREFIX = "APPLIANCE_"


def setting(
    default: Any = dataclasses.MISSING, *, minimum: float | None = None, maximum: float | None = None, about: str = ""
) -> Any:
    """A dataclass field with bounds (inclusive) and a line of explanation."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "maximum": maximum, "about": about})


def artifacts_root() -> Path:
    """Where artifacts live: `APPLIANCE_ARTIFACTS`, or `artifacts` in the current folder."""
    return Path(os.environ.get("APPLIANCE_ARTIFACTS", "artifacts"))


def store_file() -> Path:
    """The encrypted store: `APPLIANCE_STORE`, else `store.sqlite3` among the artifacts."""
    return Path(os.environ.get("APPLIANCE_STORE", artifacts_root() / "store.sqlite3"))


def store_key_file() -> Path:
    """The store's key: `APPLIANCE_KEY_FILE`, else `edge-appliance/store.key` in the user's configuration folder."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(os.environ.get("APPLIANCE_KEY_FILE", f"{base}/edge-appliance/store.key"))


def trusted_key() -> Path | None:
    """The public key that must have signed each model that is taken in: `APPLIANCE_TRUSTED_KEY`."""
    return Path(name) if (name := os.environ.get("APPLIANCE_TRUSTED_KEY")) else None


def cache_root() -> Path:
    """Where downloads and builds that outlive `.venv` live: `APPLIANCE_CACHE`, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("APPLIANCE_CACHE", f"{base}/edge-appliance"))


def lease_folder() -> Path:
    """Where leases of cards lie, for all who share the cards: `APPLIANCE_LEASES`, else `gpu` in the cache."""
    return Path(os.environ.get("APPLIANCE_LEASES") or cache_root() / "gpu")


def converter_root() -> Path:
    """Where the converter to GGUF lies: `APPLIANCE_CONVERTER`, as an image has it, else the cache."""
    return Path(os.environ.get("APPLIANCE_CONVERTER") or cache_root())


def first_keys_folder() -> Path:
    """Where `make serve` leaves keys and `appliance chat` looks: `APPLIANCE_MAKE_KEYS`, else `keys` beside the artifacts."""
    return Path(os.environ.get("APPLIANCE_MAKE_KEYS") or artifacts_root().resolve().parent / "keys")


def quiet_environment() -> dict[str, str]:
    """The environment for subprocesses: no telemetry, no hub access, no tokenizer threads after a fork."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    quiet |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    quiet |= {"TRL_EXPERIMENTAL_SILENCE": "1"}  # ORPO is among trl's experiments, and its version is pinned
    quiet |= {"GGML_NO_BACKTRACE": "1"}  # where gdb is installed, a failed assertion would start it and hang
    # Cards are then counted as their driver and nvidia-smi do, and not the fastest first.
    quiet |= {"CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}
    # Threads that spin while they wait collapse torch's speed as soon as anything else wants a core.
    quiet |= {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    return {**os.environ, **quiet}


def apply_quiet_environment() -> None:
    """The same for this process; must run before transformers or huggingface_hub is imported."""
    os.environ.update(quiet_environment())
    # On a CPU it warns of kernels that it would fetch from the hub; PEFT imports it wherever it is installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def parse_set(assignment: str, problems: list[str]) -> dict[str, Any]:
    """`section.key=value` as a nested table; a value that is no TOML literal is a plain string."""
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        problems.append(f"--set {assignment!r}: expected key=value, for example --set sft.epochs=3")
        return {}
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value if isinstance(value, dict) else {}


def environment_table(cls: type, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Overrides named `APPLIANCE_<SECTION>_<KEY>` (or `APPLIANCE_<KEY>`), for the fields that `cls` has."""
    environ = os.environ if environ is None else environ
    table: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{ENVIRONMENT_PREFIX}{field.name.upper()}"
        section = _dataclass_of(hints[field.name])
        if section is None:
            if name in environ:
                table[field.name] = _literal(environ[name])
            continue
        for inner in dataclasses.fields(section):
            if (variable := f"{name}_{inner.name.upper()}") in environ:
                table.setdefault(field.name, {})[inner.name] = _literal(environ[variable])
    return table


def merge_tables(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Later tables win, key by key."""
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = merge_tables(merged[key], value)
            else:
                merged[key] = value
    return merged


def build(cls: type[T], table: Mapping[str, Any], where: str, problems: list[str]) -> T | None:
    """An instance of `cls` from `table`; appends every mistake to `problems` and returns None if there was one."""
    assert dataclasses.is_dataclass(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    before = len(problems)
    for key in table.keys() - known.keys():
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}."
        problems.append(f"{_dotted(where, key)}: unknown key; {hint}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], _dotted(where, name), field.metadata, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_dotted(where, name)}: missing; it has no default.")
    return cls(**values) if len(problems) == before else None


def plain(value: Any) -> Any:
    """A dataclass as JSON-ready data (paths as strings), for manifests and digests."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _dataclass_of(kind: Any) -> type | None:
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _convert(kind: Any, value: Any, where: str, limits: Mapping[str, Any], problems: list[str]) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = [choice for choice in get_args(kind) if choice is not type(None)]
        is_list = isinstance(value, list | tuple)
        fitting = next((choice for choice in inner if (get_origin(choice) is tuple) == is_list), inner[0])
        return None if value is None else _convert(fitting, value, where, limits, problems)
    if origin is Literal:
        if value not in get_args(kind):
            problems.append(f"{where}: {value!r} is not one of {', '.join(map(repr, get_args(kind)))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{where}: expected a list, found {value!r}.")
            return ()
        item = get_args(kind)[0]
        return tuple(_convert(item, each, f"{where}[{i}]", limits, problems) for i, each in enumerate(value))
    if (section := _dataclass_of(kind)) is not None:
        if not isinstance(value, Mapping):
            problems.append(f"{where}: expected a table, found {value!r}.")
            return None
        return build(section, value, where, problems)
    return _convert_scalar(kind, value, where, limits, problems)


def _convert_scalar(kind: Any, value: Any, where: str, limits: Mapping[str, Any], problems: list[str]) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{where}: expected {kind.__name__}, found {value!r}.")
        return value
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{where}: {value} is not a finite number.")
    low, high = limits.get("minimum"), limits.get("maximum")
    if isinstance(value, int | float) and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        problems.append(f"{where}: {value} is out of range; it must be {bounds}.")
    if isinstance(value, str) and not value.strip():
        problems.append(f"{where}: must not be empty.")
    return value
