"""The gateway as a server: its connections, their bounds, draining and signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from shutil import rmtree
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal, Self, cast
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, BadHttpMethod, InvalidHeader, InvalidURLError, LineTooLong
from prometheus_client import disable_created_metrics

from forebay import clock
from forebay._text import format_duration
from forebay.errors import ForebayError
from forebay.events import log
from forebay.gateway.access_log import AccessLog
from forebay.gateway.call_record import REQUEST_ID
from forebay.gateway.callers.caller_ledgers import CallerLedgers
from forebay.gateway.callers.key_file import parse_keys_url
from forebay.gateway.callers.key_registry import KeyRegistry
from forebay.gateway.connections.connection_pool import ConnectionPool, PooledRequest
from forebay.gateway.connections.direct_request import RESPONSE_BOUNDS
from forebay.gateway.error_responses import error_response
from forebay.gateway.file_limit import fit_connections
from forebay.gateway.forwarder import Forwarder, ReloadParts
from forebay.gateway.settings import GatewaySettings
from forebay.gateway.workers.worker_channel import (
    MessageHandler,
    WorkerChannel,
    make_worker_directory,
    remove_if_last,
    restore_worker_directory,
)
from forebay.gateway.workers.worker_group import WorkerGroup
from forebay.gateway.workers.worker_listener import WorkerListener
from forebay.gateway.workers.worker_processes import CannotListen, Listening, WorkerProcesses
from forebay.gateway.workers.worker_reload import (
    PreparedReload,
    SettingsInForce,
    WorkerReload,
    read_settings,
    reload_workers,
)
from forebay.quota.prices import load_price_list
from forebay.spend_log import SpendLog
from forebay.upstream.core import UpstreamCore

_TOO_MANY_CONNECTIONS: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"retry-after-ms: %d\r\ncontent-length: %d\r\n\r\n%b"
)
_HEAD_TOO_LONG: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_HEADERS_TOO_LARGE: Final = 431
_INVALID: Final[dict[type[BaseException], str]] = {
    InvalidHeader: "this is not HTTP/1.1: a header is invalid",
    InvalidURLError: "this is not HTTP/1.1: the path is invalid",
    BadHttpMethod: "this is not HTTP/1.1: the method is invalid",
}
_MAX_FIELDS: Final = 200  # header fields of a request
_REJECTED_SHARE: Final = 8  # connections for each one beyond the limit whose request is read
_LINGER: Final = 1.0  # seconds that the rest of a rejected body is read, since the response could get lost otherwise
_LEAST_CONNECTIONS: Final = 5_000  # a default that is lowered to fewer is worth a warning
_FIRST_PROBE: Final = 0.05  # seconds until a caller who has closed its sending side is probed again
_PROBE: Final = 1.0  # seconds between the probes after that
_LAST_REQUEST_GRACE: Final = 0.5  # seconds for requests that are on their way when the gateway stops
_ACCEPTING: Final = 3  # turns in which asyncio's event loop makes a transport for a connection that it has accepted
# Settings that a reload does not change, besides `listen`.
_UNTIL_RESTART: Final = (
    "shared",
    "workers",
    "spend_log",
    "max_metrics_models",
    "max_metrics_tenants",
    "max_metrics_keys",
)
_ABORT_GRACE: Final = 1.0  # seconds for error responses to reach the callers of aborted calls


class _TooManyConnections(asyncio.Protocol):
    """A connection beyond the limit: it answers 503 and closes.

    The request is read, and thrown away, until its caller closes too: a connection that is closed with bytes unread is
    reset, and the answer may be lost.

    Args:
        rejected: all such connections.
        most: how many of them are read at a time; those beyond close at once.
    """

    def __init__(self, rejected: set[_TooManyConnections], most: int) -> None:
        self._rejected = rejected
        self._most = most
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        wire = cast("asyncio.Transport", transport)
        body = error_response("openai", 503, "forebay_connections", "this gateway has too many open connections").body
        retry_after = 1000 * (0.5 + clock.draw())  # callers retry spread out
        wire.write(_TOO_MANY_CONNECTIONS % (retry_after, len(body), body))
        if len(self._rejected) >= self._most:
            wire.close()
            return
        wire.write_eof()
        self._rejected.add(self)
        self._timer = asyncio.get_running_loop().call_later(_LINGER, wire.abort)

    def connection_lost(self, _: BaseException | None) -> None:
        """See `asyncio.Protocol`."""
        self._rejected.discard(self)
        if self._timer is not None:
            self._timer.cancel()


class _Connection(web.RequestHandler):
    """One connection: bounded in memory and time, with HTTP errors reported as JSON."""

    _wire: asyncio.Transport

    def __init__(self, manager: web.Server, settings: GatewaySettings, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            manager,
            loop=loop,
            max_line_size=settings.max_header_bytes,
            max_field_size=settings.max_header_bytes,
            max_headers=_MAX_FIELDS,
            keepalive_timeout=settings.idle_timeout,
            lingering_time=_LINGER,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type] # aiohttp's way to have none
        )
        self._max_header_bytes = settings.max_header_bytes
        self._response_headers = settings.response_headers
        self._send_timeout = settings.send_timeout
        self._head_bytes = 0  # of a head that is not complete yet
        self._last_body: aiohttp.StreamReader | None = None  # of the request that came last
        self._last_version = HttpVersion10  # of that request
        self._reading_paused = False  # too much was pipelined ahead of the current response
        self._send_timer: asyncio.TimerHandle | None = None
        self._half_closed = False  # the caller will send no more
        self._probe_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._wire = cast("asyncio.Transport", transport)
        self._wire.set_write_buffer_limits(high=0)  # so that `pause_writing` is called whenever something is unsent
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_send_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override] # as asyncio has it
        """See `asyncio.Protocol`; returns whether the connection stays open, since its caller may wait for an answer.

        Most callers who close their sending side have left, but some read on. What they get shows which: who has left
        resets the connection, which the next write notices. So they get ``100 Continue``, which clients skip.
        """
        # Not by `_current_request` alone: on Python 3.11 it is set some turns of the loop after the request has come.
        waits = self._last_body is not None and self._last_body.is_eof() and not self._is_waiting()
        request = self._current_request
        if not waits or self._last_version < HttpVersion11 or (request is not None and _has_begun(request)):
            return False
        self._half_closed = True
        self.close_after_last()
        self._probe(_FIRST_PROBE)
        return True

    def close_after_last(self) -> None:
        """Close the connection after the current response, if its caller will send no more and has sent no more."""
        if self._half_closed and not self._messages:
            self.close()

    def _probe(self, interval: float) -> None:
        if self._wire.is_closing():
            return
        request = self._current_request
        if request is not None and not _has_begun(request):
            self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._probe_timer = self._loop.call_later(interval, self._probe, _PROBE)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`; bounds the head of a request, and requests pipelined ahead of a response."""
        messages = len(self._messages)
        in_body = self._last_body is not None and not self._last_body.is_eof()
        super().data_received(data)
        if len(self._messages) > messages:
            head, self._last_body = self._messages[-1]
            self._last_version = getattr(head, "version", HttpVersion10)  # aiohttp's report of an error has none
            self._head_bytes = 0
        else:
            self._head_bytes = 0 if in_body else self._head_bytes + len(data)
        idle = self._is_waiting()
        if self._head_bytes > self._max_header_bytes + _MAX_FIELDS:
            if not idle:
                self.close()  # after the current response
                return
            message = f"the head of this request is longer than {self._max_header_bytes:,} bytes"
            body = error_response("openai", 431, "forebay_long_head", message).body
            self._wire.write(_HEAD_TOO_LONG % (len(body), body))
            self.force_close()
        elif not idle:
            self.limit_read_ahead()

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - as in aiohttp
        """Read on after a body has left its buffer, unless too much is pipelined."""
        if self._reading_paused or self._buffer_paused:  # aiohttp asks after each read of a body
            super().resume_reading(resume_parser)
            self.limit_read_ahead()

    def limit_read_ahead(self) -> None:
        """Pause reading while more than a head is pipelined: such requests are in no queue, and in no body memory.

        While reading is paused, a caller's hang-up goes unnoticed. Closing the connection instead would fail the next
        call of callers that send it, with a long body, just as a response ends.
        """
        if not self._messages and not self._head_bytes and not self._reading_paused:
            return  # as nearly always
        if self._wire.is_closing():
            return
        pipelined = self._head_bytes + sum(body.total_bytes for _, body in self._messages)
        if pipelined > self._max_header_bytes + _MAX_FIELDS:
            self._reading_paused = True
            self._wire.pause_reading()
        elif self._reading_paused:
            self._reading_paused = False
            self._wire.resume_reading()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`; starts the timer that disconnects a caller who reads nothing."""
        super().pause_writing()
        self._start_send_timer()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        self._stop_send_timer()

    @property
    def is_idle(self) -> bool:
        """True if it waits for another request, after a response. Before the first one it does not count."""
        return self._last_body is not None and self._waiter is not None

    def abort(self) -> None:
        """Disconnect, whatever is unsent."""
        self._wire.abort()

    def _is_waiting(self) -> bool:
        """Return whether no request has come, or all that came are answered."""
        return self._waiter is not None and not self._waiter.done()

    def _start_send_timer(self) -> None:
        unsent = self._wire.get_write_buffer_size()
        self._send_timer = self._loop.call_later(self._send_timeout, self._check_sent, unsent)

    def _check_sent(self, before: int) -> None:
        if self._wire.get_write_buffer_size() == before:
            self._wire.abort()
        else:
            self._start_send_timer()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the response for invalid HTTP, or for a bug of this gateway."""
        if request.writer.output_size > 0:
            raise ConnectionError from exc
        if status >= 500:  # noqa: PLR2004
            log.error("a request failed by a bug of the gateway", exc_info=exc)
            error = error_response("openai", status, "forebay_bug", "this gateway failed: see its log")
        elif isinstance(exc, LineTooLong) or "Too many headers" in (message or ""):
            text = f"this request has a longer line than {self.max_field_size:,} bytes, or over {_MAX_FIELDS} headers"
            error = error_response("openai", _HEADERS_TOO_LARGE, "forebay_long_head", text)
        else:
            error = error_response("openai", status, "forebay_bad_request", _describe_invalid(exc))
        response = web.Response(status=error.status, headers=dict(error.headers), body=error.body)
        if self._response_headers:
            response.headers[REQUEST_ID] = clock.new_id()
        response.force_close()
        return response


def _has_begun(request: web.BaseRequest) -> bool:
    """Return whether the response to a request has begun."""
    return request.writer.output_size > 0


def _describe_invalid(error: BaseException | None) -> str:
    """Return why a request is not valid HTTP, without any of its bytes: they may contain an API key."""
    for kind, text in _INVALID.items():
        if isinstance(error, kind):
            return text
    reason = error.message if isinstance(error, BadHttpMessage) else ""
    return f"this is not HTTP/1.1: {reason.partition(':')[0]}" if ":\n" in reason else "this is not HTTP/1.1"


class _Server(web.Server):
    """A server with a limit on its connections.

    Args:
        forwarder: of its calls.
        settings: of the gateway.
        closed: called after a connection has been closed; None for nothing.
    """

    def __init__(
        self, forwarder: Forwarder, settings: GatewaySettings, *, closed: Callable[[], object] | None = None
    ) -> None:
        super().__init__(self._handle, handler_cancellation=True)
        self._forwarder = forwarder
        self._settings = settings
        self._rejected: set[_TooManyConnections] = set()
        self._open: set[web.RequestHandler] = set()
        self._answered: asyncio.Event | None = None  # once no new connections are accepted
        self._closed = closed

    def change(self, settings: GatewaySettings) -> None:
        """Bound connections that are made from now on by other settings."""
        self._settings = settings

    @property
    def open_connections(self) -> int:
        """The number of open connections, with those that are about to be made, and without those beyond the limit."""
        return len(self._open)

    @property
    def is_full(self) -> bool:
        """True if it rejects another connection."""
        return len(self._open) >= self._settings.max_connections

    def __call__(self) -> Any:
        if self.is_full:
            return _TooManyConnections(self._rejected, 1 + self._settings.max_connections // _REJECTED_SHARE)
        connection = _Connection(self, self._settings, loop=asyncio.get_running_loop())
        self._open.add(connection)
        return connection

    def _handle(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        connection = cast("_Connection", request.protocol)
        connection.limit_read_ahead()  # this request is no longer ahead
        connection.close_after_last()
        return self._forwarder.handle(request)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """See `aiohttp.web.Server`."""
        super().connection_lost(handler, exc)
        self._open.discard(handler)
        if self._closed is not None:
            self._closed()
        if self._answered is not None and self._all_answered():
            self._answered.set()

    def _all_answered(self) -> bool:
        return all(cast("_Connection", connection).is_idle for connection in self.connections)

    async def answer_last_requests(self) -> None:
        """Wait until requests that are on their way have been answered, for a moment.

        Closing their connections at once would look like a crash to callers, who are told to call again instead.
        """
        self._answered = asyncio.Event()
        if not self._all_answered():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_REQUEST_GRACE):
                    await self._answered.wait()

    async def end(self) -> None:
        """Close all connections; those that are still open after a grace period are aborted."""
        connections = self.connections
        self.pre_shutdown()  # idle ones
        await self.shutdown(_ABORT_GRACE)
        for connection in connections:
            cast("_Connection", connection).abort()


class Gateway:
    """A gateway that listens while its block runs; leaving the block drains it.

    Args:
        settings: of the gateway.
        environment: variables with its secrets, and with the HTTP proxies of its providers.
        connector: makes the aiohttp connector to its providers; None for a `ConnectionPool`, over TCP.
        listener: what accepts connections, instead of a server at the address of the settings; closed with the gateway.
        channel: to the other workers of the gateway, not open; None if it has one process.
        messages: that it answers there besides its own.

    Raises:
        InvalidSecret: on entering; the token is missing, or not fit to be one.
        MissingFallbackKey: on entering; the API key of a fallback is missing.
        InvalidProviderKey: on entering; the API key of a target is missing, or a header cannot carry it.
        InvalidSetting: on entering; a fallback leads to a target of another protocol, or an HTTP proxy is invalid.
        StoreUnavailable: on entering; the file of issued keys is missing, or cannot be read.
        CannotListen: on entering; the address is in use, or not one of this machine.
        StoreUnavailable: on entering; the spend log cannot be opened.
        CannotWriteLog: on entering; the access log cannot be opened.
    """

    def __init__(  # noqa: PLR0913 - a gateway, and its place among workers
        self,
        settings: GatewaySettings,
        environment: Mapping[str, str] = os.environ,
        *,
        connector: Callable[[], aiohttp.BaseConnector] | None = None,
        listener: WorkerListener | None = None,
        channel: WorkerChannel | None = None,
        messages: Mapping[str, MessageHandler] = MappingProxyType({}),
    ) -> None:
        self.settings = settings
        self._environment = environment
        self._listener = listener
        self._channel = channel
        self._messages = messages
        self._make_connector = connector or self._new_pool
        self._session: aiohttp.ClientSession | None = None
        self._server: asyncio.Server | None = None
        self._spend_log: SpendLog | None = None
        self._keys: KeyRegistry | None = None
        self._key_watch: asyncio.Task[None] | None = None
        self._access_log: AccessLog | None = None
        self._workers: WorkerGroup | None = None
        self._ledgers: CallerLedgers | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=self._make_connector(),
            request_class=PooledRequest,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            **RESPONSE_BOUNDS,  # type: ignore[arg-type] # aiohttp's other parameters are of other types
        )
        address = self.settings.address
        try:
            if self.settings.shared is not None:
                self._ledgers = CallerLedgers.open(self.settings.shared)
            await self._open_spend_log()
            loop = asyncio.get_running_loop()
            token = await loop.run_in_executor(None, self.settings.token, self._environment)
            self._access_log = await loop.run_in_executor(None, _open_access_log, self.settings)
            keys = await self._open_keys(self.settings)
            self.forwarder = Forwarder(
                self.settings,
                self._environment,
                session=self._session,
                token=token,
                spend_log=self._spend_log,
                access_log=self._access_log,
                keys=keys,
                ledgers=self._ledgers,
            )
            if self.settings.shared is not None:
                await loop.run_in_executor(None, _learn_spent, [each.upstream.core for each in self.forwarder.targets])
            closed = None if self._listener is None else self._listener.publish
            self._web = _Server(self.forwarder, self.settings, closed=closed)
            await self._watch_keys(keys)
            await self._join_workers()
            if self._listener is not None:
                self._listener.open(self._web)
            else:
                self._server = await loop.create_server(self._web, address.host, address.port, backlog=1024)
        except BaseException as error:
            await self._leave_workers()
            await self._watch_keys(None)
            await self._session.close()
            await self._close_spend_log()
            if self._access_log is not None:
                await self._access_log.close()
            if isinstance(error, OSError) and not isinstance(error, ForebayError):
                raise CannotListen(listen=self.settings.listen, problem=_reason(error)) from None
            raise
        return self

    async def _join_workers(self) -> None:
        """Let the other workers of the gateway know what this one counts, and the other way round."""
        if self._channel is not None:
            forwarder = self.forwarder
            self._workers = WorkerGroup(
                self._channel, snapshot=forwarder.metrics.snapshot, problems=forwarder.readiness_problems
            )
            await self._workers.open(self._messages)
            forwarder.workers = self._workers

    async def _leave_workers(self) -> None:
        if self._workers is not None:
            await self._workers.close()

    async def _open_keys(self, settings: GatewaySettings) -> KeyRegistry | None:
        """Return the keys of the file that settings name: those that it has, if it is the same file.

        Raises:
            StoreUnavailable: the file is missing, or cannot be read.
        """
        if settings.keys is None:
            return None
        path = parse_keys_url(settings.keys)
        if self._keys is not None and self._keys.path == path:
            return self._keys
        keys = KeyRegistry(path, self._spend_log, self._ledgers)
        await asyncio.get_running_loop().run_in_executor(None, keys.load)
        return keys

    async def _watch_keys(self, keys: KeyRegistry | None) -> None:
        """Follow the changes of the file of these keys, and no longer those of the file before."""
        if keys is self._keys:
            return
        before, watch = self._keys, self._key_watch
        self._keys = keys
        self._key_watch = None if keys is None else asyncio.get_running_loop().create_task(keys.watch())
        if before is not None and watch is not None:
            watch.cancel()
            await asyncio.wait([watch])
            await before.refresh()  # which notes the last use of keys

    def _new_pool(self) -> aiohttp.BaseConnector:
        return ConnectionPool(self.settings.max_connections)

    async def reload(self, settings: GatewaySettings) -> list[str]:
        """Serve by other settings from now on; calls in progress end by the old ones. All or nothing.

        Secrets are read again, and the file of the access log is opened again.

        Args:
            settings: of the gateway.

        Returns:
            What is not as `settings` say, because it needs a restart.

        Raises:
            InvalidSecret, MissingFallbackKey, InvalidProviderKey, InvalidSetting: as on entering; nothing has changed.
            StoreUnavailable, CannotWriteLog: the same.
        """
        settings, kept = keep_until_restart(settings, self.settings)
        prepared = await self.prepare_reload(settings)
        await prepared.commit()
        return kept

    async def prepare_reload(self, settings: GatewaySettings) -> PreparedReload:
        """Return other settings, by which it can serve at once, and what was opened for them. Nothing has changed yet.

        Args:
            settings: of the gateway, with what needs a restart as it was.

        Raises:
            InvalidSecret, MissingFallbackKey, InvalidProviderKey, InvalidSetting: as on entering.
            StoreUnavailable, CannotWriteLog: the same.
        """
        old, log_ = self.settings, self._access_log
        loop = asyncio.get_running_loop()
        token = await loop.run_in_executor(None, settings.token, self._environment)
        if (settings.access_log, settings.access_log_to) != (old.access_log, old.access_log_to):
            log_ = await loop.run_in_executor(None, _open_access_log, settings)
        try:
            keys = await self._open_keys(settings)
            parts = self.forwarder.prepare_reload(settings, token=token)
        except BaseException:
            if log_ is not None and log_ is not self._access_log:
                await log_.close()
            raise
        return _PreparedReload(self, settings, parts, log_, keys)

    async def commit_reload(
        self, settings: GatewaySettings, parts: ReloadParts, log_: AccessLog | None, keys: KeyRegistry | None
    ) -> None:
        """Serve by settings that were prepared."""
        old_log = self._access_log
        self.forwarder.reload(settings, parts, access_log=log_, keys=keys)
        self._web.change(settings)
        if self._session is not None and isinstance(self._session.connector, ConnectionPool):
            self._session.connector.change(settings.max_connections)
        self.settings, self._access_log = settings, log_
        await self._watch_keys(keys)
        if old_log is not None:
            if old_log is log_:
                old_log.reopen()
            else:
                await old_log.close()

    async def discard_reload(self, log_: AccessLog | None) -> None:
        """Close the access log that was opened for settings by which it does not serve."""
        if log_ is not None and log_ is not self._access_log:
            await log_.close()

    @property
    def port(self) -> int:
        """The port on which it listens."""
        if self._listener is not None:
            return self._listener.port
        assert self._server is not None  # noqa: S101 - entered
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None  # noqa: S101 - entered
        self.drain()
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.forwarder.wait_idle()
        except TimeoutError:
            self.abort()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABORT_GRACE):
                    await self.forwarder.wait_idle()
        finally:
            await self._stop_listening()
            await self._web.answer_last_requests()
            await self._web.end()
            await self._leave_workers()
            await self._watch_keys(None)
            await self._session.close()
            await self._close_spend_log()
            if self._access_log is not None:
                await self._access_log.close()

    async def _open_spend_log(self) -> None:
        if (url := self.settings.spend_log_url) is not None:
            spend_log = SpendLog(url)
            await asyncio.get_running_loop().run_in_executor(None, spend_log.open)
            self._spend_log = spend_log

    async def _close_spend_log(self) -> None:
        """Write what calls have cost, and close the file."""
        if self._ledgers is not None:
            self._ledgers.close()
        if self._spend_log is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._spend_log.close)

    async def _stop_listening(self) -> None:
        """Stop listening, and take over what has connected by then: the system would reset it."""
        if self._listener is not None:
            await self._listener.close()
            return
        assert self._server is not None  # noqa: S101 - entered
        if sys.platform == "win32":  # it has no `remove_reader`
            self._server.close()
            return
        loop = asyncio.get_running_loop()
        connected: list[socket.socket] = []
        sockets = [each for each in self._server.sockets if hasattr(each, "fileno")]  # none in virtual time
        for listening in sockets:
            loop.remove_reader(listening.fileno())  # asyncio's loop accepts no more; uvloop has no reader
        for _ in range(_ACCEPTING):
            await asyncio.sleep(0)
        for listening in sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as again:
                connected.extend(_accept_all(again))
        self._server.close()
        for each in connected:
            with contextlib.suppress(OSError):  # it has gone
                await loop.connect_accepted_socket(self._web, each)

    def drain(self) -> None:
        """Reject new calls with 503 from now on; calls in progress continue.

        A worker leaves new connections to the others that do not drain.
        """
        self.forwarder.drain()
        if self._listener is not None:
            self._listener.withdraw()

    def abort(self) -> None:
        """Drain, and end the calls in progress at once with an error."""
        self.drain()
        self.forwarder.abort()


@dataclass(frozen=True, slots=True)
class _PreparedReload:
    """Settings that a gateway has prepared. See `PreparedReload`."""

    _gateway: Gateway
    _settings: GatewaySettings
    _parts: ReloadParts
    _access_log: AccessLog | None
    _keys: KeyRegistry | None

    async def commit(self) -> None:
        await self._gateway.commit_reload(self._settings, self._parts, self._access_log, self._keys)

    async def discard(self) -> None:
        await self._gateway.discard_reload(self._access_log)


def keep_until_restart(settings: GatewaySettings, old: GatewaySettings) -> tuple[GatewaySettings, list[str]]:
    """Return settings with what needs a restart as it was, and what that is."""
    kept = []
    if settings.listen != old.listen:
        kept.append(f"it listens on {old.listen} until it is started again, not on {settings.listen}")
        settings = msgspec.structs.replace(settings, listen=old.listen)  # checks that a token fits the address
    for name in _UNTIL_RESTART:
        if getattr(settings, name) != getattr(old, name):
            kept.append(f"{name} stays {getattr(old, name)!r} until it is started again")
            settings = msgspec.structs.replace(settings, **{name: getattr(old, name)})
    return settings, kept


def _open_access_log(settings: GatewaySettings) -> AccessLog | None:
    """Return the access log; None if there is to be none."""
    if settings.access_log in (None, "off"):
        return None
    return AccessLog("json" if settings.access_log == "json" else "text", settings.access_log_to)


def _accept_all(listening: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections that have been made and not accepted."""
    listening.setblocking(False)
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:  # there is none
            return
        connection.setblocking(False)
        yield connection


def _reason(error: OSError) -> str:
    """Return the system's message; asyncio's own repeats the address."""
    number = error.errno or 0  # negative if a name was not found
    return os.strerror(number) if number > 0 else error.strerror or str(error)


def _learn_spent(upstreams: Iterable[UpstreamCore]) -> None:
    """Learn what was spent of shared budgets, so that the first scrape shows it. A store that is away is left alone."""
    for upstream in upstreams:
        if upstream.budgets.upstream_budget is not None and upstream.budgets.spent() is None:
            return


def run_forever(
    settings: GatewaySettings,
    ready: Callable[[Listening], object],
    reload: Callable[[], GatewaySettings] | None,
    reloaded: Callable[[], object],
) -> int:
    """See `forebay.gateway.serve`."""
    if settings.workers > 1:
        return _run_workers(settings, ready, reload, reloaded)
    return _run(_Program(settings, reload, reloaded), ready)


def _run(program: _Program, ready: Callable[[Listening], object]) -> int:
    """Run a gateway in this process."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    load_price_list()
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(program.run(ready))
    return 0


def _run_workers(
    settings: GatewaySettings,
    ready: Callable[[Listening], object],
    reload: Callable[[], GatewaySettings] | None,
    reloaded: Callable[[], object],
) -> int:
    """Run a gateway in several processes, whose parent is this one."""
    directory = make_worker_directory()
    shared = settings.shared or f"sqlite:///{quote(str(directory))}/account.db?fsync=no"
    settings = msgspec.structs.replace(settings, shared=shared)

    def serve(listener: WorkerListener, number: int, lifeline: int, accepts: Callable[[], object]) -> int:
        restore_worker_directory(directory)
        channel = WorkerChannel(directory, number, settings.workers)
        current = read_settings(directory) or SettingsInForce(0, settings)
        program = _Program(
            current.settings,
            listener=listener,
            lifeline=lifeline,
            channel=channel,
            generation=current.generation,
        )
        status = _run(program, lambda _: accepts())
        if program.is_orphan:
            remove_if_last(directory)
        return status

    def reload_all() -> int:
        assert reload is not None  # noqa: S101 - else a hang-up stops
        if not reload_workers(directory, settings.workers, lambda: keep_until_restart(reload(), settings)):
            return 1
        reloaded()
        return 0

    ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    had_terminal = _has_terminal()

    def effect() -> Literal["reload", "stop", "none"]:
        closed = had_terminal and not _has_terminal()
        return effect_of_hang_up(reloads=reload is not None, ignored=ignored, terminal_closed=closed)

    try:
        workers = WorkerProcesses(
            settings.address, settings.workers, serve, ready, reload=reload_all, effect_of_hang_up=effect
        )
        return workers.run()
    finally:
        rmtree(directory, ignore_errors=True)


def _fitted(settings: GatewaySettings) -> GatewaySettings:
    """Return settings as a program of its own can serve by them."""
    fitting = fit_connections(settings.max_connections, least=_LEAST_CONNECTIONS)
    return msgspec.structs.replace(settings, max_connections=fitting, access_log=settings.access_log or "text")


def effect_of_hang_up(*, reloads: bool, ignored: bool, terminal_closed: bool) -> Literal["reload", "stop", "none"]:
    """Return what a SIGHUP does.

    Args:
        reloads: the settings can be read again.
        ignored: the signal was ignored when the program started, as nohup has it.
        terminal_closed: the program's terminal was closed, which sends the signal too.
    """
    if reloads and not terminal_closed:
        return "reload"
    return "none" if ignored else "stop"


class _Program:
    """The program ``forebay gateway``: a gateway that runs until a signal stops it.

    Args:
        settings: of the gateway.
        reload: returns its settings, read again; None if they cannot be.
        reloaded: called once the gateway serves by them.
        listener: see `Gateway`.
        lifeline: a file descriptor whose end stops the gateway; None for none.
        channel: see `Gateway`; a worker reloads when its parent says so.
        generation: of the settings, see `SettingsInForce`.

    Attributes:
        is_orphan: the parent process has gone.
    """

    def __init__(  # noqa: PLR0913 - a gateway, its reloads, and its place among workers
        self,
        settings: GatewaySettings,
        reload: Callable[[], GatewaySettings] | None = None,
        reloaded: Callable[[], object] = lambda: None,
        *,
        listener: WorkerListener | None = None,
        lifeline: int | None = None,
        channel: WorkerChannel | None = None,
        generation: int = 0,
    ) -> None:
        self._worker_reload = None if channel is None else WorkerReload(channel.directory, generation, self._prepare)
        messages: Mapping[str, MessageHandler] = {}
        if self._worker_reload is not None and channel is not None:
            messages = self._worker_reload.handlers
            channel.call_when_restored(self._worker_reload.restore)
        self._gateway = Gateway(_fitted(settings), listener=listener, channel=channel, messages=messages)
        self.is_orphan = False
        self._lifeline = lifeline
        self._reload = reload
        self._reloaded = reloaded
        self._stop = asyncio.Event()
        self._reload_asked = asyncio.Event()

    async def _prepare(self, settings: GatewaySettings) -> PreparedReload:
        return await self._gateway.prepare_reload(_fitted(settings))

    async def run(self, ready: Callable[[Listening], object]) -> None:
        """Serve until a signal; `ready` is called once it listens."""
        async with self._gateway as gateway:
            self._handle_signals()
            if self._worker_reload is not None:
                await self._worker_reload.catch_up()
            ready(gateway)
            reload = self._reload
            reloading = None if reload is None else asyncio.create_task(self._reload_when_asked(reload))
            await self._stop.wait()
            if reloading is not None:
                reloading.cancel()
            timeout = format_duration(gateway.settings.drain_timeout)
            log.info("draining: calls in progress have %s to end", timeout)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        if self._lifeline is not None:
            loop.add_reader(self._lifeline, self._lose_parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        if not hasattr(signal, "SIGHUP"):
            return
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
        if not ignored or self._reload is not None:
            loop.add_signal_handler(signal.SIGHUP, self._hang_up, _has_terminal(), ignored)

    def _end(self) -> None:
        if self._stop.is_set():
            self._gateway.abort()  # the second signal
        self._stop.set()

    def _lose_parent(self) -> None:
        """Stop: the parent has gone."""
        asyncio.get_running_loop().remove_reader(cast("int", self._lifeline))
        self.is_orphan = True
        self._stop.set()

    def _hang_up(self, had_terminal: bool, ignored: bool) -> None:  # noqa: FBT001 - of a signal handler
        closed = had_terminal and not _has_terminal()
        effect = effect_of_hang_up(reloads=self._reload is not None, ignored=ignored, terminal_closed=closed)
        if effect == "reload":
            self._reload_asked.set()
        elif effect == "stop":
            self._end()

    async def _reload_when_asked(self, reload: Callable[[], GatewaySettings]) -> None:
        while True:
            await self._reload_asked.wait()
            self._reload_asked.clear()
            try:
                settings = await asyncio.get_running_loop().run_in_executor(None, reload)
                kept = await self._gateway.reload(_fitted(settings))
            except ForebayError as error:
                log.error("nothing is reloaded, and the old settings stay: %s", error)
            except Exception:  # noqa: BLE001 - the gateway serves on, and the next reload may work
                log.exception("nothing is reloaded, by a bug of the gateway")
            else:
                for each in kept:
                    log.warning("reloaded, but %s", each)
                self._reloaded()


def _has_terminal() -> bool:
    """Return whether the process has a terminal that can send it a hang-up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415 - faster, and not on Windows
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
