"""The keys of a server that others reach from its first start on: `make` leaves them in files, and only there.

One for asking, readable by the server's user alone; one for Prometheus, which another user has to read.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path

from appliance import artifacts, config, keys, store_key
from appliance.keys import Scope
from appliance.store import Store

LABEL = "made at first start"
FOLDER_MODE = 0o755
FILES: Sequence[tuple[Scope, str, int]] = (("chat", "chat.key", 0o600), ("metrics", "metrics.key", 0o644))


def make(folder: Path, store_file: Path, key_file: Path) -> Sequence[Path]:
    """Makes a key for each scope for which there never was one; returns the files that hold them.

    A key counts from when its file is written: an interruption leaves neither, or a file that is written anew. Raises as
    `Store.open` does.
    """
    store_key.create(key_file, store_file)
    made = []
    with Store.open(store_file, key_file) as store:
        known = {scope for key in keys.list_keys(store) for scope in key.scopes}
        for scope, name, mode in FILES:
            if scope in known or "admin" in known:
                continue
            if not folder.exists():
                folder.mkdir(parents=True)
                folder.chmod(FOLDER_MODE)  # whatever the umask
            keys.create(store, LABEL, [scope], hand_over=functools.partial(_write, folder / name, mode))
            made.append(folder / name)
    return made


def for_asking() -> str | None:
    """The key that `make` left for whoever asks on this machine; None where there is none, or it is another user's."""
    with contextlib.suppress(OSError, ValueError):  # no folder there, or no text in the file
        return (config.first_keys_folder() / "chat.key").read_text().strip()
    return None


def _write(path: Path, mode: int, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w") as stream:
        os.fchmod(stream.fileno(), mode)  # whatever the umask
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    artifacts.flush(path.parent)
