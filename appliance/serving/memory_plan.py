"""Decides how a model is loaded on this machine: threads, KV type, mmap, repacking, slots, context, GPU layers.

What does not fit is stepped down in a fixed order, and each step is told in words with its numbers; what a person set
explicitly is never changed: it fits or is refused. How much memory a choice takes is in `memory_prediction.py`.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from appliance.device import Machine
from appliance.errors import EnvironmentIncomplete, ModelFileError
from appliance.gpu import Gpu
from appliance.recipe import Serve
from appliance.serving import gpu_layers
from appliance.serving.decoder import IDLE_CHUNK_TOKENS
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import ModelKind
from appliance.serving.gguf_file import GgufHeader
from appliance.serving.memory_prediction import (
    MIB,
    Choice,
    MemoryPrediction,
    can_quantize_kv,
    mib,
    predict,
    repackable_bytes,
)
from appliance.serving.tuning_file import TunedSettings

RESERVE_RATIO = 0.05  # of all memory, for the rest of the machine
RESERVE_MIN_BYTES, RESERVE_MAX_BYTES = 64 * MIB, 512 * MIB
SHORTEST_CONTEXT_TOKENS = 512
CACHE_STEP_TOKENS = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelToLoad:
    """A model file and what is said about it; `adapters` are LoRA files by name.

    `proven_reread_tokens`: see `promotion.proven_reread_tokens`.
    """

    name: str
    path: Path
    header: GgufHeader
    sha256: str
    made_at: int
    kind: ModelKind
    adapters: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    proven_reread_tokens: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    settings: EngineSettings
    memory: MemoryPrediction
    free_bytes: int  # for this model, before it is loaded
    is_as_asked: bool = True  # nothing was stepped down for want of memory
    tuned: frozenset[str] = frozenset()  # the settings that tuning decided, by the names of `TunedSettings`


def plan(
    model: ModelToLoad,
    asked: Serve,
    machine: Machine,
    *,
    explicit: Collection[str] = (),
    others: Sequence[MemoryPrediction] = (),
    gpus: Sequence[Gpu] = (),
    can_offload: bool = False,
    snapshot_folder: str | None = None,
    tuned: TunedSettings | None = None,
) -> Plan:
    """`explicit` names the settings that a person set; `others` are the models that are loaded and stay; `tuned` is what was
    measured to be fastest on this machine, and counts where nobody set anything else.

    Raises `EnvironmentIncomplete` with all numbers when the model does not fit even after every step down that is allowed.
    """
    outset = _Outset(model, machine, frozenset(explicit), others, gpus, can_offload, snapshot_folder)
    if tuned is None or not tuned.named():
        return _plan(outset, asked)
    left = _left_to_tuning(asked, tuned, explicit)
    with contextlib.suppress(EnvironmentIncomplete):
        planned = _plan(outset, dataclasses.replace(asked, **left), chunk_tokens=tuned.chunk_tokens or IDLE_CHUNK_TOKENS)
        if planned.is_as_asked:
            chunks = {"chunk_tokens"} if tuned.chunk_tokens else set()
            return dataclasses.replace(planned, tuned=frozenset(left.keys() | chunks))
    # Nothing is stepped down for the sake of speed. Threads take no memory.
    threads = {name: value for name, value in left.items() if name in ("threads", "prefill_threads")}
    planned = _plan(outset, dataclasses.replace(asked, **threads))
    note = (
        f"tuned settings: only threads are taken; with {tuned}, the model does not fit into {mib(planned.free_bytes)} MiB."
    )
    settings = msgspec.structs.replace(planned.settings, notes=(*planned.settings.notes, note))
    return dataclasses.replace(planned, settings=settings, tuned=frozenset(threads))


def needed_bytes(header: GgufHeader, settings: EngineSettings, machine: Machine) -> int:
    """What an engine with these settings takes, adapters not counted."""
    choice = Choice(
        slots=settings.slots,
        context_tokens=settings.context_tokens,
        cache_tokens=settings.cache_tokens,
        kv_type=settings.kv_type,
        is_mapped=settings.is_mapped,
        is_repacked=settings.is_repacked,
        chunk_tokens=settings.chunk_tokens,
        gpu_layers=settings.gpu_layers,
        is_stitching=settings.reread_tokens is not None,
    )
    return predict(header, choice, machine.cpu_features).total_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _Outset:
    """What a plan starts from, besides what is asked for."""

    model: ModelToLoad
    machine: Machine
    explicit: frozenset[str]
    others: Sequence[MemoryPrediction]
    gpus: Sequence[Gpu]
    can_offload: bool
    snapshot_folder: str | None


def _left_to_tuning(asked: Serve, tuned: TunedSettings, explicit: Collection[str]) -> dict[str, Any]:
    """Tuned settings that a person left to the server. A recipe that says as much as the default says nothing."""
    default = Serve()
    left = {name: value for name, value in tuned.named().items() if name != "chunk_tokens" and name not in explicit}
    return {name: value for name, value in left.items() if getattr(asked, name) == getattr(default, name)}


def _plan(outset: _Outset, asked: Serve, *, chunk_tokens: int = IDLE_CHUNK_TOKENS) -> Plan:
    model, machine = outset.model, outset.machine
    notes = _thread_notes(asked, machine)
    choice, limit_notes = _starting_choice(model, asked, machine, chunk_tokens)
    layers, gpu_note = gpu_layers.choose(model.header, choice, outset.gpus, asked.gpu_layers, can_offload=outset.can_offload)
    choice = dataclasses.replace(choice, gpu_layers=layers)
    fitter = _Fitter(model, asked, machine, outset.explicit, outset.others)
    if choice.is_stitching and asked.documents == "auto" and (lacking := fitter.lacking_bytes(choice)):
        choice = dataclasses.replace(choice, is_stitching=False)  # nothing is stepped down for what nobody asked for
        limit_notes.append(
            f"documents: read in their place; to read each by itself, as proven, {mib(lacking)} MiB are lacking."
        )
    fitted = fitter.fit(choice)
    notes += [*limit_notes, *([gpu_note] if gpu_note else []), *fitter.notes(choice, fitted)]
    reread = _reread_tokens(model, asked) if fitted.is_stitching else None
    if fitted.is_stitching:
        notes.append(_stitching_note(model, reread))
    settings = EngineSettings(
        name=model.name,
        model_path=str(model.path.absolute()),
        sha256=model.sha256,
        made_at=model.made_at,
        kind=model.kind,
        adapters={name: str(path.absolute()) for name, path in model.adapters.items()},
        slots=fitted.slots,
        context_tokens=fitted.context_tokens,
        cache_tokens=fitted.cache_tokens,
        threads_decode=asked.threads or machine.physical_cores,
        threads_prefill=asked.prefill_threads or machine.usable_cores,
        chunk_tokens=fitted.chunk_tokens,
        kv_type=fitted.kv_type,
        is_mapped=fitted.is_mapped,
        is_repacked=fitted.is_repacked,
        gpu_layers=layers,
        queue_requests=asked.queue_requests,
        queue_tokens=asked.queue_tokens,
        snapshot_folder=outset.snapshot_folder if asked.snapshot_mib else None,
        snapshot_bytes=asked.snapshot_mib * MIB,
        system_prompts=asked.system_prompts if model.kind == "chat" else (),
        reread_tokens=reread,
        document_tolerance=asked.document_tolerance,
        is_speculating=asked.speculation == "auto" and model.kind == "chat",
        stream_seconds=asked.stream_seconds,
        notes=tuple(notes),
    )
    return Plan(
        settings=settings,
        memory=fitter.predict(fitted),
        free_bytes=fitter.free_bytes,
        is_as_asked=fitted == choice,
    )


def _thread_notes(asked: Serve, machine: Machine) -> list[str]:
    threads = max(asked.threads, asked.prefill_threads)
    if threads <= machine.usable_cores:
        return []
    return [f"threads: {threads} as set, but {machine.usable_cores} cores may be used: more threads than cores are slow."]


def _starting_choice(model: ModelToLoad, asked: Serve, machine: Machine, chunk_tokens: int) -> tuple[Choice, list[str]]:
    """What is asked for, as far as the model itself allows it."""
    notes = []
    trained = model.header.context_length
    context = asked.context_tokens
    if 0 < trained < context:
        notes.append(f"context_tokens: {trained} instead of {context}; the model was not trained for more.")
        context = trained
    kv_type: Literal["f16", "q8_0"] = "q8_0" if asked.kv_type == "q8_0" else "f16"
    if kv_type == "q8_0" and not can_quantize_kv(model.header):
        raise EnvironmentIncomplete(
            f"kv_type is q8_0, but {model.name} has heads of {model.header.key_length} and {model.header.value_length} "
            "values, which must be multiples of 32; set kv_type = 'auto' or 'f16'."
        )
    # Copies into another layout pay only where there is something to copy.
    is_repackable = repackable_bytes(model.header, machine.cpu_features) > 0
    choice = Choice(
        slots=asked.slots,
        context_tokens=context,
        cache_tokens=asked.cache_tokens if model.kind == "chat" else 0,
        kv_type=kv_type,
        is_mapped=asked.mmap != "off",
        is_repacked=asked.repack == "on" or (asked.repack == "auto" and is_repackable),
        chunk_tokens=chunk_tokens,
        is_stitching=_reread_tokens(model, asked) is not None and kv_type == "f16" and asked.cache_tokens > 0,
    )
    if _reread_tokens(model, asked) is not None and not choice.is_stitching:
        notes.append("documents: read in their place; to be read by themselves they need kv_type = 'f16' and cache_tokens.")
    if asked.documents == "auto" and model.proven_reread_tokens is not None and model.adapters:
        notes.append("documents: read in their place; the proof for this model says nothing of its adapters.")
    return choice, notes


def _reread_tokens(model: ModelToLoad, asked: Serve) -> int | None:
    """What of each document is read in its place, and the rest by itself; None: all in its place."""
    if model.kind != "chat" or asked.documents == "exact":
        return None
    if asked.documents == "stitched":
        return asked.document_reread_tokens
    if model.proven_reread_tokens is None or model.adapters:
        return None
    return max(model.proven_reread_tokens, asked.document_reread_tokens)


def _stitching_note(model: ModelToLoad, reread: int | None) -> str:
    proven = model.proven_reread_tokens
    if proven is None or model.adapters or (reread or 0) < proven:
        return "documents: each is read by itself and moved, as set; that is not proven for this model."
    again = f", its first {reread} tokens where it stands" if reread else ""
    return f"documents: each is read by itself and moved{again}, as proven for this model with {proven}."


class _Fitter:
    """Finds the first choice that fits into what is free."""

    def __init__(
        self,
        model: ModelToLoad,
        asked: Serve,
        machine: Machine,
        explicit: frozenset[str],
        others: Sequence[MemoryPrediction],
    ) -> None:
        self._model, self._asked, self._machine, self._explicit = model, asked, machine, explicit
        self._adapter_bytes = sum(_size(path) for path in model.adapters.values())
        self._reserve = _reserve_bytes(machine)
        # What other models hold in file pages looks available to the kernel; what they copied does not.
        self._promised = sum(other.weights_file_bytes for other in others)
        available = machine.memory_available_bytes - self._promised - self._reserve
        budget = asked.memory_mib * MIB - sum(other.total_bytes for other in others) if asked.memory_mib else available
        self.free_bytes = max(0, min(available, budget))

    def predict(self, choice: Choice) -> MemoryPrediction:
        return predict(
            self._model.header,
            choice,
            self._machine.cpu_features,
            adapter_bytes=self._adapter_bytes,
            is_pooling=self._model.kind != "chat",
        )

    def lacking_bytes(self, wanted: Choice) -> int:
        return max(0, self.predict(wanted).resident_bytes - self.free_bytes)

    def fit(self, wanted: Choice) -> Choice:
        if not self.lacking_bytes(wanted):
            return wanted
        if wanted.is_mapped and wanted.is_repacked and self._asked.mmap == "auto":
            wanted = dataclasses.replace(wanted, is_mapped=False)  # or the weights would be in memory twice
        smallest = wanted
        for changes in self._steps_down(wanted):
            smaller = dataclasses.replace(smallest, **changes)
            if changes and self._total(smaller) >= self._total(smallest):
                continue  # a step that saves nothing is not taken
            smallest = smaller
            if self._total(smallest) <= self.free_bytes:
                return self._with_cache(smallest, wanted.cache_tokens)
        raise EnvironmentIncomplete(self._refusal(wanted, smallest))

    def notes(self, wanted: Choice, fitted: Choice) -> Iterator[str]:
        """One line for each setting that is not what was wanted."""
        for field in dataclasses.fields(Choice):
            before, after = getattr(wanted, field.name), getattr(fitted, field.name)
            if before == after:
                continue
            other = self.predict(dataclasses.replace(fitted, **{field.name: before}))
            saved = other.resident_bytes - self.predict(fitted).resident_bytes
            name = _NAMES.get(field.name, field.name)
            why = f"{mib(self.free_bytes)} MiB are free for this model"
            if saved > 0:
                why += f", and this saves {mib(saved)} MiB"
            yield f"{name}: {_said(after)} instead of {_said(before)}; {why}."

    def _total(self, choice: Choice) -> int:
        return self.predict(choice).total_bytes

    def _steps_down(self, wanted: Choice) -> Iterator[dict[str, Any]]:
        """What to change, the least painful first."""
        yield {}
        yield {"is_stitching": False}
        if "cache_tokens" not in self._explicit:
            yield {"cache_tokens": 0}
        if self._asked.kv_type == "auto" and can_quantize_kv(self._model.header):
            yield {"kv_type": "q8_0"}
        if self._asked.repack == "auto" and wanted.is_repacked:
            yield {"is_repacked": False, "is_mapped": self._asked.mmap != "off"}
        if "slots" not in self._explicit:
            yield from ({"slots": slots} for slots in range(wanted.slots - 1, 0, -1))
        tokens = wanted.context_tokens
        while "context_tokens" not in self._explicit and tokens > SHORTEST_CONTEXT_TOKENS:
            tokens = max(SHORTEST_CONTEXT_TOKENS, tokens // 2)
            yield {"context_tokens": tokens}

    def _with_cache(self, choice: Choice, wanted_tokens: int) -> Choice:
        """A choice that fits, with as much cache as still fits, up to what was wanted."""
        whole_steps = range(wanted_tokens - wanted_tokens % CACHE_STEP_TOKENS, choice.cache_tokens, -CACHE_STEP_TOKENS)
        larger = (dataclasses.replace(choice, cache_tokens=tokens) for tokens in (wanted_tokens, *whole_steps))
        return next((each for each in larger if self._total(each) <= self.free_bytes), choice)

    def _refusal(self, wanted: Choice, smallest: Choice) -> str:
        machine = self._machine
        budget = f", memory_mib = {self._asked.memory_mib} for all models" if self._asked.memory_mib else ""
        held = f", {mib(self._promised)} MiB are promised to other models" if self._promised else ""
        fixed = sorted(
            self._explicit & {"slots", "context_tokens", "cache_tokens", "kv_type", "mmap", "repack", "gpu_layers"}
        )
        unset = f"set {', '.join(fixed)} lower or leave it to the server; or " if fixed else ""
        return (
            f"{self._model.name} does not fit into memory. At the least, with {smallest.slots} slots of "
            f"{smallest.context_tokens} tokens and KV {smallest.kv_type}, it needs {self.predict(smallest)}. "
            f"{mib(self.free_bytes)} MiB are free for it: "
            f"{mib(machine.memory_available_bytes)} of {mib(machine.memory_total_bytes)} MiB are available, "
            f"{mib(self._reserve)} MiB are kept for the rest of the machine{held}{budget}. As asked "
            f"({wanted.slots} slots of {wanted.context_tokens} tokens) it needs {mib(self._total(wanted))} MiB. "
            f"Remedy: {unset}serve a smaller model or quantization, or free memory."
        )


_NAMES: Mapping[str, str] = {"is_mapped": "mmap", "is_repacked": "repack", "is_stitching": "documents read by themselves"}
_MEMORY_SETTINGS = {"slots", "context_tokens", "cache_tokens", "kv_type", "mmap", "repack", "gpu_layers"}


def _said(value: object) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def _reserve_bytes(machine: Machine) -> int:
    return min(RESERVE_MAX_BYTES, max(RESERVE_MIN_BYTES, int(machine.memory_total_bytes * RESERVE_RATIO)))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ModelFileError(f"The adapter {path} cannot be read: {error.strerror}; name a LoRA .gguf file.") from error
