"""The link of a process to the store of its ledgers: what it says of failures."""

from __future__ import annotations

import asyncio

import pytest

from forebay.errors import StoreUnavailable
from forebay.simulation import simulate
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
