"""The places where tests keep sagas. A new one adds a line to LOGS, and is tested for every promise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.redis_servers import redis_cluster, redis_replicated, redis_server, shared


@dataclass(frozen=True)
class LogBackend:
    """A kind of saga log.

    Attributes:
        name: as it appears in the ids of tests.
        template: its URL; ``{path}`` is a directory of the test, ``{name}`` a name that only this directory has,
            ``{server}`` what `server` returns.
        options: appended to the URL for tests of many operations, which need not survive a loss of power.
        server: starts the server that it needs, unless it runs, and returns its URL; None: it needs none.
        durable: whether it survives its process, and other processes may have it open.
    """

    name: str
    template: str
    options: str = ""
    server: Callable[[], str] | None = None
    durable: bool = True

    def __str__(self) -> str:
        return self.name

    def needs_durability(self) -> None:
        """Skip the test if the log is not durable."""
        if not self.durable:
            pytest.skip(f"{self.name} is not durable")

    def url(self, directory: Path) -> str:
        """Return the URL of the log that this backend has in `directory`. Blocks: outside of an event loop."""
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        server = "" if self.server is None else self.server()
        return self.template.format(path=directory, name=name, server=server)

    def fast_url(self, directory: Path) -> str:
        """Return the same URL, for a log that need not survive a loss of power."""
        return self.url(directory) + self.options


LOGS = [
    LogBackend("memory", "memory://", durable=False),
    LogBackend("sqlite", "sqlite:///{path}/saga.db", options="?fsync=no"),
    LogBackend("redis", "{server}?name={name}", server=lambda: shared(redis_server).url),
    LogBackend("redis replicated", "{server}?name={name}&replicas=1", server=lambda: shared(redis_replicated).url),
    LogBackend("redis cluster", "{server}?name={name}", server=lambda: shared(redis_cluster).url),
]
DURABLE_LOGS = [backend for backend in LOGS if backend.durable]
