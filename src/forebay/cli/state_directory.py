"""The directory where commands keep what must survive them, as the XDG Base Directory Specification has it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from forebay._validate import reject
from forebay.errors import StoreUnavailable
from forebay.gateway import GatewaySettings
from forebay.spend_log import parse_spend_log

_PREFIX, _SUFFIX = "gateway-", ".db"


def state_directory(environment: Mapping[str, str]) -> Path:
    """Return the directory: ``$XDG_STATE_HOME/forebay``, by default ``~/.local/state/forebay``.

    Raises:
        InvalidSetting: there is none, since this user has no home directory.
    """
    base = environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(base):  # noqa: PTH117 - the specification: a relative one is ignored
        return Path(base) / "forebay"
    try:
        home = Path(environment.get("HOME") or Path.home())
    except RuntimeError:
        expected = "sqlite:////absolute.db or none: this user has no home directory, and XDG_STATE_HOME is not set"
        reject("forebay gateway", "--spend-log", None, expected)
    return home / ".local" / "state" / "forebay"


def with_default_spend_log(settings: GatewaySettings, environment: Mapping[str, str]) -> GatewaySettings:
    """Return the settings of a gateway with a spend log of its own, if it has a budget and names none.

    Each port has its own file, so that two gateways of one machine do not count each other's calls.

    Raises:
        InvalidSetting: there is no directory for it.
    """
    if settings.spend_log is not None or not has_budgets(settings):
        return settings
    path = state_directory(environment) / f"{_PREFIX}{settings.address.port}{_SUFFIX}"
    return msgspec.structs.replace(settings, spend_log=f"sqlite:///{quote(str(path))}")


def has_budgets(settings: GatewaySettings) -> bool:
    """Return whether a gateway has a budget, or may have: those of issued keys are in their file, which changes."""
    return (
        settings.keys is not None
        or any(target.has_budgets for target in settings.targets)
        or any(tenant.has_budgets for tenant in settings.tenants)
    )


def default_spend_logs(environment: Mapping[str, str]) -> Sequence[Path]:
    """Return the spend logs of gateways in the state directory.

    Raises:
        InvalidSetting: there is no such directory.
    """
    return sorted(state_directory(environment).glob(f"{_PREFIX}*{_SUFFIX}"))


def make_state_directory(settings: GatewaySettings, environment: Mapping[str, str]) -> None:
    """Make the directory of a spend log that is in the state directory.

    Raises:
        StoreUnavailable: it cannot be made.
    """
    if settings.spend_log_url is None:
        return
    directory = parse_spend_log(settings.spend_log_url).path.parent
    if directory != state_directory(environment).absolute():
        return
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"its directory cannot be made: {error.strerror}"
        advice = "Name another file by --spend-log sqlite:////absolute.db, or give --spend-log none to keep no spend."
        raise StoreUnavailable(where=str(directory), why=why, advice=advice) from None
