"""ToolThreads: the threads of the plain tools of one run."""

from __future__ import annotations

import asyncio
import threading

import pytest

from forebay.adapters.tool_threads import ToolThreads


async def test_waiting_lasts_until_every_tool_has_returned() -> None:
    threads, loop = ToolThreads(), asyncio.get_running_loop()
    leave = [threading.Event(), threading.Event()]
    left: list[int] = []

    def tool(number: int) -> None:
        assert leave[number].wait(20)
        left.append(number)

    tools = [loop.run_in_executor(threads, tool, number) for number in range(2)]
    waiting = asyncio.create_task(threads.wait())
    for number in (1, 0):
        await asyncio.sleep(0)
        assert not waiting.done()
        leave[number].set()
        await tools[number]
    await waiting
    assert left == [1, 0]


async def test_waiting_lasts_until_a_tool_has_returned_whose_caller_was_cancelled() -> None:
    threads, loop = ToolThreads(), asyncio.get_running_loop()
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def tool() -> None:
        entered.set()
        assert leave.wait(20)
        left.set()
        raise RuntimeError  # which nobody waits for

    called = loop.run_in_executor(threads, tool)
    await loop.run_in_executor(None, entered.wait, 20)
    called.cancel()
    with pytest.raises(asyncio.CancelledError):
        await called
    waiting = asyncio.create_task(threads.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    leave.set()
    await waiting
    assert left.is_set()


async def test_waiting_ends_at_once_if_no_tool_runs() -> None:
    threads = ToolThreads()
    assert await asyncio.get_running_loop().run_in_executor(threads, len, "four") == 4
    await threads.wait()
    await ToolThreads().wait()
