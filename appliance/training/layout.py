"""Lays a model out as its rung says: loads it, tells the trainer, and moves what belongs elsewhere.

What each rung costs is counted in `fit.py`. Order of use: `load`, the adapters, a trainer with `arguments`, `settle`.
"""

import json
from pathlib import Path
from typing import Any

from appliance import allocator
from appliance.errors import ArtifactError
from appliance.training import model as models
from appliance.training import processes
from appliance.training.rungs import Rung, ladder

RUNG = "rung.json"  # beside the checkpoints, which only this rung can continue


def load(base: Path, rung: Rung) -> Any:
    """The base in whole weights or in NF4, on the card or, for rungs that keep weights there, in memory."""
    if rung.gives_back:
        allocator.give_back()
    model = models.load_model(base, rung.weights, is_nf4=rung.is_nf4, in_memory=rung.ends_in_memory)
    if rung.is_nf4:
        _hold_four_bits(model)
        allocator.release()  # each weight was there in 16 and in 32 bits
    return model


def arguments(rung: Rung) -> dict[str, Any]:
    """The trainer's part of a rung."""
    found: dict[str, Any] = {
        "gradient_checkpointing": rung.recomputes and not rung.streams,  # a stream does it by itself
        "bf16": rung.weights == "bfloat16",
        "fp16": rung.weights == "float16",
    }
    if rung.inputs_in_memory and not rung.streams:
        found["activation_offloading"] = True
    return found


def settle(trainer: Any, rung: Rung) -> None:
    """To be called once the trainer was made: it has put its head, and DPO's frozen adapter, on the model by then."""
    import torch

    from appliance.training import kernels, learned_head, stream, streamed_head

    # TRL makes the adapters of a model in four bits bfloat16, which float16's gradient scaling cannot take, and in which
    # small updates are lost.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    device = trainer.args.device
    if not rung.ends_in_memory:
        if not kernels.has_triton():
            learned_head.install(trainer.model)
        return
    streamed_head.install(trainer.model, device)
    if rung.streams:
        stream.LayerStream(trainer.model, device, keeps_inputs=False)
    else:
        stream.keep_ends_off(trainer.model, device)
    if device.index is not None:
        trainer.model.hf_device_map = {"": device.index}  # accelerate would refuse one that says where the base was loaded


def results(rung: Rung) -> dict[str, str]:
    """What an adapter's manifest says of it; a merge asks for `trained_on`."""
    return {"rung": rung.name, "weights": rung.weights, "trained_on": "nf4" if rung.is_nf4 else "16-bit"}


def remember(folder: Path, rung: Rung) -> None:
    """Writes down how a run was begun, from the first process."""
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUNG).write_text(json.dumps({"rung": rung.name, "weights": rung.weights}) + "\n", encoding="utf-8")


def remembered(folder: Path) -> Rung:
    """How the interrupted run of these checkpoints was begun; raises `ArtifactError` where this device cannot go on so."""
    begun = json.loads((folder / RUNG).read_text(encoding="utf-8"))
    name, weights = begun["rung"], begun["weights"]
    found = [rung for rung in ladder(has_card=models.has_gpu(), weights=weights) if rung.name == name]
    if not found or (not models.has_gpu() and weights == "bfloat16" and not models.has_bfloat16()):
        raise ArtifactError(
            f"{folder} was begun as {name!r} in {weights}, on another device; continue it there, or pass --restart."
        )
    return found[0]


def _hold_four_bits(model: Any) -> None:
    """Keeps bitsandbytes from rewriting weights for AVX-512 the first time a model answers: it never writes them back."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
