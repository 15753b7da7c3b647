"""Spilling to the overflow, and refilling from it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import (
    Agent,
    approximately,
    error_of,
    find_result,
    find_ticket,
    flood,
    now,
    results,
    run_ready,
    statuses,
    submit_all,
    virtual,
)
from tests.support.task_stores import STORES, StoreBackend

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Priority,
    Task,
    TaskCancelled,
    TaskExpired,
    TaskStatus,
    Verdict,
)
from forebay.errors import DuplicateTask, StillSpilled, StoreUnavailable
from forebay.interfaces import Lease
from forebay.overflow import MemoryTaskStore, SqliteTaskStore

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

LOW, NORMAL, HIGH, CRITICAL = Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL


@pytest.fixture(params=STORES, ids=str)
def backend(request: pytest.FixtureRequest) -> StoreBackend:
    chosen: StoreBackend = request.param
    return chosen


@pytest.fixture
def overflow(backend: StoreBackend, tmp_path: Path) -> str:
    """Return the URL of an overflow of each kind."""
    return backend.url(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return the URL of a durable overflow."""
    return f"sqlite:///{tmp_path}/spill.db"


def make_supervisor(agent: Any, overflow: str, *, slots: int = 1, **options: Any) -> BackpressureSupervisor:
    """Return a supervisor with one worker and a queue of two, of which NORMAL gets one place."""
    options = {"max_queue_size": 2, **options}
    supervisor = BackpressureSupervisor(overflow=overflow, **options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


def work(*payloads: Any, **options: Any) -> list[Task]:
    return [Task("work", payload, **options) for payload in payloads]


# --- spilling --------------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_that_a_full_supervisor_does_not_admit_is_spilled_and_runs_later(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        tickets = await submit_all(supervisor, work(*range(8)))
        assert [ticket.verdict for ticket in tickets] == [Verdict.ADMITTED] * 3 + [Verdict.SPILLED] * 5
        spilled = tickets[-1]
        assert spilled
        assert spilled.status is TaskStatus.SPILLED
        assert spilled.limited_by == "pool:work"
        assert spilled.retry_after is None
        assert supervisor.statistics().outside == 5
        assert [result.result for result in await results(tickets)] == list(range(8))
        assert supervisor.statistics().outside == 0
        assert supervisor.statistics().refilled == 5


@virtual
async def test_a_spilled_task_has_a_complete_result(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        tickets = await submit_all(supervisor, work({"n": [1, 2.5, None, b"x"]}, 1, 2, {"n": [1, 2.5, None, b"x"]}))
        inside, spilled = await tickets[0], await tickets[3]
    assert spilled.result == inside.result
    assert (spilled.worker_id, spilled.status, spilled.success) == ("worker", TaskStatus.SUCCEEDED, True)
    assert (spilled.attempts, spilled.duration_ms) == (1, approximately(1000.0))


@virtual
async def test_run_waits_for_a_spilled_task(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        await submit_all(supervisor, work(*range(4)))
        assert await supervisor.run(Task("work", "mine")) == "mine"
        assert now() == pytest.approx(5.0, abs=0.1)


@virtual
async def test_a_task_that_may_not_spill_is_rejected(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        tickets = await submit_all(supervisor, work(*range(4), spill=False))
        assert tickets[-1].verdict is Verdict.REJECTED
        assert tickets[-1].limited_by == "pool:work"


@virtual
async def test_submit_nowait_rejects_rather_than_spills(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        assert [ticket.verdict for ticket in flood(supervisor, "work", 4)] == [Verdict.ADMITTED] * 3 + [
            Verdict.REJECTED
        ]


@virtual
async def test_a_task_whose_deadline_would_pass_in_the_overflow_is_rejected(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        await supervisor.run(Task("work"))  # so that the duration is known: a second
        await submit_all(supervisor, work(*range(10)))
        hurried = await supervisor.submit(Task("work", deadline=Deadline.within(3.0)))
        patient = await supervisor.submit(Task("work", deadline=Deadline.within(60.0)))
        assert (hurried.verdict, patient.verdict) == (Verdict.REJECTED, Verdict.SPILLED)
        assert (await patient).success


@virtual
async def test_a_deadline_that_passes_in_the_overflow_ends_the_task_then(overflow: str) -> None:
    agent = Agent(30.0)
    async with make_supervisor(agent, overflow) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        ticket = await supervisor.submit(Task("work", 3, deadline=Deadline.within(10.0)))
        assert ticket.verdict is Verdict.SPILLED
        assert isinstance(await error_of(ticket.value()), TaskExpired)
        assert now() == pytest.approx(10.0, abs=0.1)
        assert supervisor.statistics().outside == 0
    assert 3 not in agent.started


@virtual
async def test_a_task_cancelled_in_the_overflow_never_runs(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow) as supervisor:
        tickets = await submit_all(supervisor, work(*range(6)))
        assert tickets[4].cancel("no longer wanted")
        result = await tickets[4]
        assert now() < 0.1
        assert supervisor.statistics().outside == 2
        await results(tickets)
    assert (result.status, result.error) == (TaskStatus.CANCELLED, "no longer wanted")
    assert agent.started == [0, 1, 2, 3, 5]


@virtual
async def test_a_spilled_task_that_is_cancelled_twice_and_expires_ends_once(overflow: str) -> None:
    async with make_supervisor(Agent(5.0), overflow) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        ticket = await supervisor.submit(Task("work", 3, deadline=Deadline.within(2.0)))
        assert ticket.deadline is not None
        await asyncio.sleep(ticket.deadline.remaining() - 1e-4)
        ticket.cancel("first")
        ticket.cancel("second")
        assert (await ticket).status in (TaskStatus.CANCELLED, TaskStatus.EXPIRED)
        await asyncio.sleep(1.0)
        counted = supervisor.statistics()
        assert counted.cancelled + counted.expired == 1
        assert ticket.status.final
        assert counted.outside == 0


@virtual
async def test_a_full_overflow_rejects_and_is_named(backend: StoreBackend, tmp_path: Path) -> None:
    async with make_supervisor(Agent(), backend.url(tmp_path, bound=3)) as supervisor:
        await supervisor.run(Task("work"))
        tickets = await submit_all(supervisor, work(*range(8)))
        assert [ticket.verdict for ticket in tickets[3:]] == [Verdict.SPILLED] * 3 + [Verdict.REJECTED] * 2
        rejected = tickets[-1]
        assert (rejected.limited_by, rejected.reason, rejected.load) == ("overflow", "the overflow is full", 1.0)
        assert rejected.retry_after is not None
        assert all(result.success for result in await results(tickets[:6]))
        assert await supervisor.submit(Task("work"))


@virtual
async def test_a_failed_pool_spills_and_continues_when_it_is_revived(overflow: str) -> None:
    agent = Agent(0.1, error=ValueError())
    supervisor = BackpressureSupervisor(overflow=overflow)
    worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=None)
    async with supervisor:
        await results(flood(supervisor, "work", 5))
        ticket = await supervisor.submit(Task("work", 7))
        assert ticket.verdict is Verdict.SPILLED
        await asyncio.sleep(100.0)
        assert ticket.status is TaskStatus.SPILLED
        agent.error = None
        worker.revive()
        assert (await ticket).result == 7


# --- the order -------------------------------------------------------------------------------------------------------


@virtual
async def test_spilled_tasks_come_back_by_priority_then_deadline_then_age(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=0) as supervisor:
        await supervisor.submit(Task("work", "running"))
        for name, priority, within in (
            ("low", LOW, None),
            ("normal", NORMAL, None),
            ("normal, later", NORMAL, None),
            ("normal, in 90 s", NORMAL, 90.0),
            ("normal, in 60 s", NORMAL, 60.0),
            ("high", HIGH, None),
            ("critical", CRITICAL, None),
        ):
            deadline = None if within is None else Deadline.within(within)
            ticket = await supervisor.submit(Task("work", name, priority=priority, deadline=deadline))
            assert ticket.verdict is Verdict.SPILLED
        await supervisor.drain() if overflow.startswith("memory://") else await asyncio.sleep(10.0)
    assert agent.started == [
        "running",
        "critical",
        "high",
        "normal, in 60 s",
        "normal, in 90 s",
        "normal",
        "normal, later",
        "low",
    ]


@virtual
async def test_no_new_task_overtakes_spilled_ones(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow) as supervisor:
        for number in range(60):  # five are submitted while three run
            await supervisor.submit(Task("work", number))
            await asyncio.sleep(0.6)
        await asyncio.sleep(60.0)
    assert agent.started == list(range(60))


@virtual
async def test_no_new_task_takes_the_free_slot_of_a_better_spilled_one(
    overflow: str,
) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=0) as supervisor:
        (running,) = flood(supervisor, "work", 1)
        high = await supervisor.submit(Task("work", "high", priority=HIGH))
        assert high.verdict is Verdict.SPILLED
        await running
        normal = await supervisor.submit(Task("work", "normal"))
        assert normal.verdict is Verdict.SPILLED
        await results([high, normal])
    assert agent.started == [0, "high", "normal"]


@virtual
async def test_a_better_task_need_not_wait_for_spilled_ones(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=5) as supervisor:
        await submit_all(supervisor, work(*range(10)))
        ticket = await supervisor.submit(Task("work", "critical", priority=CRITICAL))
        assert ticket.verdict is Verdict.ADMITTED
        await asyncio.sleep(15.0)
    assert agent.started[:3] == [0, "critical", 1]


@virtual
async def test_a_spilled_critical_task_does_not_wait_until_a_full_queue_is_empty(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=20, backpressure_threshold=1.0) as supervisor:
        await submit_all(supervisor, work(*range(21), priority=HIGH))
        ticket = await supervisor.submit(Task("work", "critical", priority=CRITICAL))
        assert ticket.verdict is Verdict.SPILLED
        await ticket
    assert agent.started.index("critical") <= 2  # one slot became free before it was back


@virtual
async def test_spilled_low_tasks_move_under_a_flood_of_better_ones(overflow: str) -> None:
    agent = Agent(0.1)
    async with make_supervisor(agent, overflow, max_queue_size=0) as supervisor:
        await submit_all(supervisor, work("running", *["low"] * 5, priority=LOW))
        await submit_all(supervisor, work(*["high"] * 200, priority=HIGH))
        await asyncio.sleep(15.0)
    assert 3 <= agent.started[:80].count("low") <= 4  # one in twenty-one, and the first one
    assert agent.started.count("high") > 100


@virtual
async def test_spilled_tasks_of_one_type_do_not_delay_another(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        supervisor.register_worker("other", handler=Agent(), task_types=["other"])
        await submit_all(supervisor, work(*range(9)))
        assert (await supervisor.submit(Task("other"))).verdict is Verdict.ADMITTED


@virtual
async def test_refilled_tasks_use_no_more_slots_than_there_are(overflow: str) -> None:
    agent = Agent(0.7)
    async with make_supervisor(agent, overflow, slots=3) as supervisor:
        await results(await submit_all(supervisor, work(*range(40))))
    assert agent.peak == 3
    assert sorted(agent.started) == list(range(40))


@virtual
async def test_tasks_of_a_thread_run_one_at_a_time_through_the_overflow_too(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, slots=3) as supervisor:
        await results(await submit_all(supervisor, work(*range(12), thread_id="alice")))
    assert agent.peak == 1
    assert agent.started == list(range(12))


# --- keys and ids ----------------------------------------------------------------------------------------------------


@virtual
async def test_the_same_key_is_the_same_work_in_the_overflow_too(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        first = await supervisor.submit(Task("work", "first", key="k"))
        second = await supervisor.submit(Task("work", "second", key="k"))
        assert first.verdict is Verdict.SPILLED
        assert second is first
        await first
    assert agent.started == [0, 1, 2, "first"]


@virtual
async def test_many_concurrent_submits_of_one_key_are_one_task(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        tickets = await asyncio.gather(*(supervisor.submit(Task("work", "once", key="k")) for _ in range(10)))
        await results(tickets)
        assert len({ticket.task_id for ticket in tickets}) == 1
    assert agent.started.count("once") == 1


@virtual
async def test_two_spilled_tasks_of_one_id_are_an_error(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        first, second = await asyncio.gather(
            supervisor.submit(Task("work", task_id="mine")),
            error_of(supervisor.submit(Task("work", task_id="mine"))),
        )
        assert first.verdict is Verdict.SPILLED
        assert isinstance(second, DuplicateTask)
        assert isinstance(await error_of(supervisor.submit(Task("work", task_id="mine"))), DuplicateTask)


@pytest.mark.parametrize("spills", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@virtual
async def test_an_id_may_be_used_again_once_its_task_has_ended_wherever_it_waited(
    overflow: str, spills: tuple[bool, bool]
) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow) as supervisor:
        for payload, spilled in zip(("first", "second"), spills, strict=True):
            others = await submit_all(supervisor, work(*range(3 if spilled else 0)))
            task = Task("work", payload, task_id="mine")
            ticket = await supervisor.submit(task)
            assert (ticket.verdict is Verdict.SPILLED) is spilled
            assert isinstance(await error_of(supervisor.submit(Task("work", task_id="mine"))), DuplicateTask)
            del ticket  # while it waits in the overflow, nothing else holds it
            gc.collect()
            assert not (await find_ticket(supervisor, "mine")).done()
            await results(others)
            assert (await find_result(supervisor, "mine")).result == payload
            await run_ready()
    assert [started for started in agent.started if isinstance(started, str)] == ["first", "second"]


# --- callers that are cancelled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("durable", [False, True])
@virtual
async def test_cancelling_submit_leaves_nothing_half_done(after: int, file: str, *, durable: bool) -> None:
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        submitting = asyncio.ensure_future(supervisor.submit(Task("work", "left", task_id="left", durable=durable)))
        await asyncio.sleep(after * 0.0015)
        submitting.cancel()
        await asyncio.wait([submitting])
        await asyncio.sleep(10.0)
        counted = supervisor.statistics()
        assert counted.submitted == counted.admitted + counted.spilled + counted.rejected
        ended = counted.succeeded + counted.failed + counted.cancelled + counted.expired + counted.timed_out
        assert ended == counted.admitted + counted.spilled
        assert (counted.running, counted.waiting, counted.outside) == (0, 0, 0)
        if submitting.cancelled():
            assert "left" not in agent.started
        else:
            assert (await submitting.result()).success


@virtual
async def test_a_task_cancelled_while_it_is_spilled_never_runs(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        submitting = asyncio.ensure_future(supervisor.submit(Task("work", "left", task_id="left")))
        await run_ready(1)
        assert (await find_ticket(supervisor, "left")).cancel("no longer wanted")
        ticket = await submitting
        result = await ticket
        assert now() < 0.5
        assert (result.status, result.error) == (TaskStatus.CANCELLED, "no longer wanted")
        await asyncio.sleep(10.0)
    assert agent.started == [0, 1, 2]


@virtual
async def test_cancelling_run_of_a_spilled_task_cancels_it(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        caller = asyncio.ensure_future(supervisor.run(Task("work", "left")))
        await asyncio.sleep(0.5)
        assert supervisor.statistics().outside == 1
        caller.cancel()
        await asyncio.wait([caller])
        await asyncio.sleep(10.0)
        assert supervisor.statistics().cancelled == 1
    assert agent.started == [0, 1, 2]


@pytest.mark.parametrize("parents", [1, 3])
@virtual
async def test_nested_work_that_is_spilled_finishes_when_every_slot_is_taken(parents: int, overflow: str) -> None:
    async def handler(task: Task) -> Any:
        await asyncio.sleep(1.0)
        return await supervisor.run(Task("work", task.payload - 1)) if task.payload else "bottom"

    supervisor = make_supervisor(handler, overflow, slots=parents)
    async with supervisor:
        tickets = await submit_all(supervisor, work(*[4] * 12))
        assert [result.result for result in await results(tickets)] == ["bottom"] * 12


# --- tickets that are held -------------------------------------------------------------------------------------------


@virtual
async def test_a_ticket_that_nobody_holds_takes_no_memory_while_its_task_is_spilled(file: str) -> None:
    agent = Agent(0.01)
    async with make_supervisor(agent, file, slots=4) as supervisor:
        tickets = [weakref.ref(await supervisor.submit(Task("work", n, task_id=f"{n}"))) for n in range(2_000)]
        assert sum(ticket() is not None for ticket in tickets) < 20  # the tasks inside
        results = [await find_result(supervisor, f"{n}") for n in range(1_000, 1_020)]
        assert [result.result for result in results] == list(range(1_000, 1_020))
        await asyncio.sleep(20.0)
        assert supervisor.statistics().succeeded == 2_000
    assert agent.started == list(range(2_000))


@virtual
async def test_a_ticket_that_is_held_and_not_awaited_ends_too(file: str) -> None:
    payload = (1, 2)  # another process would read a list
    async with make_supervisor(Agent(), file) as supervisor:
        tickets = await submit_all(supervisor, work(0, 1, 2, payload))
        gc.collect()
        assert await find_ticket(supervisor, tickets[3].task_id) is tickets[3]
        await asyncio.sleep(10.0)
        assert tickets[3].result is not None
        assert tickets[3].result.result is payload


@virtual
async def test_a_waiter_that_nothing_else_refers_to_gets_its_result(file: str) -> None:
    ended: list[Any] = []

    async def caller(supervisor: BackpressureSupervisor) -> None:
        ended.append(await supervisor.run(Task("work", "mine")))

    async with make_supervisor(Agent(), file) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        asyncio.get_running_loop().create_task(caller(supervisor))
        await asyncio.sleep(0.5)
        gc.collect()
        await asyncio.sleep(10.0)
    assert ended == ["mine"]


@virtual
async def test_a_deadline_applies_even_if_nobody_holds_the_ticket(file: str) -> None:
    agent = Agent(30.0)
    async with make_supervisor(agent, file) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        await supervisor.submit(Task("work", "late", task_id="late", deadline=Deadline.within(10.0)))
        await asyncio.sleep(100.0)
        assert (await find_result(supervisor, "late")).status is TaskStatus.EXPIRED
    assert "late" not in agent.started


@virtual
async def test_the_id_of_a_spilled_task_is_taken_even_if_nobody_holds_its_ticket(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        held = await supervisor.submit(Task("work", task_id="held"))
        await supervisor.submit(Task("work", task_id="dropped"))
        for task_id in (held.task_id, "dropped"):
            assert isinstance(await error_of(supervisor.submit(Task("work", task_id=task_id))), DuplicateTask)


# --- over a restart --------------------------------------------------------------------------------------------------


@virtual
async def test_a_restart_continues_with_what_was_spilled(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        tickets = await submit_all(supervisor, work(*range(10)))
        report = await supervisor.drain()
    assert (report.finished, report.spilled) == (1, 2)  # one ran, two were queued, seven were spilled
    for ticket in tickets[1:]:
        error = await error_of(ticket)
        assert isinstance(error, StillSpilled)
        assert ticket.task_id in str(error)
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        assert supervisor.statistics().outside > 0
        await asyncio.sleep(15.0)
        assert supervisor.statistics().outside == 0
    assert sorted(agent.started) == list(range(1, 10))


@virtual
async def test_tasks_spilled_by_draining_keep_their_place_before_later_ones(file: str) -> None:
    async with make_supervisor(Agent(), file, max_queue_size=6) as supervisor:
        tickets = await submit_all(supervisor, work(*range(12)))
        assert [ticket.verdict for ticket in tickets].count(Verdict.SPILLED) > 4
        await supervisor.drain()
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        await asyncio.sleep(15.0)
    assert agent.started == list(range(1, 12))


@pytest.mark.parametrize("moment", range(0, 50, 3))
@virtual
async def test_closing_while_a_task_is_refilled_starts_nothing_and_loses_nothing(moment: int, file: str) -> None:
    agent = Agent()
    supervisor = make_supervisor(agent, file)
    await supervisor.start()
    await submit_all(supervisor, work(*range(6)))
    await asyncio.sleep(3.0 + moment * 0.0002)  # the queued tasks have run, and the next ones are being leased
    before = list(agent.started)
    await supervisor.close()
    assert agent.started == before
    ended = [supervisor.statistics().succeeded, supervisor.statistics().cancelled]
    rest = Agent()
    async with make_supervisor(rest, file, slots=9):
        await asyncio.sleep(5.0)
    assert len(rest.started) + sum(ended) == 6


@virtual
async def test_after_a_restart_the_ticket_of_an_old_task_returns_its_result(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        tickets = await submit_all(supervisor, work(*range(6)))
    async with make_supervisor(Agent(), file) as supervisor:
        waited_for = [await find_result(supervisor, ticket.task_id) for ticket in tickets[1:]]
    assert [result.result for result in waited_for] == [1, 2, 3, 4, 5]
    async with make_supervisor(Agent(), file) as supervisor:
        assert [(await find_result(supervisor, ticket.task_id)).result for ticket in tickets[3:]] == [3, 4, 5]


@virtual
async def test_after_a_restart_an_old_task_may_be_cancelled_by_its_id(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        tickets = await submit_all(supervisor, work(*range(6)))
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        await supervisor.submit(Task("work", "fresh", priority=CRITICAL))
        ticket = await find_ticket(supervisor, tickets[5].task_id)
        await asyncio.sleep(0.5)
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        await asyncio.sleep(15.0)
    assert sorted(agent.started, key=str) == [1, 2, 3, 4, "fresh"]


@virtual
async def test_after_a_restart_a_key_is_still_known(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        await supervisor.run(Task("work", "first", key="done"))
        await submit_all(supervisor, work(3, 4, 5))
        await supervisor.submit(Task("work", "second", key="open"))
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        assert await supervisor.run(Task("work", "again", key="done")) == "first"
        assert await supervisor.run(Task("work", "again", key="open")) == "second"
    assert "again" not in agent.started


@virtual
async def test_spilled_tasks_wait_until_a_worker_accepts_their_type(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        await submit_all(supervisor, work(*range(6)))
    agent = Agent()
    async with BackpressureSupervisor(overflow=file) as supervisor:
        await asyncio.sleep(60.0)
        assert supervisor.statistics().outside == 5
        supervisor.register_worker("late", handler=agent, task_types=["work"])
        await asyncio.sleep(10.0)
    assert sorted(agent.started) == [1, 2, 3, 4, 5]


@virtual
async def test_a_deadline_that_passed_before_a_restart_ends_the_task_unstarted(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        tickets = await submit_all(supervisor, work(*range(6), deadline=Deadline.within(30.0)))
    await asyncio.sleep(60.0)
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        assert (
            await statuses([await find_ticket(supervisor, ticket.task_id) for ticket in tickets[1:]])
            == [TaskStatus.EXPIRED] * 5
        )
    assert agent.started == []


@virtual
async def test_two_supervisors_share_an_overflow_and_run_each_task_once(file: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, file) as first, make_supervisor(agent, file) as second:
        tickets = await submit_all(first, work(*range(30)))
        await asyncio.sleep(40.0)
        assert all(result.success for result in await results(tickets))
        assert second.statistics().succeeded > 5
    assert sorted(agent.started) == list(range(30))


# --- durable ---------------------------------------------------------------------------------------------------------


@virtual
async def test_a_durable_task_is_admitted_and_its_result_is_there_after_a_restart(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        ticket = await supervisor.submit(Task("work", 7, durable=True))
        assert ticket.verdict is Verdict.ADMITTED
        assert (await ticket).result == 7
    async with make_supervisor(Agent(), file) as supervisor:
        assert (await find_result(supervisor, ticket.task_id)).result == 7


@virtual
async def test_a_durable_task_that_was_interrupted_runs_again_after_a_restart(file: str) -> None:
    agent = Agent(10.0)
    supervisor = make_supervisor(agent, file)
    await supervisor.start()
    ticket = await supervisor.submit(Task("work", 7, durable=True))
    await asyncio.sleep(1.0)
    assert (await supervisor.drain(timeout=1.0)).spilled == 1
    await supervisor.close()
    assert isinstance(await error_of(ticket), StillSpilled)
    async with make_supervisor(agent, file) as supervisor:
        result = await find_result(supervisor, ticket.task_id)
    assert (result.result, result.attempts) == (7, 1)  # the interrupted start was no crash


@virtual
async def test_a_durable_task_that_is_not_admitted_is_spilled(file: str) -> None:
    async with make_supervisor(Agent(), file) as supervisor:
        tickets = await submit_all(supervisor, work(*range(8), durable=True))
        assert [ticket.verdict for ticket in tickets] == [Verdict.ADMITTED] * 3 + [Verdict.SPILLED] * 5
        assert [result.result for result in await results(tickets)] == list(range(8))


@virtual
async def test_a_durable_task_that_was_rejected_may_be_submitted_again_as_it_is(file: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        await submit_all(supervisor, work(0, 1, 2))
        task = Task("work", "again", durable=True, spill=False, key="k")
        assert (await supervisor.submit(task)).verdict is Verdict.REJECTED
        await asyncio.sleep(5.0)
        assert agent.started == [0, 1, 2]
        assert await supervisor.run(task) == "again"


@virtual
async def test_a_long_task_keeps_its_lease_while_the_supervisor_drains(file: str) -> None:
    agent = Agent(60.0)
    async with make_supervisor(agent, file, lease=3.0) as first:
        ticket = await first.submit(Task("work", "long", durable=True))
        async with make_supervisor(agent, file, lease=3.0):
            assert (await first.drain()).finished == 1
        assert (await ticket).success
    assert agent.started == ["long"]


@virtual
async def test_a_failure_of_a_stored_task_is_final_and_not_tried_again(overflow: str) -> None:
    agent = Agent(0.1)
    async with make_supervisor(agent, overflow) as supervisor:
        tickets = await submit_all(supervisor, work(*range(5)))
        agent.error = ValueError("x")
        result = await tickets[-1]
        assert (result.status, result.error, result.attempts) == (TaskStatus.FAILED, "ValueError: x", 1)
        await asyncio.sleep(10.0)
    assert agent.started == [0, 1, 2, 3, 4]


@virtual
async def test_a_result_that_cannot_be_stored_reaches_its_waiters(overflow: str) -> None:
    value = object()

    async def handler(_: Task) -> object:
        await asyncio.sleep(1.0)
        return value

    async with make_supervisor(handler, overflow) as supervisor:
        tickets = await submit_all(supervisor, work(*range(5)))
        assert (await tickets[-1]).result is value


@virtual
async def test_leaving_by_an_error_keeps_what_is_spilled_and_ends_every_ticket(file: str) -> None:
    tickets = []

    async def use() -> None:
        async with make_supervisor(Agent(), file) as supervisor:
            tickets.extend(await submit_all(supervisor, work(*range(8))))
            raise ZeroDivisionError

    assert isinstance(await error_of(use()), ZeroDivisionError)
    errors = [await error_of(ticket.value()) for ticket in tickets]
    assert isinstance(errors[0], TaskCancelled)
    assert all(isinstance(error, StillSpilled) for error in errors[1:])
    agent = Agent()
    async with make_supervisor(agent, file):
        await asyncio.sleep(10.0)
    assert sorted(agent.started) == [1, 2, 3, 4, 5, 6, 7]


# --- keys, while the store decides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "spilled"])
@pytest.mark.parametrize("leaving", ["first", "second", "both", "first before the second comes"])
@virtual
async def test_a_keyed_task_goes_on_unless_all_its_callers_leave_while_the_store_decides(
    leaving: str, tmp_path: Path, *, durable: bool
) -> None:
    agent = Agent(1.0)
    options: dict[str, Any] = {"key": "invoice-7", "durable": durable}
    url = f"sqlite:///{tmp_path}/spill.db"
    async with BackpressureSupervisor(overflow=url, max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["pay"])
        if not durable:
            flood(supervisor, "pay", 1)
        first = asyncio.ensure_future(supervisor.run(Task("pay", "first", **options)))
        await wait_until_undecided(supervisor)
        if leaving == "first before the second comes":
            first.cancel()
            await run_ready()
        second = asyncio.ensure_future(supervisor.run(Task("pay", "second", **options)))
        await run_ready()
        if leaving in ("first", "both"):
            first.cancel()
        if leaving in ("second", "both"):
            second.cancel()
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.sleep(10.0)
    went = [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes]
    assert went == [leaving != "second", leaving in ("second", "both")]
    assert all(gone or outcome == "first" for gone, outcome in zip(went, outcomes, strict=True))
    assert [task.payload for task in agent.calls if task.payload != 0] == ([] if leaving == "both" else ["first"])


@pytest.mark.parametrize("awaits", [True, False], ids=["awaits", "holds"])
@virtual
async def test_a_keyed_task_goes_on_for_a_caller_that_got_it_without_waiting(tmp_path: Path, *, awaits: bool) -> None:
    agent = Agent(1.0)
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["pay"])
        first = asyncio.ensure_future(supervisor.submit(Task("pay", "first", key="k", durable=True)))
        await wait_until_undecided(supervisor)
        ticket = supervisor.submit_nowait(Task("pay", "second", key="k"))
        waiting = [asyncio.ensure_future(ticket.value())] if awaits else []
        await run_ready()
        first.cancel()
        assert (await ticket).result == "first"
        assert await asyncio.gather(*waiting) == ["first"] * awaits


@virtual
async def test_a_keyed_task_goes_on_for_a_caller_that_awaits_it_by_its_id(tmp_path: Path) -> None:
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["pay"])
        first = asyncio.ensure_future(supervisor.submit(Task("pay", "first", task_id="a", durable=True)))
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future((await find_ticket(supervisor, "a")).value())
        await run_ready()
        first.cancel()
        assert await waiting == "first"


@virtual
async def test_the_key_of_a_task_that_comes_back_is_known_though_nobody_held_its_ticket(overflow: str) -> None:
    agent = Agent(1.0)
    async with BackpressureSupervisor(overflow=overflow, max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["pay"])
        (busy,) = flood(supervisor, "pay", 1)
        await supervisor.submit(Task("pay", "first", key="k"))  # spilled, and its ticket is dropped
        gc.collect()
        await busy
        await asyncio.sleep(0.5)
        again = supervisor.submit_nowait(Task("pay", "second", key="k"))
        assert (await again).result == "first"
    assert [task.payload for task in agent.calls] == [0, "first"]


class SlowLookups(MemoryTaskStore):
    """A store that answers each lookup of a key later than the one before."""

    seconds = 0.1

    async def find_key(self, key: str) -> str | None:
        self.seconds *= 3
        await asyncio.sleep(self.seconds)
        return await super().find_key(key)


@pytest.mark.parametrize("first_leaves", [0.4, 0.8])
@virtual
async def test_a_keyed_task_goes_on_for_those_who_still_wait_for_the_lookup_of_its_key(first_leaves: float) -> None:
    agent = Agent(5.0)
    async with BackpressureSupervisor(overflow=SlowLookups()) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["pay"])
        first, second = (
            asyncio.ensure_future(supervisor.run(Task("pay", name, key="k"))) for name in ("first", "second")
        )
        await asyncio.sleep(first_leaves)  # the second lookup takes 0.9 seconds
        first.cancel()
        assert await second == "first"
    assert [task.payload for task in agent.calls] == ["first"]


async def wait_until_undecided(supervisor: BackpressureSupervisor) -> None:
    """Wait until the store has been asked about a task."""
    while not supervisor._admission_here()._undecided:  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(1e-5)


@virtual
async def test_the_first_caller_may_leave_at_any_step_without_cancelling_the_task_of_the_second(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    async with BackpressureSupervisor(overflow=url) as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["pay"], max_concurrent=10)
        for step in range(40):
            options: dict[str, Any] = {"key": f"invoice-{step}", "durable": True}
            first = asyncio.ensure_future(supervisor.run(Task("pay", "first", **options)))
            await wait_until_undecided(supervisor)
            second = asyncio.ensure_future(supervisor.run(Task("pay", "second", **options)))
            await run_ready()
            if step >= 20:
                await supervisor._admission_here()._undecided[f"invoice-{step}"].wait()
            await run_ready(step % 20)
            first.cancel()
            assert await second == "first"


class BrieflyFailingStore(MemoryTaskStore):
    """A store in memory whose first call of one method fails."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def _fail_once(self, method: str) -> None:
        if self.method == method:
            self.method = ""
            raise StoreUnavailable(where="memory", why="it is busy", advice="None.")

    async def lease(self, *of: Any, **how: Any) -> Sequence[Lease]:
        self._fail_once("lease")
        return await super().lease(*of, **how)

    async def finish(self, *of: Any, **how: Any) -> bool:
        self._fail_once("finish")
        return await super().finish(*of, **how)


@pytest.mark.parametrize("thread_id", [None, "c"])
@pytest.mark.parametrize("method", ["lease", "finish"])
@virtual
async def test_a_store_in_memory_that_fails_once_leaves_no_task_behind(method: str, thread_id: str | None) -> None:
    supervisor = BackpressureSupervisor(overflow=BrieflyFailingStore(method), max_queue_size=0)
    supervisor.register_worker("w", handler=Agent(0.1), task_types=["work"])
    async with supervisor:
        tickets = [await supervisor.submit(Task("work", number, thread_id=thread_id)) for number in range(4)]
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 4
        assert now() < 3.0


class SlowlyCountingStore(SqliteTaskStore):
    """A store whose counts of waiting tasks are half a second old when they arrive."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.counted = asyncio.Event()

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        depths = await super().depths()
        self.counted.set()
        await asyncio.sleep(0.5)
        return depths


@pytest.mark.blocks
@virtual
async def test_a_count_that_was_made_before_a_task_was_stored_does_not_hide_it(tmp_path: Path) -> None:
    store = SlowlyCountingStore(tmp_path / "store.db")
    supervisor = BackpressureSupervisor(overflow=store, max_queue_size=0, lease=90.0)
    supervisor.register_worker("w", handler=Agent(1.0), task_types=["work"])
    async with supervisor:
        store.counted.clear()
        await store.counted.wait()  # by the heartbeat
        tickets = [await supervisor.submit(Task("work", number)) for number in range(2)]
        assert [ticket.status for ticket in tickets] == [TaskStatus.RUNNING, TaskStatus.SPILLED]
        origin = now()
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 2
        assert now() - origin < 4.0
