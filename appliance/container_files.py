"""What a container sees of its caller's: the folders with state, files that arguments name, and settings of the environment.

Which engine runs it, and how confined, is not known here. Only the standard library, as in `containers.py`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from appliance import artifacts, config
from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.gpu_access import ARCHITECTURES, OVERRIDE

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
CARDS = frozenset({*VISIBLE, "CUDA_DEVICE_ORDER", OVERRIDE})
KEY_FILE = "/data/store.key"  # not in the image's folder for it, which only the image's own user may enter
# Where things lie inside is said by the image and by `settings`; a key for asking is of no use to whoever answers.
NOT_PASSED_ON = frozenset(
    {
        *("APPLIANCE_ARTIFACTS", "APPLIANCE_STORE", "APPLIANCE_KEY_FILE", "APPLIANCE_MAKE_KEYS", "APPLIANCE_CACHE"),
        *("APPLIANCE_LEASES", "APPLIANCE_CONVERTER", "APPLIANCE_API_KEY", ARCHITECTURES),
    }
)
METRICS = "APPLIANCE_METRICS_"  # of a training run, which has no network in there to be asked over
MOUNT_POINT = "lost+found"  # ext4's, in a disk that is mounted for the store


def folders(verb: str) -> Mapping[str, Path]:
    """The caller's, by their names inside /data. Leases are those of this machine: a card is held against everybody on it.

    `home` is for what drivers and torch compile for a card and keep: the caller's own, since the image's user owns the rest.
    """
    root, store = config.artifacts_root().resolve(), config.store_file().resolve()
    cache = config.cache_root().resolve()
    found = {"artifacts": root, "home": cache / "container-home", "leases": config.lease_folder().resolve()}
    if verb == "serve":
        found["keys"] = config.first_keys_folder().resolve()
        if not store.is_relative_to(root):
            found["store"] = _of_its_own(store)
    return found


def _of_its_own(store: Path) -> Path:
    """The store's folder, which a server may write, with the files that SQLite makes beside it.

    Raises `RecipeError` where it holds more than that, `EnvironmentIncomplete` where that cannot be seen.
    """
    folder = store.parent
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise EnvironmentIncomplete(
            f"{folder}, the store's folder, cannot be read by user {os.getuid()} ({error.strerror}); name one that he may "
            "write with APPLIANCE_STORE."
        ) from error
    others = [name for name in names if not name.startswith(store.name) and name != MOUNT_POINT]
    if others or _holds_secrets(folder):
        beside = others[0] if others else "what is yours alone"
        raise RecipeError(
            f"A container may write all of {folder}, where APPLIANCE_STORE={store} lies beside {beside}; move the store "
            "into a folder of its own, name it there with APPLIANCE_STORE, or choose ENGINE=none, which uses .venv."
        )
    return folder


def _holds_secrets(folder: Path) -> bool:
    """The store's key, or all that is the caller's."""
    secrets = (config.store_key_file().resolve(), Path.home().resolve())
    return any(each.is_relative_to(folder) for each in secrets)


class CallersFiles:
    """The options that bring them in, gathered while arguments are written anew."""

    def __init__(self, verb: str) -> None:
        """Raises `RecipeError` for a store that cannot be brought in without what lies beside it."""
        self._verb = verb
        self._folders = folders(verb)
        self._settings: dict[str, str | None] = {"HOME": "/data/home", "APPLIANCE_LEASES": "/data/leases"}
        self._given: dict[str, Path] = {}  # by where it lies inside
        if verb == "serve":
            self._given[KEY_FILE] = config.store_key_file().resolve()
            self._settings["APPLIANCE_KEY_FILE"] = KEY_FILE
            store, root = config.store_file().resolve(), self._folders["artifacts"]
            where = "store" if "store" in self._folders else Path("artifacts") / store.parent.relative_to(root)
            self._settings["APPLIANCE_STORE"] = f"/data/{where}/{store.name}"
        else:
            self._settings["APPLIANCE_MAKE_KEYS"] = ""  # a server that training asks is its own

    def word(self, text: str) -> str:
        """An argument, or a value, as it reads inside; a path in it, also behind `key=`, is brought in for reading.

        A word without a slash or a dot is taken for a name, whatever lies in the current folder. Raises `RecipeError`.
        """
        for start in (0, *(at + 1 for at, letter in enumerate(text) if letter == "=")):
            name = text[start:]
            if ("/" in name or "." in name) and os.path.exists(name):  # noqa: PTH110 - false for what can be no path
                return text[:start] + self._inside(Path(name))
        return text

    def pass_on(self, environ: Mapping[str, str]) -> None:
        """The appliance's settings and the choice of cards; by name only, so that no command shows a value."""
        for name in sorted(environ):
            if self._verb == "train" and name.startswith(METRICS):
                continue
            if name in CARDS or (name.startswith(config.ENVIRONMENT_PREFIX) and name not in NOT_PASSED_ON):
                value = self.word(environ[name])
                self._settings[name] = None if value == environ[name] else value

    def options(self) -> list[str]:
        """Raises `RecipeError` for a path that `--volume` cannot say."""
        volumes = [(path, f"/data/{name}", "") for name, path in self._folders.items()]
        volumes += [(path, place, ":ro") for place, path in self._given.items()]
        for path, place, _ in volumes:
            if ":" in f"{path}{place}":
                message = f"{path} has a colon in its name, where `--volume` of docker and podman would cut it"
                raise RecipeError(f"{message}; rename it, or choose ENGINE=none, which uses .venv.")
        settings = [name if value is None else f"{name}={value}" for name, value in self._settings.items()]
        return [
            *(part for path, place, mode in volumes for part in ("--volume", f"{path}:{place}{mode}")),
            *(part for each in settings for part in ("--env", each)),
        ]

    def _inside(self, named: Path) -> str:
        """A file that is a link keeps its name: what it points to may be called by its sha256 alone."""
        path, root = named.resolve(), self._folders["artifacts"]
        if path.is_relative_to(root):
            return str(Path("/data/artifacts") / path.relative_to(root))
        if not path.is_file():
            return self._folder(path, f"given/{path.name}")
        if named.suffix == ".gguf":
            return self._model(named.parent.resolve() / named.name, path)
        if path.suffix == ".toml":  # with the data that it names
            return f"{self._folder(path.parent, 'recipe')}/{path.name}"
        return self._place(path, f"given/{named.name}")

    def _model(self, named: Path, path: Path) -> str:
        """With its folder if that is an artifact, whose files are all checked; else with its tuned settings alone."""
        if (named.parent / artifacts.MANIFEST).is_file():
            return f"{self._folder(named.parent, 'given/artifact')}/{named.name}"
        place = self._place(path, "given/model", f"/{named.name}")
        tuned = named.with_name(named.name + artifacts.TUNED)
        if tuned.is_file():
            self._given[place + artifacts.TUNED] = tuned.resolve()
        return place

    def _folder(self, path: Path, name: str) -> str:
        if _holds_secrets(path):
            raise RecipeError(
                f"All of {path} would be readable in the container, with the store's key or all that is yours; move what "
                "you named into a folder of its own, or choose ENGINE=none, which uses .venv."
            )
        return self._place(path, name)

    def _place(self, path: Path, name: str, tail: str = "") -> str:
        """Two paths of one name get two places, and one path always the same."""
        place, number = f"/{name}{tail}", 1
        while self._given.setdefault(place, path) != path:
            number += 1
            place = f"/{name}-{number}{tail}"
        return place
