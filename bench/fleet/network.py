"""A network in memory under virtual time: servers and clients run their own code, and only the sockets are replaced.

Bytes written on one end are read on the other in the same moment and in order. Servers and clients parse and write the
same bytes as over TCP.
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


class ConnectionEnd(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self._loop = loop
        self._protocol = protocol
        self._unread: deque[bytes] = deque()
        self._closing = self._lost = self._paused = self._eof_received = False
        self.other: ConnectionEnd

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send data; after the end it is dropped, as by a socket."""
        if data and not self._closing:
            self._loop.call_soon(self.other._receive, bytes(data))  # noqa: SLF001 - the same class

    def _receive(self, data: bytes) -> None:
        if self._lost:
            return
        if self._paused:
            self._unread.append(data)
        else:
            self._protocol.data_received(data)

    def _receive_eof(self) -> None:
        """Handle the close of the other end, after all that it sent."""
        if self._lost:
            return
        if self._paused:
            self._eof_received = True
        elif not self._protocol.eof_received():
            self.close()

    def close(self) -> None:
        """Close after the written data has arrived."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lose, None)
            self._loop.call_soon(self.other._receive_eof)  # noqa: SLF001

    def abort(self) -> None:
        """Reset the connection."""
        if not self._lost:
            self._closing = True
            self._loop.call_soon(self._lose, None)
            self._loop.call_soon(self.other._lose, ConnectionResetError("the connection was reset"))  # noqa: SLF001

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._closing = self._lost = True
            self._protocol.connection_lost(error)

    def is_closing(self) -> bool:
        """Return whether the connection is closing."""
        return self._closing

    def pause_reading(self) -> None:
        """Keep received data back."""
        self._paused = True

    def resume_reading(self) -> None:
        """Pass on the data that was kept back."""
        self._paused = False
        while self._unread and not self._paused:
            self._receive(self._unread.popleft())
        if self._eof_received and not self._paused:
            self._eof_received = False
            self._receive_eof()

    def is_reading(self) -> bool:
        """Return whether received data is passed on."""
        return not self._paused

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Pass received data to another protocol."""
        self._protocol = cast("asyncio.Protocol", protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol that receives the data."""
        return self._protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: no data waits to be sent."""

    def get_write_buffer_size(self) -> int:
        """Return 0: data is sent at once."""
        return 0


class ListeningServer:
    """The result of `create_server`, with the attributes that servers use."""

    def __init__(self, loop: NetworkedLoop, port: int) -> None:
        self._loop = loop
        self._port = port
        self.sockets = [SimpleNamespace(getsockname=lambda: ("127.0.0.1", port))]

    def close(self) -> None:
        """Stop listening."""
        self._loop.servers.pop(self._port, None)

    async def wait_closed(self) -> None:
        """Return at once."""


class NetworkedLoop(VirtualLoop):
    """A virtual loop with its own loopback network.

    Attributes:
        servers: the protocol factory of each listening port.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.servers: dict[int, Callable[[], asyncio.Protocol]] = {}
        self._ports = itertools.count(_FIRST_PORT).__next__

    async def create_server(self, protocol_factory: Any, *_: Any, **__: Any) -> Any:
        """Listen on the next free port."""
        port = self._ports()
        self.servers[port] = protocol_factory
        return ListeningServer(self, port)

    def connect(self, port: int, client: asyncio.Protocol) -> None:
        """Connect a client protocol to a port.

        Raises:
            ConnectionRefusedError: no server listens there.
        """
        factory = self.servers.get(port)
        if factory is None:
            raise ConnectionRefusedError(f"no server listens on port {port}")
        server = factory()
        client_end, server_end = ConnectionEnd(self, client), ConnectionEnd(self, server)
        client_end.other, server_end.other = server_end, client_end
        server.connection_made(server_end)
        client.connection_made(client_end)


class Connector(aiohttp.BaseConnector):
    """A connector of aiohttp's client for this network."""

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
