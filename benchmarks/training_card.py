"""Training on a small card, beside plain QLoRA with TRL and PEFT: `python -m benchmarks.training_card FOLDER`.

Models of real shape with random weights, on the first NVIDIA card, whose allocator is capped to what a small card has free.
Of each run the card's memory as the driver counts it (context included), and the seconds a step. One that runs out of memory
is a result too. A 7B base takes 15 GB of disk and of memory.
"""

import dataclasses
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from appliance import config, gpu
from appliance.console import Command, emit, human_bytes, json_option, note
from appliance.errors import ApplianceError, EnvironmentIncomplete
from benchmarks import about, timed, training_rows

GIB = 1 << 30
SAMPLE_SECONDS = 0.02
STEPS, ACCUMULATE = 4, 1
# The command that follows, with its allocator capped to so many bytes of the first card.
CAPPED = """
import runpy, sys
import torch
torch.cuda.set_per_process_memory_fraction(int(sys.argv[1]) / torch.cuda.mem_get_info(0)[1])
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False) if sys.argv[0] == "appliance" else exec(sys.argv.pop(0))
"""
PLAIN = """
import json, sys, time
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_training_chat_template

phase, base, rows, out, tokens = sys.argv
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.chat_template = qwen3_training_chat_template
four_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
common = dict(output_dir=out, num_train_epochs=1, per_device_train_batch_size=1, max_length=int(tokens))
common |= dict(save_strategy="no", report_to="none", logging_steps=1, model_init_kwargs={"quantization_config": four_bits})
config, trainer = (SFTConfig, SFTTrainer) if phase == "sft" else (DPOConfig, DPOTrainer)
seconds = []
class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__): self.at = time.monotonic()
    def on_step_end(self, *_, **__): seconds.append(time.monotonic() - self.at)
made = trainer(
    model=base, args=config(**common), processing_class=tokenizer, callbacks=[Clock()],
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
made.train()
print(json.dumps({"seconds": seconds}))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A base and what is learned on it, on a card of which so much may be used, context included."""

    base: str
    phase: str
    tokens: int
    cap_bytes: int


CASES: Sequence[Case] = (
    Case("4B", "sft", 1024, int(3.4 * GIB)),
    Case("4B", "dpo", 1024, int(3.4 * GIB)),
    Case("Qwen2.5-7B", "sft", 2048, int(5.5 * GIB)),
)
CONTEXT_BYTES = int(0.45 * GIB)  # is outside of torch's allocator


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One training; `failure` is the last line of one that ended before its time."""

    case: Case
    side: str
    card_bytes: int
    step_seconds: float | None
    failure: str | None = None


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True)
@json_option
def training_card(folder: Path, rounds: int, as_json: bool) -> None:
    """Train in FOLDER on a capped card, ours streamed and plain QLoRA in turn."""
    found = [card for card in gpu.gpus() if card.vendor == "nvidia"]
    if not found:
        raise EnvironmentIncomplete("No NVIDIA card was found here; benchmarks.training_memory measures on a CPU.")
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for _ in range(rounds):
        for case in CASES:
            base = training_rows.base(folder.resolve(), case.base)
            for side in ("ours, streamed", "ours, auto", "plain QLoRA"):
                runs.append(measure(case, side, base, folder.resolve() / "work"))
                said = human_bytes(runs[-1].card_bytes), runs[-1].failure or f"{runs[-1].step_seconds:.2f} s a step"
                note(f"training card: {case.base} {case.phase}, {side}: {', '.join(said)}")
    result = {
        "card": str(found[0]),
        **about.machine(),
        **about.versions(about.TRAINING),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    emit(result, as_json, "\n".join(table(runs)))


def measure(case: Case, side: str, base: Path, work: Path) -> Run:
    """Trains once; a card that is too small is a result."""
    shutil.rmtree(work, ignore_errors=True)
    recipe = training_rows.write_recipe(work, base, case.phase, (1, case.tokens), STEPS, ACCUMULATE)
    environment = {**config.quiet_environment(), "APPLIANCE_ARTIFACTS": str(work / "artifacts"), "CUDA_VISIBLE_DEVICES": "0"}
    rung = "streamed" if side == "ours, streamed" else "auto"
    sets = training_rows.flags([f"memory.rung={rung}"])
    capped = [sys.executable, "-c", CAPPED, str(case.cap_bytes - CONTEXT_BYTES)]
    answer = work / "answer.json"
    if side != "plain QLoRA":
        if case.phase == "dpo":
            training_rows.answer(environment, "train", recipe, "--phase", "sft", *sets)
        command = [*capped, "appliance", "train", str(recipe), "--phase", case.phase, *sets, "--json"]
    else:
        rows = recipe.parent / f"{case.phase}.jsonl"
        command = [*capped, PLAIN, case.phase, str(base), str(rows), str(work / "plain"), str(case.tokens)]
    with _card_memory() as most:
        try:
            timed.run(command, environment, answer)
        except ApplianceError as error:
            return Run(case, side, most[0], None, str(error).strip().splitlines()[-1])
    return Run(case, side, most[0], statistics.median(_seconds(answer, side)[1:]))


def _seconds(answer: Path, side: str) -> list[float]:
    said = json.loads(answer.read_text().splitlines()[-1])
    if side == "plain QLoRA":
        return list(said["seconds"])
    curve = Path(said["artifact"]) / "loss.jsonl"
    return [json.loads(line)["seconds"] for line in curve.read_text().splitlines()]


@contextmanager
def _card_memory() -> Iterator[list[int]]:
    """The most that is taken of the first card meanwhile, above what was taken before."""
    before, most, ended = gpu.gpus()[0].memory_used_bytes, [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], gpu.gpus()[0].memory_used_bytes - before)
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def table(runs: Sequence[Run]) -> list[str]:
    lines = ["| Base | Phase | Tokens | May use | | Used | A step |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        case, step = run.case, run.failure or f"{run.step_seconds:.2f} s"
        what = f"{case.base} | {case.phase} | {case.tokens} | {human_bytes(case.cap_bytes)}"
        lines.append(f"| {what} | {run.side} | {human_bytes(run.card_bytes)} | {step} |")
    return lines


if __name__ == "__main__":
    training_card()
