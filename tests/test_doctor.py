"""`appliance doctor` on this machine, and the line that starts a container on others."""

import json
import shutil
from pathlib import Path

import pytest

from appliance import doctor, gpu_access
from appliance.gpu_access import Host, Problem
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


def test_container_says_that_it_is_one_and_names_no_folder_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ASK_LLAMA", "print(0)")
    monkeypatch.setattr(doctor, "ASK_TORCH", "raise SystemExit(1)")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").touch()
    inside = Host(dev=tmp_path / "dev", root=tmp_path)
    report = doctor.examine(inside)
    assert report.facts["containers"] == "this is one"
    assert report.run_title.startswith("This is a container")
    assert report.run_line.startswith("podman run --detach --read-only ")
    assert report.run_line.endswith(" --volume appliance:/data edge-appliance:cpu")
    monkeypatch.setenv(gpu_access.ARCHITECTURES, "75-real;86-real")
    assert doctor.examine(inside).run_line.endswith("--device nvidia.com/gpu=all edge-appliance:cuda")
    assert "cd " in doctor.examine(Host(root=tmp_path / "no container")).run_line


def test_podman_that_knows_no_card_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_LLAMA", "print(0)")
    monkeypatch.setattr(doctor, "ASK_TORCH", "raise SystemExit(1)")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "podman" else None)
    bus = "sys/bus/pci/devices/0"
    write(tmp_path, {f"{bus}/vendor": "0x10de", f"{bus}/class": "0x030000", "dev/nvidia0": ""})
    report = doctor.examine(Host(sys=tmp_path / "sys", dev=tmp_path / "dev", root=tmp_path))
    assert any("nvidia-ctk cdi generate" in each.remedy for each in report.hints)
    assert "--device nvidia.com/gpu=all" in report.run_line


def test_engine_that_crashes_is_a_problem_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_LLAMA", "import os; os.abort()")
    result = call("doctor")
    assert result.exit_code == 3
    assert "llama-cpp-python cannot be used" in result.stdout
