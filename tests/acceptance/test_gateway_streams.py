"""A thousand streams at once, most of whose callers disconnect early: everything is released."""

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
from tests.support.gateway_harness import CHAT_REQUEST, NOTHING_LEFT, leftovers, request_bytes, until

from forebay import clock
from forebay.gateway import GatewaySettings, QuotaSettings, TargetSettings
from forebay.gateway.forwarded_call import ForwardedCall, StreamingResponse
from forebay.gateway.server import Gateway, _Connection
from forebay.simulation.provider.http_server import ProviderServer, start_server
from forebay.simulation.provider.provider_config import Faults, ProviderConfig
from forebay.upstream.metered_stream import MeteredStream

pytestmark = [pytest.mark.slow, pytest.mark.blocks]  # a thousand streams take a while

CALLERS = 1_000
MAX_IN_FLIGHT = 500  # the others are queued
TYPES_OF_A_CALL = {
    ForwardedCall,
    StreamingResponse,
    MeteredStream,
    _Connection,
    web.BaseRequest,
    aiohttp.ClientResponse,
}  # while a call is under way


class Disconnect(Enum):
    """The point at which a caller disconnects, with the number of callers that do so there."""

    AT_ONCE = 100  # right after the request
    WAITING = 260  # before reading anything
    AFTER_HEAD = 110
    MIDSTREAM = 240  # between events
    AFTER_END = 90  # after the last event
    NEVER = 200


ENDLESS = (
    Disconnect.WAITING,
    Disconnect.AFTER_HEAD,
    Disconnect.MIDSTREAM,
)  # their streams do not end by themselves


class StreamCaller:
    """A caller of one stream, over a raw socket."""

    def __init__(self, disconnect: Disconnect, *, events: int, resets: bool) -> None:
        self.disconnect = disconnect
        self._events = events  # to read
        self._resets = resets
        tokens = 1_000_000 if disconnect in ENDLESS else 8
        body = json.dumps(
            {"model": CHAT_REQUEST["model"], "messages": CHAT_REQUEST["messages"], "stream": True}
        ).encode()
        self._request = request_bytes(body, b"x-simulated-output-tokens: %d" % tokens, b"connection: close")
        self.status = 0
        self.received = b""

    async def call(self, port: int, together: asyncio.Event) -> None:
        """Call, wait until all have called unless it disconnects at once, and disconnect at its point."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(self._request)
        if self.disconnect != Disconnect.AT_ONCE:
            await together.wait()
            await self._read(reader)
        if self._resets and self.disconnect != Disconnect.AT_ONCE:
            writer.transport.abort()
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        if self.disconnect == Disconnect.WAITING:
            return
        head = await reader.readuntil(b"\r\n\r\n")
        self.status = int(head.split()[1])
        while not self._has_enough() and (piece := await reader.read(4096)):
            self.received += piece

    def _has_enough(self) -> bool:
        match self.disconnect:
            case Disconnect.AFTER_HEAD:
                return True
            case Disconnect.MIDSTREAM:
                return self.received.count(b"data: ") >= self._events
            case Disconnect.AFTER_END:
                return b"data: [DONE]" in self.received
            case _:
                return False


@pytest.fixture
async def provider() -> AsyncIterator[tuple[ProviderServer, str]]:
    config = ProviderConfig(slots=CALLERS, ttft=0.05, tpot=0.1, tokens_per_event=2, faults=Faults(cut=0.02))
    server = ProviderServer(config, seed=7)
    runner, url = await start_server(server)
    yield server, url
    await runner.cleanup()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def responses_by_status(metrics: str) -> Counter[int]:
    """Return how many responses the gateway counts for each status."""
    pattern = r'forebay_gateway_requests_total\{status="(\d+)",target="openai"\} ([0-9.]+)'
    return Counter({int(status): int(float(count)) for status, count in re.findall(pattern, metrics)})


@pytest.mark.parametrize("seed", [7])
async def test_a_thousand_streams_release_everything(provider: tuple[ProviderServer, str], seed: int) -> None:
    server, url = provider
    target = TargetSettings(
        name="openai",
        url=url,
        models={"gpt-4o": QuotaSettings(rpm=10**6, input_tpm=10**9, output_tpm=10**9)},
        max_concurrent=MAX_IN_FLIGHT,
        budget_usd=1e6,
    )
    draws = clock.new_random(seed)
    callers = [
        StreamCaller(disconnect, events=draws.randrange(1, 5), resets=draws.random() < 0.5)
        for disconnect in Disconnect
        for _ in range(disconnect.value)
    ]
    draws.shuffle(callers)
    callers.sort(key=lambda caller: caller.disconnect not in ENDLESS)  # these do not end, so all are there at once
    tasks, fds = len(asyncio.all_tasks()), open_files()
    async with Gateway(GatewaySettings(targets=(target,), listen="127.0.0.1:0")) as gateway:
        upstream = gateway.forwarder.targets[0].upstream
        shared = upstream.core.accounts.account("gpt-4o")
        together = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.call(gateway.port, together))
            await until(lambda: len(shared.account.queue) == CALLERS - Disconnect.AT_ONCE.value - MAX_IN_FLIGHT)
            assert shared.account.in_flight == MAX_IN_FLIGHT
            together.set()
        await until(lambda: leftovers(gateway) == NOTHING_LEFT and not gateway._web.connections)

        # Callers that stayed got the whole stream or an error.
        served = [caller for caller in callers if caller.disconnect == Disconnect.NEVER]
        whole = [caller for caller in served if b"data: [DONE]" in caller.received]
        assert len(whole) > len(served) / 2
        assert all(b'"error"' in caller.received for caller in served if caller not in whole)

        # The calls of disconnected callers ended at the provider, too.
        await until(lambda: server._provider.statistics().in_flight == 0)
        statistics = server._provider.statistics()
        assert statistics.calls == statistics.refused + statistics.finished + statistics.cut + statistics.hung_up
        assert statistics.hung_up >= sum(caller.status == 200 for caller in callers if caller.disconnect in ENDLESS)

        # Nothing is held, and the counts add up.
        (account,) = [account for account in upstream.statistics().accounts if account.name == shared.name]
        assert (account.in_flight, account.queued) == (0, 0)
        assert upstream.core.budgets.upstream_budget is not None
        assert upstream.core.budgets.upstream_budget.reserved() == (0, 0.0)
        responses = responses_by_status(gateway.forwarder.metrics.render().decode())
        assert responses.total() == gateway._web.requests_count >= CALLERS - Disconnect.AT_ONCE.value
        assert responses[499] >= sum(disconnect.value for disconnect in ENDLESS)
        for status, count in Counter(caller.status for caller in served).items():
            assert responses[status] >= count
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing) in TYPES_OF_A_CALL] == []
    await until(lambda: len(asyncio.all_tasks()) == tasks and open_files() == fds)
