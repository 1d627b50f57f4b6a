"""Prefixes on disk: the cells of system prompts, so that a restart need not read them again.

Everything is checked before it is used, and what does not hold is deleted (`prefix_file.py` has the layout of a file). Names
are random: they reveal nothing of a text. Any thread may use `SnapshotStore`; it knows nothing of what the payload means.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from appliance.errors import EnvironmentIncomplete
from appliance.serving import passages, prefix_file
from appliance.serving.decoder import Adapter, SavedCells
from appliance.serving.prefix_file import KEPT_SUFFIX, PARTIAL_SUFFIX, SUFFIX, Refused, fields_of, open_private
from appliance.serving.runs import Finder

FOLDER_MODE = 0o700
KEPT_SECONDS = 7 * 24 * 3600  # without use, then even a protected file of another model gives way

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


class _OfAnother(Exception):
    """A sound file of another model or other settings."""


class _Stopped(Exception):
    """What was being written is to be forgotten."""


class SnapshotStore:
    """The files of one folder, together at most `limit_bytes`; the least recently used go first, protected ones never.

    Raises `EnvironmentIncomplete` when the folder cannot be made private.
    """

    def __init__(self, folder: Path, limit_bytes: int, identity: Identity) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._identity = identity
        self._lock = threading.Lock()
        self._has_warned = False
        self._protected: frozenset[Prefix] | None = None  # None: nobody has said yet
        self._lost: set[Prefix] = set()
        self._banned: Finder | None = None
        self._writing: Prefix | None = None
        self._has_written = threading.Condition(self._lock)
        self._is_stopped = False
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
    def folder(self) -> Path:
        return self._folder

    @property
    def limit_bytes(self) -> int:
        return self._limit_bytes

    def protect(self, prefixes: Collection[Prefix]) -> None:
        """From now on these, and no others of this identity, stay while others have to make room."""
        with self._lock:
            self._protected = frozenset(prefixes)

    def lost(self) -> set[Prefix]:
        """Whose files were found broken or missing since this was last asked."""
        with self._lock:
            lost, self._lost = self._lost, set()
        return lost

    @contextlib.contextmanager
    def banning(self, find: Finder) -> Iterator[None]:
        """Forgets what holds something of what `find` finds; until the end of the block it is not written either.

        The files themselves are the caller's to delete. Waits until what was just being written is given up.
        """
        with self._lock:
            self._banned = find
            known = list(self._paths)  # nothing more of it is written from now on
        banned = [prefix for prefix in known if _is_found(find, prefix)]  # without the lock: requests ask for it
        with self._lock:
            for prefix in banned:
                self._paths.pop(prefix, None)
            self._is_stopped = self._writing is not None and self._is_banned(self._writing)
            self._has_written.wait_for(lambda: self._writing is None or not self._is_stopped)
        try:
            yield
        finally:
            with self._lock:
                self._banned = None

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
            with open_private(path) as file:
                header = self._header(file)
                if header.prefix != prefix:
                    raise Refused("it holds another prefix than at start")
                payload = prefix_file.mapped(file)[header.payload_at :]
            if len(payload) != header.payload_bytes or prefix_file.sha256(payload) != header.payload_sha256:
                raise Refused("its content does not match its checksum")
        except (OSError, Refused, _OfAnother) as error:
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
        with self._lock:
            if self._is_banned(prefix):
                return False
            self._writing, self._is_stopped = prefix, False

        def pause() -> None:
            give_way()
            if self._is_stopped:
                raise _Stopped

        try:
            return self._write(prefix, payload, pause)
        except _Stopped:
            return False
        finally:
            with self._lock:
                self._writing = None
                self._has_written.notify_all()

    def _write(self, prefix: Prefix, payload: SavedCells, give_way: Callable[[], None]) -> bool:
        header = json.dumps(
            {
                **self._key(prefix),
                "tokens": prefix.tokens,
                "payload_bytes": len(payload),
                "payload_sha256": prefix_file.sha256(payload, give_way),
            }
        ).encode()
        front = prefix_file.front_of(header)
        size = len(front) + len(header) + len(payload)
        if size > self._limit_bytes:
            return False
        is_kept = prefix in (self._protected or ())
        path = self._folder / (secrets.token_hex(16) + (KEPT_SUFFIX if is_kept else SUFFIX))
        partial = path.with_suffix(PARTIAL_SUFFIX)
        try:
            with self._lock:
                if not self._make_room(size, is_for_kept=is_kept):
                    return False
            prefix_file.write(partial, (front, header, payload), give_way)
            with self._lock:
                if self._is_stopped or self._is_banned(prefix):
                    raise _Stopped
                partial.rename(path)
                self._paths[prefix] = path
        except OSError as error:
            self._warn(error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        except _Stopped:
            partial.unlink(missing_ok=True)
            raise
        return True

    def _is_banned(self, prefix: Prefix) -> bool:
        return self._banned is not None and _is_found(self._banned, prefix)

    def _forget(self, prefix: Prefix, path: Path, reason: str) -> None:
        with self._lock:
            if self._paths.get(prefix) == path:
                del self._paths[prefix]
                self._lost.add(prefix)
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
                    with open_private(path) as file:
                        header = self._header(file)
                        if os.fstat(file.fileno()).st_size != header.payload_at + header.payload_bytes:
                            raise Refused("it is truncated, or longer than it says")
                    found[header.prefix] = path
                except _OfAnother:
                    continue
                except (OSError, Refused) as error:
                    _discard(path, str(error))
        return found

    def _header(self, file: BinaryIO) -> _Header:
        """Reads and checks everything before the payload."""
        fields, payload_at = fields_of(file)
        try:
            adapter = None if fields["adapter"] is None else Adapter(fields["adapter"]["name"], fields["adapter"]["scale"])
            prefix = Prefix(tuple(fields["tokens"]), adapter, fields["owner"])
            header = _Header(prefix, fields["payload_bytes"], fields["payload_sha256"], payload_at)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("its header lacks what belongs there") from error
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

    def _make_room(self, size: int, *, is_for_kept: bool) -> bool:
        """Deletes the least recently used files, those of other models too, until `size` more bytes are allowed.

        False, and nothing is deleted, where protected ones leave no such room. Those of other models give way to one that
        is to be protected itself, as when another model was promoted, and to any when they were not used for long.
        """
        known = {path: prefix for prefix, path in self._paths.items()}
        oldest = time.time() - KEPT_SECONDS

        def is_protected(path: Path) -> bool:
            if path in known:
                return path.name.endswith(KEPT_SUFFIX) if self._protected is None else known[path] in self._protected
            return path.name.endswith(KEPT_SUFFIX) and not is_for_kept and _used_at(path) > oldest

        def worth(path: Path) -> tuple[bool, float]:
            return path.name.endswith(KEPT_SUFFIX) and path not in known, _used_at(path)

        files = sorted((path for path in self._folder.iterdir() if path.suffix == SUFFIX), key=worth)
        sizes = {path: _size_of(path) for path in files}
        protected = {path for path in files if is_protected(path)}
        if sum(sizes[path] for path in protected) + size > self._limit_bytes:
            return False
        total = sum(sizes.values())
        for path in files:
            if total + size <= self._limit_bytes:
                break
            if path not in protected:
                total -= sizes[path]
                path.unlink(missing_ok=True)
                if path in known:
                    del self._paths[known[path]]
        return True

    def _warn(self, error: OSError) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        remedy = "free disk space or lower snapshot_mib" if error.errno == errno.ENOSPC else "check the folder"
        logger.warning(
            "event=snapshot_not_written folder=%s reason=%r remedy=%r", self._folder, error.strerror or str(error), remedy
        )


def _is_found(find: Finder, prefix: Prefix) -> bool:
    return find(passages.texts(prefix.tokens)) is not None


def _discard(path: Path, reason: str) -> None:
    logger.warning("event=snapshot_deleted file=%s reason=%r", path.name, reason)
    with contextlib.suppress(OSError):  # it is never used again, gone or not
        path.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    now = time.time_ns()  # the kernel's own clock for files has ticks of milliseconds, in which several are read
    with contextlib.suppress(OSError):  # another engine's bound may have taken it
        os.utime(path, ns=(now, now))


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # another engine made room
        return 0


def _used_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
