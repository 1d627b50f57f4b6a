"""Whether a machine can hold a model file, and what it could hold: by the plan that serving loads models by.

With `stitched` the only module of `convert` that knows serving: there are not two opinions of how much memory a model takes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance import device, gguf_types
from appliance.device import Machine
from appliance.errors import EnvironmentIncomplete
from appliance.recipe import Serve
from appliance.serving import gguf_file, memory_plan
from appliance.serving.gguf_file import GgufHeader, Tensor
from appliance.serving.memory_plan import ModelToLoad


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes that serving takes, None when nothing helps; `is_whole` when visitors lose nothing.

    As many of them at a time, texts as long, keys and values in 16 bits; fewer cached prefixes are no loss of that kind.
    """

    needed_bytes: int | None
    is_whole: bool
    reason: str = ""


def machine_with(memory_bytes: int | None) -> Machine:
    """This machine, or one of its kind with so much memory, nothing of it taken."""
    here = device.machine()
    if memory_bytes is None:
        return dataclasses.replace(here, memory_available_bytes=here.memory_total_bytes)
    return dataclasses.replace(here, memory_total_bytes=memory_bytes, memory_available_bytes=memory_bytes)


def fit(path: Path, header: GgufHeader, serve: Serve, machine: Machine) -> Fit:
    """Plans as serving would."""
    model = ModelToLoad(name=path.stem, path=path, header=header, sha256="", made_at=0, kind="chat")
    try:
        plan = memory_plan.plan(model, serve, machine)
    except EnvironmentIncomplete as error:
        return Fit(None, False, str(error))
    settings = plan.settings
    context = min(serve.context_tokens, header.context_length or serve.context_tokens)
    kept_type = settings.kv_type == ("q8_0" if serve.kv_type == "q8_0" else "f16")
    is_whole = (settings.slots, settings.context_tokens) == (serve.slots, context) and kept_type
    return Fit(plan.memory.total_bytes, is_whole, "; ".join(settings.notes))


def read(path: Path) -> GgufHeader:
    return gguf_file.check(path)


def with_types(header: GgufHeader, types: Mapping[str, str]) -> GgufHeader:
    """The header that a file would have whose tensors are of these types."""
    sizes = {name: (values, size) for name, values, size in gguf_types.TENSOR_TYPES.values()}

    def changed(tensor: Tensor) -> Tensor:
        kind = types.get(tensor.name, tensor.type)
        values, size = sizes[kind]
        elements = 1
        for length in tensor.shape:
            elements *= length
        return dataclasses.replace(tensor, type=kind, size_bytes=elements // values * size)

    tensors = tuple(changed(each) for each in header.tensors)
    size = header.size_bytes - header.tensor_bytes + sum(each.size_bytes for each in tensors)
    return dataclasses.replace(header, tensors=tensors, size_bytes=size)


@dataclass(frozen=True, slots=True)
class Offer:
    """A type that a file could have, how large it would be, and whether a machine could serve it."""

    type: str
    size_bytes: int
    fit: Fit


def offers(source: Path, types: Mapping[str, Mapping[str, str]], serve: Serve, machine: Machine) -> list[Offer]:
    """For each type, given with the types that its tensors would get; nothing is quantized for it."""
    header = read(source)
    found = []
    for kind, tensors in types.items():
        would_be = with_types(header, tensors)
        found.append(Offer(kind, would_be.size_bytes, fit(source, would_be, serve, machine)))
    return found


def best(found: Sequence[Offer]) -> Offer:
    """The first, in order of quality, that fits as asked; else the first that fits with smaller settings.

    Raises `EnvironmentIncomplete` when none does.
    """
    chosen = next((each for each in found if each.fit.is_whole), None)
    chosen = chosen or next((each for each in found if each.fit.needed_bytes is not None), None)
    if chosen is None:
        raise EnvironmentIncomplete(f"No type fits; the smallest is {found[-1].type}. {found[-1].fit.reason}")
    return chosen
