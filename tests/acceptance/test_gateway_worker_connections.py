"""Connections of callers to a gateway with two workers, both in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from tests.support.gateway_harness import (
    GatewayHarness,
    connect,
    gateway_harness,
    read_to_end,
    request_bytes,
    until,
)
from tests.support.listening_workers import ListeningWorkers

from forebay.gateway.server import Gateway


@pytest.fixture
async def harness() -> AsyncIterator[GatewayHarness]:
    async with gateway_harness() as made:
        yield made


@contextlib.asynccontextmanager
async def two_workers(harness: GatewayHarness, **settings: Any) -> AsyncIterator[list[Gateway]]:
    with ListeningWorkers(2) as workers:
        async with contextlib.AsyncExitStack() as stack:
            gateways = [Gateway(harness.settings(**settings), listener=workers.listener(number)) for number in range(2)]
            for gateway in gateways:
                await stack.enter_async_context(gateway)
            yield gateways


def calls_of(gateway: Gateway) -> float:
    """Return how many calls a worker has had."""
    samples = gateway.forwarder.metrics.snapshot().families
    (family,) = (each for each in samples if each.name == "forebay_gateway_requests")
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


async def test_callers_who_keep_their_connections_are_served_by_both_workers_alike(harness: GatewayHarness) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        two_workers(harness, max_concurrent=64) as gateways,
        aiohttp.ClientSession(connector=connector) as many,
    ):
        waiting = asyncio.Event()

        async def hold(request: Any) -> Any:
            await waiting.wait()
            return await harness.provider.reply(request)

        harness.provider.behaviour = hold
        calls = [asyncio.create_task(many.post(harness.at(gateways[0]), json={"model": "m"})) for _ in range(64)]
        await until(lambda: len(harness.provider.requests) == 64)
        waiting.set()
        assert [(await call).status for call in calls] == [200] * 64
        assert min(calls_of(gateway) for gateway in gateways) >= 30


async def test_a_worker_that_drains_rejects_no_new_connection_while_the_other_accepts(harness: GatewayHarness) -> None:
    async with two_workers(harness) as gateways:
        gateways[0].drain()
        for _ in range(4):
            connection = aiohttp.TCPConnector(force_close=True)
            async with aiohttp.ClientSession(connector=connection) as caller:
                answer = await caller.post(harness.at(gateways[0]), json={"model": "m"})
                assert answer.status == 200
        assert [calls_of(gateway) for gateway in gateways] == [0, 4]


async def test_connections_that_come_at_once_are_not_more_than_a_worker_may_have(harness: GatewayHarness) -> None:
    async with two_workers(harness, gateway={"max_connections": 2}) as gateways:
        opened = [await connect(gateways[0]) for _ in range(6)]
        answers = [asyncio.create_task(read_to_end(reader)) for reader, _ in opened]
        await until(lambda: sum(answer.done() for answer in answers) == 2)
        for answer, (_, writer) in zip(answers, opened, strict=True):
            if not answer.done():
                writer.write(request_bytes(b'{"model": "m"}', b"connection: close"))
        heads = sorted([(await answer).partition(b"\r\n")[0] for answer in answers])
        assert heads == [b"HTTP/1.1 200 OK"] * 4 + [b"HTTP/1.1 503 Service Unavailable"] * 2
        for _, writer in opened:
            writer.close()
