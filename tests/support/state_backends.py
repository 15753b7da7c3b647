"""The places where tests keep shared state. A new one adds a line to BACKENDS, and is tested for every promise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.fakeredis_server import shared_fakeredis
from tests.support.redis_servers import redis_cluster, redis_replicated, redis_sentinels, redis_server, shared


@dataclass(frozen=True)
class StateBackend:
    """A kind of place for state.

    Attributes:
        name: as it appears in the ids of tests.
        templates: the URLs of its shards; ``{path}`` is a directory of the test, ``{name}`` a name that only this
            directory has, ``{server}`` what `server` returns.
        server: starts the server that it needs, unless it runs, and returns its URL; None: it needs none.
        is_shared: several processes, or connections, may have it open.
    """

    name: str
    templates: tuple[str, ...]
    server: Callable[[], str] | None = None
    is_shared: bool = True

    def __str__(self) -> str:
        return self.name

    def urls(self, directory: Path) -> list[str]:
        """Return the URLs of the shards that this backend has in `directory`. Blocks: outside of an event loop."""
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        server = "" if self.server is None else self.server()
        return [template.format(path=directory, name=name, server=server) for template in self.templates]


_REDIS = ("{server}?name={name}",)
_SHARDS = tuple(f"{{server}}?name={{name}}-{letter}" for letter in "abc")

BACKENDS = [
    StateBackend("memory", ("memory://",), is_shared=False),
    StateBackend("sqlite", ("sqlite:///{path}/state.db?fsync=no",)),
    StateBackend("sqlite shards", tuple(f"sqlite:///{{path}}/{letter}.db?fsync=no" for letter in "abc")),
    StateBackend("redis", _REDIS, lambda: shared(redis_server).url),
    StateBackend("redis shards", _SHARDS, lambda: shared(redis_server).url),
    StateBackend("fakeredis", _REDIS, shared_fakeredis),
    StateBackend("replicated", ("{server}?name={name}&replicas=1",), lambda: shared(redis_replicated).url),
    StateBackend("sentinel", _REDIS, lambda: shared(redis_sentinels).url),
    StateBackend("cluster", _REDIS, lambda: shared(redis_cluster).url),
]
# The same kinds with four shards, between which entries are moved.
MOVING_BACKENDS = [
    StateBackend("memory", (), is_shared=False),
    StateBackend("sqlite", tuple(f"sqlite:///{{path}}/{letter}.db?fsync=no" for letter in "abcd")),
    *(
        StateBackend(each.name, tuple(f"{each.templates[0]}-{letter}" for letter in "abcd"), each.server)
        for each in BACKENDS
        if each.templates == _REDIS
    ),
]
SHARED_BACKENDS = [backend for backend in BACKENDS if backend.is_shared]
