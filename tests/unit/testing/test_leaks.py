"""What a block leaves behind is named."""

from __future__ import annotations

import asyncio
import threading

import pytest

from forebay import BackpressureSupervisor, Task
from forebay.testing import BrokenPromise, SlowHandler, no_leaks, virtual

pytestmark = pytest.mark.blocks  # it waits for threads


async def test_a_supervisor_leaves_nothing() -> None:
    async with no_leaks(), BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=SlowHandler(0.0), task_types=["work"])
        supervisor.register_worker("threaded", handler=lambda _: None, task_types=["block"])
        await supervisor.run(Task("work"))
        await supervisor.run(Task("block"))


@virtual
async def test_a_task_is_named_with_its_place() -> None:
    with pytest.raises(BrokenPromise, match=r"asyncio task 'forgotten', sleep at .*tasks\.py:\d+"):
        async with no_leaks():
            task = asyncio.create_task(asyncio.sleep(60.0), name="forgotten")
    task.cancel()


async def test_a_thread_is_named() -> None:
    go = threading.Event()
    with pytest.raises(BrokenPromise, match="thread 'forgotten'"):
        async with no_leaks(grace=0.01):
            threading.Thread(target=go.wait, name="forgotten").start()
    go.set()


@virtual
async def test_what_was_there_before_is_not_its_affair() -> None:
    task = asyncio.create_task(asyncio.sleep(60.0))
    async with no_leaks():
        pass
    task.cancel()


@virtual
async def test_an_error_of_the_block_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with no_leaks():
            raise KeyError
