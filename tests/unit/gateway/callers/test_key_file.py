"""The file of issued keys."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from forebay.errors import InvalidSetting, StoreUnavailable
from forebay.gateway.callers.issued_keys import IssuedKey, KeyExists, KeyRevoked, UnknownKey, key_digest, new_key
from forebay.gateway.callers.key_file import InvalidKeysUrl, KeyFile, parse_keys_url, read_snapshot, write_last_used

NOW = 1_000_000.0
WRITER = IssuedKey(name="writer", rpm=60, models=("gpt-4o*",), created_at=NOW)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def text(path: Path) -> str:
    text = new_key()
    with KeyFile(path, create=True) as file:
        file.create(WRITER, text)
    return text


def test_a_key_is_stored_as_a_hash(path: Path, text: str) -> None:
    with KeyFile(path) as file:
        stored = file.get("writer")
    assert stored.key == WRITER
    assert stored.last_used is None
    (secret,) = stored.secrets
    assert (secret.digest, secret.hint, secret.valid_until) == (key_digest(text), text[:7], None)
    assert text.encode() not in path.read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["keys.db"]


def test_names_are_unique_also_among_revoked_keys(path: Path, text: str) -> None:
    with KeyFile(path) as file:
        with pytest.raises(KeyExists, match="'writer'"):
            file.create(WRITER, new_key())
        file.revoke("writer", now=NOW)
        with pytest.raises(KeyExists, match="which was revoked"):
            file.create(WRITER, new_key())
        assert [secret.digest for secret in file.get("writer").secrets] == [key_digest(text)]


@pytest.mark.usefixtures("text")
def test_a_change_of_a_key_is_checked_as_a_whole(path: Path) -> None:
    with KeyFile(path) as file:
        changed = file.update("writer", {"rpm": None, "max_priority": "high"})
        assert (changed.key.rpm, changed.key.max_priority, changed.key.models) == (None, "high", ("gpt-4o*",))
        with pytest.raises(InvalidSetting, match="max_priority"):
            file.update("writer", {"priority": "critical"})
        assert file.get("writer").key == changed.key


@pytest.mark.usefixtures("text")
def test_what_is_revoked_stays_revoked(path: Path) -> None:
    with KeyFile(path) as file:
        file.revoke("writer", now=NOW)
        assert file.revoke("writer", now=NOW + 5).key.revoked_at == NOW
        with pytest.raises(KeyRevoked):
            file.update("writer", {"enabled": True})
        with pytest.raises(KeyRevoked):
            file.rotate("writer", new_key(), now=NOW, grace=0.0)


def test_an_unknown_name_is_an_error(path: Path, text: str) -> None:
    with KeyFile(path) as file:
        with pytest.raises(UnknownKey, match="'reader'"):
            file.get("reader")
        with pytest.raises(UnknownKey, match="'reader'"):
            file.update("reader", {"rpm": 1})
        with pytest.raises(UnknownKey, match="'reader'"):
            file.rotate("reader", text, now=NOW, grace=0.0)
        with pytest.raises(UnknownKey, match="'reader'"):
            file.revoke("reader", now=NOW)


@pytest.mark.usefixtures("text")
def test_the_secrets_before_a_rotation_end_with_its_grace_period(path: Path) -> None:
    with KeyFile(path) as file:
        file.rotate("writer", new_key(), now=NOW, grace=100.0)
        rotated = file.rotate("writer", new_key(), now=NOW + 10, grace=20.0)
        assert [secret.valid_until for secret in rotated.secrets] == [NOW + 30, NOW + 30, None]
        longer = file.rotate("writer", new_key(), now=NOW + 20, grace=1000.0)
        assert [secret.valid_until for secret in longer.secrets] == [NOW + 30, NOW + 30, NOW + 1020, None]
        later = file.rotate("writer", new_key(), now=NOW + 30, grace=0.0)
        assert [secret.is_valid(NOW + 30) for secret in later.secrets] == [False, False, True]


def test_a_snapshot_has_all_keys_until_the_next_change(path: Path, text: str) -> None:
    snapshot = read_snapshot(path, timeout=1.0)
    assert snapshot is not None
    assert snapshot.keys == {"writer": WRITER}
    assert snapshot.secrets[key_digest(text)].key == "writer"
    assert read_snapshot(path, since=snapshot.change, timeout=1.0) is None
    with KeyFile(path) as file:
        file.revoke("writer", now=NOW)
    later = read_snapshot(path, since=snapshot.change, timeout=1.0)
    assert later is not None
    assert later.keys["writer"].revoked_at == NOW


@pytest.mark.usefixtures("text")
def test_the_last_use_does_not_count_as_a_change(path: Path) -> None:
    snapshot = read_snapshot(path, timeout=1.0)
    assert snapshot is not None
    write_last_used(path, {"writer": NOW + 7200}, timeout=1.0)
    write_last_used(path, {"writer": NOW + 3600}, timeout=1.0)  # of another gateway, later
    assert read_snapshot(path, since=snapshot.change, timeout=1.0) is None
    with KeyFile(path) as file:
        assert file.get("writer").last_used == NOW + 7200


def test_a_file_that_cannot_be_used_is_told_with_advice(path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"no such file.*forebay keys create"):
        read_snapshot(path, timeout=0.1)
    with pytest.raises(StoreUnavailable, match="no such file"), KeyFile(path):
        pass
    assert not path.exists()
    path.write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="no key file"):
        read_snapshot(path, timeout=0.1)
    assert path.read_bytes() == b""
    path.write_bytes(b"no database at all, but long enough to be read" * 100)
    with pytest.raises(StoreUnavailable, match="not a SQLite database"):
        read_snapshot(path, timeout=0.1)


def test_a_database_of_another_program_is_not_touched(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(StoreUnavailable, match="another program"), KeyFile(path, create=True):
        pass
    with pytest.raises(StoreUnavailable, match="no key file"):
        read_snapshot(path, timeout=0.1)


@pytest.mark.usefixtures("text")
def test_a_locked_file_is_told(path: Path) -> None:
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StoreUnavailable, match="another process"):
            read_snapshot(path, timeout=0.05)
    finally:
        holder.close()
    assert read_snapshot(path, timeout=0.05) is not None


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ('UPDATE key SET data = \'{"name":"writer","rpm":"5"}\'', "key 'writer' .* `int | null`, got `str`"),
        ('UPDATE key SET data = \'{"name":"writer","rmp":5}\'', "key 'writer' .* unknown field `rmp`"),
        ('UPDATE key SET data = \'{"name":"writer","priority":"urgent"}\'', "key 'writer' .* must be critical"),
        ('UPDATE key SET data = \'{"name":"boss"}\'', "key 'writer' in it has another name in its data: 'boss'"),
        ("UPDATE key SET data = 5", "data of the key 'writer' in it has the type int"),
        ("UPDATE secret SET valid_until = 'tomorrow'", "secret of the key 'writer'"),
        ("UPDATE secret SET created_at = x'00'", "secret of the key 'writer'"),
        ("UPDATE secret SET digest = 'abc'", "secret of the key 'writer'"),
    ],
)
@pytest.mark.usefixtures("text")
def test_a_key_that_was_edited_to_what_cannot_be_is_told_by_its_name(path: Path, edit: str, why: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(edit)
    connection.commit()
    connection.close()
    with pytest.raises(StoreUnavailable, match=why):
        read_snapshot(path, timeout=1.0)
    with KeyFile(path) as file, pytest.raises(StoreUnavailable, match=why):
        file.get("writer")
    with KeyFile(path) as file, pytest.raises(StoreUnavailable, match=why):
        file.list()


def test_a_url_names_a_sqlite_file(tmp_path: Path) -> None:
    assert parse_keys_url(f"sqlite:///{tmp_path}/keys.db") == tmp_path / "keys.db"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("keys.db", "it does not begin with"),
        ("redis://host/0", "kept in a SQLite file, not in redis://"),
        ("memory://", "kept in a SQLite file, not in memory://"),
        ("sqlite:///keys.db?fsync=yes", "it has no options"),
        ("sqlite:///", "it names no file"),
        (7, "it is a int, not a URL"),
    ],
)
def test_another_url_is_an_error(url: object, why: str) -> None:
    with pytest.raises(InvalidKeysUrl, match=why):
        parse_keys_url(url)
