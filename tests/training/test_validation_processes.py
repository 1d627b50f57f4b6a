"""Held-out rows in two processes, whole and sharded: the same losses, the same end, the same adapter as in one."""

import json
from pathlib import Path

import pytest

from appliance import artifacts
from appliance.training import curve
from tests.running import Trained, call
from tests.training.test_processes import (
    LOSS_TOLERANCE,
    PARTS,
    assert_learned_the_same,
    assert_results_the_same,
    on_one_machine,
)
from tests.training.test_validation import flags


@pytest.fixture(scope="module")
def alone(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Path]:
    """Flags of an SFT that stops by its held-out rows, long before its end; and the adapter of one process."""
    folder = tmp_path_factory.mktemp("alone")
    chosen = flags(trained, folder, "sft.patience=2", "sft.epochs=40")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(folder / "artifacts"))
        result = call("train", trained.recipe, *chosen, "--json")
    assert result.exit_code == 0, result.stderr
    return chosen, Path(json.loads(result.stdout)["artifact"])


def measured(folder: Path) -> dict[int, float]:
    lines = curve.read_lines(folder)
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


@pytest.mark.parametrize(("module", "configuration"), [("appliance", "two-processes-cpu.yaml"), (PARTS, "two-gpus.yaml")])
def test_two_processes_stop_and_keep_what_one_does(
    trained: Trained, alone: tuple[tuple[str, ...], Path], root: Path, module: str, configuration: str
) -> None:
    """The best adapter is kept and taken back, from its parts too, and all stop at once."""
    chosen, expected = alone
    code, launched = on_one_machine(root, module, configuration, trained.recipe, *chosen)
    assert code == 0, launched.stderr
    made = root / "adapter" / expected.name
    results, wanted = artifacts.load(made).results, artifacts.load(expected).results
    assert results["stopped_early"] is True
    assert results["kept_step"] < results["steps"] < 120
    assert_results_the_same(results, wanted)
    assert measured(made) == pytest.approx(measured(expected), rel=LOSS_TOLERANCE)
    assert_learned_the_same(made, expected)
