"""Fixtures of the acceptance tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from tests.support.gateway_harness import GatewayHarness, ScriptedProvider
from tests.support.task_stores import STORES, StoreBackend


@pytest.fixture
async def harness() -> AsyncIterator[GatewayHarness]:
    provider = ScriptedProvider()
    server = web.Server(provider.handle, handler_cancellation=True, auto_decompress=False, access_log=None)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with aiohttp.ClientSession() as session:
        yield GatewayHarness(provider, f"http://127.0.0.1:{port}", session)
    listening.close()
    server.pre_shutdown()
    await server.shutdown(0.1)


@pytest.fixture(params=STORES, ids=str)
def overflow(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    backend: StoreBackend = request.param
    return backend.fast_url(tmp_path)


@pytest.fixture(params=[None, *STORES], ids=str)
def any_overflow(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    backend: StoreBackend | None = request.param
    return None if backend is None else backend.fast_url(tmp_path)
