"""Every check passes a correct supervisor, and fails one that is manipulated to violate its invariants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.supervisor_checks import (
    InvariantViolation,
    check_counts,
    check_limits,
    check_nothing_left,
    check_priorities,
    check_spills,
    check_supervisor,
    check_task_ends,
)
from tests.support.upstream_checks import check_upstream

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskResult, TaskStatus, Verdict
from forebay.admission import PriorityQueue
from forebay.events import Event, TaskFinished, TaskRefilled, TaskStarted, TaskSubmitted
from forebay.quota import Budget, Price, Quota
from forebay.testing import (
    EventRecord,
    FlakyHandler,
    HeldHandler,
    SlowHandler,
    UncancellableHandler,
    overload,
    run_ready,
    virtual,
)
from forebay.upstream import Upstream

# --- a correct supervisor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "memory://"])
@virtual
async def test_a_busy_supervisor_passes_all_checks(overflow: str | None) -> None:
    supervisor = BackpressureSupervisor(max_queue_size=5, overflow=overflow, zombie_grace=0.5)
    record = EventRecord(supervisor)
    supervisor.register_worker("slow", handler=SlowHandler(1.0), task_types=["work"], max_concurrent=2)
    supervisor.register_worker("flaky", handler=FlakyHandler(chance=0.3), task_types=["work", "quick"])
    supervisor.register_worker("stubborn", handler=UncancellableHandler(3.0), task_types=["stubborn"], timeout=1.0)
    tickets = []
    async with supervisor:
        for number in range(60):
            kind = ("work", "quick", "stubborn")[number % 3]
            deadline = Deadline.within(2.0) if number % 7 == 0 else None
            task = Task(kind, number, priority=Priority(number % 4), deadline=deadline)
            tickets.append(await supervisor.submit(task))
            if number % 10 == 9:
                tickets[-4].cancel()
                await asyncio.sleep(1.0)
    check_supervisor(record, tickets=tickets, zombies=True)
    await asyncio.sleep(3.0)
    check_supervisor(record, tickets=tickets)
    assert {status.name for status in record.statuses.values()} >= {"SUCCEEDED", "FAILED", "TIMED_OUT", "CANCELLED"}
    assert record.of_type(TaskRefilled) if overflow else record.submitted[-1].verdict is Verdict.REJECTED


# --- made-up events ---------------------------------------------------------------------------------------------------


class MadeUpRecord:
    """The record of a supervisor that emits the events of a test."""

    def __init__(self, slots: int = 1, overflow: str | None = None) -> None:
        self.supervisor = BackpressureSupervisor(overflow=overflow)
        self.worker = self.supervisor.register_worker(
            "w", handler=SlowHandler(), task_types=["work"], max_concurrent=slots
        )
        self.record = EventRecord(self.supervisor)
        self.at = 0.0

    def emit(self, event: Event) -> None:
        self.supervisor._bus.emit(event)

    def submitted(
        self, task_id: str, priority: Priority = Priority.NORMAL, verdict: Verdict = Verdict.ADMITTED
    ) -> None:
        self.at += 1.0
        self.record.tasks[task_id] = Task("work", task_id=task_id, priority=priority)
        self.emit(TaskSubmitted(at=self.at, task_id=task_id, task_type="work", priority=priority, verdict=verdict))

    def started(self, task_id: str, attempt: int = 1) -> None:
        self.at += 1.0
        self.emit(TaskStarted(at=self.at, task_id=task_id, worker_id="w", attempt=attempt))

    def finished(self, task_id: str, status: TaskStatus = TaskStatus.SUCCEEDED, of: str | None = None) -> None:
        self.at += 1.0
        result = TaskResult(task_id=of or task_id, worker_id="w", success=True, status=status)
        self.emit(TaskFinished(at=self.at, task_id=task_id, result=result))

    def refilled(self, task_id: str) -> None:
        self.at += 1.0
        self.emit(TaskRefilled(at=self.at, task_id=task_id, task_type="work"))


def violations(check: Callable[[], None]) -> str:
    """Return the violations that a check finds; it must find at least one."""
    with pytest.raises(InvariantViolation) as raised:
        check()
    assert isinstance(raised.value, AssertionError)
    assert all(line in str(raised.value) for line in raised.value.violations)
    return "\n".join(raised.value.violations)


def test_a_task_that_never_ends_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a", Priority.HIGH)
    assert violations(lambda: check_task_ends(made_up.record)) == (
        "task 'a' (work, HIGH) was ADMITTED at 1.000 s and has not ended"
    )
    made_up.started("a")
    made_up.finished("a")
    check_task_ends(made_up.record)


def test_a_spilled_task_that_never_ends_is_named_unless_tasks_may_be_left(tmp_path: Path) -> None:
    made_up = MadeUpRecord(overflow="memory://")
    made_up.submitted("a", verdict=Verdict.SPILLED)
    assert "'a' (work, NORMAL) was SPILLED at 1.000 s" in violations(lambda: check_task_ends(made_up.record))
    check_task_ends(made_up.record, left=1)
    made_up = MadeUpRecord(overflow=f"sqlite:///{tmp_path}/spill.db")
    made_up.submitted("a", verdict=Verdict.SPILLED)
    check_task_ends(made_up.record)
    assert "'a'" in violations(lambda: check_task_ends(made_up.record, left=0))


def test_a_task_that_ends_twice_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a")
    made_up.started("a")
    made_up.finished("a")
    made_up.finished("a", TaskStatus.TIMED_OUT)
    assert violations(lambda: check_task_ends(made_up.record)) == (
        "task 'a' (work, NORMAL) ended 2 times: SUCCEEDED at 3.000 s, TIMED_OUT at 4.000 s"
    )


def test_a_task_that_ends_under_two_supervisors_is_named() -> None:
    first, second = MadeUpRecord(), MadeUpRecord()
    for made_up in (first, second):
        made_up.submitted("a")
        made_up.finished("a")
        check_task_ends(made_up.record)
    assert violations(lambda: check_task_ends(first.record, second.record)) == "task 'a' ended under 2 supervisors"


def test_a_task_left_by_one_supervisor_may_end_in_the_next() -> None:
    first, second = MadeUpRecord(), MadeUpRecord()
    first.submitted("a", verdict=Verdict.SPILLED)
    second.refilled("a")
    second.finished("a")
    check_task_ends(first.record, second.record, left=0)


def test_a_rejected_task_that_runs_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a", verdict=Verdict.REJECTED)
    check_task_ends(made_up.record)
    made_up.started("a")
    assert violations(lambda: check_task_ends(made_up.record)) == (
        "task 'a' (work, NORMAL) was REJECTED, and yet started at 2.000 s"
    )


def test_a_rejected_task_that_is_submitted_again_is_not_an_error() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a", verdict=Verdict.REJECTED)
    made_up.submitted("a")
    made_up.started("a")
    made_up.finished("a")
    check_task_ends(made_up.record)


def test_a_start_after_the_end_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a")
    made_up.finished("a")
    made_up.started("a")
    assert "started at 3.000 s, after it had ended at 2.000 s" in violations(lambda: check_task_ends(made_up.record))


def test_a_start_that_repeats_its_attempt_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a")
    made_up.started("a")
    made_up.started("a", attempt=2)
    made_up.started("a")
    made_up.finished("a")
    assert violations(lambda: check_task_ends(made_up.record)) == (
        "task 'a' (work, NORMAL) started 2 times as attempt 1: at 2.000 s, 4.000 s"
    )


def test_the_result_of_another_task_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a")
    made_up.finished("a", of="b")
    assert "ended with the result of another task" in violations(lambda: check_task_ends(made_up.record))


def test_a_count_that_differs_from_the_events_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("a")
    made_up.finished("a")
    assert violations(lambda: check_counts(made_up.record)).splitlines() == [
        "events have 1 submitted, and statistics 0",
        "events have 1 admitted, and statistics 0",
        "events have 1 succeeded, and statistics 0",
    ]


@virtual
async def test_an_unresolved_ticket_is_named() -> None:
    held = HeldHandler()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=held, task_types=["work"])
        record = EventRecord(supervisor)
        ticket = await supervisor.submit(Task("work", task_id="a"))
        assert "Ticket('a', ADMITTED, RUNNING) has not been resolved" in violations(
            lambda: check_task_ends(record, tickets=[ticket])
        )
        held.release()
        await ticket
        check_task_ends(record, tickets=[ticket])


def test_long_lists_are_shortened() -> None:
    made_up = MadeUpRecord()
    for number in range(30):
        made_up.submitted(f"t{number}")
    with pytest.raises(InvariantViolation, match="and 20 more") as raised:
        check_task_ends(made_up.record)
    assert len(raised.value.violations) == 30
    assert "t15" not in str(raised.value)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_worker_above_its_limit_at_any_event_is_named() -> None:
    made_up = MadeUpRecord(slots=2)
    made_up.worker.current_tasks = 2
    made_up.submitted("a")
    check_limits(made_up.record)
    made_up.worker.current_tasks = 3
    made_up.submitted("b")
    made_up.worker.current_tasks = -1
    made_up.submitted("c")
    made_up.worker.current_tasks = 0
    made_up.submitted("d")
    assert violations(lambda: check_limits(made_up.record)).splitlines() == [
        "at 2.000 s, after submitted of task 'b' (work, NORMAL), worker 'w' held 3 of 2",
        "at 3.000 s, after submitted of task 'c' (work, NORMAL), worker 'w' held -1 of 2",
    ]


def test_more_started_than_finished_tasks_are_named_whatever_the_worker_reports() -> None:
    made_up = MadeUpRecord(slots=2)
    for task_id in ("a", "b", "c"):
        made_up.submitted(task_id)
        made_up.started(task_id)
    assert violations(lambda: check_limits(made_up.record)).startswith(
        "task 'c' (work, NORMAL) started at 6.000 s on worker 'w', which runs 2 at a time, while ['a', 'b'] ran there"
    )
    check_limits(made_up.record, nested=True)


def test_a_finished_run_does_not_count_against_the_limit() -> None:
    made_up = MadeUpRecord(slots=1)
    for task_id in ("a", "b", "c"):
        made_up.submitted(task_id)
        made_up.started(task_id)
        made_up.finished(task_id)
    check_limits(made_up.record)


# --- priorities -------------------------------------------------------------------------------------------------------


def test_a_task_that_overtakes_a_better_one_is_named() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("low", Priority.LOW)
    made_up.submitted("high", Priority.HIGH)
    made_up.started("low")
    assert violations(lambda: check_priorities(made_up.record)) == (
        "task 'low' (work, LOW) started at 3.000 s, while task 'high' (work, HIGH) waited"
    )


def test_a_better_task_that_came_later_or_is_spilled_or_finished_is_no_inversion() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("low", Priority.LOW)
    made_up.submitted("spilled", Priority.HIGH, verdict=Verdict.SPILLED)
    made_up.submitted("cancelled", Priority.HIGH)
    made_up.finished("cancelled", TaskStatus.CANCELLED)
    made_up.started("low")
    made_up.submitted("late", Priority.HIGH)
    check_priorities(made_up.record)


def test_a_refilled_task_waits_with_its_priority() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("high", Priority.HIGH, verdict=Verdict.SPILLED)
    made_up.submitted("low", Priority.LOW)
    made_up.refilled("high")
    made_up.started("low")
    assert "'low'" in violations(lambda: check_priorities(made_up.record))


@pytest.mark.parametrize(("before", "allowed"), [(19, False), (20, True)])
def test_one_in_twenty_one_may_have_a_lower_priority(before: int, *, allowed: bool) -> None:
    made_up = MadeUpRecord()
    made_up.submitted("low", Priority.LOW)
    for number in range(before + 1):
        made_up.submitted(f"high-{number}", Priority.HIGH)
    for number in range(before):
        made_up.started(f"high-{number}")
    made_up.started("low")
    if allowed:
        check_priorities(made_up.record)
    else:
        assert "'low'" in violations(lambda: check_priorities(made_up.record))


def test_tasks_of_a_thread_are_not_compared() -> None:
    made_up = MadeUpRecord()
    made_up.submitted("low", Priority.LOW)
    made_up.submitted("high", Priority.HIGH)
    made_up.record.tasks["high"] = Task("work", task_id="high", priority=Priority.HIGH, thread_id="t")
    made_up.started("low")
    check_priorities(made_up.record)


@virtual
async def test_a_queue_that_serves_the_wrong_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PriorityQueue, "_next_priority", lambda queue: max(p for p, length in enumerate(queue._lengths) if length)
    )
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
        for priority in (Priority.NORMAL, Priority.LOW, Priority.CRITICAL):
            supervisor.submit_nowait(Task("work", priority=priority))
    assert "CRITICAL) waited" in violations(lambda: check_priorities(record))


# --- spilled tasks ----------------------------------------------------------------------------------------------------


def test_a_lost_spilled_task_is_named() -> None:
    made_up = MadeUpRecord(overflow="memory://")
    made_up.submitted("a", verdict=Verdict.SPILLED)
    assert violations(lambda: check_spills(made_up.record)).splitlines() == [
        "1 were neither refilled nor ended, and 0 are in the overflow",
        "task 'a' (work, NORMAL) was SPILLED at 1.000 s, and is lost",
    ]
    made_up.refilled("a")
    check_spills(made_up.record)


def test_a_spilled_task_that_starts_without_a_refill_is_named() -> None:
    made_up = MadeUpRecord(overflow="memory://")
    made_up.submitted("a", verdict=Verdict.SPILLED)
    made_up.started("a")
    assert "started at 2.000 s without a refill" in violations(lambda: check_spills(made_up.record))


@virtual
async def test_a_task_in_the_overflow_is_not_reported_as_lost() -> None:
    async with BackpressureSupervisor(overflow="memory://") as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
        with overload(supervisor):
            await supervisor.submit(Task("work"))
            check_spills(record)


# --- held resources ---------------------------------------------------------------------------------------------------


@virtual
async def test_resources_held_by_a_supervisor_are_named() -> None:
    held = HeldHandler()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=held, task_types=["work"])
        await supervisor.submit(Task("work", task_id="a"))
        await supervisor.submit(Task("work", task_id="b"))
        assert violations(lambda: check_nothing_left(supervisor)).splitlines() == [
            "worker 'w' still runs ['a']",
            (
                "the queue of 'work' holds ['b'], 0 tasks behind their thread, 0 tasks to be retried,"
                " 0 places for records, 0 tasks being spilled"
            ),
            "Ticket('a', ADMITTED, RUNNING) has not been resolved",
            "Ticket('b', ADMITTED, WAITING) has not been resolved",
        ]
        held.release()
        await run_ready()
        check_nothing_left(supervisor)
    check_nothing_left(supervisor)


@virtual
async def test_a_zombie_is_named_unless_allowed() -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        supervisor.register_worker("w", handler=UncancellableHandler(100.0), task_types=["work"], timeout=1.0)
        await (await supervisor.submit(Task("work", task_id="stubborn")))
        await asyncio.sleep(5.0)
    assert violations(lambda: check_nothing_left(supervisor)) == "worker 'w' still runs ['stubborn']"
    check_nothing_left(supervisor, zombies=True)
    await asyncio.sleep(100.0)
    check_nothing_left(supervisor)


@virtual
async def test_a_leaked_slot_is_named() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"], max_concurrent=2)
        await supervisor.run(Task("work"))
        worker.current_tasks += 1
        assert violations(lambda: check_nothing_left(supervisor)) == "worker 'w' holds 1 slots for 0 runs"
        worker.current_tasks -= 1


@virtual
async def test_a_remaining_timer_and_background_task_are_named() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
    check_nothing_left(supervisor)
    dispatcher = supervisor._dispatcher
    assert dispatcher is not None
    dispatcher.core.timers._closed = False  # a closed one sets none
    dispatcher.core.timers.at(1e6, lambda: None)
    assert violations(lambda: check_nothing_left(supervisor)) == "timers are set, although it is closed"
    dispatcher.core.timers.close()
    dispatcher.core.run_in_background(asyncio.sleep(1.0))
    assert violations(lambda: check_nothing_left(supervisor)).startswith("1 background tasks are running")
    await asyncio.sleep(2.0)


def test_a_supervisor_that_never_started_holds_nothing() -> None:
    check_nothing_left(BackpressureSupervisor())


# --- upstreams --------------------------------------------------------------------------------------------------------


@virtual
async def test_resources_held_by_an_upstream_are_named() -> None:
    upstream = Upstream(
        "llm",
        max_concurrent=1,
        quotas=[Quota(requests=9, per="minute")],
        budget=Budget(usd=9.0),
        prices={"": Price(input=1e6, output=1e6)},
    )
    account = upstream.core.accounts.account("")
    account.account.breaker.trip(-100.0)
    account.add_expected_calls(1)
    async with upstream.call(input_tokens=2):
        waiting = asyncio.create_task(SlowHandler(1.0)(Task("work")))
        assert violations(lambda: check_upstream(upstream)).splitlines() == [
            "upstream:llm counts 1 calls in flight",
            "1 calls hold quotas of upstream:llm",
            "the breaker of upstream:llm waits for 1 probes",
            "upstream:llm expects 1 calls",
            "1 calls hold $2 of the budget of llm",
        ]
        await waiting
    account.add_expected_calls(-1)
    check_upstream(upstream)


@virtual
async def test_a_queued_call_and_an_exceeded_limit_are_named() -> None:
    upstream = Upstream("llm", max_concurrent=1)

    async def call() -> None:
        async with upstream.call():
            await run_ready()

    async with upstream.call():
        waiting = asyncio.create_task(call())
        await run_ready()
        assert "1 calls are queued in upstream:llm" in violations(lambda: check_upstream(upstream))
    await waiting
    check_upstream(upstream)
    upstream.core.accounts.account("").account.peak_in_flight = 2
    assert violations(lambda: check_upstream(upstream)) == "upstream:llm had 2 calls in flight of 1"
