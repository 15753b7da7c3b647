"""AgentThread: a blocking agent in a thread, which stops with its run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

from forebay.adapters.agent_thread import AgentThread
from forebay.simulation.loop import Simulation

VARIABLE: ContextVar[str] = ContextVar("variable", default="unset")


async def test_a_value_and_an_exception_of_the_thread_are_those_of_the_run() -> None:
    def fail() -> None:
        raise ValueError("enough")

    assert await AgentThread().run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ValueError, match="enough"):
        await AgentThread().run(fail)


async def test_the_thread_and_what_it_awaits_have_the_context_of_the_run() -> None:
    thread = AgentThread()

    async def read() -> str:
        await asyncio.sleep(0)
        return VARIABLE.get()

    def agent() -> list[str]:
        seen = [VARIABLE.get(), thread.await_in_loop(read())]
        VARIABLE.set("the thread's")
        return [*seen, thread.await_in_loop(read())]

    VARIABLE.set("the run's")
    assert await thread.run(agent) == ["the run's", "the run's", "the thread's"]
    assert VARIABLE.get() == "the run's"


async def _cancelled(thread: AgentThread, agent: Callable[[], Any], entered: asyncio.Event, leave: Any) -> None:
    """Cancel a run once its thread has entered, and check that it lasts as long as the thread."""
    run = asyncio.create_task(thread.run(agent))
    await entered.wait()
    run.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not run.done()
    leave()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_a_cancelled_run_lasts_until_its_thread_has_stopped_at_the_next_check() -> None:
    loop, entered, leave = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    thread, steps = AgentThread(), []

    def agent() -> None:
        for step in ("first", "second"):
            thread.check_stop()
            steps.append(step)
            loop.call_soon_threadsafe(entered.set)
            leave.wait()

    await _cancelled(thread, agent, entered, leave.set)
    assert steps == ["first"]


@pytest.mark.parametrize("is_early", [True, False])
async def test_what_a_cancelled_run_awaits_in_the_loop_is_cancelled(*, is_early: bool) -> None:
    """Early: the cancellation comes before the thread awaits anything."""
    loop, entered, leave = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    thread, ended = AgentThread(), list[str]()

    async def call() -> None:
        if not is_early:
            entered.set()
        try:
            await loop.create_future()
        finally:
            ended.append("call")

    def agent() -> None:
        if is_early:
            loop.call_soon_threadsafe(entered.set)
            leave.wait()
        try:
            thread.await_in_loop(call())
        except asyncio.CancelledError:  # no Exception, so an agent does not go on after it
            ended.append("agent")
            raise

    run = asyncio.create_task(thread.run(agent))
    await entered.wait()
    run.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert "agent" in ended
    assert is_early or "call" in ended


def test_in_virtual_time_a_thread_cannot_wait_for_the_loop() -> None:
    async def call() -> None: ...

    async def main() -> None:
        thread = AgentThread()
        assert await thread.run(lambda: 7) == 7
        with pytest.raises(RuntimeError, match="give the agent a client that blocks"):
            await thread.run(lambda: thread.await_in_loop(call()))

    with Simulation() as simulation:
        simulation.run(main())


async def test_all_that_the_threads_of_a_run_await_is_cancelled() -> None:
    thread, begun, ended = AgentThread(), [asyncio.Event(), asyncio.Event()], list[int]()

    async def call(number: int) -> None:
        begun[number].set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    def agent(number: int) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            thread.await_in_loop(call(number))

    def agents() -> None:
        other = threading.Thread(target=agent, args=[0], daemon=True)
        other.start()
        agent(1)
        other.join(20)

    run = asyncio.create_task(thread.run(agents))
    for each in begun:
        await each.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize("fails", [True, False])
async def test_a_thread_that_a_run_has_left_behind_stops_at_its_next_call(*, fails: bool) -> None:
    thread, leave = AgentThread(), threading.Event()
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    calls = list[str]()

    async def call() -> None:
        calls.append("call")

    def behind() -> None:
        leave.wait(20)
        try:
            thread.check_stop()
            thread.await_in_loop(call())
        except BaseException as error:  # noqa: BLE001 - it is what is tested
            thread.loop.call_soon_threadsafe(ended.set_result, error)

    def agent() -> None:
        threading.Thread(target=behind).start()
        if fails:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough") if fails else contextlib.nullcontext():
        await thread.run(agent)
    leave.set()
    assert isinstance(await ended, asyncio.CancelledError)
    assert calls == []


async def test_a_thread_with_an_event_loop_of_its_own_can_wait_for_that_of_the_run() -> None:
    thread = AgentThread()

    async def call() -> int:
        return 7

    async def agent() -> int:
        value: int = thread.await_in_loop(call())
        return value

    assert await thread.run(lambda: asyncio.run(agent())) == 7


async def test_what_cleans_up_is_awaited_after_a_stop() -> None:
    thread, entered, closed = AgentThread(), asyncio.Event(), list[str]()

    async def call() -> None:
        entered.set()
        await asyncio.Event().wait()

    async def close() -> None:
        await asyncio.sleep(0)
        closed.append("closed")

    def agent() -> None:
        try:
            thread.await_in_loop(call())
        finally:
            thread.await_in_loop(close(), stops=False)

    run = asyncio.create_task(thread.run(agent))
    await entered.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert closed == ["closed"]
