"""A transport for the SDKs over aiohttp, which needs no sockets; the rest, retries included, is the SDKs' own code."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import httpx2

_NOT_ADDED = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")


class _Body(httpx2.AsyncByteStream):
    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            raise _translate(error) from error

    async def aclose(self) -> None:
        self._answer.close() if not self._answer.content.at_eof() else self._answer.release()


class AiohttpTransport(httpx2.AsyncBaseTransport):
    """A transport of httpx2's clients.

    Args:
        session: sends the requests, and must not decompress answers.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request."""
        read_timeout = request.extensions.get("timeout", {}).get("read")
        try:
            answer = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                data=await request.aread(),
                allow_redirects=False,
                skip_auto_headers=_NOT_ADDED,
                timeout=aiohttp.ClientTimeout(total=None, sock_read=read_timeout),
            )
        except aiohttp.ClientError as error:
            raise _translate(error) from error
        return httpx2.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer))


def _translate(error: aiohttp.ClientError) -> httpx2.TransportError:
    if isinstance(error, aiohttp.ServerTimeoutError):
        return httpx2.ReadTimeout(str(error))
    if isinstance(error, aiohttp.ClientConnectorError):
        return httpx2.ConnectError(str(error))
    return httpx2.RemoteProtocolError(str(error))
