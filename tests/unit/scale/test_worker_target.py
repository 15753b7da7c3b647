"""A worker as a target: what it may be asked for, and whose worker it must be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forebay import BackpressureSupervisor, Task
from forebay.errors import InvalidSetting
from forebay.scale import Autoscaler, WorkerTarget
from forebay.testing import SlowHandler, virtual


def worker_of(supervisor: BackpressureSupervisor, *task_types: str, **settings: Any) -> Any:
    name = "-".join(task_types)
    return supervisor.register_worker(name, handler=SlowHandler(1.0), task_types=task_types, **settings)


@virtual
async def test_a_worker_keeps_a_slot_beside_those_that_it_reserves() -> None:
    async with BackpressureSupervisor(max_queue_size=5000) as supervisor:
        worker = worker_of(supervisor, "work", max_concurrent=5, reserve=3)
        async with Autoscaler(supervisor, WorkerTarget(worker), task_types=["work"], maximum=50) as scaler:
            await asyncio.sleep(1000.0)
            assert (worker.max_concurrent, scaler.statistics().failures) == (4, 0)
            assert scaler.statistics().scaled_down == 1
            tickets = [supervisor.submit_nowait(Task("work", number)) for number in range(1000)]
            await asyncio.sleep(6.0)
            assert worker.max_concurrent > 10
            for ticket in tickets:
                ticket.cancel()


async def test_it_may_not_be_asked_for_no_more_than_it_reserves() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = worker_of(supervisor, "work", max_concurrent=5, reserve=3)
        await WorkerTarget(worker).scale(1)
        assert worker.max_concurrent == 4
        with pytest.raises(InvalidSetting, match="at least one more than worker:work reserves, 4"):
            Autoscaler(supervisor, WorkerTarget(worker), task_types=["work"], maximum=3)


@pytest.mark.parametrize("worker", ["work", None, object(), WorkerTarget])
def test_what_is_no_worker(worker: Any) -> None:
    with pytest.raises(InvalidSetting, match="what register_worker returned"):
        WorkerTarget(worker)


async def test_a_worker_that_does_not_take_the_tasks() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker_of(supervisor, "work")
        other, both = worker_of(supervisor, "other"), worker_of(supervisor, "work", "play")
        for worker, task_types in ((other, ["work"]), (both, ["work", "other"])):
            with pytest.raises(InvalidSetting, match=f"takes tasks of every type, '{task_types[-1]}' too"):
                Autoscaler(supervisor, WorkerTarget(worker), task_types=task_types, maximum=4)
        Autoscaler(supervisor, WorkerTarget(both), task_types=["work"], maximum=4)


async def test_a_worker_of_another_supervisor() -> None:
    async with BackpressureSupervisor() as supervisor, BackpressureSupervisor() as other:
        worker_of(supervisor, "work")
        worker = worker_of(other, "work")
        with pytest.raises(InvalidSetting, match="registered with the same supervisor"):
            Autoscaler(supervisor, WorkerTarget(worker), task_types=["work"], maximum=4)


@virtual
async def test_a_worker_that_has_left_its_supervisor(caplog: pytest.LogCaptureFixture) -> None:
    async with BackpressureSupervisor(max_queue_size=5000) as supervisor:
        worker_of(supervisor, "work", "play", max_concurrent=2)
        worker = worker_of(supervisor, "work", max_concurrent=2)
        scaler = Autoscaler(supervisor, WorkerTarget(worker), task_types=["work"], maximum=50)
        async with scaler:
            await supervisor.unregister_worker("work")
            tickets = [supervisor.submit_nowait(Task("work", number)) for number in range(1000)]
            await asyncio.sleep(10.0)
            assert worker.max_concurrent == 2
            assert scaler.statistics().failures > 0
            for ticket in tickets:
                ticket.cancel()
        assert "has not left it" in caplog.text
        with pytest.raises(InvalidSetting, match="has not left it"):
            await scaler.__aenter__()
