"""Settings of a recipe that say how its phases train: the adapter, the optimizer, and what is each phase's own."""

import dataclasses
from pathlib import Path
from typing import Literal

from appliance.config import setting
from appliance.reward_settings import Rewards

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"]
Rung = Literal["auto", "lora", "lora-recomputed", "qlora", "qlora-tight", "qlora-inputs", "qlora-ends", "streamed"]
Scheduler = Literal["cosine", "linear", "constant"]
PREFERENCES = ("dpo", "kto", "orpo")  # phases that learn which answers are better; a recipe has one of them at most
ORDER = ("sft", *PREFERENCES, "grpo", "passages")  # of all phases: each continues the adapter of the one before


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    rung: Rung = setting(
        "auto", about="how the model is laid out while it trains; auto: the first of `appliance plan` that fits"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    rank: int = setting(16, minimum=1, maximum=1024)
    alpha: int = setting(32, minimum=1)
    dropout: float = setting(0.0, minimum=0.0, maximum=0.9)
    rslora: bool = setting(False, about="scale by alpha / sqrt(rank) instead of alpha / rank, for high ranks")
    dora: bool = setting(
        False, about="learn the length of each row of a weight, too; slower, and merged only, never swapped"
    )
    targets: str | tuple[str, ...] = setting(
        "all-linear", about="or attention, mlp, or names of linear layers such as q_proj; one of them or a list"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What every phase has. How long and how fast it learns is its own, and so has no default here."""

    epochs: int = setting(minimum=1)
    learning_rate: float = setting(minimum=0.0)
    batch_rows: int = setting(minimum=1)
    accumulate: int = setting(minimum=1, about="micro-batches per optimizer step")
    optimizer: Optimizer = setting("adamw", about="8 bits hold its state in a quarter; paged moves it off a full card")
    scheduler: Scheduler = setting("cosine", about="what the learning rate does after the warm-up; the first two end at 0")
    warmup_ratio: float = setting(
        0.03, minimum=0.0, maximum=0.99, about="part of the steps over which the rate rises; 1 would be read as one step"
    )
    max_gradient_norm: float = setting(1.0, minimum=0.0, about="longer gradients are shortened to it; 0: none")
    liger: bool = setting(False, about="Liger's Triton kernels, on a card of compute capability 7.0 or more")
    checkpoint_steps: int = setting(50, minimum=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sft(Phase):
    epochs: int = setting(3, minimum=1)
    learning_rate: float = setting(2e-4, minimum=0.0)
    batch_rows: int = setting(2, minimum=1)
    accumulate: int = setting(4, minimum=1, about="micro-batches per optimizer step")
    max_tokens: int = setting(1024, minimum=16, about="a longer conversation is an error, unless `truncate`")
    truncate: bool = setting(False, about="cut what is longer than max_tokens; a cut answer teaches no end")
    packing: bool = setting(False, about="rows of a micro-batch one behind the other, not padded; the same gradients")
    validation_rows: int = setting(32, minimum=0, about="of data.heldout, whose loss is measured while training; 0: none")
    patience: int = setting(0, minimum=0, about="validations without a better one, after which training stops; 0: never")
    keep: Literal["best", "last"] = setting("best", about="the adapter of the best validation, or of the last step")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dpo(Phase):
    epochs: int = setting(2, minimum=1)
    learning_rate: float = setting(5e-6, minimum=0.0)
    batch_rows: int = setting(2, minimum=1)
    accumulate: int = setting(4, minimum=1, about="micro-batches per optimizer step")
    max_tokens: int = setting(1024, minimum=16, about="prompt and answer together; longer is an error, never cut")
    beta: float = setting(0.1, minimum=0.0)
    sft_weight: float = setting(0.0, minimum=0.0, about="weight of the likelihood of the chosen answer (RPO)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kto(Phase):
    epochs: int = setting(2, minimum=1)
    learning_rate: float = setting(5e-6, minimum=0.0)
    batch_rows: int = setting(4, minimum=2, about="answers; of each batch, others are the measure of how far all moved")
    accumulate: int = setting(2, minimum=1, about="micro-batches per optimizer step")
    max_tokens: int = setting(1024, minimum=16, about="prompt and answer together; longer is an error, never cut")
    beta: float = setting(0.1, minimum=0.0)
    good_weight: float = setting(1.0, minimum=0.0, about="of answers that are wanted; raise it where they are few")
    bad_weight: float = setting(1.0, minimum=0.0, about="of answers that are not")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Orpo(Phase):
    epochs: int = setting(2, minimum=1)
    learning_rate: float = setting(5e-6, minimum=0.0)
    batch_rows: int = setting(2, minimum=1)
    accumulate: int = setting(4, minimum=1, about="micro-batches per optimizer step")
    max_tokens: int = setting(1024, minimum=16, about="prompt and answer together; longer is an error, never cut")
    beta: float = setting(0.1, minimum=0.0, about="weight of the odds ratio beside the likelihood of the chosen answer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grpo(Phase):
    epochs: int = setting(1, minimum=1)
    learning_rate: float = setting(1e-5, minimum=0.0)
    batch_rows: int = setting(8, minimum=1, about="answers computed at the same time")
    accumulate: int = setting(1, minimum=1, about="micro-batches per optimizer step")
    answers: int = setting(8, minimum=2, about="to each prompt, which are compared with each other: a group")
    answer_tokens: int = setting(256, minimum=1, about="an answer is cut there")
    max_tokens: int = setting(1024, minimum=16, about="prompt and answer together; a longer prompt is an error, never cut")
    temperature: float = setting(1.0, minimum=0.01, maximum=10.0)
    beta: float = setting(0.04, minimum=0.0, about="how strongly the adapter is held near the one it continues")
    adapter: Path | None = setting(None, about="of an earlier round, to continue instead of the phase before")
    lint_prompts: int = setting(6, minimum=2, about="whose answers are sampled beforehand to try the rewards on")
    rewards: Rewards = Rewards()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Passages(Phase):
    """Documents read each by itself, as serving may have read them before: says what ordinary reading would."""

    epochs: int = setting(2, minimum=1)
    learning_rate: float = setting(1e-4, minimum=0.0)
    batch_rows: int = setting(2, minimum=1)
    accumulate: int = setting(4, minimum=1, about="micro-batches per optimizer step")
    max_tokens: int = setting(1024, minimum=16, about="documents, conversation and answer together; longer is an error")
    sft_weight: float = setting(0.0, minimum=0.0, about="weight of the likelihood of the row's own answer, read so")
    exact_share: float = setting(
        0.5, minimum=0.0, maximum=1.0, about="of the rows, also trained on as they are read ordinarily, which so stays"
    )
