"""Each checker passes a supervisor that keeps its promises, and fails one that is made to break them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskResult, TaskStatus, Verdict
from forebay.admission import PriorityQueue
from forebay.events import Event, TaskFinished, TaskRefilled, TaskStarted, TaskSubmitted
from forebay.quota import Budget, Price, Quota
from forebay.testing import (
    BrokenPromise,
    EventRecord,
    FlakyHandler,
    HeldHandler,
    SlowHandler,
    UncancellableHandler,
    check_counts,
    check_limits,
    check_nothing_left,
    check_priorities,
    check_promises,
    check_spills,
    check_task_ends,
    check_upstream,
    overload,
    run_ready,
    virtual,
)
from forebay.upstream import Upstream

# --- a house that keeps them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "memory://"])
@virtual
async def test_a_busy_day_breaks_no_promise(overflow: str | None) -> None:
    supervisor = BackpressureSupervisor(max_queue_size=5, overflow=overflow, zombie_grace=0.5)
    record = EventRecord(supervisor)
    supervisor.register_worker("slow", handler=SlowHandler(1.0), task_types=["work"], max_concurrent=2)
    supervisor.register_worker("flaky", handler=FlakyHandler(chance=0.3), task_types=["work", "quick"])
    supervisor.register_worker("deaf", handler=UncancellableHandler(3.0), task_types=["deaf"], timeout=1.0)
    tickets = []
    async with supervisor:
        for number in range(60):
            kind = ("work", "quick", "deaf")[number % 3]
            deadline = Deadline.within(2.0) if number % 7 == 0 else None
            task = Task(kind, number, priority=Priority(number % 4), deadline=deadline)
            tickets.append(await supervisor.submit(task))
            if number % 10 == 9:
                tickets[-4].cancel()
                await asyncio.sleep(1.0)
    check_promises(record, tickets=tickets, zombies=True)
    await asyncio.sleep(3.0)
    check_promises(record, tickets=tickets)
    assert {status.name for status in record.statuses.values()} >= {"SUCCEEDED", "FAILED", "TIMED_OUT", "CANCELLED"}
    assert record.of_type(TaskRefilled) if overflow else record.submitted[-1].verdict is Verdict.REJECTED


# --- what is told, made up --------------------------------------------------------------------------------------------


class MadeUpRecord:
    """The record of a supervisor that tells what a test says."""

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


def wrong(check: Callable[[], None]) -> str:
    """What a check says is wrong; it must find something."""
    with pytest.raises(BrokenPromise) as broken:
        check()
    assert isinstance(broken.value, AssertionError)
    assert all(line in str(broken.value) for line in broken.value.wrong)
    return "\n".join(broken.value.wrong)


def test_a_task_that_never_ends_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("a", Priority.HIGH)
    assert wrong(lambda: check_task_ends(story.record)) == (
        "task 'a' (work, HIGH) was ADMITTED at 1.000 s and has not ended"
    )
    story.started("a")
    story.finished("a")
    check_task_ends(story.record)


def test_a_spilled_task_that_never_ends_is_named_unless_it_may_be_kept(tmp_path: Path) -> None:
    story = MadeUpRecord(overflow="memory://")
    story.submitted("a", verdict=Verdict.SPILLED)
    assert "'a' (work, NORMAL) was SPILLED at 1.000 s" in wrong(lambda: check_task_ends(story.record))
    check_task_ends(story.record, kept=1)
    story = MadeUpRecord(overflow=f"sqlite:///{tmp_path}/spill.db")
    story.submitted("a", verdict=Verdict.SPILLED)
    check_task_ends(story.record)
    assert "'a'" in wrong(lambda: check_task_ends(story.record, kept=0))


def test_a_task_that_ends_twice_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("a")
    story.started("a")
    story.finished("a")
    story.finished("a", TaskStatus.TIMED_OUT)
    assert wrong(lambda: check_task_ends(story.record)) == (
        "task 'a' (work, NORMAL) ended 2 times: SUCCEEDED at 3.000 s, TIMED_OUT at 4.000 s"
    )


def test_a_task_that_ends_under_two_supervisors_is_named() -> None:
    first, second = MadeUpRecord(), MadeUpRecord()
    for story in (first, second):
        story.submitted("a")
        story.finished("a")
        check_task_ends(story.record)
    assert wrong(lambda: check_task_ends(first.record, second.record)) == "task 'a' ended under 2 supervisors"


def test_what_one_supervisor_left_the_next_may_end() -> None:
    first, second = MadeUpRecord(), MadeUpRecord()
    first.submitted("a", verdict=Verdict.SPILLED)
    second.refilled("a")
    second.finished("a")
    check_task_ends(first.record, second.record, kept=0)


def test_a_rejected_task_that_runs_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("a", verdict=Verdict.REJECTED)
    check_task_ends(story.record)
    story.started("a")
    assert wrong(lambda: check_task_ends(story.record)) == (
        "task 'a' (work, NORMAL) was REJECTED, and yet started at 2.000 s"
    )


def test_a_task_that_was_rejected_and_came_back_is_none() -> None:
    story = MadeUpRecord()
    story.submitted("a", verdict=Verdict.REJECTED)
    story.submitted("a")
    story.started("a")
    story.finished("a")
    check_task_ends(story.record)


def test_a_start_after_the_end_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("a")
    story.finished("a")
    story.started("a")
    assert "began at 3.000 s, after it had ended at 2.000 s" in wrong(lambda: check_task_ends(story.record))


def test_a_start_that_repeats_its_attempt_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("a")
    story.started("a")
    story.started("a", attempt=2)
    story.started("a")
    story.finished("a")
    assert wrong(lambda: check_task_ends(story.record)) == (
        "task 'a' (work, NORMAL) began 2 times as attempt 1: at 2.000 s, 4.000 s"
    )


def test_the_result_of_another_task_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("a")
    story.finished("a", of="b")
    assert "ended with the result of another task" in wrong(lambda: check_task_ends(story.record))


def test_what_is_counted_otherwise_than_told_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("a")
    story.finished("a")
    assert wrong(lambda: check_counts(story.record)).splitlines() == [
        "1 were told as submitted, and 0 counted",
        "1 were told as admitted, and 0 counted",
        "1 were told as succeeded, and 0 counted",
    ]


@virtual
async def test_a_ticket_that_nobody_resolves_is_named() -> None:
    held = HeldHandler()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=held, task_types=["work"])
        record = EventRecord(supervisor)
        ticket = await supervisor.submit(Task("work", task_id="a"))
        assert "Ticket('a', ADMITTED, RUNNING) has not been resolved" in wrong(
            lambda: check_task_ends(record, tickets=[ticket])
        )
        held.release()
        await ticket
        check_task_ends(record, tickets=[ticket])


def test_long_lists_are_cut() -> None:
    story = MadeUpRecord()
    for number in range(30):
        story.submitted(f"t{number}")
    with pytest.raises(BrokenPromise, match="and 20 more") as broken:
        check_task_ends(story.record)
    assert len(broken.value.wrong) == 30
    assert "t15" not in str(broken.value)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_holds_too_much_at_any_event_is_named() -> None:
    story = MadeUpRecord(slots=2)
    story.worker.current_tasks = 2
    story.submitted("a")
    check_limits(story.record)
    story.worker.current_tasks = 3
    story.submitted("b")
    story.worker.current_tasks = -1
    story.submitted("c")
    story.worker.current_tasks = 0
    story.submitted("d")
    assert wrong(lambda: check_limits(story.record)).splitlines() == [
        "at 2.000 s, after submitted of task 'b' (work, NORMAL), worker 'w' held 3 of 2",
        "at 3.000 s, after submitted of task 'c' (work, NORMAL), worker 'w' held -1 of 2",
    ]


def test_more_begun_than_ended_is_named_whatever_the_worker_says_it_holds() -> None:
    story = MadeUpRecord(slots=2)
    for task_id in ("a", "b", "c"):
        story.submitted(task_id)
        story.started(task_id)
    assert wrong(lambda: check_limits(story.record)).startswith(
        "task 'c' (work, NORMAL) began at 6.000 s on worker 'w', which runs 2 at a time, while ['a', 'b'] ran there"
    )
    check_limits(story.record, nested=True)


def test_a_run_that_has_ended_takes_no_room() -> None:
    story = MadeUpRecord(slots=1)
    for task_id in ("a", "b", "c"):
        story.submitted(task_id)
        story.started(task_id)
        story.finished(task_id)
    check_limits(story.record)


# --- priorities -------------------------------------------------------------------------------------------------------


def test_a_task_that_overtakes_a_better_one_is_named() -> None:
    story = MadeUpRecord()
    story.submitted("low", Priority.LOW)
    story.submitted("high", Priority.HIGH)
    story.started("low")
    assert wrong(lambda: check_priorities(story.record)) == (
        "task 'low' (work, LOW) began at 3.000 s, while task 'high' (work, HIGH) waited"
    )


def test_a_better_task_that_comes_later_or_waits_outside_or_has_ended_is_no_inversion() -> None:
    story = MadeUpRecord()
    story.submitted("low", Priority.LOW)
    story.submitted("outside", Priority.HIGH, verdict=Verdict.SPILLED)
    story.submitted("gone", Priority.HIGH)
    story.finished("gone", TaskStatus.CANCELLED)
    story.started("low")
    story.submitted("late", Priority.HIGH)
    check_priorities(story.record)


def test_a_task_that_came_back_waits_with_its_priority() -> None:
    story = MadeUpRecord()
    story.submitted("high", Priority.HIGH, verdict=Verdict.SPILLED)
    story.submitted("low", Priority.LOW)
    story.refilled("high")
    story.started("low")
    assert "'low'" in wrong(lambda: check_priorities(story.record))


@pytest.mark.parametrize(("before", "allowed"), [(19, False), (20, True)])
def test_one_in_twenty_one_may_be_of_a_lower_priority(before: int, *, allowed: bool) -> None:
    story = MadeUpRecord()
    story.submitted("low", Priority.LOW)
    for number in range(before + 1):
        story.submitted(f"high-{number}", Priority.HIGH)
    for number in range(before):
        story.started(f"high-{number}")
    story.started("low")
    if allowed:
        check_priorities(story.record)
    else:
        assert "'low'" in wrong(lambda: check_priorities(story.record))


def test_tasks_of_a_thread_are_not_compared() -> None:
    story = MadeUpRecord()
    story.submitted("low", Priority.LOW)
    story.submitted("high", Priority.HIGH)
    story.record.tasks["high"] = Task("work", task_id="high", priority=Priority.HIGH, thread_id="t")
    story.started("low")
    check_priorities(story.record)


@virtual
async def test_a_line_that_serves_the_wrong_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PriorityQueue, "_next_rung", lambda line: max((r for r, n in enumerate(line._lengths) if n), default=None)
    )
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
        for priority in (Priority.NORMAL, Priority.LOW, Priority.CRITICAL):
            supervisor.submit_nowait(Task("work", priority=priority))
    assert "CRITICAL) waited" in wrong(lambda: check_priorities(record))


# --- spilled work -----------------------------------------------------------------------------------------------------


def test_a_spilled_task_that_is_nowhere_is_named() -> None:
    story = MadeUpRecord(overflow="memory://")
    story.submitted("a", verdict=Verdict.SPILLED)
    assert wrong(lambda: check_spills(story.record)).splitlines() == [
        "1 have neither come back nor ended, and 0 are outside",
        "task 'a' (work, NORMAL) was SPILLED at 1.000 s, and is nowhere",
    ]
    story.refilled("a")
    check_spills(story.record)


def test_a_spilled_task_that_begins_without_coming_back_is_named() -> None:
    story = MadeUpRecord(overflow="memory://")
    story.submitted("a", verdict=Verdict.SPILLED)
    story.started("a")
    assert "began at 2.000 s without coming back" in wrong(lambda: check_spills(story.record))


@virtual
async def test_what_is_outside_is_not_missed() -> None:
    async with BackpressureSupervisor(overflow="memory://") as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
        with overload(supervisor):
            await supervisor.submit(Task("work"))
            check_spills(record)


# --- what is left -----------------------------------------------------------------------------------------------------


@virtual
async def test_what_a_supervisor_holds_is_named() -> None:
    held = HeldHandler()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=held, task_types=["work"])
        await supervisor.submit(Task("work", task_id="a"))
        await supervisor.submit(Task("work", task_id="b"))
        assert wrong(lambda: check_nothing_left(supervisor)).splitlines() == [
            "worker 'w' still runs ['a']",
            "in the line of 'work' are ['b'], 0 behind their thread, 0 seats reserved, 0 on their way out",
            "Ticket('a', ADMITTED, RUNNING) has not been resolved",
            "Ticket('b', ADMITTED, WAITING) has not been resolved",
        ]
        held.release()
        await run_ready()
        check_nothing_left(supervisor)
    check_nothing_left(supervisor)


@virtual
async def test_a_zombie_is_left_unless_that_is_allowed() -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        supervisor.register_worker("w", handler=UncancellableHandler(100.0), task_types=["work"], timeout=1.0)
        await (await supervisor.submit(Task("work", task_id="deaf")))
        await asyncio.sleep(5.0)
    assert wrong(lambda: check_nothing_left(supervisor)) == "worker 'w' still runs ['deaf']"
    check_nothing_left(supervisor, zombies=True)
    await asyncio.sleep(100.0)
    check_nothing_left(supervisor)


@virtual
async def test_a_slot_that_leaked_is_named() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"], max_concurrent=2)
        await supervisor.run(Task("work"))
        worker.current_tasks += 1
        assert wrong(lambda: check_nothing_left(supervisor)) == "worker 'w' holds 1 slots for 0 runs"
        worker.current_tasks -= 1


@virtual
async def test_a_timer_and_a_chore_that_were_left_are_named() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
    check_nothing_left(supervisor)
    house = supervisor._dispatcher
    assert house is not None
    house.core.timers.at(1e6, lambda: None)
    assert wrong(lambda: check_nothing_left(supervisor)) == "timers are set, though it has closed"
    house.core.timers.close()
    house.core.run_in_background(asyncio.sleep(1.0))
    assert wrong(lambda: check_nothing_left(supervisor)).startswith("1 chores are under way")
    await asyncio.sleep(2.0)


def test_a_supervisor_that_never_started_holds_nothing() -> None:
    check_nothing_left(BackpressureSupervisor())


# --- the record -------------------------------------------------------------------------------------------------------


@virtual
async def test_a_record_tells_what_happened_until_it_is_stopped() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=SlowHandler(), task_types=["work"])
        with EventRecord(supervisor) as record:
            first = Task("work", "rivers", task_id="a")
            await supervisor.run(first)
        await supervisor.run(Task("work", task_id="b"))
    assert [event.kind for event in record.events] == ["submitted", "started", "finished"]
    assert record.for_task("a") == record.events
    assert record.started == ["a"]
    assert record.tasks == {"a": first}
    assert record.statuses == {"a": TaskStatus.SUCCEEDED}
    assert record.results["a"].result == "rivers"
    late = EventRecord(supervisor)
    check_counts(late)
    assert (record.baseline.submitted, late.baseline.submitted) == (0, 2)


# --- upstreams --------------------------------------------------------------------------------------------------------


@virtual
async def test_what_an_upstream_holds_is_named() -> None:
    upstream = Upstream(
        "llm",
        max_concurrent=1,
        quotas=[Quota(requests=9, per="minute")],
        budget=Budget(usd=9.0),
        prices={"": Price(input=1e6, output=1e6)},
    )
    desk = upstream.accounts.account("")
    desk.account.breaker.trip(-100.0)
    desk.add_expected_calls(1)
    async with upstream.call(input_tokens=2):
        waiting = asyncio.create_task(SlowHandler(1.0)(Task("work")))
        assert wrong(lambda: check_upstream(upstream)).splitlines() == [
            "upstream:llm counts 1 calls in flight",
            "1 calls hold quotas of upstream:llm",
            "the breaker of upstream:llm waits for 1 probes",
            "upstream:llm expects 1 runs",
            "1 calls hold $2 of the budget of llm",
        ]
        await waiting
    desk.add_expected_calls(-1)
    check_upstream(upstream)


@virtual
async def test_a_call_in_line_and_a_crowd_are_named() -> None:
    upstream = Upstream("llm", max_concurrent=1)

    async def call() -> None:
        async with upstream.call():
            await run_ready()

    async with upstream.call():
        waiting = asyncio.create_task(call())
        await run_ready()
        assert "in the line of upstream:llm wait 1 calls" in wrong(lambda: check_upstream(upstream))
    await waiting
    check_upstream(upstream)
    upstream.accounts.account("").account.peak_in_flight = 2
    assert wrong(lambda: check_upstream(upstream)) == "upstream:llm had 2 calls in flight of 1"
