"""The pool of connections to providers: none is lent that may carry the rest of another call.

HTTP/1.1 pairs answers with requests by their order alone: if a provider, or a proxy before it, sends one answer too
many, each later call of that connection gets the answer of another. Four rules keep that from callers, and the fifth
keeps calls from connections that are about to be closed:

- Each credential has connections of its own: whatever goes wrong, no caller gets the answer to another's key.
- An idle connection that receives something is closed, also if it has not been read yet when the connection is lent.
- A connection rests before it is lent again, so that such bytes have time to arrive.
- A provider that has sent such bytes gets a new connection for each call, for a while.
- A connection is not lent once it has been idle for nearly as long as one that its provider has closed. A call that is
  sent while the provider closes its connection may have been received, so it would count as reserved.
"""

from __future__ import annotations

import math
import select
from asyncio import BaseTransport
from collections.abc import Mapping
from typing import Any, Final

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey

from forebay import clock
from forebay.events import log
from forebay.gateway.connections.response_head import HeadSplitter, clean_head

_KEEPALIVE: Final = 30.0  # seconds for idle connections to providers; most close them later
_SAFE_SHARE: Final = 0.8  # of the idle time after which a provider closes: a call needs time to arrive
_ALWAYS_SAFE: Final = 0.5  # seconds: providers wait longer, so what is closed sooner has another cause
_MEMORY: Final = 600.0  # seconds for which an idle time is remembered: a restart closes connections after any time
_REST: Final = 0.01  # seconds between two calls on one connection
_DISTRUST: Final = 600.0  # seconds without reuse for a provider that sent bytes unasked
_CREDENTIALS: Final = ("authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie")
_IDLE_TIMEOUT_ANSWER: Final = (b"HTTP/1.1 408", b"HTTP/1.0 408")  # with which load balancers close idle connections


class PooledRequest(aiohttp.ClientRequest):
    """A request that shares connections with requests of the same credentials only."""

    @property
    def connection_key(self) -> ConnectionKey:
        """The key of its connections."""
        key = super().connection_key
        return key_for_credentials(key, hash_credentials(self.headers))


def hash_credentials(headers: Mapping[str, str]) -> int:
    """Return a hash of all that tells for whom the provider answers. `headers`: by lower-case name."""
    return hash(tuple([headers.get(name) for name in _CREDENTIALS]))


def key_for_credentials(key: ConnectionKey, credentials: int) -> ConnectionKey:
    """Return the key of connections that are shared by calls with the same credentials."""
    return key._replace(proxy_headers_hash=hash((key.proxy_headers_hash, credentials)))


class PooledConnection(ResponseHandler):
    """One connection to a provider, which notices what arrives while it is idle.

    Args:
        pool: of the connection.

    Attributes:
        idle_key: the key in the pool while it is idle; None while a call uses it.
        idle_since: when its last call ended.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        super().__init__(pool._loop)  # noqa: SLF001 - aiohttp has no other way to a connector's loop
        self._pool = pool
        self._heads = HeadSplitter()
        self._poll: select.poll | None = None  # of its socket; made once, for each call asks it
        self._silent_until = math.inf  # loop time at which the read timeout is over; infinity while none runs
        self.idle_key: ConnectionKey | None = None
        self.idle_since = 0.0

    def connection_made(self, transport: BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._pool.record_opened()
        self._poll = _poll_for(transport)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See `asyncio.Protocol`."""
        self._pool.record_closed()
        if self.transport is not None:  # else it was closed on this side
            self._record_closed_idle()
        super().connection_lost(exc)
        self._cancel_timer()

    def rest(self, key: ConnectionKey) -> None:
        """Begin to be idle, after a call."""
        self.idle_key = key
        self.idle_since = clock.now()

    @property
    def idle_time(self) -> float:
        """The seconds since its last call ended."""
        return clock.now() - self.idle_since

    def has_rested(self, now: float) -> bool:
        """Return whether the last call ended long enough ago."""
        return now - self.idle_since >= _REST

    # A call restarts its read timeout whenever bytes pass. Another timer each time took 3 % of a call's processor time,
    # so one goes on running: when it fires too early, it is set again for the rest.

    def _reschedule_timeout(self) -> None:
        """See `ResponseHandler`."""
        timeout = self._read_timeout
        if not timeout:
            self._drop_timeout()
            return
        self._silent_until = until = self._loop.time() + timeout
        timer = self._read_timeout_handle
        if timer is None or timer.when() > until:
            self._set_timer(until)

    def _drop_timeout(self) -> None:
        """See `ResponseHandler`."""
        self._silent_until = math.inf
        if self.transport is None:
            self._cancel_timer()

    def _set_timer(self, at: float) -> None:
        self._cancel_timer()
        self._read_timeout_handle = self._loop.call_at(at, self._on_read_timeout)

    def _cancel_timer(self) -> None:
        if self._read_timeout_handle is not None:
            self._read_timeout_handle.cancel()
            self._read_timeout_handle = None

    def _on_read_timeout(self) -> None:
        """See `ResponseHandler`."""
        self._read_timeout_handle = None
        if self._silent_until <= self._loop.time():
            super()._on_read_timeout()
        elif self._silent_until < math.inf:
            self._set_timer(self._silent_until)

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - as in aiohttp
        """See `ResponseHandler`, which is asked to after each read of a body, though nothing was paused."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def _record_closed_idle(self) -> None:
        if self.idle_key is not None:
            self._pool.record_closed_idle(self.idle_key, self.idle_time)

    def set_response_params(self, **parameters: Any) -> None:
        """See `ResponseHandler`; a call begins."""
        self.idle_key = None
        self._heads.reset()
        super().set_response_params(**parameters)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`; closes the connection if no call is under way.

        A head is parsed apart from what follows: the parser forgets a whole response, which was paid for, if an
        invalid one begins in the same bytes.
        """
        if self.idle_key is None:
            while data and (self._payload is None or self._payload.is_eof()):
                head, data = self._heads.split(data)
                if not self._parse(clean_head(head)) or not data:
                    return
            self._parse(data)
        elif data.strip(b"\r\n"):  # an empty line is allowed before an answer
            if data.startswith(_IDLE_TIMEOUT_ANSWER):
                self._record_closed_idle()
            else:
                self._pool.distrust(self.idle_key)
            self.close()

    def _parse(self, data: bytes) -> bool:
        """Parse bytes of a response; return whether they are valid."""
        super().data_received(data)
        if self.exception() is None:
            return True
        if self._payload is not None and not self._payload.is_eof():  # aiohttp would let its reader wait forever
            self._payload.set_exception(aiohttp.ClientPayloadError("its response is not valid HTTP"))
        return False

    def is_connected(self) -> bool:
        """Return whether it is open and, while it is idle, fit for another call."""
        transport, key = self.transport, self.idle_key
        if transport is None or transport.is_closing():
            return False
        if key is None:
            return True
        if self.should_close or (self._pool.knows_idle_times and self._pool.may_be_closing(key, self.idle_time)):
            return False
        return self._poll is None or not self._poll.poll(0)  # bytes that the event loop has not read yet, or the end


class ConnectionPool(aiohttp.TCPConnector):
    """The connections to all providers.

    Args:
        max_connections: open at a time, the idle ones included. Calls that need more are not held up: idle connections
            are closed to make room.
    """

    def __init__(self, max_connections: int) -> None:
        super().__init__(limit=0, keepalive_timeout=_KEEPALIVE)
        self._factory = lambda: PooledConnection(self)  # type: ignore[assignment] # aiohttp's type is a partial
        self._max_connections = max_connections
        self._open = 0
        self._distrusted: dict[tuple[str, int | None], float] = {}  # until when, by address: as few as targets
        self._idle_times: dict[tuple[str, int | None], tuple[float, float]] = {}  # the shortest, and until when

    def change(self, max_connections: int) -> None:
        """Set another bound for the next connections."""
        self._max_connections = max_connections

    def record_opened(self) -> None:
        """Count a connection that was opened."""
        self._open += 1

    def record_closed(self) -> None:
        """Count a connection that was closed."""
        self._open -= 1

    def distrust(self, key: ConnectionKey) -> None:
        """Use each connection to this provider for one call only, for a while: it sent bytes that no call asked for."""
        if not self._is_distrusted(key):
            log.warning(
                "%s:%s sent bytes that no call asked for: for ten minutes each call gets a new connection there",
                key.host,
                key.port,
            )
        self._distrusted[key.host, key.port] = clock.now() + _DISTRUST

    def record_closed_idle(self, key: ConnectionKey, idle_time: float) -> None:
        """Note that a provider has closed a connection that had been idle for so many seconds."""
        now = clock.now()
        if idle_time <= self._closes_after(key, now):
            self._idle_times[key.host, key.port] = (idle_time, now + _MEMORY)

    @property
    def knows_idle_times(self) -> bool:
        """True if a provider has closed a connection that was idle."""
        return bool(self._idle_times)

    def may_be_closing(self, key: ConnectionKey, idle_time: float) -> bool:
        """Return whether a connection that has been idle for so many seconds may be closed before a call arrives."""
        return idle_time > max(_ALWAYS_SAFE, _SAFE_SHARE * self._closes_after(key, clock.now()))

    def _closes_after(self, key: ConnectionKey, now: float) -> float:
        """Return the seconds after which the provider closes an idle connection, as far as known."""
        idle_time, until = self._idle_times.get((key.host, key.port), (math.inf, math.inf))
        return idle_time if now < until else math.inf

    def _is_distrusted(self, key: ConnectionKey) -> bool:
        return bool(self._distrusted) and self._distrusted.get((key.host, key.port), 0.0) > clock.now()

    async def _get(self, key: ConnectionKey, traces: list[Any]) -> Any:
        """Return an idle connection that has rested, or None for a new one."""
        idle: Any = self._conns.get(key)
        if idle and not self._is_distrusted(key) and idle[0][0].has_rested(clock.now()):  # the first is the oldest
            lent = await super()._get(key, traces)
            if lent is not None:
                return lent
        if self._open >= self._max_connections:
            for _ in range(1 + self._open - self._max_connections):  # what is closed counts as open for a moment
                if self._conns:
                    self._close_idle()
        return None

    def _close_idle(self) -> None:
        """Close one idle connection to any provider."""
        key = next(iter(self._conns))
        connections = self._conns[key]
        connection, _ = connections.popleft()
        if not connections:
            del self._conns[key]
        connection.close()

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        """Keep a connection after a call, or close it."""
        super()._release(key, protocol, should_close=should_close or self._is_distrusted(key))
        if isinstance(protocol, PooledConnection):
            protocol.rest(key)


def _poll_for(transport: BaseTransport) -> select.poll | None:
    """Return what tells whether a connection has something to read, its end included; None where that is not known."""
    socket = transport.get_extra_info("socket")
    if socket is None or not hasattr(select, "poll"):
        return None
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    return poll
