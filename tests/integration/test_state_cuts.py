"""The connection to a shard on Redis is cut at each command: no write is lost, and none is done twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.cutting_proxy import CuttingProxy, Side
from tests.support.redis_servers import StandaloneRedis, redis_server

from forebay.errors import Conflict
from forebay.state import ShardedState
from forebay.storage import redis_master

NAMES = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[StandaloneRedis]:
    with redis_server(proxied=True) as started:
        yield started


@pytest.fixture
def proxy(server: StandaloneRedis) -> Iterator[CuttingProxy]:
    [proxy] = server.proxies
    yield proxy
    proxy.forget()
    proxy.accept()


async def run_script(server: StandaloneRedis) -> list[Any]:
    """Use each operation, one after the other, and return what they say: versions as `True`."""
    said: list[Any] = []
    async with await ShardedState.connect(f"{server.url}?name=cut-{next(NAMES)}", timeout=30.0) as state:
        agent = state.namespace("agent")
        first = await state.put("key", "first", if_version=0)
        for _ in range(3):
            said.append((await state.update("calls", lambda calls: (calls or 0) + 1)).value)
            said.append((await agent.update("calls", lambda calls: (calls or 0) + 10)).value)
        try:
            await state.put("key", "second", if_version=first + 1)
        except Conflict as conflict:
            said.append(conflict.found == first)
        await state.put("key", "third", if_version=first)
        said.append(await state.delete("key", if_version=(await state.get("key") or ("", 0))[1]))
        said.append(await state.delete("key"))
        await agent.put("short", 1, ttl=1_000)
        said += [[(entry.key, entry.value) async for entry in each.scan()] for each in (state, agent)]
    return said


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_cut_at_any_command_makes_no_difference(
    server: StandaloneRedis, proxy: CuttingProxy, lost: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_master, "_RETRY_INTERVAL", 0.001)
    proxy.forget()
    expected = await run_script(server)
    assert expected[-2:] == [[("calls", 3)], [("calls", 30), ("short", 1)]]
    commands = len(proxy.commands)
    assert commands > 20
    for number in range(1, commands + 1):
        proxy.cut_at(number, lost)
        assert await run_script(server) == expected, f"after a cut at command {number}, {proxy.commands[number - 1]}"
        assert proxy.has_cut, number
