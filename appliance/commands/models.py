"""`appliance models ...`: what was made, which of it is served, and how it comes to another machine."""

import contextlib
import json
from pathlib import Path

import click

from appliance import artifacts, bundles, config, promotion
from appliance.artifacts import Artifact
from appliance.console import Command, Progress, emit, human_bytes, json_option, note
from appliance.errors import ArtifactError, VerificationFailed
from appliance.recipe import parse_serve

CERTIFICATE = "certificate.md"  # of a verification report


@click.command("list", cls=Command)
@json_option
def list_models(as_json: bool) -> None:
    """The models that can be served; * marks the promoted one."""
    root = config.artifacts_root()
    promoted = promotion.current(root)
    rows = []
    for manifest in sorted((root / "gguf").glob(f"*/{artifacts.MANIFEST}")):
        model = artifacts.load(manifest.parent)
        is_promoted = promoted is not None and model.id == promoted.id
        rows.append(
            {
                "id": model.id,
                "type": model.manifest["config"]["type"],
                "size_bytes": model.results["size_bytes"],
                "made_at": model.manifest["made_at"],
                "promoted": is_promoted,
            }
        )
    lines = [
        f"{'*' if row['promoted'] else ' '} {row['id']:<48} {human_bytes(row['size_bytes']):>10}  {row['made_at']}"
        for row in rows
    ]
    emit({"models": rows}, as_json, "\n".join(lines) or f"No models in {root}; `appliance run RECIPE` makes one.")


@click.command(cls=Command)
@click.argument("model", required=False)
@json_option
def show(model: str | None, as_json: bool) -> None:
    """The manifest and the certificate of MODEL (a folder, or kind/name), by default of the promoted model."""
    root = config.artifacts_root()
    artifact = _find(model, root)
    manifest = {**artifact.manifest, "id": artifact.id, "path": str(artifact.path)}
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    if artifact.manifest["kind"] == "gguf":
        with contextlib.suppress(VerificationFailed):  # a model that nothing verified has no certificate
            report = promotion.report_on(artifact, root)
            manifest["certificate"] = {**report.results, "id": report.id}
            page = report.path / CERTIFICATE
            text += f"\n\n{page.read_text(encoding='utf-8')}" if page.is_file() else ""
    emit(manifest, as_json, text)


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path), required=True, help="Its verification report.")
@click.option("--serve", "serve_json", default="{}", help="Serving settings of its recipe, as JSON.")
@json_option
def promote(model: Path, report: Path, serve_json: str, as_json: bool) -> None:
    """Serve MODEL from now on; its files and its verification REPORT are checked first."""
    root = config.artifacts_root()
    serve = parse_serve(serve_json, "--serve")
    chosen = _find(str(model), root)
    before = promotion.current(root)
    state = "unchanged" if before is not None and before.id == chosen.id else "promoted"
    promotion.promote(chosen, _find(str(report), root), serve, root)
    emit({"artifact": chosen.path, "state": state}, as_json, f"{chosen.path} ({state})")


@click.command(cls=Command)
@json_option
def rollback(as_json: bool) -> None:
    """Serve the model again that was promoted before the current one, with its settings."""
    root = config.artifacts_root()
    left = promotion.current(root)
    model = promotion.rollback(root)
    result = {"artifact": model.path, "state": "rolled back", "instead_of": None if left is None else left.id}
    emit(result, as_json, f"{model.path} is served again")


@click.command(cls=Command)
@click.argument("model")
@json_option
def remove(model: str, as_json: bool) -> None:
    """Delete MODEL's files. What it was made from stays, and the recipe makes it again; the promoted model is refused."""
    root = config.artifacts_root()
    doomed = _find(model, root)
    promoted = promotion.current(root)
    if promoted is not None and doomed.path == promoted.path:
        raise ArtifactError(f"{doomed.id} is the promoted model; promote another, or roll back, before it is removed.")
    if doomed.manifest["kind"] != "gguf":
        raise ArtifactError(f"{doomed.path} is of kind {doomed.manifest['kind']!r}; only models (gguf) are removed here.")
    freed = sum(entry["size_bytes"] for entry in doomed.manifest["files"].values())
    artifacts.remove(doomed)
    emit(
        {"removed": doomed.id, "freed_bytes": freed}, as_json, f"{doomed.id} is removed; {human_bytes(freed)} are free again"
    )


@click.command("export", cls=Command)
@click.argument("model", required=False)
@click.option("--to", type=click.Path(path_type=Path), default=Path(), help="A folder (a stick), or the file to write.")
@click.option("--sign", "private_key", type=click.Path(path_type=Path), help="Sign it with this private key (PEM).")
@json_option
def export_model(model: str | None, to: Path, private_key: Path | None, as_json: bool) -> None:
    """Write MODEL, by default the promoted one, with its report and settings into one file for another machine."""
    root = config.artifacts_root()
    chosen = _find(model, root)
    path = to / f"{chosen.path.name}{bundles.SUFFIX}" if to.is_dir() else to
    progress: list[Progress] = []

    def show_progress(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress("MB", round(total / 1e6)))
        progress[0].update(round(done / 1e6))

    done = bundles.export(chosen, root, path, private_key, show_progress)
    for name in done.left_out:
        note(f"serve.{name} names files of this machine and was left out.")
    result = {"file": done.path, "fingerprint": done.fingerprint, "size_bytes": done.size_bytes, "left_out": done.left_out}
    emit(result, as_json, f"{done.path} ({human_bytes(done.size_bytes)})\nfingerprint {done.fingerprint}")


@click.command("import", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--promote", "is_promoting", is_flag=True, help="Serve it from now on.")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    default=config.trusted_key,
    help="Refuse what this key (PEM) did not sign; APPLIANCE_TRUSTED_KEY.",
)
@click.option("--fingerprint", help="Refuse what has another fingerprint than this, which the export printed.")
@json_option
def import_model(file: Path, is_promoting: bool, public_key: Path | None, fingerprint: str | None, as_json: bool) -> None:
    """Take in the model in FILE, which `appliance models export` wrote; every byte is checked first."""
    root = config.artifacts_root()
    taken = bundles.take_in(file, root, public_key, fingerprint)
    if taken.is_signed and public_key is None:
        note("The file is signed, and nobody said by whom; --public-key checks it.")
    if is_promoting:
        said = promotion.promote(taken.model, taken.report, taken.serve, root, is_carried=True)
        if said is not None:
            note(said)
    result = {
        "artifact": taken.model.path,
        "state": "imported" if taken.is_new else "unchanged",
        "promoted": is_promoting,
        "fingerprint": taken.fingerprint,
        "signature": "none" if not taken.is_signed else "checked" if public_key is not None else "not checked",
    }
    state = f"{result['state']}, promoted" if is_promoting else str(result["state"])
    emit(result, as_json, f"{taken.model.path} ({state})\nfingerprint {taken.fingerprint}")


def _find(model: str | None, root: Path) -> Artifact:
    if model is None:
        promoted = promotion.current(root)
        if promoted is None:
            raise ArtifactError(f"No model is promoted in {root}; `appliance run RECIPE` makes and promotes one.")
        return promoted
    known = (path for path in (Path(model), root / model, root / "gguf" / model) if path.exists())
    return artifacts.load(next(known, root / model).resolve())
