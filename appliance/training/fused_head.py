"""Puts a head of ours in the place of what TRL's `add_fused_lm_head` (trl/trainer/utils.py, 1.16) gives a model.

Its contract: called with `fused_lm_head=True` the model returns the log-probability of every label, and what trainers report
beside it; logits are never whole. The heads are `learned_head.py` and `streamed_head.py`.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

IGNORED = -100
# Factors of logits, and a loss of routing, that only TRL's own head computes.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
ROUTING = "output_router_logits"
# Of hidden states (N, H) and the tokens that follow (N): log-probabilities, entropies, mean logits, is it the likeliest.
Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def base_of(model: Any) -> Any:
    """The model itself, below PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def beyond(model: Any) -> list[str]:
    """What of its configuration these heads do not compute: nothing for most models."""
    config = base_of(model).config.get_text_config()
    factors = [name for name in FACTORS if getattr(config, name, None) not in (None, 1, 1.0)]
    return factors + [ROUTING] * bool(getattr(config, ROUTING, False))


def softcap(model: Any) -> float | None:
    """The bound of Gemma 2's logits."""
    return getattr(base_of(model).config.get_text_config(), "final_logit_softcapping", None)


def install(model: Any, score: Score) -> None:
    """Gives the model this head. After a trainer was made, whose own head it replaces."""
    base = base_of(model)
    whole = type(base).forward

    @functools.wraps(whole)  # `generate` looks at the names of what a model accepts
    def forward(self: Any, *arguments: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if not fused_lm_head:
            return whole(self, *arguments, **named)
        return _fused(self, score, *arguments, **named)

    base.forward = types.MethodType(forward, base)


def _fused(
    model: Any,
    score: Score,
    *arguments: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Any = None,
    **named: Any,
) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    hidden = model.base_model(*arguments, **{**named, "use_cache": False}).last_hidden_state
    if shift_labels is None:
        assert labels is not None
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    targets = shift_labels.to(hidden.device)
    mask = targets != IGNORED
    found = score(hidden[mask], targets[mask])
    log_probs, entropy, mean_logits, is_top1 = (each.new_zeros(mask.shape).masked_scatter(mask, each) for each in found)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=mask
    )


def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, bound: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits in 32 bits, and what a gradient is to be multiplied by where they are capped."""
    found = nn.functional.linear(hidden, weight, bias).float()
    if bound is None:
        return found, None
    bent = (found / bound).tanh_()
    return bound * bent, 1 - bent * bent
