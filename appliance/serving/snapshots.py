"""Prefixes on disk: the cells of system prompts, so that a restart need not read them again.

A file is: magic, length and sha256 of a JSON header, the header (what the cells belong to, token ids, size and sha256 of the
payload), the payload. Everything is checked before it is used, and what does not hold is deleted. Names are random: they
reveal nothing of a text. Any thread may use `SnapshotStore`; it knows nothing of what the payload means.
"""

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import logging
import mmap
import os
import secrets
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from appliance.errors import EnvironmentIncomplete
from appliance.serving.decoder import Adapter, SavedCells

MAGIC = b"APPLKV\x00\x01"  # the last byte is the version
SUFFIX = ".prefix"
FOLDER_MODE, FILE_MODE = 0o700, 0o600
PARTIAL_SUFFIX = ".partial"
PIECE_BYTES = 1 << 20  # read or written without a pause
LONGEST_HEADER_BYTES = 16 * 2**20  # a million token ids are 8 MB
_FRONT = struct.Struct("<8sI32s")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of prompts, as a model with this adapter reads it. Without an owner it is the operator's own text."""

    tokens: tuple[int, ...]
    adapter: Adapter | None = None
    owner: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What cells depend on beside their tokens; files of another identity are left alone and never used."""

    model_sha256: str
    template_sha256: str
    kv_type: str
    layout: str  # whatever else decides how cells look: flash attention, version of the library
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name to sha256


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    prefix: Prefix
    payload_bytes: int
    payload_sha256: str
    payload_at: int


class _Refused(Exception):
    """A file that is not what it should be."""


class _OfAnother(Exception):
    """A sound file of another model or other settings."""


class SnapshotStore:
    """The files of one folder, together at most `limit_bytes`; the least recently used go first.

    Raises `EnvironmentIncomplete` when the folder cannot be made private.
    """

    def __init__(self, folder: Path, limit_bytes: int, identity: Identity) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._identity = identity
        self._lock = threading.Lock()
        self._has_warned = False
        try:
            folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            if stat.S_IMODE(folder.stat().st_mode) != FOLDER_MODE:
                folder.chmod(FOLDER_MODE)  # only then: a confined process may not change modes
            self._paths = self._scan()
        except OSError as error:
            raise EnvironmentIncomplete(
                f"{folder} cannot be used for prefixes ({error.strerror}); it must be a folder of this user's "
                "with mode 0700. Mend it, or set snapshot_mib = 0 to keep no prefixes."
            ) from error

    @property
    def limit_bytes(self) -> int:
        return self._limit_bytes

    def prefixes(self) -> list[Prefix]:
        """What can be read, most recently used first."""
        with self._lock:
            return sorted(self._paths, key=lambda prefix: -_used_at(self._paths[prefix]))

    def __contains__(self, prefix: Prefix) -> bool:
        with self._lock:
            return prefix in self._paths

    def longest(self, adapter: Adapter | None, owner: str | None, tokens: Sequence[int]) -> Prefix | None:
        """The longest one with which `tokens` begin and that `owner` may use."""
        begun = tuple(tokens)
        with self._lock:
            usable = [each for each in self._paths if each.adapter == adapter and each.owner in (None, owner)]
        fitting = (each for each in usable if begun[: len(each.tokens)] == each.tokens)
        return max(fitting, key=lambda each: len(each.tokens), default=None)

    def read(self, prefix: Prefix) -> SavedCells | None:
        """The checked payload; None, and the file is gone, when it does not hold. Takes a while, and holds nobody up.

        It stays in the file's pages: a copy of a hundred megabytes is in no plan of memory. Files are only ever unlinked.
        """
        with self._lock:
            path = self._paths.get(prefix)
        if path is None:
            return None
        try:
            with _open(path) as file:
                header = self._header(file)
                if header.prefix != prefix:
                    raise _Refused("it holds another prefix than at start")
                payload = _mapped(file)[header.payload_at :]
            if len(payload) != header.payload_bytes or _sha256(payload) != header.payload_sha256:
                raise _Refused("its content does not match its checksum")
        except (OSError, _Refused, _OfAnother) as error:
            self._forget(prefix, path, str(error))
            return None
        _touch(path)
        return payload

    def discard(self, prefix: Prefix, reason: str) -> None:
        with self._lock:
            path = self._paths.get(prefix)
        if path is not None:
            self._forget(prefix, path, reason)

    def touch(self, prefix: Prefix) -> None:
        """Notes that the prefix was used."""
        with self._lock:
            if prefix in self._paths:
                _touch(self._paths[prefix])

    def write(self, prefix: Prefix, payload: SavedCells, give_way: Callable[[], None] = lambda: None) -> bool:
        """Whether it was kept. A full disk is said once; serving goes on without the file.

        `give_way` is called between pieces: it may wait until nobody is held up by the writing.
        """
        header = json.dumps(
            {
                **self._key(prefix),
                "tokens": prefix.tokens,
                "payload_bytes": len(payload),
                "payload_sha256": _sha256(payload, give_way),
            }
        ).encode()
        front = _FRONT.pack(MAGIC, len(header), hashlib.sha256(header).digest())
        size = len(front) + len(header) + len(payload)
        if size > self._limit_bytes:
            return False
        path = self._folder / (secrets.token_hex(16) + SUFFIX)
        partial = path.with_suffix(PARTIAL_SUFFIX)
        try:
            with self._lock:
                self._make_room(size)
            _write(partial, (front, header, payload), give_way)
            with self._lock:
                partial.rename(path)
                self._paths[prefix] = path
        except OSError as error:
            self._warn(error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        return True

    def _forget(self, prefix: Prefix, path: Path, reason: str) -> None:
        with self._lock:
            if self._paths.get(prefix) == path:
                del self._paths[prefix]
        _discard(path, reason)

    def _scan(self) -> dict[Prefix, Path]:
        """The usable files, by what they hold; deletes those that are broken or half written."""
        found: dict[Prefix, Path] = {}
        for path in sorted(self._folder.iterdir()):
            if path.suffix == PARTIAL_SUFFIX:
                # Another engine may be writing it now; it would not take an hour.
                if time.time() - path.lstat().st_mtime > 3600:
                    _discard(path, "its writing was interrupted")
            elif path.suffix == SUFFIX:
                try:
                    with _open(path) as file:
                        header = self._header(file)
                        if os.fstat(file.fileno()).st_size != header.payload_at + header.payload_bytes:
                            raise _Refused("it is truncated, or longer than it says")
                    found[header.prefix] = path
                except _OfAnother:
                    continue
                except (OSError, _Refused) as error:
                    _discard(path, str(error))
        return found

    def _header(self, file: BinaryIO) -> _Header:
        """Reads and checks everything before the payload."""
        front = file.read(_FRONT.size)
        if len(front) != _FRONT.size or front[: len(MAGIC)] != MAGIC:
            raise _Refused("it is no prefix file of this version")
        _, length, sha256 = _FRONT.unpack(front)
        if length > LONGEST_HEADER_BYTES:
            raise _Refused(f"its header claims {length} bytes, the limit is {LONGEST_HEADER_BYTES}")
        text = file.read(length)
        if hashlib.sha256(text).digest() != sha256:
            raise _Refused("its header does not match its checksum")
        try:
            fields = json.loads(text)
            adapter = None if fields["adapter"] is None else Adapter(fields["adapter"]["name"], fields["adapter"]["scale"])
            prefix = Prefix(tuple(fields["tokens"]), adapter, fields["owner"])
            header = _Header(prefix, fields["payload_bytes"], fields["payload_sha256"], _FRONT.size + length)
        except (KeyError, TypeError, ValueError) as error:
            raise _Refused("its header lacks what belongs there") from error
        key = self._key(prefix)
        if {name: fields.get(name) for name in key} != key:
            raise _OfAnother("it belongs to another model or other settings")
        return header

    def _key(self, prefix: Prefix) -> dict[str, Any]:
        identity, adapter = self._identity, prefix.adapter
        return {
            "model_sha256": identity.model_sha256,
            "template_sha256": identity.template_sha256,
            "kv_type": identity.kv_type,
            "layout": identity.layout,
            "adapter": None
            if adapter is None
            else {"name": adapter.name, "scale": adapter.scale, "sha256": identity.adapters.get(adapter.name)},
            "owner": prefix.owner,
        }

    def _make_room(self, size: int) -> None:
        """Deletes the least recently used files, those of other models too, until `size` more bytes are allowed."""
        files = sorted((path for path in self._folder.iterdir() if path.suffix == SUFFIX), key=_used_at)
        total = sum(path.lstat().st_size for path in files)
        for path in files:
            if total + size <= self._limit_bytes:
                return
            total -= path.lstat().st_size
            path.unlink(missing_ok=True)
            self._paths = {prefix: each for prefix, each in self._paths.items() if each != path}

    def _warn(self, error: OSError) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        remedy = "free disk space or lower snapshot_mib" if error.errno == errno.ENOSPC else "check the folder"
        logger.warning(
            "event=snapshot_not_written folder=%s reason=%r remedy=%r", self._folder, error.strerror or str(error), remedy
        )


def _open(path: Path) -> BinaryIO:
    """Opens a file that only its owner, who must be this process's user, can have written or read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or mode != FILE_MODE or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise _Refused(f"its mode is {mode:04o} and its owner {status.st_uid}, expected 0600 and {os.geteuid()}")
    return os.fdopen(descriptor, "rb")


def _mapped(file: BinaryIO) -> memoryview:
    """The file's pages, until nobody holds them any more. Python's own `mmap` would keep the file open meanwhile."""
    size = os.fstat(file.fileno()).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    pages = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, size)
    return np.frombuffer(memoryview(pages), np.uint8).data.toreadonly()


def _pieces(data: SavedCells) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES))


def _write(path: Path, parts: Sequence[SavedCells], give_way: Callable[[], None]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o600:  # the umask may take away more
            os.fchmod(descriptor, 0o600)
        for view in (piece for part in parts for piece in _pieces(part)):
            give_way()
            while view:
                view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _discard(path: Path, reason: str) -> None:
    logger.warning("event=snapshot_deleted file=%s reason=%r", path.name, reason)
    with contextlib.suppress(OSError):  # it is never used again, gone or not
        path.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # another engine's bound may have taken it
        os.utime(path)


def _used_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sha256(data: SavedCells, give_way: Callable[[], None] = lambda: None) -> str:
    found = hashlib.sha256()
    for piece in _pieces(data):
        give_way()
        found.update(piece)
    return found.hexdigest()
