"""The training benchmarks on a model small enough for a test: they measure and report, and never fail on time."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from appliance import gpu
from benchmarks import checkpoints, projection, training_card, training_memory, training_rows, training_speed
from benchmarks.training_card import Run as CardRun
from benchmarks.training_memory import Case
from benchmarks.training_speed import Run


def test_plan_is_compared_with_what_a_training_takes(tmp_path: Path) -> None:
    row = training_memory.measure(Case("small", "sft", 2, 160, "lora-recomputed"), tmp_path)
    assert row.parts["weights"] > 70 << 20  # its vocabulary
    assert row.measured == pytest.approx(row.predicted, rel=0.25)
    *_, worst = training_memory.table([row])
    assert worst.startswith("At most ")


@pytest.mark.slow
def test_speed_is_compared_with_a_plain_script(tmp_path: Path) -> None:
    result = CliRunner().invoke(training_speed.training_speed, [str(tmp_path), "--base", "small", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    losses = [runs[0]["first_loss"] for runs in found["runs"].values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.01)  # the same rows, the same base
    assert found["tokens"] > training_speed.COUNT * training_speed.TOKENS / 2


def test_speeds_are_medians_of_ratios() -> None:
    runs = {side: [Run(10 / speed, 100 * speed, 1.0)] for side, speed in zip(training_speed.RUNGS, (2, 4), strict=True)}
    lines = training_speed.table({training_speed.PLAIN: [Run(10, 100, 1.0)], **runs}, 1000)
    assert "| plain TRL | 100.0 | 1.00 (1.00–1.00) |" in lines[2]
    assert "| ours | 400.0 | 4.00 (4.00–4.00) |" in lines[4]


def test_rows_are_as_long_as_they_are_said_to_be(tmp_path: Path) -> None:
    base = training_rows.base(tmp_path, "small")
    lengths = [training_rows.tokens(base, row) for row in training_rows.conversations(12, 300)]
    assert max(lengths) == lengths[0]
    assert 260 <= lengths[0] <= 300


def test_projected_operations_are_those_of_the_matrices() -> None:
    work = projection.Work("0.6B", "sft", 1, 64)
    config = checkpoints.config(work.base)
    heads = config.num_attention_heads * config.head_dim
    pairs = config.num_key_value_heads * config.head_dim
    matrices = config.hidden_size * (2 * heads + 2 * pairs + 3 * config.intermediate_size)
    head = config.hidden_size * config.vocab_size
    passes = 3  # forward, once more for backward, and backward to the states: frozen weights have no gradient
    found = projection.step(work)
    assert found.flops == pytest.approx(2 * 64 * passes * (config.num_hidden_layers * matrices + head), rel=0.1)
    moved = config.num_hidden_layers * matrices * 0.5 * 2  # four bits, twice
    assert found.moved_bytes == pytest.approx(moved + 2 * 2 * head, rel=0.1)


def test_card_is_needed_for_the_cards_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpus", list)
    result = CliRunner().invoke(training_card.training_card, [str(tmp_path)])
    assert result.exit_code == 3
    assert "No NVIDIA card was found here" in result.stderr


def test_card_that_is_too_small_is_a_result() -> None:
    case = training_card.CASES[0]
    runs = [CardRun(case, "ours, streamed", 3 << 30, 12.5), CardRun(case, "plain QLoRA", 3 << 30, None, "out of memory")]
    assert [line.split(" | ")[-1] for line in training_card.table(runs)[2:]] == ["12.50 s |", "out of memory |"]
