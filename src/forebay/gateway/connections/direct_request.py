"""A POST sent over a pooled connection by itself: what `aiohttp.ClientSession` would do for it, and nothing else.

The session also follows redirects, keeps cookies, traces and decompresses, which a gateway leaves to its caller: that
took a quarter of a call's processor time. Connections, their pool and the parser of responses are aiohttp's as well.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeAlias

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from forebay.gateway.connections.connection_pool import key_for_credentials

RESPONSE_BOUNDS: Final[dict[str, int]] = {
    "max_line_size": 128 << 10,  # bytes
    "max_field_size": 128 << 10,  # bytes of a header field
    "max_headers": 1000,
}
"""The largest head of a provider's response that is read."""
_JOINED_BODY: Final = 1 << 14  # bytes, up to which one write of a copy is cheaper than two buffers
_INFORMATIONAL: Final = range(100, 200)
_SWITCHING_PROTOCOLS: Final = 101

RawHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]


class ConnectionRequest(aiohttp.ClientRequest):
    """A request that names a connection to a provider, for aiohttp to open it or find it in the pool. It is never sent.

    Args:
        url: of the provider.
        credentials: a hash of those of the calls that share the connection.
        session: of the calls.
    """

    def __init__(self, url: URL, credentials: int, session: aiohttp.ClientSession) -> None:
        super().__init__("POST", url, loop=asyncio.get_running_loop(), session=session)
        self._shared_key = key_for_credentials(super().connection_key, credentials)
        self.host_header = self.headers["Host"].encode("ascii")

    @property
    def connection_key(self) -> ConnectionKey:
        """The key of its connections."""
        return self._shared_key


class DirectResponse:
    """A provider's response, once its head has arrived. `aiohttp.ClientResponse` has the same attributes.

    Attributes:
        status: the HTTP status.
        reason: its text.
        raw_headers: as they were received.
        content: the body, as it arrives.
        method: of the request.
        content_length: of the body, or None.
        protocol: of the connection that it arrives on.
    """

    __slots__ = ("_connection", "content", "protocol", "raw_headers", "reason", "status")

    method: Final = "POST"

    def __init__(self, connection: Connection, message: Any, content: aiohttp.StreamReader) -> None:
        self._connection = connection
        self.protocol = connection.protocol
        self.status: int = message.code
        self.reason: str | None = message.reason
        self.raw_headers: RawHeaders = message.raw_headers
        self.content = content
        content.on_eof(self._at_end)

    @property
    def content_length(self) -> int | None:
        """The length of its body, if it says so."""
        for name, value in self.raw_headers:
            if len(name) == len(b"content-length") and name.lower() == b"content-length":
                return int(value) if value.isdigit() else None
        return None

    def release(self) -> None:
        """Return the connection to the pool, if the body has arrived; else close it."""
        if self._connection.protocol is not None:  # else it was returned when the body had arrived
            self._connection.release()

    def close(self) -> None:
        """Close the connection, unless it has been returned."""
        self._connection.close()

    def _at_end(self) -> None:
        protocol = self._connection.protocol
        if protocol is not None and not protocol.upgraded:  # else what follows is another protocol
            self._connection.release()


async def send_post(  # noqa: PLR0913 - the parts of a request
    request: ConnectionRequest,
    *,
    path: bytes,
    head: bytes,
    body: bytes,
    connector: aiohttp.BaseConnector,
    limits: aiohttp.ClientTimeout,
) -> DirectResponse:
    """Send a POST, and return the response once its head has arrived.

    Args:
        request: names the connection.
        path: with the query.
        head: the header fields, each with its line end, without ``Host`` and ``Content-Length``.
        body: its bytes.
        connector: gives the connection.
        limits: of which ``sock_connect`` and ``sock_read`` count.

    Raises:
        aiohttp.ClientError, OSError, asyncio.TimeoutError: as `aiohttp.ClientSession.request`.
    """
    try:
        connection = await connector.connect(request, [], limits)
    except aiohttp.ClientError:
        raise
    except TimeoutError as error:
        message = f"Connection timeout to host {request.url}"
        raise aiohttp.ConnectionTimeoutError(message) from error
    except OSError as error:
        raise aiohttp.ClientOSError(*error.args) from error
    try:
        protocol = connection.protocol
        assert protocol is not None  # noqa: S101 - it is new, or from the pool
        protocol.set_response_params(
            read_until_eof=True,
            auto_decompress=False,
            read_timeout=limits.sock_read,
            **RESPONSE_BOUNDS,  # type: ignore[arg-type]
        )
        start = b"POST %b HTTP/1.1\r\nHost: %b\r\n%bContent-Length: %d\r\n\r\n"
        _write(protocol, start % (path, request.host_header, head, len(body)), body)
        return await _read_head(request, connection, protocol)
    except BaseException:
        connection.close()
        raise


def _write(protocol: ResponseHandler, head: bytes, body: bytes) -> None:
    transport = protocol.transport
    if transport is None or transport.is_closing():
        message = "Cannot write to closing transport"
        raise aiohttp.ClientConnectionResetError(message)
    if len(body) > _JOINED_BODY:
        transport.writelines((head, body))
    else:
        transport.write(head + body)
    protocol.start_timeout()


async def _read_head(request: ConnectionRequest, connection: Connection, protocol: ResponseHandler) -> DirectResponse:
    try:
        while True:
            message, content = await protocol.read()
            if message.code not in _INFORMATIONAL or message.code == _SWITCHING_PROTOCOLS:
                return DirectResponse(connection, message, content)
    except HttpProcessingError as error:
        raise aiohttp.ClientResponseError(
            request.request_info, (), status=error.code, message=error.message, headers=error.headers
        ) from error
