"""Runs of a fleet against its provider: in virtual time over a network in memory, or in real time over sockets."""

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
from bench.fleet.cases import FleetCase
from bench.fleet.network import Connector, NetworkedLoop
from bench.fleet.sdk import AiohttpTransport
from bench.gateway import started
from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway
from forebay.simulation.provider.http_server import ProviderServer, start_server
from forebay.simulation.provider.provider_process import start_provider

WAYS: Final = ("direct", "gateway")


@dataclass(frozen=True, slots=True)
class WayResult:
    """The result of one way: direct, or through the gateway.

    Attributes:
        failed: agents that did not finish.
        seconds: until the last agent finished or failed.
        calls: calls that reached the provider.
        refused: calls that it answered with 429.
        overloaded: calls that it answered with 503 or 529.
        reasons: the errors of the agents that failed.
    """

    failed: int
    seconds: float
    calls: int
    refused: int
    overloaded: int
    reasons: dict[str, int]


def settings(name: str, url: str) -> GatewaySettings:
    """Return the settings of a gateway that knows only the address of its provider."""
    target = TargetSettings(name=name, url=url)
    return GatewaySettings(targets=(target,), listen="127.0.0.1:0", max_connections=1_000)


def virtually(case: FleetCase, way: str) -> WayResult:
    """Run a case in virtual time, with the whole code of the gateway and the SDKs except the sockets."""
    random.seed(case.seed)  # the jitter of the SDKs
    with asyncio.Runner(loop_factory=lambda: NetworkedLoop(case.seed)) as runner:
        return runner.run(_virtually(case, way))


async def over_sockets(case: FleetCase, way: str) -> WayResult:
    """Run a case over sockets: the provider and the gateway in their own processes, the SDKs with their transport."""
    async with contextlib.AsyncExitStack() as stack:
        provider = await asyncio.to_thread(stack.enter_context, start_provider(case.config, seed=case.seed))
        url = provider.url
        if way == "gateway":
            starting = started("bench.fleet.gateway", case.dialect.value, provider.url)
            url = f"http://127.0.0.1:{(await asyncio.to_thread(stack.enter_context, starting))[1]}"
        await asyncio.to_thread(provider.reset)
        result = await run_fleet(case, url, lambda: None)
        statistics = await asyncio.to_thread(provider.statistics)
    return msgspec.convert(statistics, ProviderCounts).measured(result.failed, result.seconds, result.reasons)


async def _virtually(case: FleetCase, way: str) -> WayResult:
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=Connector(), auto_decompress=False))
        runner, provider_url = await start_server(ProviderServer(case.config, seed=case.seed))
        stack.push_async_callback(runner.cleanup)
        url = provider_url
        if way == "gateway":
            gateway = await stack.enter_async_context(
                Gateway(settings(case.dialect.value, provider_url), {}, connector=Connector)
            )
            url = f"http://127.0.0.1:{gateway.port}"
        result = await run_fleet(
            case, url, lambda: httpx2.AsyncClient(transport=AiohttpTransport(session), timeout=600.0)
        )
        async with session.get(f"{provider_url}/simulation/statistics") as answer:
            counts = msgspec.json.decode(await answer.read(), type=ProviderCounts)
    return counts.measured(result.failed, result.seconds, result.reasons)


class ProviderCounts(msgspec.Struct):
    """The counts of the simulated provider."""

    calls: int
    by_status: dict[str, int]

    def measured(self, failed: int, seconds: float, reasons: Counter[str]) -> WayResult:
        """Return the counts together with the result of the agents."""
        overloaded = self.by_status.get("503", 0) + self.by_status.get("529", 0)
        return WayResult(failed, seconds, self.calls, self.by_status.get("429", 0), overloaded, dict(reasons))
