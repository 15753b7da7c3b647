"""The directory where commands keep what must survive them, as the XDG Base Directory Specification has it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from urllib.parse import quote

import msgspec

from forebay._validate import reject
from forebay.errors import StoreUnavailable
from forebay.gateway import GatewaySettings
from forebay.gateway.workers.worker_channel import keep_from_cleaning
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
    """Return the settings of a gateway with a spend log of its own, if it has a budget or issues keys, and names none.

    Each port has its own file, so that two gateways of one machine do not count each other's calls. So one on any free
    port (0) has none: the next one on such a port would not be the same gateway.

    Raises:
        InvalidSetting: there is no directory for it.
    """
    if settings.spend_log is not None or not settings.has_budgets or not settings.address.port:
        return settings
    path = state_directory(environment) / f"{_PREFIX}{settings.address.port}{_SUFFIX}"
    return msgspec.structs.replace(settings, spend_log=f"sqlite:///{quote(str(path))}")


@contextmanager
def default_shared(settings: GatewaySettings, environment: Mapping[str, str]) -> Iterator[str | None]:
    """Yield the URL of the store of a gateway's limits: one of its own, if it has several workers and names none.

    With a budget it is a file that survives, by the port; else one in a private directory that is removed.

    Raises:
        InvalidSetting, StoreUnavailable: there is no directory for it.
    """
    if settings.shared is not None or settings.workers == 1:
        yield settings.shared
        return
    if settings.has_budgets and settings.address.port:
        directory = state_directory(environment).absolute()
        _make_directory(directory, "Name another file by --shared sqlite:////absolute.db.")
        yield f"sqlite:///{quote(str(directory / f'account-{settings.address.port}.db'))}"
        return
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    base = runtime if os.path.isabs(runtime) and Path(runtime).is_dir() else None  # noqa: PTH117 - as above
    made = mkdtemp(prefix="forebay-gateway-", dir=base)  # not a TemporaryDirectory: a worker that ends would remove it
    keep_from_cleaning(made)
    try:
        yield f"sqlite:///{quote(made)}/account.db?fsync=no"
    finally:
        rmtree(made, ignore_errors=True)


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
    advice = "Name another file by --spend-log sqlite:////absolute.db, or give --spend-log none to keep no spend."
    _make_directory(directory, advice)


def _make_directory(directory: Path, advice: str) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"its directory cannot be made: {error.strerror}"
        raise StoreUnavailable(where=str(directory), why=why, advice=advice) from None
