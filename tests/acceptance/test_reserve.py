"""Reserved slots: the last free ones of a worker, kept for CRITICAL and HIGH tasks."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest
from tests.support.task_plane import flood, now, rejected, results, statuses, virtual

from forebay import BackpressureSupervisor, Overloaded, Priority, Retry, Task, TaskStatus, clock
from forebay.errors import InvalidSetting

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


class Slots:
    """A handler that takes its seconds, or those of its payload, and counts what runs at a time by priority."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.running: Counter[Priority] = Counter()
        self.most_low = 0  # of NORMAL and LOW tasks

    async def __call__(self, task: Task) -> None:
        self.running[task.priority] += 1
        self.most_low = max(self.most_low, self.running[Priority.NORMAL] + self.running[Priority.LOW])
        await asyncio.sleep(task.payload if isinstance(task.payload, float) else self.seconds)
        self.running[task.priority] -= 1


async def test_a_reserve_is_checked_against_the_slots() -> None:
    supervisor = BackpressureSupervisor()
    for reserve in (-1, 3, 1.5, None, True):
        with pytest.raises(InvalidSetting, match="reserve"):
            supervisor.register_worker(
                "worker",
                handler=Slots(),
                task_types=["work"],
                max_concurrent=2,
                reserve=reserve,  # type: ignore[arg-type]
            )
    assert not supervisor.workers


@virtual
async def test_normal_tasks_leave_the_last_slots_free() -> None:
    supervisor, handler = BackpressureSupervisor(), Slots()
    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=5, reserve=2)
    async with supervisor:
        tickets = flood(supervisor, "work", 30) + flood(supervisor, "work", 10, priority=Priority.LOW)
        for _ in range(20):
            await asyncio.sleep(0.5)
            assert worker.current_tasks <= 3
        await results(tickets)
    assert handler.most_low == 3


@virtual
@pytest.mark.parametrize("priority", [Priority.CRITICAL, Priority.HIGH])
async def test_a_better_task_starts_at_once_on_a_reserved_slot(priority: Priority) -> None:
    supervisor, handler = BackpressureSupervisor(max_queue_size=0), Slots()
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=5, reserve=1)
    async with supervisor:
        normal = flood(supervisor, "work", 6)
        assert len(rejected(normal)) == 2  # of its own four slots, not of five
        assert normal[4].load == 1.0
        ticket = supervisor.submit_nowait(Task("work", priority=priority))
        assert ticket.status is TaskStatus.RUNNING
        assert (await ticket).success
        await results(normal[:4])


@virtual
async def test_a_normal_task_is_rejected_by_the_load_of_what_it_may_use() -> None:
    supervisor = BackpressureSupervisor(backpressure_threshold=0.5, max_queue_size=4)
    supervisor.register_worker("worker", handler=Slots(), task_types=["work"], max_concurrent=8, reserve=4)
    async with supervisor:
        tickets = flood(supervisor, "work", 6)  # four slots and a queue of four: from half of them, and never while
        assert [bool(ticket) for ticket in tickets] == [True] * 4 + [False] * 2  # a slot is free
        assert tickets[4].load == 0.5
        await results(tickets[:4])


@virtual
async def test_a_worker_may_be_kept_for_better_tasks_alone() -> None:
    supervisor, handler = BackpressureSupervisor(), Slots()
    for number in range(3):
        supervisor.register_worker(
            f"worker {number}", handler=handler, task_types=["work"], reserve=1 if number == 0 else 0
        )
    async with supervisor:
        tickets = flood(supervisor, "work", 10)
        urgent = supervisor.submit_nowait(Task("work", priority=Priority.HIGH))
        assert urgent.status is TaskStatus.RUNNING
        assert (await urgent).worker_id == "worker 0"
        assert {result.worker_id for result in await results(tickets)} == {"worker 1", "worker 2"}


@virtual
async def test_a_type_whose_slots_are_all_reserved_rejects_the_others_and_says_why() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=Slots(), task_types=["work"], max_concurrent=2, reserve=2)
    async with supervisor:
        with pytest.raises(Overloaded, match="all its slots are reserved for CRITICAL and HIGH"):
            await supervisor.run(Task("work"))
        await supervisor.run(Task("work", priority=Priority.HIGH))


@virtual
async def test_a_nested_task_without_a_slot_does_not_keep_a_drain_waiting() -> None:
    async def parent(_: Task) -> None:
        await asyncio.sleep(1.0)
        await supervisor.run(Task("child"))

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("parents", handler=parent, task_types=["parent"])
    supervisor.register_worker("children", handler=Slots(), task_types=["child"], reserve=1)
    async with supervisor:
        ticket = supervisor.submit_nowait(Task("parent"))
    assert ticket.result is not None
    assert ticket.result.status is TaskStatus.FAILED


@virtual
async def test_a_priority_that_was_passed_over_does_not_take_the_reserve() -> None:
    supervisor, handler = BackpressureSupervisor(max_queue_size=1000), Slots()
    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=5, reserve=2)
    async with supervisor:
        tickets = flood(supervisor, "work", 5, priority=Priority.CRITICAL)
        low = flood(supervisor, "work", 10, priority=Priority.LOW)
        tickets += flood(supervisor, "work", 300, priority=Priority.CRITICAL)
        for _ in range(4 * 44):
            await asyncio.sleep(0.25)
            # A slot that a CRITICAL task has is not one that is reserved for the next.
            assert handler.running[Priority.LOW] + 2 <= worker.max_concurrent
        assert sum(ticket.done() for ticket in low) >= 9  # beside a flood that takes 61 seconds
        await results([*tickets, *low])


@virtual
async def test_nested_tasks_leave_the_reserve_too() -> None:
    async def parent(_: Task) -> None:
        await asyncio.gather(*(supervisor.run(Task("work", seconds)) for seconds in (1.0, 2.0, 3.0, 1.0, 1.0, 1.0)))

    supervisor, handler = BackpressureSupervisor(), Slots()
    supervisor.register_worker("parents", handler=parent, task_types=["parent"], max_concurrent=2)
    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=3, reserve=1)
    async with supervisor:
        tickets = flood(supervisor, "parent", 2)
        for _ in range(20):
            await asyncio.sleep(0.25)
            assert worker.current_tasks <= 2
        assert set(await statuses(tickets)) == {TaskStatus.SUCCEEDED}


@virtual
async def test_a_run_that_lent_its_slot_takes_none_that_is_reserved_back() -> None:
    async def parent(task: Task) -> None:
        if task.payload == "nests":
            await supervisor.run(Task("other"))
            resumed.append(now())
        await asyncio.sleep(10.0)

    resumed: list[float] = []
    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("worker", handler=parent, task_types=["work"], max_concurrent=2, reserve=1)
    supervisor.register_worker("other", handler=Slots(), task_types=["other"])
    async with supervisor:
        first = supervisor.submit_nowait(Task("work", "nests"))
        await asyncio.sleep(0.5)  # it has lent its slot
        second = supervisor.submit_nowait(Task("work"))
        await asyncio.sleep(4.5)
        assert worker.current_tasks == 1  # the first waits for the end of the second
        urgent = supervisor.submit_nowait(Task("work", priority=Priority.CRITICAL))
        assert urgent.status is TaskStatus.RUNNING  # although a run waits for a slot
        await results([first, second, urgent])
    assert resumed == [pytest.approx(10.5, abs=0.01)]


@virtual
async def test_a_worker_that_failed_is_tried_again_by_a_normal_task() -> None:
    async def handler(_: Task) -> None:
        if now() < 5.0:
            raise ValueError

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=3, reserve=2)
    async with supervisor:
        for _ in range(5):
            await supervisor.submit_nowait(Task("work"))
        assert not supervisor.submit_nowait(Task("work"))
        await asyncio.sleep(20.0)
        assert (await supervisor.submit_nowait(Task("work"))).success


@virtual
async def test_stored_tasks_leave_the_reserve(overflow: str) -> None:
    supervisor, handler = BackpressureSupervisor(overflow=overflow, max_queue_size=2), Slots()
    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=4, reserve=2)
    async with supervisor:
        tickets = [await supervisor.submit(Task("work")) for _ in range(30)]
        for number in range(12):
            await asyncio.sleep(1.0)
            assert worker.current_tasks <= 2
            if number % 3 == 0:
                urgent = await supervisor.submit(Task("work", 0.1, priority=Priority.CRITICAL))
                assert urgent.status is TaskStatus.RUNNING
        await results(tickets)
    assert handler.most_low == 2


@virtual
async def test_a_worker_of_many_types_keeps_its_reserve() -> None:
    supervisor, handler = BackpressureSupervisor(), Slots()
    kinds = [f"work {number}" for number in range(12)]
    worker = supervisor.register_worker("worker", handler=handler, task_types=kinds, max_concurrent=3, reserve=1)
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task(kind)) for kind in kinds for _ in range(5)]
        urgent = [supervisor.submit_nowait(Task(kinds[7], priority=Priority.CRITICAL)) for _ in range(4)]
        await asyncio.sleep(2.5)
        assert all(ticket.done() for ticket in urgent)  # one began at once, the others next
        assert worker.current_tasks == 2
        await results([*tickets, *urgent])
    assert handler.most_low == 2


@virtual
@pytest.mark.parametrize("resized", [True, False])
async def test_a_drain_does_not_wait_for_a_task_that_may_take_no_slot(*, resized: bool) -> None:
    supervisor, released = BackpressureSupervisor(), asyncio.Event()

    async def never_stops(_: Task) -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    worker = supervisor.register_worker("worker", handler=never_stops, task_types=["work"], max_concurrent=3, reserve=2)
    async with supervisor:
        first, waiting = flood(supervisor, "work", 2)
        await asyncio.sleep(1)
        if resized:
            released.set()
            worker.resize(2)
        else:  # a zombie holds the only slot that is not reserved
            first.cancel()
            await asyncio.sleep(10)
        async with asyncio.timeout(100):
            report = await supervisor.drain()
        assert (report.cancelled, waiting.status) == (1, TaskStatus.CANCELLED)
        released.set()


@virtual
@pytest.mark.parametrize("types", [1, 2, 12])
async def test_better_tasks_that_need_not_wait_starve_no_priority(types: int) -> None:
    supervisor, handler = BackpressureSupervisor(), Slots()
    kinds = [f"work {number}" for number in range(types)]
    supervisor.register_worker("worker", handler=handler, task_types=kinds, max_concurrent=4, reserve=3)
    async with supervisor:
        urgent = [supervisor.submit_nowait(Task(kinds[0], priority=Priority.CRITICAL))]
        low = flood(supervisor, kinds[-1], 5, priority=Priority.LOW)
        for _ in range(300):  # two or three run at a time: a slot is always free, and never all of them
            await asyncio.sleep(0.4)
            urgent.append(supervisor.submit_nowait(Task(kinds[0], priority=Priority.CRITICAL)))
            assert urgent[-1].status is TaskStatus.RUNNING
        assert sum(ticket.done() for ticket in low) >= 4
        await results([*urgent, *low])


@virtual
@pytest.mark.parametrize("why", ["its conversation", "a time", "its next attempt"])
async def test_an_urgent_task_that_has_waited_outside_of_the_queue_takes_a_reserved_slot(why: str) -> None:
    starts: list[float] = []

    async def handler(task: Task) -> None:
        if task.priority > Priority.HIGH:
            await asyncio.sleep(100.0)
        elif task.payload == "urgent":
            starts.append(now())
            if why == "its next attempt" and len(starts) == 1:
                raise ValueError

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2, reserve=1)
        supervisor.register_worker("other", handler=Slots(1.0), task_types=["other"])
        tasks = flood(supervisor, "work", 2)  # one runs, and the other one waits for its slot
        began = now()
        fields: dict[str, Any] = {}
        if why == "its conversation":
            fields = {"thread_id": "conversation"}
            await supervisor.submit(Task("other", **fields))
        elif why == "a time":
            fields = {"not_before": clock.wall_time() + 5.0}
        else:
            fields = {"retry": Retry(max_attempts=3)}
        await (await supervisor.submit(Task("work", "urgent", priority=Priority.HIGH, **fields)))
        assert starts[-1] - began < 20.0
        for ticket in tasks:
            ticket.cancel()
