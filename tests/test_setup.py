"""`make setup`: what is checked before anything is downloaded, and what is installed. Nothing is installed here."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest

from appliance import setup
from convert import llama_cpp_source as source
from convert import llama_cpp_wheel
from tests.setup_machine import alone, script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return alone(tmp_path, monkeypatch)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!\[ ]", name)[0]).lower()


def pins(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("-c "):
            found |= pins(path.parent / line[3:])
        elif line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonical(name) not in found, f"{name} is pinned twice"
            found[canonical(name)] = version
    return found


class TestPins:
    def test_llama_cpp_python_has_one_version(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = [name for extra in project["optional-dependencies"].values() for name in extra]
        wanted = {name for name in named if canonical(name) == "llama-cpp-python"}
        assert wanted == {f"llama-cpp-python=={source.VERSION}"}
        for backend in setup.BACKENDS:
            assert pins(ROOT / f"constraints/{backend}.txt")["llama-cpp-python"] == source.VERSION

    @pytest.mark.parametrize("backend", setup.BACKENDS)
    def test_everything_that_is_installed_is_pinned(self, backend: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        pinned = pins(ROOT / f"constraints/{backend}.txt")
        missing = {canonical(name) for name in setup.requirements(project)} - pinned.keys()
        assert not missing
        assert "+" not in pinned["torch"], "a local version would exclude the other builds"


def check(path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "appliance.setup", "--check"]
    environ = {**os.environ, **environment, "PATH": path}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


class TestCheck:
    def test_all_that_is_missing_is_one_message_before_anything_is_written(self, cache: Path, tmp_path: Path) -> None:
        found = check(str(tmp_path))
        assert found.returncode == 3
        assert found.stdout == ""
        assert found.stderr.count("error:") == 1
        for part in ("no working C compiler", "no working C++ compiler", "no cmake", "apt-get install"):
            assert part in found.stderr
        assert re.search(r"apt-get install .*build-essential cmake", found.stderr)
        assert not cache.exists()

    def test_a_compiler_without_headers_and_an_old_cmake_do_not_do(self, tmp_path: Path) -> None:
        script(tmp_path / "cc", "exit 1")
        script(tmp_path / "c++", "exit 0")
        script(tmp_path / "cmake", "echo cmake version 3.18.4")
        found = check(str(tmp_path))
        assert "no working C compiler" in found.stderr
        assert "C++" not in found.stderr
        assert "cmake is 3.18, 3.21 or newer is needed" in found.stderr

    def test_no_compiler_is_needed_when_the_wheel_is_cached(self, cache: Path, tmp_path: Path) -> None:
        folder = cache / "wheels" / llama_cpp_wheel.wheel_key()
        folder.mkdir(parents=True)
        (folder / "one.whl").touch()
        assert "compiler" not in check(str(tmp_path)).stderr

    def test_wrong_choices_are_reported_together(self, tmp_path: Path) -> None:
        found = check(str(tmp_path), BACKEND="tpu", TORCH_INDEX="cu126")
        assert found.returncode == 3
        assert "BACKEND=tpu" in found.stderr
        assert "TORCH_INDEX=cu126" in found.stderr

    def test_an_old_python_is_told_so(self) -> None:
        program = "import sys; sys.version_info = (3, 9, 2); import appliance.setup"
        found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.returncode == 1
        assert found.stderr.startswith("error: Python 3.11 or newer is needed, this is 3.9.2")

    def test_folders_on_one_disk_are_added_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(3 * setup.GIB))
        needs = [(tmp_path / "absent/.venv", 2 * setup.GIB), (tmp_path, 1 * setup.GIB)]
        assert setup.missing_space(needs) == []
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(3 * setup.GIB - 1))
        (missing,) = setup.missing_space(needs)
        assert "3.0 GiB are needed" in missing.problem


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a plan is made from."""
    root = tmp_path / "project"
    (root / "constraints").mkdir(parents=True)
    for name in ("pyproject.toml", *(f"constraints/{path.name}" for path in (ROOT / "constraints").iterdir())):
        (root / name).write_bytes((ROOT / name).read_bytes())
    return root


def ready(plan: setup.Plan, cache: Path) -> None:
    """Leaves what a finished setup leaves."""
    (plan.venv / "bin").mkdir(parents=True)
    script(Path(plan.python), "exit 0")
    plan.stamp.touch()
    converter = cache / f"llama.cpp-{source.VERSION}"
    converter.mkdir(parents=True)
    (converter / source.CONVERTER_MARK).write_text(source._converter_digest())


class TestStamp:
    def test_a_finished_setup_has_nothing_to_do(
        self,
        project: Path,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        plan = setup.make_plan(project, {})
        ready(plan, cache)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
        setup.set_up(plan)
        assert capfd.readouterr() == ("", "")

    def test_it_depends_on_all_that_decides_what_is_installed(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        digests = [setup.make_plan(project, {}).digest, setup.make_plan(project, {"BACKEND": "cuda"}).digest]
        digests.append(setup.make_plan(project, {"TORCH_INDEX": setup.CPU_INDEX}).digest)
        with (project / "constraints/common.txt").open("a") as stream:
            stream.write("another==1.0\n")
        digests.append(setup.make_plan(project, {}).digest)
        settings = project / "pyproject.toml"
        settings.write_text(settings.read_text().replace('"click>=8.2"', '"click>=8.3"'))
        digests.append(setup.make_plan(project, {}).digest)
        settings.write_text(settings.read_text().replace("[project.scripts]", '[project.scripts]\nanother = "a:b"'))
        digests.append(setup.make_plan(project, {}).digest)
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
        digests.append(setup.make_plan(project, {}).digest)
        assert len(set(digests)) == len(digests)
        settings.write_text(settings.read_text().replace("line-length = 120", "line-length = 100"))
        assert setup.make_plan(project, {}).digest == digests[-1], "linters' settings install nothing"

    def test_a_cleared_cache_is_filled_again(self, project: Path, cache: Path) -> None:
        plan = setup.make_plan(project, {})
        ready(plan, cache)
        assert setup.is_ready(plan)
        (cache / f"llama.cpp-{source.VERSION}" / source.CONVERTER_MARK).unlink()
        assert not setup.is_ready(plan)

    def test_an_interrupted_change_leaves_no_valid_stamp(
        self, project: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ready(plan := setup.make_plan(project, {}), cache)
        other = setup.make_plan(project, {"TORCH_INDEX": setup.CPU_INDEX})
        monkeypatch.setattr(setup, "check_machine", lambda *_: None)

        def interrupt(_: setup.Plan) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(setup, "make_environment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup.set_up(other)
        assert not setup.is_ready(plan)
        assert not setup.is_ready(other)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that setup would run, instead of running them."""
    found: list[list[str]] = []
    monkeypatch.setattr(setup, "run", lambda command, _: found.append(list(command)))
    return found


class TestEnvironment:
    def test_a_broken_one_is_made_anew_and_a_whole_one_kept(self, project: Path, commands: list[list[str]]) -> None:
        plan = setup.make_plan(project, {})
        (plan.venv / "bin").mkdir(parents=True)
        script(Path(plan.python), "exit 1")
        setup.make_environment(plan)
        assert commands.pop()[1:] == ["-m", "venv", "--clear", str(plan.venv)]
        script(Path(plan.python), "exit 0")
        setup.make_environment(plan)
        assert commands == []
        setup.make_environment(setup.make_plan(project, {"TORCH_INDEX": setup.CPU_INDEX}))
        assert "--clear" in commands.pop()

    def test_half_installed_packages_are_forgotten(self, tmp_path: Path) -> None:
        packages = tmp_path / "lib/python3.11/site-packages"
        (packages / "half-1.0.dist-info").mkdir(parents=True)
        (packages / "whole-1.0.dist-info").mkdir()
        (packages / "whole-1.0.dist-info/INSTALLER").write_text("pip\n")
        setup.remove_half_installed(tmp_path)
        assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]

    @pytest.mark.parametrize(
        ("resolved", "index"),
        [(["torch", "sympy"], None), (["torch", "nvidia-cublas", "triton"], setup.CPU_INDEX)],
        ids=["pip finds a CPU build", "pip would bring CUDA"],
    )
    def test_without_a_card_torch_is_a_cpu_build(
        self, project: Path, commands: list[list[str]], resolved: list[str], index: str | None
    ) -> None:
        plan = setup.make_plan(project, {"BACKEND": "cpu"})
        (plan.venv / "bin").mkdir(parents=True)
        report = {"install": [{"metadata": {"name": name}} for name in resolved]}
        script(Path(plan.python), f"echo '{json.dumps(report)}'")
        setup.install_torch(plan)
        (command,) = commands
        assert plan.torch_pin in command
        assert "--no-deps" in command
        assert (command[command.index("--index-url") + 1] if "--index-url" in command else None) == index

    def test_the_named_index_is_taken_without_asking(self, project: Path, commands: list[list[str]]) -> None:
        setup.install_torch(setup.make_plan(project, {"BACKEND": "cuda", "TORCH_INDEX": "https://example.org/cu126"}))
        assert commands[0][-2:] == ["--index-url", "https://example.org/cu126"]

    def test_torch_that_is_there_is_not_touched(self, project: Path, commands: list[list[str]]) -> None:
        plan = setup.make_plan(project, {"BACKEND": "cpu"})
        version = plan.torch_pin.partition("==")[2]
        (plan.venv / f"lib/python3.11/site-packages/torch-{version}+cpu.dist-info").mkdir(parents=True)
        setup.install_torch(plan)
        assert commands == []


class TestMakefile:
    TARGETS = (
        *("help", "setup", "demo", "train", "serve", "chat", "test", "full", "check", "lint", "type", "onnx-env"),
        *(
            "bench-peers",
            "bench-serve",
            "bench-train",
            "bench-training",
            "bench-card",
            "image-cpu",
            "image-cuda",
            "image-rocm",
            "image-test",
        ),
        *("image-test-arm64", "clean"),
    )

    def test_has_the_agreed_targets_with_help_and_short_recipes(self) -> None:
        text = (ROOT / "Makefile").read_text()
        rules = re.findall(r"^([a-z0-9-]+):([^#\n]*)## .+\n((?:\t.*\n)*)", text, re.MULTILINE)
        assert [name for name, _, _ in rules] == list(self.TARGETS)
        assert all(recipe.count("\n") <= 3 for _, _, recipe in rules)
        needs = {name: prerequisites.split() for name, prerequisites, _ in rules}
        # `train` and `serve` run setup themselves, where they do not use a container.
        alone = {"help", "setup", "clean", "train", "serve", "image-cpu", "image-cuda", "image-rocm"}
        assert {name for name in needs if not {"setup", "lint"} & set(needs[name])} == alone
        phony = re.sub(r"\\\n", " ", text).partition(".PHONY:")[2].splitlines()[0].split()
        assert sorted(phony) == sorted(self.TARGETS)
