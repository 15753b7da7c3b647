"""Metrics and readiness of a gateway with several workers: whichever answers, it answers for all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import disable_created_metrics
from prometheus_client.parser import text_string_to_metric_families
from tests.support.gateway_harness import GatewayHarness, gateway_harness
from tests.support.metric_conventions import problems

from forebay.gateway.server import Gateway
from forebay.gateway.workers import worker_group
from forebay.gateway.workers.worker_channel import WorkerChannel, socket_path

CALLS = "forebay_gateway_requests_total"
WORKERS = "forebay_gateway_workers"


@pytest.fixture(autouse=True)
def no_created_series() -> None:
    """Leave out what the program leaves out."""
    disable_created_metrics()  # type: ignore[no-untyped-call]


@pytest.fixture
async def harness() -> AsyncIterator[GatewayHarness]:
    async with gateway_harness() as made:
        yield made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def worker(harness: GatewayHarness, directory: Path, number: int, count: int = 2, **settings: Any) -> Gateway:
    """Return a worker of a gateway, in this process and on a port of its own."""
    return Gateway(harness.settings(**settings), channel=WorkerChannel(directory, number, count))


async def scrape(harness: GatewayHarness, gateway: Gateway) -> str:
    async with harness.session.get(harness.at(gateway, "/metrics")) as response:
        assert response.status == 200
        return await response.text()


async def value(harness: GatewayHarness, gateway: Gateway, name: str, **labels: str) -> float:
    """Return the sum of the samples of this name and these labels on the page that a worker gives."""
    families = text_string_to_metric_families(await scrape(harness, gateway))
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


async def readiness(harness: GatewayHarness, gateway: Gateway) -> tuple[int, dict[str, Any]]:
    async with harness.session.get(harness.at(gateway, "/readyz")) as response:
        return response.status, await response.json()


async def kill(gateway: Gateway) -> None:
    """End a worker's part among the others as kill -9 does: it notes nothing."""
    assert gateway._channel is not None
    assert gateway._workers is not None
    await gateway._workers.stop_keeping()
    await gateway._channel.close()
    gateway._workers = None


async def test_each_worker_shows_what_all_have_counted(harness: GatewayHarness, directory: Path) -> None:
    async with worker(harness, directory, 0) as one, worker(harness, directory, 1) as other:
        for gateway in (one, other, other):
            await harness.post(gateway)
        assert await value(harness, one, CALLS) == 3.0
        assert await value(harness, other, CALLS) == 3.0
        assert await value(harness, one, "forebay_gateway_request_duration_seconds_count") == 3.0
        assert await value(harness, one, "forebay_tokens_total", direction="output") == 60.0


async def test_the_page_of_all_workers_follows_the_conventions(harness: GatewayHarness, directory: Path) -> None:
    async with worker(harness, directory, 0) as one, worker(harness, directory, 1) as other:
        await harness.post(one)
        await harness.post(other)
        assert problems(await scrape(harness, one)) == []


async def test_counters_stay_while_a_worker_is_dead_and_go_on_when_it_is_replaced(
    harness: GatewayHarness, directory: Path
) -> None:
    async with worker(harness, directory, 0) as one:
        async with worker(harness, directory, 1) as other:
            await harness.post(one)
            await harness.post(other)
            assert await value(harness, one, CALLS) == 2.0
            await kill(other)
        assert await value(harness, one, CALLS) == 2.0
        assert await value(harness, one, WORKERS, state="silent") == 1.0
        async with worker(harness, directory, 1) as replaced:
            await harness.post(replaced)
            assert await value(harness, one, CALLS) == 3.0
            assert await value(harness, replaced, CALLS) == 3.0
            assert await value(harness, one, WORKERS, state="answered") == 2.0
            assert await value(harness, one, "forebay_gateway_worker_restarts_total") == 1.0


async def test_the_calls_since_the_last_scrape_of_a_worker_that_ends_orderly_are_counted(
    harness: GatewayHarness, directory: Path
) -> None:
    async with worker(harness, directory, 0) as one:
        async with worker(harness, directory, 1) as other:
            await harness.post(other)
        assert await value(harness, one, CALLS) == 1.0


async def test_a_worker_that_does_not_answer_is_left_out_and_its_counters_stay(
    harness: GatewayHarness, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(harness, directory, 0) as one:
        async with worker(harness, directory, 1) as other:
            await harness.post(other)
            assert await value(harness, one, CALLS) == 1.0
            await kill(other)
        hung = asyncio.Event()

        async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await hung.wait()
            writer.close()

        monkeypatch.setattr(worker_group, "_METRICS_TIMEOUT", 0.05)
        async with await asyncio.start_unix_server(accept, socket_path(directory, 1)):
            assert await value(harness, one, CALLS) == 1.0
            assert await value(harness, one, WORKERS, state="silent") == 1.0
            assert await value(harness, one, WORKERS, state="answered") == 1.0
            hung.set()


async def test_gauges_of_a_dead_worker_are_gone(harness: GatewayHarness, directory: Path) -> None:
    async with worker(harness, directory, 0) as one:
        async with worker(harness, directory, 1) as other:
            await harness.post(other)
            assert await value(harness, one, "forebay_accounts") == 1.0
            await kill(other)
        assert await value(harness, one, "forebay_accounts") == 0.0


async def test_a_gateway_is_ready_if_any_worker_takes_calls(harness: GatewayHarness, directory: Path) -> None:
    async with worker(harness, directory, 0) as one, worker(harness, directory, 1) as other:
        one.drain()
        for gateway in (one, other):
            assert await readiness(harness, gateway) == (
                200,
                {"status": "ready", "problems": [], "workers": {"ready": 1, "count": 2}},
            )
        other.drain()
        for gateway in (one, other):
            assert await readiness(harness, gateway) == (
                503,
                {"status": "unready", "problems": ["draining"], "workers": {"ready": 0, "count": 2}},
            )


async def test_a_problem_of_one_worker_is_reported_by_all(harness: GatewayHarness, directory: Path) -> None:
    async with worker(harness, directory, 0) as one, worker(harness, directory, 1) as other:
        other.forwarder.add_readiness_check(lambda: "no disk")
        for gateway in (one, other):
            status, page = await readiness(harness, gateway)
            assert (status, page["problems"]) == (503, ["no disk"])


async def test_scrapes_of_all_workers_at_once_are_answered(harness: GatewayHarness, directory: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(worker(harness, directory, each, 3)) for each in range(3)]
        await asyncio.gather(*(harness.post(each) for each in workers))
        shown = await asyncio.gather(*(value(harness, each, CALLS) for each in workers * 4))
        assert shown == [3.0] * 12
