"""A listener to the changes of entries on a Redis server, in a thread of its own, for a near cache."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any

import redis

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.state.near_cache import Address, CachedServer
from forebay.storage.redis_master import address_of, connect
from forebay.storage.redis_url import RedisUrl

_CHANNEL = "__redis__:invalidate"
_HEARTBEAT = 1.0  # seconds of silence after which the server is asked for an answer, and within which it must answer
_RETRY_INTERVAL = 1.0  # seconds between two attempts to connect
_MAX_PENDING = 10_000  # names that wait for the event loop; with more, all entries are dropped


class InvalidationListener:
    """Tells a `CachedServer` which entries have changed on a server, by Redis's client tracking.

    The server sends the name of each key with the prefix that changes, expires or is dropped, whoever has changed it
    (broadcasting mode: it remembers nothing for this client). In virtual time nobody listens.

    Args:
        url: where the server is.
        tag: the hash tag by which it is found.
        prefix: of the keys.
        server: is told, in the event loop.
        read_from: returns the address from which entries are read.
    """

    def __init__(
        self, url: RedisUrl, tag: str, prefix: str, *, server: CachedServer, read_from: Callable[[], Address | None]
    ) -> None:
        self._url = url
        self._tag = tag
        self._prefix = prefix
        self._server = server
        self._read_from = read_from
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # held to use the next two
        self._pending: set[bytes] | None = set()  # None: all
        self._scheduled = False
        if not clock.is_virtual(self._loop):
            threading.Thread(target=self._run, name=f"forebay-state-{url.name}-listener", daemon=True).start()

    def stop(self) -> None:
        """Stop listening, and drop all entries."""
        self._stopped.set()
        self._server.listen(None)

    def _run(self) -> None:
        while not self._has_ended():
            with suppress(StoreUnavailable, redis.RedisError, OSError):
                self._listen()
            self._stopped.wait(_RETRY_INTERVAL)

    def _has_ended(self) -> bool:
        return self._stopped.is_set() or self._loop.is_closed()

    def _listen(self) -> None:
        """Listen until the connection breaks, the entries are read from another server, or this is stopped."""
        with closing(connect(self._url, self._tag)) as client:
            address = address_of(client)
            connection = client.connection_pool.get_connection()
            try:
                own = _ask(connection, "CLIENT", "ID")
                # Redirected to itself: so the messages come to a connection with the older protocol, too.
                _ask(connection, "CLIENT", "TRACKING", "ON", "REDIRECT", own, "BCAST", "PREFIX", self._prefix)
                _ask(connection, "SUBSCRIBE", _CHANNEL)
                self._call(self._server.listen, address)
                is_asked = False
                while not self._has_ended() and self._read_from() in {None, address}:
                    if connection.can_read(timeout=_HEARTBEAT):
                        self._hear(connection.read_response())
                        is_asked = False
                    elif is_asked:
                        raise redis.TimeoutError("it did not answer in time")
                    else:
                        _send(connection, "PING")
                        is_asked = True
            finally:
                self._call(self._server.listen, None)
                client.connection_pool.disconnect()

    def _hear(self, message: Sequence[object]) -> None:
        if message[0] != b"message":
            return
        names = message[2]
        with self._lock:
            if self._pending is not None and isinstance(names, list):
                self._pending.update(names)
            if not isinstance(names, list) or self._pending is None or len(self._pending) > _MAX_PENDING:
                self._pending = None  # the database was emptied, or the event loop does not keep up
            if self._scheduled:
                return
            self._scheduled = True
        self._call(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            names, self._pending, self._scheduled = self._pending, set(), False
        if names is None:
            self._server.drop_all()
        else:
            self._server.drop(names)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._unless_stopped, function, *args)

    def _unless_stopped(self, function: Callable[..., None], *args: object) -> None:
        if not self._stopped.is_set():
            function(*args)


def _send(connection: Any, *command: Any) -> None:
    connection.send_command(*command, check_health=False)  # which takes a message for the answer to it


def _ask(connection: Any, *command: Any) -> Any:
    """Send a command, and return the answer."""
    _send(connection, *command)
    return connection.read_response()
