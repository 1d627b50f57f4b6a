"""Merge, GGUF and Q4_K_M beside the plain upstream chain: `python -m benchmarks.conversion 4B`.

A model of real shape with random weights and a LoRA adapter on all its linear layers go through both chains on this
machine, one after the other: ours, and PEFT's `merge_and_unload`, llama.cpp's converter and its quantization call as they
come. Of each step the time and the largest anonymous memory of its processes are reported: what the kernel cannot drop.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from appliance import config
from appliance.console import Command, emit, human_bytes, human_seconds, json_option, note
from appliance.errors import ApplianceError
from benchmarks import about, processes, shapes
from benchmarks.shapes import SHAPES, Shape
from convert import llama_cpp_source, safetensors_file

SAMPLE_SECONDS = 0.05
SHARD_BYTES = 2_000_000_000
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST_MEMORY_BYTES, MOST_TIME_RATIO = 4 << 30, 1.2
# Small enough for a test: a model of two layers, with the whole vocabulary that its tokenizer has.
SMALL = Shape(layers=2, hidden=256, feed_forward=768, heads=4, kv_heads=2, head_width=64)
MEASURED = {"small": SMALL} | {name: shape for name, shape in SHAPES.items() if name != "tiny"}

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
@click.argument("shape", type=click.Choice(list(MEASURED)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; a 4B model takes 30 GB there.")
@click.option("--only", type=click.Choice(["ours", "upstream"]), help="One chain alone.")
@json_option
def conversion(shape: str, folder: Path | None, only: str | None, as_json: bool) -> None:
    """Measure the conversion of a random model of SHAPE."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        here = Path(scratch)
        note(f"conversion: writing a random {shape} model to {here}")
        write_model(here / "base", MEASURED[shape])
        write_adapter(here / "adapter", MEASURED[shape])
        chains = {"ours": ours, "upstream": upstream}
        steps = [step for name, chain in chains.items() if only in (None, name) for step in chain(here)]
    result = {**about.machine(), **about.versions(), "shape": shape, "steps": [asdict(step) for step in steps]}
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
    environ = {**config.quiet_environment(), **(environment or {})}
    with tempfile.TemporaryFile("w+") as log, output.open("w") if output else tempfile.TemporaryFile("w") as result:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environ, stdout=result, stderr=log)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(processes.anonymous_now(each) for each in processes.tree(process.pid)))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - started
        if process.returncode:
            log.seek(0)
            raise ApplianceError(f"{chain}, {name} failed (exit {process.returncode}): {log.read()[-2000:]}")
    note(f"conversion: {chain:<8} {name:<9} {human_seconds(seconds):>8}  {human_bytes(peak)}")
    return Step(chain, name, seconds, peak)


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


def write_model(folder: Path, shape: Shape) -> None:
    """A Qwen3 checkpoint in bfloat16, in shards, with Qwen's own vocabulary."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config

    folder.mkdir()
    settings = Qwen3Config(
        vocab_size=shape.vocabulary_tokens,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    settings.save_pretrained(folder)
    vocabulary = shapes.VOCABULARY_FILE
    name = Path(vocabulary).name
    (folder / name).write_bytes(llama_cpp_source.read_source(vocabulary)[vocabulary])
    AutoTokenizer.from_pretrained(folder, gguf_file=name, eos_token="<|im_end|>").save_pretrained(folder)
    (folder / name).unlink()
    torch.manual_seed(1)
    places: dict[str, str] = {}
    for number, names in enumerate(_shards(shape), 1):
        file = f"model-{number:05}.safetensors"
        safetensors_file.write(folder / file, {each: ("BF16", _shape(each, shape)) for each in names}, _random)
        places.update(dict.fromkeys(names, file))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(folder: Path, shape: Shape) -> None:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM").save_pretrained(folder)
    tensors = {}
    for name in _names(shape):
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            out, into = _shape(name, shape)
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.01 * torch.randn(RANK, into)
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.01 * torch.randn(out, RANK)
    save_file(tensors, folder / "adapter_model.safetensors")


def _random(name: str, dimensions: Sequence[int]) -> Iterator[bytes]:
    import torch

    if len(dimensions) == 1:
        yield torch.ones(dimensions[0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        return
    rows, columns = dimensions
    for start in range(0, rows, 4096):
        piece = torch.randn(min(4096, rows - start), columns) * (0.02 if "embed" in name else columns**-0.5)
        yield piece.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def _shards(shape: Shape) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in _names(shape):
        dimensions = _shape(name, shape)
        size += 2 * dimensions[0] * (dimensions[1] if len(dimensions) > 1 else 1)
        shard.append(name)
        if size > SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _names(shape: Shape) -> Iterator[str]:
    yield "model.embed_tokens.weight"
    for layer in range(shape.layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield f"model.layers.{layer}.self_attn.{part}.weight"
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield f"model.layers.{layer}.mlp.{part}.weight"
        yield f"model.layers.{layer}.input_layernorm.weight"
        yield f"model.layers.{layer}.post_attention_layernorm.weight"
    yield "model.norm.weight"


def _shape(name: str, shape: Shape) -> tuple[int, ...]:
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (shape.vocabulary_tokens, shape.hidden),
        "q_proj": (queries, shape.hidden),
        "k_proj": (keys, shape.hidden),
        "v_proj": (keys, shape.hidden),
        "o_proj": (shape.hidden, queries),
        "q_norm": (shape.head_width,),
        "k_norm": (shape.head_width,),
        "gate_proj": (shape.feed_forward, shape.hidden),
        "up_proj": (shape.feed_forward, shape.hidden),
        "down_proj": (shape.hidden, shape.feed_forward),
    }
    return sizes.get(name.split(".")[-2], (shape.hidden,))


if __name__ == "__main__":
    conversion()
