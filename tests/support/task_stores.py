"""The task stores that the tests run on. A new one adds a line to STORES, and is tested for every promise.

One that cannot run in virtual time adds it to ALL_STORES.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from tests.support import moto_server
from tests.support.fakeredis_server import shared_fakeredis
from tests.support.redis_servers import redis_cluster, redis_replicated, redis_sentinels, redis_server, shared

from forebay.interfaces import TaskRecord

DURABLE = "durable"  # an acknowledged write survives the process
SHARED = "shared"  # several processes may have it open at once
HISTORY = "history"  # so do attempts, keys, delays and what has ended: it is durable in all that it knows
ORDER = "order"  # the records that are leased are the best of all that wait
PROMPT = "prompt"  # a record that waits can be leased at once
ENVELOPE = "envelope"  # `find` returns the envelope of a record that waits or runs
FAST = "fast"  # a thousand operations take less than a few seconds


@dataclass(frozen=True)
class StoreBackend:
    """A kind of task store, and the promises that it makes beyond those that all make.

    Attributes:
        name: as it appears in the ids of tests.
        template: its URL; ``{path}`` is a directory of the test, ``{name}`` a name that only this directory has,
            ``{bound}`` how many tasks may wait or be leased, ``{server}`` what `server` returns.
        can: DURABLE, SHARED, HISTORY, ORDER, PROMPT, ENVELOPE, FAST.
        options: appended to the URL, one for each way to write; the last is the fastest.
        server: starts the server that the store needs, unless it runs, and returns its URL; None: it needs none.
        slow: tests of many random operations do fewer: one takes a millisecond, or another backend has the same code.
    """

    name: str
    template: str
    can: frozenset[str] = frozenset()
    options: tuple[str, ...] = ("",)
    server: Callable[[], str] | None = None
    slow: bool = False

    def __str__(self) -> str:
        return self.name

    def needs(self, capability: str) -> None:
        """Skip the test if the store lacks `capability`."""
        if capability not in self.can:
            pytest.skip(f"{self.name} is not {capability}")

    def as_found(self, record: TaskRecord) -> TaskRecord:
        """Return `record` as `find` returns it while it waits or runs."""
        return record if ENVELOPE in self.can else msgspec.structs.replace(record, envelope=b"")

    def start_server(self) -> None:
        """Start what the store needs, outside of an event loop. Skip the test where that is not installed."""
        if self.server is not None:
            self.server()

    def url(self, directory: Path, *, bound: int = 10_000, options: str = "") -> str:
        """Return the URL of the store that this backend has in `directory`."""
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        server = "" if self.server is None else self.server()
        return self.template.format(path=directory, bound=bound, name=name, server=server) + options

    def fast_url(self, directory: Path, *, bound: int = 10_000) -> str:
        """Return the same URL, for a store that need not survive a loss of power."""
        return self.url(directory, bound=bound, options=self.options[-1])


LASTING = frozenset({DURABLE, SHARED, HISTORY, ORDER, PROMPT, ENVELOPE, FAST})
REDIS = "{server}?name={name}&bound={bound}"


def on_redis(name: str, server: Callable[[], str], *, slow: bool = False, further: str = "") -> StoreBackend:
    return StoreBackend(name, REDIS + further, can=LASTING, server=server, slow=slow)


STORES = [
    StoreBackend("memory", "memory://?bound={bound}", can=frozenset({ORDER, PROMPT, ENVELOPE, FAST})),
    StoreBackend(
        "sqlite",
        "sqlite:///{path}/store.db?bound={bound}",
        can=LASTING,
        options=("&fsync=yes", "&fsync=checkpoint", "&fsync=no"),
        slow=True,
    ),
    on_redis("redis", lambda: shared(redis_server).url),
]
INDEXES = list(STORES)  # those that may be the index of a queue service
_SQS = "?endpoint={server}&region=eu-west-1&bound={bound}"
_INDEXED = _SQS + "&results=sqlite:///{path}/index.db?fsync=no"
_ON_SQS = frozenset({DURABLE, SHARED, HISTORY})
SQS_STORES = [
    StoreBackend("sqs", "sqs://{name}" + _INDEXED, can=_ON_SQS, server=moto_server.endpoint, slow=True),
    StoreBackend("sqs fifo", "sqs://{name}.fifo" + _INDEXED, can=_ON_SQS, server=moto_server.endpoint, slow=True),
    StoreBackend(
        "sqs redis",
        "sqs://{name}?region=eu-west-1&bound={bound}&endpoint={server}?name={name}",
        can=_ON_SQS,
        server=lambda: f"{moto_server.endpoint()}&results={shared(redis_server).url}",
        slow=True,
    ),
    StoreBackend("sqs alone", "sqs://{name}" + _SQS, can=frozenset({DURABLE}), server=moto_server.endpoint, slow=True),
]
SLOW_STORES = SQS_STORES[1:]  # whose tests are left out of `make test-quick`
# Further ways to run a store, for the contract alone: a supervisor sees no more of it than the contract.
ALL_STORES = [
    *STORES,
    on_redis("fakeredis", shared_fakeredis, slow=True),
    on_redis("replicated", lambda: shared(redis_replicated).url, slow=True, further="&replicas=1"),
    on_redis("sentinel", lambda: shared(redis_sentinels).url, slow=True),
    on_redis("cluster", lambda: shared(redis_cluster).url, slow=True),
    *SQS_STORES,
]
DURABLE_STORES = [backend for backend in STORES if DURABLE in backend.can]
SHARED_STORES = [backend for backend in DURABLE_STORES if SHARED in backend.can]
SHARED_SERVICES = [*SHARED_STORES, SQS_STORES[0]]  # also those that cannot run in virtual time
OVERFLOWS: list[StoreBackend | None] = [None, *STORES]  # what a supervisor may have


def overflow_url(backend: StoreBackend | None, directory: Path, *, bound: int = 10_000) -> str | None:
    """Return the fastest URL for `overflow=`, or None for a supervisor without one."""
    return None if backend is None else backend.fast_url(directory, bound=bound)
