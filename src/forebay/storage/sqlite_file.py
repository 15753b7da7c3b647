"""A SQLite file: opening it, knowing it for ours, and saying what is wrong with it."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forebay.errors import StoreUnavailable
from forebay.storage.url import Synchronous

_OLDEST = (3, 35, 0)  # UPDATE ... RETURNING
_LOG_KEPT = 64 << 20  # bytes of write-ahead log that stay on disk after a checkpoint
_CACHE = 32 << 10  # KiB of pages kept in memory
_PAUSE = 0.01  # seconds between two tries at what SQLite itself does not wait for

# Where a write-ahead log breaks: its index is shared memory, which two machines do not share.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|fuse\.(sshfs|ceph\S*|glusterfs|s3\S*|gcsfuse|rclone)"
)
_MOUNTS = Path("/proc/mounts")

# By primary result code: why, and what to do.
_ADVICE = {
    sqlite3.SQLITE_BUSY: (
        "another process has been writing to it for too long",
        "Find who holds it (fuser FILE), or give each process a file of its own.",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "it cannot be opened",
        "Check that it is a file and that this user may read and write it and its directory.",
    ),
    sqlite3.SQLITE_CORRUPT: (
        "the file is damaged",
        "Move it and its -wal and -shm aside; `sqlite3 FILE .recover` saves what can be saved.",
    ),
    sqlite3.SQLITE_FULL: ("the disk is full", "Make room, or move the file to a larger disk."),
    sqlite3.SQLITE_IOERR: (
        "the disk failed to read or write",
        "Look into the system's log, and move the file to a sound disk.",
    ),
    sqlite3.SQLITE_NOTADB: ("the file is not a SQLite database", "Name another file, or move this one aside."),
    sqlite3.SQLITE_PERM: (
        "access was refused",
        "Give this user the right to read and write the file and its directory.",
    ),
    sqlite3.SQLITE_READONLY: ("it may not be written", "Give this user the right to write the file and its directory."),
}


@dataclass(frozen=True, slots=True)
class Schema:
    """What stands in a file.

    Attributes:
        application: the number in the file's header that says whose it is.
        migrations: scripts, the n-th of which leads from version n to n + 1. What was once released is never edited.
    """

    application_id: int
    migrations: tuple[tuple[str, ...], ...]

    @property
    def version(self) -> int:
        """The version that this code writes."""
        return len(self.migrations)


def open_file(path: Path, schema: Schema, synchronous: Synchronous, busy_timeout: float) -> sqlite3.Connection:
    """A connection to the file at `path`, made if need be, with its schema up to date. Blocks.

    Raises:
        LedgerUnusable: it cannot be had.
    """
    if sqlite3.sqlite_version_info < _OLDEST:
        why = f"this Python's SQLite is {sqlite3.sqlite_version}, and 3.35 is needed"
        raise StoreUnavailable(where=str(path), why=why, advice="Use a newer Python, or another overflow.")
    if not path.parent.is_dir():
        raise StoreUnavailable(
            where=str(path), why="its directory is not there", advice=f"Make it: mkdir -p {path.parent}"
        )
    kind = filesystem_type(path.parent.resolve(), _mounts())
    if _NETWORK.fullmatch(kind):
        why = f"it lies on a network filesystem ({kind}), where a write-ahead log gets damaged"
        raise StoreUnavailable(
            where=str(path), why=why, advice="Put it on a local disk, or share an overflow over Redis."
        )
    try:
        # Statements are kept prepared. Transactions are the writer's to begin, hence no isolation level.
        connection = sqlite3.connect(
            path, timeout=busy_timeout, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            _prepare(connection, path, schema, synchronous, busy_timeout)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise diagnose(error, path) from error
    return connection


def _prepare(
    connection: sqlite3.Connection, path: Path, schema: Schema, synchronous: Synchronous, patience: float
) -> None:
    with _transaction(connection, "BEGIN"):  # before anything is changed in a file that may be somebody else's
        _check_ours(connection, path, schema)
    mode = _write_ahead(connection, patience)
    if mode != "wal":
        why = f"it cannot keep a write-ahead log there, only a journal of kind {mode!r}"
        raise StoreUnavailable(where=str(path), why=why, advice="Put it on a local disk.")
    connection.execute(f"PRAGMA synchronous = {synchronous.value}")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_KEPT}")
    connection.execute(f"PRAGMA cache_size = -{_CACHE}")
    with _transaction(connection, "BEGIN IMMEDIATE"):
        _migrate(connection, path, schema)


def _write_ahead(connection: sqlite3.Connection, patience: float) -> str:
    """Ask for a write-ahead log; the kind of journal that there is then.

    The switch wants the file to itself, and two that want it at once would wait for each other: so SQLite fails one of
    them without a wait.
    """
    for _ in range(int(patience / _PAUSE)):
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY:
                raise
        threading.Event().wait(_PAUSE)
    return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _check_ours(connection: sqlite3.Connection, path: Path, schema: Schema) -> int:
    """The schema's version in the file; 0 if it is new."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == schema.application_id:
        if version > schema.version:
            why = f"a newer Forebay wrote it (schema {version}; this one knows {schema.version})"
            raise StoreUnavailable(where=str(path), why=why, advice="Upgrade Forebay here, or name another file.")
        return int(version)
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application or version or tables:
        why = "it is a database of something else"
        raise StoreUnavailable(where=str(path), why=why, advice="Name another file; Forebay makes it.")
    return 0


def _migrate(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    version = _check_ours(connection, path, schema)  # again: now nobody else can be at it
    if version == schema.version:
        return
    for script in schema.migrations[version:]:
        for statement in script:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {schema.application_id}")
    connection.execute(f"PRAGMA user_version = {schema.version}")


def diagnose(error: BaseException, path: Path) -> BaseException:
    """What to raise: LedgerUnusable with advice if the file failed, the error itself if the operation did."""
    own = sqlite3.IntegrityError | sqlite3.ProgrammingError
    if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, own):
        return error
    why, advice = _ADVICE.get(_code(error), (str(error), "Look at the file with the sqlite3 command."))
    unusable = StoreUnavailable(where=str(path), why=why, advice=advice)
    unusable.__cause__ = error
    return unusable


def _code(error: sqlite3.DatabaseError) -> int:
    """The primary result code, which extended ones keep in their lowest byte."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def filesystem_type(directory: Path, mounts: str) -> str:
    """The kind of filesystem that holds `directory`, by the text of /proc/mounts; empty if it does not say."""
    best, found = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:  # noqa: PLR2004 - device, mount point, kind
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if len(point.parts) >= best and directory.is_relative_to(point):  # a later mount lies over an earlier one
            best, found = len(point.parts), fields[2]
    return found


def _mounts() -> str:
    with contextlib.suppress(OSError):  # not Linux: nothing is known, and nothing refused
        return _MOUNTS.read_text(errors="surrogateescape")
    return ""
