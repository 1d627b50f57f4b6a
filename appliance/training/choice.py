"""Which rung a phase is trained on, here and now: the recipe's, that of the run which is resumed, or the first that fits."""

from collections.abc import Sequence
from pathlib import Path

from appliance import allocator, artifacts, device, memory_holders
from appliance.console import human_bytes
from appliance.errors import EnvironmentIncomplete
from appliance.recipe import Recipe
from appliance.training import fit, layout, processes, skeletons
from appliance.training import model as models
from appliance.training.fit import Device, Fit, Work
from appliance.training.labels import LabelledRow
from appliance.training.model import Base
from appliance.training.rungs import Rung
from appliance.training.simulation import Shape

# What a process takes besides, once it has all modules and the rows: progress, curves, the trainer's own. Measured.
COMING_BYTES = 64 * fit.MIB
MUCH_KEPT_BYTES = 256 * fit.MIB


def of_sft(recipe: Recipe, rows: Sequence[LabelledRow]) -> Work:
    """Batches of the longest rows, as padding makes all of them that long."""
    count, accumulate = processes.share(recipe.sft.batch_rows, recipe.sft.accumulate, "sft")
    count = min(count, len(rows))
    longest = sorted(rows, key=lambda row: len(row.input_ids))[-count:]
    tokens = max(len(row.input_ids) for row in longest)
    learned = sum(sorted(row.learned_tokens for row in rows)[-count:])
    shape = Shape(count, tokens, learned)
    return Work(shape=shape, accumulates=accumulate > 1, has_reference=False, optimizer=recipe.sft.optimizer)


def of_preferences(recipe: Recipe, phase: str, longest_tokens: int) -> Work:
    """A chosen and a rejected answer for each row; KTO's answers come one by one, each with another beside it."""
    settings = getattr(recipe, phase)
    count, accumulate = processes.share(settings.batch_rows, settings.accumulate, phase)
    rows = 2 * count if phase != "kto" else count
    shape = Shape(rows, longest_tokens, rows * longest_tokens)
    return Work(
        shape=shape,
        accumulates=accumulate > 1,
        has_reference=True,
        optimizer=settings.optimizer,
        has_whole_logits=phase == "orpo",
    )


def of_grpo(recipe: Recipe) -> Work:
    """Prompts with answers of the most tokens that they may have."""
    count, accumulate = processes.share(recipe.grpo.batch_rows, recipe.grpo.accumulate, "grpo")
    shape = Shape(count, recipe.grpo.max_tokens, count * recipe.grpo.answer_tokens)
    return Work(shape=shape, accumulates=accumulate > 1, has_reference=True, optimizer=recipe.grpo.optimizer, generates=True)


def of_passages(recipe: Recipe, rows: Sequence[LabelledRow]) -> Work:
    """Batches of the longest rows, read by the teacher and by the student, whose attention has a mask of its own."""
    settings = recipe.passages
    count, accumulate = processes.share(settings.batch_rows, settings.accumulate, "passages")
    count = min(count, len(rows))
    tokens = max(len(row.input_ids) for row in rows)
    learned = sum(sorted(row.learned_tokens for row in rows)[-count:])
    return Work(
        shape=Shape(count, tokens, learned),
        accumulates=accumulate > 1,
        has_reference=True,
        optimizer=settings.optimizer,
        is_distilled=True,
    )


def choose(recipe: Recipe, base: Base, work: Work, checkpoint: Path | None, adapter: Path | None = None) -> Rung:
    """The rung to train on; `adapter` is the one that is continued, which weights in other types would have to fit.

    Raises `EnvironmentIncomplete` where none fits, with what each needs and what would help.
    """
    if checkpoint is not None:
        return layout.remembered(checkpoint.parent)
    here = now(base)
    ladder = work.ladder(here)
    if processes.is_sharded():  # every card has its part; that there are cards enough is for who started so many
        return ladder[0]
    named = [rung for rung in ladder if rung.name == recipe.memory.rung]
    if recipe.memory.rung != "auto":
        return named[0] if named else fit.refuse(recipe.memory.rung, ladder, work)
    model = fit.Model(recipe, skeletons.load_config(base.path), here)
    fits: list[Fit] = []
    for rung in _continuing(ladder, adapter):
        fits.append(model.fit(rung, work))
        if fits[-1].fits:
            _tell(fits)
            return rung
    raise EnvironmentIncomplete(f"{_in_words(fits[-1])} {proposal(model, fits[-1].rung, work)}")


def now(base: Base) -> Device:
    """This process's device, as this base would be trained on it, with what is free at this moment."""
    import torch

    own = 0 if models.has_gpu() else _own_bytes()
    memory = device.memory_available_bytes() // processes.local_count()
    if not models.has_gpu():
        weights = models.weight_type(base.path)
        return Device(
            on_card=False,
            weights=weights,
            kept_share=allocator.kept_share(weights),
            available_bytes=memory,
            available_memory_bytes=memory,
            context_bytes=COMING_BYTES,
            process_bytes=own,
        )
    index = processes.local_index()
    torch.ones(1, device=f"cuda:{index}")  # with its context, what it takes is no longer free
    free, _ = torch.cuda.mem_get_info(index)
    return Device(
        on_card=True,
        weights=models.weight_type(base.path),
        available_bytes=int(free),
        available_memory_bytes=memory,
        name=torch.cuda.get_device_name(index),
    )


def _own_bytes() -> int:
    """What this process holds before a model, with all that training will import."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch._subclasses.fake_tensor  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    return memory_holders.own_bytes()


def proposal(model: fit.Model, rung: Rung, work: Work) -> str:
    """What of batch and length would fit; nothing of it is done by itself."""
    rows, tokens = work.shape.rows, work.shape.tokens
    tries = [(rows // 2**halved, tokens) for halved in range(1, rows.bit_length())]
    tries += [(1, tokens * part // 4) for part in (3, 2, 1)]
    for fewer, shorter in tries:
        smaller = Shape(max(1, fewer), shorter, max(1, fewer) * shorter)
        if model.fit(rung, work.with_shape(smaller)).fits:
            what = "a batch of" if shorter == tokens else f"at most {shorter:,} tokens in a row, and a batch of"
            return f"It would with {what} {max(1, fewer)} of {rows} rows (raise accumulate in return)."
    return "No smaller batch or length fits either; take a smaller base, or free memory."


def _continuing(ladder: Sequence[Rung], adapter: Path | None) -> Sequence[Rung]:
    """Rungs whose weights are of the adapter's type first: an adapter corrects the weights that it was trained beside."""
    if adapter is None or not (adapter / artifacts.MANIFEST).is_file():
        return ladder
    is_nf4 = artifacts.load(adapter).results.get("trained_on") == "nf4"
    return sorted(ladder, key=lambda rung: rung.is_nf4 != is_nf4)


def _tell(fits: Sequence[Fit]) -> None:
    found = fits[-1]
    kept = found.parts.get(fit.KEPT, 0)
    if kept > MUCH_KEPT_BYTES and not allocator.is_tcmalloc():
        processes.note(
            f"memory: glibc keeps about {human_bytes(kept)} of what a step frees; tcmalloc (Debian: libtcmalloc-minimal4,"
            " which `make train` then uses) needs less and is faster"
        )
    if len(fits) > 1:
        processes.note(f"memory: {found.rung.about}: {_in_words(found)} {_in_words(fits[0])}")


def _in_words(found: Fit) -> str:
    holder = memory_holders.largest() if not found.fits else None
    return (
        f"{found.rung.name} needs {human_bytes(found.needed_bytes)} of {human_bytes(found.available_bytes)} that are free"
        + (f" ({holder} holds the most)" if holder else "")
        + "."
    )
