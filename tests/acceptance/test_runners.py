"""One asyncio task may run many handlers, and no handler can tell."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task, TaskStatus
from forebay.simulation import simulate

Kept = Callable[[], Any]


def current() -> asyncio.Task[Any]:
    aio = asyncio.current_task()
    assert aio is not None
    return aio


async def one_by_one(handler: Callable[[Task], Awaitable[Any]], payloads: list[Any]) -> list[Any]:
    """Return the values of tasks that run one by one on a worker with one slot."""
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], timeout=10.0)
        tickets = [supervisor.submit_nowait(Task("work", payload)) for payload in payloads]
        return [(await ticket).result for ticket in tickets]


async def tasks_seen(use: Callable[[asyncio.Task[Any], int], object]) -> list[bool]:
    """Return for each of four handlers in a row whether it ran in the asyncio task of the one before it."""
    numbers: list[int] = []
    names: dict[str, None] = {}

    async def handler(task: Task) -> None:
        names[current().get_name()] = None
        numbers.append(list(names).index(current().get_name()))
        await asyncio.sleep(0.1)
        use(current(), task.payload)

    await one_by_one(handler, [0, 1, 2, 3])
    return [one == other for one, other in itertools.pairwise(numbers)]


@virtual
async def test_a_task_that_nobody_knows_of_is_used_again() -> None:
    assert await tasks_seen(lambda *_: None) == [True, True, True]


@virtual
async def test_a_task_that_somebody_still_refers_to_is_not_used_again() -> None:
    kept = []
    assert await tasks_seen(lambda aio, number: kept.append(aio) if number == 1 else None) == [True, False, True]
    assert kept[0].done()
    assert not kept[0].cancel()


@virtual
async def test_a_task_with_a_weak_reference_is_not_used_again() -> None:
    state: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
    assert await tasks_seen(lambda aio, number: state.update({aio: 1}) if number == 1 else None) == [True, False, True]
    assert not state


@virtual
async def test_a_task_with_a_callback_is_not_used_again_and_calls_it() -> None:
    called = []

    def use(aio: asyncio.Task[Any], number: int) -> None:
        if number == 1:
            aio.add_done_callback(lambda _: called.append(number))

    assert await tasks_seen(use) == [True, False, True]
    assert called == [1]


@virtual
async def test_a_cancellation_after_the_last_await_affects_no_other() -> None:
    assert await tasks_seen(lambda aio, number: aio.cancel() if number == 1 else None) == [True, False, True]


@virtual
async def test_a_handler_that_swallows_its_cancellation_leaves_none_for_the_next() -> None:
    async def handler(task: Task) -> int:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(5.0)
        before = current().cancelling()
        await asyncio.sleep(0.0)
        return int(before + 10 * task.payload)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        first, second = (supervisor.submit_nowait(Task("work", n, timeout=6.0 * n + 1.0)) for n in range(2))
        assert (await first).status is TaskStatus.TIMED_OUT
        assert (await second).result == 10


@virtual
async def test_a_run_that_a_program_cancels_before_its_first_step_ends() -> None:
    async def handler(_: Task) -> None:
        await asyncio.sleep(1.0)

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        ticket = supervisor.submit_nowait(Task("work"))
        for task in asyncio.all_tasks() - {current()}:
            task.cancel()
        async with asyncio.timeout(5.0):
            assert (await ticket).status is TaskStatus.CANCELLED
        assert worker.current_tasks == 0


@virtual
async def test_asyncios_own_tools_work_in_every_handler() -> None:
    async def handler(task: Task) -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.sleep(1.0)
        async with asyncio.TaskGroup() as group:
            child = group.create_task(asyncio.sleep(0.1, task.payload))
        with pytest.raises(ExceptionGroup):
            await fail_together()
        await asyncio.gather(asyncio.sleep(0.1), asyncio.shield(asyncio.sleep(0.1)))
        assert asyncio.current_task() in asyncio.all_tasks()
        return f"{child.result()} {current().cancelling()}"

    async def fail_together() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(1.0))
            group.create_task(fail())

    async def fail() -> None:
        await asyncio.sleep(0.1)
        raise ValueError

    values = await one_by_one(handler, [0, 1, 2])
    left = 1 if sys.version_info < (3, 12) else 0  # 3.11's TaskGroup leaves its cancellation behind
    assert values == [f"{n} {left}" for n in range(3)]


@pytest.mark.parametrize("wait", [0.0, 0.1, None])
@virtual
async def test_what_a_handler_sets_in_its_context_is_gone_for_the_next(wait: float | None) -> None:
    variable = ContextVar("variable", default=0)

    async def handler(task: Task) -> tuple[int, int, int]:
        before = variable.get()
        variable.set(task.payload)
        if wait is not None:
            await asyncio.sleep(wait)
        child = await asyncio.create_task(reading()) if wait is not None else task.payload
        return before, variable.get(), child

    async def reading() -> int:
        return variable.get()

    variable.set(7)
    assert await one_by_one(handler, [1, 2, 3]) == [(7, n, n) for n in (1, 2, 3)]
    assert variable.get() == 7


@virtual
async def test_the_next_handler_starts_after_submit_has_returned() -> None:
    started = []

    async def handler(task: Task) -> None:
        started.append(task.payload)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=3)
        for turn in range(3):
            tickets = [supervisor.submit_nowait(Task("work", n)) for n in range(2)]
            assert len(started) == 2 * turn
            for ticket in tickets:
                await ticket


@virtual
async def test_handlers_that_never_wait_let_the_loop_run_others() -> None:
    turns = 0

    async def handler(_: Task) -> int:
        return turns

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.create_task(others())
    values = await one_by_one(handler, [None] * 70)
    beside.cancel()
    assert values[-1] - values[0] >= 3


@virtual
async def test_a_task_cancelled_before_its_handler_started_never_starts() -> None:
    started = []

    async def handler(task: Task) -> None:
        started.append(task.payload)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        for warm in range(2):  # by a new runner, then by one that is idle
            ticket = supervisor.submit_nowait(Task("work", warm))
            ticket.cancel()
            assert (await ticket).status is TaskStatus.CANCELLED
            await supervisor.run(Task("work", "after"))
        assert supervisor.workers["worker"].current_tasks == 0
    assert started == ["after", "after"]


@virtual
async def test_no_runner_is_left_once_the_supervisor_has_closed() -> None:
    async def handler(_: Task) -> None:
        await asyncio.sleep(0.1)

    before = asyncio.all_tasks()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=5)
        await asyncio.gather(*(supervisor.run(Task("work")) for _ in range(9)))
        assert len(asyncio.all_tasks() - before) == 5  # idle, and kept
    assert asyncio.all_tasks() == before


def test_a_loop_that_ends_in_the_middle_ends_every_ticket() -> None:
    async def handler(_: Task) -> None:
        await asyncio.sleep(100.0)

    async def main() -> tuple[Any, ...]:
        supervisor = BackpressureSupervisor()
        await supervisor.start()
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2)
        tickets = tuple(supervisor.submit_nowait(Task("work")) for _ in range(2))
        await asyncio.sleep(1.0)
        return tickets  # and the loop cancels all that is left

    assert [ticket.status for ticket in simulate(main, seed=1)] == [TaskStatus.CANCELLED] * 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
def test_with_eager_tasks_a_handler_still_starts_after_submit_has_returned() -> None:
    started = []

    async def handler(task: Task) -> None:
        started.append(task.payload)
        await asyncio.sleep(0)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("worker", handler=handler, task_types=["work"])
            tickets = [supervisor.submit_nowait(Task("work", n)) for n in range(3)]
            assert started == []
            for ticket in tickets:
                await ticket
        assert started == [0, 1, 2]

    asyncio.run(main())
