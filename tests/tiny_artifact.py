"""A promoted artifact of `tiny_gguf`'s model, which a server can load, and a bundle of it."""

from pathlib import Path

from appliance import artifacts, bundles, promotion
from appliance.artifacts import Artifact, Plan
from tests import tiny_gguf


def promoted(root: Path, name: str = "tiny", revision: int = 1) -> Artifact:
    plan = Plan(kind="gguf", name=name, inputs={"revision": revision}, config={"type": "F16"})
    with artifacts.create(plan, root) as draft:
        tiny_gguf.write(draft.path / "tiny.gguf")
    model = artifacts.load(plan.location(root))
    plan = Plan(kind="report", name=f"{name}-verify", inputs={"what": "verify"}, parents=[model.id])
    with artifacts.create(plan, root):
        pass
    promotion.promote(model, artifacts.load(plan.location(root)), {}, root)
    return model


def exported(root: Path, target: Path, name: str = "tiny", revision: int = 1) -> None:
    """Made in `root`, promoted, and written to `target`."""
    bundles.export(promoted(root, name, revision), root, target)
