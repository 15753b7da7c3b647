"""The file of issued keys: a SQLite file with each key, and the hash of each of its secrets."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import parse_qsl, quote, urlsplit

import msgspec

from forebay._validate import is_number
from forebay.errors import ForebayError, InvalidOverflowUrl, StoreUnavailable
from forebay.gateway.callers.issued_keys import (
    IssuedKey,
    KeyExists,
    KeyRevoked,
    KeySecret,
    UnknownKey,
    key_digest,
    key_hint,
)
from forebay.storage import parse_url
from forebay.storage.shown_url import shown_url
from forebay.storage.sqlite_file import Schema, diagnose, open_file
from forebay.storage.url import Fsync

_BUSY_TIMEOUT: Final = 5.0  # seconds that a command waits for another one
_FORM: Final = "sqlite:///relative.db or sqlite:////absolute.db"

_SCHEMA: Final = Schema(
    application_id=0x46424B59,  # "FBKY"
    migrations=(
        (
            "CREATE TABLE key (name TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID",
            """
            CREATE TABLE secret (
                digest      BLOB PRIMARY KEY,
                key         TEXT NOT NULL REFERENCES key,
                hint        TEXT NOT NULL,
                created_at  REAL NOT NULL,
                valid_until REAL
            ) WITHOUT ROWID
            """,
            "CREATE INDEX secret_of_key ON secret (key)",
            "CREATE TABLE used (key TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
            "CREATE TABLE change (mark BLOB NOT NULL)",  # of the last change of a key or a secret, random
            "INSERT INTO change VALUES (randomblob(16))",
        ),
    ),
)
_MARK_CHANGE: Final = "UPDATE change SET mark = randomblob(16)"  # a number could be that of another file, put there
_SECRETS: Final = "SELECT key, digest, hint, created_at, valid_until FROM secret"
_USED: Final = "INSERT INTO used VALUES (?, ?) ON CONFLICT DO UPDATE SET at = max(at, excluded.at)"

_decoder: Final = msgspec.json.Decoder(IssuedKey)


class InvalidKeysUrl(ForebayError, ValueError):
    """The keys {url!r} cannot be opened: {why}. The form is sqlite:///relative.db or sqlite:////absolute.db."""


class StoredKey(NamedTuple):
    """A key as its file has it.

    Attributes:
        key: what it may do.
        secrets: the newest last.
        last_used: epoch seconds, to the hour; None for never.
    """

    key: IssuedKey
    secrets: tuple[KeySecret, ...]
    last_used: float | None


class KeySnapshot(NamedTuple):
    """All keys of a file at one moment.

    Attributes:
        change: the mark of the last change that it has.
        keys: by name.
        secrets: by hash.
    """

    change: bytes
    keys: Mapping[str, IssuedKey]
    secrets: Mapping[bytes, KeySecret]


def parse_keys_url(url: object) -> Path:
    """Return the file that the URL of a key file names.

    Raises:
        InvalidKeysUrl: it names none.
    """
    if not isinstance(url, str):
        raise InvalidKeysUrl(url=url, why=f"it is a {type(url).__name__}, not a URL")
    try:
        store = parse_url(url)
    except InvalidOverflowUrl as error:
        raise InvalidKeysUrl(url=shown_url(url), why=error.why) from None
    if store.path is None:
        raise InvalidKeysUrl(url=shown_url(url), why=f"keys are kept in a SQLite file, not in {store.scheme}://")
    if parse_qsl(urlsplit(url).query, keep_blank_values=True):
        raise InvalidKeysUrl(url=shown_url(url), why="it has no options")
    return store.path


class KeyFile:
    """A key file that is open for changes while its block runs, each of them in a transaction. It blocks.

    Args:
        path: of the file.
        create: make it if it is missing.

    Raises:
        StoreUnavailable: on entering, if the file cannot be opened; later, if it fails. Nothing was written then.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._path = path
        self._create = create
        self._open: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        if not self._create:
            _check_exists(self._path)
        self._open = open_file(self._path, _SCHEMA, Fsync.YES, _BUSY_TIMEOUT)
        self._open.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT * 1000:.0f}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._open is not None  # noqa: S101 - entered
        self._open.close()

    def create(self, key: IssuedKey, text: str) -> StoredKey:
        """Add a key whose secret is `text`, and return it.

        Raises:
            KeyExists: there is one of that name.
        """
        with self._changing() as connection:
            if (old := _find(connection, key.name)) is not None:
                state = "" if old.revoked_at is None else ", which was revoked"
                raise KeyExists(name=key.name, where=str(self._path), state=state)
            connection.execute("INSERT INTO key VALUES (?, ?)", (key.name, msgspec.json.encode(key)))
            _add_secret(connection, key.name, text, key.created_at)
            return _stored(connection, key)

    def update(self, name: str, changes: Mapping[str, Any]) -> StoredKey:
        """Change fields of a key, and return it.

        Raises:
            UnknownKey: there is none of that name.
            KeyRevoked: it was revoked.
            InvalidSetting: a value is invalid, or does not fit the others.
        """
        with self._changing() as connection:
            key = msgspec.structs.replace(self._active(connection, name), **changes)
            _write(connection, key)
            return _stored(connection, key)

    def rotate(self, name: str, text: str, *, now: float, grace: float) -> StoredKey:
        """Give a key another secret, and return it. Those before stay valid for `grace` seconds.

        Raises:
            UnknownKey: there is none of that name.
            KeyRevoked: it was revoked.
        """
        with self._changing() as connection:
            key = self._active(connection, name)
            connection.execute("DELETE FROM secret WHERE key = ? AND valid_until <= ?", (name, now))
            until = now + grace
            shorten = "UPDATE secret SET valid_until = ? WHERE key = ? AND (valid_until IS NULL OR valid_until > ?)"
            connection.execute(shorten, (until, name, until))
            _add_secret(connection, name, text, now)
            return _stored(connection, key)

    def revoke(self, name: str, *, now: float) -> StoredKey:
        """Refuse a key for good, and return it; one that was revoked before stays as it is.

        Raises:
            UnknownKey: there is none of that name.
        """
        with self._changing() as connection:
            key = self._get(connection, name)
            if key.revoked_at is None:
                key = msgspec.structs.replace(key, revoked_at=now)
                _write(connection, key)
            return _stored(connection, key)

    def get(self, name: str) -> StoredKey:
        """Return a key.

        Raises:
            UnknownKey: there is none of that name.
        """
        with self._transaction("BEGIN") as connection:
            return _stored(connection, self._get(connection, name))

    def list(self) -> list[StoredKey]:
        """Return all keys by their names, those that were revoked too."""
        with self._transaction("BEGIN") as connection:
            return [_stored(connection, key) for key in _all_keys(connection)]

    def _get(self, connection: sqlite3.Connection, name: str) -> IssuedKey:
        if (key := _find(connection, name)) is None:
            raise UnknownKey(name=name, where=str(self._path))
        return key

    def _active(self, connection: sqlite3.Connection, name: str) -> IssuedKey:
        key = self._get(connection, name)
        if key.revoked_at is not None:
            raise KeyRevoked(name=name)
        return key

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection
            connection.execute(_MARK_CHANGE)

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        assert self._open is not None  # noqa: S101 - entered
        with _diagnosed(self._path), _transaction(self._open, begin) as connection:
            yield connection


def read_snapshot(path: Path, *, since: bytes = b"", timeout: float) -> KeySnapshot | None:
    """Return all keys of a file; None if its last change has the mark `since`. It makes no file, and blocks.

    The file is closed again, so that it is whole without its write-ahead log whenever no command changes it.

    Args:
        path: of the file.
        since: the mark of a change.
        timeout: seconds to wait for a command that is changing it.

    Raises:
        StoreUnavailable: it is missing, cannot be read, or is no key file.
    """
    with _existing(path, timeout) as connection, _transaction(connection, "BEGIN"):
        ((change,),) = connection.execute("SELECT mark FROM change").fetchall()
        if change == since:
            return None
        keys = {key.name: key for key in _all_keys(connection)}
        secrets = {secret.digest: secret for secret in map(_secret, connection.execute(_SECRETS).fetchall())}
        return KeySnapshot(change, keys, secrets)


def write_last_used(path: Path, used: Mapping[str, float], *, timeout: float) -> None:
    """Note when keys were used last, in epoch seconds. It blocks.

    Raises:
        StoreUnavailable: the file cannot be written.
    """
    with _existing(path, timeout) as connection, _transaction(connection, "BEGIN IMMEDIATE"):
        connection.executemany(_USED, used.items())


def _check_exists(path: Path) -> None:
    if not path.is_file():
        advice = "Create a key, which makes it: forebay keys create URL NAME."
        raise StoreUnavailable(where=str(path), why="there is no such file", advice=advice)


@contextlib.contextmanager
def _existing(path: Path, timeout: float) -> Iterator[sqlite3.Connection]:
    """Open a key file that exists, and close it.

    Raises:
        StoreUnavailable: it does not, or is no key file.
    """
    _check_exists(path)
    with _diagnosed(path):
        address = f"file:{quote(str(path))}?mode=rw"  # "ro" could not make the index of a write-ahead log
        connection = sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)
        try:
            ((application_id,),) = connection.execute("PRAGMA application_id").fetchall()
            ((version,),) = connection.execute("PRAGMA user_version").fetchall()
            if (application_id, version) != (_SCHEMA.application_id, _SCHEMA.version):
                why = "it is no key file of this version of Forebay"
                raise StoreUnavailable(where=str(path), why=why, advice="Name the file that forebay keys create made.")
            yield connection
        finally:
            connection.close()


@contextlib.contextmanager
def _diagnosed(path: Path) -> Iterator[None]:
    """Raise what SQLite and the decoder raise as StoreUnavailable."""
    try:
        yield
    except sqlite3.Error as error:
        raise diagnose(error, path) from error
    except (msgspec.MsgspecError, ValueError) as error:
        if isinstance(error, ForebayError):
            raise
        why = str(error) if isinstance(error, _UnreadableKey) else "a key in it cannot be read"
        raise StoreUnavailable(where=str(path), why=why, advice="Restore it from a copy.") from error


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
    connection.execute(begin)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _find(connection: sqlite3.Connection, name: str) -> IssuedKey | None:
    row = connection.execute("SELECT name, data FROM key WHERE name = ?", (name,)).fetchone()
    return None if row is None else _decode(*row)


def _all_keys(connection: sqlite3.Connection) -> list[IssuedKey]:
    return [_decode(*row) for row in connection.execute("SELECT name, data FROM key ORDER BY name").fetchall()]


class _UnreadableKey(ValueError):
    """A key, or one of its secrets, that somebody has edited by hand, or that is damaged."""


def _decode(name: object, data: object) -> IssuedKey:
    """Return a key from its row: its name stands there twice.

    Raises:
        _UnreadableKey: it cannot be read.
    """
    if not isinstance(data, bytes | str):
        raise _UnreadableKey(f"the data of the key {name!r} in it has the type {type(data).__name__}, and is no JSON")
    try:
        key = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise _UnreadableKey(f"the key {name!r} in it cannot be read ({error})") from None
    if key.name != name:
        raise _UnreadableKey(f"the key {name!r} in it has another name in its data: {key.name!r}")
    return key


def _write(connection: sqlite3.Connection, key: IssuedKey) -> None:
    connection.execute("UPDATE key SET data = ? WHERE name = ?", (msgspec.json.encode(key), key.name))


def _add_secret(connection: sqlite3.Connection, name: str, text: str, now: float) -> None:
    values = (key_digest(text), name, key_hint(text), now)
    connection.execute("INSERT INTO secret VALUES (?, ?, ?, ?, NULL)", values)


def _stored(connection: sqlite3.Connection, key: IssuedKey) -> StoredKey:
    rows = connection.execute(f"{_SECRETS} WHERE key = ? ORDER BY created_at", (key.name,)).fetchall()
    used = connection.execute("SELECT at FROM used WHERE key = ?", (key.name,)).fetchone()
    return StoredKey(key, tuple(map(_secret, rows)), None if used is None else used[0])


def _secret(row: tuple[Any, ...]) -> KeySecret:
    name, digest, hint, created_at, valid_until = row
    times = (created_at,) if valid_until is None else (created_at, valid_until)
    if not isinstance(digest, bytes) or not all(is_number(time) for time in times):
        raise _UnreadableKey(f"a secret of the key {name!r} in it has a hash or a time of the wrong type")
    return KeySecret(key=name, digest=digest, hint=hint, created_at=created_at, valid_until=valid_until)
