"""Layer streaming: a model is trained whose frozen weights do not fit on the device, a few layers at a time.

The frozen tensors of each decoder layer (NF4, or as they are) stay in memory, pinned where there is a card. A layer is
brought to the device for its forward, the next one on a side stream meanwhile; its input is kept, and backward brings it
again and computes it again (Chen et al. 2016, arXiv:1604.06174). Adapters, their gradients and the optimizer stay on the
device, the embedding off it; the head is `streamed_head.py`. On the CPU the same is done with copies in memory.
Main entry: `LayerStream`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from appliance.errors import ModelFileError

SLOTS = 2  # layers on the device at once: one computes while the next arrives
MOST_SLOTS = 3
ALIGNMENT_BYTES = 256  # of tensors in a layer's block: what CUDA's allocator guarantees, and kernels may count on


@dataclass(slots=True)
class Counts:
    """What a stream has done since the last `reset`."""

    layers_moved: int = 0
    bytes_moved: int = 0
    most_resident: int = 0
    transfer_seconds: float = 0.0
    _timed: list[tuple[Any, Any]] = field(default_factory=list)

    def settle(self) -> None:
        """Adds the transfers that a card has timed; waits for it."""
        for before, after in self._timed:
            after.synchronize()
            self.transfer_seconds += before.elapsed_time(after) / 1000
        self._timed.clear()


class LayerStream:
    """Streams the decoder layers of a causal language model with adapters to `device`.

    Made once the adapters are in place, DPO's frozen copy included. Raises `ModelFileError` for a model without a list of
    decoder layers. While no layer computes, its weights are where they always lie: in memory, whole and usable.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, keeps_inputs: bool = True) -> None:
        """`keeps_inputs`: layers' inputs wait on the device for backward; else in memory, at the cost of moving them."""
        self.device, self.keeps_inputs, self.counts = device, keeps_inputs, Counts()
        self._layers = [_FrozenLayer(layer, is_pinned=device.type == "cuda") for layer in decoder_layers(model)]
        size = max(layer.size_bytes for layer in self._layers)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(SLOTS)]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        keep_ends_off(model, device, layers_too=True)
        for index, layer in enumerate(self._layers):
            layer.forward = self._streamed(index, layer)

    @property
    def layer_bytes(self) -> Sequence[int]:
        """What each layer takes on the way and on the device."""
        return [layer.size_bytes for layer in self._layers]

    def reset(self) -> None:
        self.counts = Counts()

    def _streamed(self, index: int, layer: "_FrozenLayer") -> Callable[..., Tensor]:
        compute = layer.compute

        def forward(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            trained = [parameter for parameter in layer.adapters if parameter.requires_grad]
            is_recomputed = torch.is_grad_enabled() and (bool(trained) or hidden.requires_grad)
            if is_recomputed and named.get("past_key_values") is not None:
                named = {**named, "past_key_values": None}  # computed again, a layer would find its own keys there

            def run(states: Tensor) -> Tensor:
                output = compute(states, *arguments, **named)
                if not isinstance(output, Tensor):
                    raise ModelFileError(f"A decoder layer of {type(layer.module).__name__} returns more than its states.")
                return output

            if is_recomputed:
                output: Tensor = _Recomputed.apply(self, index, run, hidden, *trained)
                return output
            with self.on_device(index, index + 1):
                return run(hidden)

        return forward

    @contextlib.contextmanager
    def on_device(self, index: int, following: int) -> Iterator[None]:
        """Layer `index` is on the device in this block, and layer `following`, if there is one, on its way."""
        layer = self._layers[index]
        slot = self._bring(index)
        if self._copies is not None and slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        layer.place(slot.block)
        slot.is_computing = True
        if 0 <= following < len(self._layers):
            self._bring(following)
        try:
            yield
        finally:
            slot.is_computing = False
            if self._copies is not None:
                slot.free = torch.cuda.current_stream(self.device).record_event()
            layer.place(layer.host)

    def _bring(self, index: int) -> "_Slot":
        """The slot that has this layer, after the copy was started if none had."""
        for slot in self._slots:
            if slot.index == index:
                slot.used_at = time.monotonic_ns()
                return slot
        slot = min((each for each in self._slots if not each.is_computing), key=lambda each: each.used_at)
        slot.index, slot.used_at = index, time.monotonic_ns()
        layer = self._layers[index]
        self._copy(layer.host, slot)
        self.counts.layers_moved += 1
        self.counts.bytes_moved += layer.size_bytes
        resident = sum(each.index is not None for each in self._slots)
        assert resident <= MOST_SLOTS
        self.counts.most_resident = max(self.counts.most_resident, resident)
        return slot

    def _copy(self, host: Tensor, slot: "_Slot") -> None:
        target = slot.block[: host.numel()]
        if self._copies is None:
            started = time.perf_counter()
            target.copy_(host)
            self.counts.transfer_seconds += time.perf_counter() - started
            return
        with torch.cuda.stream(self._copies):
            if slot.free is not None:
                self._copies.wait_event(slot.free)  # the layer that was there may still be computing
            before = self._copies.record_event(torch.cuda.Event(enable_timing=True))
            target.copy_(host, non_blocking=True)
            slot.arrived = self._copies.record_event(torch.cuda.Event(enable_timing=True))
            self.counts._timed.append((before, slot.arrived))


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The decoder layers in their order; raises `ModelFileError` when the model keeps them in no list of its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    children = getattr(base, base.base_model_prefix).children()  # not deeper: a layer may have lists of experts
    longest = max((child for child in children if isinstance(child, nn.ModuleList)), key=len, default=None)
    if not longest:
        raise ModelFileError(f"{type(base).__name__} has no list of decoder layers, so they cannot be streamed.")
    return list(longest)


def moved_bytes(layer_bytes: Sequence[int], *, passes: int = 1, first: bool = False) -> int:
    """What `passes` forwards with backward move: all but the layers that are still there from the pass before.

    Forward ends with the last layers on the device, where backward begins, and backward ends with the first ones.
    """
    kept = min(SLOTS, len(layer_bytes))
    forward, backward = sum(layer_bytes[kept:]), sum(layer_bytes[: len(layer_bytes) - kept])
    return passes * (forward + backward) + (sum(layer_bytes[:kept]) if first else 0)


class _Recomputed(torch.autograd.Function):  # type: ignore[misc]
    """One layer, whose backward brings and computes it again; random numbers (dropout) and autocast as they were."""

    @staticmethod
    def forward(
        ctx: Any, stream: LayerStream, index: int, run: Callable[[Tensor], Tensor], hidden: Tensor, *trained: Tensor
    ) -> Tensor:
        kind = stream.device.type
        ctx.stream, ctx.index, ctx.run, ctx.trained = stream, index, run, trained
        ctx.random = torch.get_rng_state(), torch.cuda.get_rng_state(stream.device) if kind == "cuda" else None
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.needs_input = hidden.requires_grad
        with stream.on_device(index, index + 1), torch.no_grad():
            output = run(hidden)
        ctx.hidden = hidden.detach() if stream.keeps_inputs else _to_memory(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        stream: LayerStream = ctx.stream
        devices = [stream.device] if stream.device.type == "cuda" else []
        is_cast, kind = ctx.autocast
        hidden = ctx.hidden.to(stream.device, non_blocking=True).detach().requires_grad_(ctx.needs_input)
        with stream.on_device(ctx.index, ctx.index - 1), torch.enable_grad(), torch.random.fork_rng(devices):
            torch.set_rng_state(ctx.random[0])
            if ctx.random[1] is not None:
                torch.cuda.set_rng_state(ctx.random[1], stream.device)
            with torch.autocast(stream.device.type, dtype=kind, enabled=is_cast):
                output = ctx.run(hidden)
            wanted = [*([hidden] if ctx.needs_input else []), *ctx.trained]
            found = list(torch.autograd.grad(output, wanted, gradients[0], allow_unused=True))
        ctx.hidden = None
        return None, None, None, found.pop(0) if ctx.needs_input else None, *found


@dataclass(slots=True)
class _Slot:
    """Room for one layer on the device."""

    block: Tensor
    index: int | None = None  # which layer is there, or on its way
    used_at: int = 0
    is_computing: bool = False
    arrived: Any = None  # event: the copy is done
    free: Any = None  # event: what was computed from it is done


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a tensor lies in a layer's block."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, block: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return block[self.offset : self.offset + size].view(self.dtype).view(self.shape)


Place = Callable[[Tensor], None]  # makes a weight the part of this block that holds it


class _FrozenLayer:
    """The frozen tensors of one decoder layer as one block of memory, so that one copy moves them all."""

    def __init__(self, module: nn.Module, *, is_pinned: bool) -> None:
        self.module = module
        self.compute = module.forward
        self.adapters = _adapters(module)
        resident = {id(parameter) for parameter in self.adapters}
        tensors: list[tuple[int, Tensor]] = []
        self.size_bytes = 0
        self._set: list[Place] = []

        def keep(tensor: Tensor) -> _Piece:
            piece = _Piece(self.size_bytes, tensor.shape, tensor.dtype)
            tensors.append((piece.offset, tensor))
            size = tensor.numel() * tensor.dtype.itemsize
            self.size_bytes = -(-(piece.offset + size) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            return piece

        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None and id(parameter) not in resident:
                    setter = _set_nf4 if isinstance(parameter, Params4bit) else _set_plain
                    self._set.append(setter(each, name, parameter, keep))
        self.host = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        for offset, tensor in tensors:
            size = tensor.numel() * tensor.dtype.itemsize
            self.host[offset : offset + size].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        self.place(self.host)

    @property
    def forward(self) -> Callable[..., Any]:
        forward: Callable[..., Any] = self.module.forward
        return forward

    @forward.setter
    def forward(self, streamed: Callable[..., Any]) -> None:
        self.module.forward = streamed

    def place(self, block: Tensor) -> None:
        """The layer's weights are those of this block from now on."""
        for each in self._set:
            each(block)


def _set_plain(module: nn.Module, name: str, parameter: Tensor, keep: Callable[[Tensor], _Piece]) -> Place:
    piece = keep(parameter)

    def place(block: Tensor) -> None:
        module._parameters[name] = nn.Parameter(piece.of(block), requires_grad=False)

    return place


def _set_nf4(module: nn.Module, name: str, parameter: Params4bit, keep: Callable[[Tensor], _Piece]) -> Place:
    """A bitsandbytes weight with its state, which it keeps as scales, or (`state2`) as scales of scales."""
    state = parameter.quant_state
    piece, code, absmax = keep(parameter.data), keep(state.code), keep(state.absmax)
    nested = (keep(state.offset), keep(state.state2.code), keep(state.state2.absmax)) if state.nested else None

    kept = {each: getattr(parameter, each) for each in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}

    def place(block: Tensor) -> None:
        placed = QuantState(absmax=absmax.of(block), code=code.of(block), shape=state.shape, dtype=state.dtype)
        placed.blocksize, placed.quant_type, placed.nested = state.blocksize, state.quant_type, state.nested
        if nested is not None:
            offset, second_code, second_absmax = (piece.of(block) for piece in nested)
            second = state.state2
            placed.offset = offset
            placed.state2 = QuantState(second_absmax, code=second_code, blocksize=second.blocksize, dtype=second.dtype)
        module._parameters[name] = Params4bit(
            piece.of(block), requires_grad=False, quant_state=placed, bnb_quantized=True, module=module, **kept
        )

    return place


def _adapters(layer: nn.Module) -> Sequence[nn.Parameter]:
    """The parameters that PEFT added: trained ones and frozen copies alike stay on the device."""
    tuners = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    added = (getattr(tuner, name) for tuner in tuners for name in tuner.adapter_layer_names)
    return [parameter for each in added if isinstance(each, nn.Module) for parameter in each.parameters()]


def keep_ends_off(model: Any, device: torch.device, *, layers_too: bool = False) -> None:
    """Everything but embedding and head goes to the device, and tokens are looked up where they lie.

    `layers_too`: nor do the frozen weights of the layers.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kept = [module for module in (embedding, head) if module is not None]
    off = {id(tensor) for module in kept for tensor in [*module.parameters(), *module.buffers()]}
    for layer in decoder_layers(model):
        if layers_too:
            off |= {id(parameter) for parameter in layer.parameters()} - {id(parameter) for parameter in _adapters(layer)}
        else:
            layer.to(device)  # four bits know how to take their scales along
    for module in model.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in off:
                tensor.data = tensor.data.to(device)
    look_up = embedding.forward

    def forward(tokens: Tensor) -> Tensor:
        found: Tensor = look_up(tokens.to(embedding.weight.device)).to(device)
        return found

    embedding.forward = forward


def _to_memory(states: Tensor) -> Tensor:
    host = torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda)
    return host.copy_(states.detach(), non_blocking=True)
