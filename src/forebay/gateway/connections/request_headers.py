"""The headers of a request, and what follows from them alone: the headers to send, and for whom a provider answers."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from forebay.gateway.connections.connection_pool import hash_credentials
from forebay.gateway.connections.direct_request import RawHeaders
from forebay.gateway.connections.passed_headers import HOP_BY_HOP, PassedNames, hop_by_hop_names
from forebay.upstream.providers import Headers

_NOT_SENT: Final = HOP_BY_HOP | {"host", "content-length", "expect", "accept-encoding"}
_NEVER: Final = re.compile(r"q=0(\.0*)?")  # the weight of an encoding that is not accepted
_CONTROLS: Final = bytes({*range(9), *range(10, 32), 127})  # the tab is none
_SPACES: Final = bytes.maketrans(_CONTROLS, b" " * len(_CONTROLS))  # for controls, with which it could not be sent
_sent: Final = PassedNames(_NOT_SENT, "x-forebay-", lower=True).__getitem__


class SentHeaders(NamedTuple):
    """The headers that a provider gets, without ``Host`` and ``Content-Length``.

    Attributes:
        pairs: names and values.
        wire: the same as they are sent, each with its line end.
    """

    pairs: RawHeaders
    wire: bytes


class RequestHeaders:
    """The headers of a request. What follows from them is found out once, when it is needed first.

    Args:
        raw: as they were received.

    Attributes:
        raw: as given.
        by_name: the same, by lower-case name.
    """

    __slots__ = ("_credentials", "_sent", "by_name", "raw")

    def __init__(self, raw: RawHeaders) -> None:
        self.raw = raw
        self.by_name = Headers.from_wire(raw)
        self._credentials: int | None = None
        self._sent: dict[bool, SentHeaders] = {}

    @property
    def credentials(self) -> int:
        """A hash of all that tells for whom the provider answers."""
        if self._credentials is None:
            self._credentials = hash_credentials(self.by_name)
        return self._credentials

    def sent(self, *, metered: bool) -> SentHeaders:
        """Return the headers that the provider gets.

        Args:
            metered: whether the response must be read, so that it may not be compressed.
        """
        found = self._sent.get(metered)
        if found is None:
            pairs = self._pairs_to_send(metered=metered)
            found = self._sent[metered] = SentHeaders(pairs, b"".join([b"%b: %b\r\n" % pair for pair in pairs]))
        return found

    def _pairs_to_send(self, *, metered: bool) -> RawHeaders:
        dropped = hop_by_hop_names(self.by_name.get("connection"), self.raw)
        sent = [(name, value.translate(_SPACES)) for name, value in self.raw if _sent(name) not in dropped]
        gzip = not metered and _accepts_gzip(self.by_name.get("accept-encoding", ""))
        sent.append((b"accept-encoding", b"gzip" if gzip else b"identity"))  # encodings that can be metered
        return tuple(sent)


def _accepts_gzip(accept_encoding: str) -> bool:
    """Return whether a caller accepts gzip. See RFC 9110, 12.5.3."""
    for part in accept_encoding.lower().split(","):
        name, _, weight = part.partition(";")
        if name.strip() == "gzip":
            return _NEVER.fullmatch(weight.strip()) is None
    return False
