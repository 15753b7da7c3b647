"""The link of a process to the store of its ledgers: what it says of failures."""

from __future__ import annotations

import asyncio

import pytest

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.simulation import simulate
from forebay.simulation.loop import virtual_loop
from forebay.upstream.shared.leases.link import LedgerLink
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore


def test_a_store_that_fails_for_a_second_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        link = LedgerLink(MemoryLedgerStore(), "llm")
        for _ in range(4):
            link.fail([], StoreUnavailable(where="redis://a", why="it is away", advice="Start it."))
            await asyncio.sleep(0.6)

    simulate(main, seed=1)
    (record,) = caplog.records
    assert "Start it. Processes" in record.getMessage()


def test_a_failure_is_as_long_ago_as_it_is_with_the_time_of_a_suspension() -> None:
    async def main() -> None:
        link = LedgerLink(MemoryLedgerStore(), "llm")
        link.fail([], StoreUnavailable(where="redis://a", why="it is away", advice="Start it."))
        began = clock.now()
        virtual_loop().suspend(60.0)
        assert began - link.failing_since() == 60.0

    simulate(main, seed=1)
