"""`appliance run`: the whole path from a recipe to a promoted, verified model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance import artifacts, config, pipeline
from appliance import recipe as recipes
from appliance.artifacts import Artifact, Plan
from appliance.commands.options import recipe_argument, set_option, strict_option
from appliance.console import Command, emit, json_option, note
from appliance.recipe import Recipe

if TYPE_CHECKING:
    from appliance.evaluation.asking import Session


@click.command(cls=Command)
@recipe_argument
@set_option
@strict_option
@click.option("--ask", type=click.IntRange(min=0), default=0, help="Then serve it and ask N training questions a language.")
@click.option("--dry-run", is_flag=True, help="Say what each step would make, and make nothing.")
@json_option
def run(recipe: Path, sets: tuple[str, ...], strict: bool, ask: int, dry_run: bool, as_json: bool) -> None:
    """Train, convert, verify and promote the assistant of RECIPE; steps whose inputs did not change are skipped."""
    loaded = recipes.load(recipe, sets)
    pipeline.end_on_sigterm()
    done = pipeline.run(recipe, loaded, sets, is_strict=strict, is_dry=dry_run)
    steps = [{"step": step.name, "artifact": step.artifact, "state": step.result["state"]} for step in done.steps]
    if dry_run:
        lines = [f"{step['step']:<8} {step['state']:<10} {step['artifact']}" for step in steps]
        emit({"steps": steps}, as_json, "\n".join(lines))
        return
    made = {step.name: artifacts.load(step.artifact) for step in done.steps if (step.artifact / artifacts.MANIFEST).exists()}
    session = _ask(made["data"], loaded, ask) if ask else None
    report = _write_report(loaded, made, session)
    from appliance.evaluation.report import answers_in_words, as_data

    result = {"steps": steps, "report": report / "report.md", "answers": as_data(session)}
    words = [*(["", *answers_in_words(session)] if session else []), "", *_next(report)]
    emit(result, as_json, "\n".join(words))


def _ask(dataset: Artifact, recipe: Recipe, per_language: int) -> "Session":
    from appliance.data.check import read_rows
    from appliance.data.questions import training_questions
    from appliance.evaluation.asking import ask_served_model

    questions = training_questions(read_rows(dataset.path, "sft"), recipe.languages, per_language)
    note(f"[ask] appliance serve: {len(questions)} training questions over HTTP")
    return ask_served_model(questions)


def _write_report(recipe: Recipe, made: dict[str, Artifact], session: "Session | None") -> Path:
    from appliance.evaluation.report import as_data, markdown

    answers = as_data(session)
    parents = [artifact.id for artifact in made.values()]
    resolved = config.plain(recipe)
    plan = Plan(kind="report", name=f"{recipe.name}-run", inputs={"answers": answers}, parents=parents, config=resolved)
    root = config.artifacts_root()
    if plan.existing(root) is None:
        with artifacts.create(plan, root) as draft:
            (draft.path / "report.md").write_text(markdown(recipe, made, session), encoding="utf-8")
            (draft.path / "answers.json").write_text(json.dumps(answers, indent=2, ensure_ascii=False), encoding="utf-8")
    return plan.location(root)


def _next(report: Path) -> list[str]:
    return [
        f"report: {report / 'report.md'}",
        "",
        "What to type next:",
        "  make serve                      the assistant on http://127.0.0.1:8080 (OpenAI's API)",
        "  make chat                       talk to it, in a second terminal",
        "  .venv/bin/appliance models list",
        "  cp -r recipes/shelter recipes/mine          then put your own rows into it and type",
        "  .venv/bin/appliance run recipes/mine/recipe.toml",
    ]
