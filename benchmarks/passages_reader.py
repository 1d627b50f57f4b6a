"""The base model of `benchmarks.passages`: made here, and trained from scratch to read documents with full attention.

Many questions follow one set of documents, each of which sees the documents and itself alone, as if it came alone: so the
documents are computed once for all. Main entry: `school`.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from appliance.console import Progress
from appliance.recipe import Starter
from appliance.text import passages
from appliance.training import starter
from benchmarks import passages_world
from benchmarks.passages_world import Question, Scene, Town

IGNORED = -100  # torch's label of a token that is not learned
SHARED, PADDING = -1, -2  # segments: seen by all that follows; seen by nobody
BEFORE = f"{starter.TURN_START}system\n"
ASKED = f"{starter.TURN_END}\n{starter.TURN_START}user\n{{}}{starter.TURN_END}\n{starter.TURN_START}assistant\n"
SHAPE = Starter(
    vocabulary_tokens=1024, layers=4, hidden=128, feed_forward=256, heads=3, kv_heads=3, head_width=64, context_tokens=1024
)
ROPE_THETA = 1e6  # as Qwen3's: half of a head's dimensions hardly turn over a few hundred tokens
EMBEDDING, COMMON = 0.05, 0.1  # spread of embeddings, and what all have in their first dimension
SHARPNESS = 2.0  # of q_norm and k_norm
TURNED = 3  # pairs of dimensions, the fastest, by which the first layer knows distances
WRITTEN, COPIED = 0.05, 0.3  # how strongly the first layer writes, and the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Schooling:
    """How the base learns to read."""

    steps: int = 800
    scenes: int = 4  # a step
    questions: int = 12  # of each scene
    matrix_learning_rate: float = 0.006
    learning_rate: float = 1e-3
    warmup: float = 0.03
    decay: float = 0.5  # of the steps, at the end, over which the rates fall to 0
    growth: float = 0.3  # of the steps, over which scenes grow to their full size
    places: int = 4
    people: int = 2
    text_weight: float = 0.1  # of the documents' own words beside the answers


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row: a token sees those before it that are SHARED or have its own segment."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    labels: list[int]


def school(town: Town, seed: int, schooling: Schooling) -> tuple[Any, Any]:
    """A model and its tokenizer, trained on scenes that never come twice."""
    import torch
    from transformers import set_seed

    from appliance.training.optimizer import MuonWithAdamW

    set_seed(seed)
    tokenizer = starter.make_tokenizer(texts(), SHAPE.vocabulary_tokens)
    model = begin(tokenizer)
    optimizer = MuonWithAdamW(
        model, muon_learning_rate=schooling.matrix_learning_rate, learning_rate=schooling.learning_rate
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    chance, progress = random.Random(f"lessons {seed}"), Progress("base", schooling.steps)
    model.train()
    for step in range(schooling.steps):
        done = step / schooling.steps
        share = min(1.0, (step + 1) / (schooling.warmup * schooling.steps), (1 - done) / schooling.decay)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        given = batch(lessons(town, tokenizer, chance, schooling, done), tokenizer.pad_token_id)
        answers, told = _losses(model, given)
        (answers + schooling.text_weight * told).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(step + 1, f"loss {answers.item():.3f}")
    return model.eval(), tokenizer


def _losses(model: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Of answers, and of the documents' own words: cross-entropy, nats a token."""
    import torch

    labels, is_told = given.pop("labels")[:, 1:], given.pop("is_shared")[:, 1:]
    following = given["input_ids"][:, 1:]
    hidden = model.model(**given, use_cache=False).last_hidden_state[:, :-1]

    def loss(where: Any, wanted: Any) -> Any:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden[where]), wanted[where])

    return loss(labels != IGNORED, labels), loss(is_told, following)


def lessons(town: Town, tokenizer: Any, chance: random.Random, schooling: Schooling, done: float) -> list[Tokens]:
    """Of one step; scenes are small at first. `done` of all steps came before."""
    grown = min(1.0, done / schooling.growth)

    def size(largest: int) -> int:
        return min(largest, max(1, round(1 + grown * (largest - 1) + chance.uniform(-0.5, 0.5))))

    found = []
    for _ in range(schooling.scenes):
        scene, asked = town.trained_scene(chance, size(schooling.places), size(schooling.people))
        found.append(lesson(tokenizer, scene, asked[: schooling.questions]))
    return found


def lesson(tokenizer: Any, scene: Scene, asked: Sequence[Question]) -> Tokens:
    """Documents that all see, then questions that do not see each other: with one, what `documents.render` gives for it."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    ids = tokens(BEFORE)
    for name, text in scene.documents:
        ids += tokens(passages.shown(name, text))
    start = len(ids)
    row = Tokens(ids, [*range(start)], [SHARED] * start, [IGNORED] * start)
    for number, question in enumerate(asked):
        prompt, answer = tokens(ASKED.format(question.text)), [*tokens(question.answer), tokenizer.eos_token_id]
        row.ids.extend(prompt + answer)
        row.positions.extend(range(start, start + len(prompt) + len(answer)))
        row.segments.extend([number] * (len(prompt) + len(answer)))
        row.labels.extend([IGNORED] * len(prompt) + answer)
    return row


def batch(rows: Sequence[Tokens], padding: int) -> dict[str, Any]:
    """Tensors (rows, tokens), and a mask (rows, 1, tokens, tokens) that is added to scores of attention."""
    import torch

    longest = max(len(row.ids) for row in rows)

    def padded(name: str, filler: int) -> Any:
        return torch.tensor([getattr(row, name) + [filler] * (longest - len(row.ids)) for row in rows])

    segments = padded("segments", PADDING)
    sees = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == SHARED)
    sees &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)[:, None]
    ids, positions, labels = padded("ids", padding), padded("positions", 0), padded("labels", IGNORED)
    is_shared = segments == SHARED
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels, "is_shared": is_shared}


def begin(tokenizer: Any) -> Any:
    """A model whose first two layers find what followed the same word before, as all models that read learn to.

    From random weights that took longer than all of the training has. Heads of the first layer look one, two and three
    tokens back, and write what they see where the second layer's keys read it; its queries read the token itself, and what
    it finds is copied. Nothing of it is kept from training.
    """
    import torch

    made = starter.make_model(SHAPE, tokenizer)
    made.config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    model = type(made)(made.config)
    model.generation_config = made.generation_config
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    orthogonal = torch.nn.init.orthogonal_
    turned, read = orthogonal(torch.empty(SHAPE.hidden, SHAPE.hidden)), orthogonal(torch.empty_like(first.v_proj.weight))
    read[:, 0] = 0  # what all tokens have in common says nothing
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.normal_(0, EMBEDDING)
        embeddings[:, 0] = COMMON
        for name, value in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                value.fill_(SHARPNESS)
        _look_back(first)
        first.v_proj.weight.copy_(read)
        first.o_proj.weight.copy_(WRITTEN * turned @ read.T)
        second.q_proj.weight.copy_(read)
        second.k_proj.weight.copy_(read @ turned.T)
        copied = orthogonal(torch.empty_like(second.v_proj.weight))
        second.v_proj.weight.copy_(copied)
        second.o_proj.weight.copy_(COPIED * copied.T)
    return model


def _look_back(attention: Any) -> None:
    """Head number n attends to the token n + 1 before: what all tokens have in common, turned by that distance."""
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    half = SHAPE.head_width // 2
    for head in range(SHAPE.heads):
        for pair in range(TURNED):
            angle = (head + 1) * ROPE_THETA ** (-pair / half)
            at = head * SHAPE.head_width + pair
            attention.q_proj.weight[at, 0] = 1.0
            attention.k_proj.weight[at, 0] = math.cos(angle)
            attention.k_proj.weight[at + half, 0] = math.sin(angle)


def texts() -> list[str]:
    """What the tokenizer is made from: every word often enough to become one token."""
    frames = [passages.shown("", ""), f"{BEFORE}{ASKED}"] * 100
    return [*frames, *passages_world.sentences()]
