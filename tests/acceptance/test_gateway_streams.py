"""A thousand streams at once, most of whose callers hang up somewhere: nothing of them is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from tests.acceptance.gateways import CHAT_REQUEST, NOTHING, leftovers, request_bytes, until

from forebay import clock
from forebay.gateway import GatewaySettings, QuotaSettings, TargetSettings
from forebay.gateway.forwarded_call import ForwardedCall, StreamingResponse
from forebay.gateway.server import Gateway, _Connection
from forebay.simulation.provider.http_server import ProviderServer, start_server
from forebay.simulation.provider.provider_config import Faults, ProviderConfig
from forebay.upstream.metered_stream import MeteredStream

pytestmark = [pytest.mark.slow, pytest.mark.blocks]  # a thousand of anything takes its time

CALLERS = 1_000
UNDER_WAY = 500  # at most; the others wait in line
KEPT = {
    ForwardedCall,
    StreamingResponse,
    MeteredStream,
    _Connection,
    web.BaseRequest,
    aiohttp.ClientResponse,
}  # while a call is under way


class ResponseKind(Enum):
    """Where a caller hangs up; how many of a thousand do so there."""

    AT_ONCE = 100  # with the request just sent
    WAITING = 260  # without having read anything
    BEGUN = 110  # after the head
    AMID = 240  # amid the events
    OVER = 90  # after the last event
    NEVER = 200


ENDLESS = (
    ResponseKind.WAITING,
    ResponseKind.BEGUN,
    ResponseKind.AMID,
)  # what such a caller gets does not end by itself


class Caller:
    """One of them."""

    def __init__(self, fate: ResponseKind, *, events: int, resets: bool) -> None:
        self.fate = fate
        self._events = events  # that it reads
        self._resets = resets
        tokens = 1_000_000 if fate in ENDLESS else 8
        body = json.dumps(
            {"model": CHAT_REQUEST["model"], "messages": CHAT_REQUEST["messages"], "stream": True}
        ).encode()
        self._request = request_bytes(body, b"x-simulated-output-tokens: %d" % tokens, b"connection: close")
        self.status = 0
        self.told = b""

    async def call(self, port: int, together: asyncio.Event) -> None:
        """Call, and hang up where it is its fate, but for those of the first moment not before all have called."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(self._request)
        if self.fate != ResponseKind.AT_ONCE:
            await together.wait()
            await self._read(reader)
        if self._resets and self.fate != ResponseKind.AT_ONCE:
            writer.transport.abort()
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        if self.fate == ResponseKind.WAITING:
            return
        head = await reader.readuntil(b"\r\n\r\n")
        self.status = int(head.split()[1])
        while not self._has_enough() and (piece := await reader.read(4096)):
            self.told += piece

    def _has_enough(self) -> bool:
        match self.fate:
            case ResponseKind.BEGUN:
                return True
            case ResponseKind.AMID:
                return self.told.count(b"data: ") >= self._events
            case ResponseKind.OVER:
                return b"data: [DONE]" in self.told
            case _:
                return False


@pytest.fixture
async def plant() -> AsyncIterator[tuple[ProviderServer, str]]:
    config = ProviderConfig(slots=CALLERS, ttft=0.05, tpot=0.1, tokens_per_event=2, faults=Faults(cut=0.02))
    plant = ProviderServer(config, seed=7)
    runner, url = await start_server(plant)
    yield plant, url
    await runner.cleanup()


def files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def answers(metrics: str) -> Counter[int]:
    """How often each status was given, as the gateway counts."""
    pattern = r'forebay_gateway_requests_total\{status="(\d+)",target="openai"\} ([0-9.]+)'
    return Counter({int(status): int(float(count)) for status, count in re.findall(pattern, metrics)})


@pytest.mark.parametrize("seed", [7])
async def test_a_thousand_streams_leave_nothing_behind(plant: tuple[ProviderServer, str], seed: int) -> None:
    provider, url = plant
    target = TargetSettings(
        name="openai",
        url=url,
        models={"gpt-4o": QuotaSettings(rpm=10**6, input_tpm=10**9, output_tpm=10**9)},
        max_concurrent=UNDER_WAY,
        budget_usd=1e6,
    )
    draws = clock.new_random(seed)
    callers = [
        Caller(fate, events=draws.randrange(1, 5), resets=draws.random() < 0.5)
        for fate in ResponseKind
        for _ in range(fate.value)
    ]
    draws.shuffle(callers)
    callers.sort(key=lambda caller: caller.fate not in ENDLESS)  # so that all are there at once: these do not end
    tasks, fds = len(asyncio.all_tasks()), files()
    async with Gateway(GatewaySettings(targets=(target,), listen="127.0.0.1:0")) as gateway:
        upstream = gateway.forwarder.targets[0].upstream
        desk = upstream.core.accounts.account("gpt-4o")
        together = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.call(gateway.port, together))
            await until(lambda: len(desk.account.queue) == CALLERS - ResponseKind.AT_ONCE.value - UNDER_WAY)
            assert desk.account.in_flight == UNDER_WAY
            together.set()
        await until(lambda: leftovers(gateway) == NOTHING and not gateway._web.connections)

        # Those who stayed have got all of it, or were told what went wrong.
        served = [caller for caller in callers if caller.fate == ResponseKind.NEVER]
        whole = [caller for caller in served if b"data: [DONE]" in caller.told]
        assert len(whole) > len(served) / 2
        assert all(b'"error"' in caller.told for caller in served if caller not in whole)

        # The provider was hung up on for each of those who hung up on us, and works for nobody.
        await until(lambda: provider._provider.statistics().in_flight == 0)
        now = provider._provider.statistics()
        assert now.calls == now.refused + now.finished + now.cut + now.hung_up
        assert now.hung_up >= sum(caller.status == 200 for caller in callers if caller.fate in ENDLESS)

        # Nothing is held of anybody, and what is told adds up.
        (account,) = [account for account in upstream.statistics().accounts if account.name == desk.name]
        assert (account.in_flight, account.queued) == (0, 0)
        assert upstream.core.budgets.upstream_budget is not None
        assert upstream.core.budgets.upstream_budget.reserved() == (0, 0.0)
        given = answers(gateway.forwarder.metrics.render().decode())
        assert given.total() == gateway._web.requests_count >= CALLERS - ResponseKind.AT_ONCE.value
        assert given[499] >= sum(fate.value for fate in ENDLESS)
        for status, count in Counter(caller.status for caller in served).items():
            assert given[status] >= count
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing) in KEPT] == []
    await until(lambda: len(asyncio.all_tasks()) == tasks and files() == fds)
