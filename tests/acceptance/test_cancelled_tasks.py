"""A program that cancels every task of asyncio: what is inside still ends, and the supervisor goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.task_plane import Agent, run_ready, statuses, virtual

from forebay import BackpressureSupervisor, Task, TaskStatus, WorkerState
from forebay.adapters import Handler
from forebay.errors import StoreUnavailable

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


def cancel_everything(kept: asyncio.Task[Any] | None = None) -> None:
    kept = kept or asyncio.current_task()
    for task in asyncio.all_tasks():
        if task is not kept:
            task.cancel()


@pytest.mark.parametrize("seconds", [0.0, 1.0])
@pytest.mark.parametrize("steps", range(8))
@virtual
async def test_every_ticket_ends_and_stored_tasks_come_back(overflow: str, steps: int, seconds: float) -> None:
    supervisor = BackpressureSupervisor(overflow=overflow, max_queue_size=3)
    supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"], max_concurrent=2)
    async with supervisor:
        durable = overflow.startswith("sqlite")
        tickets = [await supervisor.submit(Task("work", number)) for number in range(12)]
        tickets += [await supervisor.submit(Task("work", thread_id="c", durable=durable)) for _ in range(3)]
        await asyncio.sleep(seconds)
        await run_ready(steps)
        cancel_everything()
        async with asyncio.timeout(100.0):
            ended = await statuses(tickets)
            assert set(ended) <= {TaskStatus.SUCCEEDED, TaskStatus.CANCELLED}
            assert ended.count(TaskStatus.SUCCEEDED) >= 8
            assert await supervisor.run(Task("work", "after")) == "after"
            await supervisor.drain()


@pytest.mark.parametrize("number", range(8))
@virtual
async def test_work_that_is_cancelled_before_its_first_step_gives_back_what_it_was_given(
    overflow: str, number: int
) -> None:
    test = asyncio.current_task()

    async def handler(task: Task) -> int:
        await asyncio.sleep(1.0)
        if task.payload == number:  # what follows its end is cancelled before it takes a step
            asyncio.get_running_loop().call_soon(cancel_everything, test)
        return 1

    supervisor = BackpressureSupervisor(overflow=overflow, max_queue_size=1)
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    async with supervisor:
        durable = overflow.startswith("sqlite")
        tickets = [await supervisor.submit(Task("work", each)) for each in range(6)]
        tickets += [await supervisor.submit(Task("work", each, thread_id="c", durable=durable)) for each in (6, 7, 8)]
        async with asyncio.timeout(100.0):
            assert set(await statuses(tickets)) <= {TaskStatus.SUCCEEDED, TaskStatus.CANCELLED}
            await supervisor.drain()
        assert supervisor.statistics().succeeded >= 7


@virtual
async def test_whoever_looks_for_a_task_gets_an_error_if_the_question_is_cancelled(overflow: str) -> None:
    async with BackpressureSupervisor(overflow=overflow) as supervisor:
        finding = asyncio.ensure_future(supervisor.find("unknown"))
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task(), finding}:
            task.cancel()
        with pytest.raises(StoreUnavailable, match="the search for the task was cancelled"):
            await finding


@virtual
async def test_a_start_that_is_cancelled_has_failed_and_is_tried_again() -> None:
    class Service:
        def __forebay_handler__(self) -> Handler:
            async def start() -> None: ...

            return Handler(call=Agent(), start=start)

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Service(), task_types=["work"])
        cancel_everything()
        await run_ready()
        assert worker.state is WorkerState.FAILED
        await asyncio.sleep(100.0)
        assert await supervisor.run(Task("work", "done")) == "done"
