"""How many layers of a model go to the GPU, from the memory that is free there. Knows nothing of drivers or llama.cpp."""

from collections.abc import Sequence

from appliance.errors import EnvironmentIncomplete
from appliance.gpu import Gpu
from appliance.serving.gguf_file import GgufHeader
from appliance.serving.memory_prediction import (
    MIB,
    Choice,
    compute_bytes,
    compute_tokens,
    kv_cell_bytes,
    layer_bytes,
    mib,
    output_rows,
)

DRIVER_BYTES = 512 * MIB  # the driver's context and kernels, and what the desktop may want meanwhile
AUTO = -1


def choose(header: GgufHeader, choice: Choice, gpus: Sequence[Gpu], asked: int, *, can_offload: bool) -> tuple[int, str]:
    """The number of layers, counted from the output downward as llama.cpp does, and why, in words with numbers.

    `asked` is a number of layers, or -1 for as many as fit. The words are empty where there is no GPU to speak of. Raises
    `EnvironmentIncomplete` when what was asked for cannot be had.
    """
    everything = header.block_count + 1
    wanted = everything if asked == AUTO else min(asked, everything)
    if wanted == 0:
        return 0, f"gpu_layers: 0 as set; {_named(gpus)} left alone." if gpus else ""
    if not gpus or not can_offload:
        unfit = "cannot be used: this llama.cpp was compiled for the CPU or for other cards"
        why = f"{_named(gpus)} {unfit}" if gpus else "no GPU was found"
        remedy = "repeat `make setup` with BACKEND=cuda or rocm, or build an image for it" if gpus else "check the driver"
        if asked > 0:
            raise EnvironmentIncomplete(f"gpu_layers is {asked}, but {why}; {remedy}, or set gpu_layers = 0.")
        return 0, f"gpu_layers: 0; {why}; {remedy}." if gpus else ""
    free = sum(max(0, gpu.memory_free_bytes - _reserve(header, choice)) for gpu in gpus)
    needs = _needs(header, choice)
    fitting = next((n for n in range(everything, -1, -1) if sum(needs[:n]) <= free), 0)
    said = f"{mib(free)} MiB can be used on {_named(gpus)}, all {everything} layers need {mib(sum(needs))} MiB"
    if asked != AUTO and wanted > fitting:
        raise EnvironmentIncomplete(
            f"gpu_layers is {asked}, which needs {mib(sum(needs[:wanted]))} MiB, but {said}: {fitting} layers fit; "
            "set gpu_layers = -1, free GPU memory, or lower slots or context_tokens."
        )
    layers = min(wanted, fitting)
    where = "GPU" if layers == everything else "CPU" if layers == 0 else "GPU and CPU"
    return layers, f"gpu_layers: {layers} of {everything}, computing on {where}; {said}."


def _needs(header: GgufHeader, choice: Choice) -> list[int]:
    """Bytes of each layer with its part of the KV cache, in the order in which they go to the GPU."""
    kv = [choice.cells * kv_cell_bytes(header, layer, choice.kv_type) for layer in range(header.block_count)]
    return [weights + cache for weights, cache in zip(layer_bytes(header), [*kv, 0], strict=True)][::-1]


def _reserve(header: GgufHeader, choice: Choice) -> int:
    return DRIVER_BYTES + compute_bytes(header, choice, compute_tokens(header, choice), output_rows(choice))


def _named(gpus: Sequence[Gpu]) -> str:
    return ", ".join(map(str, gpus))
