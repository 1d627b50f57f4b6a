"""`appliance models ...`: what was made, and which of it is served."""

import json
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config, promotion
from appliance.artifacts import Artifact
from appliance.console import Command, emit, human_bytes, json_option
from appliance.errors import ArtifactError, RecipeError, several
from appliance.recipe import Serve


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
    """The manifest of MODEL (a folder, or kind/name), by default of the promoted model."""
    artifact = _find(model, config.artifacts_root())
    manifest = {**artifact.manifest, "id": artifact.id, "path": str(artifact.path)}
    emit(manifest, as_json, json.dumps(manifest, indent=2, ensure_ascii=False))


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path), required=True, help="Its verification report.")
@click.option("--serve", "serve_json", default="{}", help="Serving settings of its recipe, as JSON.")
@json_option
def promote(model: Path, report: Path, serve_json: str, as_json: bool) -> None:
    """Serve MODEL from now on; its files and its verification REPORT are checked first."""
    root = config.artifacts_root()
    serve = _serve_settings(serve_json)
    chosen = _find(str(model), root)
    before = promotion.current(root)
    state = "unchanged" if before is not None and before.id == chosen.id else "promoted"
    promotion.promote(chosen, _find(str(report), root), serve, root)
    emit({"artifact": chosen.path, "state": state}, as_json, f"{chosen.path} ({state})")


def _serve_settings(text: str) -> dict[str, Any]:
    problems: list[str] = []
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"--serve is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"--serve: expected a JSON object, found {text!r}.")
    config.build(Serve, settings, "serve", problems)
    if problems:
        raise RecipeError(several(problems, "--serve"))
    return settings


def _find(model: str | None, root: Path) -> Artifact:
    if model is None:
        promoted = promotion.current(root)
        if promoted is None:
            raise ArtifactError(f"No model is promoted in {root}; `appliance run RECIPE` makes and promotes one.")
        return promoted
    return artifacts.load(Path(model) if Path(model).exists() else root / model)
