"""A blocking client of an SDK whose requests are made in the event loop, by the async client that belongs to it.

What blocks on it in an `AgentThread` stops with the run, in the middle of a call and in the queue of an upstream.
"""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import AsyncIterator, Iterator
from functools import cache
from types import ModuleType
from typing import Any

from forebay.adapters.agent_thread import AgentThread
from forebay.upstream.httpx_binding.client_binder import library_of, sdk_of, without_finalizer

#: The event loop of each async HTTP client that was used: its connections belong to it.
_LOOPS: weakref.WeakKeyDictionary[Any, weakref.ref[asyncio.AbstractEventLoop]] = weakref.WeakKeyDictionary()


def in_loop(client: Any, async_client: Any, thread: AgentThread) -> Any:
    """Return a copy of a blocking client of an SDK that sends by an async one; the client itself if that cannot be.

    Args:
        client: the blocking client. It sends what an async one cannot, such as files.
        async_client: of the same SDK, with the same settings.
        thread: the thread of the run that uses the copy.
    """
    if sdk_of(client) is None or sdk_of(client) != sdk_of(async_client):
        return client
    blocking, sends = client._client, async_client._client  # noqa: SLF001 - what with_options passes on
    http = library_of(sends)
    if http is None or not isinstance(blocking, http.Client) or not isinstance(sends, http.AsyncClient):
        return client
    loop = _LOOPS.setdefault(sends, weakref.ref(thread.loop))()
    if loop is not thread.loop:
        return client
    inner = copy.copy(blocking)
    kind: Any = type(blocking)
    inner.__class__ = without_finalizer(kind)
    inner.headers, inner.cookies, inner.params = blocking.headers, blocking.cookies, blocking.params
    inner.event_hooks = blocking.event_hooks
    make = _transport_class(http)
    inner._transport = make(thread, sends._transport, blocking._transport)  # noqa: SLF001 - no other way in
    inner._mounts = {  # noqa: SLF001
        pattern: None if transport is None else make(thread, transport, blocking._transport)  # noqa: SLF001
        for pattern, transport in sends._mounts.items()  # noqa: SLF001
    }
    return client.copy(http_client=inner)


@cache
def _transport_class(http: ModuleType) -> Any:
    """Return a class of blocking transports over async ones, made for httpx or httpx2."""

    class Body(http.SyncByteStream):  # type: ignore[misc, name-defined]  # of a module that is a value
        """The body of an answer."""

        def __init__(self, thread: AgentThread, stream: Any) -> None:
            self._thread, self._stream = thread, stream

        def __iter__(self) -> Iterator[bytes]:
            chunks = aiter(self._stream)
            while chunk := self._thread.await_in_loop(_next(chunks)):
                yield chunk

        def close(self) -> None:
            """Close the answer, also if the run has stopped."""
            self._thread.await_in_loop(self._stream.aclose(), stops=False)

    class InLoop(http.BaseTransport):  # type: ignore[misc, name-defined]
        """A blocking transport that sends in the event loop of a run."""

        def __init__(self, thread: AgentThread, sends: Any, blocking: Any) -> None:
            self._thread, self._sends, self._blocking = thread, sends, blocking
            self.binding = getattr(sends, "binding", None)  # a client over it is bound if the other one is

        def handle_request(self, request: Any) -> Any:
            """Send one request."""
            if not isinstance(request.stream, http.AsyncByteStream):
                return self._blocking.handle_request(request)
            answer = self._thread.await_in_loop(self._sends.handle_async_request(request))
            return http.Response(
                answer.status_code,
                headers=answer.headers,
                stream=Body(self._thread, answer.stream),
                extensions=answer.extensions,
            )

    return InLoop


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    """Return the next part of a body that is not empty; an empty one at its end."""
    async for chunk in chunks:
        if chunk:
            return chunk
    return b""
