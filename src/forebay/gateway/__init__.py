"""The gateway: the call plane for other processes and languages, which change nothing but a base URL."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

from forebay.gateway.secret import InvalidSecret, MissingFallbackKey
from forebay.gateway.settings import ContextSettings, FallbackSettings, GatewaySettings, QuotaSettings, TargetSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay.gateway.server import Gateway

_LIBRARIES: Final = ("aiohttp", "prometheus_client")


def missing_libraries() -> list[str]:
    """Libraries that the gateway needs and that are not installed here."""
    return [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]


def serve(settings: GatewaySettings, *, ready: Callable[[Gateway], object] = lambda _: None) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns the exit status.

    Args:
        settings: what it was given.
        ready: called once it listens.

    Raises:
        InvalidSecret: the token is not there, or is not fit for one.
        CannotListen: the address is taken, or is none of this machine's.
    """
    from forebay.gateway.server import run_forever  # noqa: PLC0415 - aiohttp and prometheus_client are extras

    return run_forever(settings, ready)


__all__ = [
    "ContextSettings",
    "FallbackSettings",
    "GatewaySettings",
    "InvalidSecret",
    "MissingFallbackKey",
    "QuotaSettings",
    "TargetSettings",
    "missing_libraries",
    "serve",
]
