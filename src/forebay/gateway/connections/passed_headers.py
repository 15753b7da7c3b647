"""Headers that a gateway passes on: without those that hold for one connection only."""

from __future__ import annotations

from typing import Final

from forebay.gateway.connections.direct_request import RawHeaders

_MAX_CACHED_NAMES: Final = 1000
_MAX_CACHED_LENGTH: Final = 64  # characters of a name

# Headers that hold for one connection only. Source: RFC 9110, 7.6.1.
HOP_BY_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "trailers", "transfer-encoding", "upgrade"),
    }
)
DROPPED: Final = frozenset({""})
"""The names that `PassedNames` gives to what is not passed on."""


class PassedNames(dict[bytes, str]):
    """A cache of names of headers that are passed on, by name on the wire; of others the name is empty.

    Args:
        dropped: names of headers that are not passed on, in lower case.
        beginnings: of other such names.
        lower: returns names in lower case, not as they were received.
    """

    def __init__(self, dropped: frozenset[str], *beginnings: str, lower: bool) -> None:
        super().__init__()
        self._dropped = dropped
        self._beginnings = beginnings
        self._lower = lower

    def __missing__(self, name: bytes) -> str:
        text = name.decode("latin-1")
        lower = text.lower()
        dropped = lower in self._dropped or lower.startswith(self._beginnings)
        passed = "" if dropped else lower if self._lower else text
        if len(self) < _MAX_CACHED_NAMES and len(name) <= _MAX_CACHED_LENGTH:
            self[name] = passed
        return passed


def hop_by_hop_names(connection: str | None, raw_headers: RawHeaders) -> frozenset[str]:
    """Return the names that are not passed on: the empty one, and those that the Connection headers list."""
    if connection is None or connection == "keep-alive":
        return DROPPED
    listed = b",".join([value for name, value in raw_headers if name.lower() == b"connection"]).decode("latin-1")
    return DROPPED.union(name.strip().lower() for name in listed.split(","))
