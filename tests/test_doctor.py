"""`appliance doctor` on this machine, and the line that starts a container on others."""

import json
import shlex
from pathlib import Path

import pytest

from appliance import doctor, gpu_access
from appliance.doctor import run_line
from appliance.gpu_access import Problem
from tests.fake_files import write
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


@pytest.mark.parametrize(
    ("vendors", "image", "access"),
    [((), "cpu", []), (("nvidia",), "cuda", ["--gpus", "all"]), (("amd",), "rocm", ["--device", "/dev/kfd"])],
)
def test_run_line(
    vendors: tuple[gpu_access.Vendor, ...], image: str, access: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(tmp_path / "my models"))
    write(tmp_path, {"dev/kfd": "", "dev/dri/renderD128": ""})
    line = run_line("podman", vendors, gpu_access.Host(dev=tmp_path / "dev"))
    parts = shlex.split(line.partition("&& ")[2])
    assert parts[:2] == ["podman", "run"]
    assert parts[-1] == f"edge-appliance:{image}"
    assert f"{tmp_path / 'my models'}:/data/artifacts" in parts
    assert " ".join(access) in line
    group = str((tmp_path / "dev/kfd").stat().st_gid)
    assert ("--group-add" in parts and parts[parts.index("--group-add") + 1] == group) == (image == "rocm")
