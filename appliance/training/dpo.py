"""Direct preference optimization (Rafailov et al. 2023): the frozen copy that TRL makes of the adapter is the reference."""

from pathlib import Path
from typing import Any

from appliance.recipe import Recipe
from appliance.training import batches, loop, preferences
from appliance.training.preferences import Triplets
from appliance.training.rungs import Rung

REVISION = 1  # raised when the same data and settings would give another adapter


def trainer(model: Any, tokenizer: Any, triplets: Triplets, recipe: Recipe, folder: Path, rung: Rung) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    weight = recipe.dpo.sft_weight
    arguments = DPOConfig(
        **loop.arguments(folder, recipe.dpo, recipe.seed, rung),
        max_length=None,  # lengths were checked; the trainer must not cut
        beta=recipe.dpo.beta,
        loss_type=["sigmoid", "sft"] if weight else ["sigmoid"],
        loss_weights=[1.0, weight] if weight else None,
        remove_unused_columns=False,  # `batches` wants the line
    )
    data = Dataset.from_list([{**preferences.conversational(row), batches.LINE: row["line"]} for row in triplets.rows])
    return DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
