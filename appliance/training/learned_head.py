"""The head on a CPU, and on cards without Triton: computed for what is learned alone, and its gradient along with the loss.

TRL's own computes all positions there, computes logits again in backward, and multiplies their gradient in 32 bits
(trl/kernels/chunked_logprob.py, 1.16). The gradient of a log-probability is known with it, but for the factor that backward
brings, as in Liger (Hsu et al. 2024, arXiv:2410.10989). Tokens go through in parts, each against the whole vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from appliance.training import fused_head

PART_BYTES = 64 << 20  # of logits at once in 32 bits, of which there are up to three
FEWEST = 16  # tokens at once, however many words the vocabulary has


def install(model: Any) -> None:
    """Gives the model (PEFT's or its base) this head; one that needs more of a head, or trains it, keeps TRL's."""
    head = fused_head.base_of(model).get_output_embeddings()
    if fused_head.beyond(model) or head.weight.requires_grad:
        return
    bound = fused_head.softcap(model)
    fused_head.install(model, lambda hidden, targets: LearnedHead.apply(hidden, targets, head, bound))


class LearnedHead(torch.autograd.Function):  # type: ignore[misc]
    """Log-probabilities of labels; entropies, mean logits and whether a label is the likeliest, these without gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, bound: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = hidden.device
        gradient = torch.empty(hidden.shape, device=device) if ctx.needs_input_grad[0] else None
        found = torch.empty(3, len(targets), device=device)
        is_top1 = torch.empty(len(targets), dtype=torch.bool, device=device)
        for rows in parts(len(targets), head.weight.shape[0]):
            scores, slope = fused_head.scores(hidden[rows], head.weight, head.bias, bound)
            mean = scores.mean(-1)
            likely = torch.log_softmax(scores, -1)
            shares = torch.exp(likely, out=scores)
            own = likely.gather(1, targets[rows, None])[:, 0]
            found[:, rows] = torch.stack((own, -torch.linalg.vecdot(shares, likely), mean))
            is_top1[rows] = own >= likely.amax(-1)
            if gradient is not None:
                gradient[rows] = _gradient(shares, slope, targets[rows], head.weight)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        log_probs, entropy, means = found
        ctx.mark_non_differentiable(entropy, means, is_top1)
        return log_probs, entropy, means, is_top1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0][:, None]).to(ctx.dtype), None, None, None


def _gradient(shares: Tensor, slope: Tensor | None, targets: Tensor, weight: Tensor) -> Tensor:
    """Of each log-probability by its hidden state. Overwrites `shares`."""
    each = shares.neg_()
    each.scatter_add_(1, targets[:, None], each.new_ones(len(targets), 1))
    if slope is not None:
        each *= slope
    return each.to(weight.dtype) @ weight


def parts(count: int, vocabulary: int) -> list[slice]:
    """Tokens that are computed at once, by turns."""
    tokens = max(FEWEST, PART_BYTES // (4 * vocabulary))
    return [slice(start, min(start + tokens, count)) for start in range(0, count, tokens)]
