"""Which rows were in the batch of a step, so that a jump of the loss can name them. Main entry: `record`."""

from collections.abc import Mapping, Sequence
from typing import Any

LINE = "line"  # the column of a training set with each row's line in the data's file


class Batches:
    """The lines of the rows that were trained on since they were last asked for."""

    def __init__(self) -> None:
        self._lines: list[int] = []

    def add(self, lines: Sequence[int]) -> None:
        self._lines += lines

    def take(self) -> list[int]:
        lines, self._lines = self._lines, []
        return sorted(lines)


def record(trainer: Any) -> Batches:
    """Has the trainer say the rows of its batches, of all processes; its training set has the column `line`.

    The lines travel with the batch, since the loader is ahead of the step; the model never sees them.
    """
    import torch

    batches = Batches()
    collate, train = trainer.data_collator, trainer.training_step

    def collate_with_lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**collate(rows), LINE: torch.tensor([row[LINE] for row in rows])}

    def training_step(model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        batches.add(trainer.accelerator.gather(inputs.pop(LINE).to(trainer.accelerator.device)).tolist())
        return train(model, inputs, *arguments, **named)

    trainer.data_collator, trainer.training_step = collate_with_lines, training_step
    return batches
