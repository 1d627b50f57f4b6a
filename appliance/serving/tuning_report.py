"""What a tuning found, for a person: what was tried, what was taken and why, and where it was written."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from appliance.console import human_bytes, human_seconds
from appliance.serving.speed_files import FileSpeed
from appliance.serving.speed_report import LOUD_RATIO
from appliance.serving.tuning_file import FileTrial, Trial, Tuning


def table(head: str, path: Path | None, tuning: Tuning) -> str:
    """`head` says which model on which machine; without a `path`, nothing was written."""
    took = f"{human_seconds(tuning.seconds)} minutes"
    lines = [
        head,
        "",
        f"Settings: {tuning.settings}",
        f"Written to {path} after {took}, for `appliance serve` on this machine." if path else f"Not written, after {took}.",
        "",
        f"{'tried':<24} {'instead of':<12} {'gain':>7} {'spread':>7}  {'':<6} why",
        *map(_line, tuning.trials),
        "",
        tuning.rule,
        *_said("Proposed, not taken", tuning.proposals),
        *_files(tuning.files),
        *_said("Notes", tuning.notes),
    ]
    if tuning.others_ratio > LOUD_RATIO:
        others = f"Other programs took {tuning.others_ratio:.0%} of the CPU meanwhile"
        lines += ["", f"{others}: tune again when they are quiet."]
    return "\n".join(lines)


def file_trial(speed: FileSpeed) -> FileTrial:
    return FileTrial(
        quantization=speed.file.quantization,
        size_bytes=speed.file.size_bytes,
        remark=speed.file.remark,
        reading=speed.reading.values,
        writing=speed.writing.values,
    )


def _line(trial: Trial) -> str:
    tried, taken = f"{trial.setting} {trial.value}", "taken" if trial.is_taken else ""
    return f"{tried:<24} {trial.instead_of!s:<12} {trial.gain:>+7.1%} {trial.spread:>7.1%}  {taken:<6} {trial.reason}"


def _said(heading: str, lines: Sequence[str]) -> list[str]:
    return ["", heading, *(f"  {line}" for line in lines)] if lines else []


def _files(files: Sequence[FileTrial]) -> list[str]:
    """Each file beside the first, which is the model's own."""
    if not files:
        return []
    own = files[0]
    lines = ["", "Files of this model on this machine, tokens/s", f"  {'':<8} {'size':>10} {'reading':>18} {'writing':>18}"]
    for file in files:
        rates = [_beside(file.reading, own.reading), _beside(file.writing, own.writing)]
        size = human_bytes(file.size_bytes)
        lines.append(f"  {file.quantization:<8} {size:>10} {rates[0]:>18} {rates[1]:>18}  {file.remark}")
    return lines


def _beside(values: Sequence[float], own: Sequence[float]) -> str:
    """The median, and how much more that is than the model's own, round by round."""
    more = statistics.median(value / mine for value, mine in zip(values, own, strict=True)) - 1
    said = f" ({more:+.0%})" if values is not own else ""
    return f"{statistics.median(values):.1f}{said}"
