"""The interface of a shard: one server, cluster or file that keeps a part of the entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from forebay.errors import StoreUnavailable
from forebay.state.entry import StoredEntry

ANY_VERSION = -1  # a write that does not depend on what is there


class WriteRefused(Exception):
    """A write found another version than it depends on. Its argument is the version found; 0: no entry."""

    def __init__(self, found: int) -> None:
        super().__init__(found)
        self.found = found


class OperationRejected(Exception):
    """A shard has answered, and rejected an operation; others may succeed. Its argument is the error for the caller."""

    def __init__(self, error: StoreUnavailable) -> None:
        super().__init__(error)
        self.error = error


class Page(NamedTuple):
    """A part of a scan.

    Attributes:
        entries: in the order of their keys, as bytes.
        after: the key to go on after; None: there are no more.
    """

    entries: Sequence[StoredEntry]
    after: bytes | None


class Shard(Protocol):
    """A place for entries. A namespace is a name that separates keys; that of the state itself is empty.

    A write gets a version larger than any that its key has had on this shard, also if it was deleted in between. All
    methods raise StoreUnavailable if it cannot be used, and OperationRejected if it is, say, full.
    """

    url: str  # without a password: it identifies the shard, in placement and messages

    async def open(self) -> None:
        """Connect. Idempotent."""

    async def close(self) -> None:
        """Finish what is pending and disconnect. Idempotent."""

    async def get(self, namespace: str, key: bytes) -> StoredEntry | None:
        """Return an entry; None if there is none, or it has expired."""

    async def put(
        self, namespace: str, key: bytes, data: bytes, ttl: float | None = None, if_version: int = ANY_VERSION
    ) -> int:
        """Write an entry, and return its version.

        Args:
            namespace: as above.
            key: the key.
            data: the encoded value, not empty.
            ttl: seconds after which it expires; None: it does not.
            if_version: the version that the entry must have; 0: there must be none.

        Raises:
            WriteRefused: it has another version.
        """

    async def delete(self, namespace: str, key: bytes, if_version: int = ANY_VERSION) -> bool:
        """Delete an entry, and return whether there was one.

        Raises:
            WriteRefused: it has another version than `if_version`.
        """

    async def scan(
        self, namespace: str, prefix: bytes, after: bytes | None = None, limit: int = 100, *, reverse: bool = False
    ) -> Page:
        """Return up to `limit` entries whose keys begin with `prefix`, by their order, from the one behind `after`."""

    async def ping(self) -> None:
        """Ask for an answer, so as to learn whether the shard can be used."""
