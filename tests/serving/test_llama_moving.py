"""Cells that are moved to other positions, over the real llama.cpp: as good as those computed there, or refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from appliance.serving.decoder import Adapter, Feed, SavedPart, SnapshotRefused
from appliance.serving.llama import Context, rope, saved_cells
from tests import tiny_gguf
from tests.serving.llama_decoding import ALL, GREEDY, PROMPT, decode, generate, in_order, open_context

PASSAGE = list(b"Cats sleep for most of the day, and hunt at dusk.")
SAME = 0.04  # log probabilities: keys are rounded to f16 once more
ROTATIONS: dict[str, dict[str, Any]] = {
    "halves": {"architecture": "qwen3"},
    "neighbours": {"architecture": "llama"},
    "another base": {"architecture": "qwen3", "base": 1e6},
    "factors": {"architecture": "llama", "factors": np.linspace(1, 8, tiny_gguf.HEAD_WIDTH // 2).tolist()},
    "scaled evenly": {"architecture": "llama", "scaling": gguf.RopeScalingType.LINEAR},
}


def moving_context(path: Path, **settings: Any) -> Context:
    context = open_context(path, **settings)
    context.allow_moving()
    return context


def cells_of(context: Context, tokens: Sequence[int], position: int = 0, adapter: Adapter | None = None) -> memoryview:
    """Of these tokens, read by themselves from this position on."""
    context.start(0, GREEDY, None, None)
    decode(context, [Feed(0, tokens, position, is_sampled=False)], adapter)
    saved = context.save(0)
    context.release(0)
    return saved


def asked(context: Context, parts: Sequence[SavedPart], question: Sequence[int]) -> np.ndarray:
    """Log probabilities of what follows the question behind saved parts."""
    context.start(0, GREEDY, None, ALL)
    context.restore(0, parts)
    at = sum(part.end - part.start for part in parts)
    sampled = decode(context, [Feed(0, question, at, is_sampled=True)])[0][0]
    context.release(0)
    return in_order(sampled)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_keys_that_were_moved_equal_those_computed_there(rotation: str, tmp_path: Path) -> None:
    context = moving_context(tiny_gguf.write_rotary(tmp_path / "model.gguf", **ROTATIONS[rotation]))
    alone, there = cells_of(context, PASSAGE), cells_of(context, PASSAGE, 100)
    before = cells_of(context, PROMPT * 9)
    joined = saved_cells.join([SavedPart(before, 0, 100), SavedPart(alone, 0, len(PASSAGE))], 3, context._rotation)
    for moved, computed, unmoved in zip(
        saved_cells.keys(joined.data), saved_cells.keys(there), saved_cells.keys(alone), strict=True
    ):
        assert np.abs(moved[100:].astype(float) - computed).max() < 0.01
        assert np.abs(unmoved.astype(float) - computed).max() > 0.5
    context.close()


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_answer_behind_a_moved_passage_is_that_behind_one_read_there(rotation: str, tmp_path: Path) -> None:
    context = moving_context(tiny_gguf.write_rotary(tmp_path / "model.gguf", **ROTATIONS[rotation]))
    before = SavedPart(cells_of(context, PROMPT), 0, len(PROMPT))
    start, end = len(PROMPT), len(PROMPT) + len(PASSAGE)
    fresh = asked(context, [before, SavedPart(cells_of(context, PASSAGE, start), start, end)], PROMPT)
    moved = asked(context, [before, SavedPart(cells_of(context, PASSAGE), 0, len(PASSAGE))], PROMPT)
    assert np.abs(moved - fresh).max() < SAME
    without = asked(context, [before], PROMPT)
    assert np.abs(without - fresh).max() > 0.5
    context.close()


def test_parts_of_one_text_find_together_again(tmp_path: Path) -> None:
    context = moving_context(tiny_gguf.write(tmp_path / "model.gguf"))
    whole = cells_of(context, PASSAGE)
    parts = [SavedPart(whole, 0, 7), SavedPart(whole, 7, 30), SavedPart(whole, 30, len(PASSAGE))]
    assert bytes(saved_cells.join(parts, 3, context._rotation)) == bytes(whole)
    context.close()


@pytest.mark.parametrize(
    ("write", "settings", "reason"),
    [
        (lambda path: tiny_gguf.write_sliding(path, 64), {}, "parts of its memory cannot be kept"),
        (tiny_gguf.write, {"kv_type": "q8_0"}, "in another type than f16"),
        (
            lambda path: tiny_gguf.write_rotary(path, "llama", scaling=gguf.RopeScalingType.YARN),
            {},
            "its positions are scaled (yarn)",
        ),
    ],
)
def test_model_whose_cells_cannot_be_moved(write: Any, settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    context = open_context(write(tmp_path / "model.gguf"), **settings)
    with pytest.raises(SnapshotRefused) as caught:
        context.allow_moving()
    assert reason in str(caught.value)
    assert not context.can_move
    if context.can_share:
        twice = [SavedPart(cells_of(context, PROMPT), 0, 4)] * 2
        with pytest.raises(SnapshotRefused, match="cannot be moved"):
            context.restore(0, twice)
    assert len(generate(context, tokens=3)) == 3
    context.close()


def test_only_the_first_values_of_a_head_are_turned_where_the_model_says_so() -> None:
    rotation = rope.Rotation(8, np.array([1.0, 0.1]), is_interleaved=False)
    keys = np.random.default_rng(1).normal(size=(70, 16)).astype(np.float16)
    moved = keys.copy()
    rotation.turn(moved, 3)
    heads, turned = keys.reshape(70, 2, 8).astype(float), moved.reshape(70, 2, 8)
    assert np.array_equal(turned[..., 4:], heads[..., 4:])
    pair = heads[..., 0] + 1j * heads[..., 2]
    assert np.allclose(turned[..., 0] + 1j * turned[..., 2], pair * np.exp(3j), atol=0.01)


def test_rotation_that_is_not_the_models_is_noticed(tmp_path: Path) -> None:
    context = moving_context(tiny_gguf.write(tmp_path / "model.gguf"))
    right = context._rotation
    assert right is not None

    def keys_at(position: int) -> Sequence[rope.Keys]:
        return saved_cells.keys(cells_of(context, PASSAGE, position))

    rope.check(right, keys_at, 100)
    for wrong in (
        rope.Rotation(right.width, right.frequencies * 1.01, is_interleaved=False),
        rope.Rotation(right.width, right.frequencies, is_interleaved=True),
        rope.Rotation(right.width, right.frequencies[:-8], is_interleaved=False),
    ):
        with pytest.raises(SnapshotRefused, match=r"differs? by"):
            rope.check(wrong, keys_at, 100)
    context.close()
