"""A small HTTP server by which a worker process, or an autoscaler, says how it is: for probes and for scrapers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import msgspec

from forebay._json import JsonStruct
from forebay._validate import reject
from forebay.errors import ForebayError

_MAX_HEAD: Final = 8 * 1024  # bytes
_TIMEOUT: Final = 5.0  # seconds for one request, its answer included
_MAX_CONNECTIONS: Final = 64


class ReportServer:
    """Answers ``GET /healthz`` (200), ``/readyz`` (200 or 503) and ``/report`` (JSON, or 503); and ``/metrics``.

    It has no secrets to tell, and takes no orders; so it asks for no token.

    Args:
        host: on which it listens.
        port: the same; 0 for any free one.
        ready: whether the process does its work: a worker takes tasks.
        report: returns the report of a process that is ready.
        metrics: returns the metrics in Prometheus's text format; None if it has none.
        owner: the command that listens, for errors.
    """

    def __init__(  # noqa: PLR0913 - every property has a name
        self,
        host: str,
        port: int,
        *,
        ready: Callable[[], bool],
        report: Callable[[], Awaitable[JsonStruct]],
        metrics: Callable[[], str] | None = None,
        owner: str = "ReportServer",
    ) -> None:
        self._host = host
        self.port = port
        self._owner = owner
        self._ready = ready
        self._report = report
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], bool] = {}  # in their order; True once a request has come

    async def open(self) -> None:
        """Listen.

        Raises:
            InvalidSetting: the address is taken, or is none of this machine.
        """
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self.port, limit=_MAX_HEAD)
        except OSError as error:
            expected = f"a host and port of this machine that is free ({error.strerror or error})"
            reject(self._owner, "listen", (self._host, self.port), expected)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening, and cut off what is under way."""
        if self._server is not None:
            self._server.close()
            for connection in self._connections:
                connection.cancel()
            if self._connections:
                await asyncio.wait(tuple(self._connections))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection. If there are too many, the oldest is cut off: first of those that have asked nothing."""
        if len(self._connections) >= _MAX_CONNECTIONS:
            oldest = min(self._connections, key=lambda each: self._connections[each])
            del self._connections[oldest]
            oldest.cancel()
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections[connection] = False
        connection.add_done_callback(partial(self._ended, writer))

    def _ended(self, writer: asyncio.StreamWriter, connection: asyncio.Task[None]) -> None:
        self._connections.pop(connection, None)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ForebayError):
            async with asyncio.timeout(_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
                self._has_asked()
                writer.write(await self._answer(head))
                await writer.drain()

    def _has_asked(self) -> None:
        connection = asyncio.current_task()
        if connection is not None and connection in self._connections:  # else it was cut off
            self._connections[connection] = True

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        paths = ("/healthz", "/readyz", "/report", *(("/metrics",) if self._metrics is not None else ()))
        if path not in map(str.encode, paths):
            return _response("404 Not Found", msgspec.json.encode({"paths": paths}))
        if method != b"GET":
            return _response("405 Method Not Allowed", b"{}")
        if path == b"/metrics" and self._metrics is not None:
            return _response("200 OK", self._metrics().encode(), "text/plain; version=0.0.4")
        if path != b"/healthz" and not self._ready():
            return _response("503 Service Unavailable", b'{"ready": false}')
        if path == b"/report":
            return _response("200 OK", msgspec.json.encode(await self._report()))
        return _response("200 OK", b'{"ready": true}' if self._ready() else b'{"ready": false}')


def _response(status: str, body: bytes, content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return head.encode() + b"\r\n" + body
