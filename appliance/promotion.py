"""Which model is served: the symlink `artifacts/current`, switched atomically, and `promoted.json` beside it.

Only a model with a verification report is promoted. `promoted.json` keeps the serving settings of the model's recipe.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact
from appliance.errors import ArtifactError, VerificationFailed

CURRENT = "current"
RECORD = "promoted.json"


def promote(model: Artifact, report: Artifact, serve: Mapping[str, Any], root: Path) -> None:
    """Makes `model` the one that is served; raises `VerificationFailed` when `report` is not about it.

    Every file of the model is compared with its sha256 first.
    """
    if model.manifest["kind"] != "gguf":
        raise ArtifactError(f"{model.path} is of kind {model.manifest['kind']!r}; only a gguf artifact can be served.")
    if report.manifest["inputs"].get("what") != "verify" or model.id not in report.manifest["parents"]:
        raise VerificationFailed(f"{report.path} does not verify {model.id}; run `appliance convert verify` for it first.")
    if model.path.resolve() != (root / "gguf" / model.path.name).resolve():
        raise ArtifactError(f"{model.path} does not lie in {root / 'gguf'}; only a model of this folder can be promoted.")
    artifacts.check_files(model)
    record = {
        "schema": artifacts.SCHEMA,
        "model": model.id,
        "report": report.id,
        "serve": dict(serve),
        "promoted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    artifacts.write_atomically(root / RECORD, json.dumps(record, indent=2) + "\n")
    link = root / f".{CURRENT}.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("gguf") / model.path.name)
    link.replace(root / CURRENT)


def current(root: Path) -> Artifact | None:
    """The promoted model, or None when there is none."""
    return artifacts.load((root / CURRENT).resolve()) if (root / CURRENT).exists() else None


def serve_settings(model: Artifact, root: Path) -> Mapping[str, Any]:
    """What the recipe of the promoted `model` says about serving; nothing for another model."""
    path = root / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings: Mapping[str, Any] = record["serve"] if record["model"] == model.id else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); promote the model again.") from error
    return settings
