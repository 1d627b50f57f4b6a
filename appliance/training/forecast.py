"""How long a phase will take, from a few micro-steps of a model with fewer of the base's layers, and random weights.

What a layer takes and what embedding and head take are told apart by two depths. Main entry: `micro_step_seconds`.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from appliance.recipe import Recipe
from appliance.training import adapters, learned_head, skeletons
from appliance.training.fit import Device, Work
from appliance.training.rungs import Rung
from appliance.training.simulation import Shape

FEW_LAYERS, MORE_LAYERS = 1, 3
TIMED = 3  # micro-steps, after one that is not counted
SEED = 1


@dataclass(frozen=True, slots=True)
class Course:
    """A phase's micro-steps: how many, and what part of its time validation takes besides."""

    micro_steps: int
    shape: Shape
    validation_share: float = 0.0

    def seconds(self, of_one: float) -> float:
        return self.micro_steps * of_one / (1 - self.validation_share)


def of_rows(lengths: Sequence[int], rows: int, epochs: int, learned_share: float) -> Course:
    """Batches of rows as they come, padded to the longest of each."""
    count = max(1, len(lengths) // rows)
    longest = [max(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
    tokens = max(2, round(statistics.mean(longest)))
    return Course(epochs * count, Shape(rows, tokens, max(1, round(rows * tokens * learned_share))))


def micro_step_seconds(recipe: Recipe, config: Any, work: Work, device: Device, rung: Rung) -> float:
    """Of one forward and backward of all layers, on this device, now; the weights are whole ones, of random values."""
    few, more = (_timed(recipe, config, layers, work, device, rung) for layers in (FEW_LAYERS, MORE_LAYERS))
    each = max(0.0, (more - few) / (MORE_LAYERS - FEW_LAYERS))
    layers = int(config.get_text_config().num_hidden_layers)
    reference = 1 / 3 if work.has_reference else 0  # one more forward, of the three that a step amounts to
    return (few + (layers - FEW_LAYERS) * each) * (1 + reference)


def _timed(recipe: Recipe, config: Any, layers: int, work: Work, device: Device, rung: Rung) -> float:
    from trl.trainer.utils import add_fused_lm_head

    place = torch.device("cuda" if device.on_card else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = skeletons.make(config, device.dtype, layers).to_empty(device=place)
        for weight in (*model.parameters(), *model.buffers()):
            if weight.dtype.is_floating_point:
                torch.nn.init.normal_(weight, std=0.02)
    model = adapters.add(model, recipe.lora).train()
    if device.on_card:
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
    else:
        learned_head.install(model)
    if rung.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    tokens = torch.zeros(work.shape.rows, work.shape.tokens, dtype=torch.long, device=place)
    labels = tokens.clone()
    labels.view(-1)[work.shape.learned_tokens :] = -100
    seconds = []
    for _ in range(TIMED + 1):
        started = time.perf_counter()
        with torch.autocast(place.type, dtype=device.dtype, enabled=device.weights != "float32"):
            model(input_ids=tokens, labels=labels, fused_lm_head=True).loss.backward()
        if device.on_card:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
