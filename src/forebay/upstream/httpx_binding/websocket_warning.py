"""WebSockets of SDKs: they go past the transport, and so past the upstream, which says so when one is opened."""

from __future__ import annotations

import functools
from typing import Any, Final

_HOLDERS: Final = ("responses", "realtime", "live", "beta")  # of OpenAI's SDK, that can connect, or whose parts can
_OPENS: Final = "connect"
_CACHED: Final = "cached_property"


@functools.cache
def with_websocket_warning(kind: Any) -> Any:
    """A class of SDK clients, of which each copy says so when one of its resources opens a WebSocket."""
    names = [name for name in _HOLDERS if hasattr(kind, name)]
    return _watched(kind, names) if names else kind


@functools.cache
def _watched_resource(kind: Any) -> Any:
    """That of a part of a client, likewise."""
    names = [name for name in dir(kind) if type(getattr(kind, name, None)).__name__ == _CACHED and "with_" not in name]
    opens = callable(getattr(kind, _OPENS, None))
    return _watched(kind, names, opens=opens) if names or opens else kind


def _watched(kind: Any, names: list[str], *, opens: bool = False) -> Any:
    if getattr(kind, "forebay_watched", False):
        return kind
    told = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forebay_watched": True}
    watched = type(kind.__name__, (kind,), told)

    def part(name: str) -> property:
        def get(self: Any) -> Any:
            resource = getattr(super(watched, self), name)
            if hasattr(resource, "_client"):
                kind: Any = type(resource)
                resource.__class__ = _watched_resource(kind)
            return resource

        return property(get)

    def connect(self: Any, *args: Any, **how: Any) -> Any:
        binding = getattr(self._client._client._transport, "binding", None)  # noqa: SLF001
        if binding is not None:  # else it was given another HTTP client, which is not bound
            binding.upstream.warn_unmetered()
        return getattr(super(watched, self), _OPENS)(*args, **how)

    for name in names:
        setattr(watched, name, part(name))
    if opens:
        setattr(watched, _OPENS, functools.wraps(getattr(kind, _OPENS))(connect))
    return watched
