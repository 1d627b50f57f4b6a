"""A recipe's conversations as checked tokens and labels; too long ones are refused, or cut where the recipe says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data import examples
from appliance.data.check import read_rows
from appliance.data.documents import DOCUMENTS
from appliance.data.formats import Row
from appliance.errors import DataError
from appliance.recipe import Recipe
from appliance.training import labels, preference_phase, processes, prompts, reward_linter
from appliance.training import model as models
from appliance.training.labels import LabelledRow
from appliance.training.model import Base
from appliance.training.rewards import registry
from appliance.training_settings import Passages, Sft


@dataclass(frozen=True, slots=True)
class Conversations:
    """`labelled` are `rows` as tokens; `heldout` those to validate on; `left_out` counts rows of which no answer fits."""

    tokenizer: Any
    rows: list[Row]
    labelled: list[LabelledRow]
    heldout: list[LabelledRow]
    left_out: int

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.labelled)

    @property
    def learned_tokens(self) -> int:
        return sum(row.learned_tokens for row in self.labelled)

    @property
    def cut_rows(self) -> int:
        return sum(row.cut_tokens > 0 for row in self.labelled)


def read(recipe: Recipe, dataset: Path, base: Base) -> Conversations:
    """Raises `DataError` for rows that are too long, those of later phases too: not after hours of this one."""
    rows = read_rows(dataset, "sft")
    tokenizer = models.load_tokenizer(base.path)
    template = models.marked_template(base.path, tokenizer)
    kept, labelled = _label(tokenizer, rows, template, recipe.sft, recipe.data.sft)
    chosen = examples.spread(read_rows(dataset, "heldout"), recipe.sft.validation_rows)
    heldout: list[LabelledRow] = []
    if chosen and recipe.data.heldout:
        _, heldout = _label(tokenizer, chosen, template, recipe.sft, recipe.data.heldout)
    if recipe.preference_phase:
        preference_phase.check(tokenizer, dataset, recipe, recipe.preference_phase)
    if "grpo" in recipe.phases:  # and rewards that cannot be trained with
        asked = prompts.read_checked(tokenizer, dataset, recipe)
        reward_linter.lint(registry.build(recipe, asked), asked, [], recipe.languages)
    if "passages" in recipe.phases:
        read_documents(recipe, dataset, base)
    return Conversations(tokenizer, kept, labelled, heldout, len(rows) - len(kept))


def read_documents(recipe: Recipe, dataset: Path, base: Base) -> Conversations:
    """The rows that have documents, for the phase that learns to read each by itself.

    Raises `DataError` where there are none, and for rows that are too long: none is ever cut, since its answer comes last.
    """
    tokenizer = models.load_tokenizer(base.path)
    template = models.marked_template(base.path, tokenizer)
    every = read_rows(dataset, "sft")
    rows = [row for row in every if row.get(DOCUMENTS)]
    if not rows:
        raise DataError(
            f"{recipe.data.sft}: none of its {len(every)} rows has documents, from which the phase 'passages' learns; give"
            " rows some (docs/data.md), or leave the phase out."
        )
    kept, labelled = _label(tokenizer, rows, template, recipe.passages, recipe.data.sft)
    heldout: list[LabelledRow] = []
    others = [row for row in read_rows(dataset, "heldout") if row.get(DOCUMENTS)]
    if others and recipe.data.heldout:
        _, heldout = _label(tokenizer, others, template, recipe.passages, recipe.data.heldout)
    return Conversations(tokenizer, kept, labelled, heldout, 0)


def _label(
    tokenizer: Any, rows: list[Row], template: str | None, settings: Sft | Passages, file: Path
) -> tuple[list[Row], list[LabelledRow]]:
    phase = type(settings).__name__.lower()
    unfolded = [each for row in rows for each in _unfolded(tokenizer, row, template)]
    if len(unfolded) > len(rows):
        processes.note(
            f"{phase}: the chat template writes earlier answers otherwise once a question follows: {len(rows)}"
            f" conversations of {file.name} become {len(unfolded)} rows, each of which teaches its last answer"
        )
    rows = unfolded
    labelled = labels.label_conversations(tokenizer, rows, template)
    is_cut = isinstance(settings, Sft) and settings.truncate
    if not is_cut:
        lengths = [(row.line, len(row.input_ids)) for row in labelled]
        otherwise = ", or set sft.truncate = true to have it cut" if isinstance(settings, Sft) else ""
        labels.require_lengths(lengths, settings.max_tokens, f"{phase}.max_tokens", file.name, otherwise)
    labels.verify_labels(tokenizer, rows, labelled)
    return _cut(tokenizer, rows, labelled, settings.max_tokens, file.name) if is_cut else (rows, labelled)


def _unfolded(tokenizer: Any, row: Row, template: str | None) -> list[Row]:
    """A template with markers says itself what is learned, but for rows with documents, which are no single string."""
    return [row] if template and not row.get(DOCUMENTS) else labels.unfold(tokenizer, [row])


def _cut(
    tokenizer: Any, rows: Sequence[Row], labelled: Sequence[LabelledRow], limit: int, file: str
) -> tuple[list[Row], list[LabelledRow]]:
    """Rows that fit, those that were cut, and none of which no answer is left; raises `DataError` where that is all."""
    both = list(zip(rows, labels.truncate(labelled, limit), strict=True))
    kept = [row for row, cut in both if cut.learned_tokens]
    labelled = [cut for _, cut in both if cut.learned_tokens]
    without = [f"{cut.line}" for _, cut in both if not cut.learned_tokens]
    if not kept:
        raise DataError(
            f"{file}: every answer begins after sft.max_tokens = {limit} tokens; raise it, nothing would be learned."
        )
    labels.verify_labels(tokenizer, kept, labelled)
    if cut_rows := sum(row.cut_tokens > 0 for row in labelled):
        lost = sum(row.cut_tokens for row in labelled)
        processes.note(f"sft: {cut_rows} of {len(both)} conversations of {file} cut at {limit} tokens, {lost:,} tokens less")
    if without:
        listed = ", ".join([*without[: labels.MOST_SHOWN], *(["…"] if len(without) > labels.MOST_SHOWN else [])])
        processes.note(
            f"sft: {len(without)} conversations left out, since no answer begins within it: {file} lines {listed}"
        )
    return kept, list(labelled)
