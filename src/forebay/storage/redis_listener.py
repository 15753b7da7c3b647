"""A listener to a channel of a Redis master, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress

import redis

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.storage.redis_master import connect
from forebay.storage.redis_url import RedisUrl

_INTERVAL = 0.02  # seconds between two calls of the callback
_MAX_MESSAGES = 1_000  # that are read before the callbacks are called
_POLL = 0.5  # seconds after which the thread looks whether it was stopped
_RETRY_INTERVAL = 1.0  # seconds between two attempts to connect


class RedisListener:
    """Calls callbacks in the event loop when another client has published to a channel.

    A message is letters, a colon, and the client that has sent it; each letter has a callback. What is published while
    the connection is away is lost, so all callbacks are called whenever it is back. In virtual time nobody listens: no
    thread may take part in that.

    Args:
        url: where the master is.
        tag: the hash tag of the overflow, by which a cluster has the master.
        channel: the name of the channel.
        own: the name of this client, whose messages are ignored.
        callbacks: by letter; each is called at most once in 20 ms.
    """

    def __init__(
        self, url: RedisUrl, tag: str, channel: str, *, own: str, callbacks: Mapping[str, Callable[[], None]]
    ) -> None:
        self._url = url
        self._tag = tag
        self._channel = channel
        self._own = own.encode()
        self._callbacks = callbacks
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        if not clock.is_virtual(self._loop):
            threading.Thread(target=self._run, name=f"forebay-redis-{tag}-listener", daemon=True).start()

    def stop(self) -> None:
        """Stop listening. No callback is called any more."""
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
                news, received = set[str](), 0
                while message is not None and received < _MAX_MESSAGES:
                    received += 1
                    news.update(self._callbacks if message["type"] == "subscribe" else self._letters(message["data"]))
                    message = channel.get_message(timeout=0.0)
                if news:
                    with suppress(RuntimeError):  # the loop is closed
                        self._loop.call_soon_threadsafe(self._call_back, news)
                    self._stopped.wait(_INTERVAL)

    def _letters(self, message: bytes) -> str:
        letters, _, client = message.partition(b":")
        return "" if client == self._own else letters.decode(errors="replace")

    def _call_back(self, letters: Iterable[str]) -> None:
        for letter, callback in self._callbacks.items():
            if letter in letters and not self._stopped.is_set():
                callback()
