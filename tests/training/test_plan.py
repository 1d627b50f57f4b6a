"""`appliance plan`: the ladder of each phase, on this machine and for another card, in words and as JSON."""

import json
from pathlib import Path
from typing import Any

from appliance.training import rungs
from tests import tiny_recipe
from tests.running import Trained, call


def planned(trained: Trained, *more: str) -> Any:
    result = call("plan", trained.recipe, "--set", f"base={trained.made['base']}", *more, "--json")
    assert result.exit_code == 0, result.stderr
    return {each["phase"]: each for each in json.loads(result.stdout)["phases"]}


def test_plans_every_phase_here(trained: Trained, root: Path) -> None:
    found = planned(trained)
    assert list(found) == ["sft", "dpo"]
    for phase in found.values():
        assert [each["name"] for each in phase["rungs"]] == [rung.name for rung in rungs.CPU]
        assert phase["chosen"] == "lora"
        assert phase["seconds"] > 0
        for each in phase["rungs"]:
            assert each["needed_bytes"] == sum(each["parts"].values())
    assert not list(root.glob("adapter/*"))


def test_plans_for_another_card(trained: Trained, root: Path) -> None:  # noqa: ARG001
    found = planned(trained, "--vram", "4GiB")["sft"]
    assert [each["name"] for each in found["rungs"]] == [rung.name for rung in rungs.CARD]
    assert found["rungs"][0]["available_bytes"] == 4 << 30
    assert found["seconds"] is None  # nothing is known of how fast it is


def test_says_the_ladder_in_words(trained: Trained, root: Path) -> None:  # noqa: ARG001
    said = call("plan", trained.recipe, "--set", f"base={trained.made['base']}", "--vram", "4GiB").stdout
    assert "sft: 2 rows of up to " in said
    assert " → lora " in said
    assert "free: 4.0 GiB" in said
    assert "streamed" in said


def test_nothing_fits_and_what_would(trained: Trained, root: Path) -> None:  # noqa: ARG001
    result = call("plan", trained.recipe, "--set", f"base={trained.made['base']}", "--vram", "400MiB")
    assert result.exit_code == 3
    assert "nothing fits. No smaller batch or length fits either" in result.stdout
    assert "error: sft, dpo fits on no rung in the 400.0 MiB that are free." in result.stderr


def test_starter_must_be_made_first(tmp_path: Path, root: Path) -> None:  # noqa: ARG001
    result = call("plan", tiny_recipe.write(tmp_path / "recipe"))
    assert result.exit_code == 3
    assert "--phase base` first" in result.stderr


def test_rung_that_the_recipe_names_is_the_one(trained: Trained, root: Path) -> None:  # noqa: ARG001
    assert planned(trained, "--set", "memory.rung=qlora")["dpo"]["chosen"] == "qlora"
    refused = call("plan", trained.recipe, "--set", f"base={trained.made['base']}", "--set", "memory.rung=streamed")
    assert refused.exit_code == 2
    assert "'streamed' is none of this device's" in refused.stderr
