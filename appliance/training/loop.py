"""What every training phase shares: arguments, progress, loss curve, checkpoints and resuming.

A run lives in the `.partial` directory of its artifact. `checkpoints/` holds what a resumed run needs and is removed at
the end; `loss.jsonl` and `loss.png` stay. Of several processes the first one writes.
"""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

from appliance import artifacts, device
from appliance.artifacts import Plan
from appliance.console import Progress
from appliance.errors import ArtifactError, TrainingFailed
from appliance.training import curve, layout, processes, trackers
from appliance.training import model as models
from appliance.training.batches import Batches
from appliance.training.curve import LOSS
from appliance.training.metrics import Phase as Measured
from appliance.training.recorder import Recorder
from appliance.training.rungs import Rung
from appliance.training.validation import Validation
from appliance.training_settings import Phase

CHECKPOINTS = "checkpoints"
COMPLETE = "complete"  # written into a checkpoint after everything else, so that a killed save is never resumed from
SHARDS = "pytorch_model_fsdp*"  # accelerate's name for the weights in a checkpoint of a sharded model

# transformers' names (training_args.py, `OptimizerNames`; trainer_utils.py, `SchedulerType`).
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
}
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def arguments(folder: Path, phase: Phase, seed: int, rung: Rung | None = None) -> dict[str, Any]:
    """Trainer arguments common to all phases; `phase` is the recipe's section, `rung` how the model is laid out.

    The starter needs none. The batch is this process's share of it; raises `RecipeError` when there is none.
    """
    section = type(phase).__name__.lower()
    batch_rows, accumulate = processes.share(phase.batch_rows, phase.accumulate, section)
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "num_train_epochs": phase.epochs,
        "per_device_train_batch_size": batch_rows,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": phase.learning_rate,
        "optim": OPTIMIZERS[phase.optimizer],
        "lr_scheduler_type": SCHEDULERS[phase.scheduler],
        "warmup_steps": phase.warmup_ratio,
        "max_grad_norm": phase.max_gradient_norm,
        "use_liger_kernel": phase.liger,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a diverged step must be seen, not logged as 0
        "save_strategy": "steps",
        "save_steps": phase.checkpoint_steps,
        "save_total_limit": 2,
        "report_to": "none",  # `trackers` adds those that a person names
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not models.has_gpu(),
        "dataloader_pin_memory": models.has_gpu(),
        "ddp_find_unused_parameters": False,  # a step uses all of an adapter
        **(layout.arguments(rung) if rung else {}),
    }


def prepare() -> None:
    """Sets torch's threads (on busy or quota-limited cores it collapses otherwise) and silences what no user could mend."""
    import torch

    # transformers 5.23 warns of names that trl 1.16 and peft 0.21 still use, trl 1.16 of what its version 2 will not have.
    for name in ("gradient_checkpointing", "use_liger_kernel"):
        warnings.filterwarnings("ignore", message=f".*{name}.*", category=FutureWarning)
    torch.set_num_threads(max(1, device.usable_cores() // processes.local_count()))


def require_space(base: Path, root: Path) -> None:
    """Raises `EnvironmentIncomplete` unless there is room for an adapter, its optimizer and two checkpoints of both.

    An adapter of rank 16 on every linear layer is under 1 % of the base's parameters, held in float32.
    """
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    artifacts.require_space(root, weights // 6 + 300_000_000, "Training")


def resume_point(plan: Plan, root: Path, *, resume: bool, restart: bool) -> Path | None:
    """The newest complete checkpoint of an interrupted run, or None to start afresh.

    Raises `ArtifactError` when there is one and the caller did not say what to do with it, or it is of another kind: whole
    where the model is now sharded, or the other way round.
    """
    folder = plan.partial(root) / CHECKPOINTS
    complete = [each for each in folder.glob("checkpoint-*") if (each / COMPLETE).exists()]
    if restart or not complete:
        return None
    newest = max(complete, key=lambda each: int(each.name.rpartition("-")[2]))
    if not resume:
        step = newest.name.rpartition("-")[2]
        raise ArtifactError(f"An interrupted run stopped after step {step} ({newest}); pass --resume, or --restart.")
    if any(newest.glob(SHARDS)) != processes.is_sharded():
        is_with, is_without = ("without", "with") if processes.is_sharded() else ("with", "without")
        raise ArtifactError(
            f"{newest} was written {is_with} FSDP and cannot be continued {is_without} it;"
            f" start as that run was started, or pass --restart."
        )
    return newest


def train(
    trainer: Any,
    folder: Path,
    label: str,
    checkpoint: Path | None,
    *,
    batches: Batches | None = None,
    validation: Validation | None = None,
) -> dict[str, Any]:
    """Runs the trainer to its end; returns what the loss did. Leaves `loss.jsonl` and `loss.png` in `folder`.

    `batches` says which rows a step had, `validation` measures held-out ones and takes the best adapter back at the end.
    """
    from transformers import PrinterCallback

    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    processes.from_first(lambda: _clear_after(folder, first_step))
    if checkpoint:
        processes.note(f"{label}: continuing after step {first_step}")
    rows = len(trainer.train_dataset) * getattr(trainer, "num_generations", 1)  # GRPO makes its own
    repeated = processes.repeated_rows(rows, trainer.args.per_device_train_batch_size)
    if repeated:
        processes.note(f"{label}: {repeated} rows come twice in an epoch, so that every process has as many steps")
    processes.settle(trainer)
    trainer.remove_callback(PrinterCallback)  # our progress line says it, and the loss curve keeps it
    trainer.add_callback(_callback(folder, label, first_step, batches, validation))
    trackers.add(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    how = {"processes": processes.count(), "repeated_rows": repeated} if processes.count() > 1 else {}
    if validation:
        how |= validation.finish(folder)
    return processes.from_first(lambda: _outcome(folder, label)) | how


def finish(folder: Path) -> None:
    """Removes the checkpoints: last of all, since until then a killed run resumes from them.

    They go in one step: what is left of one whose removal was cut off must not be resumed from.
    """
    if processes.is_first() and (folder / CHECKPOINTS).exists():  # a run that stopped early may have none
        doomed = (folder / CHECKPOINTS).rename(folder / f"{CHECKPOINTS}.removed")
        shutil.rmtree(doomed)


def _clear_after(folder: Path, last_step: int) -> None:
    for half in folder.glob(f".{LOSS}.*"):  # a curve that was being written
        half.unlink()
    for each in (folder / CHECKPOINTS).glob("checkpoint-*"):
        if not (each / COMPLETE).exists():  # a save that was cut off
            shutil.rmtree(each)
    _keep_steps(folder / LOSS, last_step)


def _outcome(folder: Path, label: str) -> dict[str, Any]:
    lines = curve.read_lines(folder)
    plot(lines, folder / "loss.png", label, "loss")
    losses = [line["loss"] for line in lines]
    tail = losses[-max(1, len(losses) // 20) :]  # single steps are noisy: the last twentieth's mean
    return {"steps": len(losses), "first_loss": losses[0], "final_loss": sum(tail) / len(tail)}


def _keep_steps(path: Path, last_step: int) -> None:
    """Drops the lines after the checkpoint, which will be written again; the last may be cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step)
    artifacts.write_atomically(path, kept)  # it cannot be had again


def _callback(
    folder: Path, label: str, first_step: int, batches: Batches | None = None, validation: Validation | None = None
) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Writes the curve, tells progress and metrics, validates, marks complete checkpoints."""

        def __init__(self) -> None:
            self.progress: Progress | None = None
            self.phase: Measured | None = None
            self.recorder: Recorder | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if validation:
                validation.begin(state.max_steps)
            if processes.is_first():
                self.progress = Progress(label, state.max_steps, first_step)
                self.phase = Measured(label, state.max_steps, first_step)
                self.recorder = Recorder(folder, label, state.max_steps, self.progress.say)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
            if not logs or "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                at = f"at step {state.global_step}: loss {logs['loss']}"
                error = TrainingFailed(f"{label} diverged {at}; lower its learning_rate and repeat with --restart.")
                processes.fail(error)  # the loss is the mean over all processes, so that each of them comes here
            rows = batches.take() if batches else []
            measured: dict[str, float] = {}
            if validation and validation.is_due(state.global_step, state.max_steps):
                measured = validation.take(folder, state.global_step)
                logs |= measured  # for trackers, which come after this
            if self.recorder:
                self.recorder.write(state.global_step, logs, rows)
            if self.progress:
                self.progress.update(state.global_step, f"loss {logs['loss']:.3f}")
            if self.phase:
                tokens = logs.get("num_tokens", logs.get("num_input_tokens_seen"))  # TRL's trainers say the first
                self.phase.take(state.global_step, logs["loss"], logs.get("learning_rate"), tokens)
                if "reward" in logs:
                    self.phase.judge(logs["reward"], logs["reward_std"], logs["frac_reward_zero_std"])
            if measured and validation and state.global_step < state.max_steps and validation.should_stop(folder):
                control.should_training_stop = True
                control.should_save = False  # a run resumed from this very step would make one more
                if self.progress:
                    self.progress.say(f"{label}: stops after step {state.global_step}: patience is at its end")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if self.phase:
                self.phase.end()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            processes.wait()  # until each has written its part
            if processes.is_first():
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
                if validation:
                    validation.forget(folder)

    return Watch()


def plot(lines: list[dict[str, Any]], path: Path, label: str, key: str) -> None:
    """Draws what was recorded under `key` at each step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [line[key] for line in lines]
    axes.plot([line["step"] for line in lines], values, linewidth=1)
    axes.set(xlabel="step", ylabel=key, title=label, ylim=(None if min(values) < 0 else 0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
