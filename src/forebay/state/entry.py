"""A key with its value and version, as shards keep it and as users see it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Versioned(NamedTuple):
    """A value and its version.

    Attributes:
        value: plain data: None, a bool, a number, a str, bytes, a list, a dict or an aware datetime.
        version: a number that no other value of this key has, or had; later ones are larger.
    """

    value: Any
    version: int


class Entry(NamedTuple):
    """A key, its value and its version.

    Attributes:
        key: within its namespace.
        value: as in `Versioned`.
        version: as in `Versioned`.
    """

    key: str
    value: Any
    version: int


class StoredEntry(NamedTuple):
    """An entry as a shard keeps it.

    Attributes:
        key: in UTF-8.
        data: the encoded value, never empty.
        version: of the value.
    """

    key: bytes
    data: bytes
    version: int
