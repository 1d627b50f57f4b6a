"""What an adapter's folder holds for people: `run.html`, a model card (`README.md`), and the lock file. Entry: `write`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts, config
from appliance.artifacts import Draft, Plan
from appliance.data import audit
from appliance.findings import Finding
from appliance.page import Found, Part, Sample, Section, Table, curves, html
from appliance.recipe import Recipe
from appliance.training import curve, diagnose, lock, processes, samples
from appliance.training.curve import Point
from appliance.training.model import Base
from appliance.training_settings import PREFERENCES

REPORT, CARD = "run.html", "README.md"
REWARD_FINDINGS = "reward_findings.json"
VERIFIED = {
    "sft": "Before the first step every label was held against the messages, as token ids: only answers are learned.",
    **dict.fromkeys(PREFERENCES, "Preferences were scored before and after training; both figures are in `manifest.json`."),
    "grpo": "The rewards were tried before the first step, on references and on the model's own answers"
    f" (`{REWARD_FINDINGS}`).",
    "passages": "How far answers are from those of the adapter before, documents read apart and in their place, was"
    " measured before and after; the figures are in `manifest.json`.",
}
NOTHING = "Nothing stands out: no spike, no divergence, no sign of overfitting."
NOTHING_OF_REWARDS = "Nothing stands out: completions of a group differ in reward, and it rose, or the run is too short."
MANY_STEPS = 50  # whose noise hides where a curve goes
PART = 5  # of a curve of rewards the first and the last fifth are compared: single steps say little
REWARD_MEAN = re.compile(r"rewards/[^/]+/mean")  # as TRL logs each reward of GRPO
# Figures of `loss.jsonl` in one chart each, by the y axis; those of a phase that has none are left out.
CHARTS: Mapping[str, Sequence[str]] = {
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "reward": ("reward", "rewards/margins", "rewards/chosen", "rewards/rejected"),
    "accuracy": ("mean_token_accuracy", "rewards/accuracies", "top1"),
    "divergence": ("divergence",),
    "tokens a second": ("tokens_per_second",),
}


def write(draft: Draft, identity: Plan, recipe: Recipe, phase: str, dataset: Path, base: Base) -> None:
    """Writes all three, from the first process; the weights, the curve, the samples and the results are there already."""
    if not processes.is_first():
        return
    folder = draft.path
    contents = lock.describe(recipe, identity, phase, folder, dataset, base.path)
    lock.write(folder, contents)
    report = audit.last_of(artifacts.identity(dataset), config.artifacts_root())
    said = in_brief(audit.read_findings(report) if report else None)
    data = artifacts.load(dataset).results
    (folder / CARD).write_text(card(folder, contents, draft.results, data, said), encoding="utf-8")
    title = contents["artifact"].partition("/")[2]
    (folder / REPORT).write_text(page(folder, title, contents, draft.results), encoding="utf-8")


def page(folder: Path, title: str, locked: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The report of one run as HTML."""
    points = curve.read(folder)
    findings = diagnose.diagnose(points)
    said: list[Part] = [*map(Found, findings)] if findings else [nothing(points)]
    words: list[Part] = [in_words(points), *said]
    figures: list[Sequence[str | int | float]] = [
        (name, value if isinstance(value, int) else float(f"{value:.4g}"))
        for name, value in results.items()
        if _is_number(value)
    ]
    tried = [Found(finding) for finding in reward_findings(folder)]
    sections = [
        Section("What the curve says", words),
        *([Section("What was said of the rewards before the first step", tried)] if tried else []),
        Section("Curves", charts(folder, findings)),
        Section("Answers before and after", _samples(folder)),
        *([Section("What is learned of a row", learned)] if (learned := _learned(folder)) else []),
        Section("Results", [Table(("figure", "value"), figures)]),
        Section("Settings", [Table(("setting", "value"), _settings(locked))]),
    ]
    return html(f"Training run {title}", sections)


def charts(folder: Path, findings: Sequence[Finding]) -> list[Part]:
    lines = curve.read_lines(folder)
    marks = sorted({value for each in findings for key, value in each.figures.items() if key in ("step", "began_step")})
    losses = {"training": series(lines, "loss"), "validation": series(lines, "validation_loss")}
    shown = {name: points for name, points in losses.items() if points} | _usual(losses["training"])
    parts: list[Part] = [curves(shown, x="step", y="loss", caption="Loss, by step", marks=marks)]
    by_reward = {key: key.split("/")[1] for key in lines[-1] if REWARD_MEAN.fullmatch(key)} if lines else {}
    if by_reward:
        found = {name: series(lines, key) for key, name in by_reward.items()}
        parts.append(curves(found, x="step", y="reward", caption="Each reward, before its weight, by step"))
    for name, keys in CHARTS.items():
        found = {key: points for key in keys if (points := series(lines, key))}
        found |= _usual(found.get("reward", []))
        if found:
            parts.append(curves(found, x="step", y=name, caption=f"{name.capitalize()}, by step", marks=marks))
    if memory := [(step, size / 2**20) for step, size in series(lines, "memory_bytes")]:
        parts.append(curves({"memory": memory}, x="step", y="MiB", caption="Most memory held so far, by step"))
    return parts


def series(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _usual(points: Sequence[tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
    """A second line through a noisy curve, in which its course can be seen."""
    if len(points) < MANY_STEPS:
        return {}
    width = len(points) // 10
    levels = curve.levels([value for _, value in points], width)
    return {f"median of {width} steps": [(step, level) for (step, _), level in zip(points, levels, strict=True)]}


def reward_findings(folder: Path) -> list[Finding]:
    """What the reward linter said of a run of GRPO."""
    path = folder / REWARD_FINDINGS
    return [Finding(**each) for each in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def nothing(points: Sequence[Point]) -> str:
    """What is said where nothing was found; of GRPO's curve other things are asked."""
    return NOTHING_OF_REWARDS if any(point.reward is not None for point in points) else NOTHING


def in_words(points: Sequence[Point]) -> str:
    """The curve in one or two sentences."""
    if not points:
        return "No step was made yet."
    rewards = [point.reward for point in points if point.reward is not None]
    if rewards:
        fifth = max(1, len(rewards) // PART)
        first, last = (sum(part) / fifth for part in (rewards[:fifth], rewards[-fifth:]))
        return f"In {points[-1].step} steps the mean reward went from {first:.3f} (first fifth) to {last:.3f} (last fifth)."
    losses = [point.loss for point in points]
    tail = losses[-max(1, len(losses) // 20) :]
    said = f"In {points[-1].step} steps the loss went from {losses[0]:.3f} to {sum(tail) / len(tail):.3f}."
    measured = [(point.validation_loss, point.step) for point in points if point.validation_loss is not None]
    if measured:
        best, step = min(measured)
        first, last = measured[0][0], measured[-1][0]
        said += f" On held-out rows it was {first:.3f} first, {best:.3f} at best (step {step}), {last:.3f} last."
    return said


def in_brief(audited: Sequence[Finding] | None) -> str:
    """What an audit said of the data, without the lines that it named: they may be about people."""
    if audited is None:
        return "The data was not audited before; `appliance data audit RECIPE` does it."
    if not audited:
        return "The audit of the data found nothing."
    return "The audit of the data found:\n\n" + "\n".join(f"- {each.level}: {each.what}" for each in audited)


def card(
    folder: Path, locked: Mapping[str, Any], results: Mapping[str, Any], data: Mapping[str, Any], audited: str = ""
) -> str:
    """A model card in Markdown, with the front matter that hubs and tools read; `audited` is `in_brief`'s."""
    recipe, phase = locked["recipe"], locked["phase"]
    base = _without_folders(locked["base"]["name"])
    points = curve.read(folder)
    findings = [f"- {each}" for each in (*diagnose.diagnose(points), *reward_findings(folder))] or [nothing(points)]
    rows = ", ".join(f"{count} {name}" for name, count in data.get("rows", {}).items())
    spoken = ", ".join(f"{code} {count}" for code, count in data.get("languages", {}).items())
    files = [f"| `data.{name}` | `{sha256}` |" for name, sha256 in locked["data"].items()]
    front = ["---", "library_name: peft", f"base_model: {json.dumps(base)}", "language:"]
    front += [*(f"- {code}" for code in recipe["languages"]), "tags:", "- lora", f"- {phase}", "---"]
    settings = [f"| {name} | {value} |" for name, value in _settings(locked)]
    verified = [
        VERIFIED[phase],
        f"`{lock.LOCK}` holds every version, hash and setting; `appliance train --from-lock {lock.LOCK}` repeats the run.",
        "What conversion and quantization lose is measured afterwards: the certificate lies with the verification report"
        " (`appliance models show`).",
    ]
    sections = [
        "\n".join(front),
        f"# {recipe['name']}, {phase}",
        f"A LoRA adapter of rank {recipe['lora']['rank']} for `{base}`, trained with the appliance"
        f" {locked['versions']['edge-appliance']} on {locked['machine']['device']}. It is of use with this base only.",
        "## Data",
        f"{rows} rows. Languages of the answers: {spoken or 'unknown'}. {data.get('fixed', 0)} defects were repaired,"
        f" {data.get('set_aside', 0)} rows set aside.",
        *([audited] if audited else []),
        "\n".join(["| file | sha256 |", "|---|---|", *files]),
        "## Training",
        in_words(points),
        "\n".join(findings),
        f"Figures: {_figures(results)}. Curves and answers before and after: `{REPORT}`.",
        "\n".join(["| setting | value |", "|---|---|", *settings]),
        "## How it was verified",
        "\n".join(f"- {each}" for each in verified),
    ]
    return "\n\n".join(sections) + "\n"


def _settings(locked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The recipe's values that this phase used; files by their names, since others may read it."""
    recipe = _without_folders(locked["recipe"])
    sections = {name: recipe[name] for name in ("lora", locked["phase"])}
    return [("base", recipe["base"]), ("seed", str(recipe["seed"])), *_flat(sections, "")]


def _flat(table: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    """Settings by their dotted names, without those that are not set."""
    flat: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            flat.append((f"{prefix}{key}", str(value)))
    return flat


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _figures(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in results.items() if _is_number(value))


def _samples(folder: Path) -> list[Part]:
    path = folder / samples.SAMPLES
    parts: list[Part] = []
    for each in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        parts += [
            Sample(each["question"], _asked(each)),
            Sample(each["base"], "before: the base"),
            Sample(each["adapter"], "after: with the adapter"),
            Sample(each["trained_for"], "trained for"),
        ]
    return parts or ["No answers were kept."]


def _asked(sample: Mapping[str, Any]) -> str:
    told = f", over the documents {', '.join(sample['documents'])}" if "documents" in sample else ""
    return f"question ({sample['language']}{told})"


def _learned(folder: Path) -> list[Part]:
    path = folder / samples.LEARNED
    if not path.is_file():
        return []
    row = json.loads(path.read_text(encoding="utf-8"))
    pieces = [Sample(each["text"], "learned" if each["is_learned"] else "read only") for each in row["pieces"]]
    return [f"Line {row['line']}, as the model sees it, with the template's own tokens.", *pieces]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
