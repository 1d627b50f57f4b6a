"""Conversations of wanted lengths, and a recipe that trains on them: what the training benchmarks have in common."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.console import note
from appliance.errors import StepFailed
from benchmarks import checkpoints

RECIPE = """
name = "measured"
base = {base}
languages = ["en"]
phases = {phases}

[data]
sft = "sft.jsonl"
{more}
[lora]
rank = 16
alpha = 32
dropout = 0.0

[{phase}]
epochs = 1
batch_rows = {rows}
accumulate = {accumulate}
max_tokens = {tokens}
checkpoint_steps = 1000
"""
SHORTEST = 0.6  # of the longest row, which is there too
ANSWER = 0.5  # of a row's words are the assistant's
TOKENS_AROUND = 40  # of the template, Llama 3.2's date with it, and what a word may take more than one


def base(folder: Path, name: str) -> Path:
    """A checkpoint of random weights by its name, made unless it is there."""
    path = folder / name
    if not (path / "tokenizer.json").is_file():
        note(f"training: writing a random {name} to {path}")
        if name in checkpoints.OTHERS:
            checkpoints.write_other(path, name)
        else:
            checkpoints.write_model(path, checkpoints.QWEN3[name])
    return path


def conversations(count: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of plain words, each of them a token, of up to `tokens` tokens with their template; the first is the longest."""
    chance = random.Random(5)
    for row in range(count):
        words = int((tokens - TOKENS_AROUND) * (1 if row == 0 else chance.uniform(SHORTEST, 1)))
        answer = int(words * ANSWER)
        yield {
            "messages": [
                {"role": "user", "content": _words(chance, words - answer)},
                {"role": "assistant", "content": _words(chance, answer)},
            ]
        }


def preferences(count: int, tokens: int) -> Iterator[dict[str, Any]]:
    """The same with an answer that is worse."""
    chance = random.Random(6)
    for row in conversations(count, tokens):
        prompt, chosen = row["messages"]
        rejected = {"role": "assistant", "content": _words(chance, len(chosen["content"].split()))}
        yield {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]}


def write_recipe(folder: Path, base: Path, phase: str, shape: tuple[int, int], count: int, accumulate: int = 2) -> Path:
    """`shape` is of a micro-batch: rows, and tokens of the longest row; `count` rows are trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, tokens = shape
    phases, more = [phase], ""
    write_lines(folder / "sft.jsonl", conversations(count, tokens))
    if phase == "dpo":
        phases, more = ["sft", "dpo"], 'dpo = "dpo.jsonl"\n\n[sft]\nepochs = 1\n'
        write_lines(folder / "dpo.jsonl", preferences(count, tokens))
    path = folder / "recipe.toml"
    path.write_text(
        RECIPE.format(
            base=json.dumps(str(base)),
            phases=json.dumps(phases),
            more=more,
            phase=phase,
            rows=rows,
            tokens=tokens,
            accumulate=accumulate,
        ),
        encoding="utf-8",
    )
    return path


def tokens(base: Path, row: Mapping[str, Any]) -> int:
    """Of a conversation with its template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"])


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def appliance(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "appliance", *map(str, arguments), "--json"]


def answer(environment: Mapping[str, str], *arguments: str | Path) -> dict[str, Any]:
    """What `appliance ARGUMENTS --json` says; raises `StepFailed` where it fails."""
    done = subprocess.run(appliance(*arguments), env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepFailed(f"`appliance {arguments[0]}` failed: {done.stderr[-2000:]}", done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def flags(sets: Sequence[str]) -> list[str]:
    return [part for each in sets for part in ("--set", each)]


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(WORDS, k=max(1, count)))


WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they", "at"),
    *("be", "this", "have", "from", "or", "one", "had", "by", "word", "but", "not"),
)
