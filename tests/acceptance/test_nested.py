"""Handlers that submit work themselves, and supervisors that are handlers of others."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from tests.support.task_plane import (
    Agent,
    approximately,
    error_of,
    fill,
    flood,
    now,
    results,
    run_ready,
    statuses,
    virtual,
)

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Overloaded,
    Priority,
    Retry,
    Task,
    TaskCancelled,
    TaskStatus,
    Verdict,
    WorkerState,
)
from forebay.adapters import Handler
from forebay.errors import NotStarted
from forebay.simulation import virtual_loop


class Tree:
    """A handler that runs a tree of itself: a payload of n has n children with n - 1; its value counts them all."""

    def __init__(self, supervisor: BackpressureSupervisor, *, at_once: bool) -> None:
        self.supervisor = supervisor
        self.at_once = at_once

    async def __call__(self, task: Task) -> int:
        await asyncio.sleep(1.0)
        children = [Task("tree", task.payload - 1) for _ in range(task.payload)]
        if self.at_once:
            counts: list[int] = await asyncio.gather(*map(self.supervisor.run, children))
        else:
            counts = [await self.supervisor.run(child) for child in children]
        return 1 + sum(counts)


# --- when every slot is taken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("at_once", [False, True])
@virtual
async def test_recursion_goes_through_any_number_of_slots(slots: int, *, at_once: bool) -> None:
    async with BackpressureSupervisor(max_queue_size=500) as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=Tree(supervisor, at_once=at_once), task_types=["tree"], max_concurrent=slots
        )
        assert await supervisor.run(Task("tree", 4)) == 1 + 4 + 4 * 3 + 4 * 3 * 2 + 4 * 3 * 2
        await run_ready()
        assert worker.current_tasks == 0


@virtual
async def test_parents_that_hold_every_slot_cannot_deadlock() -> None:
    async def parent(_: Task) -> Any:
        await asyncio.sleep(1.0)
        return await supervisor.run(Task("child"))

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w1", handler=parent, task_types=["parent"], max_concurrent=4)
        supervisor.register_worker("w2", handler=Agent(), task_types=["child"])
        assert all(result.success for result in await results(flood(supervisor, "parent", 20)))


@virtual
async def test_parents_and_children_that_share_one_slot_all_finish() -> None:
    async def handler(task: Task) -> Any:
        return await supervisor.run(Task("work", "child")) if task.payload != "child" else "done"

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert [result.result for result in await results(flood(supervisor, "work", 30))] == ["done"] * 30


@virtual
async def test_a_lent_slot_comes_back_before_its_run_goes_on() -> None:
    running = peak = 0

    async def parent(_: Task) -> None:
        nonlocal running, peak
        for _round in range(3):
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(1.0)
            running -= 1
            await supervisor.run(Task("child"))

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("parents", handler=parent, task_types=["parent"], max_concurrent=2)
        supervisor.register_worker("children", handler=Agent(0.5), task_types=["child"], max_concurrent=9)
        await results(flood(supervisor, "parent", 10))
        assert worker.current_tasks == 0
    assert peak == 2


@virtual
async def test_a_run_gets_its_slot_back_before_queued_tasks() -> None:
    order: list[str] = []

    async def handler(task: Task) -> None:
        order.append(f"{task.payload} starts")
        if task.payload == 0:
            await supervisor.run(Task("child"))
            order.append("0 continues")
        await asyncio.sleep(1.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("parents", handler=handler, task_types=["parent"])
        supervisor.register_worker("children", handler=Agent(0.5), task_types=["child"])
        await results(flood(supervisor, "parent", 3))
    assert order == ["0 starts", "1 starts", "0 continues", "2 starts"]


@pytest.mark.parametrize("timeouts", [(1.0,), (1.0, 1.5), (1.0, 1.5, 2.0)], ids=len)
@virtual
async def test_timeouts_around_an_await_put_no_more_to_work_than_there_are_slots(timeouts: tuple[float, ...]) -> None:
    at_work = peak = 0

    async def work(seconds: float) -> None:
        nonlocal at_work, peak
        at_work += 1
        peak = max(peak, at_work)
        await asyncio.sleep(seconds)
        at_work -= 1

    async def impatient(remaining: tuple[float, ...]) -> None:
        if not remaining:
            await supervisor.run(Task("child"))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(remaining[0]):
                await impatient(remaining[1:])

    async def agent(task: Task) -> None:
        if task.payload == "parent":
            await impatient(timeouts[::-1])
        await work(10.0)

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=2)
        supervisor.register_worker("children", handler=Agent(60.0), task_types=["child"], max_concurrent=2)
        tickets = [supervisor.submit_nowait(Task("work", "parent")) for _ in range(2)]
        tickets += [supervisor.submit_nowait(Task("work")) for _ in range(2)]
        assert {result.status for result in await results(tickets)} == {TaskStatus.SUCCEEDED}
        assert now() == approximately(20.0)
        assert peak == 2
        assert (worker.current_tasks, worker.pending_claims) == (0, 0)


@virtual
async def test_awaiting_several_tasks_lends_one_slot_and_reclaims_one() -> None:
    async def parent(_: Task) -> list[Any]:
        tickets = [await supervisor.submit(Task("work", n)) for n in range(5)]
        ended = await asyncio.gather(*(tickets[n]._wait() for n in range(5)))
        return [result.result for result in ended]

    async def handler(task: Task) -> Any:
        if task.payload == "parent":
            return await parent(task)
        await asyncio.sleep(1.0 + task.payload)
        return task.payload

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert await supervisor.run(Task("work", "parent")) == [0, 1, 2, 3, 4]
        assert worker.current_tasks == 0


@virtual
async def test_awaits_that_start_while_the_slot_is_reclaimed_do_not_count_it_twice() -> None:
    async def handler(task: Task) -> Any:
        if task.payload != "parent":
            await asyncio.sleep(task.payload)
            return None

        async def later() -> None:
            await asyncio.sleep(1.5)
            await supervisor.run(Task("short", 0.1))
            await supervisor.run(Task("short", 1.0))

        return await asyncio.gather(supervisor.run(Task("short", 1.0)), later())

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        supervisor.register_worker("helper", handler=handler, task_types=["short"], max_concurrent=9)
        parent = supervisor.submit_nowait(Task("work", "parent"))
        supervisor.submit_nowait(Task("work", 3.0))  # takes the lent slot, which is then returned late
        await parent
        assert worker.current_tasks <= 1
        await asyncio.sleep(10.0)
        assert worker.current_tasks == 0


@virtual
async def test_a_slot_reclaimed_while_its_run_awaits_again_goes_to_the_next_task() -> None:
    async def handler(task: Task) -> Any:
        if task.payload != "parent":
            await asyncio.sleep(task.payload)
            return None

        async def later() -> None:
            await asyncio.sleep(1.5)
            await supervisor.run(Task("work", 1.0))

        return await asyncio.gather(supervisor.run(Task("short", 1.0)), later())

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        supervisor.register_worker("helper", handler=handler, task_types=["short"])
        parent = supervisor.submit_nowait(Task("work", "parent"))
        supervisor.submit_nowait(Task("work", 3.0))  # has the lent slot when the first wait is over
        await parent
        assert now() == approximately(4.0)
        await run_ready()
        assert worker.current_tasks == 0


@virtual
async def test_a_nested_task_goes_before_newer_work_of_its_priority() -> None:
    agent = Agent()

    async def parent(_: Task) -> Any:
        await asyncio.sleep(0.5)
        return await supervisor.run(Task("child", "nested"))

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("parents", handler=parent, task_types=["parent"])
        supervisor.register_worker("children", handler=agent, task_types=["child"])
        supervisor.submit_nowait(Task("parent"))
        flood(supervisor, "child", 4)
        supervisor.submit_nowait(Task("child", "important", priority=Priority.HIGH))
    assert agent.started == [0, "important", "nested", 1, 2, 3]


@virtual
async def test_nested_work_that_a_full_queue_rejects_deadlocks_nothing() -> None:
    async def parent(_: Task) -> int:
        children = (supervisor.run(Task("work", "child")) for _ in range(9))
        ended = await asyncio.gather(*children, return_exceptions=True)
        return sum(isinstance(end, Overloaded) for end in ended)

    async def handler(task: Task) -> Any:
        await asyncio.sleep(1.0)
        return await parent(task) if task.payload == "parent" else "other"

    async with BackpressureSupervisor(max_queue_size=4) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        ticket = supervisor.submit_nowait(Task("work", "parent"))
        await fill(supervisor, "work")
        assert (await ticket).result == 6  # three wait in the room that nested tasks have, from 80 % they are rejected
        assert supervisor.statistics().failed == 0


@virtual
async def test_slot_inside_a_handler_lends_the_handlers_slot() -> None:
    async def handler(_: Task) -> str:
        async with supervisor.slot("work"):
            await asyncio.sleep(1.0)
        return "done"

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert [result.result for result in await results(flood(supervisor, "work", 4))] == ["done"] * 4
        assert worker.current_tasks == 0


@virtual
async def test_nested_work_works_through_a_slot_too() -> None:
    async def handler(task: Task) -> str:
        if task.payload == "child":
            return "child"
        async with supervisor.slot("work"):
            return str(await supervisor.run(Task("work", "child")))

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert await supervisor.run(Task("work")) == "child"
        await run_ready()
        assert worker.current_tasks == 0


@virtual
async def test_a_parent_stops_waiting_in_time_even_if_its_child_has_its_slot() -> None:
    children = Agent(200.0)

    async def handler(task: Task) -> Any:
        if task.payload == "child":
            return await children(task)
        started = now()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await supervisor.run(Task("work", "child"))
        return now() - started

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert await supervisor.run(Task("work")) == approximately(1.0)
    assert children.running == 0


@virtual
async def test_cancelling_a_parent_cancels_the_child_that_it_runs() -> None:
    child = Agent(10.0)

    async def parent(_: Task) -> Any:
        return await supervisor.run(Task("child"))

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("parents", handler=parent, task_types=["parent"])
        supervisor.register_worker("children", handler=child, task_types=["child"])
        (ticket,) = flood(supervisor, "parent", 1)
        await asyncio.sleep(1.0)
        assert child.running == 1
        ticket.cancel()
        await run_ready()
        assert child.running == 0
        assert supervisor.statistics().running == 0


@virtual
async def test_a_parent_that_swallows_its_cancellation_and_waits_again_takes_no_slot_from_others() -> None:
    async def parent(task: Task) -> None:
        if task.payload == 1:
            await asyncio.sleep(2.0)
            return
        try:
            await supervisor.run(Task("child"))
        except asyncio.CancelledError:
            await supervisor.run(Task("child"))

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("parents", handler=parent, task_types=["parent"])
        supervisor.register_worker("children", handler=Agent(5.0), task_types=["child"], max_concurrent=4)
        flood(supervisor, "parent", 2, timeout=3.0)
        while supervisor.statistics().running:
            assert 0 <= worker.current_tasks <= 1
            await asyncio.sleep(0.25)
        assert worker.current_tasks == 0


@virtual
async def test_background_work_of_an_ended_handler_lends_no_slot() -> None:
    background: list[asyncio.Task[Any]] = []

    async def handler(task: Task) -> None:
        async def afterwards() -> None:
            await asyncio.sleep(1.0)
            await supervisor.run(Task("work", "child"))

        if task.payload == "parent":
            background.append(asyncio.get_running_loop().create_task(afterwards()))

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        await supervisor.run(Task("work", "parent"))
        await background[0]
        assert worker.current_tasks == 0


@virtual
async def test_a_parent_that_does_not_wait_for_its_child_keeps_its_slot_whatever_the_child_waits_for() -> None:
    parents = Agent(10.0)

    async def parent(task: Task) -> None:
        if task.payload == "outer":
            await supervisor.submit(Task("child"))
        await parents(task)

    async def child(_: Task) -> Any:
        return await supervisor.run(Task("parent", "inner"))

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("parents", handler=parent, task_types=["parent"])
        supervisor.register_worker("children", handler=child, task_types=["child"])
        supervisor.submit_nowait(Task("parent", "outer"))
    assert parents.started == ["outer", "inner"]
    assert parents.peak == 1


@virtual
async def test_a_parent_that_starts_to_wait_late_lends_its_slot_then() -> None:
    async def parent(task: Task) -> Any:
        if task.payload == "inner":
            return "bottom"
        ticket = await supervisor.submit(Task("child"))
        await asyncio.sleep(5.0)
        return (await ticket).result

    async def child(_: Task) -> Any:
        return await supervisor.run(Task("parent", "inner"))

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("parents", handler=parent, task_types=["parent"])
        supervisor.register_worker("children", handler=child, task_types=["child"])
        assert await supervisor.run(Task("parent")) == "bottom"
        assert now() == approximately(5.0)


@virtual
async def test_awaiting_a_task_of_an_unrelated_supervisor_lends_no_slot() -> None:
    running = peak = 0

    async def handler(_: Task) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await other.run(Task("other"))
        running -= 1

    async with BackpressureSupervisor() as other, BackpressureSupervisor() as supervisor:
        other.register_worker("other", handler=Agent(), task_types=["other"], max_concurrent=9)
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2)
        await results(flood(supervisor, "work", 6))
        assert now() == approximately(3.0)
    assert peak == 2


@virtual
async def test_reading_a_childs_events_lends_the_slot_as_awaiting_it_does() -> None:
    async def handler(task: Task) -> Any:
        if task.payload == "child":
            return "done"
        ticket = await supervisor.submit(Task("work", "child"))
        return [event.kind async for event in ticket.events()]

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert await supervisor.run(Task("work")) == ["started", "finished"]
        await run_ready()
        assert worker.current_tasks == 0


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "own", "effective"), [(5.0, 50.0, 5.0), (50.0, 5.0, 5.0), (5.0, None, 5.0), (None, 5.0, 5.0)]
)
@virtual
async def test_a_child_inherits_the_earlier_of_its_parents_deadline_and_its_own(
    parents: float | None, own: float | None, effective: float
) -> None:
    seen: list[float] = []

    async def parent(_: Task) -> None:
        ticket = await supervisor.submit(Task("child", deadline=None if own is None else Deadline.within(own)))
        assert ticket.deadline is not None
        seen.append(ticket.deadline.remaining())
        result = await ticket
        seen.append(now())
        assert result.status is TaskStatus.EXPIRED

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("parents", handler=parent, task_types=["parent"])
        supervisor.register_worker("children", handler=Agent(100.0), task_types=["child"])
        await supervisor.submit_nowait(
            Task("parent", deadline=None if parents is None else Deadline.within(parents), timeout=60.0)
        )
        await run_ready()
    assert seen[0] == approximately(effective)


@virtual
async def test_a_grandchild_inherits_too() -> None:
    deadlines: list[float] = []

    async def handler(task: Task) -> None:
        if task.payload:
            ticket = await supervisor.submit(Task("work", task.payload - 1))
            assert ticket.deadline is not None
            deadlines.append(ticket.deadline.remaining())
            await ticket

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        await supervisor.submit_nowait(Task("work", 3, deadline=Deadline.within(7.0)))
    assert deadlines == [approximately(7.0)] * 3


# --- supervisors of supervisors --------------------------------------------------------------------------------------


def nest(inner: BackpressureSupervisor, outer: BackpressureSupervisor, **options: Any) -> None:
    outer.register_worker("inner", handler=inner, task_types=["work"], **options)


@virtual
async def test_a_supervisor_is_a_handler_like_any_other() -> None:
    agent = Agent()
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=2)
    async with BackpressureSupervisor() as outer:
        nest(inner, outer, max_concurrent=4)
        assert [result.result for result in await results(flood(outer, "work", 8))] == list(range(8))
    assert agent.peak == 2


@virtual
async def test_a_supervisor_starts_and_stops_its_nested_supervisor() -> None:
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=Agent(), task_types=["work"])
    outer = BackpressureSupervisor()
    nest(inner, outer)
    with pytest.raises(NotStarted):
        inner.submit_nowait(Task("work"))
    async with outer:
        assert await inner.run(Task("work", 1)) == 1
    assert isinstance(await error_of(inner.submit(Task("work"))), RuntimeError)


@virtual
async def test_a_supervisor_registered_after_the_start_is_started_too() -> None:
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=Agent(), task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer)
        assert await outer.run(Task("work", 1)) == 1


@virtual
async def test_a_nested_supervisor_may_be_running_already() -> None:
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=Agent(), task_types=["work"])
    async with inner, BackpressureSupervisor() as outer:
        nest(inner, outer)
        assert await outer.run(Task("work", 1)) == 1


@pytest.mark.parametrize("fails", [False, True])
@virtual
async def test_a_supervisor_below_two_others_is_started_once_and_both_wait_for_it(*, fails: bool) -> None:
    starts: list[float] = []

    class Starting:
        def __forebay_handler__(self) -> Handler:
            return Handler(call=lambda _: "done", start=self.start)

        async def start(self) -> None:
            starts.append(now())
            await asyncio.sleep(5.0)
            if fails and len(starts) == 1:
                raise ConnectionError

    async def above_first() -> Any:
        async with first:
            value = await first.run(Task("work"))
            await asyncio.sleep(60.0)
            return value

    async def above_second() -> Any:
        await asyncio.sleep(1.0)
        async with second:
            return await second.run(Task("work"))

    team = BackpressureSupervisor()
    team.register_worker("worker", handler=Starting(), task_types=["work"])
    first, second = BackpressureSupervisor(), BackpressureSupervisor()
    for above in (first, second):
        above.register_worker("team", handler=team, task_types=["work"])
    outcomes: Any = await asyncio.gather(above_first(), above_second(), return_exceptions=True)
    one, two = outcomes
    assert two == "done"
    if fails:
        assert isinstance(one, ConnectionError)
        assert starts == [approximately(0.0), approximately(5.0)]
    else:
        assert one == "done"
        assert starts == [approximately(0.0)]


@virtual
async def test_load_of_a_nested_supervisor_counts_above() -> None:
    inner = BackpressureSupervisor(max_queue_size=4)
    inner.register_worker("worker", handler=Agent(10.0), task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer, max_concurrent=50)
        for count in range(1, 5):
            assert outer.submit_nowait(Task("work"))
            await run_ready()
            assert outer.system_load() == pytest.approx(count / 5)
        ticket = outer.submit_nowait(Task("work"))
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.limited_by == "worker:inner"
        assert ticket.load == pytest.approx(4 / 5)


@virtual
async def test_load_counts_through_more_than_one_level() -> None:
    cellar = BackpressureSupervisor(max_queue_size=4)
    cellar.register_worker("worker", handler=Agent(10.0), task_types=["work"])
    ground = BackpressureSupervisor()
    ground.register_worker("cellar", handler=cellar, task_types=["work"], max_concurrent=50)
    async with BackpressureSupervisor() as roof:
        roof.register_worker("ground", handler=ground, task_types=["work"], max_concurrent=50)
        for _ in range(4):
            assert roof.submit_nowait(Task("work"))
            await run_ready()
        assert roof.system_load() == pytest.approx(4 / 5)
        assert not roof.submit_nowait(Task("work"))


@virtual
async def test_a_full_nested_supervisor_rejects_no_task_that_a_free_worker_can_run() -> None:
    inner = BackpressureSupervisor(max_queue_size=0)
    inner.register_worker("worker", handler=Agent(10.0), task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer)
        outer.register_worker("own", handler=Agent(10.0), task_types=["work"], max_concurrent=5)
        await run_ready()
        inner.submit_nowait(Task("work"))
        assert outer.submit_nowait(Task("work"))


@virtual
async def test_a_rejection_by_a_nested_supervisor_reaches_the_caller_and_does_not_count_against_the_worker() -> None:
    inner = BackpressureSupervisor(max_queue_size=0)
    inner.register_worker("worker", handler=Agent(10.0), task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer, max_concurrent=20)
        _first, *others = flood(outer, "work", 9)  # in one loop turn, before any has reached the nested supervisor
        for ticket in others:
            assert isinstance(await error_of(ticket.value()), Overloaded)
        assert outer.workers["inner"].state is not WorkerState.FAILED


@virtual
async def test_cancelling_at_the_top_stops_the_handler_at_the_bottom() -> None:
    agent = Agent(10.0)
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=agent, task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer)
        ticket = outer.submit_nowait(Task("work"))
        await asyncio.sleep(1.0)
        ticket.cancel()
        await run_ready()
        assert agent.running == 0
        assert inner.statistics().running == 0


class Stubborn:
    """A handler that goes on for some seconds after its cancellation; `spans` are the times at which it ran."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.spans: list[tuple[float, float]] = []

    async def __call__(self, task: Task) -> None:
        begun = now()
        try:
            await asyncio.sleep(10.0)
        except asyncio.CancelledError:
            await asyncio.sleep(self.seconds)
        self.spans.append((begun - task.payload, now() - task.payload))


@virtual
async def test_the_next_message_waits_for_the_handler_of_one_that_timed_out_in_a_nested_supervisor() -> None:
    agent, others = Stubborn(3.0), Agent()
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=agent, task_types=["work"], timeout=1.0)
    async with BackpressureSupervisor() as outer:
        nest(inner, outer)
        outer.register_worker("other", handler=others, task_types=["other"])
        begun = now()
        first = outer.submit_nowait(Task("work", begun, thread_id="c"))
        second = outer.submit_nowait(Task("other", thread_id="c"))
        assert (await first).status is TaskStatus.FAILED
        assert now() - begun == approximately(1.0)  # its caller does not wait for the handler
        assert outer.workers["inner"].current_tasks == 1
        await second
        assert agent.spans == [(approximately(0.0), approximately(4.0))]
        assert outer.workers["inner"].current_tasks == 0


@virtual
async def test_the_next_message_waits_for_the_handler_of_one_that_was_cancelled_above_a_nested_supervisor() -> None:
    agent = Stubborn(3.0)
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=agent, task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer)
        outer.register_worker("other", handler=Agent(), task_types=["other"])
        first = outer.submit_nowait(Task("work", now(), thread_id="c"))
        second = outer.submit_nowait(Task("other", thread_id="c"))
        await asyncio.sleep(1.0)
        first.cancel()
        await second
        assert agent.spans == [(approximately(0.0), approximately(4.0))]


@virtual
async def test_a_retry_waits_for_the_last_attempt_to_stop_in_a_nested_supervisor() -> None:
    agent = Stubborn(3.0)
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=2, timeout=1.0)
    async with BackpressureSupervisor() as outer:
        nest(inner, outer, max_concurrent=2, retry=Retry(max_attempts=2, base_delay=0.01))
        await outer.submit_nowait(Task("work", now()))
        await asyncio.sleep(4.0)
    (first, second) = agent.spans
    assert first == (approximately(0.0), approximately(4.0))
    assert second[0] >= first[1]


@virtual
async def test_a_handler_that_does_not_stop_in_a_nested_supervisor_is_a_zombie_above_it_too() -> None:
    inner = BackpressureSupervisor(zombie_grace=0.5)
    inner.register_worker("worker", handler=Stubborn(3.0), task_types=["work"], timeout=1.0)
    async with BackpressureSupervisor(zombie_grace=0.5) as outer:
        nest(inner, outer)
        await outer.submit_nowait(Task("work", now()))
        await asyncio.sleep(1.0)
        assert (outer.statistics().zombies, outer.workers["inner"].current_tasks) == (1, 1)
        await asyncio.sleep(3.0)
        assert outer.workers["inner"].current_tasks == 0


@virtual
async def test_a_deadline_applies_in_nested_supervisors() -> None:
    agent = Agent(10.0)
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=agent, task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer)
        result = await outer.submit_nowait(Task("work", deadline=Deadline.within(2.0)))
        assert result.status is TaskStatus.EXPIRED
        await run_ready()
        assert agent.running == 0


@virtual
async def test_work_that_goes_down_the_tree_and_up_again_cannot_deadlock() -> None:
    async def bounce(task: Task) -> Any:
        return await outer.run(Task("work", task.payload - 1)) if task.payload else "bottom"

    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=bounce, task_types=["work"])
    async with BackpressureSupervisor() as outer:
        nest(inner, outer)
        assert await outer.run(Task("work", 5)) == "bottom"
        await run_ready()
        assert outer.statistics().running == inner.statistics().running == 0


@virtual
async def test_work_that_goes_up_again_late_cannot_deadlock_either() -> None:
    async def bottom(task: Task) -> Any:
        return await outer.run(Task("work", "up again")) if task.payload == "down" else "up again"

    async def down(task: Task) -> Any:
        if task.payload == "up again":
            return "through"
        ticket = await inner.submit(Task("below", "down"))
        await asyncio.sleep(5.0)
        return (await ticket).result

    async with BackpressureSupervisor() as inner, BackpressureSupervisor() as outer:
        inner.register_worker("bottom", handler=bottom, task_types=["below"])
        outer.register_worker("top", handler=down, task_types=["work"])
        assert await outer.run(Task("work", "start")) == "through"
        await run_ready()
        assert outer.statistics().running == inner.statistics().running == 0


@virtual
async def test_leaving_the_outer_supervisor_by_an_error_ends_the_runs_of_the_nested_one() -> None:
    agent = Agent(10.0)
    inner = BackpressureSupervisor()
    inner.register_worker("worker", handler=agent, task_types=["work"])
    outer = BackpressureSupervisor()
    nest(inner, outer)
    tickets = []

    async def use() -> None:
        async with outer:
            tickets.extend(flood(outer, "work", 1))
            await asyncio.sleep(1.0)
            raise ZeroDivisionError

    assert isinstance(await error_of(use()), ZeroDivisionError)
    assert isinstance(await error_of(tickets[0].value()), TaskCancelled)
    assert agent.running == 0


@virtual
async def test_a_supervisor_that_cannot_start_leaves_nothing_running() -> None:
    first = BackpressureSupervisor()
    first.register_worker("worker", handler=Agent(), task_types=["work"])
    second = BackpressureSupervisor(overflow="sqlite:////nowhere/at/all.db")
    second.register_worker("worker", handler=Agent(), task_types=["work"])
    outer = BackpressureSupervisor()
    outer.register_worker("first", handler=first, task_types=["work"])
    outer.register_worker("second", handler=second, task_types=["work"])
    await error_of(outer.start())
    assert isinstance(await error_of(first.submit(Task("work"))), RuntimeError)  # it is closed again


@virtual
async def test_awaiting_a_task_that_ends_while_the_slot_is_lent_returns() -> None:
    async with BackpressureSupervisor() as supervisor:

        async def handler(task: Task) -> Any:
            if task.payload == "child":
                return None
            child = supervisor.submit_nowait(Task("work", "child", deadline=Deadline.within(1.0)))
            virtual_loop().stall(2.0)  # it blocks the loop: no timer has ended the child when its turn comes
            return (await child).status

        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert await supervisor.run(Task("work", "parent", timeout=60.0)) is TaskStatus.EXPIRED


@pytest.mark.parametrize("priority", [Priority.HIGH, Priority.NORMAL])
@virtual
async def test_runs_of_an_inner_supervisor_that_wait_for_the_outer_one_keep_no_others_from_beginning(
    priority: Priority,
) -> None:
    inner, outer = BackpressureSupervisor(), BackpressureSupervisor()

    async def handle(task: Task) -> None:
        await asyncio.sleep(0.01)
        if task.task_type == "job":
            await outer.run(Task("part"))

    inner.register_worker("agent", handler=handle, task_types=["job", "part"], max_concurrent=1)
    outer.register_worker("team", handler=inner, task_types=["job", "part"], max_concurrent=4)
    async with outer:
        tickets = flood(outer, "job", 10, priority=priority)
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 10
    assert now() < 5.0


@pytest.mark.parametrize("submitted", ["directly", "by a run that has ended"])
@virtual
async def test_a_task_of_an_inner_supervisor_that_awaits_the_outer_one_lends_its_slot(submitted: str) -> None:
    inner, outer = BackpressureSupervisor(), BackpressureSupervisor()

    async def handle(task: Task) -> None:
        if task.task_type == "first":
            await inner.submit(Task("upwards"))
        elif task.task_type == "upwards":
            await asyncio.sleep(0.1)
            await outer.run(Task("part"))

    inner.register_worker("agent", handler=handle, task_types=["first", "upwards", "job", "part"])
    outer.register_worker("team", handler=inner, task_types=["first", "job", "part"])
    async with outer:
        if submitted == "directly":
            await inner.submit(Task("upwards"))
        else:
            await outer.run(Task("first"))
        await asyncio.sleep(0.05)
        assert (await (await outer.submit(Task("job")))).status is TaskStatus.SUCCEEDED
        assert now() < 1.0
