"""What `speed.py` measured, for a person: a table with bars, a plot as PNG or SVG; and for programs, as JSON."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.console import human_bytes
from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.speed import Rate, Speed

BAR_WIDTH = 40
PLOT_SUFFIXES = (".png", ".svg")
PLOT_INCHES = (7.0, 4.0)
LOUD_RATIO = 0.05  # other programs took so much of the CPU that it shows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting that was measured with, and who chose it: "environment", "recipe", "tuned", "memory" or "default"."""

    value: int | str
    source: str


def table(head: str, speed: Speed, settings: Mapping[str, Setting]) -> str:
    """`head` says which model on which machine."""
    engine = speed.engine
    first_head, first_token = f"First token of {engine.prompt_tokens} tokens", statistics.median(engine.first_token_seconds)
    share = f"{speed.bandwidth_ratio:.0%} of the {speed.bandwidth / 1e9:.1f} GB/s that this machine's memory gives"
    lines = [
        head,
        "",
        f"{'Reading a prompt':<31}tokens/s   least to most",
        *(f"  {f'{tokens} tokens':<28}{_figures(rate)}" for tokens, rate in speed.reading.items()),
        "",
        f"{f'Writing after {speed.answer_prompt_tokens} tokens':<31}tokens/s   least to most",
        *_bars(speed.writing),
        "",
        f"{first_head:<30}{first_token:9.2f} s {_range(engine.first_token_seconds)}, alone",
        f"{'Process start to first token':<30}{engine.start_seconds:9.2f} s with the file in the page cache",
        f"{'Anonymous memory':<30}{human_bytes(engine.anonymous_bytes):>13}",
        f"{'Memory read by one answer':<30}{speed.read_bytes_per_second / 1e9:9.1f} GB/s, {share}",
        "",
        "Settings",
        *(f"  {name:<16} {setting.value!s:<8} {setting.source}" for name, setting in settings.items()),
    ]
    if speed.others_ratio > LOUD_RATIO:
        others = f"Other programs took {speed.others_ratio:.0%} of the CPU meanwhile"
        lines += ["", f"{others}: measure again when they are quiet."]
    return "\n".join(lines)


def as_json(speed: Speed) -> dict[str, Any]:
    return {
        "reading": [{"prompt_tokens": tokens, **_rate_as_json(rate)} for tokens, rate in speed.reading.items()],
        "writing": [{"answers": count, **_rate_as_json(rate)} for count, rate in speed.writing.items()],
        "answer_prompt_tokens": speed.answer_prompt_tokens,
        "first_token": {
            "prompt_tokens": speed.engine.prompt_tokens,
            "seconds": statistics.median(speed.engine.first_token_seconds),
            "values": speed.engine.first_token_seconds,
        },
        "start_seconds": speed.engine.start_seconds,
        "anonymous_bytes": speed.engine.anonymous_bytes,
        "read_bytes_per_second": speed.read_bytes_per_second,
        "bandwidth_bytes_per_second": speed.bandwidth,
        "bandwidth_ratio": speed.bandwidth_ratio,
        "others_ratio": speed.others_ratio,
    }


def settings_of(settings: EngineSettings) -> dict[str, int | str]:
    """By the names that a person sets them by."""
    return {
        "threads": settings.threads_decode,
        "prefill_threads": settings.threads_prefill,
        "chunk_tokens": settings.chunk_tokens,
        "slots": settings.slots,
        "context_tokens": settings.context_tokens,
        "cache_tokens": settings.cache_tokens,
        "kv_type": settings.kv_type,
        "mmap": "on" if settings.is_mapped else "off",
        "repack": "on" if settings.is_repacked else "off",
        "gpu_layers": settings.gpu_layers,
    }


def require_plot(path: Path) -> None:
    """Raises, before anything is measured, when no plot can be drawn to `path`."""
    if path.suffix not in PLOT_SUFFIXES:
        raise RecipeError(f"--plot {path}: the name must end in {' or '.join(PLOT_SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"--plot {path}: {path.absolute().parent} is no folder; make it, or name another file.")
    try:
        import matplotlib  # noqa: F401 (whether it is there)
    except ModuleNotFoundError as error:
        raise EnvironmentIncomplete(
            "--plot needs matplotlib, which serving alone does not: `pip install matplotlib`, or leave --plot out, as the "
            "table has the same figures."
        ) from error


def plot(path: Path, title: str, speed: Speed) -> None:
    """Bars of tokens per second: prompts by length, answers by how many at once; lines from the least to the most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PLOT_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, rates, label in zip(
        figure.subplots(1, 2), (speed.reading, speed.writing), ("tokens of a prompt", "answers at once"), strict=True
    ):
        medians = [rate.median for rate in rates.values()]
        below = [rate.median - min(rate.values) for rate in rates.values()]
        above = [max(rate.values) - rate.median for rate in rates.values()]
        bars = axes.bar(list(map(str, rates)), medians, yerr=(below, above), capsize=4)
        axes.bar_label(bars, fmt="%.0f", label_type="center", color="white")
        axes.set_xlabel(label)
        axes.set_ylabel("tokens per second")
    figure.savefig(path)


def _figures(rate: Rate) -> str:
    return f"{rate.median:>9.1f}   {_range(rate.values)}"


def _range(values: Sequence[float]) -> str:
    digits = 2 if max(values) < 10 else 0
    return f"({min(values):.{digits}f} to {max(values):.{digits}f})"


def _bars(rates: Mapping[int, Rate]) -> list[str]:
    most = max(rate.median for rate in rates.values())
    return [
        f"  {f'{count} at once':<28}{_figures(rate):<30} {'█' * max(1, round(BAR_WIDTH * rate.median / most))}"
        for count, rate in rates.items()
    ]


def _rate_as_json(rate: Rate) -> dict[str, Any]:
    return {"tokens_per_second": rate.median, "values": rate.values}
