"""What reading documents by themselves costs in answers: `python -m benchmarks.passages FOLDER [--base MODEL] [--seeds 3]`.

A small model is trained here, from scratch and with full attention, to answer questions over the documents of a made-up town
(`passages_world`), or one of yours is taken. It is fine-tuned by the phase `sft`, and then by the phase `passages`. Each is
asked the same questions, whose combinations no training had: with full attention, with documents that each see themselves
alone, and without any. Some are asked once more of the files that are served, with `serve.documents` exact and stitched. It
ends with 4 where those disagree with the model in training about more answers than rounding can explain.
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, bases, config
from appliance.console import Command, emit, json_option, note
from appliance.training import loop, starter
from benchmarks import about, passages_reader, passages_served, passages_world
from benchmarks.grpo import run, write_lines
from benchmarks.passages_exam import Asked, Examined, Reading
from benchmarks.passages_world import KINDS, Kind, Question, Scene, Town

PLACES, PEOPLE = 4, 2  # of a scene that is asked about: six documents
DISAGREE = 0.02  # of the served answers, at most
CONFIDENCE = 0.95
PHASES = ("sft", "passages")
LEARNED = ("kl_before", "kl_after", "kl_exact", "is_taken_back")  # results of the phase
RECIPE = """
name = "town"
base = {base}
seed = {seed}
phases = ["sft", "passages"]

[data]
sft = "sft.jsonl"

[sft]
epochs = 1
learning_rate = 1e-4
batch_rows = 16
accumulate = 1
max_tokens = 512

[passages]
batch_rows = 16
accumulate = 1
max_tokens = 512
"""


@dataclass(frozen=True, slots=True)
class Arm:
    """A line of the table: which model, by the phase it was trained to, and how it reads."""

    title: str
    phase: str
    reading: Reading


ARMS = (
    Arm("full attention", "sft", "full"),
    Arm("each document by itself, untrained for it", "sft", "blocks"),
    Arm("each document by itself, after `passages`", "passages", "blocks"),
    Arm("full attention, after `passages`", "passages", "full"),
    Arm("no documents", "sft", "none"),
)
EXACT, UNTRAINED, TRAINED, KEPT, _ = (arm.title for arm in ARMS)
DIFFERENCES = ((UNTRAINED, EXACT), (TRAINED, EXACT), (TRAINED, UNTRAINED), (KEPT, EXACT))


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--base", help="A model folder, or an id that was pulled. [default: one is trained here for each seed]")
@click.option("--seeds", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--questions", type=click.IntRange(min=10), default=300, show_default=True, help="Of each kind, for a seed.")
@click.option("--rows", type=click.IntRange(min=16), default=1600, show_default=True, help="That the phases are trained on.")
@click.option(
    "--served", type=click.IntRange(min=0), default=100, show_default=True, help="Questions asked of a server, too."
)
@click.option("--steps", type=click.IntRange(min=1), default=passages_reader.Schooling().steps, show_default=True)
@json_option
def passages(
    folder: Path, base: str | None, seeds: int, questions: int, rows: int, served: int, steps: int, as_json: bool
) -> None:
    """Train and ask in FOLDER under several seeds; writes passages.json and passages.md there."""
    given = bases.locate(base, config.artifacts_root()).resolve() if base else None
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["APPLIANCE_ARTIFACTS"] = str(folder.resolve() / "artifacts")
    config.apply_quiet_environment()
    loop.prepare()
    began = time.monotonic()
    found = []
    for seed in range(1, seeds + 1):
        place, town = folder / f"seed-{seed}", Town(seed)
        place.mkdir(exist_ok=True)
        taught = given or _school(place / "base", town, seed, steps)
        found.append(_one_seed(place, taught, town, seed, questions, rows, served))
    head = {
        "command": about.command(),
        "date": about.now(),
        **about.machine(),
        **about.versions((*about.TRAINING, *about.SERVING)),
        "load": about.load(),
    }
    result = {"head": head, "seconds": time.monotonic() - began, "seeds": found, "summary": summary(found)}
    (folder / "passages.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = markdown(result)
    (folder / "passages.md").write_text(text, encoding="utf-8")
    emit(result, as_json, text)
    if any(each["differ"] > DISAGREE * each["questions"] for seed in found for each in seed["served"]):
        sys.exit(4)


def _school(folder: Path, town: Town, seed: int, steps: int) -> Path:
    """A base of this seed; it is made anew even where it is on disk."""
    began = time.monotonic()
    starter.save(*passages_reader.school(town, seed, passages_reader.Schooling(steps=steps)), folder)
    note(f"seed {seed}: a base that reads was trained in {time.monotonic() - began:.0f} s")
    return folder


def _one_seed(folder: Path, base: Path, town: Town, seed: int, questions: int, rows: int, served: int) -> dict[str, Any]:
    """Trains both phases, and asks. What is on disk already is not trained again."""
    began = time.monotonic()
    recipe = write(folder, base, town, seed, rows)
    adapters = {
        phase: artifacts.load(Path(run("train", recipe, "--phase", phase, "--resume")["artifact"])) for phase in PHASES
    }
    merged = {phase: _merged(adapter.path, base, f"{folder.name}-{phase}") for phase, adapter in adapters.items()}
    phase_seconds = time.monotonic() - began
    asked = {kind: draw(town, seed, kind, questions) for kind in KINDS}
    models = {phase: Examined(path) for phase, path in merged.items()}
    scores = {
        arm.title: {kind: statistics.fmean(models[arm.phase].right(asked[kind], arm.reading)) for kind in KINDS}
        for arm in ARMS
    }
    for title, score in scores.items():
        note(f"seed {seed}: {title}: " + ", ".join(f"{kind} {value:.1%}" for kind, value in score.items()))
    chosen = list(itertools.chain(*zip(*asked.values(), strict=True)))[:served]
    return {
        "seed": seed,
        "parameters": models["sft"].parameters,
        "questions": {kind: len(each) for kind, each in asked.items()},
        "chance": {kind: statistics.fmean(guessed(*each) for each in asked[kind]) for kind in KINDS},
        "scores": scores,
        "passages": {name: adapters["passages"].results[name] for name in LEARNED},
        "served": [each for phase in PHASES for each in _served(folder, merged[phase], phase, models[phase], chosen)],
        "seconds": {"phases": phase_seconds, "all": time.monotonic() - began},
    }


def write(folder: Path, base: Path, town: Town, seed: int, rows: int) -> Path:
    """The recipe of both phases, with rows of combinations that are not held back."""
    chance = random.Random(f"rows {seed}")
    written: list[Any] = []
    while len(written) < rows:
        scene, asked = town.trained_scene(chance, PLACES, PEOPLE)
        # All kinds alike, though most of what can be asked needs one document.
        of_kind = [question for question in asked if question.kind == KINDS[len(written) % len(KINDS)]]
        written += [passages_world.row(scene, question) for question in of_kind[:1]]
    write_lines(folder / "sft.jsonl", written)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(base=json.dumps(str(base.resolve())), seed=seed), encoding="utf-8")
    return path


def draw(town: Town, seed: int, kind: Kind, count: int) -> list[tuple[Scene, Question]]:
    """Of combinations that are held back; each scene is asked about once."""
    chance = random.Random(f"questions {seed} {kind}")
    return list(itertools.islice(town.held_back_questions(chance, kind, PLACES, PEOPLE), count))


def guessed(scene: Scene, question: Question) -> float:
    """How often someone is right who knows what kind of thing is asked for, and picks one of those in the documents."""
    told = {known[question.attribute] for known in scene.facts.values() if question.attribute in known}
    return 1 / 2 if question.kind == "comparison" else 1 / len(told)


def _merged(adapter: Path, base: Path, name: str) -> Path:
    return Path(run("convert", "merge", adapter, "--base", base, "--name", name)["artifact"])


def _served(folder: Path, merged: Path, phase: str, model: Examined, asked: Asked) -> list[dict[str, Any]]:
    """What a server of the same weights answers, beside what the model in training did."""
    if not asked:
        return []
    file = Path(run("convert", "gguf", merged, "--name", merged.name)["file"])
    found = []
    readings: Mapping[str, Reading] = {"exact": "full", "stitched": "blocks"}
    for documents, reading in readings.items():
        told = asyncio.run(passages_served.answers(file, folder, documents, asked))
        expected = model.answers(asked, reading)
        differ = sum(one != other for one, other in zip(told, expected, strict=True))
        right = statistics.fmean(text == question.answer for text, (_, question) in zip(told, asked, strict=True))
        found.append({"phase": phase, "documents": documents, "questions": len(asked), "right": right, "differ": differ})
        note(f"served, {phase}, documents = {documents}: {right:.1%} right, {differ} of {len(asked)} answers differ")
    return found


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By kind: of each arm and of differences within a seed the mean, its interval, and the values."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        of = {arm.title: [seed["scores"][arm.title][kind] for seed in seeds] for arm in ARMS}
        for one, other in DIFFERENCES:
            of[f"{one}, less {other}"] = [a - b for a, b in zip(of[one], of[other], strict=True)]
        found[kind] = {title: {"values": values, **interval(values)} for title, values in of.items()}
    return found


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over seeds, and half the width of its interval by Student's t; seeds are what varies, not questions."""
    from scipy.stats import t

    error = statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "half_width": float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error}


def markdown(result: Mapping[str, Any]) -> str:
    """The same for a person, in per cent of the questions."""
    seeds = result["seeds"]
    lines = ["# Documents read by themselves: what it costs in answers", ""]
    lines += [f"- {key}: {value}" for key, value in result["head"].items()]
    counts = ", ".join(f"{count} of {kind}" for kind, count in seeds[0]["questions"].items())
    lines += [f"- {len(seeds)} seeds, each {counts}; {seeds[0]['parameters']:,} parameters; {result['seconds']:.0f} s", ""]
    lines += [f"Exact answers in %: mean over seeds ± {CONFIDENCE:.0%} interval by Student's t (each seed).", ""]
    lines += [f"| | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for title in result["summary"][KINDS[0]]:
        lines.append(f"| {title} | {' | '.join(_cell(result['summary'][kind][title]) for kind in KINDS)} |")
    chances = [statistics.fmean(seed["chance"][kind] for seed in seeds) for kind in KINDS]
    lines.append(f"| a guess among what the documents name | {' | '.join(f'{100 * each:.1f}' for each in chances)} |")
    lines += ["", "| the phase `passages`, nats a token | seed | before | after | ordinary reading, after | taken back |"]
    lines.append("|---" * 6 + "|")
    for seed in seeds:
        kl = " | ".join(f"{seed['passages'][name]:.5f}" for name in LEARNED[:3])
        lines.append(f"| | {seed['seed']} | {kl} | {'yes' if seed['passages']['is_taken_back'] else 'no'} |")
    lines += ["", "| served | seed | right | answers that differ from those in training |", "|---|---|---|---|"]
    for seed in seeds:
        for each in seed["served"]:
            what = f'after `{each["phase"]}`, `documents = "{each["documents"]}"`'
            lines.append(
                f"| {what} | {seed['seed']} | {100 * each['right']:.1f} % | {each['differ']} of {each['questions']} |"
            )
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any]) -> str:
    values = ", ".join(f"{100 * value:.1f}" for value in found["values"])
    return f"{100 * found['mean']:.1f} ± {100 * found['half_width']:.1f} ({values})"


if __name__ == "__main__":
    passages()
