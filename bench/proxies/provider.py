"""A provider that costs nearly nothing: ``python -m bench.proxies.provider`` prints its port and serves forever.

A streamed request gets three events, and then the connection stays open until the caller hangs up.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import cast

import uvloop

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_TEXT = "The Danube, for one. " * 20
_CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": _TEXT}}],
    "usage": {"prompt_tokens": 160, "completion_tokens": 100, "total_tokens": 260},
}
_LIMITS = (
    b"x-request-id: req_1\r\n"
    b"x-ratelimit-limit-requests: 10000000\r\nx-ratelimit-remaining-requests: 9999999\r\n"
    b"x-ratelimit-reset-requests: 6ms\r\nx-ratelimit-limit-tokens: 2000000000\r\n"
    b"x-ratelimit-remaining-tokens: 1999999000\r\nx-ratelimit-reset-tokens: 9ms\r\n"
)
_BODY = json.dumps(_CHAT).encode()
_WHOLE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(_BODY)
    + _LIMITS
    + b"\r\n"
    + _BODY
)
_EVENT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"The "},"finish_reason":null}]}\n\n'
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n" + _LIMITS + b"\r\n"
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)


class Provider(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)  # those of uvloop are no subclass
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        """Answer each request once it is complete."""
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self.buffer[:end])
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < whole:
                return
            body, self.buffer = self.buffer[end + 4 : whole], self.buffer[whole:]
            self.transport.write(_STREAM + 3 * _CHUNK if b'"stream":true' in body else _WHOLE)


async def serve() -> None:
    """Serve forever."""
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
