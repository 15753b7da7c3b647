"""Open a SQLite file, check that Forebay wrote it, migrate it, and explain why it cannot be used."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forebay.errors import StoreUnavailable
from forebay.storage.url import Fsync

_MIN_SQLITE = (3, 35, 0)  # UPDATE ... RETURNING
_MAX_WAL_BYTES = 64 << 20  # of the write-ahead log, kept on disk after a checkpoint
_CACHE_KIB = 32 << 10  # of pages, kept in memory
_SYNCHRONOUS = {Fsync.YES: "full", Fsync.CHECKPOINT: "normal", Fsync.NO: "off"}
_POLL_INTERVAL_MS = 2  # between two attempts to begin a transaction while another process is writing
_RETRY_INTERVAL = 0.01  # seconds between attempts at what SQLite itself does not wait for

# Filesystems where a write-ahead log gets damaged: its index is shared memory, which two machines do not share.
_NETWORK_FILESYSTEM = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|fuse\.(sshfs|ceph\S*|glusterfs|s3\S*|gcsfuse|rclone)"
)
_MOUNTS = Path("/proc/mounts")

# By primary result code: why the file cannot be used, and what to do.
_ADVICE = {
    sqlite3.SQLITE_BUSY: (
        "another process has been writing to it for too long",
        "Find the process that holds it (fuser FILE), continue it if it was stopped; or give each a file of its own.",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "it cannot be opened",
        "Check that it is a file and that this user may read and write it and its directory.",
    ),
    sqlite3.SQLITE_CORRUPT: (
        "the file is damaged",
        "Move it and its -wal and -shm files aside; `sqlite3 FILE .recover` saves what can be saved.",
    ),
    sqlite3.SQLITE_FULL: ("the disk is full", "Free some space, or move the file to a larger disk."),
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
    """The schema of a file, as migrations.

    Attributes:
        application_id: the number in the file's header that says which application owns it.
        migrations: scripts; the n-th leads from version n to n + 1. A released script is never edited.
    """

    application_id: int
    migrations: tuple[tuple[str, ...], ...]

    @property
    def version(self) -> int:
        """The version that this code writes."""
        return len(self.migrations)


def open_file(path: Path, schema: Schema, fsync: Fsync, busy_timeout: float) -> sqlite3.Connection:
    """Return a connection to the file at `path`, created if missing, with its schema up to date. Blocks.

    The connection itself waits for other processes for milliseconds only: its user tries again.

    Raises:
        StoreUnavailable: the file cannot be opened; the message says why and what to do.
    """
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        why = f"this Python's SQLite is {sqlite3.sqlite_version}, and 3.35 is needed"
        raise StoreUnavailable(where=str(path), why=why, advice="Use a newer Python, or another overflow.")
    if not path.parent.is_dir():
        advice = f"Create it: mkdir -p {path.parent}"
        raise StoreUnavailable(where=str(path), why="its directory does not exist", advice=advice)
    kind = filesystem_type(path.parent.resolve(), _mounts())
    if _NETWORK_FILESYSTEM.fullmatch(kind):
        why = f"it is on a network filesystem ({kind}), where a write-ahead log gets damaged"
        advice = "Put it on a local disk, or share an overflow over Redis."
        raise StoreUnavailable(where=str(path), why=why, advice=advice)
    try:
        # Statements are kept prepared. The writer begins transactions itself, so there is no isolation level.
        connection = sqlite3.connect(
            path, timeout=busy_timeout, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            _prepare(connection, path, schema, fsync, busy_timeout)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise diagnose(error, path) from error
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, schema: Schema, fsync: Fsync, busy_timeout: float) -> None:
    with _transaction(connection, "BEGIN"):  # before changing anything in a file that may belong to another program
        version = _check_ours(connection, path, schema)
    mode = _enable_wal(connection, busy_timeout)
    if mode != "wal":
        why = f"it cannot keep a write-ahead log there, only a journal of kind {mode!r}"
        raise StoreUnavailable(where=str(path), why=why, advice="Put it on a local disk.")
    connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[fsync]}")
    connection.execute(f"PRAGMA journal_size_limit = {_MAX_WAL_BYTES}")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    if version < schema.version:  # otherwise it need not wait for those who are writing
        with _transaction(connection, "BEGIN IMMEDIATE"):
            _migrate(connection, path, schema)
    # For what follows. SQLite itself would wait for up to 100 ms between two attempts at a transaction, in which others
    # begin and end theirs: on a slow disk a process might not get its turn for seconds.
    connection.execute(f"PRAGMA busy_timeout = {_POLL_INTERVAL_MS}")


def _enable_wal(connection: sqlite3.Connection, busy_timeout: float) -> str:
    """Switch to a write-ahead log, and return the journal mode that is then in force.

    The switch needs the file exclusively, and two connections that switch at once would wait for each other. So SQLite
    fails one of them without waiting, and that one tries again.
    """
    for _ in range(int(busy_timeout / _RETRY_INTERVAL)):
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
        threading.Event().wait(_RETRY_INTERVAL)
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
    """Return the version of the schema in the file; 0 if the file is new."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id == schema.application_id:
        if version > schema.version:
            why = f"a newer Forebay wrote it (schema {version}; this one knows {schema.version})"
            raise StoreUnavailable(where=str(path), why=why, advice="Upgrade Forebay here, or name another file.")
        return int(version)
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application_id or version or tables:
        why = "it is a database of another program, or of another kind of Forebay's"
        raise StoreUnavailable(where=str(path), why=why, advice="Name another file.")
    return 0


def _migrate(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    version = _check_ours(connection, path, schema)  # again: now no other process can change it
    if version == schema.version:
        return
    for script in schema.migrations[version:]:
        for statement in script:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {schema.application_id}")
    connection.execute(f"PRAGMA user_version = {schema.version}")


def diagnose(error: BaseException, path: Path) -> BaseException:
    """Return what to raise: StoreUnavailable with advice if the file failed, `error` itself if the operation did."""
    operation_errors = sqlite3.IntegrityError | sqlite3.ProgrammingError
    if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, operation_errors):
        return error
    why, advice = _ADVICE.get(_code(error), (str(error), "Inspect the file with the sqlite3 command."))
    unavailable = StoreUnavailable(where=str(path), why=why, advice=advice)
    unavailable.__cause__ = error
    return unavailable


def has_free_pages(connection: sqlite3.Connection, size: int) -> bool:
    """Return whether `size` bytes fit into pages of the file that are free, so that it need not grow."""
    (free,), (page,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_size"))
    return bool(free * page >= size)


def is_busy(error: sqlite3.DatabaseError) -> bool:
    """Return whether another process had the file locked."""
    return _code(error) == sqlite3.SQLITE_BUSY


def _code(error: sqlite3.DatabaseError) -> int:
    """Return the primary result code, which extended codes keep in their lowest byte."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def filesystem_type(directory: Path, mounts: str) -> str:
    """Return the type of the filesystem that holds `directory`; empty if `mounts` does not say.

    Args:
        directory: an absolute path.
        mounts: the text of /proc/mounts.
    """
    best, found = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:  # noqa: PLR2004 - device, mount point, type
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if len(point.parts) >= best and directory.is_relative_to(point):  # a later mount hides an earlier one
            best, found = len(point.parts), fields[2]
    return found


def _mounts() -> str:
    with contextlib.suppress(OSError):  # not Linux: nothing is known, so nothing is rejected
        return _MOUNTS.read_text(errors="surrogateescape")
    return ""
