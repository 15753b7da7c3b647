"""Request bodies: read within a time limit, and into a bounded memory."""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web

from forebay._text import format_duration
from forebay.gateway.error_responses import ApiProtocol, EarlyResponse, error_response
from forebay.gateway.requests.body_memory import BodyReservation, BodyTooLarge
from forebay.gateway.settings import GatewaySettings


async def read_body(
    request: web.BaseRequest, reservation: BodyReservation, settings: GatewaySettings, protocol: ApiProtocol
) -> bytes:
    """Return the body of a request; its bytes count in the reservation as they arrive.

    Raises:
        EarlyResponse: it is too long, breaks off, or does not arrive in time.
        BodyMemoryFull: all bodies together take too much.
    """
    try:
        reservation.expect(request.content_length or 0)
        content = request.content
        if content.is_eof() and content.exception() is None:
            reservation.grow(content.total_bytes)
            return content.read_nowait()  # all of it came with the head
        async with asyncio.timeout(settings.body_timeout):
            return await _read(request, reservation)
    except BodyTooLarge:  # the rest of a chunked body is not read
        message = f"the body is longer than {settings.max_body_bytes:,} bytes, the limit of this gateway"
        raise EarlyResponse(error_response(protocol, 413, "forebay_too_long", message), close=True) from None
    except TimeoutError:
        message = f"the body did not arrive within {format_duration(settings.body_timeout)}"
        raise EarlyResponse(error_response(protocol, 408, "forebay_slow_body", message), close=True) from None
    except web.RequestPayloadError:
        message = "the body breaks off, or is not valid HTTP"
        raise EarlyResponse(error_response(protocol, 400, "forebay_bad_body", message), close=True) from None


async def _read(request: web.BaseRequest, reservation: BodyReservation) -> bytes:
    content = request.content
    wants_continue = "expect" in request.headers and request.version >= HttpVersion11 and not content.is_eof()
    if wants_continue and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    pieces: list[bytes] = []
    async for piece in content.iter_any():
        reservation.grow(len(piece))
        pieces.append(piece)
    return b"".join(pieces)
