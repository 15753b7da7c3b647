"""Which provider a request is for, and where it goes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from forebay.gateway.settings import TargetSettings
from forebay.gateway.shapes import Protocol
from forebay.upstream import Upstream

_ANTHROPICS_OWN: Final = ("/v1/messages", "/v1/complete")
_ANTHROPICS_HEADERS: Final = frozenset({"anthropic-version", "x-api-key"})


class Target:
    """A provider behind the gateway.

    Attributes:
        settings: what it was given.
        upstream: through which its calls go.
        protocol: what it speaks.
    """

    def __init__(self, settings: TargetSettings) -> None:
        self.settings = settings
        self.name = settings.name
        self.upstream: Upstream = settings.upstream()
        self.protocol: Protocol = "anthropic" if settings.rules == "anthropic" else "openai"
        self.base = settings.url.rstrip("/")


class Place(NamedTuple):
    """Where a request goes.

    Attributes:
        target: the provider.
        path: there, with the query.
    """

    target: Target
    path: str

    @property
    def url(self) -> str:
        """The whole of it."""
        return self.target.base + self.path


def spoken(path: str, headers: Mapping[str, str]) -> Protocol:
    """Whose SDK sends a request, by its path or, where both have it (``/v1/models``), its headers."""
    if any(part in path for part in _ANTHROPICS_OWN):
        return "anthropic"
    return "anthropic" if not _ANTHROPICS_HEADERS.isdisjoint(headers) else "openai"


def find_place(targets: Sequence[Target], path: str, headers: Mapping[str, str]) -> Place | None:
    """Where a request goes; None if nowhere.

    ``/NAME/...`` is for the target of that name, whatever follows. ``/v1/...`` is for the first target that speaks what
    the request is written in.

    Args:
        targets: all there are.
        path: as it was sent, with the query.
        headers: of the request, by lower-case name.
    """
    if ".." in path.partition("?")[0].split("/"):
        return None  # it would leave what the target's URL says
    first, _, rest = path.lstrip("/").partition("/")
    for target in targets:
        if first == target.name and rest:
            return Place(target, "/" + rest)
    if first != "v1" or not rest:
        return None
    protocol = spoken(path, headers)
    return next((Place(target, path) for target in targets if target.protocol == protocol), None)
