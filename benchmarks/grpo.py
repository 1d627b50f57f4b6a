"""Whether GRPO raises its rewards: `python -m benchmarks.grpo FOLDER [--reviews FILE]`.

A starter model learns to write sentences of hotel reviews from aspects and a polarity; a small classifier of sentiment is
trained on the spot and exported with `appliance convert onnx`; then the model's own sentences are judged by TF-IDF
similarity to the reference and by that classifier, under several seeds. It ends with 4 unless the mean reward of the last
fifth of the steps exceeds that of the first by two standard errors. Without --reviews the sentences are made up here.
"""

import json
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from appliance import config
from appliance.console import Command, emit, json_option, note
from appliance.data import formats
from appliance.errors import DataError, StepFailed
from appliance.training import curve
from benchmarks import about, sentiment

ERRORS_WANTED = 2.0
COLUMNS = {"prompt": "aspects", "reference": "text"}  # of lines with labels
SHORTEST, LONGEST = 20, 90  # characters of a sentence
# A small starter that has seen each sentence a few times: it writes German, and has much to learn.
RECIPE = """
name = "reviews"
base = "starter"
languages = ["de"]
phases = ["sft", "grpo"]

[data]
sft = "sft.jsonl"
grpo = "grpo.jsonl"

[starter]
vocabulary_tokens = 2048
layers = 4
hidden = 192
feed_forward = 512
heads = 3
kv_heads = 1
context_tokens = 192
row_tokens = 128
epochs = 10

[sft]
epochs = 4
learning_rate = 1e-3
batch_rows = 16
accumulate = 1
max_tokens = 128

[grpo]
epochs = 2
learning_rate = 5e-4
batch_rows = 32
answers = 8
answer_tokens = 32
max_tokens = 128
beta = 0.01

[grpo.rewards.tfidf_similarity]

[grpo.rewards.sentiment_match]
encoder = {encoder}
"""
PARTS: Mapping[str, Sequence[str]] = {
    "HOTEL": ("Das Hotel", "Die Anlage", "Das ganze Haus", "Der Empfang im Hotel"),
    "ZIMMER": ("Das Zimmer", "Unser Zimmer", "Das Bad im Zimmer", "Das Bett"),
    "LAGE": ("Die Lage", "Die Lage am See", "Der Weg zum Bahnhof", "Die Umgebung"),
    "SERVICE": ("Das Personal", "Der Service", "Die Bedienung", "Der Herr am Empfang"),
    "ESSEN": ("Das Frühstück", "Das Essen", "Das Abendessen", "Der Kaffee"),
}
JUDGEMENTS: Mapping[str, Sequence[str]] = {
    "positiv": ("war sehr gut", "hat uns gefallen", "war wunderbar", "können wir empfehlen", "war besser als erwartet"),
    "negativ": ("war leider schlecht", "war eine Enttäuschung", "war schmutzig", "war viel zu teuer", "nie wieder"),
    "neutral": ("war in Ordnung", "war wie erwartet", "war mittelmäßig", "war nichts Besonderes", "geht so"),
}
ADDED = ("", ", wirklich", ", fanden wir alle", " und das jeden Tag", ", auch am Wochenende", ", wie im letzten Jahr")


@dataclass(frozen=True, slots=True)
class Review:
    aspects: str
    polarity: str
    text: str

    @property
    def prompt(self) -> str:
        return f"{self.aspects}: {self.polarity}"


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--reviews", type=click.Path(path_type=Path), help="Lines of `__label__ASPECT:polarity<TAB>text`.")
@click.option("--rows", type=click.IntRange(min=40), default=400, show_default=True, help="Sentences to train on.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@json_option
def grpo(folder: Path, reviews: Path | None, rows: int, seeds: int, as_json: bool) -> None:
    """Train by GRPO in FOLDER under several seeds, and compare the rewards of the first steps with those of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["APPLIANCE_ARTIFACTS"] = str(folder.resolve() / "artifacts")
    config.apply_quiet_environment()
    every = read(reviews) if reviews else made_up()
    accuracy = sentiment.train(folder / "sentiment", [(each.text, each.polarity) for each in every])
    note(f"sentiment: {accuracy:.1%} of sentences that it was not trained on are judged as their label says")
    encoder = run("convert", "onnx", folder / "sentiment", "--name", "sentiment")["artifact"]
    recipe = write(folder, balanced(every, rows), encoder)
    base, adapter = (run("train", recipe, "--phase", phase)["artifact"] for phase in ("base", "sft"))
    curves = []
    for seed in range(1, seeds + 1):
        sets = [f"base={base}", f"grpo.adapter={adapter}", f"seed={seed}"]
        made = run("train", recipe, "--phase", "grpo", *(part for each in sets for part in ("--set", each)))
        curves.append([json.loads(line) for line in (Path(made["artifact"]) / "loss.jsonl").read_text().splitlines()])
    figures = compare(curves)
    text = "\n".join(f"{name:34} {value:.4f}" for name, value in figures.items())
    result = {"machine": about.machine(), "load": about.load(), "sentiment_accuracy": accuracy, "figures": figures}
    emit(result, as_json, text)
    if figures["reward errors"] < ERRORS_WANTED:
        sys.exit(4)


def read(path: Path) -> list[Review]:
    """Sentences whose labels agree on one polarity."""
    rows = formats.examine(path, "grpo", COLUMNS).rows([])
    every = [Review(row["prompt"][0]["content"], row["columns"]["polarities"], row["reference"]) for row in rows]
    if not (
        found := [
            each for each in every if each.polarity and "," not in each.polarity and SHORTEST <= len(each.text) <= LONGEST
        ]
    ):
        raise DataError(f"{path} has no line of the form __label__ASPECT:polarity<TAB>text.")
    return found


def made_up() -> list[Review]:
    return [
        Review(aspect, polarity, f"{subject} {judgement}{added}.")
        for aspect, subjects in PARTS.items()
        for polarity, judgements in JUDGEMENTS.items()
        for subject in subjects
        for judgement in judgements
        for added in ADDED
    ]


def balanced(reviews: Sequence[Review], rows: int) -> list[Review]:
    """So many of them, as many of each polarity as there are: or the commonest would always be right."""
    shuffled = random.Random(11).sample(list(reviews), len(reviews))
    quota = {name: min(count, rows // 3 + 1) for name, count in Counter(each.polarity for each in reviews).items()}
    kept: list[Review] = []
    for each in shuffled:
        if quota[each.polarity] and len(kept) < rows:
            quota[each.polarity] -= 1
            kept.append(each)
    return kept


def write(folder: Path, reviews: Sequence[Review], encoder: str) -> Path:
    """The recipe with its files."""
    sft = [
        {"messages": [{"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.text}]}
        for each in reviews
    ]
    grpo = [{"prompt": each.prompt, "reference": each.text, "sentiment": each.polarity} for each in reviews]
    write_lines(folder / "sft.jsonl", sft)
    write_lines(folder / "grpo.jsonl", grpo)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(encoder=json.dumps(str(encoder))), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(*arguments: str | Path) -> dict[str, Any]:
    """Runs `appliance ARGUMENTS --json`; raises `StepFailed` where it fails."""
    command = [sys.executable, "-m", "appliance", *map(str, arguments), "--json"]
    note(f"appliance {' '.join(map(str, arguments))}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise StepFailed(f"`appliance {arguments[0]} {arguments[1]}` failed (exit {done.returncode}).", done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(curves: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Means of the first and the last fifth of the steps, for each reward and the sum, over all seeds.

    `errors` is their difference in standard errors, the steps of all seeds taken together.
    """
    figures: dict[str, float] = {"seeds": len(curves), "steps": len(curves[0])}
    names = [key for key in curves[0][0] if key == "reward" or (key.startswith("rewards/") and key.endswith("/mean"))]
    for key in sorted(names):
        name = key.removeprefix("rewards/").removesuffix("/mean")
        parts = [[[point[key] for point in part] for part in curve.fifths(each)] for each in curves]
        first, last = [value for each, _ in parts for value in each], [value for _, each in parts for value in each]
        error = (statistics.variance(first) / len(first) + statistics.variance(last) / len(last)) ** 0.5
        means = (statistics.fmean(first), statistics.fmean(last))
        figures |= {f"{name} first": means[0], f"{name} last": means[1], f"{name} errors": (means[1] - means[0]) / error}
        if key == "reward":
            gains = [statistics.fmean(late) - statistics.fmean(early) for early, late in parts]
            figures |= {f"{name} gain, seed {seed}": gain for seed, gain in enumerate(gains, 1)}
    figures["groups without spread"] = statistics.fmean(point["frac_reward_zero_std"] for each in curves for point in each)
    return figures


if __name__ == "__main__":
    grpo()
