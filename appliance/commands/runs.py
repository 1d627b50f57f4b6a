"""`appliance runs ...`: what was trained, how the runs differ, and what a loss curve says."""

from dataclasses import asdict
from pathlib import Path

import click

from appliance import artifacts, config
from appliance.console import Command, emit, human_seconds, json_option
from appliance.errors import ArtifactError


@click.command("list", cls=Command)
@json_option
def list_runs(as_json: bool) -> None:
    """Training runs: phase, when, rows, steps, losses, time and machine; interrupted ones among them."""
    from appliance.training import runs

    root = config.artifacts_root()
    rows = [run.summary() for run in runs.found(root)]
    lines = []
    for row in rows:
        validation = "" if row["validation_loss"] is None else f", validation {row['validation_loss']:.3f}"
        reached = f"loss {runs.shown(row['final_loss'])}{validation}"  # of GRPO it says nothing
        if row["reward"] is not None:
            reached = f"reward {runs.shown(row['reward'])}"
        lines.append(
            f"{row['name']:<36} {row['phase']:<5} {row['made_at'] or row['state']:<20}"
            f" {runs.shown(row['rows']):>7} rows {row['steps']:>6} steps  {reached}"
            f"  {human_seconds(row['seconds'] or 0)}  {row['machine'] or ''}".rstrip()
        )
    emit({"runs": rows}, as_json, "\n".join(lines) or f"No training runs in {root}; `appliance train RECIPE` makes one.")


@click.command(cls=Command)
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page there with the curves in one chart.")
@click.option("--force", is_flag=True, help="Overwrite that page.")
@json_option
def compare(names: tuple[str, ...], html: Path | None, force: bool, as_json: bool) -> None:
    """Two or more RUNs side by side: the settings that differ, and what came out."""
    from appliance.training import runs

    if len(names) < 2:
        raise click.UsageError("Name at least two runs, as `appliance runs list` shows them.")
    root = config.artifacts_root()
    chosen = [runs.find(name, root) for name in names]
    settings, figures = runs.differing(chosen), runs.figures(chosen)
    if html is not None:
        if html.exists() and not force:
            raise ArtifactError(f"{html} exists; name another file, or pass --force.")
        html.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_atomically(html, runs.compared_page(chosen))
    result = {"runs": [run.summary() for run in chosen], "settings": settings, "figures": figures, "page": html}
    rows = {"": [run.name for run in chosen], **settings, **figures}
    lines = [[name, *map(runs.shown, values)] for name, values in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join(
        "  ".join(f"{each:<{width}}" for each, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    emit(result, as_json, text + (f"\n{html}" if html else ""))


@click.command(cls=Command)
@click.argument("name", metavar="RUN")
@json_option
def diagnose(name: str, as_json: bool) -> None:
    """What the curve of RUN says, in words and with evidence; also of a run that trains now."""
    from appliance.training import curve, run_files, runs
    from appliance.training import diagnose as diagnosing

    run = runs.find(name, config.artifacts_root())
    points = curve.read(run.path)
    findings = diagnosing.diagnose(points, is_running=not run.is_finished)
    words = run_files.in_words(points)
    report = run.path / run_files.REPORT
    result = {
        "run": run.name,
        "state": "finished" if run.is_finished else "unfinished",
        "summary": words,
        "findings": [asdict(finding) for finding in findings],
        "page": report if report.is_file() else None,
    }
    said = [f"- {finding}" for finding in findings] or [run_files.nothing(points)]
    emit(result, as_json, "\n".join([f"{run.name}: {words}", *said, *([str(report)] if report.is_file() else [])]))
