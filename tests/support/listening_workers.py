"""Workers of a gateway that accept from one socket, all in one event loop, and their callers."""

from __future__ import annotations

import asyncio
import socket
from typing import Self

from forebay.gateway.workers.connection_counts import ConnectionCounts
from forebay.gateway.workers.worker_listener import WorkerListener

NEVER = 3_600.0  # seconds: longer than any test
TURNS = 5_000  # of the event loop, many more than any test needs


class WorkerConnection(asyncio.Protocol):
    """The worker's end of a connection."""

    def __init__(self, server: WorkerServer) -> None:
        self._server = server
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment] # those of uvloop are no subclass

    def connection_lost(self, _: BaseException | None) -> None:
        self._server.connections.discard(self)
        self._server.listener.publish()


class WorkerServer:
    """A server of a worker that only keeps its connections."""

    def __init__(self, listener: WorkerListener, max_connections: int) -> None:
        self.listener = listener
        self._max_connections = max_connections
        self.connections: set[WorkerConnection] = set()

    @property
    def open_connections(self) -> int:
        return len(self.connections)

    @property
    def is_full(self) -> bool:
        return len(self.connections) >= self._max_connections

    def __call__(self) -> asyncio.Protocol:
        connection = WorkerConnection(self)
        self.connections.add(connection)
        return connection


class CountedWaits(ConnectionCounts):
    """Counts of connections that also say how often a worker has waited for others."""

    waits = 0

    def wait(self, number: int) -> None:
        self.waits += 1
        super().wait(number)


class ListeningWorkers:
    """Workers of a gateway that accept from one socket.

    Attributes:
        counts: of their connections.
        servers: of the workers that were opened, by number.
    """

    def __init__(self, count: int, max_connections: int = 1_000) -> None:
        self._max_connections = max_connections
        self.counts = CountedWaits(count)
        self.servers: dict[int, WorkerServer] = {}
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._callers: list[socket.socket] = []
        self._expected = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (*self._callers, self._listening):
            each.close()
        self.counts.close()

    def listener(
        self, number: int, *, patience: float = NEVER, kind: type[socket.socket] = socket.socket
    ) -> WorkerListener:
        """Return the listener of a worker, with a descriptor of its own as after a fork."""
        listening = kind(fileno=self._listening.dup().detach())
        listening.setblocking(False)
        return WorkerListener(listening, self.counts, number, patience=patience)

    def open(self, *numbers: int, patience: float = NEVER, kind: type[socket.socket] = socket.socket) -> None:
        """Let these workers accept."""
        for number in numbers:
            listener = self.listener(number, patience=patience, kind=kind)
            self.servers[number] = WorkerServer(listener, self._max_connections)
            listener.open(self.servers[number])

    def connect(self, count: int = 1) -> None:
        """Make connections, which nobody has accepted yet."""
        address = self._listening.getsockname()
        self._callers += [socket.create_connection(address) for _ in range(count)]
        self._expected += count

    def open_connections(self) -> list[int]:
        """Return how many connections each worker has."""
        return [server.open_connections for _, server in sorted(self.servers.items())]

    async def settle(self) -> list[int]:
        """Return how many connections each worker has, once all are accepted, or nothing happens any more."""
        for _ in range(TURNS):
            if sum(self.open_connections()) == self._expected and self._all_are_made():
                break
            await asyncio.sleep(0)
        return self.open_connections()

    def _all_are_made(self) -> bool:
        return all(each.transport is not None for server in self.servers.values() for each in server.connections)

    async def hang_up(self, number: int, count: int) -> None:
        """End some connections of a worker."""
        for connection in list(self.servers[number].connections)[:count]:
            assert connection.transport is not None
            connection.transport.abort()
        self._expected -= count
        await self.settle()

    async def close(self) -> None:
        """Let all workers end."""
        for server in self.servers.values():
            await server.listener.close()
            for connection in server.connections:
                assert connection.transport is not None
                connection.transport.abort()
        await asyncio.sleep(0)
