"""What a streamed step would take on cards that are not here: `python -m benchmarks.projection`.

Operations are counted by torch on tensors without contents: forward, recomputed, backward; bytes are those that the stream
moves (`stream.moved_bytes`, which a test holds against what it does move). Divided by what a card computes and its slot
carries. What part of its peak a card reaches is assumed, and said; nothing here was measured on a card.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import click
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from appliance.console import Command, emit, human_seconds, json_option
from appliance.training import adapters, fit, simulation, skeletons, stream, streamed_head
from appliance.training_settings import Lora
from benchmarks import about, checkpoints

FEW_LAYERS, MORE_LAYERS = 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    """`flops` a second at its peak in 16 bits, the part of it that is assumed to be reached, bytes a second of its slot."""

    name: str
    flops: float
    reached: float
    slot_bytes: float


# Peaks from the makers' data sheets; slots at 80 % of PCIe's rate. Tensor cores add in 32 bits on all of them but the P100,
# which has none. NF4 is widened before each product, which costs a fifth to a third on small batches (QLoRA, Dettmers 2023).
CARDS: Sequence[Card] = (
    Card("RTX 3050 (laptop, 4 GB)", 11e12, 0.4, 0.8 * 15.8e9),  # 2,048 cores at 1.35 GHz; PCIe 4.0 x8
    Card("Tesla P100 (PCIe, 16 GB)", 18.7e12, 0.4, 0.8 * 15.8e9),  # PCIe 3.0 x16
    Card("RX 7800 XT (16 GB)", 74.6e12, 0.25, 0.8 * 31.5e9),  # PCIe 4.0 x16
)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """A micro-batch: the base's shape, the phase, rows of so many tokens."""

    base: str
    phase: str
    rows: int
    tokens: int


WORKS: Sequence[Work] = (
    Work("4B", "sft", 1, 1024),
    Work("4B", "dpo", 2, 1024),
    Work("Qwen2.5-7B", "sft", 1, 2048),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """Of one micro-batch: operations, and bytes that are brought to the card."""

    work: Work
    flops: float
    moved_bytes: int

    def seconds(self, card: Card) -> tuple[float, float]:
        """Computing and moving. They overlap, so that the longer one counts."""
        return self.flops / (card.flops * card.reached), self.moved_bytes / card.slot_bytes


@click.command(cls=Command)
@json_option
def projection(as_json: bool) -> None:
    """Project the time of a streamed micro-step on three small cards."""
    steps = [step(work) for work in WORKS]
    rows = [
        {**dataclasses.asdict(each), "card": card.name, "compute_seconds": compute, "move_seconds": move}
        for each in steps
        for card in CARDS
        for compute, move in [each.seconds(card)]
    ]
    emit({**about.versions(about.TRAINING), "steps": rows}, as_json, "\n".join(table(steps)))


def step(work: Work) -> Step:
    """Counts one micro-batch of all layers; of the layers two depths are simulated."""
    config = checkpoints.config(work.base)
    layers = int(config.num_hidden_layers)
    few, more = (_flops(config, count, work) for count in (FEW_LAYERS, MORE_LAYERS))
    flops = few + (layers - FEW_LAYERS) * (more - few)
    layer = _layer_bytes(config)
    # DPO reads chosen and rejected once more with the frozen adapter: a forward, no gradient.
    reference = (layers - stream.SLOTS) * layer if work.phase == "dpo" else 0
    moved = stream.moved_bytes([layer] * layers) + reference + 2 * _head_bytes(config)
    return Step(work, flops, moved)


def _flops(config: Any, layers: int, work: Work) -> float:
    """Forward, the layers once more, backward to the adapters; DPO's reference is a forward besides."""
    model = adapters.add(skeletons.make(config, torch.bfloat16, layers), Lora(rank=16, alpha=32), is_skeleton=True).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        simulation.fake(model)
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
        tokens = torch.zeros(work.rows, work.tokens, dtype=torch.long)
        base = model.get_base_model()
        head = base.get_output_embeddings()

        def forward() -> Any:
            hidden = base.base_model(tokens, use_cache=False).last_hidden_state
            states = hidden.reshape(-1, hidden.shape[-1])
            return streamed_head.HeadInParts.apply(states, tokens.reshape(-1), head, states.device, None)[0].sum()

        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", dtype=torch.bfloat16):
            if work.phase == "dpo":
                with torch.no_grad():
                    forward()
            loss = forward()
            loss.backward()
        return float(counter.get_total_flops())


def _layer_bytes(config: Any) -> int:
    """Of one decoder layer: linear weights in NF4, norms as they are."""
    model = skeletons.make(config, torch.bfloat16, 1)
    (layer,) = stream.decoder_layers(model)
    linear = {id(module.weight) for module in simulation.linear_layers(model)}
    return sum(
        fit.nf4_bytes(weight.numel()) if id(weight) in linear else weight.numel() * weight.dtype.itemsize
        for weight in layer.parameters()
    )


def _head_bytes(config: Any) -> int:
    """The head comes in parts, once for the forward and once for backward."""
    return int(config.vocab_size * config.hidden_size * torch.bfloat16.itemsize)


def table(steps: Sequence[Step]) -> list[str]:
    lines = ["| Micro-step | Operations | Moved | Card | Computing | Moving | Step |", "|---|---:|---:|---|---:|---:|---:|"]
    for each in steps:
        work: Mapping[str, Any] = dataclasses.asdict(each.work)
        what = "{base}, {phase} {rows} x {tokens:,}".format(**work)
        for card in CARDS:
            compute, move = each.seconds(card)
            sizes = f"{each.flops / 1e12:.1f} T | {each.moved_bytes / 1e9:.2f} GB"
            times = f"{compute:.2f} s | {move:.2f} s | {max(compute, move):.1f} s"
            lines.append(f"| {what} | {sizes} | {card.name} | {times} |")
    slowest = max(max(each.seconds(CARDS[0])) for each in steps)
    return [*lines, "", f"1,000 micro-steps of the slowest on the first card: {human_seconds(1000 * slowest)}."]


if __name__ == "__main__":
    projection()
