"""Where a base model lies: a folder, or what `appliance pull` fetched of a Hugging Face id. Never downloads."""

from pathlib import Path

from appliance import artifacts
from appliance.errors import EnvironmentIncomplete, RecipeError


def locate(name: str, root: Path) -> Path:
    """The folder of a base model.

    Raises `EnvironmentIncomplete` for an id that was not pulled, `RecipeError` for what is neither folder nor id.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    pulled = find_pulled(name, root)
    if pulled is not None:
        return pulled
    if name.count("/") == 1 and not name.startswith((".", "/")):
        raise EnvironmentIncomplete(f"Base model {name!r} is not here; run `appliance pull {name}` first.")
    raise RecipeError(f"base: {name!r} is neither 'starter', nor a folder, nor an id like organisation/model.")


def find_pulled(name: str, root: Path) -> Path | None:
    """The newest artifact made of this id, at the wanted revision when one is given (`id@revision`)."""
    identifier, _, revision = name.partition("@")
    found = []
    for manifest in root.glob(f"base/*/{artifacts.MANIFEST}"):
        artifact = artifacts.load(manifest.parent)
        inputs = artifact.manifest["inputs"]
        if inputs.get("id") == identifier and revision in ("", inputs.get("revision"), inputs.get("asked_revision")):
            found.append((artifact.manifest["made_at"], artifact.path))
    return max(found)[1] if found else None
