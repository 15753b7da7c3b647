"""A whole response that is written with its head at once.

aiohttp's own response keeps its headers in a table, goes through a few coroutines for what may change them, and writes
them by that table: a twentieth of the processor time of a call.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from http import HTTPStatus
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

_MAX_LENGTH: Final = 1 << 16  # bytes of a body, up to which a copy is cheaper than two writes
_BODILESS: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT, HTTPStatus.NOT_MODIFIED})
_PHRASES: Final = {int(status): status.phrase for status in HTTPStatus}


class SingleWriteResponse(web.StreamResponse):
    """A response to a request of HTTP/1.1, with a body.

    Args:
        status: the HTTP status.
        headers: without those of the connection, and without a Content-Length.
        names: those of the headers, in lower case.
        body: its bytes.
    """

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], names: Container[str], body: bytes) -> None:
        super().__init__(status=status)
        self._lines = headers
        self._names = names
        self._content = body

    async def send(self, request: web.BaseRequest) -> None:
        """Send it, and wait until its caller takes what the system does not hold.

        Raises:
            ConnectionError: the caller has gone.
        """
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        names = self._names
        head = [f"HTTP/1.1 {self._status} {_PHRASES.get(self._status, '')}\r\n"]
        head += [f"{name}: {value}\r\n" for name, value in self._lines]
        if "content-type" not in names:
            head.append("Content-Type: application/octet-stream\r\n")
        if "date" not in names:
            head.append(f"Date: {rfc822_formatted_time()}\r\n")
        if "server" not in names:
            head.append(f"Server: {SERVER_SOFTWARE}\r\n")
        if not self._keep_alive:
            head.append("Connection: close\r\n")
        head.append(f"Content-Length: {len(self._content)}\r\n\r\n")
        await request.writer.write_eof("".join(head).encode("utf-8", "ignore") + self._content)
        self._eof_sent = True  # so that the server does not send it again


def fits_single_write(request: web.BaseRequest, status: int, body: bytes) -> bool:
    """Return whether a response may be a `SingleWriteResponse`."""
    return (
        request.version == HttpVersion11
        and request.method != "HEAD"
        and status >= HTTPStatus.OK
        and status not in _BODILESS
        and 0 < len(body) <= _MAX_LENGTH
    )
