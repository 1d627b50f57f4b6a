"""API keys: made, listed and revoked in the store, and looked up by a running server.

A key is 256 random bits, shown once. The store has its sha256 only, and a plain hash is enough: nobody can try out 2^256
keys, so a slow one would only slow down every request. Knows nothing of HTTP.
"""

import dataclasses
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from appliance.errors import ApplianceError, RecipeError
from appliance.store import Row, Store

Scope = Literal["chat", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "ak_"
RANDOM_BYTES = 32
MAX_LABEL_CHARACTERS = 64
MAX_LIFETIME_DAYS = 3650
LIFETIME = re.compile(r"([0-9]{1,6})([hdw])")
UNIT_SECONDS = {"h": 3600, "d": 86400, "w": 604800}
REFRESH_SECONDS = 1.0
BUSY_MILLISECONDS = 250  # the server's event loop waits that long at most
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of a key; times are seconds since the epoch."""

    id: str
    label: str
    scopes: frozenset[Scope]
    last4: str
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def is_active(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def create(
    store: Store,
    label: str,
    scopes: Sequence[Scope],
    lifetime_seconds: int | None = None,
    hand_over: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> tuple[Key, str]:
    """A new key and its text, which nobody can ask for again. It is valid once `hand_over` has taken the text."""
    text = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    now = int(time.time())
    key = Key(
        id=f"key-{secrets.token_hex(6)}",
        label=checked_label(label),
        scopes=frozenset(scopes),
        last4=text[-4:],
        created_at=now,
        expires_at=None if lifetime_seconds is None else now + lifetime_seconds,
    )
    with store.transaction():
        store.rows(
            "INSERT INTO api_keys (id, label, scopes, digest, last4, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key.id, key.label, " ".join(sorted(key.scopes)), _digest(text), key.last4, key.created_at, key.expires_at),
        )
        hand_over(text)
    return key, text


def list_keys(store: Store) -> list[Key]:
    """All keys ever made, the newest last."""
    return [key for key, _ in _read(store)]


def revoke(store: Store, key_id: str) -> Key:
    """Ends a key for good; one that is revoked already stays as it is. Raises `RecipeError` for an unknown id."""
    with store.transaction():
        store.rows("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (int(time.time()), key_id))
        found = [key for key in list_keys(store) if key.id == key_id]
    if not found:
        raise unknown(key_id)
    return found[0]


def unknown(key_id: str) -> RecipeError:
    return RecipeError(f"There is no key {key_id[:80]!r}; `appliance keys list` shows the ids.")


def checked_label(label: str) -> str:
    label = label.strip()
    if not label or len(label) > MAX_LABEL_CHARACTERS or not label.isprintable():
        raise RecipeError(f"--label: {label[:80]!r} must be 1 to {MAX_LABEL_CHARACTERS} printable characters.")
    return label


def lifetime_seconds(text: str) -> int:
    """`90d`, `12h` or `2w` in seconds."""
    match = LIFETIME.fullmatch(text)
    seconds = int(match[1]) * UNIT_SECONDS[match[2]] if match else 0
    if not 0 < seconds <= MAX_LIFETIME_DAYS * UNIT_SECONDS["d"]:
        raise RecipeError(
            f"--expires: {text[:80]!r} is no time up to {MAX_LIFETIME_DAYS}d; write a number and h, d or w, such as 90d."
        )
    return seconds


class KeyBook:
    """The keys of a store as a running server needs them: looked up in memory, read again when the store has changed.

    A store that cannot be read later on keeps what was read last; one that cannot be read at first is an error, never "no
    keys". A store that does not exist has none, and is found as soon as it appears. Used from one thread.
    """

    def __init__(
        self, path: Path, key_file: Path, *, clock: Callable[[], float] = time.time, refresh_seconds: float = REFRESH_SECONDS
    ) -> None:
        """Opens the store if there is one, and checks every page of it. Raises as `Store.open` does."""
        self._path, self._key_file = path, key_file
        self._clock, self._refresh_seconds = clock, refresh_seconds
        self._store: Store | None = None
        self._changes: int | None = None
        self._keys: tuple[tuple[Key, bytes], ...] = ()
        self._next_refresh = 0.0
        self._is_failing = False
        self._refresh()

    @property
    def is_required(self) -> bool:
        """Whether a key was ever made: then nobody gets in without one, although all may have ended."""
        self._refresh_sometimes()
        return bool(self._keys)

    @property
    def has_active(self) -> bool:
        now = self._clock()
        return any(key.is_active(now) for key, _ in self._keys)

    def find(self, text: str) -> Key | None:
        """The active key with this text. Takes as long for a wrong one as for a right one."""
        self._refresh_sometimes()
        digest, found = _digest(text), None
        for key, known in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found if found is not None and found.is_active(self._clock()) else None

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _refresh_sometimes(self) -> None:
        if time.monotonic() < self._next_refresh:
            return
        try:
            self._refresh()
            self._is_failing = False
        except (ApplianceError, OSError) as error:
            if not self._is_failing:
                _log.error("event=keys_not_read store=%s error=%s", self._path, error)
            self._is_failing = True
            if self._store is None:
                raise
            self._next_refresh = time.monotonic() + self._refresh_seconds

    def _refresh(self) -> None:
        if self._store is not None and self._store.is_replaced:
            opened = self._open()
            self._store.close()
            self._store, self._changes = opened, None
        elif self._store is None and self._path.exists():
            self._store = self._open()
        if self._store is not None and (changes := self._store.changes) != self._changes:
            self._keys = tuple(_read(self._store))
            self._changes = changes
        self._next_refresh = time.monotonic() + self._refresh_seconds

    def _open(self) -> Store:
        store = Store.open(self._path, self._key_file, busy_milliseconds=BUSY_MILLISECONDS)
        try:
            store.check_integrity()
        except BaseException:
            store.close()
            raise
        return store


def _read(store: Store) -> list[tuple[Key, bytes]]:
    columns = "id, label, scopes, digest, last4, created_at, expires_at, revoked_at"
    return [_key(row) for row in store.rows(f"SELECT {columns} FROM api_keys ORDER BY created_at, rowid")]


def _key(row: Row) -> tuple[Key, bytes]:
    id_, label, scopes, digest, last4, created_at, expires_at, revoked_at = row
    known: frozenset[Scope] = frozenset(each for each in SCOPES if each in scopes.split())
    times = {"created_at": created_at, "expires_at": expires_at, "revoked_at": revoked_at}
    return Key(id=id_, label=label, scopes=known, last4=last4, **times), digest


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
