"""The transports: one asynchronous and one for plain threads, made for whichever of httpx and httpx2 a client uses."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

from forebay.errors import Overloaded
from forebay.upstream.call_drivers import unwrap_result
from forebay.upstream.call_flow import AttemptResult
from forebay.upstream.call_request import Permit
from forebay.upstream.fallback_chain import FallbackChain, run_chain, run_chain_blocking
from forebay.upstream.httpx_binding.bound_exchange import BoundExchange, ClientBinding
from forebay.upstream.metered_stream import MeteredStream
from forebay.upstream.providers import Headers


class AsyncBody:
    """An open answer, on an event loop."""

    def __init__(self, response: Any, reader: MeteredStream, *, decoded: bool) -> None:
        self._response = response
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._chunks = response.aiter_bytes() if decoded else response.stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader = self._reader
        chunks = aiter(self._chunks)
        try:
            async for chunk in chunks:
                if passed := reader.feed(chunk):
                    yield passed
        except Exception:
            reader.fail()
            raise
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()  # else it would be closed whenever it is collected
        if rest := reader.end():
            yield rest

    async def aclose(self) -> None:
        """Hang up, if it has not ended."""
        try:
            await self._response.aclose()
        finally:
            self._reader.abandon()

    def __del__(self) -> None:
        if self._reader.settled:
            return
        try:  # not here: this may come in the middle of anything
            self._loop.call_soon_threadsafe(self._reader.abandon)
        except RuntimeError:  # the loop is closed
            _elsewhere(self._reader)


class AsyncTransport:
    """Sends what an asynchronous client asks for through an upstream.

    Args:
        inner: the client's own transport.
        binding: which upstream, and for whom.
    """

    body: type[AsyncBody]

    def __init__(self, inner: Any, binding: ClientBinding) -> None:
        self.inner = inner
        self.binding = binding

    async def handle_async_request(self, request: Any) -> Any:
        """The answer to a request, however many attempts that took."""
        exchange = BoundExchange(self.binding, request)
        exchange.check_sdk_retry()

        try:
            journey = exchange.journey()
            if journey is not None:
                return unwrap_result(await run_chain(journey, partial(self._drive, journey=journey)))
            answer = unwrap_result(await self._drive(exchange))
        except Overloaded as error:
            raise exchange.rejection(error) from None
        exchange.report_throttling()
        return answer

    def _drive(
        self, exchange: BoundExchange, journey: FallbackChain[BoundExchange] | None = None
    ) -> Awaitable[AttemptResult]:
        hurries = None if journey is None else partial(journey.skips_retry, exchange)
        driver = exchange.upstream.driver(exchange.account, hurries)
        return driver.drive(exchange.call_request, partial(self._attempt, exchange))

    async def _attempt(self, exchange: BoundExchange, permit: Permit) -> AttemptResult:
        response = None
        try:
            response = await self.inner.handle_async_request(exchange.request)
            headers = Headers.relevant(response.headers.raw)
            if exchange.is_streamed(response.status_code, headers.get("content-type", "")):
                decoded = "content-encoding" in headers
                body = self.body(response, exchange.metered_stream(permit, headers), decoded=decoded)
                return exchange.opened(response, body, decoded=decoded)
            raw = b"".join([chunk async for chunk in response.stream])
        except BaseException as error:
            if response is not None:
                await response.aclose()
            if isinstance(error, Exception):
                return exchange.failed(permit, error)
            raise
        await response.stream.aclose()
        return exchange.answered(permit, response, headers, raw)

    async def aclose(self) -> None:
        """Close the client's connections."""
        await self.inner.aclose()

    async def __aenter__(self) -> Any:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.inner.__aexit__(*raised)


class BlockingBody:
    """An open answer, in a plain thread."""

    def __init__(self, response: Any, reader: MeteredStream, *, decoded: bool) -> None:
        self._response = response
        self._reader = reader
        self._chunks = response.iter_bytes() if decoded else response.stream

    def __iter__(self) -> Iterator[bytes]:
        reader = self._reader
        try:
            for chunk in self._chunks:
                if passed := reader.feed(chunk):
                    yield passed
        except Exception:
            reader.fail()
            raise
        if rest := reader.end():
            yield rest

    def close(self) -> None:
        """Hang up, if it has not ended."""
        try:
            self._response.close()
        finally:
            self._reader.abandon()

    def __del__(self) -> None:
        if not self._reader.settled:
            _elsewhere(self._reader)


class BlockingTransport:
    """Sends what a client in a plain thread asks for through an upstream.

    Args:
        inner: the client's own transport.
        binding: which upstream, and for whom.
    """

    body: type[BlockingBody]

    def __init__(self, inner: Any, binding: ClientBinding) -> None:
        self.inner = inner
        self.binding = binding

    def handle_request(self, request: Any) -> Any:
        """The answer to a request, however many attempts that took."""
        exchange = BoundExchange(self.binding, request)
        exchange.check_sdk_retry()

        try:
            journey = exchange.journey()
            if journey is not None:
                return unwrap_result(run_chain_blocking(journey, partial(self._drive, journey=journey)))
            answer = unwrap_result(self._drive(exchange))
        except Overloaded as error:
            raise exchange.rejection(error) from None
        exchange.report_throttling()
        return answer

    def _drive(self, exchange: BoundExchange, journey: FallbackChain[BoundExchange] | None = None) -> AttemptResult:
        hurries = None if journey is None else partial(journey.skips_retry, exchange)
        driver = exchange.upstream.driver(exchange.account, hurries)
        return driver.drive_blocking(exchange.call_request, partial(self._attempt, exchange))

    def _attempt(self, exchange: BoundExchange, permit: Permit) -> AttemptResult:
        response = None
        try:
            response = self.inner.handle_request(exchange.request)
            headers = Headers.relevant(response.headers.raw)
            if exchange.is_streamed(response.status_code, headers.get("content-type", "")):
                decoded = "content-encoding" in headers
                body = self.body(response, exchange.metered_stream(permit, headers), decoded=decoded)
                return exchange.opened(response, body, decoded=decoded)
            raw = b"".join(response.stream)
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, Exception):
                return exchange.failed(permit, error)
            raise
        response.stream.close()
        return exchange.answered(permit, response, headers, raw)

    def close(self) -> None:
        """Close the client's connections."""
        self.inner.close()

    def __enter__(self) -> Any:
        self.inner.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.inner.__exit__(*raised)


class TransportClasses:
    """The transports for one HTTP library."""

    def __init__(self, http: ModuleType) -> None:
        body: type[Any] = type("AsyncBody", (AsyncBody, http.AsyncByteStream), {})
        self.asynchronous: type[Any] = type(
            "UpstreamTransport", (AsyncTransport, http.AsyncBaseTransport), {"body": body}
        )
        body = type("BlockingBody", (BlockingBody, http.SyncByteStream), {})
        self.blocking: type[Any] = type("UpstreamTransport", (BlockingTransport, http.BaseTransport), {"body": body})


@cache
def transport_classes(http: ModuleType) -> TransportClasses:
    """The transports for `http`, which is the module httpx or httpx2."""
    return TransportClasses(http)


def _elsewhere(reader: MeteredStream) -> None:
    """Close a permit whose answer was thrown away: in a thread, since whoever collects garbage may hold any lock."""
    with contextlib.suppress(RuntimeError):  # the interpreter is going down, and the account with it
        _thread.start_new_thread(reader.abandon, ())
