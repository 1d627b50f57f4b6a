"""The processes that train one model together, as `accelerate launch` starts them: who is first, and what all agree on.

The first process decides, writes and speaks; the others follow it. Without a launcher there is one process, it is the first,
and nothing of torch is imported here. What is trained is not known here.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from appliance import artifacts, console
from appliance.artifacts import Draft, Plan
from appliance.errors import ApplianceError, ArtifactError, EnvironmentIncomplete, RecipeError

T = TypeVar("T")
SENTENCE_SECONDS = 2.0
PATIENCE_MINUTES = 30  # for one that reads or tokenizes while the others wait; NCCL's own would be ten


def count() -> int:
    """How many processes train together, on all machines; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def is_first() -> bool:
    """Whether this process decides, writes and speaks."""
    return count() == 1 or os.environ["RANK"] == "0"


def local_index() -> int:
    """This process among those of this machine, which is also the index of its card."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else 0


def local_count() -> int:
    """How many of the processes share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def is_sharded() -> bool:
    """Whether each process holds a part of the model (FSDP), so that it computes only while all do the same."""
    return _is_on("ACCELERATE_USE_FSDP")


def is_kept_on_cpu() -> bool:
    """Whether cards are to be left alone: `ACCELERATE_USE_CPU`."""
    return _is_on("ACCELERATE_USE_CPU")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Joins the other processes, and leaves them after the block; when it fails, the launcher ends those that wait."""
    if count() == 1:
        yield
        return
    state = _state()
    yield
    wait()
    state.destroy_process_group()


def wait() -> None:
    """Returns once every process is here."""
    if count() > 1:
        _state().wait_for_everyone()


def from_first(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, for all of them; it is called in no other.

    Its exception is raised in the first process, and ends the others without a word: a person reads it once.
    """
    if count() == 1:
        return decide()
    if not is_first():
        result, exit_code = _broadcast(None, None)
        if exit_code is not None:
            _leave(exit_code)
        return result  # type: ignore[no-any-return]
    try:
        result = decide()
    except Exception as error:
        _broadcast(None, _exit_code(error))
        raise
    _broadcast(result, None)
    return result


def fail(error: ApplianceError) -> NoReturn:
    """Raises an error that every process meets at the same moment; only the first says it."""
    if is_first():
        raise error
    _leave(error.exit_code)


def note(message: str) -> None:
    """A line for the person watching, once."""
    if is_first():
        console.note(message)


@contextlib.contextmanager
def draft(plan: Plan, root: Path, *, keep_partial: bool) -> Iterator[Draft]:
    """One resumable draft for all processes; `artifacts.create` runs in the first, and all go on once the artifact is whole.

    What the others put into `results` is lost. Raises `ArtifactError` where a process plans another artifact than the first.
    """
    with contextlib.ExitStack() as stack:
        create = artifacts.create(plan, root, keep_partial=keep_partial, is_resumable=True)
        shared = from_first(lambda: stack.enter_context(create))
        if shared.path != plan.partial(root):
            raise ArtifactError(
                f"This process would make {plan.partial(root)}, the first one makes {shared.path}: every machine must see"
                " the same artifacts folder, base model and data, under the same paths."
            )
        yield shared
    wait()


def share(batch_rows: int, accumulate: int, section: str) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of a step, of one process, so that all make the step that the recipe says.

    Fewer micro-batches first, since they are made one after the other; then smaller ones. Raises `RecipeError`.
    """
    shared = _share(batch_rows, accumulate, count())
    if shared is None:
        fitting = [n for n in range(2, batch_rows * accumulate + 1) if _share(batch_rows, accumulate, n)]
        start = f"start {' or '.join(map(str, fitting))} of them" if fitting else "train without a launcher"
        raise RecipeError(
            f"{count()} processes cannot share a step of {section}.batch_rows = {batch_rows} rows times"
            f" {section}.accumulate = {accumulate} evenly; {start}, or change one of the two settings."
        )
    return shared


def repeated_rows(rows: int, batch_rows: int) -> int:
    """How many rows accelerate takes a second time at the end of an epoch, where they do not fill everyone's last batch."""
    return -rows % (batch_rows * count()) if count() > 1 else 0


def settle(trainer: Any) -> None:
    """Has a sharded model sum gradients in float32 and leave its outputs as computed, as a whole one does.

    accelerate would round both to the type of the weights, and with them DPO's sums of log-probabilities: by up to 0.25 nats
    in bfloat16. To be called before the trainer starts. Raises `EnvironmentIncomplete` where accelerate does not shard.
    """
    if not is_sharded():
        return
    if not trainer.is_fsdp_enabled:
        fail(EnvironmentIncomplete("accelerate shards a model over cards, and sees none; take two-processes-cpu.yaml."))
    import torch

    plugin = trainer.accelerator.state.fsdp_plugin
    if (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def whole_weights(model: Any) -> dict[str, Any] | None:
    """The weights that are trained, gathered from all processes in the first; None where each has them whole.

    Every process must call it.
    """
    if not is_sharded():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def put_weights(model: Any, weights: dict[str, Any]) -> None:
    """Gives each process its part of weights that the first one has whole, as `whole_weights` gathered them.

    torch's own way back (`set_model_state_dict`) wants the frozen weights too. Every process must call it.
    """
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import distribute_tensor

    parts = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    for name, part in parts.items():
        whole = weights[name] if is_first() else torch.empty(part.shape)
        with torch.no_grad():
            part.copy_(distribute_tensor(whole.to(part.device, part.dtype), part.device_mesh, part.placements))


def _share(batch_rows: int, accumulate: int, processes: int) -> tuple[int, int] | None:
    at_once = math.gcd(accumulate, processes)
    rows, left_over = divmod(batch_rows, processes // at_once)
    return None if left_over else (rows, accumulate // at_once)


def _state() -> Any:
    """accelerate's view of this process; the first call waits until all are there."""
    import torch
    from accelerate import PartialState

    is_on_cpu = is_kept_on_cpu() or not torch.cuda.is_available()
    return PartialState(cpu=is_on_cpu, timeout=datetime.timedelta(minutes=PATIENCE_MINUTES))


def _broadcast(result: Any, exit_code: int | None) -> tuple[Any, int | None]:
    """Sends the first process's values to the others, which get them back."""
    from accelerate.utils import broadcast_object_list

    _state()
    values = [result, exit_code]
    broadcast_object_list(values)
    return values[0], values[1]


def _leave(exit_code: int) -> NoReturn:
    """Ends this process silently, after the first has spoken: the launcher ends all as soon as one has ended."""
    time.sleep(SENTENCE_SECONDS)
    sys.exit(exit_code)


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, ApplianceError) else 1


def _is_on(variable: str) -> bool:
    """accelerate's flags, which its launcher writes as "true" and as "True"."""
    return os.environ.get(variable, "").lower() in ("true", "1")
