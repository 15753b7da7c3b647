"""A fleet and its plant, put together: in virtual time over a network in memory, or for real over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from typing import Final

import aiohttp
import httpx2
import msgspec

from bench.fleet.agents import run_fleet
from bench.fleet.cases import Case
from bench.fleet.network import Connector, NetworkedLoop
from bench.fleet.sdk import OverAiohttp
from bench.gateway import started
from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway
from forebay.simulation.provider.http_server import ProviderServer, start_server
from forebay.simulation.provider.provider_process import start_provider

WAYS: Final = ("direct", "gateway")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one way came to.

    Attributes:
        failed: agents that did not finish.
        seconds: until the last was done, or gave up.
        calls: that reached the provider.
        refused: of these, those that it answered with 429.
        overloaded: ... with 503 or 529.
        whys: what agents failed by.
    """

    failed: int
    seconds: float
    calls: int
    refused: int
    overloaded: int
    whys: dict[str, int]


def settings(name: str, url: str) -> GatewaySettings:
    """A gateway that is told where its provider is, and nothing else."""
    target = TargetSettings(name=name, url=url)
    return GatewaySettings(targets=(target,), listen="127.0.0.1:0", max_connections=1_000)


def virtually(case: Case, way: str) -> Measured:
    """Run a case in virtual time, with all of the gateway and of the SDKs but the sockets."""
    random.seed(case.seed)  # the SDKs' jitter
    with asyncio.Runner(loop_factory=lambda: NetworkedLoop(case.seed)) as runner:
        return runner.run(_virtually(case, way))


async def over_sockets(case: Case, way: str) -> Measured:
    """Run a case for real: the plant and the gateway in processes of their own, the SDKs with their own transport."""
    async with contextlib.AsyncExitStack() as stack:
        plant = await asyncio.to_thread(stack.enter_context, start_provider(case.config, seed=case.seed))
        url = plant.url
        if way == "gateway":
            starting = started("bench.fleet.gateway", case.dialect.value, plant.url)
            url = f"http://127.0.0.1:{(await asyncio.to_thread(stack.enter_context, starting))[1]}"
        await asyncio.to_thread(plant.reset)
        outcome = await run_fleet(case, url, lambda: None)
        statistics = await asyncio.to_thread(plant.statistics)
    return msgspec.convert(statistics, Counted).measured(outcome.failed, outcome.seconds, outcome.whys)


async def _virtually(case: Case, way: str) -> Measured:
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=Connector(), auto_decompress=False))
        runner, plant = await start_server(ProviderServer(case.config, seed=case.seed))
        stack.push_async_callback(runner.cleanup)
        url = plant
        if way == "gateway":
            gateway = await stack.enter_async_context(
                Gateway(settings(case.dialect.value, plant), {}, connector=Connector)
            )
            url = f"http://127.0.0.1:{gateway.port}"
        outcome = await run_fleet(case, url, lambda: httpx2.AsyncClient(transport=OverAiohttp(session), timeout=600.0))
        async with session.get(f"{plant}/simulation/statistics") as answer:
            counted = msgspec.json.decode(await answer.read(), type=Counted)
    return counted.measured(outcome.failed, outcome.seconds, outcome.whys)


class Counted(msgspec.Struct):
    """What the plant has counted."""

    calls: int
    by_status: dict[str, int]

    def measured(self, failed: int, seconds: float, whys: Counter[str]) -> Measured:
        """Together with what became of the agents."""
        overloaded = self.by_status.get("503", 0) + self.by_status.get("529", 0)
        return Measured(failed, seconds, self.calls, self.by_status.get("429", 0), overloaded, dict(whys))
