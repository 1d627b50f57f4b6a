"""Merge, GGUF and Q4_K_M beside the plain upstream chain: `python -m benchmarks.conversion 4B`.

A model of real shape with random weights and a LoRA adapter on all its linear layers go through both chains on this
machine, one after the other: ours, and PEFT's `merge_and_unload`, llama.cpp's converter and its quantization call as they
come. Of each step the time and the largest anonymous memory of its processes are reported: what the kernel cannot drop.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from appliance.console import Command, emit, human_bytes, human_seconds, json_option, note
from benchmarks import about, checkpoints, timed
from convert import llama_cpp_source

MOST_MEMORY_BYTES, MOST_TIME_RATIO = 4 << 30, 1.2

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
QUANTIZE = """
import sys, ctypes
from llama_cpp import llama_cpp as c
from appliance import llama_backends
llama_backends.load(c)
settings = c.llama_model_quantize_default_params()
settings.ftype, settings.nthread = 15, int(sys.argv[3])
sys.exit(c.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(settings)))
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a chain as it ran."""

    chain: str
    name: str
    seconds: float
    anonymous_bytes: int


@click.command(cls=Command)
@click.argument("shape", type=click.Choice(list(checkpoints.QWEN3)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; a 4B model takes 30 GB there.")
@click.option("--only", type=click.Choice(["ours", "upstream"]), help="One chain alone.")
@json_option
def conversion(shape: str, folder: Path | None, only: str | None, as_json: bool) -> None:
    """Measure the conversion of a random model of SHAPE."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        here = Path(scratch)
        note(f"conversion: writing a random {shape} model to {here}")
        checkpoints.write_model(here / "base", checkpoints.QWEN3[shape])
        checkpoints.write_adapter(here / "adapter", checkpoints.QWEN3[shape])
        chains = {"ours": ours, "upstream": upstream}
        steps = [step for name, chain in chains.items() if only in (None, name) for step in chain(here)]
    result = {
        **about.machine(),
        **about.versions((*about.TRAINING, *about.SERVING)),
        "shape": shape,
        "steps": [asdict(step) for step in steps],
    }
    emit(result, as_json, "\n".join(table(steps)))


def ours(here: Path) -> Iterator[Step]:
    """The appliance's own commands."""
    root = here / "artifacts"
    merged = yield from _appliance(root, "merge", "convert", "merge", here / "adapter", "--base", here / "base")
    full = yield from _appliance(root, "gguf", "convert", "gguf", merged["artifact"], "--name", "model")
    yield from _appliance(root, "quantize", "convert", "quantize", full["artifact"], "--type", "Q4_K_M")
    shutil.rmtree(root)


def upstream(here: Path) -> Iterator[Step]:
    """What a person would type without the appliance; the same pinned versions."""
    converter = llama_cpp_source.converter_dir() / "convert_hf_to_gguf.py"
    merged, full, small = here / "merged", here / "full.gguf", here / "small.gguf"
    yield _timed(
        "upstream", "merge", [sys.executable, "-c", PEFT_MERGE, *map(str, (here / "base", here / "adapter", merged))]
    )
    yield _timed(
        "upstream", "gguf", [sys.executable, str(converter), str(merged), "--outfile", str(full), "--outtype", "f16"]
    )
    threads = str(len(os.sched_getaffinity(0)))
    yield _timed("upstream", "quantize", [sys.executable, "-c", QUANTIZE, str(full), str(small), threads])


def _appliance(root: Path, name: str, *arguments: str | Path) -> Any:
    output = root.parent / "output.json"
    command = [sys.executable, "-m", "appliance", *map(str, arguments), "--json"]
    yield _timed("ours", name, command, {"APPLIANCE_ARTIFACTS": str(root)}, output)
    return json.loads(output.read_text())


def _timed(
    chain: str, name: str, command: Sequence[str], environment: dict[str, str] | None = None, output: Path | None = None
) -> Step:
    done = timed.run(command, environment, output)
    note(f"conversion: {chain:<8} {name:<9} {human_seconds(done.seconds):>8}  {human_bytes(done.anonymous_bytes)}")
    return Step(chain, name, done.seconds, done.anonymous_bytes)


def table(steps: Sequence[Step]) -> list[str]:
    """Markdown, with the ratio of the whole chains."""
    lines = ["| Chain | Step | Time | Anonymous memory, at most |", "|---|---|---|---|"]
    lines += [
        f"| {each.chain} | {each.name} | {human_seconds(each.seconds)} | {human_bytes(each.anonymous_bytes)} |"
        for each in steps
    ]
    totals = {chain: sum(each.seconds for each in steps if each.chain == chain) for chain in ("ours", "upstream")}
    if all(totals.values()):
        ratio = totals["ours"] / totals["upstream"]
        lines += ["", f"Time of ours to upstream's: {ratio:.2f} (wanted: at most {MOST_TIME_RATIO})."]
    most = max((each.anonymous_bytes for each in steps if each.chain == "ours"), default=0)
    return [*lines, f"Most memory of ours: {human_bytes(most)} (wanted: less than {human_bytes(MOST_MEMORY_BYTES)})."]


if __name__ == "__main__":
    conversion()
