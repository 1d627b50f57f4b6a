"""What measures: a process that times the decoder, several of them within memory, and the table. No time is asserted."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from appliance import artifacts
from appliance.errors import EngineFailed, EnvironmentIncomplete, ModelFileError, RecipeError
from appliance.serving import gguf_file, speed, speed_files, speed_report
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.served_model import ServedModel, find
from appliance.serving.speed import EngineTimes, Others, Rate, Speed
from appliance.serving.speed_files import OtherFile
from appliance.serving.speed_meter import Laboratory, Meter, ReadPrompt, Task, WriteAnswers
from appliance.serving.speed_report import Setting
from convert.quantizer import Settings, quantize_file
from tests import tiny_gguf
from tests.serving.llama_decoding import engine_settings

SPEED = Speed(
    reading={128: Rate(values=(300.0, 310.0, 200.0)), 512: Rate(values=(290.0, 290.0, 290.0))},
    writing={1: Rate(values=(50.0, 60.0, 55.0)), 2: Rate(values=(110.0, 110.0, 110.0))},
    answer_prompt_tokens=128,
    engine=EngineTimes(start_seconds=1.5, prompt_tokens=1000, first_token_seconds=(3.0, 3.5, 4.0), anonymous_bytes=3 << 20),
    read_bytes=200_000_000,
    bandwidth=22e9,
    others_ratio=0.0,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("speed") / "tiny.gguf")


def everything_fits(_: EngineSettings) -> bool:
    return True


# One process.


@pytest.mark.parametrize("changes", [{}, {"is_mapped": False, "is_repacked": True}, {"kv_type": "q8_0"}, {"slots": 1}])
def test_meter_does_all_tasks(path: Path, changes: dict[str, Any]) -> None:
    settings = engine_settings(path, context_tokens=512, chunk_tokens=128, **changes)
    tasks = [
        ReadPrompt(tokens=300, chunk_tokens=128, threads=2),
        WriteAnswers(answers=settings.slots, steps=8, threads=1),
        WriteAnswers(answers=settings.slots, steps=8, threads=2, prompt_tokens=64),
        WriteAnswers(answers=1, steps=8, threads=2, prompt_tokens=64),  # its prompt is there already
        WriteAnswers(answers=1, steps=8, threads=2, prompt_tokens=100),
        ReadPrompt(tokens=64, chunk_tokens=64, threads=1),
    ]
    with Meter(settings) as meter:
        assert meter.opened.weight_bytes > 0
        assert meter.opened.cell_bytes > 0
        assert all(meter.seconds(task) > 0 for task in [*tasks, *tasks])
        pid = meter.pid
    assert not Path(f"/proc/{pid}").exists()


def test_meter_says_what_is_wrong_with_a_file(tmp_path: Path, path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ModelFileError, match="truncated"):
        Meter(engine_settings(cut))


def test_meter_says_how_its_process_died(path: Path) -> None:
    with Meter(engine_settings(path)) as meter:
        os.kill(meter.pid, signal.SIGKILL)
        with pytest.raises(EngineFailed, match="ended with code -9"):
            meter.seconds(ReadPrompt(tokens=64, chunk_tokens=64, threads=1))


def test_task_beyond_the_memory_is_an_error_with_its_reason(path: Path) -> None:
    with Meter(engine_settings(path)) as meter, pytest.raises(EngineFailed, match="could not compute the batch"):
        meter.seconds(ReadPrompt(tokens=600, chunk_tokens=64, threads=1))


# Several, within memory.


class FakeMeter:
    pid = 1

    def __init__(self, settings: EngineSettings, open_meters: "list[FakeMeter]") -> None:
        self.settings = settings
        self._open_meters = open_meters
        open_meters.append(self)

    def close(self) -> None:
        self._open_meters.remove(self)


def test_processes_take_turns_where_memory_is_short() -> None:
    open_meters: list[FakeMeter] = []
    opened: list[bool] = []
    ways = [
        engine_settings(Path("/nowhere"), is_mapped=is_mapped, kv_type=kv)
        for is_mapped in (True, False)
        for kv in ("f16", "q8_0")
    ]

    def open_meter(settings: EngineSettings) -> Any:
        opened.append(True)
        return FakeMeter(settings, open_meters)

    with Laboratory(25, lambda settings: 10, open_meter) as laboratory:  # noqa: ARG005
        first = laboratory.meter(ways[0])
        assert laboratory.meter(ways[1]) is not first
        assert laboratory.meter(msgspec.structs.replace(ways[0], threads_decode=7)) is first  # threads come with tasks
        assert len(opened) == len(open_meters) == 2
        laboratory.meter(ways[2])
        assert [meter.settings for meter in open_meters] == [ways[0], ways[2]]  # the one used longest ago had to go
        laboratory.meter(ways[1])
        assert len(open_meters) == 2
        assert len(opened) == 4
    assert not open_meters


# Everything that the table tells.


def test_measure_fills_the_table(path: Path) -> None:
    said: list[tuple[float, str]] = []
    result = speed.measure(
        engine_settings(path, context_tokens=1024, queue_requests=2, queue_tokens=4096),
        bandwidth=1e9,
        fits=everything_fits,
        on_progress=lambda *each: said.append(each),
        seconds=0.0,
    )
    assert list(result.reading) == [128, 512]  # one of 1024 leaves no room in this context
    assert list(result.writing) == [1, 2, 4, 8]
    rates = [*result.reading.values(), *result.writing.values()]
    assert all(len(rate.values) == speed.FEWEST_ROUNDS and min(rate.values) > 0 for rate in rates)
    assert result.engine.prompt_tokens == 1000
    assert result.engine.anonymous_bytes > 1 << 20
    assert min(result.engine.start_seconds, *result.engine.first_token_seconds) > 0
    assert result.read_bytes > path.stat().st_size / 2
    assert [share for share, _ in said] == sorted(share for share, _ in said)
    assert said[-1] == (1.0, "done")


@pytest.mark.parametrize(("most", "answers"), [(8, [1, 2, 4, 8]), (5, [1, 2, 4]), (0, [1])])
def test_fewer_answers_where_memory_is_short(path: Path, most: int, answers: Sequence[int]) -> None:
    extent = speed._extent(engine_settings(path, context_tokens=64), lambda settings: settings.slots <= most)
    assert extent.answers == tuple(answers)
    assert list(extent.prompts) == [32]
    settings = extent.settings(engine_settings(path))
    assert settings.context_tokens > max(32, extent.answer_prompt_tokens + extent.steps)


def test_others_are_told_from_this_process_and_its_children(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 10 0 0 5 0 0\n")
    others = Others(tmp_path)
    stat.write_text("cpu  100 0 50 1800 10 0 0 5 0 0\n")
    assert others.ratio() == 0.0
    stat.write_text(f"cpu  {100 + 10**6} 0 50 {800 + 10**6} 10 0 0 5 0 0\n")
    assert others.ratio() == pytest.approx(0.5, abs=0.01)
    assert Others(tmp_path / "nothing").ratio() == 0.0


# How it is told.


def test_table_tells_medians_ranges_and_where_settings_come_from() -> None:
    text = speed_report.table("tiny on a machine", SPEED, {"slots": Setting(value=4, source="tuned")})
    lines = {line.strip().partition("  ")[0]: line for line in text.splitlines()}
    assert text.startswith("tiny on a machine\n")
    assert "300.0   (200 to 310)" in lines["128 tokens"]
    assert lines["2 at once"].count("█") == 2 * lines["1 at once"].count("█") == speed_report.BAR_WIDTH
    assert "3.50 s (3.00 to 4.00)" in lines["First token of 1000 tokens"]
    assert "11.0 GB/s, 50% of the 22.0 GB/s" in lines["Memory read by one answer"]
    assert lines["slots"].split() == ["slots", "4", "tuned"]
    assert "Other programs" not in text
    loud = Speed(**{**{each: getattr(SPEED, each) for each in SPEED.__dataclass_fields__}, "others_ratio": 0.3})
    assert "Other programs took 30% of the CPU" in speed_report.table("", loud, {})


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_plot_is_drawn(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    speed_report.require_plot(path)
    speed_report.plot(path, "tiny on a machine", SPEED)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if path.suffix == ".png" else b"tokens per second" in data or b"<svg" in data


def test_plot_that_cannot_be_drawn_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"\.png or \.svg"):
        speed_report.require_plot(tmp_path / "plot.pdf")
    with pytest.raises(RecipeError, match="is no folder"):
        speed_report.require_plot(tmp_path / "nowhere" / "plot.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(EnvironmentIncomplete, match="pip install matplotlib"):
        speed_report.require_plot(tmp_path / "plot.png")


# Other files of the same model.


def test_what_is_quantized_is_quantized_again_only_when_told(path: Path, tmp_path: Path) -> None:
    quantize_file(path, tmp_path / "q8.gguf", Settings(type="Q8_0"))
    with pytest.raises(ModelFileError, match="was not quantized"):
        quantize_file(tmp_path / "q8.gguf", tmp_path / "q4.gguf", Settings(type="Q4_0"))
    quantize_file(tmp_path / "q8.gguf", tmp_path / "q4.gguf", Settings(type="Q4_0", is_requantized=True))
    assert gguf_file.check(tmp_path / "q4.gguf").quantization == "Q4_0"


def made(root: Path, name: str, path: Path, parents: Sequence[str]) -> artifacts.Artifact:
    plan = artifacts.Plan(kind="gguf", name=name, inputs={}, parents=parents)
    with artifacts.create(plan, root) as draft:
        (draft.path / f"{name}.gguf").write_bytes(path.read_bytes())
    return artifacts.load(plan.location(root))


def test_siblings_are_files_of_the_same_shape(root: Path, path: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "q8.gguf"
    quantize_file(path, quantized, Settings(type="Q8_0"))
    served = made(root, "tiny", path, ["merged/a-0123"])
    made(root, "tiny-Q8_0", quantized, [served.id])
    made(root, "other", quantized, ["merged/b-0123"])
    found, problems = speed_files.siblings(find(str(served.path), root), root)
    assert [(file.quantization, file.path.name, file.is_foreign) for file in found] == [("Q8_0", "tiny-Q8_0.gguf", False)]
    assert not problems


def test_siblings_of_a_file_without_manifest_lie_beside_it(path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "a.gguf"
    plain.write_bytes(path.read_bytes())
    quantize_file(path, tmp_path / "b.gguf", Settings(type="Q4_0"))
    tiny_gguf.write_adapter(tmp_path / "lora.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:2000])
    found, problems = speed_files.siblings(foreign(plain), tmp_path)
    assert [(file.path.name, file.is_foreign) for file in found] == [("b.gguf", True)]
    assert {problem.partition(" ")[0] for problem in problems} == {str(tmp_path / "cut.gguf"), str(tmp_path / "lora.gguf")}


def foreign(path: Path) -> ServedModel:
    return ServedModel(name=path.stem, path=path, sha256="", made_at=0, header=gguf_file.check(path), is_foreign=True)


def test_files_are_measured_in_turn(path: Path) -> None:
    files = [OtherFile(quantization=name, path=Path(f"/{name}"), size_bytes=1, remark="") for name in ("F16", "Q8_0")]
    measured: list[str] = []

    def measure(settings: EngineSettings, task: Task) -> float:
        measured.append(settings.model_path)
        return 2.0 if isinstance(task, ReadPrompt) else 0.5

    tasks = ReadPrompt(tokens=100, chunk_tokens=64, threads=1), WriteAnswers(answers=1, steps=10, threads=1)
    speeds = speed_files.compare(files, engine_settings(path), tasks, measure, lambda share, what: None)  # noqa: ARG005
    assert measured == ["/F16", "/F16", "/Q8_0", "/Q8_0"] * speed_files.ROUNDS
    assert [(each.reading.median, each.writing.median) for each in speeds] == [(50.0, 20.0), (50.0, 20.0)]
