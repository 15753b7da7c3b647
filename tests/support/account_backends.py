"""The places where tests keep an account. A new one adds a line to BACKENDS, and is tested for every promise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support.redis_servers import redis_cluster, redis_server, shared

from forebay import Upstream, clock
from forebay.storage import parse_url
from forebay.storage.redis_master import RedisMaster
from forebay.storage.redis_url import RedisUrl
from forebay.upstream.shared.leases.exchange_loop import ExchangeThread
from forebay.upstream.shared.stores import redis_store
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore
from forebay.upstream.shared.stores.redis_store import RedisLedgerStore
from forebay.upstream.shared.stores.store import LedgerStore

_TIME: Final = "redis.call('TIME')"


class _VirtualTimeMaster:
    """A connection to a Redis master whose script takes the time from its caller, and not from the server's clock."""

    def __init__(self, url: RedisUrl) -> None:
        script = redis_store._SCRIPT
        assert script.count(_TIME) == 1
        script = script.replace(_TIME, "{ARGV[2], 0}")
        self._sha = hashlib.sha1(script.encode()).hexdigest()  # noqa: S324 - the name that Redis gives it
        self._master = RedisMaster(url, url.name, prepare=[("SCRIPT", "LOAD", script)])
        self.close = self._master.close

    def call(self, *commands: Sequence[Any]) -> list[Any]:
        now = repr(clock.wall_time())
        return self._master.call(
            *(("EVALSHA", self._sha, *each[2:], now) if each[0] == "EVALSHA" else each for each in commands)
        )


class VirtualTimeRedisStore(RedisLedgerStore):
    """A store of ledgers on a real Redis, in virtual time."""

    def _new_master(self) -> Any:
        return _VirtualTimeMaster(self._url)


class OpenAccounts:
    """The upstreams of one test on one backend: each is a process of its own, as far as the others can tell.

    Args:
        store: returns what is given as ``shared=``; None: the account is this process's.
    """

    def __init__(self, store: Callable[[], str | LedgerStore | None]) -> None:
        self._store = store
        self.upstreams: list[Upstream] = []

    def open(self, name: str = "llm", **settings: Any) -> Upstream:
        """Return an upstream; another one of the same name and settings is another process of the same account."""
        self.upstreams.append(Upstream(name, shared=self._store(), **settings))
        return self.upstreams[-1]

    def needs_sharing(self) -> str:
        """Skip the test if an account is that of one process alone; return the URL of its store, or ""."""
        store = self._store()
        if store is None:
            pytest.skip("the account is that of one process")
        return store if isinstance(store, str) else ""

    def close(self) -> None:
        """Leave all ledgers, and disconnect, as at the end of the processes."""
        links = [link for upstream in self.upstreams if (link := upstream.core.link) is not None]
        for loop in [link.begin_close() for link in links]:
            if isinstance(loop, ExchangeThread):
                loop.join()
        for link in links:
            link.store.close()
        self.upstreams.clear()


@dataclass(frozen=True)
class AccountBackend:
    """A place where an account is kept.

    Attributes:
        name: as it appears in the ids of tests.
        template: the URL; ``{path}`` is a directory of the test, ``{name}`` a name that only this directory has,
            ``{server}`` what `server` returns; empty for a store in memory, None for an account of one process.
        server: starts the server that it needs, unless it runs, and returns its URL; None: it needs none.
    """

    name: str
    template: str | None
    server: Callable[[], str] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_shared(self) -> bool:
        """True if other processes may have the same account open."""
        return self.template is not None

    @property
    def blocks(self) -> bool:
        """True if an exchange blocks its thread, which is that of the event loop in virtual time."""
        return bool(self.template)

    @contextmanager
    def accounts(self, directory: Path) -> Iterator[OpenAccounts]:
        """Open what this backend has in `directory`, and close it. Blocks: outside of an event loop."""
        opened = OpenAccounts(self._opener(directory))
        yield opened
        opened.close()

    def _opener(self, directory: Path) -> Callable[[], str | LedgerStore | None]:
        if self.template is None:
            return lambda: None
        if not self.template:
            store = MemoryLedgerStore()
            return lambda: store
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        server = "" if self.server is None else self.server()
        url = self.template.format(path=directory, name=name, server=server)
        redis = parse_url(url).redis
        if redis is None:
            return lambda: url
        return lambda: url if clock.running_virtual_loop() is None else VirtualTimeRedisStore(redis)


class AccountProcesses:
    """The processes that have one account open.

    Args:
        accounts: opens their upstreams.
        count: how many there are.
    """

    def __init__(self, accounts: OpenAccounts, count: int) -> None:
        self._accounts = accounts
        self.count = count

    def open(self, name: str = "llm", **settings: Any) -> list[Upstream]:
        """Return the upstream of each process."""
        return [self._accounts.open(name, **settings) for _ in range(self.count)]


BACKENDS: Final = [
    AccountBackend("local", None),
    AccountBackend("memory", ""),
    AccountBackend("sqlite", "sqlite:///{path}/account.db?fsync=no"),
    AccountBackend("redis", "{server}?name={name}", server=lambda: shared(redis_server).url),
    AccountBackend("redis cluster", "{server}?name={name}", server=lambda: shared(redis_cluster).url),
]
SHARED_BACKENDS: Final = [backend for backend in BACKENDS if backend.is_shared]
# On which two processes are tested: a cluster runs the script of a single Redis.
PAIRED_BACKENDS: Final = [backend for backend in SHARED_BACKENDS if backend.name != "redis cluster"]
