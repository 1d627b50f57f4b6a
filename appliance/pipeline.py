"""The main path: data check → train → merge → gguf → imatrix → quantize → verify → promote, each step a command of its own.

Every step is the command that a person can type, run as a subprocess with `--json`; it says itself whether its inputs have
changed. A step that fails ends the path with its exit code, and nothing after it happens. Main entry: `run`.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance import allocator, bases, config
from appliance.console import human_seconds, note
from appliance.errors import StepFailed
from appliance.recipe import STARTER, Recipe, Serve

CHILD_GRACE_SECONDS = 10.0
UNWEIGHED = frozenset({"F16", "Q8_0"})  # their blocks are so fine that no column is worth more than another


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step said in JSON, and how long it took."""

    name: str
    command: Sequence[str]
    result: Mapping[str, Any]
    seconds: float

    @property
    def artifact(self) -> Path:
        return Path(self.result["artifact"])


@dataclass(slots=True)
class Run:
    """A pipeline in progress: what every step so far has made."""

    recipe_path: Path
    recipe: Recipe
    sets: Sequence[str]
    is_dry: bool
    steps: list[StepResult] = field(default_factory=list)

    def step(self, name: str, *command: str | Path) -> StepResult:
        """Runs `appliance COMMAND --json`; raises `StepFailed` with the command's exit code."""
        arguments = [str(part) for part in command]
        note(f"[{len(self.steps) + 1}] appliance {' '.join(arguments)}")
        started = time.monotonic()
        flags = ["--json", *(["--dry-run"] if self.is_dry and "--check" not in arguments else [])]
        output = _run_command([*arguments, *flags])
        result = StepResult(name, arguments, output, time.monotonic() - started)
        self.steps.append(result)
        note(f"    {result.artifact} ({output['state']}, {human_seconds(result.seconds)})")
        return result

    @property
    def recipe_flags(self) -> list[str]:
        return [str(self.recipe_path), *(flag for each in self.sets for flag in ("--set", each))]


def run(recipe_path: Path, recipe: Recipe, sets: Sequence[str], *, is_strict: bool, is_dry: bool) -> Run:
    """The whole path; `is_dry` asks every step what it would make."""
    this = Run(recipe_path, recipe, sets, is_dry)
    dataset = this.step("data", "data", "check", *this.recipe_flags, *(["--strict"] if is_strict else []))
    base = _base(this)
    adapter = [this.step(phase, "train", *this.recipe_flags, "--phase", phase, "--resume") for phase in recipe.phases][-1]
    # Rows are read where an adapter was trained on four bits alone: both ways of merging it are compared on them.
    rows = ("--conversations", dataset.artifact / "sft.jsonl")
    merged = this.step("merge", "convert", "merge", adapter.artifact, "--base", base, *rows, "--name", recipe.name)
    full = this.step("gguf", "convert", "gguf", merged.artifact, "--name", recipe.name)
    files = {"F16": full, **_quantized(this, full, merged, dataset)}
    report = _verify(this, files, merged, dataset)
    if not is_dry:
        settings = json.dumps(config.plain(recipe.serve))
        chosen = files[recipe.quantize.serve].artifact
        this.step("promote", "models", "promote", chosen, "--report", report.artifact, "--serve", settings)
    return this


class Terminated(KeyboardInterrupt):
    """SIGTERM came: unlike Ctrl-C, which the terminal sends to the running step too, it came to this process alone."""


def end_on_sigterm() -> None:
    """From now on SIGTERM ends the running step as well, which would otherwise go on as an orphan."""

    def handle(_number: int, _frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handle)


def _base(this: Run) -> Path:
    """The folder of the base model; an architecture that cannot be converted is refused before anything is trained."""
    if this.recipe.base == STARTER:
        return this.step("base", "train", *this.recipe_flags, "--phase", "base", "--resume").artifact
    folder = bases.locate(this.recipe.base, config.artifacts_root())
    this.step("base", "convert", "gguf", folder, "--check")
    return folder


def _quantized(this: Run, full: StepResult, merged: StepResult, dataset: StepResult) -> dict[str, StepResult]:
    """The files of the recipe's types; with `compare` also without what is measured for them, under another name."""
    weighed = _importance(this, merged, dataset)
    files: dict[str, StepResult] = {}
    for kind in this.recipe.quantize.types:
        if kind == "F16":
            continue
        flags = [] if kind in UNWEIGHED else [*weighed, *_sensitivity(this, kind, full, merged, dataset, weighed)]
        files[kind] = this.step(kind, "convert", "quantize", full.artifact, "--type", kind, *flags)
        if flags and this.recipe.quantize.compare:
            plain = f"{kind} plain"
            files[plain] = this.step(plain, "convert", "quantize", full.artifact, "--type", kind)
    return files


def _importance(this: Run, merged: StepResult, dataset: StepResult) -> list[str | Path]:
    """The importance matrix for the files that use one, as flags."""
    settings = this.recipe.quantize
    if not settings.imatrix_tokens or UNWEIGHED.issuperset(settings.types):
        return []
    rows: list[str | Path] = ["--conversations", dataset.artifact / "sft.jsonl", "--tokens", str(settings.imatrix_tokens)]
    step = this.step("imatrix", "convert", "imatrix", merged.artifact, *rows, *_languages(this), "--name", this.recipe.name)
    return ["--imatrix", step.result["file"]]


def _sensitivity(
    this: Run, kind: str, full: StepResult, merged: StepResult, dataset: StepResult, weighed: Sequence[str | Path]
) -> list[str | Path]:
    """What is measured to spend bytes on, and how many may be spent, as flags."""
    if not (spend_mib := this.recipe.quantize.spend_mib):
        return []
    rows = ("--conversations", dataset.artifact / "sft.jsonl")
    flags: list[str | Path] = ["--merged", merged.artifact, "--type", kind, *rows, *_languages(this), *weighed]
    name = f"{this.recipe.name}-{kind}"
    step = this.step(f"{kind} sensitivity", "convert", "sensitivity", full.artifact, *flags, "--name", name)
    return ["--sensitivity", step.result["file"], "--spend", f"{spend_mib}MiB"]


def _languages(this: Run) -> list[str]:
    return [part for code in this.recipe.languages for part in ("--language", code)]


def _verify(this: Run, files: Mapping[str, StepResult], merged: StepResult, dataset: StepResult) -> StepResult:
    recipe, settings = this.recipe, this.recipe.verify
    quantized = [part for kind, each in files.items() if kind != "F16" for part in ("--quantized", each.result["file"])]
    more: list[str | Path] = ["--heldout", dataset.artifact / "heldout.jsonl"] if recipe.data.heldout else []
    more += ["--preferences", dataset.artifact / "dpo.jsonl"] if recipe.triplets else []
    if _may_read_apart(recipe.serve) and _has_documents(dataset.artifact):
        more += ["--passages", "--passages-questions", str(settings.passages_questions)]
        more += ["--passages-kl-limit", str(settings.passages_kl_limit)]
        more += ["--passages-lost-limit", str(settings.passages_lost_limit)]
    return this.step(
        "verify",
        *("convert", "verify", files["F16"].result["file"], "--merged", merged.artifact),
        *("--conversations", dataset.artifact / "sft.jsonl", *more, *quantized, "--name", recipe.name),
        *_languages(this),
        *("--gate", recipe.quantize.serve, "--kl-limit", str(settings.kl_limit)),
        *("--prompts", str(settings.prompts), "--answer-tokens", str(settings.answer_tokens)),
        *("--logit-gap", str(settings.logit_gap), "--memory-mib", str(recipe.machine.memory_mib)),
        *("--serve", json.dumps(config.plain(recipe.serve))),
    )


def _may_read_apart(serve: Serve) -> bool:
    """Whether a proof would be of any use."""
    return serve.documents != "exact" and serve.kv_type != "q8_0" and serve.cache_tokens > 0 and not serve.adapters


def _has_documents(dataset: Path) -> bool:
    """Whether rows have any, so that it can be measured what reading these by themselves costs."""
    for name in ("sft.jsonl", "heldout.jsonl"):
        if (dataset / name).exists():
            with (dataset / name).open("rb") as stream:
                if any(json.loads(line).get("documents") for line in stream):
                    return True
    return False


def _run_command(arguments: Sequence[str]) -> Mapping[str, Any]:
    command = [sys.executable, "-m", "appliance", *arguments]
    environment = config.quiet_environment()
    if arguments[0] == "train":
        environment = allocator.preloaded(environment)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt as reason:
            if isinstance(reason, Terminated):
                process.terminate()
            _end(process)  # it may be writing, so it is given time
            raise
    if process.returncode != 0:
        code = process.returncode if process.returncode > 0 else 1
        raise StepFailed(f"`appliance {' '.join(arguments[:2])}` failed (exit {process.returncode}); see above.", code)
    result: Mapping[str, Any] = json.loads(output)
    return result


def _end(process: "subprocess.Popen[str]") -> None:
    actions: Sequence[Callable[[], None]] = (process.terminate, process.kill)
    for action in actions:
        try:
            process.wait(CHILD_GRACE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            action()
    process.wait()
