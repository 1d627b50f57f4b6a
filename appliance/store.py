"""The encrypted SQLite file that holds what is not an artifact: API keys now; knowledge, desk and audit in later migrations.

`Store.open` is the entry. Every page and the write-ahead log are encrypted and authenticated (ChaCha20-Poly1305, SQLite3
Multiple Ciphers) with a random 256-bit key from a file that lies elsewhere, so that a copied data folder says nothing. The
schema is made by numbered migrations that are only ever appended. Knows nothing of what the tables mean. The only file
that imports apsw, whose errors it translates.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw

from appliance import store_key
from appliance.errors import EnvironmentIncomplete, StoreError

BUSY_MILLISECONDS = 5000
FILE_MODE = 0o600
Row = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema. A released step is never changed: its checksum stands in every store."""

    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        "api keys",
        """
        CREATE TABLE api_keys (
            id TEXT PRIMARY KEY,
            label TEXT NOT NULL,
            scopes TEXT NOT NULL,
            digest BLOB NOT NULL UNIQUE,
            last4 TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            expires_at INTEGER,
            revoked_at INTEGER
        ) STRICT
        """,
    ),
)
LEDGER = """
    CREATE TABLE IF NOT EXISTS migrations (
        number INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at INTEGER NOT NULL
    ) STRICT
"""


class Store:
    """An open store. A statement runs in one thread at a time; other processes may use the same file."""

    def __init__(self, path: Path, connection: apsw.Connection) -> None:
        self.path = path
        self._connection = connection
        self._identity = _identity(path)

    @classmethod
    def open(
        cls,
        path: Path,
        key_file: Path,
        *,
        migrations: Sequence[Migration] = MIGRATIONS,
        busy_milliseconds: int = BUSY_MILLISECONDS,
    ) -> "Store":
        """Opens the store, or makes it, and brings its schema up to date.

        Raises `StoreError` when the key is refused or wrong, the file is damaged or locked, or a newer version made it;
        `EnvironmentIncomplete` when the key is missing or the disk is full.
        """
        key = store_key.read(key_file, path)
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch(FILE_MODE)  # before SQLite does it with a wider mode; the log inherits this one
            connection = apsw.Connection(str(path))
            try:
                connection.set_busy_timeout(busy_milliseconds)
                _unlock(path, connection, key)
                _migrate(path, connection, migrations)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Runs one statement; its rows."""
        with _translated(self.path):
            return list(self._connection.execute(sql, values))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside are kept, or none."""
        with _translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:  # SQLite ends it itself when the disk is full
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @property
    def changes(self) -> int:
        """A number that is another one once another connection has changed the store."""
        return int(self.rows("PRAGMA data_version")[0][0])

    @property
    def is_replaced(self) -> bool:
        """Whether another file lies at the store's path by now, as after a restore."""
        try:
            return _identity(self.path) != self._identity
        except FileNotFoundError:
            return False

    def check_integrity(self) -> None:
        """Reads every page. Raises `StoreError` when one is damaged."""
        found = [str(row[0]) for row in self.rows("PRAGMA integrity_check")]
        if found != ["ok"]:
            raise _damaged(self.path, found[0])

    def close(self) -> None:
        with _translated(self.path):
            self._connection.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unlock(path: Path, connection: apsw.Connection, key: str) -> None:
    connection.pragma("cipher", "chacha20")
    connection.pragma("key", f"raw:{key}")  # random already: a slow derivation would add nothing
    try:
        connection.table_exists(None, "migrations")  # the first look at a page
    except apsw.NotADBError as error:
        raise StoreError(
            f"{path} cannot be opened with this key: it was made with another one, or its first page is damaged. Name the "
            f"right file with {store_key.VARIABLE}, or restore a backup of the store together with its key."
        ) from error
    if connection.pragma("journal_mode", "wal") != "wal":
        raise StoreError(
            f"{path} lies on a file system without shared memory between processes (a network drive?); move it to a local "
            "disk and name it with APPLIANCE_STORE."
        )
    connection.pragma("synchronous", "FULL")  # a revoked key stays revoked when the power fails
    connection.pragma("secure_delete", "ON")
    connection.pragma("foreign_keys", "ON")
    connection.pragma("temp_store", "MEMORY")  # temporary files would not be encrypted
    connection.pragma("trusted_schema", "OFF")
    connection.pragma("cell_size_check", "ON")


def _migrate(path: Path, connection: apsw.Connection, migrations: Sequence[Migration]) -> None:
    """Appends what is missing, in one transaction; another process that does the same waits and finds nothing left."""
    if _applied(path, connection, migrations) == len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(LEDGER)
        done = _applied(path, connection, migrations)
        for number, migration in enumerate(migrations[done:], done + 1):
            connection.execute(migration.sql)
            row = (number, migration.name, migration.checksum, int(time.time()))
            connection.execute("INSERT INTO migrations VALUES (?, ?, ?, ?)", row)
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _applied(path: Path, connection: apsw.Connection, migrations: Sequence[Migration]) -> int:
    """How many migrations the store has; raises `StoreError` unless they are the first of ours."""
    if not connection.table_exists(None, "migrations"):
        return 0
    applied = list(connection.execute("SELECT number, checksum FROM migrations ORDER BY number"))
    ours = [(number, each.checksum) for number, each in enumerate(migrations, 1)]
    if applied[: len(ours)] == ours[: len(applied)]:
        if len(applied) <= len(ours):
            return len(applied)
        raise StoreError(
            f"{path} has schema {len(applied)}, this version knows {len(ours)}; install the newer version again."
        )
    wrong = next(number for number, (one, other) in enumerate(zip(applied, ours, strict=False), 1) if one != other)
    raise StoreError(f"{path}: migration {wrong} is not the one of this version; open it with the version that made it.")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _damaged(path: Path, detail: object) -> StoreError:
    return StoreError(f"{path} is damaged ({detail}); restore it from a backup, with the key that the backup was made with.")


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors, by type, in the appliance's words."""
    try:
        yield
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise _damaged(path, error) from error
    except (apsw.BusyError, apsw.LockedError) as error:
        raise StoreError(f"{path} is locked by another process for too long; end that process and repeat.") from error
    except apsw.FullError as error:
        raise EnvironmentIncomplete(f"No space left on the device while writing {path}; free some and repeat.") from error
    except (apsw.CantOpenError, apsw.ReadOnlyError, apsw.IOError, apsw.PermissionsError) as error:
        raise StoreError(
            f"{path} cannot be read or written ({error}); check its permissions and those of its folder."
        ) from error
