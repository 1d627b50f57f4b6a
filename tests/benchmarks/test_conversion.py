"""The comparison of conversions on a model small enough for a test: it reports, and never fails on time."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import conversion
from benchmarks.conversion import Step

STEPS = [(chain, name) for chain in ("ours", "upstream") for name in ("merge", "gguf", "quantize")]


def test_both_chains_come_to_their_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(conversion.conversion, ["small", "--folder", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    assert [(each["chain"], each["name"]) for each in measured["steps"]] == STEPS
    assert all(each["seconds"] > 0 and each["anonymous_bytes"] > 1 << 20 for each in measured["steps"])
    assert not list(tmp_path.iterdir())
    with capsys.disabled():
        print("\n" + "\n".join(conversion.table([Step(**each) for each in measured["steps"]])))


def test_ratio_and_most_memory_are_of_the_right_steps() -> None:
    steps = [Step(chain, name, 2.0 if chain == "ours" else 1.0, size << 30) for size, (chain, name) in enumerate(STEPS)]
    *_, ratio, most = conversion.table(steps)
    assert ratio.startswith("Time of ours to upstream's: 2.00 ")
    assert most.startswith("Most memory of ours: 2.0 GiB ")
