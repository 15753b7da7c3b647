"""Reading the body of a request, within bounds."""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web

from forebay.gateway.body_memory import BodyReservation, BodyTooLarge
from forebay.gateway.error_responses import ApiProtocol, EarlyResponse, error_response
from forebay.gateway.settings import GatewaySettings


async def read_body(
    request: web.BaseRequest, body: BodyReservation, settings: GatewaySettings, protocol: ApiProtocol
) -> bytes:
    """The body of a request, noted as it comes.

    Raises:
        Answered: it is too long, breaks off or does not come.
        NoRoom: there is none for it beside all others.
    """
    try:
        body.expect(request.content_length or 0)
        async with asyncio.timeout(settings.body_timeout):
            return await _read(request, body)
    except BodyTooLarge:  # of a chunked one nothing more is read
        message = f"the body is longer than {settings.max_body_bytes:,} bytes, the bound of this gateway"
        raise EarlyResponse(error_response(protocol, 413, "forebay_too_long", message), close=True) from None
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_timeout:g} s"
        raise EarlyResponse(error_response(protocol, 408, "forebay_slow_body", message), close=True) from None
    except web.RequestPayloadError:
        message = "the body breaks off, or is no HTTP"
        raise EarlyResponse(error_response(protocol, 400, "forebay_bad_body", message), close=True) from None


async def _read(request: web.BaseRequest, body: BodyReservation) -> bytes:
    content = request.content
    expected = "expect" in request.headers and request.version >= HttpVersion11 and not content.is_eof()
    if expected and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if content.is_eof() and content.exception() is None:
        body.grow(content.total_bytes)
        return content.read_nowait()  # all of it came with the head
    pieces: list[bytes] = []
    async for piece in content.iter_any():
        body.grow(len(piece))
        pieces.append(piece)
    return b"".join(pieces)
