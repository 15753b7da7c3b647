"""The interface of a shard: one server, cluster or file that keeps a part of the entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from forebay.errors import StoreUnavailable
from forebay.state.entry import StoredEntry

ANY_VERSION = -1  # a write that does not depend on what is there
TOMBSTONE_TTL = 600.0  # seconds: far longer than a process may be in the middle of moving an entry


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


class Copied(NamedTuple):
    """An entry as it is moved to another shard.

    Attributes:
        entry: the entry; None: there is none.
        ttl: seconds after which it expires; None: it does not.
        latest: a version that no other one which the key has had on this shard is larger than.
    """

    entry: StoredEntry | None
    ttl: float | None
    latest: int


class NamePage(NamedTuple):
    """A part of the names of the namespaces of a shard.

    Attributes:
        names: some of them may be repeated, here or on another page.
        after: what to ask for the next page with; None: there are no more.
    """

    names: Sequence[str]
    after: str | None


class Shard(Protocol):
    """A place for entries. A namespace is a name that separates keys; that of the state itself is empty.

    A write gets a version larger than any that its key has had on this shard, also if it was deleted in between. All
    methods raise StoreUnavailable if it cannot be used, StoreAnswerLost if a write may have been done all the same, and
    OperationRejected if it is, say, full. A call that takes too long is cancelled: what it writes may then still be
    written, as a whole or not at all. Then `open` and `ping` are called until both return.

    While keys move here from another shard, a write of such a key has a `floor`: its version is larger than that. What
    the write removes, or has replaced once its ttl is over, leaves a *tombstone*: the version of it, for ten minutes.
    Then `restore` does not bring back what was moved, changed and removed since another process has read it. An entry
    with a ttl is not in its own tombstone: it may move away, and come back.
    """

    url: str  # without a password: it identifies the shard, in placement and messages

    async def open(self) -> None:
        """Connect. Idempotent."""

    async def close(self) -> None:
        """Finish what is pending and disconnect. Idempotent."""

    async def get(self, namespace: str, key: bytes, *, cached: bool = False) -> StoredEntry | None:
        """Return an entry; None if there is none, or it has expired.

        Args:
            namespace: as above.
            key: the key.
            cached: whether the near cache may answer, if the shard has one.
        """

    async def put(  # noqa: PLR0913 - what a write is made of
        self,
        namespace: str,
        key: bytes,
        data: bytes,
        ttl: float | None = None,
        if_version: int = ANY_VERSION,
        *,
        floor: int | None = None,
    ) -> int:
        """Write an entry, and return its version.

        Args:
            namespace: as above.
            key: the key.
            data: the encoded value, not empty.
            ttl: seconds after which it expires; None: it does not.
            if_version: the version that the entry must have; 0: there must be none.
            floor: as above; None: the key does not move.

        Raises:
            WriteRefused: it has another version.
        """

    async def delete(
        self, namespace: str, key: bytes, if_version: int = ANY_VERSION, *, floor: int | None = None
    ) -> bool:
        """Delete an entry, and return whether there was one.

        Raises:
            WriteRefused: it has another version than `if_version`.
        """

    async def copy(self, namespace: str, key: bytes) -> Copied:
        """Return an entry, so that it can be restored on another shard."""

    async def restore(self, namespace: str, entry: StoredEntry, ttl: float | None) -> None:
        """Write an entry with its version, unless the key, or its tombstone, has a version as large, or larger.

        Later writes of the shard get larger versions.
        """

    async def namespaces(self, after: str | None = None) -> NamePage:
        """Return names of namespaces that have entries, a page at a time; the empty name may be among them.

        Those that have entries all the while are found.
        """

    async def scan(
        self, namespace: str, prefix: bytes, after: bytes | None = None, limit: int = 100, *, reverse: bool = False
    ) -> Page:
        """Return up to `limit` entries whose keys begin with `prefix`, by their order, from the one behind `after`."""

    async def ping(self) -> None:
        """Ask for an answer, so as to learn whether the shard can be used."""
