"""HTTP proxies that only forward: ``python -m bench.baselines.bare_proxy KIND URL`` prints its port.

KIND is ``aiohttp`` (both sides) or ``uvicorn`` (httptools, over aiohttp's client); both on uvloop.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import aiohttp
import uvicorn
import uvloop
from aiohttp import web

_HOP_BY_HOP = {"host", "content-length", "transfer-encoding", "connection"}


def client() -> aiohttp.ClientSession:
    """Return an HTTP client with the settings of the gateway's."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)


async def serve_aiohttp(url: str) -> None:
    """Serve with aiohttp on both sides."""
    session = client()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        async with session.request(request.method, url + request.raw_path, headers=headers, data=body) as answer:
            response_body = await answer.read()
            response_headers = {
                name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP
            }
            return web.Response(status=answer.status, headers=response_headers, body=response_body)

    server = web.Server(handle, access_log=None)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


async def serve_uvicorn(url: str) -> None:
    """Serve with uvicorn and httptools, over aiohttp's client."""
    session = client()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {
            n.decode("latin-1"): v.decode("latin-1") for n, v in scope["headers"] if n.decode() not in _HOP_BY_HOP
        }
        path = scope["raw_path"].decode()
        async with session.request(scope["method"], url + path, headers=headers, data=body) as answer:
            response_body = await answer.read()
            response_headers = [(n.lower(), v) for n, v in answer.raw_headers if n.decode().lower() not in _HOP_BY_HOP]
            response_headers.append((b"content-length", str(len(response_body)).encode()))
            await send({"type": "http.response.start", "status": answer.status, "headers": response_headers})
            await send({"type": "http.response.body", "body": response_body})

    config = uvicorn.Config(
        app, port=0, http="httptools", loop="uvloop", log_level="error", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    uvloop.run({"aiohttp": serve_aiohttp, "uvicorn": serve_uvicorn}[sys.argv[1]](sys.argv[2]))
