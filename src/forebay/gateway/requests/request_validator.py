"""Checks of a request's head, before it is authorized: bounds of HTTP, and requests that a web page may have forged."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from forebay.gateway.address import is_loopback
from forebay.upstream.providers import CREDENTIAL_HEADERS

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CONTAINER_NAMES: Final = frozenset({"host.docker.internal", "host.containers.internal"})  # of the container's host
_FIELD_OVERHEAD: Final = 4  # bytes of a header field besides its name and value
_MAX_SHOWN: Final = 100  # characters of a header in a message


class RequestError(NamedTuple):
    """The reason why a request is rejected.

    Attributes:
        status: the HTTP status.
        code: for programs.
        message: for a person, with what to do.
    """

    status: int
    code: str
    message: str


class RequestValidator:
    """The checks of a gateway.

    Args:
        max_header_bytes: of a request's headers together.
        local_only: the gateway asks for no token, so it serves only requests addressed to this machine, and none from a
            web page of another origin, which could otherwise use the gateway unnoticed.
    """

    def __init__(self, *, max_header_bytes: int, local_only: bool) -> None:
        self._max_header_bytes = max_header_bytes
        self._local_only = local_only

    def find_error(
        self, method: str, headers: Mapping[str, str], raw_headers: Sequence[tuple[bytes, bytes]]
    ) -> RequestError | None:
        """Return why a request is rejected, or None if it passes.

        Args:
            method: such as ``"POST"``.
            headers: by lower-case name.
            raw_headers: the same, as they were received.
        """
        if sum([len(name) + len(value) + _FIELD_OVERHEAD for name, value in raw_headers]) > self._max_header_bytes:
            message = f"the headers are longer than {self._max_header_bytes:,} bytes, the limit of this gateway"
            return RequestError(431, "forebay_long_head", message)
        if method not in _METHODS:
            message = f"the method {method} is not allowed; allowed are {', '.join(sorted(_METHODS))}"
            return RequestError(405, "forebay_method", message)
        if problem := _find_bad_credential(headers, raw_headers):
            return RequestError(400, "forebay_header", problem)
        coding = headers.get("transfer-encoding", "chunked")
        if coding.lower() != "chunked":
            return RequestError(501, "forebay_coding", "the only supported Transfer-Encoding is 'chunked'")
        if headers.get("expect", "100-continue").lower() != "100-continue":
            return RequestError(417, "forebay_expect", "the only supported Expect is '100-continue'")
        return self._find_foreign_origin(headers) if self._local_only else None

    def _find_foreign_origin(self, headers: Mapping[str, str]) -> RequestError | None:
        host, origin = headers.get("host"), headers.get("origin")
        advice = "to allow it, let the gateway ask for a token (--token-env VARIABLE)"
        if host is not None and not _is_local("//" + host):
            shown = host[:_MAX_SHOWN]
            message = f"without a token this gateway serves its own machine only, not the Host {shown!r}: {advice}"
            return RequestError(403, "forebay_host", message)
        if origin is not None and not _is_local(origin):
            shown = origin[:_MAX_SHOWN]
            message = f"without a token this gateway serves no web page of {shown!r}: {advice}"
            return RequestError(403, "forebay_origin", message)
        # Browsers send no Origin with the GET of an image or a link.
        foreign = headers.get("sec-fetch-site") == "cross-site" and origin is None
        if foreign and not _is_local(headers.get("referer", "")):
            message = f"without a token this gateway serves no web page of another site: {advice}"
            return RequestError(403, "forebay_origin", message)
        return None


def _find_bad_credential(headers: Mapping[str, str], raw_headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return why the provider would not get the API key of a request as it is read here; empty if it would.

    The call would be counted for a key that the provider never sees.
    """
    for name in CREDENTIAL_HEADERS:
        if not _can_be_sent(headers.get(name, "")):
            return f"the header {name} has characters besides the printable ones of ASCII: send the key alone"
    if len(headers) < len(raw_headers) and (name := _find_repeated_credential(raw_headers)):
        return f"the header {name} is there twice, so that servers do not agree whose call it is: send one"
    if "connection" in headers and (name := _find_dropped_credential(raw_headers)):
        return f"the header Connection names {name}, so that it would not reach the provider: remove it there"
    return ""


def _find_repeated_credential(raw_headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return the name of a header with an API key that is repeated; empty if there is none."""
    names = [name.decode("latin-1").lower() for name, _ in raw_headers]
    return next((name for name in CREDENTIAL_HEADERS if names.count(name) > 1), "")


def _find_dropped_credential(raw_headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return the name of a header with an API key that a Connection header declares hop-by-hop; empty if none."""
    listed = b",".join([value for name, value in raw_headers if name.lower() == b"connection"]).decode("latin-1")
    named = {name.strip().lower() for name in listed.split(",")}
    return next((name for name in CREDENTIAL_HEADERS if name in named), "")


def _can_be_sent(credential: str) -> bool:
    """Return whether a provider gets a credential as it is read here: other bytes are changed on the way."""
    return credential.isascii() and credential.replace("\t", " ").isprintable()


@functools.lru_cache(maxsize=256)
def _is_local(url: str) -> bool:
    """Return whether the host of a URL is this machine by definition, so that no DNS record can claim to be it."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return host in _CONTAINER_NAMES or is_loopback(host)
