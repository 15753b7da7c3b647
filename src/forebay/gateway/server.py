"""The gateway as a server: its sockets, its bounds, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self, cast

import aiohttp
from aiohttp import web
from prometheus_client import disable_created_metrics

from forebay.errors import ForebayError
from forebay.events import log
from forebay.gateway.error_responses import error_response
from forebay.gateway.forwarder import Forwarder
from forebay.gateway.settings import GatewaySettings

_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"retry-after-ms: 1000\r\ncontent-length: %d\r\n\r\n%b"
)
_ENDLESS: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_HEADERS: Final = 200  # fields of a request
_LINGER: Final = 1.0  # seconds that a body is read on after its request was refused, or the refusal might be lost
_KEPT: Final = 30.0  # seconds that a connection to a provider is, less than providers keep them
_FILES: Final = 2  # of a call: to its caller, and to its provider
_OTHER_FILES: Final = 100
_LAST_WORDS: Final = 1.0  # seconds in which who is cut off is told so


class _TooManyConnections(asyncio.Protocol):
    """Tells a caller that there are too many connections, and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = error_response("openai", 503, "forebay_connections", "too many connections are open here").body
        cast("asyncio.Transport", transport).write(_FULL % (len(body), body))
        transport.close()


class _Connection(web.RequestHandler):
    """One connection: bounded in what it holds and how long, its errors of HTTP told in JSON as well."""

    _wire: asyncio.Transport

    def __init__(self, manager: web.Server, settings: GatewaySettings, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            manager,
            loop=loop,
            max_line_size=settings.max_header_bytes,
            max_field_size=settings.max_header_bytes,
            max_headers=_HEADERS,
            keepalive_timeout=settings.idle_timeout,
            lingering_time=_LINGER,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type] # that is how aiohttp is told that there is none
        )
        self._most_head = settings.max_header_bytes
        self._send_timeout = settings.send_timeout
        self._head = 0  # bytes of a head that is not whole yet
        self._newest: aiohttp.StreamReader | None = None  # the body of the request that came last
        self._ahead = False  # more has come than its turn, so nothing more is read
        self._unsent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.ApiProtocol`."""
        self._wire = cast("asyncio.Transport", transport)
        self._wire.set_write_buffer_limits(high=0)  # so that it is told of whatever waits to be sent
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See `asyncio.ApiProtocol`."""
        self._stop_watch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.ApiProtocol`; a head is not read without end, nor what is sent ahead of an answer."""
        known, of_body = len(self._messages), self._newest is not None and not self._newest.is_eof()
        super().data_received(data)
        if len(self._messages) > known:
            self._newest = self._messages[-1][1]
            self._head = 0
        else:
            self._head = 0 if of_body else self._head + len(data)
        waits = self._waiter is not None and not self._waiter.done()
        if self._head > self._most_head + _HEADERS:
            if not waits:
                self.close()  # once what is under way has its answer
                return
            body = error_response("openai", 431, "forebay_long_head", "the head of this request does not end").body
            self._wire.write(_ENDLESS % (len(body), body))
            self.force_close()
        elif not waits:
            self.limit_read_ahead()

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's own
        """A body has been taken out of its buffer; but what was sent ahead is still there."""
        super().resume_reading(resume_parser)
        self.limit_read_ahead()

    def limit_read_ahead(self) -> None:
        """Read on only while what came before its turn is short: it waits in no line, and counts as no body.

        While nothing is read it is not heard that its caller hangs up. To close the connection instead would cost those
        their next call who send it, with a long body, in the moment in which an answer is done.
        """
        if self._wire.is_closing():
            return
        ahead = self._head + sum(body.total_bytes for _, body in self._messages)
        if ahead > self._most_head + _HEADERS:
            self._ahead = True
            self._wire.pause_reading()
        elif self._ahead:
            self._ahead = False
            self._wire.resume_reading()

    def pause_writing(self) -> None:
        """See `asyncio.ApiProtocol`; who takes nothing of its answer is not waited for without end."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """See `asyncio.ApiProtocol`."""
        super().resume_writing()
        self._stop_watch()

    def abort(self) -> None:
        """Hang up, whatever is still to be sent."""
        self._wire.abort()

    def _watch(self) -> None:
        size = self._wire.get_write_buffer_size()
        self._unsent = self._loop.call_later(self._send_timeout, self._look, size)

    def _look(self, before: int) -> None:
        if self._wire.get_write_buffer_size() == before:
            self._wire.abort()
        else:
            self._watch()

    def _stop_watch(self) -> None:
        if self._unsent is not None:
            self._unsent.cancel()
            self._unsent = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, and what nobody has foreseen."""
        if request.writer.output_size > 0:
            raise ConnectionError from exc
        if status >= 500:  # noqa: PLR2004
            log.error("a request could not be answered", exc_info=exc)
            message = "this gateway has failed: its log says how"
        answer = error_response("openai", status, "forebay_bad_request", (message or "this is no HTTP/1.1")[:300])
        response = web.Response(status=status, headers=dict(answer.headers), body=answer.body)
        response.force_close()
        return response


class _Server(web.Server):
    """A server with a bound on its connections."""

    def __init__(self, proxy: Forwarder, settings: GatewaySettings) -> None:
        super().__init__(self._handle, handler_cancellation=True)
        self._proxy = proxy
        self._settings = settings

    def __call__(self) -> Any:
        if len(self.connections) >= self._settings.max_connections:
            return _TooManyConnections()
        return _Connection(self, self._settings, loop=asyncio.get_running_loop())

    def _handle(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        cast("_Connection", request.protocol).limit_read_ahead()  # its turn has come
        return self._proxy.handle(request)

    async def end(self) -> None:
        """Close all connections, and what is left of them after the last words."""
        handlers = self.connections
        self.pre_shutdown()  # those without a request
        await self.shutdown(_LAST_WORDS)
        for handler in handlers:
            cast("_Connection", handler).abort()


def _over_tcp() -> aiohttp.BaseConnector:
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT)


class Gateway:
    """A gateway that listens while its block runs; leaving drains it.

    Args:
        settings: what it was given.
        environment: where its secrets are.
        connect: makes what connects it to its providers; by default that is TCP.

    Raises:
        InvalidSecret: on entering; a secret is not there, or is not fit for one.
        InvalidSetting: on entering; a fallback leads to where calls cannot go.
        CannotListen: on entering; the address is taken, or is none of this machine's.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        environment: Mapping[str, str] = os.environ,
        *,
        connector: Callable[[], aiohttp.BaseConnector] = _over_tcp,
    ) -> None:
        self.settings = settings
        self._environment = environment
        self._connect = connector
        self._session: aiohttp.ClientSession | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=self._connect(), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )
        address = self.settings.address
        try:
            self.forwarder = Forwarder(self.settings, self._environment, session=self._session)
            self._web = _Server(self.forwarder, self.settings)
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._web, address.host, address.port, backlog=1024)
        except BaseException as error:
            await self._session.close()
            if isinstance(error, OSError):
                raise CannotListen(listen=self.settings.listen, problem=_why(error)) from None
            raise
        return self

    @property
    def port(self) -> int:
        """On which it listens."""
        assert self._server is not None  # noqa: S101 - entered
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None  # noqa: S101 - entered
        assert self._session is not None  # noqa: S101
        self.drain()
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.forwarder.idle.wait()
        except TimeoutError:
            self.abort()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS):
                    await self.forwarder.idle.wait()
        finally:
            self._server.close()
            await self._web.end()
            await self._session.close()

    def drain(self) -> None:
        """Let nobody in any more; whoever comes is told so until the block is left."""
        self.forwarder.draining = True

    def abort(self) -> None:
        """End what is under way, without waiting for it."""
        self.drain()
        self.forwarder.abort()


class CannotListen(ForebayError, OSError):
    """Nothing can listen on {listen}: {problem}. Give another address, or stop what listens there."""


def _why(error: OSError) -> str:
    """What the machine says; asyncio's own words tell the address again."""
    number = error.errno or 0  # below 0 it is that of a name that was not found
    return os.strerror(number) if number > 0 else error.strerror or str(error)


def run_forever(settings: GatewaySettings, ready: Callable[[Gateway], object]) -> int:
    """See `forebay.gateway.serve`."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    _open_more_files(_FILES * settings.max_connections + _OTHER_FILES)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(_run(settings, ready))
    return 0


async def _run(settings: GatewaySettings, ready: Callable[[Gateway], object]) -> None:
    stop = asyncio.Event()

    def asked_to_stop() -> None:
        if stop.is_set():
            gateway.abort()  # the second time it is meant
        stop.set()

    async with Gateway(settings) as gateway:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked_to_stop)
        ready(gateway)
        await stop.wait()
        log.info("draining: calls under way have %g s", settings.drain_timeout)


def _open_more_files(wanted: int) -> None:
    """Let this process have as many files open as its connections may take, as far as the machine allows that."""
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415 - not everywhere

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == resource.RLIM_INFINITY or now >= wanted:
        return
    allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
        now = allowed
    if now < wanted:
        log.warning(
            "this process may have %d files open, too few for max_connections: raise the limit (ulimit -n %d), or"
            " lower that",
            now,
            wanted,
        )


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415 - it is faster, and not everywhere
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
