"""What a training step holds in memory beside the weights, found by computing it without data (torch's fake tensors).

The model's own code runs, with the recipe's adapters, forward and backward, on tensors that have shapes and no contents;
what lives is added up as it comes and goes. Every architecture counts as it is; nothing is loaded. Main entry: `step`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from appliance.training import blocks, divergence_head, learned_head, skeletons, streamed_head
from appliance.training.rungs import Rung

FEW_LAYERS, MORE_LAYERS = 2, 4  # enough for layers that alternate (Gemma's windows)
# Of the head on a card, whose Triton kernels work in place: as many tokens and words of the vocabulary at once as TRL 1.16
# computes (trl/kernels/chunked_logprob.py).
TILE_TOKENS, TILE_WORDS = 4096, 32768


@dataclass(frozen=True, slots=True)
class Step:
    """The most that one forward and backward holds beside weights and adapters: `fixed_bytes` and so much for each layer."""

    fixed_bytes: int
    layer_bytes: int
    input_bytes: int  # of one layer, which is kept for backward where layers are computed again

    def most_bytes(self, layers: int) -> int:
        return self.fixed_bytes + layers * self.layer_bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a micro-batch: so many rows of so many tokens, so many of which are learned."""

    rows: int
    tokens: int
    learned_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a step is computed with: how the model is laid out, the type of its weights, and where.

    `adapt` puts the adapters on a model; `keeps_gradients` is of all micro-batches of a step but the first; `is_distilled`
    of the phase 'passages'.
    """

    rung: Rung
    dtype: torch.dtype
    adapt: Callable[[Any], Any]
    on_card: bool
    keeps_gradients: bool = False
    is_distilled: bool = False


def step(config: Any, shape: Shape, setting: Setting) -> Step:
    """Simulates a micro-batch: with few layers, and with some more."""
    few, input_bytes = _most_held(config, FEW_LAYERS, shape, setting)
    more, _ = _most_held(config, MORE_LAYERS, shape, setting)
    each = (more - few) // (MORE_LAYERS - FEW_LAYERS)
    return Step(fixed_bytes=few - FEW_LAYERS * each, layer_bytes=each, input_bytes=input_bytes)


def _most_held(config: Any, layers: int, shape: Shape, setting: Setting) -> tuple[int, int]:
    """The most bytes, and those of a layer's input."""
    model = skeletons.make(config, setting.dtype, layers)
    if setting.rung.is_nf4:
        _put_four_bits(model, setting.dtype)
    model = setting.adapt(model).train()
    # A trainer of weights in 16 bits computes under autocast, in 16 bits whatever the adapters are.
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting.dtype != torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake(model)
        if setting.rung.recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            model.enable_input_require_grads()
        if setting.keeps_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        known = [*model.parameters(), *model.buffers()]
        with Held(known) as held:
            for each in known:
                if each.grad is not None:
                    held.see(each.grad.untyped_storage())
            tokens = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)
            base = model.get_base_model()
            with autocast, _one_row_needs_no_mask():
                padding = _mask(tokens, setting) if setting.is_distilled or shape.rows > 1 else None
                hidden = base.base_model(tokens, attention_mask=padding, use_cache=False).last_hidden_state
                loss = _loss(hidden, base.get_output_embeddings(), shape, setting)
            input_bytes = hidden.untyped_storage().nbytes()
            loss.backward()
            return held.most, input_bytes


@contextlib.contextmanager
def _one_row_needs_no_mask() -> Iterator[None]:
    """transformers 5.23 cannot see, in positions without contents, that a row is one conversation, and would mask it."""
    from transformers import masking_utils

    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


def _mask(tokens: Tensor, setting: Setting) -> Tensor:
    return blocks.mask(tokens, setting.dtype) if setting.is_distilled else torch.ones_like(tokens)


def _loss(hidden: Tensor, head: nn.Linear, shape: Shape, setting: Setting) -> Tensor:
    """Computed by what computes it: one of our heads, or, of TRL's Triton kernels, what they allocate."""
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])[: shape.learned_tokens]
    targets = torch.zeros(len(states), dtype=torch.long)
    if setting.is_distilled:
        found: Tensor = divergence_head.Divergence.apply(states, states.detach().clone(), targets, head, None, 0.0)[0]
    elif setting.rung.ends_in_memory:
        found = streamed_head.HeadInParts.apply(states, targets, head, states.device, None)[0]
    elif setting.on_card:
        found = _InPlaceHead.apply(states, head.weight)
    else:
        found = learned_head.LearnedHead.apply(states, targets, head, None)[0]
    return found.sum()


class Held(TorchDispatchMode):  # type: ignore[misc]
    """Adds up the storages that live, but for those known before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        output = function(*arguments, **(named or {}))
        for each in tree_leaves(output):
            if isinstance(each, Tensor):
                self.see(each.untyped_storage())
        return output

    def see(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


class _FourBits(nn.Linear):  # type: ignore[misc]
    """Holds what a linear layer in NF4 holds while it computes: the whole weight, for a moment."""

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = _Widened.apply(states, self.out_features, self.bias)
        return output


class _Widened(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, states: Tensor, width: int, bias: Tensor | None) -> Tensor:
        weight = states.new_empty(width, states.shape[-1])
        ctx.width, ctx.shape = width, states.shape
        return nn.functional.linear(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight = gradients[0].new_empty(ctx.width, ctx.shape[-1])
        return gradients[0] @ weight, None, None


class _InPlaceHead(torch.autograd.Function):  # type: ignore[misc]
    """Holds what TRL's Triton kernels hold: logits of a tile, which become their gradient, and the states' in 32 bits."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        ctx.tile = min(len(states), TILE_TOKENS), min(len(weight), TILE_WORDS)
        states.new_empty(ctx.tile)
        return states.new_empty(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        (states,) = ctx.saved_tensors
        gradient = torch.empty(states.shape, dtype=torch.float32)
        states.new_empty(ctx.tile)
        return gradient.to(states.dtype), None


def linear_layers(model: Any) -> list[nn.Linear]:
    """What is put into four bits: all linear layers but the head, as transformers does for bitsandbytes."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if type(module) is nn.Linear and module is not head]


def _put_four_bits(model: Any, dtype: torch.dtype) -> None:
    chosen = set(linear_layers(model))
    for name, module in list(model.named_modules()):
        if module in chosen:
            bias = module.bias is not None
            four = _FourBits(module.in_features, module.out_features, bias=bias, device="meta", dtype=dtype)
            model.set_submodule(name, four)


def fake(model: Any) -> None:
    """Contents that are none, on the CPU: without a device, torch would compute attention in another way."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
                tensors[name] = made[id(tensor)]
