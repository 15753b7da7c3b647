"""Open runs: those that wait for their nested tasks are bounded, and what they wait for goes first."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import Agent, flood, now, rejected, results, run_ready, statuses, submit_all, virtual

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task, TaskStatus
from forebay.errors import NestedTooDeep
from forebay.interfaces import WorkerState
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


class Fleet:
    """Agents with sub-tasks: each takes a second, awaits its children, and takes another second.

    Args:
        levels: how many levels of sub-tasks there are below an agent.
        children: how many sub-tasks each has, awaited at once.
        helpers: slots of a worker of their own for the sub-tasks; 0: they run where the agents do.
    """

    def __init__(
        self,
        overflow: str | None,
        *,
        slots: int = 4,
        levels: int = 1,
        children: int = 1,
        helpers: int = 0,
        **options: Any,
    ) -> None:
        self.levels, self.children = levels, children
        self.open = self.peak = 0
        self.supervisor = BackpressureSupervisor(overflow=overflow, **options)
        self.child_type = "child" if helpers else "agent"
        self.worker = self.supervisor.register_worker(
            "agents", handler=self, task_types=["agent"], max_concurrent=slots, timeout=60.0
        )
        if helpers:
            self.supervisor.register_worker(
                "helpers", handler=self, task_types=["child"], max_concurrent=helpers, timeout=60.0
            )

    async def __call__(self, task: Task) -> int:
        is_root = task.payload == self.levels
        self.open += is_root
        self.peak = max(self.peak, self.open)
        try:
            await asyncio.sleep(1.0)
            if not task.payload:
                return 1
            children = (self.supervisor.run(Task(self.child_type, task.payload - 1)) for _ in range(self.children))
            counts: list[int] = await asyncio.gather(*children)
            await asyncio.sleep(1.0)
            return 1 + sum(counts)
        finally:
            self.open -= is_root

    async def run(self, agents: int) -> Counter[str]:
        """Submit `agents` agents at once; return how many ended in each way."""
        async with self.supervisor:
            record = EventRecord(self.supervisor)
            tickets = await submit_all(self.supervisor, [Task("agent", self.levels) for _ in range(agents)])
            ended = Counter(status.name for status in await statuses(ticket for ticket in tickets if ticket))
            assert self.supervisor.statistics().suspended == 0
        check_supervisor(record, tickets=tickets, nested=True)
        return ended


# --- with a backlog --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"levels": 3},
        {"children": 3},
        {"helpers": 2},
        {"helpers": 40},
        {"levels": 2, "children": 2, "helpers": 3},
        {"slots": 1, "levels": 2},
    ],
    ids=str,
)
@virtual
async def test_agents_that_await_sub_tasks_all_succeed_whatever_waits_behind_them(
    any_overflow: str | None, shape: dict[str, int]
) -> None:
    fleet = Fleet(any_overflow, max_queue_size=None if any_overflow else 500, **shape)
    assert await fleet.run(200) == {"SUCCEEDED": 200}
    assert fleet.peak <= 2 * fleet.worker.max_concurrent


@virtual
async def test_four_hundred_agents_on_four_slots_take_as_long_as_with_a_semaphore(overflow: str) -> None:
    fleet = Fleet(overflow)
    assert await fleet.run(400) == {"SUCCEEDED": 400}
    assert now() < 1.02 * 400 * 3 / 4


@virtual
async def test_a_queue_full_of_new_work_rejects_no_sub_task() -> None:
    fleet = Fleet(None, max_queue_size=20)
    ended = await fleet.run(60)
    assert set(ended) == {"SUCCEEDED"}


@virtual
async def test_a_sub_task_is_not_stored_behind_work_that_has_not_begun(overflow: str) -> None:
    fleet = Fleet(overflow)
    async with fleet.supervisor:
        tickets = await submit_all(fleet.supervisor, [Task("agent", 1) for _ in range(200)])
        spilled = fleet.supervisor.statistics().spilled
        await results(tickets)
        assert fleet.supervisor.statistics().spilled == spilled


@virtual
async def test_a_thousand_sub_tasks_of_one_run_have_a_bound_and_come_back_before_new_work(overflow: str) -> None:
    order: list[str] = []

    async def handler(task: Task) -> Any:
        if task.payload == "parent":
            await asyncio.sleep(5.0)  # until all others are queued or stored
            return sum(await asyncio.gather(*(supervisor.run(Task("work", "child")) for _ in range(1000))))
        order.append(task.payload)
        await asyncio.sleep(0.1)
        return 1

    supervisor = BackpressureSupervisor(overflow=overflow)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=4)
    async with supervisor:
        parent = await supervisor.submit(Task("work", "parent"))
        roots = await submit_all(supervisor, [Task("work", "root") for _ in range(1200)])
        await asyncio.sleep(7.0 - now())
        assert supervisor.statistics().waiting <= 2 * 104
        assert supervisor.statistics().spilled > 2000
        assert (await parent).result == 1000
        begun = order[order.index("child") :].count("root")
        await results(roots)
    assert begun < 20  # those that began while the parent's children were on their way to the overflow


@virtual
async def test_ten_thousand_sub_tasks_of_one_run_are_rejected_beyond_their_room_without_an_overflow() -> None:
    async def handler(task: Task) -> Any:
        if task.payload == "parent":
            children = (supervisor.run(Task("work", "child")) for _ in range(10_000))
            ended = await asyncio.gather(*children, return_exceptions=True)
            return Counter(type(end) for end in ended)
        return await asyncio.sleep(1.0)

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=4)
    async with supervisor:
        counts = await supervisor.run(Task("work", "parent"))
        assert set(counts) == {type(None), Overloaded}
        assert 80 <= counts[type(None)] <= 104


# --- the bound -------------------------------------------------------------------------------------------------------


@virtual
async def test_no_new_run_begins_while_too_many_wait_for_their_sub_tasks() -> None:
    async def parent(_: Task) -> None:
        await supervisor.run(Task("child"))

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("parents", handler=parent, task_types=["parent"], max_concurrent=3)
    supervisor.register_worker("children", handler=Agent(10.0), task_types=["child"])
    async with supervisor:
        tickets = flood(supervisor, "parent", 30)
        await asyncio.sleep(5.0)
        statistics = supervisor.statistics()
        assert (statistics.workers[0].current_tasks, statistics.workers[0].suspended) == (0, 6)
        assert (statistics.suspended, statistics.running) == (6, 1)
        assert statistics.load == (6 + 24) / (3 + 6 + 100)  # the suspended ones, each in a place of its own
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 30


@virtual
async def test_max_open_bounds_the_runs_that_have_begun() -> None:
    open_runs = peak = 0

    async def parent(_: Task) -> None:
        nonlocal open_runs, peak
        open_runs += 1
        peak = max(peak, open_runs)
        await supervisor.run(Task("child"))
        open_runs -= 1

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("parents", handler=parent, task_types=["parent"], max_concurrent=2, max_open=9)
    supervisor.register_worker("children", handler=Agent(), task_types=["child"], max_concurrent=20)
    async with supervisor:
        await results(flood(supervisor, "parent", 40))
    assert peak == 9


@virtual
async def test_a_nested_task_starts_on_a_worker_that_begins_no_new_run() -> None:
    order: list[str] = []

    async def handler(task: Task) -> None:
        order.append(task.payload)
        if task.payload == "parent":
            await supervisor.run(Task("other", "wait"))
            await supervisor.run(Task("work", "nested", priority=Priority.LOW))
        else:
            await asyncio.sleep(1.0)

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=1, max_open=1)
    supervisor.register_worker("other", handler=handler, task_types=["other"])
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("work", "parent"))]
        await asyncio.sleep(0.5)
        tickets.append(supervisor.submit_nowait(Task("work", "new")))
        await results(tickets)
    assert order == ["parent", "wait", "nested", "new"]


@virtual
async def test_runs_that_wait_keep_no_better_work_from_beginning() -> None:
    async def parent(task: Task) -> None:
        if task.payload != "urgent":
            await supervisor.run(Task("child"))

    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("parents", handler=parent, task_types=["parent"])
    supervisor.register_worker("children", handler=Agent(10.0), task_types=["child"])
    async with supervisor:
        tickets = flood(supervisor, "parent", 4)
        await asyncio.sleep(1.0)
        assert worker.bars_new_runs(Priority.NORMAL)
        await supervisor.submit_nowait(Task("parent", "urgent", priority=Priority.HIGH))
        assert now() < 1.1
        await results(tickets)


@virtual
async def test_a_suspended_run_that_times_out_makes_room_for_the_next() -> None:
    async def parent(task: Task) -> None:
        started.append(task.payload)
        await supervisor.run(Task("child"))

    started: list[int] = []
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("parents", handler=parent, task_types=["parent"], timeout=5.0)
    supervisor.register_worker("children", handler=Agent(1000.0), task_types=["child"], max_concurrent=9)
    async with supervisor:
        tickets = flood(supervisor, "parent", 5)
        await asyncio.sleep(1.0)
        assert started == [0, 1]
        await results(tickets)
    assert started == [0, 1, 2, 3, 4]


@virtual
async def test_suspended_runs_that_ignore_their_cancellation_do_not_keep_others_from_beginning() -> None:
    async def parent(task: Task) -> None:
        started.append(task.payload)
        while not stop.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor.run(Task("child"))

    started: list[int] = []
    stop = asyncio.Event()
    supervisor = BackpressureSupervisor()
    supervisor.register_worker(
        "parents", handler=parent, task_types=["parent"], max_concurrent=5, max_open=5, timeout=5.0
    )
    supervisor.register_worker("children", handler=Agent(100.0), task_types=["child"], max_concurrent=90)
    async with supervisor:
        tickets = flood(supervisor, "parent", 7)
        await results(tickets[:5])
        await run_ready()
        assert started == list(range(7))
        await results(tickets)
        stop.set()


@virtual
async def test_nested_tasks_that_expire_when_their_turn_comes_leave_nothing_behind() -> None:
    async def parent(_: Task) -> None:
        nested = (supervisor.submit(Task("work", deadline=Deadline.within(9.5))) for _ in range(5))
        await asyncio.gather(*[await ticket for ticket in nested])

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("parents", handler=parent, task_types=["parent"])
    supervisor.register_worker("workers", handler=Agent(4.0), task_types=["work"])
    async with supervisor:
        record = EventRecord(supervisor)
        await results(flood(supervisor, "work", 8))  # the service time is known
        await results(flood(supervisor, "parent", 3))
    check_supervisor(record, nested=True)


@pytest.mark.parametrize("child_type", ["agent", "child"])
@virtual
async def test_a_flood_of_better_work_does_not_starve_sub_tasks_of_a_worker_that_begins_no_new_run(
    any_overflow: str | None, child_type: str
) -> None:
    async def handler(task: Task) -> None:
        if task.payload == "parent":
            await asyncio.sleep(1.0)
            await supervisor.run(Task(child_type, "child", priority=Priority.LOW))
        else:
            await asyncio.sleep(0.1)
            served.append(task.payload)

    async def keep_flooding() -> None:
        while True:
            supervisor.submit_nowait(Task("agent", "flood", priority=Priority.CRITICAL, spill=False))
            await asyncio.sleep(0.02)

    served: list[str] = []
    supervisor = BackpressureSupervisor(overflow=any_overflow)
    supervisor.register_worker("worker", handler=handler, task_types=["agent", "child"], max_concurrent=1, max_open=1)
    async with supervisor:
        parent = supervisor.submit_nowait(Task("agent", "parent", priority=Priority.LOW))
        await run_ready()
        flooding = asyncio.create_task(keep_flooding())
        await asyncio.wait([asyncio.ensure_future(parent.value())], timeout=10.0)
        flooding.cancel()
        assert parent.status is TaskStatus.SUCCEEDED
        assert served.index("child") <= 21


# --- what a bound must not do: deadlock ------------------------------------------------------------------------------


@virtual
async def test_runs_that_wait_for_work_that_has_not_begun_do_not_keep_it_from_beginning(
    any_overflow: str | None,
) -> None:
    async def handler(task: Task) -> str:
        if task.payload == "waits":
            await asyncio.sleep(5.0)
            await others[-1]
            await asyncio.gather(*others)
        return "done"

    others: list[Any] = []
    supervisor = BackpressureSupervisor(overflow=any_overflow)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2)
    async with supervisor:
        waiting = await submit_all(supervisor, [Task("work", "waits") for _ in range(40)])
        others += await submit_all(
            supervisor, [Task("work", "simple") for _ in range(40 if any_overflow is None else 200)]
        )
        assert not rejected([*waiting, *others])
        assert {result.result for result in await results([*waiting, *others])} == {"done"}


@virtual
async def test_runs_whose_grandchild_waits_for_work_that_has_not_begun_do_not_keep_it_from_beginning() -> None:
    async def handler(task: Task) -> Any:
        if task.payload == "root":
            return await supervisor.run(Task("work", "child"))
        if task.payload == "child":
            return await last[0]
        return None

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("work", "root")) for _ in range(10)]
        last = [supervisor.submit_nowait(Task("work", "last"))]
        assert await statuses([*tickets, *last]) == [TaskStatus.SUCCEEDED] * 11


@virtual
async def test_a_nested_task_behind_a_conversation_that_has_not_begun_does_not_deadlock(
    any_overflow: str | None,
) -> None:
    async def handler(task: Task) -> Any:
        if task.payload == "parent":
            return await supervisor.run(Task("work", "nested", thread_id="alice"))
        await asyncio.sleep(0.1)
        return None

    supervisor = BackpressureSupervisor(overflow=any_overflow)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2, timeout=1000.0)
    async with supervisor:
        tasks = [Task("work", "parent") for _ in range(20)]
        tasks += [Task("work", "message", thread_id="alice") for _ in range(20)]
        tasks += [Task("work", "parent") for _ in range(20)]
        tickets = await submit_all(supervisor, tasks)
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 60
        await run_ready()
        assert supervisor.statistics().suspended == 0


# --- a handler that runs itself --------------------------------------------------------------------------------------


def runaway(*, again: bool = False, many: int = 0) -> tuple[BackpressureSupervisor, list[int], asyncio.Event]:
    """Return a supervisor whose handler runs its own type and never waits for anything else.

    With it come the number of its starts, and an event that is set once they are `many`. It gives up after 5,000.
    """
    starts, reached = [0], asyncio.Event()

    async def handler(_: Task) -> None:
        starts[0] += 1
        if starts[0] == many:
            reached.set()
        while again and starts[0] < 5_000:
            with contextlib.suppress(NestedTooDeep):
                await supervisor.run(Task("work"))
        if starts[0] < 5_000:
            await supervisor.run(Task("work"))

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    return supervisor, starts, reached


@virtual
async def test_a_handler_that_runs_itself_without_end_is_stopped_by_an_error_that_says_so() -> None:
    supervisor, starts, _ = runaway()
    async with supervisor:
        with pytest.raises(NestedTooDeep, match=r"nested in 1000 runs.*its own task type") as caught:
            await supervisor.run(Task("work"))
        assert isinstance(caught.value, RecursionError)
        assert starts == [1001]
        await run_ready()
        statistics = supervisor.statistics()
        assert (statistics.suspended, statistics.running, statistics.failed) == (0, 0, 1001)
        assert statistics.workers[0].state is WorkerState.IDLE  # one bad task does not take the worker from the others


@pytest.mark.parametrize(("end", "many"), [("cancel", 5), ("cancel", 500), ("close", 500)])
@virtual
async def test_a_handler_that_runs_itself_and_tries_again_whatever_happens_can_be_stopped(end: str, many: int) -> None:
    supervisor, starts, reached = runaway(again=True, many=many)
    async with supervisor:
        running = asyncio.ensure_future(supervisor.run(Task("work")))
        await reached.wait()
        if end == "close":
            await supervisor.close()
        running.cancel()
        await asyncio.sleep(1.0)  # virtual time moves only once nobody has anything to do
        assert running.done()
        assert not supervisor.statistics().suspended
        assert starts[0] < 2_000
