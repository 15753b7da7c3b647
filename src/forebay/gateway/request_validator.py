"""What is refused before anybody asks whose it is: what no SDK sends, and what a web page may have sent unasked."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from forebay.gateway.address import is_loopback

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FROM_CONTAINERS: Final = frozenset({"host.docker.internal", "host.containers.internal"})  # the machine's names there
_BETWEEN: Final = 4  # bytes of a header field beside its name and its value


class RequestError(NamedTuple):
    """Why a request is refused.

    Attributes:
        status: of HTTP.
        code: one word for programs.
        message: for a person: what to do.
    """

    status: int
    code: str
    message: str


class RequestValidator:
    """Looks at the heads of requests.

    Args:
        most: bytes of a request's headers together.
        own_only: nobody is asked for a token, so requests must be meant for this machine, and not be sent by a page
            that a browser got elsewhere: such a page could otherwise use what this gateway has.
    """

    def __init__(self, *, max_header_bytes: int, local_only: bool) -> None:
        self._most = max_header_bytes
        self._own_only = local_only

    def find_error(
        self, method: str, headers: Mapping[str, str], raw_headers: Sequence[tuple[bytes, bytes]]
    ) -> RequestError | None:
        """Why a request is refused; None if it is not.

        Args:
            method: such as ``"POST"``.
            headers: by lower-case name.
            raw: the same, as they came.
        """
        if sum([len(name) + len(value) + _BETWEEN for name, value in raw_headers]) > self._most:
            message = f"the headers are longer than {self._most:,} bytes, the bound of this gateway"
            return RequestError(431, "forebay_long_head", message)
        if method not in _METHODS:
            return RequestError(
                405, "forebay_method", f"{method} does not pass: there are {', '.join(sorted(_METHODS))}"
            )
        coding = headers.get("transfer-encoding", "chunked")
        if coding.lower() != "chunked":
            return RequestError(501, "forebay_coding", "of transfer codings only 'chunked' is understood")
        if headers.get("expect", "100-continue").lower() != "100-continue":
            return RequestError(417, "forebay_expect", "nothing but '100-continue' may be expected")
        return self._find_foreign_origin(headers) if self._own_only else None

    def _find_foreign_origin(self, headers: Mapping[str, str]) -> RequestError | None:
        host, origin = headers.get("host"), headers.get("origin")
        instead = "to be called from there, let the gateway ask for a token (--token-env VARIABLE)"
        if host is not None and not _is_local("//" + host):
            message = f"this gateway is for callers on its own machine, but the Host is {host[:100]!r}: {instead}"
            return RequestError(403, "forebay_host", message)
        if origin is not None and not _is_local(origin):
            message = f"this gateway is not for pages of {origin[:100]!r}: {instead}"
            return RequestError(403, "forebay_origin", message)
        return None


@functools.lru_cache(maxsize=256)
def _is_local(url: str) -> bool:
    """Whether a URL names this machine, which no other can make its own name mean."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return host in _FROM_CONTAINERS or is_loopback(host)
