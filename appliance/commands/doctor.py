"""`appliance doctor`: what this machine can do; every problem with its remedy."""

import sys

import click

from appliance import doctor as examination
from appliance.console import Command, emit, json_option
from appliance.errors import EnvironmentIncomplete


@click.command(cls=Command)
@json_option
def doctor(as_json: bool) -> None:
    """What this machine can do; every problem with its remedy; and how to start a container here.

    Exit code 3 when something keeps a GPU, the engine or training from working.
    """
    report = examination.examine()
    lines = [f"{name:<12}{fact}" for name, fact in report.facts.items()]
    lines += [f"problem     {problem}" for problem in report.problems]
    lines += [f"hint        {hint}" for hint in report.hints]
    lines += ["", f"{report.run_title}:", f"  {report.run_line}"]
    result = {
        "facts": report.facts,
        "problems": [{"what": each.what, "remedy": each.remedy} for each in report.problems],
        "hints": [{"what": each.what, "remedy": each.remedy} for each in report.hints],
        "run": report.run_line,
    }
    emit(result, as_json, "\n".join(lines))
    if report.problems:
        sys.exit(EnvironmentIncomplete.exit_code)
