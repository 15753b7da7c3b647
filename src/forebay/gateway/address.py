"""Addresses: where a gateway listens, and the URL of a provider."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import SplitResult, urlsplit

_ADDRESS: Final = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s\[\]:/@]+)):(?P<port>[0-9]{1,5})")
_MAX_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port.

    Attributes:
        host: a name or an IP address; IPv6 without brackets.
        port: 0 for any free port.
    """

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether a name or an IP address is loopback. Names below ``localhost`` are: RFC 6761, 6.3."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def parse_address(text: object) -> Address | None:
    """Return the address in ``HOST:PORT``, or None if the text is not one."""
    match = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match["port"]) > _MAX_PORT:
        return None
    if match["ipv6"] is not None:
        try:
            ip_address(match["ipv6"])
        except ValueError:
            return None
    return Address(match["ipv6"] or match["host"], int(match["port"]))


def url_problem(url: object) -> str | None:
    """Return why a URL cannot be the base of calls, or None if it can."""
    parts = _split(url)
    if parts is None:
        return "this is not a URL"
    has_credentials = parts.username is not None or parts.password is not None
    checks = (
        (parts.scheme not in ("http", "https"), "it starts with neither"),
        (not parts.hostname, "it has no host"),
        (has_credentials, "it holds a user or password, but callers send their own keys, which pass through"),
        (parts.query or parts.fragment, "it ends in a '?' or '#', where no path can be appended"),
        (parts.path.rstrip("/").endswith("/v1"), "leave out its /v1, which is part of each call's path"),
    )
    return next((problem for wrong, problem in checks if wrong), None)


def _split(url: object) -> SplitResult | None:
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises ValueError if it is invalid
    except ValueError:
        return None
    return parts
