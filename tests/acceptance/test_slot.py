"""A slot for the caller's own code."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, error_of, flood, now, run_ready, virtual

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Overloaded,
    Priority,
    Task,
    TaskCancelled,
    TaskExpired,
    TaskTimedOut,
    WorkerState,
)
from forebay.adapters import Handler


async def hold(supervisor: BackpressureSupervisor, seconds: float, **options: Any) -> str:
    async with supervisor.slot("work", **options) as slot:
        await asyncio.sleep(seconds)
        return slot.worker.name


@virtual
async def test_a_slot_is_held_while_its_block_runs() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=2)
        async with supervisor.slot("work") as slot:
            assert slot.worker is worker
            assert worker.current_tasks == 1
        assert worker.current_tasks == 0
        assert supervisor.statistics().succeeded == 1


@virtual
async def test_the_block_runs_in_the_callers_own_coroutine() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        me = asyncio.current_task()
        async with supervisor.slot("work"):
            assert asyncio.current_task() is me


@virtual
async def test_a_slot_waits_in_the_queue() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        flood(supervisor, "work", 3)
        async with supervisor.slot("work"):
            assert now() == approximately(3.0)


@virtual
async def test_a_slot_of_high_priority_goes_to_the_head_of_the_queue() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        flood(supervisor, "work", 3)
        async with supervisor.slot("work", priority=Priority.HIGH):
            assert now() == approximately(1.0)


@virtual
async def test_a_full_supervisor_rejects_a_slot_with_overloaded() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        await supervisor.run(Task("work"))
        flood(supervisor, "work", 1)
        with pytest.raises(Overloaded) as caught:
            async with supervisor.slot("work"):
                pytest.fail("it was admitted")
    assert caught.value.limited_by == "pool:work"
    assert caught.value.retry_after is not None


@virtual
async def test_a_slot_never_waits_in_the_overflow() -> None:
    async with BackpressureSupervisor(max_queue_size=0, overflow="memory://") as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        flood(supervisor, "work", 1)
        assert isinstance(await error_of(hold(supervisor, 1.0)), Overloaded)


@virtual
async def test_what_the_block_raises_comes_out_as_it_is_and_counts_as_a_failure() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        error = ValueError()
        for _ in range(5):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
                async with supervisor.slot("work"):
                    raise error
            assert caught.value is error
        assert worker.state is WorkerState.FAILED


@virtual
async def test_a_block_that_takes_too_long_ends_timed_out() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"], timeout=5.0)
        for options, seconds in (({}, 5.0), ({"timeout": 2.0}, 2.0)):
            started = now()
            error = await error_of(hold(supervisor, 60.0, **options))
            assert isinstance(error, TaskTimedOut)
            assert not isinstance(error, TaskExpired)
            assert now() - started == approximately(seconds)
        assert worker.current_tasks == 0
        assert supervisor.statistics().timed_out == 2


@virtual
async def test_a_deadline_ends_the_block_or_the_waiting() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        assert isinstance(await error_of(hold(supervisor, 60.0, deadline=Deadline.within(2.0))), TaskExpired)
        assert now() == approximately(2.0)
        flood(supervisor, "work", 1)
        assert isinstance(await error_of(hold(supervisor, 60.0, deadline=Deadline.within(3.0))), TaskExpired)
        assert now() == approximately(5.0)
        assert supervisor.statistics().waiting == 0


@virtual
async def test_a_caller_cancelled_while_waiting_leaves_the_queue() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        flood(supervisor, "work", 1)
        caller = asyncio.ensure_future(hold(supervisor, 1.0))
        await asyncio.sleep(1.0)
        assert supervisor.statistics().waiting == 1
        caller.cancel()
        assert isinstance(await error_of(caller), asyncio.CancelledError)
        assert supervisor.statistics().waiting == 0
        assert worker.current_tasks == 1


@virtual
async def test_a_caller_cancelled_inside_returns_the_slot_and_does_not_count_against_the_worker() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        for _ in range(6):
            caller = asyncio.ensure_future(hold(supervisor, 10.0))
            await asyncio.sleep(1.0)
            caller.cancel()
            assert isinstance(await error_of(caller), asyncio.CancelledError)
            assert worker.current_tasks == 0
        assert worker.state is WorkerState.IDLE


@virtual
async def test_a_caller_cancelled_in_the_loop_turn_that_granted_the_slot_returns_it() -> None:
    for when in range(12):
        async with BackpressureSupervisor() as supervisor:
            worker = supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
            (ticket,) = flood(supervisor, "work", 1)
            caller = asyncio.ensure_future(hold(supervisor, 1.0))
            await ticket
            await run_ready(when)
            caller.cancel()
            await asyncio.wait([caller])
            assert worker.current_tasks == 0
            assert supervisor.statistics().running == 0


@pytest.mark.parametrize("cancelled_too", [False, True])
@virtual
async def test_a_slot_that_is_granted_and_ended_in_one_turn_of_the_loop_says_so(*, cancelled_too: bool) -> None:
    agent = Agent(1.0)

    def end_the_slot(_: Task) -> None:  # in the turn that grants it
        supervisor.ticket(slot.task_id).cancel("it is not needed")
        if cancelled_too:
            waiting.cancel()

    async def enter() -> None:
        async with slot:
            pytest.fail("the block must not run")

    class Ending:
        def __forebay_handler__(self) -> Handler:
            return Handler(call=agent, on_end=end_the_slot)

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Ending(), task_types=["work"])
        supervisor.submit_nowait(Task("work"))
        slot = supervisor.slot("work")
        waiting = asyncio.ensure_future(enter())
        error = await error_of(waiting)
        assert worker.current_tasks == 0
        assert supervisor.statistics().cancelled == 1
    if cancelled_too:
        assert isinstance(error, asyncio.CancelledError)
    else:
        assert isinstance(error, TaskCancelled)
        assert "it is not needed" in str(error)


@virtual
async def test_closing_a_stream_early_returns_the_slot_and_does_not_count_against_the_worker() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])

        async def stream() -> AsyncIterator[int]:
            async with supervisor.slot("work"):
                for number in range(100):
                    yield number
                    await asyncio.sleep(0.1)

        for _ in range(6):
            async with contextlib.aclosing(stream()) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    if chunk == 3:
                        break
            assert worker.current_tasks == 0
        assert worker.state is WorkerState.IDLE
        assert supervisor.statistics().cancelled == 6


@virtual
async def test_a_block_that_the_supervisor_stops_ends_as_task_cancelled() -> None:
    supervisor = BackpressureSupervisor()
    await supervisor.start()
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    inside = asyncio.ensure_future(hold(supervisor, 60.0))
    waiting = asyncio.ensure_future(hold(supervisor, 60.0))
    await asyncio.sleep(1.0)
    await supervisor.close()
    for caller in (inside, waiting):
        assert isinstance(await error_of(caller), TaskCancelled)
        assert caller.cancelling() == 0


@virtual
async def test_draining_counts_a_slot_that_it_stopped_as_cancelled_and_not_as_an_orphan() -> None:
    supervisor = BackpressureSupervisor()
    await supervisor.start()
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    caller = asyncio.ensure_future(hold(supervisor, 60.0))
    await asyncio.sleep(1.0)
    report = await supervisor.drain(timeout=1.0)
    assert (report.finished, report.cancelled, report.orphans) == (0, 1, ())
    assert isinstance(await error_of(caller), TaskCancelled)
    await supervisor.close()


@virtual
async def test_draining_waits_for_a_slot() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        caller = asyncio.ensure_future(hold(supervisor, 60.0))
        await run_ready()
        report = await supervisor.drain()
        assert now() == approximately(60.0)
    assert report.finished == 1
    assert await caller == "worker"


@virtual
async def test_slots_within_slots_do_not_deadlock() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        async with supervisor.slot("work"), supervisor.slot("work"):
            assert await supervisor.run(Task("work", 7)) == 7
        assert worker.current_tasks == 0


@virtual
async def test_slots_of_one_thread_are_held_one_at_a_time() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=5)
        await asyncio.gather(*(hold(supervisor, 1.0, thread_id="alice") for _ in range(3)))
        assert now() == approximately(3.0)


@virtual
async def test_what_is_submitted_in_a_slot_inherits_its_deadline() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=2)
        async with supervisor.slot("work", deadline=Deadline.within(5.0)):
            inside = supervisor.submit_nowait(Task("work"))
        unrelated = supervisor.submit_nowait(Task("work"))
        assert inside.deadline is not None
        assert unrelated.deadline is None


@virtual
async def test_a_callers_own_timeout_inside_the_block_stays_its_own() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        with pytest.raises(TimeoutError) as caught:
            async with supervisor.slot("work"), asyncio.timeout(1.0):
                await asyncio.sleep(60.0)
        assert not isinstance(caught.value, TaskTimedOut)


@virtual
async def test_a_callers_own_timeout_around_the_slot_stays_its_own() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(1.0), supervisor.slot("work"):
                await asyncio.sleep(60.0)
        assert not isinstance(caught.value, TaskTimedOut)
        assert worker.current_tasks == 0
