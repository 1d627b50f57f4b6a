"""The rows of the GRPO benchmark: read as data is, and taken by `data check`."""

import json
from pathlib import Path

import pytest

from appliance.errors import DataError
from benchmarks import grpo
from tests.running import call

LINES = """__label__HOTEL:positiv\tDas Hotel war wirklich sehr gut.
__label__HOTEL:positiv __label__ZIMMER:negativ\tDas Hotel gut, das Zimmer nicht.
__label__ZIMMER:negativ __label__BAD:negativ\tZimmer und Bad waren schmutzig.
__label__ZIMMER:negativ\tZu kurz.
"""


def test_sentences_of_one_polarity_are_read(tmp_path: Path) -> None:
    file = tmp_path / "reviews.txt"
    file.write_text(LINES, encoding="utf-8")
    assert grpo.read(file) == [
        grpo.Review("HOTEL", "positiv", "Das Hotel war wirklich sehr gut."),
        grpo.Review("ZIMMER, BAD", "negativ", "Zimmer und Bad waren schmutzig."),
    ]
    file.write_text("__label__HOTEL\tDas Hotel war wirklich sehr gut.\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no line of the form"):
        grpo.read(file)


def test_rows_pass_the_check(tmp_path: Path, root: Path) -> None:
    recipe = grpo.write(tmp_path, grpo.balanced(grpo.made_up(), 40), "mood")
    result = call("data", "check", recipe, "--json")
    assert result.exit_code == 0, result.stderr
    (file,) = root.glob("dataset/*/grpo.jsonl")
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert row["columns"].keys() == {"sentiment"}
    assert row["prompt"][0]["content"].endswith(f": {row['columns']['sentiment']}")


def test_curves_are_compared_by_their_fifths() -> None:
    curves = [
        [
            {
                "step": step,
                "reward": step + seed,
                "rewards/length/mean": 1.0 + 0.1 * (step % 2),
                "frac_reward_zero_std": 0.25,
            }
            for step in range(20)
        ]
        for seed in (0, 1)
    ]
    figures = grpo.compare(curves)
    assert (figures["reward first"], figures["reward last"]) == (2.0, 18.0)
    assert figures["reward gain, seed 1"] == 16.0
    assert figures["reward errors"] > grpo.ERRORS_WANTED > figures["length errors"]
    assert figures["groups without spread"] == 0.25
