"""Which model is served: the symlink `artifacts/current`, switched atomically, and `promoted.json` beside it.

Only a model that its verification report let through is promoted. `promoted.json` holds the models that were promoted, in
that order, with the serving settings of their recipes. It is written before the link is switched, so that whenever a machine
loses its power, the link names a model that is whole and whose settings are known, and those before it are still there. What
follows the linked model in the file was rolled back, or was never reached; the next promotion drops it. A model that is
promoted again is there twice: the last place up to the linked model counts, which is the first until the link is switched.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact
from appliance.errors import ArtifactError, VerificationFailed

CURRENT = "current"
RECORD = "promoted.json"
SCHEMA = 2
GATED_SINCE = 6  # the revision of verification (convert/verify.py) since which a report names the file that it let through
SIXTEEN_BITS = {"F16", "BF16", "F32"}  # which verification calls F16, all of them
PLAIN = " plain"  # as it calls a file for which nothing was measured, beside one of its type for which something was


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A model and its report, both as artifact ids, and the serving settings of its recipe."""

    model: str
    report: str
    serve: Mapping[str, Any]
    promoted_at: str


def promote(
    model: Artifact, report: Artifact, serve: Mapping[str, Any], root: Path, *, is_carried: bool = False
) -> str | None:
    """Makes `model` the one that is served; raises `VerificationFailed` when `report` is not about it, or did not hold it
    against its limit.

    Every file of the model is compared with its sha256 first. One that was carried here cannot be verified again: a report
    without a gate from before gates were asked for is enough, and what should be said of it is returned.
    """
    if model.manifest["kind"] != "gguf":
        raise ArtifactError(f"{model.path} is of kind {model.manifest['kind']!r}; only a gguf artifact can be served.")
    if not verifies(report, model):
        raise VerificationFailed(f"{report.path} does not verify {model.id}; run `appliance convert verify` for it first.")
    problem = ungated(report, model)
    if problem is not None and not (is_carried and is_from_before_gates(report)):
        elsewhere = " Do that where the bundle was made, and export it again." if is_carried else ""
        raise VerificationFailed(f"{problem}{elsewhere}")
    if model.path.resolve() != (root / "gguf" / model.path.name).resolve():
        raise ArtifactError(f"{model.path} does not lie in {root / 'gguf'}; only a model of this folder can be promoted.")
    artifacts.check_files(model)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    this = Promotion(model=model.id, report=report.id, serve=dict(serve), promoted_at=now)
    with _locked(root):
        _write([*_history(root)[0], this], root)
        _link(model.id, root)
    return None if problem is None else f"{report.id} is from before verification asked for a gate, and is taken: {problem}"


def rollback(root: Path) -> Artifact:
    """Serves the model that was promoted before the current one, with its settings; returns it.

    Raises `ArtifactError` when there is none, or when it is not whole any more; then nothing changes.
    """
    with _locked(root):
        history, after = _history(root)
        if len(history) < 2:
            raise ArtifactError(f"No model was promoted in {root} before the current one; there is nothing to go back to.")
        before = artifacts.load(root / history[-2].model)
        artifacts.check_files(before)
        if [*history, *after] != _read(root):  # or a model that is there twice would be gone back to twice
            _write([*history, *after], root)
        _link(before.id, root)
    return before


def current(root: Path) -> Artifact | None:
    """The promoted model, or None when there is none."""
    return artifacts.load((root / CURRENT).resolve()) if (root / CURRENT).exists() else None


def of(model: Artifact, root: Path) -> Promotion | None:
    """How `model` was promoted last; None when it never was."""
    history, after = _history(root)
    return next((each for each in (*history, *after) if each.model == model.id), None)


def serve_settings(model: Artifact, root: Path) -> Mapping[str, Any]:
    """What the recipe of `model` says about serving, if it was promoted."""
    promotion = of(model, root)
    return {} if promotion is None else promotion.serve


def report_on(model: Artifact, root: Path) -> Artifact:
    """The report it was promoted with, else the newest that verifies it; but those that let it through before all others,
    and then those that can still be carried elsewhere.

    Raises `VerificationFailed` when none verifies it.
    """
    promotion = of(model, root)
    chosen = None if promotion is None else promotion.report
    if chosen is not None and (root / chosen / artifacts.MANIFEST).exists():
        report = artifacts.load(root / chosen)
        if ungated(report, model) is None:
            return report
    reports = [artifacts.load(path.parent) for path in (root / "report").glob(f"*/{artifacts.MANIFEST}")]
    fitting = [report for report in reports if verifies(report, model)]
    if not fitting:
        raise VerificationFailed(
            f"No report in {root / 'report'} verifies {model.id}; run `appliance convert verify` first."
        )

    def rank(report: Artifact) -> tuple[bool, bool, bool, str]:
        is_gated = ungated(report, model) is None
        return is_gated, is_from_before_gates(report), report.id == chosen, str(report.manifest["made_at"])

    return max(fitting, key=rank)


def proven_reread_tokens(model: Artifact, root: Path) -> int | None:
    """How many tokens of each document must be read in its place so that the rest may be read by itself, as the newest proof
    in a report on this model says; None where there is none, or it says that all must.
    """
    proofs: list[tuple[str, int | None]] = []
    digests = {
        file["sha256"] for file in model.manifest["files"].values()
    }  # made anew elsewhere it may not be the same file
    for path in (root / "report").glob(f"*/{artifacts.MANIFEST}"):
        try:
            report = artifacts.load(path.parent)
        except ArtifactError:
            continue  # what is damaged proves nothing, and the model can be served without it
        proof = report.results.get("passages")
        if proof is not None and verifies(report, model) and proof["model"] == model.id and proof["sha256"] in digests:
            proofs.append((str(report.manifest["made_at"]), proof["allowed_reread_tokens"]))
    return max(proofs, key=lambda each: each[0])[1] if proofs else None


def verifies(report: Artifact, model: Artifact) -> bool:
    return report.manifest["inputs"].get("what") == "verify" and model.id in report.manifest["parents"]


def ungated(report: Artifact, model: Artifact) -> str | None:
    """Why the limit of a report did not let this model through; None where it did, and where the report has no limit.

    A report of an older version names the type that it let through, and not the file.
    """
    if "kl_limit" not in report.manifest["config"]:
        return None
    gate = report.results.get("gate") or {}
    kind = _verified_type(model)
    if gate.get("passed") and (gate["model"] == model.id if "model" in gate else gate["type"] == _name_in(report, model)):
        return None
    held = f"only {gate.get('model', gate['type'])}" if gate.get("passed") else "no file"
    return (
        f"{report.path} held {held} to its limit of {report.manifest['config']['kl_limit']} nats, and not {model.id};"
        f" run `appliance convert verify` with --gate {kind or 'and its type'}."
    )


def is_from_before_gates(report: Artifact) -> bool:
    """Whether this report was made without a gate when that was enough to be promoted."""
    return report.manifest["inputs"].get("revision", 0) < GATED_SINCE and not report.results.get("gate")


def _verified_type(model: Artifact) -> str | None:
    """As verification takes it for `--gate`."""
    kind = model.manifest["config"].get("type")
    return "F16" if kind in SIXTEEN_BITS else kind


def _name_in(report: Artifact, model: Artifact) -> str | None:
    """What a report calls this model's type: of two files of one type the one for which nothing was measured is plain."""
    kind = _verified_type(model)
    is_measured = bool(model.results.get("imatrix") or model.results.get("better"))
    is_one_of_two = f"{kind}{PLAIN}" in (report.results.get("files") or {})
    return f"{kind}{PLAIN}" if is_one_of_two and not is_measured else kind


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One after another; the lock ends with the process."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{CURRENT}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _link(model_id: str, root: Path) -> None:
    link = root / f".{CURRENT}.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(model_id)
    link.replace(root / CURRENT)
    artifacts.flush(root)


def _write(promotions: Sequence[Promotion], root: Path) -> None:
    record = {"schema": SCHEMA, "promotions": [dataclasses.asdict(each) for each in promotions]}
    artifacts.write_atomically(root / RECORD, json.dumps(record, indent=2) + "\n")
    artifacts.flush(root)


def _history(root: Path) -> tuple[Sequence[Promotion], Sequence[Promotion]]:
    """What was promoted up to the model that is linked, each once; and what follows that and is not among them."""
    linked = (root / CURRENT).readlink().as_posix() if (root / CURRENT).is_symlink() else None
    promotions = _read(root)  # after the link, for whatever is linked was recorded before
    places = [place for place, each in enumerate(promotions) if each.model == linked]
    end = places[-1] + 1 if places else 0
    history, after = _last_of_each(promotions[:end]), _last_of_each(promotions[end:])
    known = {each.model for each in history}
    return history, [each for each in after if each.model not in known]


def _last_of_each(promotions: Sequence[Promotion]) -> Sequence[Promotion]:
    last = {each.model: place for place, each in enumerate(promotions)}
    return [each for place, each in enumerate(promotions) if last[each.model] == place]


def _read(root: Path) -> Sequence[Promotion]:
    path = root / RECORD
    if not path.is_file():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] == 1:  # one promotion, and nothing about those before
            record["promotions"] = [{name: record[name] for name in ("model", "report", "serve", "promoted_at")}]
        elif record["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {record['schema']}, and this version knows {SCHEMA}; update the appliance."
            )
        return [Promotion(**each) for each in record["promotions"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); remove it and promote the model again.") from error
