"""Timed rights to stored work: kept while their holder lives, whatever its handlers do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from forebay import BackpressureSupervisor, Task
from forebay.overflow import SqliteLedger
from forebay.typing import Row

pytestmark = pytest.mark.blocks

LEASE = 0.3  # seconds


class Watched(SqliteLedger):
    """Tells when it was looked through for lapsed leases that often, which a house does three times in each lease."""

    def __init__(self, path: Path, *, times: int) -> None:
        super().__init__(path)
        self.times = times
        self.looked = asyncio.Event()

    async def reap(self, *, now: float, max_attempts: int) -> Sequence[Row]:
        dead = await super().reap(now=now, max_attempts=max_attempts)
        self.times -= 1
        if not self.times:
            self.looked.set()
        return dead


async def test_a_handler_that_blocks_the_loop_past_its_lease_keeps_it(tmp_path: Path) -> None:
    """In real time: the heartbeat is a thread, and the other house runs in a loop of its own, as in another process."""
    file = tmp_path / "spill.db"
    runs: list[str] = []
    began, let_go = threading.Event(), threading.Event()

    async def blocks(_: Task) -> str:
        runs.append("blocks")
        began.set()
        assert let_go.wait(30.0)  # the loop stands still
        return "whole"

    async def steals(_: Task) -> None:
        runs.append("steals")

    async def other_house() -> None:
        ledger = Watched(file, times=10)
        async with BackpressureSupervisor(overflow=ledger, lease=LEASE) as second:
            second.register_worker("w", handler=steals, task_types=["work"])
            await ledger.looked.wait()

    def meanwhile() -> None:
        began.wait(30.0)
        asyncio.run(other_house())
        let_go.set()

    thread = threading.Thread(target=meanwhile)
    thread.start()
    async with BackpressureSupervisor(overflow=f"sqlite:///{file}", lease=LEASE, lag_bound=None) as first:
        first.register_worker("w", handler=blocks, task_types=["work"])
        result = await (await first.submit(Task("work", durable=True)))
    thread.join()
    assert (result.result, result.attempts) == ("whole", 1)
    assert runs == ["blocks"]
