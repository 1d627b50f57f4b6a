"""How far what a model says is from what another one says, token by token, without ever having all logits at once.

The divergence of Kullback and Leibler (1951) from the teacher's distribution to the student's, in nats, and beside it the
log-probability of the row's own token. Their gradients are known with them, as in `learned_head.py`, and tokens go through
in parts, teacher's and student's states side by side. Main entry: `install`.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from appliance.errors import RecipeError
from appliance.training import fused_head, learned_head


def install(model: Any) -> None:
    """Has the model (PEFT's or its base) compute its states, and divergences, at the positions that it is asked for.

    Called with `asked`, a mask `(rows, tokens)`, it returns the states there, `(asked, hidden)`; with `taught`, such states
    of the teacher, and `targets` `(asked,)` what `Divergence` does. In the model's own forward, where a sharded head is
    whole. Raises `RecipeError` for a model that does more with its head.
    """
    base = fused_head.base_of(model)
    if more := [name for name in fused_head.beyond(model) if name != fused_head.ROUTING]:
        raise RecipeError(
            f"passages: {type(base).__name__} sets {', '.join(more)}, which this phase does not compute; leave it out."
        )
    bound = fused_head.softcap(model)
    known = base.forward

    @functools.wraps(type(base).forward)  # `generate` looks at the names of what a model accepts
    def forward(self: Any, *arguments: Any, asked: Tensor | None = None, **named: Any) -> Any:
        if asked is None:
            return known(*arguments, **named)
        return _asked(self, bound, asked, *arguments, **named)

    base.forward = types.MethodType(forward, base)


def _asked(
    model: Any,
    bound: float | None,
    asked: Tensor,
    *arguments: Any,
    taught: Tensor | None = None,
    targets: Tensor | None = None,
    labels: Tensor | None = None,  # PEFT gives all models some: none
    sft_weight: float = 0.0,
    **named: Any,
) -> Any:
    assert labels is None
    hidden = model.base_model(*arguments, **{**named, "use_cache": False}).last_hidden_state[asked]
    if taught is None:
        return hidden
    return Divergence.apply(hidden, taught.to(hidden.dtype), targets, model.get_output_embeddings(), bound, sft_weight)


class Divergence(torch.autograd.Function):  # type: ignore[misc]
    """Of the student's states `(asked, hidden)`, those taught, and the row's own tokens, four figures `(asked,)` each.

    The divergence plus `sft_weight` times the negative log-probability, which alone has a gradient; both of them; and
    whether student and teacher take the same token for the likeliest.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, taught: Tensor, targets: Tensor, head: nn.Linear, bound: float | None, sft_weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = hidden.device
        gradient = torch.empty(hidden.shape, device=device) if ctx.needs_input_grad[0] else None
        found = torch.empty(2, len(targets), device=device)
        agrees = torch.empty(len(targets), dtype=torch.bool, device=device)
        for rows in learned_head.parts(len(targets), head.weight.shape[0]):
            wanted = torch.log_softmax(fused_head.scores(taught[rows], head.weight, head.bias, bound)[0], -1)
            scores, slope = fused_head.scores(hidden[rows], head.weight, head.bias, bound)
            likely = torch.log_softmax(scores, -1)
            agrees[rows] = wanted.argmax(-1) == likely.argmax(-1)
            shares = torch.exp(wanted, out=scores)
            own = likely.gather(1, targets[rows, None])[:, 0]
            found[:, rows] = torch.stack((torch.linalg.vecdot(shares, wanted.sub_(likely)), -own))
            if gradient is not None:
                gradient[rows] = _gradient(likely, shares, slope, targets[rows], head.weight, sft_weight)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        divergence, surprise = found
        loss = divergence + sft_weight * surprise
        ctx.mark_non_differentiable(divergence, surprise, agrees)
        return loss, divergence, surprise, agrees

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0][:, None]).to(ctx.dtype), None, None, None, None, None


def _gradient(
    likely: Tensor, shares: Tensor, slope: Tensor | None, targets: Tensor, weight: Tensor, sft_weight: float
) -> Tensor:
    """Of each figure by its hidden state. Overwrites `likely`."""
    each = likely.exp_().mul_(1 + sft_weight).sub_(shares)
    each.scatter_add_(1, targets[:, None], each.new_full((len(targets), 1), -sft_weight))
    if slope is not None:
        each *= slope
    return each.to(weight.dtype) @ weight
