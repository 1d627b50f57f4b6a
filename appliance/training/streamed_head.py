"""The head of a model whose embedding and head are in memory: the device gets a part of the vocabulary at a time.

Running sums over parts of the vocabulary are those of online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from appliance.errors import ModelFileError
from appliance.training import fused_head

PART_ROWS = 16384  # of the head on the device at once, twice: 80 MiB each at 2,560 wide in 16 bits
PART_TOKENS = 1024  # rows of logits at once: 64 MiB in 32 bits, three times


def install(model: Any, device: torch.device) -> None:
    """Gives `model` (PEFT's or its base) this head, and generation one that reads it in parts as well.

    Raises `ModelFileError` for a model whose head does more: none known is of a size at which it must be streamed.
    """
    base = fused_head.base_of(model)
    if more := fused_head.beyond(model):
        raise ModelFileError(f"{type(base).__name__} sets {', '.join(more)}; a head that does so cannot be streamed.")
    bound = fused_head.softcap(model)
    head = base.get_output_embeddings()
    head.forward = lambda hidden: _logits(hidden, head, device)

    def score(hidden: Tensor, targets: Tensor) -> Any:
        return HeadInParts.apply(hidden.to(device), targets.to(device), head, device, bound)

    fused_head.install(model, score)


class HeadInParts(torch.autograd.Function):  # type: ignore[misc]
    """Log-probabilities of labels; entropies, mean logits and whether a label is the likeliest, these without gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, device: torch.device, bound: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.head, ctx.device, ctx.bound = head, device, bound
        sums = _Sums(len(targets), device)
        for start, weight, bias in _parts(head, hidden.dtype, device):
            for rows in _tokens(len(targets)):
                scores, _ = fused_head.scores(hidden[rows], weight, bias, bound)
                sums.add(rows, scores, targets[rows] - start)
        log_total = sums.highest + sums.total.log()
        ctx.save_for_backward(hidden, targets, log_total)
        entropy = log_total - sums.weighted / sums.total
        is_top1 = sums.of_target >= sums.highest
        mean = sums.plain / head.weight.shape[0]
        ctx.mark_non_differentiable(entropy, mean, is_top1)
        return sums.of_target - log_total, entropy, mean, is_top1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, targets, log_total = ctx.saved_tensors
        back = torch.zeros(hidden.shape, dtype=torch.float32, device=ctx.device)
        for start, weight, bias in _parts(ctx.head, hidden.dtype, ctx.device):
            for rows in _tokens(len(targets)):
                scores, slope = fused_head.scores(hidden[rows], weight, bias, ctx.bound)
                each = -torch.exp(scores - log_total[rows, None])
                local = targets[rows] - start
                here = (local >= 0) & (local < each.shape[1])
                each.scatter_add_(1, local.clamp(0, each.shape[1] - 1)[:, None], here[:, None].float())
                each *= gradients[0][rows, None]
                if slope is not None:
                    each *= slope
                back[rows] += (each.to(weight.dtype) @ weight).float()
        return back.to(hidden.dtype), None, None, None, None


class _Sums:
    """What is known of each token's distribution after some parts of the vocabulary, in 32 bits."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.highest = torch.full((tokens,), -torch.inf, device=device)
        self.total, self.weighted, self.plain, self.of_target = (torch.zeros(tokens, device=device) for _ in range(4))

    def add(self, rows: slice, scores: Tensor, local: Tensor) -> None:
        highest = torch.maximum(self.highest[rows], scores.amax(-1))
        faded = torch.exp(self.highest[rows] - highest)
        shares = torch.exp(scores - highest[:, None])
        self.total[rows] = self.total[rows] * faded + shares.sum(-1)
        self.weighted[rows] = self.weighted[rows] * faded + (shares * scores).sum(-1)
        self.plain[rows] += scores.sum(-1)
        self.highest[rows] = highest
        here = (local >= 0) & (local < scores.shape[1])
        own = scores.gather(-1, local.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
        self.of_target[rows] = torch.where(here, own, self.of_target[rows])


def _parts(head: nn.Linear, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Parts of the head on the device, each with the first token it is of."""
    for start in range(0, head.weight.shape[0], PART_ROWS):
        weight = head.weight[start : start + PART_ROWS].to(device, dtype, non_blocking=True)
        bias = None if head.bias is None else head.bias[start : start + PART_ROWS].to(device, dtype, non_blocking=True)
        yield start, weight, bias


def _tokens(count: int) -> Iterator[slice]:
    return (slice(start, min(start + PART_TOKENS, count)) for start in range(0, count, PART_TOKENS))


def _logits(hidden: Tensor, head: nn.Linear, device: torch.device) -> Tensor:
    """All logits of a few positions, as generation wants them."""
    hidden = hidden.to(device)
    parts = [nn.functional.linear(hidden, weight, bias) for _, weight, bias in _parts(head, hidden.dtype, device)]
    return torch.cat(parts, dim=-1)
