"""The report of a run in Markdown: what was learned, what conversion lost, how large the files are, what is served."""

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.artifacts import Artifact
from appliance.console import human_bytes, human_seconds
from appliance.evaluation.asking import Session
from appliance.recipe import STARTER, Recipe
from appliance.training_settings import ORDER, PREFERENCES

STARTER_WARNING = (
    "The base is the **starter**, made on the spot from this recipe's files. It is for trying the appliance: it repeats"
    " what it was given and knows nothing else. For real use, set `base` to an instruction-tuned model."
)


def markdown(recipe: Recipe, made: Mapping[str, Artifact], session: Session | None) -> str:
    """`made` holds the artifact of every step by its name."""
    parts = [f"# {recipe.name}\n", f"Base: `{recipe.base}`.", *([STARTER_WARNING] if recipe.base == STARTER else [])]
    parts += ["\n## Data\n", *_data(made["data"]), "\n## Training\n", *_training(made)]
    parts += ["\n## Files\n", *_files(recipe, made), "\n## Verification\n", *_verification(made["verify"])]
    if session is not None:
        parts += ["\n## Served answers\n", *_answers(session)]
    parts += ["\n## Artifacts\n", *_artifacts(made)]
    return "\n".join(parts) + "\n"


def answers_in_words(session: Session) -> list[str]:
    """The answers and the latency for a terminal."""
    lines = []
    for answered in session.answers:
        lines += [f"[{answered.question.language}] {answered.question.question}", f"     {answered.answer}"]
        lines += [f"     chrF {answered.chrf:.0f} against the answer that was trained for", ""]
    lines += [
        f"{model_line(session)}:",
        *(f"  {label:<22} {value * 1000:8.1f} ms" for label, value in session.latency_seconds.items()),
    ]
    return lines


def model_line(session: Session) -> str:
    tokens = session.tokens
    return f"/metrics of {session.model}, means over {len(session.answers)} answers, {tokens['generated']} tokens"


def _data(dataset: Artifact) -> list[str]:
    results = dataset.results
    rows = ", ".join(f"{count} {name}" for name, count in results["rows"].items())
    spoken = ", ".join(f"{language} {count}" for language, count in results["languages"].items())
    return [
        f"{rows} rows. Languages of the conversations: {spoken}.",
        f"Defects: {results['fixed']} fixed, {results['set_aside']} rows set aside (`defects.jsonl` names each line).",
    ]


def _training(made: Mapping[str, Artifact]) -> list[str]:
    lines = ["| phase | steps | loss, first step | loss, last twentieth | time |", "|---|---|---|---|---|"]
    for phase in [name for name in ("base", *ORDER) if "steps" in (made[name].results if name in made else {})]:
        results, seconds = made[phase].results, made[phase].manifest["seconds"]
        losses = f"{results['first_loss']:.3f} | {results['final_loss']:.3f}"
        lines.append(f"| {phase} | {results['steps']} | {losses} | {human_seconds(seconds)} |")
    for name in [phase for phase in PREFERENCES if phase in made]:
        lines += ["", _preferred(name.upper(), made[name].results)]
    if "grpo" in made:
        grpo = made["grpo"].results
        lines += [
            "",
            f"Mean reward of the model's own answers to {grpo['rows']} prompts: {grpo['reward_first']:.3f} in the first"
            f" fifth of GRPO's steps, {grpo['reward_last']:.3f} in the last; {grpo['flat_groups']:.1%} of groups had no"
            " spread to learn from.",
        ]
    if "passages" in made:
        lines += ["", *_apart(made["passages"].results)]
    return lines + _samples(made)


def _apart(results: Mapping[str, Any]) -> list[str]:
    """How far answers over documents that were read each by themselves are from ordinary ones."""
    lines = [
        "Divergence from ordinary reading of documents, nats a token of the answer (and the same likeliest token):",
        "",
        "| rows | documents apart, before | after | in their place, after |",
        "|---|---|---|---|",
    ]
    for prefix, name in (("", "trained on"), ("heldout_", "held out")):
        if f"{prefix}measured_rows" in results:
            cells = [
                f"{results[f'{prefix}kl_{when}']:.4f} ({results[f'{prefix}top1_{when}']:.1%})"
                for when in ("before", "after", "exact")
            ]
            lines.append(f"| {results[f'{prefix}measured_rows']} {name} | {' | '.join(cells)} |")
    return lines


def _preferred(method: str, results: Mapping[str, Any]) -> str:
    """What a phase of preferences did, from triplets or from judged answers."""
    if "accuracy_before" not in results:
        return (
            f"By {method} wanted answers became likelier by {results['good_gain_nats']:+.2f} nats a token, unwanted ones by"
            f" {results['bad_gain_nats']:+.2f} (the wanted one gained more in {results['reward_accuracy']:.1%} of pairs)."
        )
    shorter = (
        f" Where the chosen answer is the shorter one: {results['accuracy_shorter_before']:.1%} before,"
        f" {results['accuracy_shorter_after']:.1%} after."
        if "accuracy_shorter_after" in results
        else ""
    )
    return (
        f"Preference accuracy over {results['rows']} triplets (chosen answer likelier per token):"
        f" {results['accuracy_before']:.1%} before {method}, {results['accuracy_after']:.1%} after; by"
        f" {results['margin_before_nats']:.2f} nats a token before, {results['margin_after_nats']:.2f} after."
        f" The chosen answer gained on the rejected one in {results['reward_accuracy']:.1%}."
        f" Length alone would decide {results['accuracy_by_length']:.1%}.{shorter}"
    )


def _samples(made: Mapping[str, Artifact]) -> list[str]:
    import json

    adapter = next(made[phase] for phase in reversed(ORDER) if phase in made)
    lines = ["", "Base beside adapter, greedy, on a training question in each language:", ""]
    for sample in json.loads((adapter.path / "samples.json").read_text(encoding="utf-8")):
        lines += [f"- **{sample['language']}** {_line(sample['question'])}"]
        lines += [f"  - base: {_line(sample['base'])}", f"  - adapter: {_line(sample['adapter'])}"]
    return lines


def _files(recipe: Recipe, made: Mapping[str, Artifact]) -> list[str]:
    lines = ["| type | size | served |", "|---|---|---|"]
    files = {"F16": made["gguf"], **{kind: made[kind] for kind in recipe.quantize.types if kind in made}}
    for kind, artifact in files.items():
        served = "yes" if kind == recipe.quantize.serve else ""
        lines.append(f"| {kind} | {human_bytes(artifact.results['size_bytes'])} | {served} |")
    return lines


def _verification(report: Artifact) -> list[str]:
    """The certificate, under its own headings."""
    page = (report.path / "certificate.md").read_text(encoding="utf-8")
    return [line.replace("## ", "### ") for line in page.splitlines() if not line.startswith("# ")]


def _answers(session: Session) -> list[str]:
    lines = [f"{model_line(session)}.", "", "| language | question | served answer | chrF |", "|---|---|---|---|"]
    for each in session.answers:
        cells = (each.question.language, _line(each.question.question), _line(each.answer), f"{each.chrf:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| latency | mean |", "|---|---|"]
    return lines + [f"| {label} | {value * 1000:.1f} ms |" for label, value in session.latency_seconds.items()]


def _artifacts(made: Mapping[str, Artifact]) -> list[str]:
    return [f"- {step}: `{artifact.id}`" for step, artifact in made.items()]


def _line(text: str) -> str:
    """One line that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def as_data(session: Session | None) -> Sequence[Mapping[str, Any]]:
    """The answers for JSON."""
    if session is None:
        return []
    return [
        {
            "language": each.question.language,
            "question": each.question.question,
            "trained_for": each.question.answer,
            "answer": each.answer,
            "chrf": round(each.chrf, 2),
        }
        for each in session.answers
    ]
