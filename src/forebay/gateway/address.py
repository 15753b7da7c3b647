"""Where a gateway listens, and where a provider is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import SplitResult, urlsplit

_ADDRESS: Final = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s\[\]:/@]+)):(?P<port>[0-9]{1,5})")
_PORTS: Final = 65_535


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port.

    Attributes:
        host: a name or an address, an IPv6 one without brackets.
        port: 0 for any that is free.
    """

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is of this machine alone. Names below ``localhost`` are: RFC 6761, 6.3."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def parse_address(text: object) -> Address | None:
    """Read ``HOST:PORT``; None if it is none."""
    match = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match["port"]) > _PORTS:
        return None
    if match["six"] is not None:
        try:
            ip_address(match["six"])
        except ValueError:
            return None
    return Address(match["six"] or match["host"], int(match["port"]))


def url_problem(url: object) -> str | None:
    """Why calls could not be sent below this URL; None if they could."""
    parts = _split(url)
    if parts is None:
        return "this is no address"
    named = parts.username is not None or parts.password is not None
    checks = (
        (parts.scheme not in ("http", "https"), "it begins with neither"),
        (not parts.hostname, "it names no host"),
        (named, "it holds a name or a password, but the keys are the callers', and pass through"),
        (parts.query or parts.fragment, "it ends in a '?' or '#', where nothing can be appended"),
        (parts.path.rstrip("/").endswith("/v1"), "leave out its /v1, which comes with each call"),
    )
    return next((problem for wrong, problem in checks if wrong), None)


def _split(url: object) -> SplitResult | None:
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is none
    except ValueError:
        return None
    return parts
