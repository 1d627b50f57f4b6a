"""`appliance doctor` on this machine, and the line that starts a container on others."""

import json

import pytest

from appliance import doctor, gpu_access
from appliance.gpu_access import Problem
from tests.running import call


def test_this_machine_is_described() -> None:
    result = call("doctor", "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == (3 if said["problems"] else 0)
    assert {"cores", "memory", "disk", "GPU", "serving", "training", "containers"} == said["facts"].keys()
    assert said["facts"]["serving"].startswith("computes on")
    assert said["facts"]["training"].startswith("torch ")
    assert all(each["what"] and each["remedy"] for each in (*said["problems"], *said["hints"]))


def test_problems_are_told_with_their_remedies_and_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(what="There is a card and no driver", remedy="install it")
    monkeypatch.setattr(gpu_access, "problems", lambda **_: [problem])
    result = call("doctor")
    assert result.exit_code == 3
    assert "problem     There is a card and no driver; install it.\n" in result.stdout


def test_engine_that_crashes_is_a_problem_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_LLAMA", "import os; os.abort()")
    result = call("doctor")
    assert result.exit_code == 3
    assert "llama-cpp-python cannot be used" in result.stdout
