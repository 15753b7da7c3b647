"""The store of ledgers that a URL names."""

from __future__ import annotations

from typing import Final, NoReturn
from urllib.parse import parse_qsl, urlsplit

from forebay._validate import reject
from forebay.errors import InvalidOverflowUrl, StoreNotInstalled
from forebay.storage import Fsync, StoreUrl, parse_url
from forebay.storage.shown_url import shown_url
from forebay.upstream.shared.stores.store import LedgerStore

_FORMS: Final = (
    "sqlite:///account.db, sqlite:////absolute/account.db (?fsync=yes, checkpoint or no), redis://host:6379/0,"
    " redis+sentinel://host:26379/service/0, redis+cluster://host:6379 (rediss for TLS; ?name=, replicas=, fsync=yes)"
)


def open_ledger_store(owner: str, shared: str | LedgerStore) -> LedgerStore:
    """Return the store that a URL names, not connected yet; a store is returned as it is.

    Args:
        owner: whose argument it is, for messages.
        shared: ``sqlite:///relative.db`` or ``sqlite:////absolute.db`` (with ``?fsync=yes|checkpoint|no``),
            ``redis://host:port/database``, ``redis+sentinel://...``, ``redis+cluster://...``, or a store.

    Raises:
        InvalidSetting: it is neither a URL of these nor a store.
        StoreNotInstalled: the library for Redis is missing.
    """
    if not isinstance(shared, str):
        if not hasattr(shared, "exchange") or not hasattr(shared, "reset_after_fork"):
            reject(owner, "shared", shared, f"the URL of a store: {_FORMS}")
        return shared
    return _open(owner, shared, _parse(owner, shared))


def _open(owner: str, shared: str, store: StoreUrl) -> LedgerStore:
    if store.path is not None:
        from forebay.upstream.shared.stores.sqlite_store import SqliteLedgerStore  # noqa: PLC0415 - it imports sqlite3

        return SqliteLedgerStore(store.path, fsync=store.fsync if "fsync" in _options(shared) else Fsync.CHECKPOINT)
    if store.redis is not None:
        try:
            from forebay.upstream.shared.stores.redis_store import RedisLedgerStore  # noqa: PLC0415 - it imports redis
        except ModuleNotFoundError:
            raise StoreNotInstalled(where=str(store.redis), library="redis", extra="redis") from None
        return RedisLedgerStore(store.redis)
    if store.scheme == "memory":
        _reject(owner, shared, "no other process can see what is in memory: leave shared= out")
    return _reject(owner, shared, f"no account is kept in {store.scheme}://")


def _parse(owner: str, shared: str) -> StoreUrl:
    try:
        store = parse_url(shared)
    except InvalidOverflowUrl as error:  # whose forms are those of an overflow
        _reject(owner, shared, error.why)
    if "bound" in _options(shared):
        _reject(owner, shared, "bound is an option of an overflow, and a shared account has none")
    return store


def _options(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def _reject(owner: str, shared: str, why: str) -> NoReturn:
    reject(owner, "shared", shown_url(shared), f"the URL of a store ({_FORMS}): {why}")
