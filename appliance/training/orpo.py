"""Odds ratio preference optimization (Hong et al. 2024): the likelihood of the chosen answer, and its odds; no reference.

TRL 1.16 has it among its experiments. It is given our own tokens, and learns the chosen answer alone where TRL's would learn
the prompt, too.
"""

from pathlib import Path
from typing import Any

from appliance.recipe import Recipe
from appliance.training import adapters, batches, loop, preferences
from appliance.training.labels import IGNORED
from appliance.training.preferences import Pair, Triplets
from appliance.training.rungs import Rung

REVISION = 1  # raised when the same data and settings would give another adapter


def trainer(model: Any, tokenizer: Any, triplets: Triplets, recipe: Recipe, folder: Path, rung: Rung) -> Any:
    """The frozen copy of the adapter is there to be compared with in the end; training does not use it."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig

    adapters.copy_as_reference(model)
    arguments = ORPOConfig(
        **loop.arguments(folder, recipe.orpo, recipe.seed, rung),
        max_length=recipe.orpo.max_tokens,  # lengths were checked, so that nothing is cut
        beta=recipe.orpo.beta,
        remove_unused_columns=False,  # `batches` wants the line
    )
    data = Dataset.from_list([{**preferences.conversational(row), batches.LINE: row["line"]} for row in triplets.rows])
    kind = _trainer_of({pair.line: pair for pair in triplets.pairs})
    return kind(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


def tokens_of(pair: Pair) -> dict[str, list[int]]:
    """The columns that TRL's collator takes."""
    columns = {"prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)}
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole = [*pair.prompt, *answer]
        columns[f"{name}_input_ids"], columns[f"{name}_attention_mask"] = whole, [1] * len(whole)
        columns[f"{name}_labels"] = [*[IGNORED] * len(pair.prompt), *answer]
    return columns


def _trainer_of(pairs: dict[int, Pair]) -> Any:
    from torch.nn import functional
    from trl.experimental.orpo import ORPOTrainer

    class AnswersOnly(ORPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, list[int]]:  # noqa: ARG002
            """TRL would put a second end-of-turn token behind a template that ends with a new line."""
            return tokens_of(pairs[feature[batches.LINE]])

        def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
            """TRL's, with the likelihood of the chosen answer in place of that of prompt and answer."""
            chosen, rejected, chosen_logits, rejected_logits, _, *others = super().concatenated_forward(model, batch)
            labels = batch["chosen_labels"][:, 1:].to(chosen_logits.device)  # (rows, tokens - 1)
            logits = chosen_logits[:, : labels.shape[1]].flatten(0, 1)
            likelihood = functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)
            return chosen, rejected, chosen_logits, rejected_logits, likelihood, *others

    return AnswersOnly
