"""The HTTP gateway: upstreams for other processes and languages, whose clients change only their base URL."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

from forebay.gateway.secret import InvalidProviderKey, InvalidSecret, MissingFallbackKey
from forebay.gateway.settings import (
    ContextSettings,
    DeploymentSettings,
    FallbackSettings,
    GatewaySettings,
    KeySettings,
    ModelSettings,
    QuotaSettings,
    TargetSettings,
    TenantSettings,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from forebay.gateway.workers.worker_processes import Listening

_LIBRARIES: Final = ("aiohttp", "prometheus_client")


def missing_libraries() -> list[str]:
    """Return the libraries that the gateway needs and that are not installed."""
    return [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]


def serve(
    settings: GatewaySettings,
    *,
    ready: Callable[[Listening], object] = lambda _: None,
    reload: Callable[[], GatewaySettings] | None = None,
    reloaded: Callable[[], object] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain; return the exit status.

    Args:
        settings: of the gateway.
        ready: called with what has its port once it listens; with several workers, once all do.
        reload: returns the settings to go on with after a SIGHUP; it may raise a `ForebayError`, and then nothing
            changes. It is called in a thread. None: a SIGHUP stops the gateway, unless it is ignored.
        reloaded: called once the gateway serves by these settings.

    Raises:
        InvalidSecret: the token is missing, or not fit to be one.
        MissingFallbackKey: the API key of a fallback is missing.
        InvalidProviderKey: the API key of a target is missing, or a header cannot carry it.
        InvalidSetting: a fallback leads to a target of another protocol; an HTTP proxy of the environment is invalid.
        StoreUnavailable: the file of issued keys is missing, or cannot be read.
        CannotListen: the address is in use, or not one of this machine.
        WorkersNotSupported: there are to be several workers, and this system cannot fork.
        StoreUnavailable: the spend log cannot be opened.
    """
    from forebay.gateway.server import run_forever  # noqa: PLC0415 - aiohttp and prometheus_client are extras

    return run_forever(settings, ready, reload, reloaded)


__all__ = [
    "ContextSettings",
    "DeploymentSettings",
    "FallbackSettings",
    "GatewaySettings",
    "InvalidProviderKey",
    "InvalidSecret",
    "KeySettings",
    "MissingFallbackKey",
    "ModelSettings",
    "QuotaSettings",
    "TargetSettings",
    "TenantSettings",
    "missing_libraries",
    "serve",
]
