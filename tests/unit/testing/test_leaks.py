"""Tasks and threads that a block leaves behind are named."""

from __future__ import annotations

import asyncio
import threading

import pytest

from forebay import BackpressureSupervisor, Task
from forebay._threads import DaemonThreadExecutor
from forebay.testing import LeakFound, SlowHandler, no_leaks, virtual

pytestmark = pytest.mark.blocks  # it waits for threads


async def test_a_supervisor_leaves_no_tasks_and_threads() -> None:
    async with no_leaks(), BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=SlowHandler(0.0), task_types=["work"])
        supervisor.register_worker("threaded", handler=lambda _: None, task_types=["block"])
        await supervisor.run(Task("work"))
        await supervisor.run(Task("block"))


@virtual
async def test_a_leaked_task_is_named_with_its_position() -> None:
    with pytest.raises(LeakFound, match=r"asyncio task 'forgotten', sleep at .*tasks\.py:\d+"):
        async with no_leaks():
            task = asyncio.create_task(asyncio.sleep(60.0), name="forgotten")
    task.cancel()


async def test_a_leaked_thread_is_named() -> None:
    go = threading.Event()
    with pytest.raises(LeakFound, match="thread 'forgotten'"):
        async with no_leaks(grace=0.01):
            threading.Thread(target=go.wait, name="forgotten").start()
    go.set()


@virtual
async def test_a_thread_of_forebay_that_waits_for_a_job_is_no_leak_and_one_that_runs_it_is() -> None:
    executor = DaemonThreadExecutor("forebay-tool")
    started, leave = threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        leave.wait(10)

    def submit_both() -> None:
        executor.submit(job)
        executor.submit(job)
        started.wait(10)

    async with no_leaks():
        executor.submit(int).result(10)
    with pytest.raises(LeakFound, match="forebay-tool-"):
        async with no_leaks(grace=0):
            submit_both()
    leave.set()
    executor.shutdown()


async def test_tasks_and_threads_from_before_the_block_are_ignored() -> None:
    task = asyncio.create_task(asyncio.sleep(60.0))
    async with no_leaks():
        pass
    task.cancel()


@virtual
async def test_an_exception_of_the_block_is_raised_unchanged() -> None:
    with pytest.raises(KeyError):
        async with no_leaks():
            raise KeyError
