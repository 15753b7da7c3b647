"""Opening a SQLite file: an unusable file is rejected with the reason, and left as it was."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from forebay.errors import StoreUnavailable
from forebay.storage import Fsync, Schema, sqlite_file
from forebay.storage.sqlite_file import diagnose, filesystem_type, open_file

ONE = ("CREATE TABLE one (n INTEGER)",)
TWO = ("CREATE TABLE two (n INTEGER)", "INSERT INTO two VALUES (2)")
SCHEMA = Schema(application_id=7, migrations=(ONE,))


def opened(path: Path, schema: Schema = SCHEMA, fsync: Fsync = Fsync.YES) -> sqlite3.Connection:
    return open_file(path, schema, fsync, 0.05)


def rejection(path: Path, schema: Schema = SCHEMA) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as caught:
        opened(path, schema).close()
    assert str(path) in str(caught.value)
    return caught.value


def make(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_new_file_gets_the_schema_and_a_write_ahead_log(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "a.db", fsync=Fsync.CHECKPOINT)) as connection:
        answers = [
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version", "journal_mode", "synchronous", "busy_timeout")
        ]
        assert answers == [7, 1, "wal", 1, 2]  # the user of the connection tries again
        assert connection.execute("SELECT * FROM one").fetchall() == []


def test_an_older_schema_is_migrated_and_its_rows_kept(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "a.db")) as connection:
        connection.execute("INSERT INTO one VALUES (1)")
    with closing(opened(tmp_path / "a.db", Schema(7, (ONE, TWO)))) as connection:
        assert connection.execute("SELECT one.n, two.n FROM one, two").fetchall() == [(1, 2)]


def test_a_failed_migration_leaves_the_file_unchanged(tmp_path: Path) -> None:
    opened(tmp_path / "a.db").close()
    rejection(tmp_path / "a.db", Schema(7, (ONE, ("CREATE TABLE two (n INTEGER)", "CREATE TABLE one (n INTEGER)"))))
    opened(tmp_path / "a.db", Schema(7, (ONE, TWO))).close()


def test_a_newer_schema_is_rejected(tmp_path: Path) -> None:
    opened(tmp_path / "a.db", Schema(7, (ONE, TWO))).close()
    assert "newer Forebay" in str(rejection(tmp_path / "a.db"))


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE theirs (n INTEGER)", "PRAGMA user_version = 1", "PRAGMA application_id = 8"]
)
def test_a_database_of_another_program_is_rejected_and_unchanged(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "a.db"
    make(path, statement)
    before = path.read_bytes()
    assert "another program" in str(rejection(path))
    assert path.read_bytes() == before


def test_a_file_that_is_not_a_database_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_text("dear diary, " * 100)
    assert "not a SQLite database" in str(rejection(path))


def test_a_directory_is_rejected(tmp_path: Path) -> None:
    assert "cannot be opened" in str(rejection(tmp_path))


def test_a_missing_directory_is_rejected_with_the_command_that_creates_it(tmp_path: Path) -> None:
    assert f"mkdir -p {tmp_path}/no/such" in str(rejection(tmp_path / "no" / "such" / "a.db"))


def test_an_empty_file_is_treated_as_new(tmp_path: Path) -> None:
    (tmp_path / "a.db").touch()
    opened(tmp_path / "a.db").close()


def test_a_locked_file_is_rejected_after_the_busy_timeout(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        assert "another process" in str(rejection(path))


def test_a_file_that_is_up_to_date_opens_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    opened(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        opened(path).close()


def test_an_old_sqlite_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    assert "3.35" in str(rejection(tmp_path / "a.db"))


# --- network filesystems ---------------------------------------------------------------------------------------------

MOUNTS = r"""/dev/vda / ext4 rw 0 0
proc /proc proc rw 0 0
srv:/home /home nfs4 rw 0 0
/dev/vdb /home/local ext4 rw 0 0
//srv/share /mnt/my\040share cifs rw 0 0
host:/x /over fuse.sshfs rw 0 0
tmpfs /over tmpfs rw 0 0
short
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/", "ext4"),
        ("/var/lib", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/data", "nfs4"),
        ("/home/local/data", "ext4"),
        ("/homestead", "ext4"),
        ("/mnt/my share/deep", "cifs"),
        ("/over", "tmpfs"),
    ],
)
def test_the_nearest_mount_gives_the_filesystem_of_a_directory(directory: str, kind: str) -> None:
    assert filesystem_type(Path(directory), MOUNTS) == kind


def test_without_mounts_the_filesystem_is_unknown() -> None:
    assert filesystem_type(Path("/home"), "") == ""


@pytest.mark.parametrize(
    "kind",
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "fuse.sshfs",
        "ceph",
        "fuse.glusterfs",
        "lustre",
        "fuse.s3fs",
        "afs",
    ],
)
def test_a_network_filesystem_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sqlite_file, "_mounts", lambda: f"x / {kind} rw 0 0\n")
    assert f"network filesystem ({kind})" in str(rejection(tmp_path / "a.db"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "fuse.gocryptfs", ""])
def test_a_local_filesystem_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sqlite_file, "_mounts", lambda: f"x / {kind} rw 0 0\n")
    opened(tmp_path / "a.db").close()


# --- diagnoses -------------------------------------------------------------------------------------------------------


def failed(code: int, kind: type[sqlite3.Error] = sqlite3.OperationalError) -> sqlite3.Error:
    error = kind("the message of SQLite")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (sqlite3.SQLITE_BUSY, "another process"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "another process"),
        (sqlite3.SQLITE_FULL, "disk is full"),
        (sqlite3.SQLITE_IOERR_FSYNC, "failed to read or write"),
        (sqlite3.SQLITE_READONLY_DBMOVED, "may not be written"),
        (sqlite3.SQLITE_CORRUPT, "damaged"),
        (sqlite3.SQLITE_PERM, "refused"),
        (sqlite3.SQLITE_ERROR, "the message of SQLite"),
    ],
)
def test_a_failure_of_the_file_is_explained(code: int, why: str) -> None:
    error = failed(code)
    found = diagnose(error, Path("/a.db"))
    assert isinstance(found, StoreUnavailable)
    assert re.search(f"/a.db cannot be used: .*{why}", str(found))
    assert found.__cause__ is error


def test_an_error_of_the_operation_is_returned_as_it_is() -> None:
    for error in (ValueError(), failed(sqlite3.SQLITE_CONSTRAINT, sqlite3.IntegrityError)):
        assert diagnose(error, Path("/a.db")) is error
