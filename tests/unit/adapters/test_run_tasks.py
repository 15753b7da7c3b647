"""RunTasks: what one run of an agent has begun in the event loop. This module stands for a framework."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import CORO_SUSPENDED, getcoroutinestate
from typing import Any

import pytest

from forebay.adapters.run_tasks import RunTasks, run_threads
from forebay.simulation import simulate

MODULES = (__name__,)
to_thread = asyncio.to_thread  # noqa: TID251 - what frameworks call


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    opened = threading.Event()
    yield opened
    opened.set()


async def exits() -> None:
    await asyncio.sleep(0)
    raise SystemExit(2)


async def exits_when_cancelled() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        raise SystemExit(2)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# --- exits -----------------------------------------------------------------------------------------------------------


async def test_a_task_that_exits_fails_instead_of_ending_the_loop() -> None:
    async with RunTasks(MODULES):
        with pytest.raises(RuntimeError, match=r"raised SystemExit\(2\)") as failed:
            await asyncio.create_task(exits())
    assert isinstance(failed.value.__cause__, SystemExit)


async def test_a_task_that_exits_when_it_is_cancelled_fails() -> None:
    async with RunTasks(MODULES):
        task = asyncio.create_task(exits_when_cancelled())
        await turns()
        task.cancel()
        with pytest.raises(RuntimeError, match="SystemExit"):
            await task


async def test_a_task_of_a_task_and_one_that_is_left_after_the_run_are_contained_too() -> None:
    async def begins() -> Any:
        return asyncio.create_task(waits_and_exits())

    async def waits_and_exits() -> None:
        await go_on.wait()
        raise SystemExit(2)

    go_on = asyncio.Event()
    async with RunTasks(()):
        task = await asyncio.create_task(begins())
    go_on.set()
    with pytest.raises(RuntimeError, match="SystemExit"):
        await task


async def test_a_plain_function_that_exits_fails() -> None:
    def leave() -> None:
        raise SystemExit(2)

    async with RunTasks(MODULES):
        with pytest.raises(RuntimeError, match=r"raised SystemExit\(2\)"):
            await to_thread(leave)


def test_a_ctrl_c_in_a_task_of_a_run_ends_the_loop() -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with RunTasks(MODULES):
            await asyncio.create_task(interrupted())

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


# --- the end of a run ------------------------------------------------------------------------------------------------


async def _begin(body: Callable[[], Any]) -> asyncio.Task[Any]:
    """Return a run that has begun."""

    async def run() -> Any:
        async with RunTasks(MODULES):
            return await body()

    task = asyncio.create_task(run())
    await turns()
    return task


async def test_a_failed_run_cancels_its_tasks_and_lasts_until_they_have_cleaned_up() -> None:
    cleaned, cleans = asyncio.Event(), []

    async def tool() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await cleaned.wait()
            cleans.append(1)

    async def body() -> None:
        tasks.append(asyncio.create_task(tool()))
        await asyncio.sleep(0)
        raise ValueError

    tasks: list[Any] = []
    run = await _begin(body)
    lasts = not run.done()
    cleaned.set()
    assert lasts
    with pytest.raises(ValueError):  # noqa: PT011 - it has no message
        await run
    assert cleans == [1]


async def test_a_task_that_its_framework_has_cancelled_cleans_up_undisturbed() -> None:
    cleaned, disturbed = asyncio.Event(), []

    async def tool() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await cleaned.wait()
            except asyncio.CancelledError:
                disturbed.append(1)

    async def body() -> None:
        task = asyncio.create_task(tool())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await turns()
            raise

    run = await _begin(body)
    run.cancel()
    await turns()
    lasts = not run.done()
    cleaned.set()
    assert lasts
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not disturbed


async def test_a_failed_task_of_a_failed_run_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def tool() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise LookupError

    async def body() -> None:
        tool_task = asyncio.create_task(tool())
        await asyncio.sleep(0)
        assert not tool_task.done()
        raise ValueError

    run = await _begin(body)
    with pytest.raises(ValueError):  # noqa: PT011
        await run
    del run
    assert not caplog.records


async def test_what_belongs_to_no_framework_goes_on_after_a_failed_run() -> None:
    async def run() -> None:
        async with RunTasks(("another_framework",)):
            left.append(asyncio.create_task(asyncio.Event().wait()))
            raise ValueError

    left: list[asyncio.Task[Any]] = []
    with pytest.raises(ValueError):  # noqa: PT011
        await run()
    await turns()
    assert not left[0].done()
    left[0].cancel()


@pytest.mark.parametrize("fails", [True, False])
async def test_a_failed_run_lasts_until_its_plain_functions_have_returned_and_a_result_does_not_wait(
    gate: threading.Event, *, fails: bool
) -> None:
    entered, returned = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def slow() -> None:
        loop.call_soon_threadsafe(entered.set)
        assert gate.wait(20)
        returned.append(1)

    async def body() -> str:
        task = asyncio.create_task(to_thread(slow))
        await entered.wait()
        task.cancel()  # as a framework does whose tool has a timeout, or one whose other tool has failed
        if fails:
            raise ValueError
        return "value"

    run = await _begin(body)
    await entered.wait()
    await turns()
    assert run.done() is not fails
    gate.set()
    if fails:
        with pytest.raises(ValueError):  # noqa: PT011
            await run
        assert returned == [1]
    else:
        assert await run == "value"


# --- the default executor --------------------------------------------------------------------------------------------


async def test_plain_functions_that_hang_leave_the_executor_of_the_loop_free(gate: threading.Event) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))

    async def body() -> None:
        await asyncio.gather(*(to_thread(gate.wait, 20) for _ in range(5)))

    run = await _begin(body)
    assert await loop.run_in_executor(None, len, "four") == 4
    assert not run.done()
    gate.set()
    await run


async def test_most_threads_of_a_run_are_its_own_and_more_are_those_of_the_loop(gate: threading.Event) -> None:
    names: list[str] = []

    def wait() -> None:
        names.append(threading.current_thread().name)
        assert gate.wait(20)

    async def body() -> None:
        await asyncio.gather(*(to_thread(wait) for _ in range(33)))

    run = await _begin(body)
    gate.set()
    await run
    assert sum(name.startswith("forebay-tool") for name in names) == 32
    assert sum(name.startswith("asyncio") for name in names) == 1


async def test_jobs_of_the_loop_itself_run_in_the_executor_that_it_had() -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="own"))

    def name() -> str:
        return threading.current_thread().name

    async with RunTasks(MODULES):
        assert (await to_thread(name)).startswith("forebay-tool")
        assert (await loop.run_in_executor(None, name)).startswith("own")
    assert (await to_thread(name)).startswith("own")


async def test_the_threads_of_a_run_are_found_in_it() -> None:
    async with RunTasks(MODULES) as run:
        assert run_threads() is run.threads
    assert run_threads() is not run.threads


# --- the task factory ------------------------------------------------------------------------------------------------


async def test_the_task_factory_that_the_loop_had_makes_the_tasks() -> None:
    made: list[Any] = []

    def factory(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)
    async with RunTasks(MODULES):
        pass
    async with RunTasks(MODULES):
        await asyncio.create_task(turns(), name="one")
    await asyncio.create_task(turns(), name="two")
    assert len(made) == 2


async def test_a_task_of_a_run_shows_its_coroutine() -> None:
    async with RunTasks(MODULES):
        task = asyncio.create_task(turns())
        await asyncio.sleep(0)
        coroutine: Any = task.get_coro()
        assert coroutine.__qualname__ == "turns"
        assert getcoroutinestate(coroutine) == CORO_SUSPENDED
        assert "turns" in repr(task)
        await task


async def test_a_task_that_is_cancelled_before_it_starts_is_closed() -> None:
    async with RunTasks(MODULES):
        task = asyncio.create_task(turns())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_loop_in_virtual_time_keeps_tasks_of_its_own_kind() -> None:
    async def main() -> None:
        async with RunTasks(MODULES):
            await asyncio.create_task(turns())
        assert asyncio.get_running_loop().get_task_factory() is None

    simulate(main())
