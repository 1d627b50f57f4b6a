"""`appliance bench serve` as a person runs it, on a tiny model; no time is asserted, and a busy machine fails no test."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts, device
from appliance.commands.bench_subject import Subject
from appliance.serving import speed, tuning_file
from appliance.serving.tuning_file import TunedSettings
from tests import tiny_gguf
from tests.running import call, kill_when, run, start

# Enough for the fewest rounds of a tiny model.
QUICK_TUNE = ("--tune", "--minutes", "0.01", "--even-if-busy")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)


@pytest.fixture
def model(root: Path) -> Path:
    """A promoted model; its file."""
    plan = artifacts.Plan(kind="gguf", name="tiny", inputs={})
    with artifacts.create(plan, root) as draft:
        tiny_gguf.write(draft.path / "tiny.gguf")
    (root / "current").symlink_to(plan.location(root).relative_to(root))
    return plan.location(root) / "tiny.gguf"


def result(*arguments: str | Path) -> Mapping[str, Any]:
    called = call("bench", "serve", "--json", *arguments)
    assert called.exit_code == 0, called.stderr
    found: Mapping[str, Any] = json.loads(called.stdout)
    assert found["schema"] == 1
    return found


def test_table_of_the_promoted_model(model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    called = call("bench", "serve", "--plot", plot)
    assert called.exit_code == 0, called.stderr
    for said in ("tiny (F32) on ", "512 tokens", "8 at once", "█", "Anonymous memory", "chunk_tokens     256"):
        assert said in called.stdout
    assert "measuring 100/100" in called.stderr
    assert plot.stat().st_size > 1000
    assert model.is_file()


def test_json_says_where_settings_come_from(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_SERVE_THREADS", "1")
    found = result("--model", model)
    assert found["settings"]["threads"] == {"value": 1, "source": "environment"}
    assert found["settings"]["slots"] == {"value": 2, "source": "default"}
    assert [each["answers"] for each in found["writing"]] == [1, 2, 4, 8]
    assert found["model"]["sha256"] == artifacts.digest_file(model)
    assert 0 <= found["others_ratio"] <= 1
    assert found["bandwidth_ratio"] > 0


def test_tuning_is_written_and_used(model: Path, root: Path) -> None:
    found = result(*QUICK_TUNE, "--minutes", "2")  # it ends when all is tried
    path = tuning_file.path_of(model)
    assert found["file"] == str(path)
    written = tuning_file.read(path)
    assert written is not None
    assert found["tuning"] == json.loads(path.read_text())
    assert {trial.setting for trial in written.trials} >= {"mmap", "threads", "prefill_threads", "kv_type"}
    assert written.model_sha256 == artifacts.digest_file(model)
    assert written.files[0].remark == "this file"
    assert {file.quantization for file in written.files} >= {"F32", "Q4_0", "Q8_0"}
    assert all("speed only, quality unknown" in file.remark for file in written.files[1:])
    assert list(root.glob("**/quantizations-*")) == []
    used = result()
    assert any(str(path) in note for note in used["notes"])
    sources = {name: setting["source"] for name, setting in used["settings"].items()}
    assert {name for name, source in sources.items() if source == "tuned"} == set(written.settings.named())


def test_output_elsewhere_is_named_to_the_server(model: Path, tmp_path: Path, root: Path) -> None:
    path = tmp_path / "elsewhere.json"
    called = call("bench", "serve", *QUICK_TUNE, "--no-other-files", "--output", path)
    assert called.exit_code == 0, called.stderr
    assert str(path) in called.stdout
    assert "Files of this model" not in called.stdout
    assert not tuning_file.path_of(model).exists()
    with start(root, "serve", "--port", "0", "--tuned", path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving tiny")
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"; {path}, " in errors


def test_server_says_what_it_does_not_use(model: Path, root: Path) -> None:
    tuned = result(*QUICK_TUNE, "--no-other-files")["tuning"]
    path = tuning_file.path_of(model)
    path.write_text(json.dumps({**tuned, "model_sha256": "0" * 64}))
    with start(root, "serve", "--port", "0") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving tiny")
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert "is not used, for it was measured for another model" in errors
    path.write_text("{")
    refused = run(root, "serve", "--port", "0")
    assert refused.returncode == 1
    assert "is damaged" in refused.stderr
    assert "appliance bench serve --tune" in refused.stderr


def test_busy_machine_is_not_tuned(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.commands.bench.LISTEN_SECONDS", 0.0)
    monkeypatch.setattr(speed.Others, "ratio", lambda self: 0.4)  # noqa: ARG005
    called = call("bench", "serve", "--tune", "--json")
    assert called.exit_code == 4
    assert json.loads(called.stdout)["error"]["code"] == "verification_failed"
    assert "other programs took 40% of the CPU" in called.stderr
    assert "--even-if-busy" in called.stderr
    assert not tuning_file.path_of(model).exists()


def test_machine_that_became_busy_is_told_and_nothing_is_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.commands.bench.LISTEN_SECONDS", 0.0)
    ratios = iter((0.0, 0.5))
    monkeypatch.setattr(speed.Others, "ratio", lambda self: next(ratios))  # noqa: ARG005
    called = call("bench", "serve", "--tune", "--minutes", "0.01", "--no-other-files")
    assert called.exit_code == 4
    assert "Not written" in called.stdout
    assert "Nothing is written" in called.stderr
    assert not tuning_file.path_of(model).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--output", "x.json"], 2, "--tune"),
        (["--tune", "--plot", "x.png"], 2, "without --tune"),
        (["--plot", "x.pdf"], 2, ".png or .svg"),
        (["--model", "unheard-of"], 1, "there: tiny"),
        (["--tune", "--output", "/proc/x.json"], 1, "--output"),
        (["--tune", "--minutes", "0"], 2, "minutes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    model: Path, arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.commands.bench.BUSY_RATIO", 2.0)
    monkeypatch.setattr("appliance.commands.bench.LISTEN_SECONDS", 0.0)
    called = call("bench", "serve", *arguments)
    assert called.exit_code == code
    assert said in called.stderr
    assert "measuring" not in called.stderr
    assert model.is_file()


def test_embedder_is_refused(root: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write_embedding(tmp_path / "embedder.gguf")
    called = call("bench", "serve", "--model", path)
    assert called.exit_code == 1
    assert "one that writes text" in called.stderr
    assert not list(root.glob("*"))


def test_interrupted_tuning_leaves_nothing(model: Path, root: Path) -> None:
    process = start(root, "bench", "serve", "--tune", "--even-if-busy", start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    code = kill_when(process, lambda: "speed_worker" in command_line(children.read_text().split()), signal.SIGINT)
    assert code == 130
    assert list(model.parent.glob("*.json")) == [model.parent / artifacts.MANIFEST]


def command_line(pids: list[str]) -> str:
    """Of the last process, which may have ended by now."""
    return (device.read_text(device.PROC / pids[-1] / "cmdline") or "") if pids else ""


def test_memory_is_planned_as_it_was_before_anything_was_measured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures takes memory; a value that fits must not be refused for that."""
    subject = Subject(str(model))
    before = subject.plan().free_bytes
    monkeypatch.setattr(device, "memory_available_bytes", lambda: 1 << 20)
    assert subject.plan().free_bytes == before
    assert subject.to_tune().fits(TunedSettings(slots=4))
