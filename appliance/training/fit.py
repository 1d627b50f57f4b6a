"""How much memory each rung of the ladder needs for a recipe on a base, against what is free: which one is trained with.

Weights are counted exactly, from the model without contents; what a step holds is simulated (`simulation.py`). Nothing is
loaded. Main entry: `Model.fit`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from appliance import allocator
from appliance.errors import RecipeError
from appliance.recipe import Recipe
from appliance.training import adapters, rungs, simulation, skeletons, stream, streamed_head
from appliance.training.rungs import Rung
from appliance.training.simulation import Setting, Shape
from appliance.training_settings import Optimizer

MIB = 1 << 20
# Of bitsandbytes: weights a scale, scales a scale; tables of 16 and 256 values, and what is taken from all scales.
NF4_BLOCK, NF4_NESTED_BLOCK, NF4_TABLES_BYTES = 64, 256, 4 * (16 + 256 + 1)
CONTEXT_BYTES = 450 * MIB  # of CUDA and its libraries, where there is no card to ask: 300 to 500 MiB by driver and card
SPARE = 0.04  # of a card's memory: what the allocator rounds up and cannot join again
# A trained weight's: two moments in 32 bits, or in 8; Adafactor keeps sums of rows and columns, which are next to nothing.
OPTIMIZER_BYTES: Mapping[Optimizer, int] = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}
KEPT = "kept by the allocator"  # a part, on a CPU
LOGIT_COPIES = 4  # in 32 bits: logits, their logarithms of shares, and the gradients of both


@dataclass(frozen=True, slots=True)
class Fit:
    """What a rung needs on the device, part by part, and in the machine's memory beside it; all in bytes."""

    rung: Rung
    parts: Mapping[str, int]
    memory_bytes: int
    available_bytes: int
    available_memory_bytes: int

    @property
    def needed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes and self.memory_bytes <= self.available_memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where is trained: a card or the machine's memory. `available_bytes` are free, `context_bytes` will be taken first."""

    on_card: bool
    weights: str  # the type that a base is trained in there, as torch names it
    available_bytes: int
    available_memory_bytes: int
    context_bytes: int = 0
    name: str = "CPU"
    process_bytes: int = 0  # that this process has taken already, on a CPU
    kept_share: float = 0.0  # of a step's tensors, by a CPU's allocator

    @property
    def dtype(self) -> Any:
        import torch

        return getattr(torch, self.weights)


def refuse(name: str, ladder: Sequence[Rung], work: "Work") -> NoReturn:
    """Raises `RecipeError` for a rung that the recipe names and this device, or this work, has not."""
    whose = (
        "this device's, with the whole head there, as the phase 'passages' wants it"
        if work.is_distilled
        else "this device's"
    )
    raise RecipeError(f"memory.rung: {name!r} is none of {whose}: {', '.join(rung.name for rung in ladder)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is trained on: the largest micro-batch, whether several make a step, whether a frozen adapter is beside it."""

    shape: Shape
    accumulates: bool
    has_reference: bool
    optimizer: Optimizer = "adamw"
    has_whole_logits: bool = False  # ORPO of TRL 1.16 computes all logits of a batch
    generates: bool = False  # GRPO keeps keys and values of the answers that it writes
    is_distilled: bool = False  # a teacher's distributions beside the student's, who sees documents apart

    def with_shape(self, shape: Shape) -> "Work":
        return dataclasses.replace(self, shape=shape)

    def ladder(self, device: Device) -> Sequence[Rung]:
        """The rungs of a device that can do it: two distributions are not compared a part of the vocabulary at a time."""
        every = rungs.ladder(has_card=device.on_card, weights=device.weights)
        return [rung for rung in every if not (self.is_distilled and rung.ends_in_memory)]


class Model:
    """A base and the recipe's adapters on a device, whose parts are counted once."""

    def __init__(self, recipe: Recipe, config: Any, device: Device) -> None:
        self._recipe, self._config, self._device = recipe, config, device
        self._layers = int(config.get_text_config().num_hidden_layers)

    def fit(self, rung: Rung, work: Work) -> Fit:
        device = self._device
        setting = Setting(
            rung=rung,
            dtype=device.dtype,
            adapt=self._adapt,
            on_card=device.on_card,
            keeps_gradients=work.accumulates,
            is_distilled=work.is_distilled,
        )
        # Rungs of a card differ in what is taken away afterwards, not in what is computed.
        same = dataclasses.replace(rung, inputs_in_memory=False, streams=False)
        step = self._step(dataclasses.replace(setting, rung=same), work.shape)
        held = step.most_bytes(self._layers)
        inputs = (self._layers - stream.SLOTS) * step.input_bytes if rung.inputs_in_memory else 0
        layers, ends, rest = self._weights(rung)
        trained = self._trained
        parts = {
            "context": device.context_bytes,
            "weights": rest + (0 if rung.streams else layers) + (0 if rung.ends_in_memory else ends),
            "layers on the way": stream.SLOTS * layers // self._layers if rung.streams else 0,
            "head on the way": 2 * self._head_part if rung.ends_in_memory else 0,
            "adapter": 4 * trained * (2 if work.has_reference else 1),
            "optimizer": OPTIMIZER_BYTES[work.optimizer] * trained,
            "step": held - inputs,
            "logits": self._logits(work) if work.has_whole_logits else 0,
            "keys and values": self._cache(work) if work.generates else 0,
        }
        if not device.on_card:
            share = allocator.KEPT_BY_TCMALLOC if rung.gives_back else device.kept_share
            parts[KEPT] = int(share * step.most_bytes(self._layers))
        if device.on_card:
            parts["rounding"] = int(SPARE * sum(parts.values()))
        memory = inputs + (layers if rung.streams else 0) + (ends if rung.ends_in_memory else 0)
        shown = {name: size for name, size in parts.items() if size}
        return Fit(rung, shown, memory, device.available_bytes, device.available_memory_bytes)

    def _adapt(self, model: Any) -> Any:
        return adapters.add(model, self._recipe.lora, is_skeleton=True)

    @functools.lru_cache(maxsize=16)  # noqa: B019  (as long as the ladder is computed)
    def _step(self, setting: Setting, shape: Shape) -> simulation.Step:
        return simulation.step(self._config, shape, setting)

    @functools.cached_property
    def _skeleton(self) -> Any:
        return skeletons.make(self._config, self._device.dtype)

    @functools.cached_property
    def _trained(self) -> int:
        few = self._adapt(skeletons.make(self._config, self._device.dtype, simulation.FEW_LAYERS))
        more = self._adapt(skeletons.make(self._config, self._device.dtype, simulation.MORE_LAYERS))
        first, second = (sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (few, more))
        each = (second - first) // (simulation.MORE_LAYERS - simulation.FEW_LAYERS)
        return int(first + (self._layers - simulation.FEW_LAYERS) * each)

    def _logits(self, work: Work) -> int:
        vocabulary = self._skeleton.get_output_embeddings().out_features
        return int(LOGIT_COPIES * 4 * work.shape.rows * work.shape.tokens * vocabulary)

    def _cache(self, work: Work) -> int:
        config = self._config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        cached = 2 * self._layers * heads * width * self._device.dtype.itemsize
        return int(work.shape.rows * work.shape.tokens * cached)

    @property
    def _head_part(self) -> int:
        head = self._skeleton.get_output_embeddings()
        return int(min(streamed_head.PART_ROWS, head.out_features) * head.in_features * self._device.dtype.itemsize)

    def _weights(self, rung: Rung) -> tuple[int, int, int]:
        """Bytes of the decoder layers, of embedding and head, and of the rest, each weight once."""
        model = self._skeleton
        four_bits = {id(module.weight) for module in simulation.linear_layers(model)} if rung.is_nf4 else set()
        ends = {id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
        layers = {id(weight) for layer in stream.decoder_layers(model) for weight in layer.parameters()}
        found = {"layers": 0, "ends": 0, "rest": 0}
        for weight in model.parameters():  # each once, tied ones too
            size = nf4_bytes(weight.numel()) if id(weight) in four_bits else weight.numel() * weight.dtype.itemsize
            found["layers" if id(weight) in layers else "ends" if id(weight) in ends else "rest"] += size
        found["rest"] += sum(each.numel() * each.dtype.itemsize for each in model.buffers())
        return found["layers"], found["ends"], found["rest"]


def nf4_bytes(weights: int) -> int:
    """Of a matrix in NF4 with its scales in 8 bits (double quantization)."""
    scales = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + scales + 4 * -(-scales // NF4_NESTED_BLOCK) + NF4_TABLES_BYTES
