"""Our SFT beside the plainest script with TRL, on this CPU: `python -m benchmarks.training_speed FOLDER`.

A model of real shape with random weights learns the same rows under the same settings: each in turn, several rounds.
Compared are tokens a second of the training loop, and the most memory: anonymous, and what is mapped of the base.
"""

import dataclasses
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from appliance import allocator, config
from appliance.console import Command, emit, human_bytes, json_option, note
from benchmarks import about, checkpoints, timed, training_rows

ROWS, ACCUMULATE, TOKENS, COUNT = 2, 2, 512, 16
PLAIN, RECOMPUTED, FASTEST = "plain TRL", "ours, recomputed", "ours"
RUNGS = {RECOMPUTED: "lora-recomputed", FASTEST: "auto"}
# What a person writes who has read TRL's page on SFT; Qwen3's template with markers is TRL's own.
SCRIPT = """
import json, sys
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_training_chat_template

base, rows, out, batch, accumulate, tokens = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.chat_template = qwen3_training_chat_template
trainer = SFTTrainer(
    model=base,
    args=SFTConfig(
        output_dir=out,
        num_train_epochs=1,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=int(accumulate),
        max_length=int(tokens),
        assistant_only_loss=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=True,
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
metrics = trainer.train().metrics
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print(json.dumps({"seconds": metrics["train_runtime"], "losses": losses}))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One training: of its loop the seconds, of its process the most memory."""

    seconds: float
    held_bytes: int
    first_loss: float


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--base", "name", type=click.Choice(list(checkpoints.QWEN3)), default="0.6B", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@json_option
def training_speed(folder: Path, name: str, rounds: int, as_json: bool) -> None:
    """Train in FOLDER, by the plain script and by ours, in turn."""
    base = training_rows.base(folder.resolve(), name)
    recipe = training_rows.write_recipe(folder / "work", base, "sft", (ROWS, TOKENS), COUNT, ACCUMULATE)
    runs: dict[str, list[Run]] = {PLAIN: [], RECOMPUTED: [], FASTEST: []}
    for turn in range(1, rounds + 1):
        for side, found in runs.items():
            found.append(plain(base, recipe.parent) if side == PLAIN else ours(recipe, RUNGS[side]))
            note(f"training speed: {turn}/{rounds} {side}: {found[-1].seconds:.1f} s, {human_bytes(found[-1].held_bytes)}")
    tokens = sum(training_rows.tokens(base, row) for row in training_rows.conversations(COUNT, TOKENS))
    figures = {side: [dataclasses.asdict(run) for run in found] for side, found in runs.items()}
    result = {**about.machine(), **about.versions(about.TRAINING), "load": about.load(), "tokens": tokens, "runs": figures}
    emit(result, as_json, "\n".join(table(runs, tokens)))


def plain(base: Path, work: Path) -> Run:
    out = work / "plain"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", SCRIPT, str(base), str(work / "sft.jsonl"), str(out)]
    answer = work / "answer.json"
    done = timed.run([*command, *map(str, (ROWS, ACCUMULATE, TOKENS))], {}, answer)
    said = json.loads(answer.read_text().splitlines()[-1])
    return Run(said["seconds"], done.held_bytes, said["losses"][0])


def ours(recipe: Path, rung: str) -> Run:
    """As `make train` starts it."""
    root = recipe.parent / "artifacts"
    shutil.rmtree(root, ignore_errors=True)
    environment = {**allocator.preloaded(config.quiet_environment()), "APPLIANCE_ARTIFACTS": str(root)}
    sets = training_rows.flags([f"memory.rung={rung}"])
    answer = recipe.parent / "answer.json"
    done = timed.run(training_rows.appliance("train", recipe, "--phase", "sft", *sets), environment, answer)
    curve = Path(json.loads(answer.read_text())["artifact"]) / "loss.jsonl"
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines)
    return Run(seconds, done.held_bytes, lines[0]["loss"])


def table(runs: Mapping[str, Sequence[Run]], tokens: int) -> list[str]:
    """Medians; ratios are of the same round, ours to the plain script's."""
    lines = ["| | Tokens/s | to plain | Most memory | to plain |", "|---|---|---|---|---|"]
    for side, found in runs.items():
        speeds = [other.seconds / run.seconds for run, other in zip(found, runs[PLAIN], strict=True)]
        sizes = [run.held_bytes / other.held_bytes for run, other in zip(found, runs[PLAIN], strict=True)]
        seconds = statistics.median(run.seconds for run in found)
        held = human_bytes(int(statistics.median(run.held_bytes for run in found)))
        spread = f"{min(speeds):.2f}–{max(speeds):.2f}"
        size = statistics.median(sizes)
        speed = statistics.median(speeds)
        lines.append(f"| {side} | {tokens / seconds:.1f} | {speed:.2f} ({spread}) | {held} | {size:.2f} |")
    losses = ", ".join(f"{side} {found[0].first_loss:.3f}" for side, found in runs.items())
    return [*lines, "", f"Loss of the first step: {losses}. Load: {os.getloadavg()[0]:.1f}."]


if __name__ == "__main__":
    training_speed()
