"""One prefix file: how it is laid out, checked, mapped and written. Knows nothing of what the cells mean.

A file is: magic, length and sha256 of a JSON header, the header (what the cells belong to, token ids, size and sha256 of the
payload), the payload.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import stat
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from appliance.serving.decoder import SavedCells

MAGIC = b"APPLKV\x00\x01"  # the last byte is the version
SUFFIX, PARTIAL_SUFFIX = ".prefix", ".partial"
KEPT_SUFFIX = f".kept{SUFFIX}"  # of files that stay while others make room: engines of other models know them by it
FILE_MODE = 0o600
PIECE_BYTES = 1 << 20  # read or written without a pause
LONGEST_HEADER_BYTES = 16 * 2**20  # a million token ids are 8 MB
_FRONT = struct.Struct("<8sI32s")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Refused(Exception):
    """A file that is not what it should be."""


def told(path: Path) -> Mapping[str, Any] | None:
    """What a file says of itself, whatever it belongs to and even half written; None where it says nothing that holds.

    Raises `OSError` where that cannot be known.
    """
    try:
        with open_private(path) as file:
            fields, _ = fields_of(file)
    except (FileNotFoundError, Refused):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None  # a link is no file of ours
        raise
    is_whole = isinstance(fields.get("tokens"), list) and isinstance(fields.get("model_sha256"), str) and "owner" in fields
    return fields if is_whole else None


def fields_of(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The checked header, and where the payload begins."""
    front = file.read(_FRONT.size)
    if len(front) != _FRONT.size or front[: len(MAGIC)] != MAGIC:
        raise Refused("it is no prefix file of this version")
    _, length, sha256 = _FRONT.unpack(front)
    if length > LONGEST_HEADER_BYTES:
        raise Refused(f"its header claims {length} bytes, the limit is {LONGEST_HEADER_BYTES}")
    text = file.read(length)
    if hashlib.sha256(text).digest() != sha256:
        raise Refused("its header does not match its checksum")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise Refused("its header lacks what belongs there") from error
    if not isinstance(fields, dict):
        raise Refused("its header lacks what belongs there")
    return fields, _FRONT.size + length


def open_private(path: Path) -> BinaryIO:
    """Opens a file that only its owner, who must be this process's user, can have written or read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or mode != FILE_MODE or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise Refused(f"its mode is {mode:04o} and its owner {status.st_uid}, expected 0600 and {os.geteuid()}")
    return os.fdopen(descriptor, "rb")


def mapped(file: BinaryIO) -> memoryview:
    """The file's pages, until nobody holds them any more. Python's own `mmap` would keep the file open meanwhile."""
    size = os.fstat(file.fileno()).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    pages = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, size)
    return np.frombuffer(memoryview(pages), np.uint8).data.toreadonly()


def pieces(data: SavedCells) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES))


def write(path: Path, parts: Sequence[SavedCells], give_way: Callable[[], None]) -> None:
    """Holds a lock on the file meanwhile: `is_being_written`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with contextlib.suppress(OSError):  # where files know no locks, who erases documents takes it for a dead one's
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o600:  # the umask may take away more
            os.fchmod(descriptor, 0o600)
        for view in (piece for part in parts for piece in pieces(part)):
            give_way()
            while view:
                view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def is_being_written(path: Path) -> bool:
    """By a living process, this one or another. Raises `OSError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def front_of(header: bytes) -> bytes:
    """What stands before a header."""
    return _FRONT.pack(MAGIC, len(header), hashlib.sha256(header).digest())


def sha256(data: SavedCells, give_way: Callable[[], None] = lambda: None) -> str:
    found = hashlib.sha256()
    for piece in pieces(data):
        give_way()
        found.update(piece)
    return found.hexdigest()
