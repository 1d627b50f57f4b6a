"""How fast an exported encoder is, and what it takes: `python -m benchmarks.encoders ENCODER_FOLDER`.

Texts are one word repeated, so that every encoder gets the same lengths. Random weights would
give the same figures. Memory is that of the process, which holds nothing but the encoder.
"""

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click

from appliance import device
from appliance.console import Command, emit, json_option
from appliance.encoders import Encoder, Precision, Text
from benchmarks import about

ROUNDS = 15
SHAPES = ((1, 16), (10, 128), (10, 256))  # texts, tokens: a query, and ten passages to rank
MANY_TEXTS = 200  # for memory: more than a batch


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(get_args(Precision)), default="int8", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=device.physical_cores(), show_default=True)
@json_option
def encoders(folder: Path, precision: Precision, threads: int, as_json: bool) -> None:
    """Measure the encoder in FOLDER: milliseconds for some shapes, and memory."""
    started = time.perf_counter()
    encoder = Encoder.load(folder, precision, threads)
    figures: dict[str, float] = {"load_seconds": time.perf_counter() - started, "loaded_mb": resident_mb()}
    for texts, tokens in SHAPES:
        tokens = min(tokens, encoder.settings.max_tokens)
        figures[f"{texts}x{tokens}_ms"] = 1000 * median_seconds(lambda n=texts, t=tokens: run(encoder, n, t))  # type: ignore[misc]
    run(encoder, MANY_TEXTS, encoder.settings.max_tokens)
    # What a burst leaves behind, and what it took at its worst.
    figures |= {"after_mb": resident_mb(), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}
    figures = {name: round(value, 3) for name, value in figures.items()}
    where = {**about.machine(), "threads": str(threads), "load": about.load()}
    text = "\n".join(f"{name:14} {value}" for name, value in [*where.items(), *figures.items()])
    emit({"encoder": folder, "precision": precision, "machine": where, "figures": figures}, as_json, text)


def run(encoder: Encoder, texts: int, tokens: int) -> None:
    """Computes so many texts, or pairs, of so many tokens."""
    is_pair = encoder.settings.kind in ("reranker", "nli")
    special = len(encoder.token_ids([("a", "") if is_pair else ""])[0])  # in a pair, with the one of the first text
    words = "a " * (tokens - special)
    inputs: list[Text] = [("a", words) if is_pair else words] * texts
    for _ in encoder.outputs(inputs, truncate=True):
        pass


def median_seconds(work: Callable[[], None]) -> float:
    work()
    spent = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int((device.read_text(Path("/proc/self/statm")) or "0 0").split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    encoders()
