"""`appliance bench serve`: how fast this machine serves a model; with `--tune`, the settings that are fastest here."""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance import __version__, artifacts, config
from appliance.commands.bench_subject import Subject
from appliance.console import Command, Progress, emit, json_option, note
from appliance.errors import ApplianceError, EnvironmentIncomplete, ModelFileError, RecipeError, VerificationFailed

if TYPE_CHECKING:
    from appliance.serving.engine_settings import EngineSettings
    from appliance.serving.speed_files import FileSpeed, OtherFile
    from appliance.serving.speed_meter import Task
    from appliance.serving.tuning import Measure, Outcome
    from appliance.serving.tuning_file import Tuning

PERCENT = 100
MINUTES = 5.0
BUSY_RATIO = 0.1  # of all cores' time
LISTEN_SECONDS = 2.0
# Types that are worth a comparison, with their bits for each weight, which are a little more than llama.cpp's tables say.
QUANTIZATIONS = {"Q4_0": 5.2, "Q4_K_M": 5.5, "Q8_0": 8.6}
SPEED_ONLY = "made for this comparison: speed only, quality unknown"


@click.command("serve", cls=Command)
@click.option("--model", metavar="PATH|NAME", help="A .gguf file or an artifact; by default the promoted model.")
@click.option("--tune", "is_tuning", is_flag=True, help="Find the fastest settings and write them beside the model.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=MINUTES,
    show_default=True,
    help="For --tune, about; other files add.",
)
@click.option("--other-files/--no-other-files", default=True, help="With --tune, also measure other quantizations.")
@click.option("--even-if-busy", is_flag=True, help="Tune although other programs use the CPU, which misleads it.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="With --tune, write the settings there.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the table as FILE.png or FILE.svg.")
@json_option
def bench_serve(
    model: str | None,
    is_tuning: bool,
    minutes: float,
    other_files: bool,
    even_if_busy: bool,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast this machine serves a model, with the settings that `appliance serve` would take, without HTTP.

    Answers stay the same whatever --tune finds: what would change them is proposed, not taken.
    """
    config.apply_quiet_environment()
    if is_tuning and plot is not None:
        raise RecipeError("--plot draws the table, which --tune does not measure; run it afterwards, without --tune.")
    if output is not None and not is_tuning:
        raise RecipeError("--output is where --tune writes what it finds; give both or none.")
    if is_tuning:
        _tune(model, minutes * 60, output, as_json, is_comparing=other_files, may_be_busy=even_if_busy)
    else:
        _measure(model, plot, as_json)


def _measure(model: str | None, plot: Path | None, as_json: bool) -> None:
    from appliance.serving import bandwidth, speed, speed_report

    if plot is not None:
        speed_report.require_plot(plot)
    subject = Subject(model)
    plan = subject.plan()
    bytes_per_second = bandwidth.measure(subject.machine.physical_cores)
    progress = Progress("measuring", PERCENT)
    result = speed.measure(
        plan.settings,
        bandwidth=bytes_per_second,
        fits=lambda settings: subject.needed_bytes(settings) <= plan.free_bytes,
        on_progress=lambda share, what: progress.update(int(share * PERCENT), what),
    )
    if plot is not None:
        speed_report.plot(plot, subject.head, result)
    sources = subject.sources(plan)
    facts = {
        **subject.facts(),
        "settings": {name: {"value": each.value, "source": each.source} for name, each in sources.items()},
        "notes": plan.settings.notes,
        **speed_report.as_json(result),
        "plot": plot,
    }
    emit(facts, as_json, speed_report.table(subject.head, result, sources))


def _tune(
    model: str | None, seconds: float, output: Path | None, as_json: bool, *, is_comparing: bool, may_be_busy: bool
) -> None:
    import msgspec

    from appliance.serving import tuning, tuning_file, tuning_report
    from appliance.serving.speed import Others

    if not may_be_busy:
        _require_quiet()
    started, others = time.monotonic(), Others()
    subject = Subject(model)
    path = output or tuning_file.path_of(subject.model.path)
    _require_writable(path)
    found = subject.to_tune()
    with subject.laboratory(found.settings) as measure:
        progress = Progress("tuning", PERCENT)
        outcome = tuning.tune(
            found,
            measure,
            on_progress=lambda share, what: progress.update(int(share * PERCENT), what),
            seconds=seconds,
        )
        now = tuning.applied(found.settings, outcome.settings)
        files, notes = _compared(subject, now, outcome.tasks, measure) if is_comparing else ((), ())
    result = msgspec.structs.replace(
        _evidence(subject, outcome),
        seconds=round(time.monotonic() - started, 1),
        notes=(*outcome.notes, *notes),
        files=tuple(tuning_report.file_trial(each) for each in files),
        others_ratio=round(others.ratio(), 3),
    )
    is_written = may_be_busy or result.others_ratio <= BUSY_RATIO
    if is_written:
        tuning_file.write(path, result)
    facts = {**subject.facts(), "file": path if is_written else None, "tuning": msgspec.to_builtins(result)}
    emit(facts, as_json, tuning_report.table(subject.head, path if is_written else None, result))
    if not is_written:
        raise VerificationFailed(f"Nothing is written: {_busy(result.others_ratio)}")


def _evidence(subject: Subject, outcome: "Outcome") -> "Tuning":
    from appliance.serving import tuning, tuning_file
    from appliance.serving.tuning_file import MachineIdentity, Tuning

    return Tuning(
        settings=outcome.settings,
        model=subject.model.name,
        model_sha256=subject.model.sha256,
        machine=MachineIdentity.of(subject.machine),
        llama_cpp_python=tuning_file.library_version(),
        appliance=__version__,
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        rule=tuning.RULE,
        trials=tuple(outcome.trials),
        proposals=tuple(outcome.proposals),
    )


def _require_quiet() -> None:
    """Raises `VerificationFailed` while other programs use the CPU: what is fastest beside them is not what is fastest."""
    from appliance.serving.speed import Others

    others = Others()
    time.sleep(LISTEN_SECONDS)
    if (ratio := others.ratio()) > BUSY_RATIO:
        raise VerificationFailed(f"Nothing is measured: {_busy(ratio)}")


def _busy(ratio: float) -> str:
    return (
        f"other programs took {ratio:.0%} of the CPU, {BUSY_RATIO:.0%} is the most; end them, a running server too, and "
        "repeat, or tune all the same with --even-if-busy."
    )


def _require_writable(path: Path) -> None:
    """Raises `ArtifactError` before minutes are spent on what cannot be written."""
    from appliance.serving import tuning_file

    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise tuning_file.not_writable(path.absolute().parent, error) from error


def _compared(
    subject: Subject, settings: "EngineSettings", tasks: "tuple[Task, Task]", measure: "Measure"
) -> "tuple[Sequence[FileSpeed], Sequence[str]]":
    """How fast other quantizations of the model are, its own file first; and why some were not measured."""
    from appliance.serving import speed_files
    from appliance.serving.speed_files import OtherFile

    header = subject.model.header
    own = OtherFile(
        quantization=header.quantization, path=subject.model.path, size_bytes=header.size_bytes, remark="this file"
    )
    others, notes = speed_files.siblings(subject.model, subject.root)
    config.cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantizations-", dir=config.cache_root()) as folder:
        if not others:
            others, notes = _made(own, Path(folder))
        fitting = [own]
        for each in others:
            try:
                subject.require_usable(each, settings)
                fitting.append(each)
            except ApplianceError as error:
                notes = [*notes, f"{each.quantization} is not measured: {error}"]
        progress = Progress("other files", PERCENT)
        if len(fitting) == 1:
            return (), notes
        speeds = speed_files.compare(
            fitting,
            settings,
            tasks,
            measure,
            lambda share, what: progress.update(int(share * PERCENT), what),
        )
    progress.update(PERCENT)
    return speeds, notes


def _made(own: "OtherFile", folder: Path) -> "tuple[Sequence[OtherFile], Sequence[str]]":
    """Other quantizations, made from the model's own file as far as the disk allows."""
    from appliance.serving import gguf_file
    from appliance.serving.speed_files import OtherFile
    from convert.quantizer import Settings, quantize_file

    made: list[OtherFile] = []
    notes: list[str] = []
    for quantization, bits in QUANTIZATIONS.items():
        if quantization == own.quantization:
            continue
        target = folder / f"{quantization}.gguf"
        weights = sum(math.prod(tensor.shape) for tensor in gguf_file.check(own.path).tensors)
        try:
            artifacts.require_space(folder, int(weights * bits / 8), f"A {quantization} file for comparison")
            note(f"making a {quantization} file for comparison")
            quantize_file(own.path, target, Settings(type=quantization, is_requantized=True))
        except (EnvironmentIncomplete, ModelFileError) as error:
            notes.append(f"{quantization} is not measured: {error}")
            continue
        size = target.stat().st_size
        made.append(OtherFile(quantization=quantization, path=target, size_bytes=size, remark=SPEED_ONLY))
    return made, notes
