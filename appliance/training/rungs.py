"""The rungs of the ladder: ways to lay out a model while it is trained, each with less on the device than the one before.

What a rung needs is counted in `fit.py`, and done in `layout.py`. That the loss is computed in parts of the vocabulary is no
rung: TRL 1.16 does so always.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """`name` is what the recipe calls it; `about` says it to a person."""

    name: str
    about: str
    weights: str = "float32"  # torch's name of the type of weights that are not in four bits, and of what is computed
    is_nf4: bool = False  # the weights of linear layers in four bits (Dettmers et al. 2023), all but the head's
    recomputes: bool = True  # backward computes each layer again, from its input (Chen et al. 2016)
    inputs_in_memory: bool = False  # these inputs wait in the machine's memory
    ends_in_memory: bool = False  # embedding and head stay there, and come in parts
    streams: bool = False  # and the layers come one after another
    gives_back: bool = False  # freed memory goes back to the system at once


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
    Rung(name="lora", about="LoRA beside whole weights", recomputes=False),
    Rung(name="lora-recomputed", about="the same, each layer computed again in backward"),
    Rung(name="qlora", about="weights in NF4, each layer computed again in backward", is_nf4=True),
    Rung(
        name="qlora-tight",
        about="the same, freed memory given back at once: up to twice the time",
        is_nf4=True,
        gives_back=True,
    ),
)
NAMES = tuple(dict.fromkeys(rung.name for rung in (*CARD, *CPU)))


def ladder(*, has_card: bool, weights: str) -> Sequence[Rung]:
    return [dataclasses.replace(rung, weights=weights) for rung in (CARD if has_card else CPU)]
