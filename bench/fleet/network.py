"""A network in memory under virtual time: servers and clients keep their code, and only the sockets are not there.

What is written on one end is read on the other in the same moment, in order. Whatever runs over it parses and writes
the bytes that it would over TCP.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler

from forebay.simulation.loop.virtual_loop import VirtualLoop

_FIRST_PORT = 20_000


class End(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self._loop = loop
        self._protocol = protocol
        self._unread: deque[bytes] = deque()
        self._closing = self._lost = self._paused = self._ended = False
        self.other: End

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send; after the end it goes nowhere, as with a socket."""
        if data and not self._closing:
            self._loop.call_soon(self.other._come, bytes(data))  # noqa: SLF001 - its own kind

    def _come(self, data: bytes) -> None:
        if self._lost:
            return
        if self._paused:
            self._unread.append(data)
        else:
            self._protocol.data_received(data)

    def _end(self) -> None:
        """The other end has closed, and all that it sent has come."""
        if self._lost:
            return
        if self._paused:
            self._ended = True
        elif not self._protocol.eof_received():
            self.close()

    def close(self) -> None:
        """What was written arrives, then the other end sees it."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lose, None)
            self._loop.call_soon(self.other._end)  # noqa: SLF001

    def abort(self) -> None:
        """The connection is reset."""
        if not self._lost:
            self._closing = True
            self._loop.call_soon(self._lose, None)
            self._loop.call_soon(self.other._lose, ConnectionResetError("the connection was reset"))  # noqa: SLF001

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._closing = self._lost = True
            self._protocol.connection_lost(error)

    def is_closing(self) -> bool:
        """Whether it ends."""
        return self._closing

    def pause_reading(self) -> None:
        """Keep what comes."""
        self._paused = True

    def resume_reading(self) -> None:
        """Hand over what was kept."""
        self._paused = False
        while self._unread and not self._paused:
            self._come(self._unread.popleft())
        if self._ended and not self._paused:
            self._ended = False
            self._end()

    def is_reading(self) -> bool:
        """Whether what comes is handed over."""
        return not self._paused

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand over to somebody else."""
        self._protocol = cast("asyncio.Protocol", protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who reads."""
        return self._protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """No bound is ever reached."""

    def get_write_buffer_size(self) -> int:
        """All is sent at once."""
        return 0


class Listening:
    """What `create_server` returns, as far as servers ask it anything."""

    def __init__(self, loop: NetworkedLoop, port: int) -> None:
        self._loop = loop
        self._port = port
        self.sockets = [SimpleNamespace(getsockname=lambda: ("127.0.0.1", port))]

    def close(self) -> None:
        """Nobody finds it any more."""
        self._loop.servers.pop(self._port, None)

    async def wait_closed(self) -> None:
        """At once."""


class NetworkedLoop(VirtualLoop):
    """A virtual loop with a loopback of its own.

    Attributes:
        servers: what makes the protocol of a new connection, by port.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.servers: dict[int, Callable[[], asyncio.Protocol]] = {}
        self._ports = itertools.count(_FIRST_PORT).__next__

    async def create_server(self, protocol_factory: Any, *_: Any, **__: Any) -> Any:
        """Listen, on the next free port."""
        port = self._ports()
        self.servers[port] = protocol_factory
        return Listening(self, port)

    def connect(self, port: int, client: asyncio.Protocol) -> None:
        """Connect.

        Raises:
            ConnectionRefusedError: nobody listens.
        """
        factory = self.servers.get(port)
        if factory is None:
            raise ConnectionRefusedError(f"nobody listens on {port}")
        server = factory()
        here, there = End(self, client), End(self, server)
        here.other, there.other = there, here
        server.connection_made(there)
        client.connection_made(here)


class Connector(aiohttp.BaseConnector):
    """How aiohttp's client connects over it."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=30.0)

    async def _create_connection(self, req: aiohttp.ClientRequest, *_: Any) -> ResponseHandler:
        loop = cast("NetworkedLoop", self._loop)
        protocol: ResponseHandler = self._factory()
        try:
            loop.connect(req.url.port or 80, protocol)
        except OSError as error:
            raise aiohttp.ClientConnectorError(req.connection_key, error) from error
        return protocol
