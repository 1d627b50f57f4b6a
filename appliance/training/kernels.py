"""Whether this machine can run the optimizer and the kernels that a phase asks for. Main entry: `require`.

Tried, not looked up: what bitsandbytes was compiled for shows when it computes.
"""

import importlib.util

from appliance.errors import EnvironmentIncomplete
from appliance.training import model as models
from appliance.training import processes
from appliance.training_settings import Phase

EIGHT_BITS = ("adamw_8bit", "paged_adamw_8bit")
LEAST_CAPABILITY = 7  # of a card, for Triton


def require(section: str, settings: Phase) -> None:
    """Raises `EnvironmentIncomplete` with the reason, and what to take instead."""
    if settings.optimizer in EIGHT_BITS:
        _require_eight_bits(section, settings.optimizer)
    if settings.liger:
        _require_liger(f"{section}.liger")


def _require_eight_bits(section: str, optimizer: str) -> None:
    what = f"{section}.optimizer = {optimizer!r}"
    is_paged = optimizer.startswith("paged")
    if is_paged and not models.has_gpu():
        raise EnvironmentIncomplete(
            f"{what} moves its state between a card and memory, and training is on the CPU here, where bitsandbytes would"
            " quietly not page; take 'adamw_8bit', which computes the same."
        )
    try:
        _step(is_paged=is_paged)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentIncomplete(
            f"{what} cannot be used here, since bitsandbytes fails in one step of it ({reason}); install a bitsandbytes"
            " built for this machine, or take 'adamw' or 'adafactor'."
        ) from error


def _step(*, is_paged: bool) -> None:
    """One step of a small matrix, large enough (4,096 values) to be held in 8 bits."""
    import bitsandbytes
    import torch

    device = f"cuda:{processes.local_index()}" if models.has_gpu() else "cpu"
    weight = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    weight.grad = torch.ones_like(weight)
    kind = bitsandbytes.optim.PagedAdamW8bit if is_paged else bitsandbytes.optim.AdamW8bit
    optimizer = kind([weight], lr=1.0)
    optimizer.step()
    stored = optimizer.state[weight]["state1"].dtype
    if stored != torch.uint8 or not bool((weight < 0).all()):
        raise RuntimeError(f"its state is {stored}, and the step from 0 led to {float(weight.max())}")


def has_triton() -> bool:
    """Whether Triton's kernels run on this process's card: not on a P100, though Triton can be imported there."""
    import torch

    if not models.has_gpu() or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(processes.local_index())[0] >= LEAST_CAPABILITY


def _require_liger(what: str) -> None:
    import torch

    if not models.has_gpu():
        raise EnvironmentIncomplete(
            f"{what} = true needs a card: its kernels are Triton's, and training is on the CPU here."
        )
    capability = torch.cuda.get_device_capability(processes.local_index())
    if capability[0] < LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        raise EnvironmentIncomplete(
            f"{what} = true needs a card of compute capability {LEAST_CAPABILITY}.0 or more, for Triton; this one has"
            f" {found}. Set it to false."
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise EnvironmentIncomplete(f"{what} = true needs the package liger-kernel, which is not installed.")
