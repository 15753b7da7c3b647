"""The transports of bound clients, for event loops and plain threads, made for httpx or httpx2."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any, Final

from forebay import clock
from forebay.errors import Overloaded
from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.httpx_binding.bound_exchange import BoundExchange, ClientBinding
from forebay.upstream.httpx_binding.home_loop import await_in, other_loop
from forebay.upstream.metered_stream import MeteredStream
from forebay.upstream.providers import Headers
from forebay.upstream.sdk_exceptions import mark_judged


class OpenBody(ABC):
    """The body of a streaming answer, whose reader may drop it or stop reading. It is an `OpenAnswer`.

    Args:
        exchange: that it answers.
        response: of the client's own transport.
        stream: meters it, and holds the permit.
    """

    def __init__(self, exchange: BoundExchange, response: Any, stream: MeteredStream) -> None:
        self._response = response
        self._stream = stream
        self._read_error = exchange.read_error
        self._taken_back = False
        self.unread_since = clock.now()
        self._record_abandoned = exchange.account.add_open_answer(self)

    @property
    def settled(self) -> bool:
        """See `OpenAnswer`."""
        return self._stream.settled

    @abstractmethod
    def take_back(self) -> None:
        """See `OpenAnswer`."""

    def _pass_on(self) -> None:
        """Note that the reader gets a part now."""
        self.unread_since = clock.now()

    def _read_on(self) -> None:
        """Note that the reader waits for the next part.

        Raises:
            ReadError: of the HTTP library: the answer was taken back.
        """
        if self._taken_back:
            message = (
                "this stream was closed because nobody read it while calls waited for its slot: read it to its end"
                " without long pauses, or close it"
            )
            raise self._read_error(message)
        self.unread_since = math.inf
        self._stream.wait()

    def _abandon(self) -> None:
        """Release the permit of an answer that has not ended."""
        if not self._stream.settled:
            self._record_abandoned(clock.now() - self.unread_since)
            self._stream.abandon()

    def _was_dropped(self) -> bool:
        """Return whether its reader has dropped it with its connection open; the account learns of it."""
        if self._response.is_closed:
            return False
        if not self._stream.settled:
            self._record_abandoned(clock.now() - self.unread_since)
        return True


class AsyncBody(OpenBody):
    """The body of a streaming answer, on an event loop."""

    def __init__(self, exchange: BoundExchange, response: Any, stream: MeteredStream, *, decoded: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks = response.aiter_bytes() if decoded else response.stream
        self._closing: asyncio.Task[None] | None = None
        super().__init__(exchange, response, stream)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stream = self._stream
        chunks = aiter(self._chunks)
        try:
            self._read_on()
            async for chunk in chunks:
                if passed := stream.feed(chunk):
                    self._pass_on()
                    yield passed
                    self._read_on()
        except Exception as error:
            try:
                await self._response.aclose()  # first: an answer that cannot be decoded is still coming
            finally:
                stream.fail(error)
                mark_judged(error)
            raise
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()  # otherwise it is closed whenever it is collected
        if rest := stream.end():
            yield rest

    async def aclose(self) -> None:
        """Close the answer, if it has not ended."""
        try:
            await self._response.aclose()
        finally:
            self._abandon()

    def take_back(self) -> None:
        """See `OpenAnswer`."""
        try:
            self._loop.call_soon_threadsafe(self._close_unread)
        except RuntimeError:  # the loop is closed, and the connection with it
            self._abandon()

    def _close_unread(self) -> None:
        """Close the answer, unless its reader has come back in time."""
        if self.unread_since < math.inf and not self._taken_back:
            self._taken_back = True
            self._closing = self._loop.create_task(self.aclose())

    def __del__(self) -> None:
        if not self._was_dropped():
            return
        try:  # not here: garbage collection may run while any lock is held
            self._loop.call_soon_threadsafe(_close_dropped, self._response, self._stream)
        except RuntimeError:  # the loop is closed, and nothing can be sent over its connections
            _start_thread(self._stream.abandon)


class BodyElsewhere:
    """The body of a streaming answer that another event loop reads.

    Args:
        loop: that loop.
        body: the body in it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, body: AsyncBody) -> None:
        self._loop = loop
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._body)
        while chunk := await await_in(self._loop, _next_chunk(chunks)):
            yield chunk

    async def aclose(self) -> None:
        """Close the answer, if it has not ended."""
        await await_in(self._loop, self._body.aclose())


async def _next_chunk(chunks: AsyncIterator[bytes]) -> bytes:
    """Return the next part of a body that is not empty; an empty one at its end."""
    async for chunk in chunks:
        if chunk:
            return chunk
    return b""


class AsyncTransport:
    """Sends the requests of an asynchronous client through an upstream.

    Args:
        inner: the client's own transport.
        binding: of the client.
    """

    body: type[AsyncBody]
    body_elsewhere: type[BodyElsewhere]

    def __init__(self, inner: Any, binding: ClientBinding) -> None:
        self.inner = inner
        self.binding = binding

    async def handle_async_request(self, request: Any) -> Any:
        """Return the answer to a request, after all its attempts."""
        if (home := other_loop()) is None:
            return await self._handle(request)
        response = await await_in(home, self._handle(request))
        if isinstance(response.stream, AsyncBody):
            response.stream = self.body_elsewhere(home, response.stream)
        return response

    async def _handle(self, request: Any) -> Any:
        await self.binding.runner.load_prices()
        exchange = BoundExchange(self.binding, request)
        exchange.check_sdk_retry()
        try:
            return await self.binding.runner.run(exchange, self._send)
        except Overloaded as error:
            raise exchange.rejection(error) from None

    async def _send(self, exchange: BoundExchange, permit: Permit) -> AttemptResult:
        """Send one attempt."""
        response = None
        try:
            response = await self.inner.handle_async_request(exchange.request)
            headers = Headers.relevant(response.headers.raw)
            if exchange.is_streamed(response.status_code, headers.get("content-type", "")):
                return exchange.opened(permit, response, headers, self.body)
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


class BlockingBody(OpenBody):
    """The body of a streaming answer, in a plain thread."""

    def __init__(self, exchange: BoundExchange, response: Any, stream: MeteredStream, *, decoded: bool) -> None:
        self._chunks = response.iter_bytes() if decoded else response.stream
        super().__init__(exchange, response, stream)

    def __iter__(self) -> Iterator[bytes]:
        stream = self._stream
        try:
            self._read_on()
            for chunk in self._chunks:
                if passed := stream.feed(chunk):
                    self._pass_on()
                    yield passed
                    self._read_on()
            if self._taken_back:
                self._read_on()  # it was closed just as its reader came back
        except Exception as error:
            try:
                self._response.close()  # first: an answer that cannot be decoded is still coming
            finally:
                stream.fail(error)
                mark_judged(error)
            raise
        if rest := stream.end():
            yield rest

    def close(self) -> None:
        """Close the answer, if it has not ended."""
        try:
            self._response.close()
        finally:
            self._abandon()

    def take_back(self) -> None:
        """See `OpenAnswer`. Its reader does not read now, so that another thread may close it."""
        if self.unread_since < math.inf:
            self._taken_back = True
            self.close()

    def __del__(self) -> None:
        if self._was_dropped():
            _start_thread(_close_dropped_in_thread, self._response, self._stream)


class BlockingTransport:
    """Sends the requests of a client in a plain thread through an upstream.

    Args:
        inner: the client's own transport.
        binding: of the client.
    """

    body: type[BlockingBody]

    def __init__(self, inner: Any, binding: ClientBinding) -> None:
        self.inner = inner
        self.binding = binding

    def handle_request(self, request: Any) -> Any:
        """Return the answer to a request, after all its attempts."""
        exchange = BoundExchange(self.binding, request)
        exchange.check_sdk_retry()
        try:
            return self.binding.runner.run_blocking(exchange, self._send)
        except Overloaded as error:
            raise exchange.rejection(error) from None

    def _send(self, exchange: BoundExchange, permit: Permit) -> AttemptResult:
        """Send one attempt."""
        response = None
        try:
            response = self.inner.handle_request(exchange.request)
            headers = Headers.relevant(response.headers.raw)
            if exchange.is_streamed(response.status_code, headers.get("content-type", "")):
                return exchange.opened(permit, response, headers, self.body)
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


@cache
def async_transport(http: ModuleType) -> type[Any]:
    """Return the transport of asynchronous clients of `http`, which is the module httpx or httpx2."""
    members = {
        "body": type("AsyncBody", (AsyncBody, http.AsyncByteStream), {}),
        "body_elsewhere": type("BodyElsewhere", (BodyElsewhere, http.AsyncByteStream), {}),
    }
    return type("UpstreamTransport", (AsyncTransport, http.AsyncBaseTransport), members)


@cache
def blocking_transport(http: ModuleType) -> type[Any]:
    """Return the transport of blocking clients of `http`, which is the module httpx or httpx2."""
    body = type("BlockingBody", (BlockingBody, http.SyncByteStream), {})
    return type("UpstreamTransport", (BlockingTransport, http.BaseTransport), {"body": body})


_closing: Final[set[asyncio.Task[None]]] = set()  # a loop alone does not keep its tasks


def _close_dropped(response: Any, stream: MeteredStream) -> None:
    """Close the connection of a dropped answer, and then release its permit: until then the provider generates it."""

    async def close() -> None:
        try:
            with contextlib.suppress(Exception):
                await response.aclose()
        finally:
            stream.abandon()

    task = asyncio.get_running_loop().create_task(close())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


def _close_dropped_in_thread(response: Any, stream: MeteredStream) -> None:
    """Close a dropped answer. See `_close_dropped`."""
    try:
        with contextlib.suppress(Exception):
            response.close()
    finally:
        stream.abandon()


def _start_thread(function: Callable[..., None], *args: object) -> None:
    """Call a function in a new thread: garbage collection may run while any lock is held."""
    with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
        _thread.start_new_thread(function, args)
