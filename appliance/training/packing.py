"""Rows one behind the other in one sequence, without padding, and the proof that they do not see each other.

TRL's padding-free collator gives each row positions from 0 on and no attention mask. FlashAttention then takes them apart;
for SDPA and eager attention transformers (masking_utils.py, `find_packed_sequence_indices`) makes a mask in blocks. What has
a state instead of attention (Mamba, linear attention, convolutions) may carry it from row to row; so each base is tried.
"""

from typing import Any

from appliance.errors import RecipeError
from appliance.training import processes

ROW_TOKENS = 8
TOLERANCE = 1e-4  # of the largest logit: what one row does to the next is either 0 or plain to see
REMEDY = "set sft.packing = false, which pads them."


def require_apart(trainer: Any) -> None:
    """Raises `RecipeError` unless a row's outputs stay the same whatever stands before it. Every process must call it."""
    try:
        change = _change(trainer)
    except TypeError as error:  # a model that takes no positions
        processes.fail(RecipeError(f"sft.packing: this base cannot be given rows in one sequence ({error}); {REMEDY}"))
    if change > TOLERANCE:
        kind = trainer.model.config.model_type
        processes.fail(
            RecipeError(
                f"sft.packing: in this base ({kind!r}) rows in one sequence see each other: its outputs for a row changed by"
                f" {change:.1%} with the row before it; {REMEDY}"
            )
        )


def _change(trainer: Any) -> float:
    """By how much the second row's logits change with the first row, as a part of the largest."""
    import torch

    model = trainer.model
    tokens = list(range(2 * ROW_TOKENS))
    first, other, second = tokens[:ROW_TOKENS], tokens[:ROW_TOKENS][::-1], tokens[ROW_TOKENS:]
    found = []
    was_training = model.training
    model.eval()
    for before in (first, other):
        batch = trainer.data_collator([{"input_ids": row, "labels": row} for row in (before, second)])
        inputs = {key: value for key, value in trainer._prepare_inputs(batch).items() if key != "labels"}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            found.append(model(**inputs, use_cache=False).logits[0, ROW_TOKENS:].float())
    model.train(was_training)
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())
