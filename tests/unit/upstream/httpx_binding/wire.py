"""Scripted providers without a network, for httpx and httpx2."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from forebay.upstream import Upstream

URL = "https://provider.test/v1/chat/completions"
USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}
CHAT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "The Danube."}}],
    "usage": USAGE,
}
REQUEST = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 100}


def chunk(**fields: Any) -> bytes:
    """Return one event of a chat stream."""
    return b"data: " + json.dumps({"id": "c", "object": "chat.completion.chunk", **fields}).encode() + b"\n\n"


def words(*texts: str) -> list[bytes]:
    return [chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}]) for text in texts]


STOP = chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
USAGE_EVENT = chunk(choices=[], usage=USAGE)
DONE = b"data: [DONE]\n\n"
STREAM = [*words("The ", "Danube."), STOP, USAGE_EVENT, DONE]


@dataclass
class Reply:
    """One reply of a scripted provider.

    Attributes:
        body: its pieces. An exception is raised in place of a piece.
        pause: seconds before each piece; 0 is one iteration of the event loop.
    """

    status: int = 200
    body: list[bytes | Exception] = field(default_factory=lambda: [json.dumps(CHAT).encode()])
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0

    @classmethod
    def stream(cls, *pieces: bytes | Exception, **rest: Any) -> Reply:
        return cls(body=list(pieces or STREAM), headers={"content-type": "text/event-stream"}, **rest)

    @classmethod
    def error(cls, status: int, message: str = "no", **headers: str) -> Reply:
        body = json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode()
        return cls(
            status=status, body=[body], headers={name.replace("_", "-"): value for name, value in headers.items()}
        )


class Script:
    """A provider that replies from a list, call by call; the last reply is repeated.

    Attributes:
        requests: all requests that it received.
        opened: number of replies that it began.
        closed: number of those that were closed.
    """

    def __init__(self, http: ModuleType, *replies: Reply | Exception) -> None:
        self.http = http
        self.replies = list(replies) or [Reply()]
        self.requests: list[Any] = []
        self.opened = 0
        self.closed = 0

    def next(self, request: Any) -> Reply:
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def asynchronous(self) -> Any:
        script, http = self, self.http

        class Pieces(http.AsyncByteStream):  # type: ignore[name-defined,misc]
            def __init__(self, reply: Reply) -> None:
                self.reply = reply

            async def __aiter__(self) -> AsyncIterator[bytes]:
                for piece in self.reply.body:
                    await asyncio.sleep(self.reply.pause)
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece

            async def aclose(self) -> None:
                script.closed += 1

        class Provider(http.AsyncBaseTransport):  # type: ignore[name-defined,misc]
            async def handle_async_request(self, request: Any) -> Any:
                await asyncio.sleep(0)
                reply = script.next(request)
                script.opened += 1
                return http.Response(reply.status, headers=reply.headers, stream=Pieces(reply))

        return Provider()

    def blocking(self) -> Any:
        script, http = self, self.http

        class Pieces(http.SyncByteStream):  # type: ignore[name-defined,misc]
            def __init__(self, reply: Reply) -> None:
                self.reply = reply

            def __iter__(self) -> Iterator[bytes]:
                for piece in self.reply.body:
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece

            def close(self) -> None:
                script.closed += 1

        class Provider(http.BaseTransport):  # type: ignore[name-defined,misc]
            def handle_request(self, request: Any) -> Any:
                reply = script.next(request)
                script.opened += 1
                return http.Response(reply.status, headers=reply.headers, stream=Pieces(reply))

        return Provider()

    def client(self, upstream: Upstream | None = None, **how: Any) -> Any:
        """Return an asynchronous client of this provider, bound if an upstream is given."""
        client = self.http.AsyncClient(transport=self.asynchronous(), **how)
        return client if upstream is None else upstream.bind(client)

    def blocking_client(self, upstream: Upstream | None = None, **how: Any) -> Any:
        """Return a blocking client of this provider, bound if an upstream is given."""
        client = self.http.Client(transport=self.blocking(), **how)
        return client if upstream is None else upstream.bind(client)


def left(upstream: Upstream) -> dict[str, float]:
    """Return what the calls of an upstream hold; all of it is 0 once they have ended."""
    accounts = [shared.account for shared in upstream.core.accounts]
    return {
        "in_flight": sum(account.in_flight for account in accounts),
        "waiting": sum(len(account.queue) for account in accounts),
        "reserved": sum(len(account.quotas._open) for account in accounts),
    }


NOTHING = {"in_flight": 0, "waiting": 0, "reserved": 0.0}
