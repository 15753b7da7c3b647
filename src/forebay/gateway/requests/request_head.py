"""Heads of requests, and a cache of those that have been read.

A client sends the same head with every call, but for the length of its body. To read one, check it, find out where it
leads and write the head that its provider gets took a quarter of the gateway's processor time of a call.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from forebay.gateway.connections.direct_request import RawHeaders
from forebay.gateway.connections.request_headers import RequestHeaders
from forebay.gateway.requests.client_timeouts import AnnouncedTimeouts
from forebay.gateway.targets.targets import Destination
from forebay.upstream.call_request import Caller

_MAX_HEADS: Final = 1000
_MAX_LENGTH: Final = 4096  # bytes of a head that is kept: callers choose them
_LENGTH_NAMES: Final = frozenset({b"content-length", b"Content-Length"})  # as clients write it


class RequestHead:
    """The head of a request, and what a gateway has found out about it.

    Args:
        method: such as ``"POST"``.
        path: as it was received, with the query.
        raw_headers: as they were received, without a Content-Length where the head is kept.

    Attributes:
        method: as given.
        path: as given.
        headers: of the request.
        timeouts: that they announce.
        valid: it was checked, and is for none of the gateway's own pages; set by the forwarder.
        headers_without_key: its headers without an issued key, once they were needed; set by the forwarder.
        destination: where it goes, if that depends on the settings of the gateway alone, as they are now; set by the
            forwarder, which has checked the head then. None: that is not known yet, or depends on more.
        caller: whose it is, if that depends on the head and the settings alone; set by the forwarder.
    """

    __slots__ = ("caller", "destination", "headers", "headers_without_key", "method", "path", "timeouts", "valid")

    def __init__(self, method: str, path: str, raw_headers: RawHeaders) -> None:
        self.method = method
        self.path = path
        self.headers = RequestHeaders(raw_headers)
        self.timeouts = AnnouncedTimeouts.read(self.headers.by_name)
        self.valid = False
        self.headers_without_key: RequestHeaders | None = None
        self.destination: Destination | None = None
        self.caller: Caller | None = None


class RequestHeads:
    """The heads that were read lately, for one gateway and its settings. The one that came first is dropped first."""

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: OrderedDict[tuple[str, str, RawHeaders], RequestHead] = OrderedDict()

    def __len__(self) -> int:
        return len(self._heads)

    def read(self, method: str, path: str, raw_headers: RawHeaders) -> RequestHead:
        """Return the head of a request, from the cache if the same one was read before.

        Args:
            method: such as ``"POST"``.
            path: as it was received, with the query.
            raw_headers: as they were received.
        """
        kept = tuple([pair for pair in raw_headers if pair[0] not in _LENGTH_NAMES])
        key = (method, path, kept)
        head = self._heads.get(key)
        if head is not None:
            return head
        if len(path) + sum([len(name) + len(value) for name, value in kept]) > _MAX_LENGTH:
            return RequestHead(method, path, raw_headers)
        if len(self._heads) >= _MAX_HEADS:
            self._heads.popitem(last=False)  # one at a time: to free all at once would hold up the calls under way
        head = self._heads[key] = RequestHead(method, path, kept)
        return head
