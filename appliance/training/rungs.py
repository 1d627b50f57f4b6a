"""The rungs of the ladder: ways to lay out a model while it is trained, each with less on the device than the one before.

What a rung needs is counted in `fit.py`, and done in `layout.py`. That the loss is computed in parts of the vocabulary is no
rung: TRL 1.16 does so always.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """`name` is what the recipe calls it; `about` says it to a person."""

    name: str
    about: str
    is_nf4: bool = False  # the weights of linear layers in four bits (Dettmers et al. 2023), all but the head's
    recomputes: bool = True  # backward computes each layer again, from its input (Chen et al. 2016)
    inputs_in_memory: bool = False  # these inputs wait in the machine's memory
    ends_in_memory: bool = False  # embedding and head stay there, and come in parts
    streams: bool = False  # and the layers come one after another


LORA = Rung(name="lora", about="LoRA beside whole weights")
QLORA = Rung(name="qlora", about="weights in NF4", is_nf4=True)
CARD: Sequence[Rung] = (
    LORA,
    QLORA,
    Rung(name="qlora-inputs", about="NF4, layers' inputs in the machine's memory", is_nf4=True, inputs_in_memory=True),
    Rung(
        name="qlora-ends",
        about="NF4, inputs, embedding and head in the machine's memory",
        is_nf4=True,
        inputs_in_memory=True,
        ends_in_memory=True,
    ),
    Rung(
        name="streamed",
        about="NF4, layers brought to the card one after another",
        is_nf4=True,
        inputs_in_memory=True,
        ends_in_memory=True,
        streams=True,
    ),
)
CPU: Sequence[Rung] = (
    Rung(name="lora", about="LoRA beside weights in 32 bits", recomputes=False),
    Rung(name="lora-recomputed", about="the same, each layer computed again in backward"),
    Rung(name="qlora", about="weights in NF4, each layer computed again in backward", is_nf4=True),
)
NAMES = tuple(dict.fromkeys(rung.name for rung in (*CARD, *CPU)))


def ladder(*, has_card: bool) -> Sequence[Rung]:
    return CARD if has_card else CPU
