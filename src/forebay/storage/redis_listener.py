"""A listener to a channel of a Redis master, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing, suppress

import redis

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.storage.redis_master import connect
from forebay.storage.redis_url import RedisUrl

_INTERVAL = 0.02  # seconds between two calls of the callback
_POLL = 0.5  # seconds after which the thread looks whether it was stopped
_RETRY_INTERVAL = 1.0  # seconds between two attempts to connect


class RedisListener:
    """Calls `notify` in the event loop when another client has published to a channel.

    What is published while the connection is away is lost, so `notify` is called whenever it is back. In virtual time
    nobody listens: no thread may take part in that.

    Args:
        url: where the master is.
        tag: the hash tag of the overflow, by which a cluster has the master.
        channel: the name of the channel.
        own: what this client publishes itself: it is ignored.
        notify: the callback, called at most once in 20 ms.
    """

    def __init__(self, url: RedisUrl, tag: str, channel: str, *, own: str, notify: Callable[[], None]) -> None:
        self._url = url
        self._tag = tag
        self._channel = channel
        self._own = own.encode()
        self._notify = notify
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        if not clock.is_virtual(self._loop):
            threading.Thread(target=self._run, name=f"forebay-redis-{tag}-listener", daemon=True).start()

    def stop(self) -> None:
        """Stop listening. `notify` is not called any more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set() and not self._loop.is_closed():
            with suppress(StoreUnavailable, redis.RedisError, OSError):
                self._listen()
            self._stopped.wait(_RETRY_INTERVAL)

    def _listen(self) -> None:
        """Listen until the connection breaks or this is stopped."""
        with closing(connect(self._url, self._tag)) as client:
            channel = client.pubsub()  # type: ignore[no-untyped-call]
            channel.subscribe(self._channel)
            while not self._stopped.is_set() and not self._loop.is_closed():
                message = channel.get_message(timeout=_POLL)
                is_news = False
                while message is not None:
                    is_news |= message["type"] == "subscribe" or message["data"] != self._own
                    message = channel.get_message(timeout=0.0)
                if is_news:
                    with suppress(RuntimeError):  # the loop is closed
                        self._loop.call_soon_threadsafe(self._heard)
                    self._stopped.wait(_INTERVAL)

    def _heard(self) -> None:
        if not self._stopped.is_set():
            self._notify()
