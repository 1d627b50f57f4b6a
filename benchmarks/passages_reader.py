"""The base model of `benchmarks.passages`: trained from scratch to read documents with full attention, and asked.

Many questions follow one set of documents in training, each of which sees the documents and itself alone, as if it came
alone: the documents are computed once for all. How a prompt is put together is what serving does, and what the phase
`passages` trains with.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from appliance.console import Progress
from appliance.recipe import Starter
from appliance.text import passages
from appliance.training import starter
from benchmarks import passages_world
from benchmarks.passages_world import Question, Scene, Town

Reading = Literal["full", "blocks", "none"]
SHARED = -1  # the segment of what every token after it may see
BEFORE = f"{starter.TURN_START}system\n"
ASKED = f"{starter.TURN_END}\n{starter.TURN_START}user\n{{}}{starter.TURN_END}\n{starter.TURN_START}assistant\n"
ASKED_ALONE = f"{starter.TURN_START}user\n{{}}{starter.TURN_END}\n{starter.TURN_START}assistant\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schooling:
    """How the base learns to read."""

    steps: int = 1500
    scenes: int = 4  # a step
    questions: int = 12  # of each scene
    matrix_learning_rate: float = 0.02
    learning_rate: float = 3e-3
    warmup: float = 0.05
    growth: float = 0.3  # of the steps, over which scenes grow to their full size
    places: int = 4
    people: int = 2


SHAPE = Starter(
    vocabulary_tokens=1024,
    layers=4,
    hidden=128,
    feed_forward=256,
    heads=4,
    kv_heads=4,
    head_width=32,
    context_tokens=1024,
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row: a token sees those before it that have its segment, one of `sees` or SHARED. `labels` is -100 but in answers."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    labels: list[int]


class Reader:
    """Turns scenes into tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        """Each text by itself; parts of prompts come again and again."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text)["input_ids"]
        return self._known[text]

    def lesson(self, scene: Scene, asked: Sequence[Question]) -> Tokens:
        """Documents seen by all, then questions that do not see each other."""
        ids = list(self.tokens(BEFORE))
        for name, text in scene.documents:
            ids += self.tokenizer(passages.shown(name, text))["input_ids"]
        start = len(ids)
        row = Tokens(ids, list(range(start)), [SHARED] * start, [-100] * start)
        for number, question in enumerate(asked):
            prompt, answer = self.tokenizer(ASKED.format(question.text))["input_ids"], self._answer(question)
            row.ids.extend(prompt + answer)
            row.positions.extend(range(start, start + len(prompt) + len(answer)))
            row.segments.extend([number] * (len(prompt) + len(answer)))
            row.labels.extend([-100] * len(prompt) + answer)
        return row

    def examination(self, scene: Scene, question: Question, reading: Reading) -> Tokens:
        """One question; with `blocks` each document sees itself alone, and so does what stands before them."""
        answer = self._answer(question)
        if reading == "none":
            prompt = self.tokenizer(ASKED_ALONE.format(question.text))["input_ids"]
            segments = [SHARED] * (len(prompt) + len(answer))
        else:
            parts = [self.tokens(BEFORE)]
            parts += [self.tokenizer(passages.shown(name, text))["input_ids"] for name, text in scene.documents]
            prompt = [token for part in parts for token in part]
            segments = [number if reading == "blocks" else SHARED for number, part in enumerate(parts) for _ in part]
            asked = self.tokenizer(ASKED.format(question.text))["input_ids"]
            prompt += asked
            segments += [len(parts) if reading == "blocks" else SHARED] * (len(asked) + len(answer))
        ids = prompt + answer
        return Tokens(ids, list(range(len(ids))), segments, [-100] * len(prompt) + answer)

    def _answer(self, question: Question) -> list[int]:
        return [*self.tokenizer(question.answer)["input_ids"], self.tokenizer.eos_token_id]


def batch(rows: Sequence[Tokens], pad: int, sees_all: bool = False) -> dict[str, Any]:
    """Tensors, (rows, tokens), and an additive mask (rows, 1, tokens, tokens).

    `sees_all`: tokens of a row's last segment see everything before them.
    """
    import torch

    longest = max(len(row.ids) for row in rows)

    def padded(name: str, filler: int) -> Any:
        return torch.tensor([getattr(row, name) + [filler] * (longest - len(row.ids)) for row in rows])

    segments = padded("segments", -2)
    seen = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == SHARED)
    if sees_all:
        seen |= (segments == torch.tensor([[row.segments[-1]] for row in rows]))[:, :, None]
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    return {
        "input_ids": padded("ids", pad),
        "position_ids": padded("positions", 0),
        "attention_mask": mask,
        "labels": padded("labels", -100),
    }


def predictions(model: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Logits (labelled tokens, vocabulary) and the tokens that they should have said."""
    hidden = model.model(
        input_ids=given["input_ids"], position_ids=given["position_ids"], attention_mask=given["attention_mask"], use_cache=False
    ).last_hidden_state
    labels = given["labels"][:, 1:]
    is_said = labels != -100
    return model.lm_head(hidden[:, :-1][is_said]), labels[is_said]


def lessons(town: Town, reader: Reader, chance: random.Random, schooling: Schooling, done: float) -> list[Tokens]:
    """Of one step; `done` of all steps came before."""
    grown = min(1.0, done / schooling.growth) if schooling.growth else 1.0
    rows = []
    for _ in range(schooling.scenes):
        places = max(1, min(schooling.places, round(1 + grown * (schooling.places - 1) + chance.uniform(-0.5, 0.5))))
        people = max(1, min(schooling.people, round(1 + grown * (schooling.people - 1) + chance.uniform(-0.5, 0.5))))
        scene, asked = town.trained_scene(chance, places, people)
        rows.append(reader.lesson(scene, asked[: schooling.questions]))
    return rows


def school(town: Town, seed: int, schooling: Schooling, watch: Any = None) -> tuple[Any, Any]:
    """A model and its tokenizer, trained with full attention on scenes that never come twice."""
    import torch
    from transformers import set_seed

    from appliance.training.optimizer import MuonWithAdamW

    set_seed(seed)
    tokenizer = starter.make_tokenizer(_texts(), SHAPE.vocabulary_tokens)
    model = starter.make_model(SHAPE, tokenizer)
    reader, chance = Reader(tokenizer), random.Random(f"lessons {seed}")
    optimizer = MuonWithAdamW(model, muon_learning_rate=schooling.matrix_learning_rate, learning_rate=schooling.learning_rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    progress = Progress("base", schooling.steps)
    for step in range(schooling.steps):
        done = step / schooling.steps
        share = min(1.0, (step + 1) / max(1, schooling.warmup * schooling.steps)) * (1 - done)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        given = batch(lessons(town, reader, chance, schooling, done), tokenizer.pad_token_id)
        logits, labels = predictions(model, given)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(step + 1, f"loss {loss.item():.3f}")
        if watch:
            watch(step, model, reader, loss.item(), given)
    model.eval()
    return model, tokenizer


def _texts() -> list[str]:
    return [passages.shown("", ""), *["system\n user\n assistant\n"] * 100, *passages_world.sentences()]


def right(model: Any, reader: Reader, asked: Sequence[tuple[Scene, Question]], reading: Reading) -> list[bool]:
    """Whether the greedy answer is the expected one, word for word.

    It is where at every token of the expected answer, and at its end, that token is the likeliest after those before it:
    so one pass over prompt and answer tells.
    """
    import torch

    found: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(asked), 32):
            rows = [reader.examination(scene, question, reading) for scene, question in asked[start : start + 32]]
            given = batch(rows, reader.tokenizer.pad_token_id, sees_all=reading == "blocks")
            logits, labels = predictions(model, given)
            hits = (logits.argmax(-1) == labels).tolist()
            for row in rows:
                answer = [hits.pop(0) for label in row.labels if label != -100]
                found.append(all(answer))
    return found
