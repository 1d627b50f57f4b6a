"""The head of a model whose embedding and head are in memory: the device gets a part of the vocabulary at a time.

Takes the place of what TRL's `add_fused_lm_head` (trl/trainer/utils.py, 1.16) gives a model, with its contract: called with
`fused_lm_head=True` the model returns the log-probability of every label, and what trainers report beside it. Running sums
over parts of the vocabulary are those of online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from appliance.errors import ModelFileError

PART_ROWS = 16384  # of the head on the device at once, twice: 80 MiB each at 2,560 wide in 16 bits
PART_TOKENS = 1024  # rows of logits at once: 64 MiB in 32 bits, three times
IGNORED = -100
# What some architectures do to logits behind the head; none of them is of a size at which a model must be streamed.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def install(model: Any, device: torch.device) -> None:
    """Gives `model` (PEFT's or its base) this head, and generation one that reads it in parts as well.

    After a trainer was made, whose own head it replaces. Raises `ModelFileError` for a model that scales its logits.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    scaled = [name for name in SCALES if getattr(config, name, None) not in (None, 1, 1.0)]
    if scaled:
        raise ModelFileError(f"{type(base).__name__} scales its logits ({', '.join(scaled)}); its head cannot be streamed.")
    softcap = getattr(config, "final_logit_softcapping", None)
    head = base.get_output_embeddings()
    head.forward = lambda hidden: _logits(hidden, head, device)
    whole = type(base).forward

    @functools.wraps(whole)  # `generate` looks at the names of what a model accepts
    def forward(self: Any, *arguments: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if not fused_lm_head:
            return whole(self, *arguments, **named)
        return _fused(self, head, device, softcap, *arguments, **named)

    base.forward = types.MethodType(forward, base)


def _fused(
    model: Any,
    head: nn.Linear,
    device: torch.device,
    softcap: float | None,
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
    targets = shift_labels.to(device)
    mask = targets != IGNORED
    found = HeadInParts.apply(hidden[mask], targets[mask], head, device, softcap)
    log_probs, entropy, mean_logits, is_top1 = (each.new_zeros(mask.shape).masked_scatter(mask, each) for each in found)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=mask
    )


class HeadInParts(torch.autograd.Function):  # type: ignore[misc]
    """Log-probabilities of labels; entropies, mean logits and whether a label is the likeliest, these without gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, device: torch.device, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.head, ctx.device, ctx.softcap = head, device, softcap
        sums = _Sums(len(targets), device)
        for start, weight, bias in _parts(head, hidden.dtype, device):
            for rows in _tokens(len(targets)):
                scores, _ = _scores(hidden[rows], weight, bias, softcap)
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
                scores, slope = _scores(hidden[rows], weight, bias, ctx.softcap)
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


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits in 32 bits, and what a gradient is to be multiplied by where they are capped (Gemma)."""
    scores = nn.functional.linear(hidden, weight, bias).float()
    if softcap is None:
        return scores, None
    bent = torch.tanh(scores / softcap)
    return softcap * bent, 1 - bent * bent


def _logits(hidden: Tensor, head: nn.Linear, device: torch.device) -> Tensor:
    """All logits of a few positions, as generation wants them."""
    hidden = hidden.to(device)
    parts = [nn.functional.linear(hidden, weight, bias) for _, weight, bias in _parts(head, hidden.dtype, device)]
    return torch.cat(parts, dim=-1)
