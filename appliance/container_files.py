"""What a container sees of its caller's: the folders with state, files that arguments name, and settings of the environment.

Which engine runs it, and how confined, is not known here. Only the standard library, as in `containers.py`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from appliance import config
from appliance.gpu_access import ARCHITECTURES, OVERRIDE

CARDS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", OVERRIDE)
KEY_FILE = "/data/store.key"  # not in the image's folder for it, which only the image's own user may enter
# Where things lie inside is said by the image and by `settings`; a key for asking is of no use to whoever answers.
NOT_PASSED_ON = frozenset(
    {
        *("APPLIANCE_ARTIFACTS", "APPLIANCE_STORE", "APPLIANCE_KEY_FILE", "APPLIANCE_MAKE_KEYS", "APPLIANCE_CACHE"),
        *("APPLIANCE_LEASES", "APPLIANCE_CONVERTER", "APPLIANCE_API_KEY", ARCHITECTURES),
    }
)
# Of these, what lies beside counts as well: the data that a recipe names, the manifest of a model, its tuned settings.
WITH_ITS_FOLDER = {".toml": "recipe", ".gguf": "given/model"}


def folders(verb: str) -> Mapping[str, Path]:
    """The caller's, by their names inside /data. Leases are those of this machine: a card is held against everybody on it.

    `home` is for what drivers and torch compile for a card and keep: the caller's own, since the image's user owns the rest.
    """
    root, store = config.artifacts_root().resolve(), config.store_file().resolve().parent
    cache = config.cache_root().resolve()
    found = {"artifacts": root, "home": cache / "container-home", "leases": config.lease_folder().resolve()}
    if verb == "serve":
        found["keys"] = config.first_keys_folder().resolve()
        if not store.is_relative_to(root):
            found["store"] = store
    return found


class CallersFiles:
    """The options that bring them in, gathered while arguments are written anew."""

    def __init__(self, verb: str) -> None:
        self._folders = folders(verb)
        self._volumes = [f"{folder}:/data/{name}" for name, folder in self._folders.items()]
        self._settings: dict[str, str | None] = {"HOME": "/data/home", "APPLIANCE_LEASES": "/data/leases"}
        self._given: dict[str, Path] = {}  # by where it lies inside
        if verb == "serve":
            self._volumes.append(f"{config.store_key_file().resolve()}:{KEY_FILE}:ro")
            self._settings["APPLIANCE_KEY_FILE"] = KEY_FILE
        else:
            self._settings["APPLIANCE_MAKE_KEYS"] = ""  # a server that training asks is its own
        if "store" in self._folders:
            self._settings["APPLIANCE_STORE"] = f"/data/store/{config.store_file().name}"

    def word(self, text: str) -> str:
        """An argument, or a value, as it reads inside; a path in it, also behind `key=`, is brought in for reading.

        A word without a slash or a dot is taken for a name, whatever lies in the current folder.
        """
        for start in (0, *(at + 1 for at, letter in enumerate(text) if letter == "=")):
            name = text[start:]
            if ("/" in name or "." in name) and os.path.exists(name):  # noqa: PTH110 - false for what can be no path
                return text[:start] + self._inside(Path(name).resolve())
        return text

    def pass_on(self, environ: Mapping[str, str]) -> None:
        """The appliance's settings and the choice of cards; by name only, so that no command shows a value."""
        for name in sorted(environ):
            if name in CARDS or (name.startswith(config.ENVIRONMENT_PREFIX) and name not in NOT_PASSED_ON):
                value = self.word(environ[name])
                self._settings[name] = None if value == environ[name] else value

    def options(self) -> list[str]:
        volumes = [*self._volumes, *(f"{path}:{place}:ro" for place, path in self._given.items())]
        settings = [name if value is None else f"{name}={value}" for name, value in self._settings.items()]
        return [
            *(part for each in volumes for part in ("--volume", each)),
            *(part for each in settings for part in ("--env", each)),
        ]

    def _inside(self, path: Path) -> str:
        root = self._folders["artifacts"]
        if path.is_relative_to(root):
            return str(Path("/data/artifacts") / path.relative_to(root))
        folder = WITH_ITS_FOLDER.get(path.suffix) if path.is_file() else None
        if folder is None:
            return self._place(path, f"given/{path.name}")
        return f"{self._place(path.parent, folder)}/{path.name}"

    def _place(self, path: Path, name: str) -> str:
        """Two paths of one name get two places, and one path always the same."""
        place, number = f"/{name}", 1
        while self._given.setdefault(place, path) != path:
            number += 1
            place = f"/{name}-{number}"
        return place
