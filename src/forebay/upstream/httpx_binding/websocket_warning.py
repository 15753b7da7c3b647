"""A warning about WebSockets of SDKs: they bypass the transport, so the upstream neither paces nor counts them."""

from __future__ import annotations

import functools
from typing import Any, Final

_RESOURCES: Final = ("responses", "realtime", "live", "beta")  # of OpenAI's SDK: they, or their parts, can connect
_CONNECT: Final = "connect"
_CACHED: Final = "cached_property"


@functools.cache
def with_websocket_warning(kind: Any) -> Any:
    """Return a class of SDK clients that warns when one of its resources opens a WebSocket."""
    names = [name for name in _RESOURCES if hasattr(kind, name)]
    return _subclass(kind, names) if names else kind


@functools.cache
def _resource_with_warning(kind: Any) -> Any:
    """Return the class of a client's resource, with the same warning."""
    names = [name for name in dir(kind) if type(getattr(kind, name, None)).__name__ == _CACHED and "with_" not in name]
    connects = callable(getattr(kind, _CONNECT, None))
    return _subclass(kind, names, connects=connects) if names or connects else kind


def _subclass(kind: Any, names: list[str], *, connects: bool = False) -> Any:
    if getattr(kind, "forebay_warns", False):
        return kind
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forebay_warns": True}
    subclass = type(kind.__name__, (kind,), members)

    def part(name: str) -> property:
        def get(self: Any) -> Any:
            resource = getattr(super(subclass, self), name)
            if hasattr(resource, "_client"):
                kind: Any = type(resource)
                resource.__class__ = _resource_with_warning(kind)
            return resource

        return property(get)

    def connect(self: Any, *args: Any, **how: Any) -> Any:
        binding = getattr(self._client._client._transport, "binding", None)  # noqa: SLF001
        if binding is not None:  # otherwise it has another HTTP client, which is not bound
            binding.core.warn_unmetered()
        return getattr(super(subclass, self), _CONNECT)(*args, **how)

    for name in names:
        setattr(subclass, name, part(name))
    if connects:
        setattr(subclass, _CONNECT, functools.wraps(getattr(kind, _CONNECT))(connect))
    return subclass
