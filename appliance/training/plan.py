"""Whether each phase of a recipe will fit, on which rung, and how long it will take: said before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.console import human_bytes, human_seconds
from appliance.data.check import read_rows
from appliance.recipe import Recipe
from appliance.training import choice, conversations, fit, forecast, preference_phase, skeletons, validation
from appliance.training.fit import Device, Fit, Work
from appliance.training.forecast import Course
from appliance.training.model import Base
from appliance.training_settings import PREFERENCES

MOST_SHARE = 0.2  # of a phase's time for validation


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """One phase: every rung, the one that is chosen (None: none fits), its time where this device was asked for."""

    phase: str
    work: Work
    fits: Sequence[Fit]
    chosen: Fit | None
    course: Course
    seconds: float | None
    proposal: str | None
    process_bytes: int


def plan(recipe: Recipe, dataset: Path, base: Base, vram_bytes: int | None) -> list[PhasePlan]:
    """Plans for this device, or for a card of `vram_bytes` with this machine's memory beside it."""
    works = _work(recipe, dataset, base)
    here = choice.now(base)
    device = _card(here, vram_bytes) if vram_bytes else here
    config = skeletons.load_config(base.path)
    model = fit.Model(recipe, config, device)
    found = []
    for phase, work, course in works:
        fits = [model.fit(rung, work) for rung in work.ladder(device)]
        chosen = _chosen(recipe, fits, work)
        seconds = None
        if chosen and vram_bytes is None:
            micro = forecast.micro_step_seconds(recipe, config, work.with_shape(course.shape), device, chosen.rung)
            seconds = course.seconds(micro)
        proposal = None if chosen else choice.proposal(model, fits[-1].rung, work)
        found.append(PhasePlan(phase, work, fits, chosen, course, seconds, proposal, device.process_bytes))
    return found


def _card(here: Device, vram_bytes: int) -> Device:
    return Device(
        on_card=True,
        weights="bfloat16",
        available_bytes=vram_bytes,
        available_memory_bytes=here.available_memory_bytes,
        context_bytes=fit.CONTEXT_BYTES,
        name=f"a card of {human_bytes(vram_bytes)}",
    )


def _chosen(recipe: Recipe, fits: Sequence[Fit], work: Work) -> Fit | None:
    if recipe.memory.rung == "auto":
        return next((each for each in fits if each.fits), None)
    named = [each for each in fits if each.rung.name == recipe.memory.rung]
    if not named:
        fit.refuse(recipe.memory.rung, [each.rung for each in fits], work)
    return named[0] if named[0].fits else None


def _work(recipe: Recipe, dataset: Path, base: Base) -> list[tuple[str, Work, Course]]:
    """Each phase's largest micro-batch, and its course."""
    read = conversations.read(recipe, dataset, base)
    sft = choice.of_sft(recipe, read.labelled)
    lengths = [len(row.input_ids) for row in read.labelled]
    learned = read.learned_tokens / read.tokens
    course = forecast.of_rows(lengths, sft.shape.rows, recipe.sft.epochs, learned)
    if read.heldout:
        course = Course(course.micro_steps, course.shape, _validation_share(recipe, read))
    found = [("sft", sft, course)]
    for phase in recipe.phases:
        settings = getattr(recipe, phase)
        if phase in PREFERENCES:
            examples = preference_phase.check(read.tokenizer, dataset, recipe, phase)
            work = choice.of_preferences(recipe, phase, examples.longest_tokens)
            steps = settings.epochs * max(1, len(examples.rows) // settings.batch_rows)
            found.append((phase, work, Course(steps, work.shape)))
        elif phase == "grpo":
            work = choice.of_grpo(recipe)
            answers = len(read_rows(dataset, "grpo")) * settings.answers
            found.append((phase, work, Course(settings.epochs * max(1, answers // settings.batch_rows), work.shape)))
        elif phase == "passages":
            told = conversations.read_documents(recipe, dataset, base).labelled
            work = choice.of_passages(recipe, told)
            rows = len(told) + round(settings.exact_share * len(told))
            found.append((phase, work, Course(settings.epochs * max(1, rows // settings.batch_rows), work.shape)))
    return found


def _validation_share(recipe: Recipe, read: conversations.Conversations) -> float:
    reading = sum(len(row.input_ids) for row in read.heldout)
    rows = recipe.sft.batch_rows * recipe.sft.accumulate
    steps = max(1, recipe.sft.epochs * len(read.rows) // rows)
    step_tokens = read.tokens * recipe.sft.epochs / steps
    return validation.share(reading, step_tokens, validation.every(reading, step_tokens, steps))


def in_words(found: PhasePlan) -> str:
    """The ladder as a table, what is chosen, and how long it will take."""
    shape = found.work.shape
    lines = [f"{found.phase}: {shape.rows} rows of up to {shape.tokens:,} tokens at once"]
    for each in found.fits:
        mark = "→" if found.chosen is each else " "
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in each.parts.items())
        beside = f"; in memory {human_bytes(each.memory_bytes)}" if each.memory_bytes else ""
        state = "fits" if each.fits else "too large"
        lines.append(f" {mark} {each.rung.name:<16} {human_bytes(each.needed_bytes):>10}  {state:<9}  {parts}{beside}")
    free = human_bytes(found.fits[0].available_bytes)
    lines.append(f"   free: {free}")
    if found.seconds is not None:
        lines.append(f"   about {human_seconds(found.seconds)} for {found.course.micro_steps:,} micro-steps")
    if found.course.validation_share > MOST_SHARE:
        share = found.course.validation_share
        lines.append(f"   of which validation takes {share:.0%}; lower sft.validation_rows")
    if found.proposal:
        lines.append(f"   nothing fits. {found.proposal}")
    return "\n".join(lines)


def as_data(found: PhasePlan) -> dict[str, Any]:
    """The same for JSON; all sizes in bytes."""
    return {
        "phase": found.phase,
        "rows": found.work.shape.rows,
        "tokens": found.work.shape.tokens,
        "process_bytes": found.process_bytes,
        "chosen": found.chosen.rung.name if found.chosen else None,
        "seconds": found.seconds,
        "micro_steps": found.course.micro_steps,
        "validation_share": found.course.validation_share,
        "proposal": found.proposal,
        "rungs": [
            {
                "name": each.rung.name,
                "about": each.rung.about,
                "weights": each.rung.weights,
                "fits": each.fits,
                "needed_bytes": each.needed_bytes,
                "available_bytes": each.available_bytes,
                "memory_bytes": each.memory_bytes,
                "parts": dict(each.parts),
            }
            for each in found.fits
        ],
    }
