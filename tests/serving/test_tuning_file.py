"""The file of tuned settings: written, read, damaged, of another machine; and what the server makes of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts
from appliance.device import Machine
from appliance.errors import ArtifactError
from appliance.recipe import Serve
from appliance.serving import memory_plan, planning, tuning_file
from appliance.serving.memory_prediction import MIB
from appliance.serving.served_model import ServedModel
from appliance.serving.tuning import RULE
from appliance.serving.tuning_file import FileTrial, MachineIdentity, Trial, TunedSettings, Tuning
from tests.serving.test_memory_plan import ROOMY, model, to_load, with_free

__all__ = ["model"]  # a fixture

SHA256 = "ab" * 32
EVERYTHING = frozenset(TunedSettings.__struct_fields__)
TRIAL = Trial(
    setting="threads",
    value=1,
    instead_of=2,
    work="a token",
    seconds=(0.1, 0.11),
    seconds_before=(0.2, 0.21),
    gain=0.9,
    spread=0.1,
    is_taken=True,
    reason="faster",
)
FILE = FileTrial(quantization="Q8_0", size_bytes=1, remark="this file", reading=(1.0, 2.0), writing=(3.0, 4.0))


def tuned_file(**changes: Any) -> Tuning:
    facts: dict[str, Any] = {
        "settings": TunedSettings(threads=1, chunk_tokens=512),
        "model": "tiny",
        "model_sha256": SHA256,
        "machine": MachineIdentity.of(ROOMY),
        "llama_cpp_python": tuning_file.library_version(),
        "appliance": "1",
        "made_at": "2026-01-01T00:00:00Z",
        "seconds": 300.0,
        "rule": RULE,
        "trials": (TRIAL,),
        "files": (FILE,),
    }
    return Tuning(**{**facts, **changes})


def test_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tuning_file.path_of(tmp_path / "a.gguf")
    assert path.name == "a.gguf.tuned.json"
    assert tuning_file.read(path) is None
    written = tuned_file()
    tuning_file.write(path, written)
    assert tuning_file.read(path) == written


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": 2}',
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"threads": 1', '"threads": -1'),
        lambda text: text.replace('"threads": 1', '"threads": "all"'),
        lambda text: text.replace('"threads": 1', '"thread": 1'),
        lambda text: text.replace('"chunk_tokens": 512', '"chunk_tokens": 1000000'),
    ],
)
def test_damaged_file_is_an_error_with_a_remedy(tmp_path: Path, text: str | Callable[[str], str]) -> None:
    path = tmp_path / "a.gguf.tuned.json"
    tuning_file.write(path, tuned_file())
    path.write_text(text if isinstance(text, str) else text(path.read_text()))
    with pytest.raises(ArtifactError, match=r"is damaged .*appliance bench serve --tune") as caught:
        tuning_file.read(path)
    assert str(path) in str(caught.value)


def test_folder_that_cannot_be_written_to_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="--output"):
        tuning_file.write(tmp_path / "file" / "a.gguf.tuned.json", tuned_file())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_sha256": "cd" * 32}, "another model"),
        ({"llama_cpp_python": "0.1"}, "llama-cpp-python 0.1"),
        ({"machine": MachineIdentity.of(dataclasses.replace(ROOMY, usable_cores=8))}, "usable_cores 8, here 4"),
        ({"machine": MachineIdentity.of(dataclasses.replace(ROOMY, cpu_features=frozenset()))}, "other CPU features"),
    ],
)
def test_file_of_another_place_is_told_apart(changes: dict[str, Any], said: str) -> None:
    here = MachineIdentity.of(ROOMY)
    assert tuned_file().belongs_elsewhere(SHA256, here) is None
    reason = tuned_file(**changes).belongs_elsewhere(SHA256, here)
    assert reason is not None
    assert said in reason


def test_cpu_has_a_name_on_arm_too(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nCPU implementer : 0x41\nCPU part : 0xd0b\nprocessor : 1\n")
    assert tuning_file.cpu_name(tmp_path) == "0x41 0xd0b"
    assert tuning_file.cpu_name(tmp_path / "none") == "unknown"


TUNED = TunedSettings(threads=1, prefill_threads=3, chunk_tokens=512, mmap="off", repack="off", slots=4)


def planned(model: Any, asked: Serve, machine: Machine = ROOMY, **options: Any) -> memory_plan.Plan:
    return memory_plan.plan(model, asked, machine, **{"tuned": TUNED, **options})


def test_tuned_settings_count_where_nobody_set_any(model: Any) -> None:
    plan = planned(model, Serve())
    found = plan.settings
    assert (found.threads_decode, found.threads_prefill, found.chunk_tokens, found.slots) == (1, 3, 512, 4)
    assert (found.is_mapped, found.is_repacked) == (False, False)
    assert plan.tuned == EVERYTHING
    assert planned(model, Serve(), tuned=TunedSettings()).tuned == frozenset()


def test_what_a_person_set_counts_before_tuned_settings(model: Any) -> None:
    recipe = planned(model, Serve(threads=2, prefill_threads=1, mmap="on", repack="on", slots=3))
    assert (recipe.settings.threads_decode, recipe.settings.threads_prefill, recipe.settings.slots) == (2, 1, 3)
    assert (recipe.settings.is_mapped, recipe.settings.is_repacked) == (True, True)
    assert recipe.tuned == {"chunk_tokens"}
    flag = planned(model, Serve(slots=2), explicit=("slots",))
    assert flag.settings.slots == 2


def test_nothing_is_stepped_down_for_the_sake_of_speed(model: Any) -> None:
    """Four slots would cost the cache; so the plan is made as if nothing had been tuned, but for the threads."""
    enough = memory_plan.plan(model, Serve(), with_free(6000 * MIB)).memory.resident_bytes
    untuned = memory_plan.plan(model, Serve(), with_free(enough))
    assert untuned.is_as_asked
    slots = TunedSettings(threads=1, slots=8)
    tight = planned(model, Serve(), with_free(enough), tuned=slots)
    assert (tight.settings.slots, tight.settings.cells) == (2, untuned.settings.cells)
    assert tight.settings.threads_decode == 1
    assert tight.tuned == {"threads"}
    assert "only threads are taken" in tight.settings.notes[-1]
    assert "slots 8" in tight.settings.notes[-1]


def served(path: Path, sha256: str) -> ServedModel:
    header = to_load(path).header
    return ServedModel(name="shaped", path=path, sha256=sha256, made_at=0, header=header, is_foreign=True)


def test_server_takes_the_file_beside_the_model(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.device.machine", lambda: ROOMY)
    path = tmp_path / "shaped.gguf"
    path.symlink_to(model.path)
    planner = planning.Planner(explicit=(), folder=tmp_path)
    assert planner.plan(served(path, SHA256), Serve(), ()).settings.notes == ()
    beside = tuning_file.path_of(path)
    tuning_file.write(beside, tuned_file(settings=TUNED))
    plan = planner.plan(served(path, SHA256), Serve(), ())
    assert plan.settings.chunk_tokens == 512
    assert str(beside) in plan.settings.notes[0]
    assert "chunk_tokens 512" in plan.settings.notes[0]
    other = planner.plan(served(path, "cd" * 32), Serve(), ())
    assert other.settings.chunk_tokens == 256
    assert "is not used, for it was measured for another model" in other.settings.notes[0]
    beside.write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        planner.plan(served(path, SHA256), Serve(), ())


def test_file_that_was_named_counts_before_the_one_beside(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.device.machine", lambda: ROOMY)
    named = tmp_path / "elsewhere.json"
    path = tmp_path / "shaped.gguf"
    path.symlink_to(model.path)
    planner = planning.Planner(explicit=(), folder=tmp_path, tuned=named)
    with pytest.raises(ArtifactError, match="--output"):
        planner.plan(served(path, SHA256), Serve(), ())
    tuning_file.write(tuning_file.path_of(path), tuned_file(settings=TunedSettings(chunk_tokens=64)))
    tuning_file.write(named, tuned_file(settings=TunedSettings(chunk_tokens=128)))
    assert planner.plan(served(path, SHA256), Serve(), ()).settings.chunk_tokens == 128
    tuning_file.write(named, tuned_file(model_sha256="cd" * 32))
    assert planner.plan(served(path, SHA256), Serve(), ()).settings.chunk_tokens == 64


def test_artifact_stays_whole_with_the_file_beside_its_model(root: Path) -> None:
    plan = artifacts.Plan(kind="gguf", name="tiny", inputs={})
    with artifacts.create(plan, root) as draft:
        (draft.path / "tiny.gguf").write_bytes(b"weights")
    made = artifacts.load(plan.location(root))
    before = artifacts.identity(made.path / "tiny.gguf"), artifacts.identity(made.path)
    tuning_file.write(tuning_file.path_of(made.path / "tiny.gguf"), tuned_file())
    artifacts.check_files(made)
    artifacts.check_input(made.path)
    assert (artifacts.identity(made.path / "tiny.gguf"), artifacts.identity(made.path)) == before
