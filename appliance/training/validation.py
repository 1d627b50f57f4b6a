"""Held-out rows while training: their loss, the adapter that had the best one, and when to stop. Main entry: `Validation`.

How often is decided by tokens, never by the clock, so that a run that is repeated or resumed does the same.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.training import curve, labels, processes
from appliance.training import model as models
from appliance.training.labels import LabelledRow
from appliance.training_settings import Sft

# A row is read once, where a step of LoRA computes it (1) and the gradients of its activations (1). A tenth of the time is
# aimed at, since rows are read one by one here; past a fifth the diagnosis says so.
STEP_PER_READING = 2
AIMED_SHARE = 0.1
MOST_VALIDATIONS = 20
BEST = "best-*"


@dataclasses.dataclass(frozen=True, slots=True)
class Best:
    step: int
    loss: float
    later: int  # validations since


def every(reading_tokens: int, step_tokens: float, steps: int) -> int:
    """After how many steps each: validation takes about a tenth of the time, and happens at most twenty times."""
    cost = reading_tokens / (STEP_PER_READING * step_tokens)  # in steps
    return max(1, math.ceil(cost * (1 - AIMED_SHARE) / AIMED_SHARE), math.ceil(steps / MOST_VALIDATIONS))


def share(reading_tokens: int, step_tokens: float, interval: int) -> float:
    """Which part of the time it takes, as forecast."""
    cost = reading_tokens / (STEP_PER_READING * step_tokens)
    return cost / (interval + cost)


def best(folder: Path) -> Best | None:
    """The best validation so far; read from the curve, so that a resumed run knows what the interrupted one did."""
    measured = [(line["validation_loss"], line["step"]) for line in curve.read_lines(folder) if "validation_loss" in line]
    if not measured:
        return None
    loss, step = min(measured)
    return Best(step, loss, sum(other > step for _, other in measured))


class Validation:
    """Validates a trainer's model on rows; `rows` are of the held-out file, which has `of` rows."""

    def __init__(self, rows: Sequence[LabelledRow], of: int, settings: Sft, train_tokens: int) -> None:
        self.rows, self.of, self.settings = rows, of, settings
        self._reading_tokens = sum(len(row.input_ids) for row in rows)
        self._learned = [sum(label != labels.IGNORED for label in row.labels) for row in rows]
        self._run_tokens = train_tokens * settings.epochs
        self._interval = 1
        self._trainer: Any = None
        self._collate: Any = None
        self._folder = Path()

    def watch(self, trainer: Any, checkpoints: Path) -> None:
        """To be called before the trainer's collator is wrapped, with where the best adapter is to be kept meanwhile."""
        self._trainer, self._collate, self._folder = trainer, trainer.data_collator, checkpoints

    def begin(self, steps: int) -> None:
        step_tokens = self._run_tokens / steps
        self._interval = every(self._reading_tokens, step_tokens, steps)
        taken = share(self._reading_tokens, step_tokens, self._interval)
        stop = f"; stops after {self.settings.patience} without a better one" if self.settings.patience else ""
        processes.note(
            f"validation: {len(self.rows)} of {self.of} held-out rows every {self._interval} steps, about {taken:.0%} of the"
            f" time (sft.validation_rows); the adapter of the {self.settings.keep} step is kept{stop}"
        )

    def is_due(self, step: int, steps: int) -> bool:
        return step % self._interval == 0 or step == steps

    def take(self, folder: Path, step: int) -> dict[str, float]:
        """Measures after a step, and keeps the weights if they are the best so far. Every process must call it."""
        started = time.monotonic()
        before = processes.from_first(lambda: best(folder))
        loss = self._measure()
        if self.settings.keep == "best" and (before is None or loss < before.loss):
            models.keep_weights(self._trainer.model, self._folder / f"best-{step}" / models.KEPT)
        return {"validation_loss": loss, "validation_seconds": round(time.monotonic() - started, 4)}

    def _measure(self) -> float:
        """The mean loss per learned token. Every process must call it."""
        import torch

        trainer, total = self._trainer, 0.0
        was_training = trainer.model.training
        trainer.model.eval()
        for row, learned in zip(self.rows, self._learned, strict=True):
            batch = self._collate([{"input_ids": row.input_ids, "labels": row.labels}])
            with torch.no_grad():
                loss, _, _ = trainer.prediction_step(trainer.model_wrapped, batch, prediction_loss_only=True)
            total += float(loss) * learned
        trainer.model.train(was_training)
        mean = total / sum(self._learned)
        return processes.from_first(lambda: mean)  # all decide by the same figure, to the last bit

    def should_stop(self, folder: Path) -> bool:
        """Whether patience has run out. Every process must call it."""
        now = processes.from_first(lambda: best(folder))
        return now is not None and 0 < self.settings.patience <= now.later

    def forget(self, folder: Path) -> None:
        """Removes weights that are no longer the best, once a complete checkpoint says so: a resumed run starts there."""
        now = best(folder)
        for each in self._folder.glob(BEST):
            if now is None or each.name != f"best-{now.step}":
                shutil.rmtree(each)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Takes the best adapter back, where it is to be kept. Every process must call it."""
        now = processes.from_first(lambda: best(folder))
        last = self._trainer.state.global_step
        if now is None:
            return {}
        result = {"validation_rows": len(self.rows), "best_step": now.step, "best_validation_loss": now.loss}
        kept = last
        if self.settings.keep == "best" and now.step != last:
            models.take_weights(self._trainer.model, self._folder / f"best-{now.step}" / models.KEPT)
            kept = now.step
            processes.note(f"validation: the adapter of step {kept} is kept (loss {now.loss:.3f}), not that of step {last}")
        return {**result, "kept_step": kept, "stopped_early": last < self._trainer.state.max_steps}
