"""Kahneman-Tversky optimization (Ethayarajh et al. 2024): single answers, wanted or not; a frozen copy is the reference.

How far the model has moved as a whole is estimated on answers of the same batch to other prompts, so that neighbours in the
order must not belong to one prompt.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.errors import RecipeError
from appliance.recipe import Recipe
from appliance.training import judgements, loop, processes
from appliance.training.judgements import Judged
from appliance.training.preferences import Triplets
from appliance.training.rungs import Rung

REVISION = 1  # raised when the same data and settings would give another adapter
LEAST_ROWS = 2  # of a batch of one process: another answer is needed


def check(recipe: Recipe) -> None:
    """Raises `RecipeError` where a process would have one answer at a time."""
    rows, _ = processes.share(recipe.kto.batch_rows, recipe.kto.accumulate, "kto")
    if rows < LEAST_ROWS:
        raise RecipeError(
            f"kto.batch_rows: {recipe.kto.batch_rows} leaves each of {processes.count()} processes {rows} answer at a time,"
            f" and KTO compares at least {LEAST_ROWS}; raise it to {LEAST_ROWS * processes.count()}."
        )


def order(triplets: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Both answers of each triplet by themselves: every second prompt with its chosen answer first, the others later on."""
    shuffled = random.Random(seed).sample(list(triplets), len(triplets))
    return [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if is_good else "rejected"],
            "label": is_good,
            "line": row["line"],
        }
        for turn in (0, 1)
        for index, row in enumerate(shuffled)
        for is_good in [index % 2 == turn]
    ]


def trainer(model: Any, tokenizer: Any, examples: Triplets | Judged, recipe: Recipe, folder: Path, rung: Rung) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    arguments = KTOConfig(
        **loop.arguments(folder, recipe.kto, recipe.seed, rung),
        max_length=None,  # lengths were checked; the trainer must not cut
        beta=recipe.kto.beta,
        desirable_weight=recipe.kto.good_weight,
        undesirable_weight=recipe.kto.bad_weight,
        remove_unused_columns=False,  # `batches` wants the line
    )
    if isinstance(examples, Triplets):
        rows = order(examples.rows, recipe.seed)
    else:
        rows = random.Random(recipe.seed).sample(list(examples.rows), len(examples.rows))
    data = Dataset.from_list([judgements.conversational(row) for row in rows])
    return KTOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
