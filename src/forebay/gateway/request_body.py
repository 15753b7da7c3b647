"""Request bodies: read within a time limit, and bounded each and together in the memory that they take."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from aiohttp import HttpVersion11, web

from forebay._text import format_duration
from forebay.gateway.error_responses import ApiProtocol, EarlyResponse, error_response
from forebay.gateway.settings import GatewaySettings


class BodyTooLarge(Exception):
    """A body is longer than any may be."""


class BodyMemoryFull(Exception):
    """The bodies of all calls in progress would take too much memory together."""


class BodyMemory:
    """The memory that request bodies take. A body is held until its call has ended, since it may be sent again.

    Args:
        max_body_bytes: of one body.
        max_held_bytes: of all bodies together.

    Attributes:
        held_bytes: held now, of all bodies.
    """

    __slots__ = ("_max_body_bytes", "_max_held_bytes", "held_bytes")

    def __init__(self, max_body_bytes: int, max_held_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes
        self.held_bytes = 0

    def check(self, size: int, *, more: int) -> None:
        """Check that a body of `size` bytes may be held, `more` of which are not held yet.

        Raises:
            BodyTooLarge: no body may be so long.
            BodyMemoryFull: all bodies together would take too much.
        """
        if size > self._max_body_bytes:
            raise BodyTooLarge
        if self.held_bytes + more > self._max_held_bytes:
            raise BodyMemoryFull

    def add(self, size: int) -> None:
        """Add received bytes to those held."""
        self.held_bytes += size

    def release(self, size: int) -> None:
        """Remove the bytes of a request that has ended."""
        self.held_bytes -= size


class BodyReservation:
    """The memory that the body of one request takes; leaving its block releases it.

    A body counts as its bytes arrive, not when its length is announced: otherwise a few callers could lock all others
    out by announcing much and sending nothing.
    """

    __slots__ = ("_memory", "_size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Release what is counted so far."""
        self._memory.release(self._size)
        self._size = 0

    def expect(self, size: int) -> None:
        """Check that an announced body of `size` bytes may come. It is not counted yet.

        Raises:
            BodyTooLarge, BodyMemoryFull: it may not.
        """
        self._memory.check(size, more=size)

    def grow(self, by: int) -> None:
        """Count `by` bytes that have arrived.

        Raises:
            BodyTooLarge, BodyMemoryFull: they may not be held.
        """
        self._memory.check(self._size + by, more=by)
        self._memory.add(by)
        self._size += by


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
    if content.is_eof() and content.exception() is None:
        reservation.grow(content.total_bytes)
        return content.read_nowait()  # all of it came with the head
    pieces: list[bytes] = []
    async for piece in content.iter_any():
        reservation.grow(len(piece))
        pieces.append(piece)
    return b"".join(pieces)
