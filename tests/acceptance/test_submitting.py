"""What `submit`, `submit_nowait` and `run` return, and the load that decides it."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.support.task_plane import (
    Agent,
    admitted,
    approximately,
    error_of,
    fill,
    flood,
    now,
    rejected,
    results,
    run_ready,
    virtual,
)

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Estimate,
    Overloaded,
    Priority,
    Task,
    TaskExpired,
    TaskFailed,
    TaskStatus,
    TaskTimedOut,
    Verdict,
)

# --- the ticket ------------------------------------------------------------------------------------------------------


@virtual
async def test_an_admitted_task_gives_a_true_ticket_and_a_whole_result() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("researcher", handler=Agent(2.0), task_types=["research"])
        ticket = await supervisor.submit(Task("research", "rivers", task_id="r1"))
        assert ticket
        assert ticket.verdict is Verdict.ADMITTED
        result = await ticket
    assert (result.task_id, result.worker_id, result.success) == ("r1", "researcher", True)
    assert (result.status, result.result, result.error) == (TaskStatus.SUCCEEDED, "rivers", None)
    assert result.duration_ms == approximately(2000.0)
    assert result.attempts == 1


@virtual
async def test_a_ticket_can_be_awaited_by_many_and_again_and_again() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        ticket = await supervisor.submit(Task("work", 7))

        async def wait() -> object:
            return (await ticket).result

        assert list(await asyncio.gather(wait(), wait(), wait())) == [7, 7, 7]
        assert (await ticket).result == 7


@virtual
async def test_cancelling_an_await_leaves_the_task_running() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        ticket = await supervisor.submit(Task("work", 7))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await ticket
        assert ticket.status is TaskStatus.RUNNING
        assert (await ticket).result == 7


@virtual
async def test_a_ticket_says_where_its_task_is() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        first, second = flood(supervisor, "work", 2)
        assert (first.status, second.status) == (TaskStatus.RUNNING, TaskStatus.WAITING)
        await first
        assert (first.status, second.status) == (TaskStatus.SUCCEEDED, TaskStatus.RUNNING)


@virtual
async def test_a_rejected_ticket_is_false_and_says_why_and_when_to_try_again() -> None:
    async with BackpressureSupervisor(max_queue_size=3) as supervisor:
        supervisor.register_worker("worker", handler=Agent(4.0), task_types=["work"])
        await supervisor.run(Task("work"))  # so that the duration is known
        ticket = rejected(flood(supervisor, "work", 10))[0]
        assert not ticket
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.status is TaskStatus.REJECTED
        assert ticket.limited_by == "pool:work"
        assert ticket.load == 1.0
        assert ticket.reason == "pool:work is at 100%, and NORMAL is rejected from 80%"
        assert ticket.retry_after is not None
        assert ticket.retry_after > 0


@virtual
async def test_awaiting_a_rejected_ticket_raises_overloaded_with_its_facts() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(4.0), task_types=["work"])
        await supervisor.run(Task("work"))
        ticket = flood(supervisor, "work", 2)[1]
        error = await error_of(ticket)
        assert isinstance(error, Overloaded)
        assert (error.reason, error.limited_by, error.load, error.retry_after) == (
            ticket.reason,
            ticket.limited_by,
            ticket.load,
            ticket.retry_after,
        )


@virtual
async def test_retry_after_is_none_while_the_pace_is_unknown() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        assert flood(supervisor, "work", 2)[1].retry_after is None


@virtual
async def test_submit_nowait_admits_before_it_returns() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        ticket = supervisor.submit_nowait(Task("work"))
        assert supervisor.workers["worker"].current_tasks == 1
        assert ticket.status is TaskStatus.RUNNING


@virtual
async def test_a_ticket_is_found_by_its_id_while_it_runs_and_after() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        ticket = await supervisor.submit(Task("work", task_id="mine"))
        assert supervisor.ticket("mine") is ticket
        await ticket
        assert supervisor.ticket("mine") is ticket


@virtual
async def test_task_ids_are_unique() -> None:
    assert len({Task("work").task_id for _ in range(1000)}) == 1000


# --- run -------------------------------------------------------------------------------------------------------------


@virtual
async def test_run_returns_the_value() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        assert await supervisor.run(Task("work", "lakes")) == "lakes"


@virtual
async def test_run_raises_overloaded_if_rejected() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        supervisor.submit_nowait(Task("work"))
        assert isinstance(await error_of(supervisor.run(Task("work"))), Overloaded)


@virtual
async def test_run_raises_task_failed_from_the_handlers_exception() -> None:
    async with BackpressureSupervisor() as supervisor:
        broken = ValueError("no such river")
        supervisor.register_worker("worker", handler=Agent(error=broken), task_types=["work"])
        error = await error_of(supervisor.run(Task("work", task_id="w1")))
    assert isinstance(error, TaskFailed)
    assert error.__cause__ is broken
    assert (error.task_id, error.worker_id, error.error) == ("w1", "worker", "ValueError: no such river")


@virtual
async def test_run_raises_task_timed_out() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        error = await error_of(supervisor.run(Task("work", timeout=1.0)))
    assert isinstance(error, TaskTimedOut)
    assert isinstance(error, TimeoutError)
    assert not isinstance(error, TaskExpired)
    assert "timeout of 1 s" in str(error)


@virtual
async def test_run_raises_task_expired_if_the_deadline_comes_first() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        error = await error_of(supervisor.run(Task("work", timeout=5.0, deadline=Deadline.within(2.0))))
        assert now() == approximately(2.0)
    assert isinstance(error, TaskExpired)


@virtual
async def test_cancelling_run_cancels_the_task() -> None:
    agent = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        caller = asyncio.ensure_future(supervisor.run(Task("work", task_id="mine")))
        await asyncio.sleep(1.0)
        caller.cancel()
        await asyncio.wait([caller])
        assert supervisor.ticket("mine").status is TaskStatus.CANCELLED
        await run_ready()
        assert agent.running == 0
        assert now() == approximately(1.0)


# --- load ------------------------------------------------------------------------------------------------------------


@virtual
async def test_a_busy_supervisor_that_keeps_up_reads_far_below_the_threshold() -> None:
    async with BackpressureSupervisor() as supervisor:
        for number in range(10):
            supervisor.register_worker(f"worker{number}", handler=Agent(), task_types=["work"])
        flood(supervisor, "work", 10)
        assert supervisor.utilization() == 1.0
        assert supervisor.system_load() == pytest.approx(10 / 110)


@virtual
async def test_the_load_is_running_and_waiting_tasks_over_slots_and_queue_size() -> None:
    async with BackpressureSupervisor(max_queue_size=6) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=2)
        flood(supervisor, "work", 5)
        assert {reading.resource: reading.load for reading in supervisor.readings()} == {"pool:work": 5 / 8, "host": 0}
        assert supervisor.system_load() == 5 / 8


@virtual
async def test_the_system_load_is_the_fullest_resources() -> None:
    async with BackpressureSupervisor(max_queue_size=1) as supervisor:
        supervisor.register_worker("idle", handler=Agent(), task_types=["rest"])
        supervisor.register_worker("busy", handler=Agent(), task_types=["work"])
        flood(supervisor, "work", 2)
        assert supervisor.system_load() == 1.0
        assert supervisor.statistics().limited_by == "pool:work"


@virtual
async def test_the_queue_holds_a_hundred_tasks_or_as_many_as_there_are_slots() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("few", handler=Agent(), task_types=["a"], max_concurrent=50)
        supervisor.register_worker("many", handler=Agent(), task_types=["b"], max_concurrent=400)
        assert await fill(supervisor, "a") == 50 + 100
        assert await fill(supervisor, "b") == 400 + 400


@virtual
async def test_one_type_cannot_crowd_out_another() -> None:
    async with BackpressureSupervisor(max_queue_size=5) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["loud", "quiet"])
        await fill(supervisor, "loud")
        assert supervisor.submit_nowait(Task("quiet"))


@virtual
async def test_utilization_is_slots_taken_over_slots() -> None:
    async with BackpressureSupervisor() as supervisor:
        assert supervisor.utilization() == 0.0
        supervisor.register_worker("a", handler=Agent(), task_types=["work"], max_concurrent=3)
        supervisor.register_worker("b", handler=Agent(), task_types=["work"], max_concurrent=5)
        flood(supervisor, "work", 2)
        assert supervisor.utilization() == 2 / 8


# --- priority thresholds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "share"),
    [(Priority.LOW, 0.6), (Priority.NORMAL, 0.8), (Priority.HIGH, 0.9), (Priority.CRITICAL, 1.0)],
)
@virtual
async def test_each_priority_is_rejected_from_its_own_load(priority: Priority, share: float) -> None:
    async with BackpressureSupervisor(backpressure_threshold=0.8, max_queue_size=90) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=10)
        assert await fill(supervisor, "work", priority) == round(share * 100)


@pytest.mark.parametrize(
    ("priority", "count"),
    [(Priority.LOW, 38), (Priority.NORMAL, 50), (Priority.HIGH, 75), (Priority.CRITICAL, 100)],
)
@virtual
async def test_every_priority_threshold_follows_from_the_one_setting(priority: Priority, count: int) -> None:
    async with BackpressureSupervisor(backpressure_threshold=0.5, max_queue_size=90) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=10)
        assert await fill(supervisor, "work", priority) == count


@virtual
async def test_at_a_threshold_of_one_all_priorities_but_low_may_fill_the_queue() -> None:
    for priority, count in ((Priority.LOW, 15), (Priority.NORMAL, 20), (Priority.HIGH, 20), (Priority.CRITICAL, 20)):
        async with BackpressureSupervisor(backpressure_threshold=1, max_queue_size=19) as supervisor:
            supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
            assert await fill(supervisor, "work", priority) == count


@virtual
async def test_nothing_is_rejected_while_a_slot_is_free() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=10)
        assert await fill(supervisor, "work", Priority.LOW) == 10


@virtual
async def test_the_last_places_of_the_queue_are_kept_for_the_best_priorities() -> None:
    async with BackpressureSupervisor(max_queue_size=99) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        counts = [await fill(supervisor, "work", priority) for priority in reversed(Priority)]
    assert counts == [60, 20, 10, 10]


# --- retry_after -----------------------------------------------------------------------------------------------------


@virtual
async def test_no_two_rejections_get_the_same_retry_after_and_they_are_one_drain_interval_apart() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(2.0), task_types=["work"], max_concurrent=4)
        await results(flood(supervisor, "work", 4))
        flood(supervisor, "work", 4)
        waits = [ticket.retry_after or 0.0 for ticket in flood(supervisor, "work", 200)]
    assert len(set(waits)) == 200
    interval = 2.0 / 4 / 0.97
    for place, wait in enumerate(waits, start=1):
        assert place * interval <= wait + 0.01
        assert wait <= place * interval * 1.1 + 0.01


@virtual
async def test_nearly_all_tasks_that_come_back_after_retry_after_are_admitted() -> None:
    async with BackpressureSupervisor(max_queue_size=20) as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"], max_concurrent=5)
        await results(flood(supervisor, "work", 5))
        rejections = rejected(flood(supervisor, "work", 400))

        async def come_back(wait: float) -> bool:
            await asyncio.sleep(wait)
            return bool(await supervisor.submit(Task("work")))

        returns = await asyncio.gather(*(come_back(ticket.retry_after or 0.0) for ticket in rejections))
    assert sum(returns) / len(returns) > 0.95


# --- deadlines -------------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_whose_deadline_passes_in_the_queue_ends_expired_then() -> None:
    agent = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        supervisor.submit_nowait(Task("work", "first"))
        ticket = supervisor.submit_nowait(Task("work", "late", deadline=Deadline.within(3.0)))
        result = await ticket
        assert now() == approximately(3.0)
        assert supervisor.statistics().waiting == 0
    assert result.status is TaskStatus.EXPIRED
    assert result.worker_id is None
    assert agent.started == ["first"]


@virtual
async def test_a_task_whose_deadline_passes_while_it_runs_ends_expired_and_is_stopped() -> None:
    agent = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        result = await supervisor.submit_nowait(Task("work", deadline=Deadline.within(3.0)))
        assert now() == approximately(3.0)
        await run_ready()
        assert agent.running == 0
    assert result.status is TaskStatus.EXPIRED
    assert result.worker_id == "worker"
    assert result.duration_ms == approximately(3000.0)


@virtual
async def test_a_deadline_that_cannot_be_met_is_rejected_at_submit() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        await results(flood(supervisor, "work", 8))
        flood(supervisor, "work", 20)
        supervisor.submit_nowait(Task("work", deadline=Deadline.within(5.0)))  # one in ten seconds is admitted anyway
        ticket = supervisor.submit_nowait(Task("work", deadline=Deadline.within(5.0)))
        assert ticket.verdict is Verdict.REJECTED
        assert "deadline" in (ticket.reason or "")
        assert supervisor.submit_nowait(Task("work", deadline=Deadline.within(60.0)))


@virtual
async def test_a_deadline_is_not_judged_on_fewer_than_eight_samples() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(5.0), task_types=["work"], max_concurrent=20)
        await results(flood(supervisor, "work", 7))
        assert all(flood(supervisor, "work", 5, deadline=Deadline.within(1.0)))


@virtual
async def test_a_slow_period_does_not_stop_admission_for_good() -> None:
    agent = Agent(60.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=30)
        await results(flood(supervisor, "work", 20))
        agent.seconds = 1.0
        done = []
        for _ in range(300):  # a caller a second, each with ten seconds
            ticket = supervisor.submit_nowait(Task("work", deadline=Deadline.within(10.0)))
            done.append(bool(ticket))
            await asyncio.sleep(1.0)
    assert not all(done[:50])
    assert all(done[-50:])


@virtual
async def test_a_deadline_is_absolute_and_counts_from_its_creation() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        deadline = Deadline.within(5.0)
        await asyncio.sleep(4.0)
        assert deadline.remaining() == approximately(1.0)
        ticket = supervisor.submit_nowait(Task("work", deadline=deadline))
        assert (await ticket).status is TaskStatus.EXPIRED
        assert now() == approximately(5.0)


def test_without_a_loop_a_deadline_uses_the_wall_clock() -> None:
    assert Deadline.within(60).at == pytest.approx(time.time() + 60, abs=5)  # noqa: TID251 - the wall itself


# --- one run at a time -----------------------------------------------------------------------------------------------


@virtual
async def test_tasks_of_a_thread_run_one_at_a_time_in_order() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["chat"], max_concurrent=10)
        tickets = flood(supervisor, "chat", 6, thread_id="alice")
        await results(tickets)
        assert now() == approximately(6.0)
    assert agent.started == [0, 1, 2, 3, 4, 5]
    assert agent.peak == 1


@virtual
async def test_threads_delay_neither_each_other_nor_tasks_without_a_thread() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["chat"], max_concurrent=10)
        tickets = [supervisor.submit_nowait(Task("chat", thread_id=thread)) for thread in ("alice", "bob", None, None)]
        await results(tickets)
        assert now() == approximately(1.0)


@virtual
async def test_a_thread_goes_on_when_a_task_of_it_fails_or_is_cancelled() -> None:
    agent = Agent(error=ValueError())
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["chat"], max_concurrent=10)
        first, second, third, fourth = flood(supervisor, "chat", 4, thread_id="alice")
        second.cancel()
        await first
        await run_ready()
        third.cancel()
        agent.error = None
        assert (await fourth).status is TaskStatus.SUCCEEDED
    assert agent.started == [0, 2, 3]
    assert agent.peak == 1


@virtual
async def test_a_priority_does_not_overtake_within_its_thread() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["chat"], max_concurrent=10)
        tickets = [
            supervisor.submit_nowait(Task("chat", priority, thread_id="alice", priority=priority))
            for priority in (Priority.LOW, Priority.NORMAL, Priority.CRITICAL)
        ]
        await results(tickets)
    assert agent.started == [Priority.LOW, Priority.NORMAL, Priority.CRITICAL]


@virtual
async def test_a_thread_spans_task_types() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("a", handler=agent, task_types=["ask"], max_concurrent=10)
        supervisor.register_worker("b", handler=agent, task_types=["tell"], max_concurrent=10)
        await results([supervisor.submit_nowait(Task(kind, thread_id="alice")) for kind in ("ask", "tell", "ask")])
    assert agent.peak == 1


@virtual
async def test_tasks_that_wait_for_their_thread_have_a_bound_of_their_own() -> None:
    async with BackpressureSupervisor(max_queue_size=4) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["chat"], max_concurrent=4)
        tickets = flood(supervisor, "chat", 20, thread_id="alice")
        assert len(admitted(tickets)) == 1 + 4  # half of twice the room of the queue
        assert {ticket.limited_by for ticket in rejected(tickets)} == {"conversation:alice"}


@virtual
async def test_a_deadline_passes_while_a_task_waits_for_its_thread() -> None:
    agent = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["chat"], max_concurrent=10)
        supervisor.submit_nowait(Task("chat", 0, thread_id="alice"))
        ticket = supervisor.submit_nowait(Task("chat", 1, thread_id="alice", deadline=Deadline.within(2.0)))
        assert (await ticket).status is TaskStatus.EXPIRED
        assert now() == approximately(2.0)
        assert supervisor.statistics().waiting == 0
    assert agent.started == [0]


# --- the same work once ----------------------------------------------------------------------------------------------


@virtual
async def test_the_same_key_is_the_same_work() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["pay"], max_concurrent=10)
        first = await supervisor.submit(Task("pay", 1, key="invoice-7"))
        second = await supervisor.submit(Task("pay", 2, key="invoice-7"))
        other = await supervisor.submit(Task("pay", 3, key="invoice-8"))
        assert second is first
        assert other is not first
        assert await supervisor.run(Task("pay", 4, key="invoice-7")) == 1
        await other
        assert supervisor.submit_nowait(Task("pay", 5, key="invoice-7")) is first
    assert agent.started == [1, 3]


@virtual
async def test_a_rejected_key_may_be_tried_again() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["pay"])
        busy = await supervisor.submit(Task("pay"))
        assert not await supervisor.submit(Task("pay", key="invoice-7"))
        await busy
        assert await supervisor.submit(Task("pay", key="invoice-7"))


@virtual
async def test_a_task_that_is_submitted_twice_under_its_key_is_one_task() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["pay"])
        task = Task("pay", key="invoice-7")
        assert await supervisor.submit(task) is await supervisor.submit(task)
        assert supervisor.submit_nowait(task) is supervisor.ticket(task.task_id)


@virtual
async def test_a_cancelled_caller_does_not_cancel_the_task_of_another_with_the_same_key() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["pay"])
        first = asyncio.ensure_future(supervisor.run(Task("pay", 1, key="invoice-7")))
        await run_ready()
        second = asyncio.ensure_future(supervisor.run(Task("pay", 2, key="invoice-7")))
        await run_ready()
        second.cancel()
        await run_ready()
        assert await first == 1


@virtual
async def test_the_first_caller_of_a_key_may_be_cancelled_while_another_waits() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["pay"])
        first = asyncio.ensure_future(supervisor.run(Task("pay", 1, key="invoice-7")))
        await run_ready()
        second = asyncio.ensure_future(supervisor.run(Task("pay", 2, key="invoice-7")))
        await run_ready()
        first.cancel()
        await run_ready()
        assert await second == 1


# --- the result of a task --------------------------------------------------------------------------------------------


@virtual
async def test_a_handler_gets_the_task_as_it_was_submitted() -> None:
    seen: list[Task] = []

    async def handler(task: Task) -> None:
        seen.append(task)

    task = Task(
        "work",
        {"topic": "rivers"},
        priority=Priority.HIGH,
        timeout=5.0,
        deadline=Deadline(2e9),
        tenant="acme",
        thread_id="t1",
        key="k",
        estimate=Estimate(calls=3),
    )
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        await supervisor.run(task)
    assert seen == [task]
    assert seen[0] is task


@virtual
async def test_every_end_without_success_says_so_in_its_result() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(error=KeyError("x")), task_types=["work"])
        result = await supervisor.submit_nowait(Task("work"))
    assert not result.success
    assert result.status is TaskStatus.FAILED
    assert result.error == "KeyError: 'x'"
    assert result.result is None
