"""The demand of an overflow, as an autoscaler without a supervisor reads it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from forebay import BackpressureSupervisor, Priority, Task
from forebay.errors import InvalidOverflowUrl, InvalidSetting
from forebay.events import Event, Scaled
from forebay.interfaces import Demand
from forebay.overflow import MemoryTaskStore
from forebay.supervisor.overflow_demand import OverflowDemand
from forebay.testing import HeldHandler


async def test_it_counts_what_waits_and_what_runs_whoever_runs_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db?fsync=no"
    async with BackpressureSupervisor(overflow=url, max_queue_size=0) as supervisor, OverflowDemand(url) as overflow:
        handler = HeldHandler()
        supervisor.register_worker("worker", handler=handler, task_types=["work", "other"], max_concurrent=2)
        supervisor.pause("work")
        supervisor.pause("other")
        for priority in (Priority.HIGH, Priority.LOW, Priority.LOW):
            await supervisor.submit(Task("work", priority=priority))
        await supervisor.submit(Task("other"))
        assert await overflow.demand(["work"]) == Demand(spilled=3, elsewhere=0)
        assert await overflow.demand(["work", "other"]) == Demand(spilled=4, elsewhere=0)
        assert await overflow.demand(["none"]) == Demand(spilled=0, elsewhere=0)
        supervisor.resume("work")
        while handler.running < 2:  # noqa: ASYNC110 - the test's timeout bounds it
            await asyncio.sleep(0.01)
        demand = await overflow.demand(["work"])
        assert (demand.spilled, demand.elsewhere) == (1, 2)
        assert (await overflow.demand(["other"])).elsewhere == 0
        handler.release()


async def test_events_are_passed_on(tmp_path: Path) -> None:
    events: list[Event] = []
    event = Scaled(at=1.0, target="t", before=1, after=2, asked=1.5)
    OverflowDemand(f"sqlite:///{tmp_path}/spill.db", on_event=events.append).emit(event)
    assert events == [event]
    OverflowDemand(f"sqlite:///{tmp_path}/spill.db").emit(event)


@pytest.mark.parametrize(
    ("overflow", "error"),
    [("memory://", InvalidSetting), (MemoryTaskStore(), InvalidSetting), ("nonsense", InvalidOverflowUrl)],
)
def test_an_overflow_that_others_do_not_use(overflow: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        OverflowDemand(overflow)
