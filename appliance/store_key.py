"""The key of the encrypted store: a file of 64 hexadecimal digits that lies apart from the data, readable by its owner only.

It is made once and then only read, so that a restart needs nobody. Knows nothing of the store's contents.
"""

import os
import secrets
import stat
from pathlib import Path

from appliance.errors import EnvironmentIncomplete, StoreError

VARIABLE = "APPLIANCE_KEY_FILE"
KEY_BYTES = 32
FOLDER_MODE, FILE_MODE = 0o700, 0o600
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def create(key_file: Path, store: Path) -> bool:
    """Makes the key of a store that does not exist yet; False when there is a key already.

    Raises `EnvironmentIncomplete` when the store exists: a new key would not open it.
    """
    _require_apart(key_file, store)
    if store.exists() and not key_file.exists():
        raise _missing(key_file, store)
    if key_file.exists():
        return False
    key_file.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    draft = key_file.with_name(f".{key_file.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(KEY_BYTES) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        key_file.hardlink_to(draft)  # whole or not at all, and never over another one
    except FileExistsError:  # another process was faster
        return False
    finally:
        draft.unlink()
    return True


def read(key_file: Path, store: Path) -> str:
    """The key in hexadecimal. Raises `EnvironmentIncomplete` when it is missing, `StoreError` when it is refused."""
    _require_apart(key_file, store)
    try:
        descriptor = os.open(key_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _missing(key_file, store) from None
    except OSError as error:
        raise StoreError(f"{key_file}, the store's key, cannot be read: {error.strerror}; check its owner.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{key_file}, the store's key, is no regular file; name the file with {VARIABLE}.")
        if status.st_mode & OTHERS:
            mode = stat.S_IMODE(status.st_mode)
            raise StoreError(f"{key_file}, the store's key, is open to others (mode {mode:03o}); run: chmod 600 {key_file}")
        text = os.read(descriptor, KEY_BYTES * 4).strip()
    finally:
        os.close(descriptor)
    return _checked(text, key_file)


def _checked(text: bytes, key_file: Path) -> str:
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise StoreError(
            f"{key_file}, the store's key, must hold {KEY_BYTES * 2} hexadecimal digits, as `openssl rand -hex {KEY_BYTES}` "
            f"writes them; it holds {len(text)} characters that are not such a key."
        )
    return key.hex()


def _require_apart(key_file: Path, store: Path) -> None:
    """Whoever copies or backs up the data folder must not get the key with it."""
    data = store.parent.resolve()
    if key_file.resolve().is_relative_to(data):
        raise StoreError(
            f"{key_file}, the store's key, lies in the data folder {data}, where every copy of the data takes it along; "
            f"move it elsewhere and name it with {VARIABLE}."
        )


def _missing(key_file: Path, store: Path) -> EnvironmentIncomplete:
    if store.exists():
        remedy = f"bring back the file that was made with {store}, and name it with {VARIABLE}"
    else:
        remedy = "`appliance keys create` makes it"
    return EnvironmentIncomplete(f"{key_file}, the key of the encrypted store, does not exist; {remedy}.")
