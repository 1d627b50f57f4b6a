"""Models of a few hundred bytes with their reports, to be promoted and carried: what computes is not asked here."""

from pathlib import Path
from typing import Any

from appliance import artifacts, bundles, promotion
from appliance.artifacts import Artifact, Plan

SERVE = {"slots": 3, "system_prompts": ["Wees kort."], "host": "0.0.0.0", "threads": 4, "adapters": ["a=/x.gguf"]}
CARRIED = {"slots": 3, "system_prompts": ["Wees kort."]}


def made(
    root: Path, name: str = "tiny", content: bytes = b"weights" * 100, revision: int | None = None
) -> tuple[Artifact, Artifact]:
    """A model and the report that verifies it: with a limit and no gate, where it has a revision."""
    plan = Plan(kind="gguf", name=name, inputs={"revision": 1}, config={"type": "Q8_0"})
    with artifacts.create(plan, root) as draft:
        (draft.path / f"{name}.gguf").write_bytes(content)
        draft.results["size_bytes"] = len(content)
    model = artifacts.load(plan.location(root))
    inputs = {"what": "verify", "revision": revision or promotion.GATED_SINCE}
    limits = {} if revision is None else {"kl_limit": 0.1}
    plan = Plan(kind="report", name=f"{name}-verify", inputs=inputs, parents=[model.id], config=limits)
    with artifacts.create(plan, root) as draft:
        (draft.path / "figures").mkdir()
        (draft.path / "figures" / "loss.txt").write_text("0.1")
    return model, artifacts.load(plan.location(root))


def promoted(root: Path, name: str = "tiny", **serve: Any) -> Artifact:
    model, report = made(root, name)
    promotion.promote(model, report, serve, root)
    return model


def exported(folder: Path) -> Path:
    """The bundle of a promoted model; the artifacts that it came from lie beside it, in `there`."""
    there, path = folder / "there", folder / "tiny.appliance"
    bundles.export(promoted(there, **SERVE), there, path)
    return path
