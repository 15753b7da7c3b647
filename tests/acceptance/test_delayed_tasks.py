"""Retries of stored tasks: they wait in their store, any process may make the next attempt, and none is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, UncancellableHandler, error_of, find_result, find_ticket, now, virtual

from forebay import BackpressureSupervisor, Deadline, Overloaded, Retry, Task, TaskStatus, Ticket, Verdict, clock
from forebay.errors import StillSpilled, StoreUnavailable, TaskFailed
from forebay.events import Event, TaskRefilled, TaskRetried
from forebay.interfaces import Lease, RecordState, TaskStore, WakeResult
from forebay.overflow import MemoryTaskStore, SqliteTaskStore
from forebay.retry import RetryBudget

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

LONG = Retry(max_attempts=5, base_delay=1000.0, max_delay=1000.0, max_total_delay=1e6)
SHORT = Retry(max_attempts=5, base_delay=0.5, max_delay=0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


class Failing:
    """A handler that fails the first attempts at each task, and knows when each was made.

    Args:
        failures: how many attempts at a task fail.
        seconds: an attempt takes.
        error: what those that fail raise.
    """

    def __init__(self, failures: int, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.failures = failures
        self.seconds = seconds
        self.error = ConnectionError("no answer") if error is None else error
        self.attempts: list[tuple[Any, float]] = []  # payload and time
        self.running = 0

    async def __call__(self, task: Task) -> Any:
        self.attempts.append((task.payload, now()))
        self.running += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if sum(payload == task.payload for payload, _ in self.attempts) <= self.failures:
            raise self.error
        return task.payload

    @property
    def payloads(self) -> list[Any]:
        return [payload for payload, _ in self.attempts]


def make_supervisor(
    overflow: Path | TaskStore, handler: Any, *, retry: Retry | None = SHORT, slots: int = 1, **options: Any
) -> BackpressureSupervisor:
    store = overflow if not isinstance(overflow, Path) else f"sqlite:///{overflow}?fsync=no"
    supervisor = BackpressureSupervisor(overflow=store, **options)
    supervisor.register_worker(
        "worker", handler=handler, task_types=["work"], max_concurrent=slots, retry=retry, timeout=5.0
    )
    return supervisor


async def state_in(path: Path, task_id: str) -> RecordState | None:
    store = SqliteTaskStore(path)
    await store.open()
    found = await store.find(task_id)
    await store.close()
    return None if found is None else found[0]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - virtual time
        await asyncio.sleep(0.01)


# --- where it waits ---------------------------------------------------------------------------------------------------


@virtual
async def test_a_durable_task_waits_for_its_retry_in_the_store(path: Path) -> None:
    events: list[Event] = []
    handler = Failing(1)
    async with make_supervisor(path, handler, retry=LONG, on_event=events.append) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(0.1)
        assert ticket.status is TaskStatus.SPILLED
        assert await state_in(path, "a") is RecordState.DELAYED
        statistics = supervisor.statistics()
        assert (statistics.outside, statistics.waiting, statistics.running, statistics.delayed) == (1, 0, 0, 0)
        result = await ticket
    assert (result.status, result.attempts, result.result) == (TaskStatus.SUCCEEDED, 2, "a")
    (retried,) = [event for event in events if isinstance(event, TaskRetried)]
    assert (retried.task_id, retried.attempt) == ("a", 1)
    assert handler.attempts[1][1] - handler.attempts[0][1] == pytest.approx(retried.delay, abs=0.02)
    assert [event.task_id for event in events if isinstance(event, TaskRefilled)] == ["a"]


@pytest.mark.parametrize("overflow", ["sqlite", "memory"])
@virtual
async def test_a_retry_in_the_store_does_not_wait_for_maintenance(overflow: str, path: Path) -> None:
    handler = Failing(3)
    store = MemoryTaskStore() if overflow == "memory" else path
    async with make_supervisor(store, handler, max_queue_size=0, lease=300.0) as supervisor:
        busy = await supervisor.submit(Task("work", "busy", spill=False, retry=Retry(max_attempts=1)))
        spilled = await supervisor.submit(Task("work", "spilled"))
        assert spilled.verdict is Verdict.SPILLED
        assert (await busy).status is TaskStatus.FAILED
        assert await spilled.value() == "spilled"
        assert now() < 2.0
    assert handler.payloads == ["busy"] + ["spilled"] * 4


@virtual
async def test_many_retries_in_the_store_come_each_in_time(path: Path) -> None:
    handler = Failing(1, error=Overloaded("full", limited_by="model", load=1.0, retry_after=0.0))  # not its own fault
    events: list[Event] = []
    retry = Retry(max_attempts=2, base_delay=20.0, max_delay=20.0)
    budget = RetryBudget(extra=1000)
    async with make_supervisor(
        path, handler, retry=retry, slots=50, retry_budget=budget, on_event=events.append
    ) as supervisor:
        tickets = [await supervisor.submit(Task("work", number, durable=True)) for number in range(40)]
        assert {(await ticket).status for ticket in tickets} == {TaskStatus.SUCCEEDED}
    due = {event.task_id: event.at + event.delay for event in events if isinstance(event, TaskRetried)}
    came = {event.task_id: event.at for event in events if isinstance(event, TaskRefilled)}
    assert len(due) == len(came) == 40
    assert all(abs(came[task_id] - due[task_id]) < 0.1 for task_id in due)


@virtual
async def test_delayed_records_keep_no_new_task_outside(path: Path) -> None:
    handler = Failing(1)
    async with make_supervisor(path, handler, retry=LONG) as supervisor:
        await supervisor.submit(Task("work", "a", durable=True))
        await asyncio.sleep(0.1)
        handler.failures = 0
        new = await supervisor.submit(Task("work", "new"))
        assert new.verdict is Verdict.ADMITTED
        assert await new.value() == "new"


@virtual
async def test_a_task_that_timed_out_waits_in_the_store_once_its_handler_has_stopped(path: Path) -> None:
    handler = Failing(0, seconds=60.0)
    async with make_supervisor(path, handler, retry=LONG) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(5.1)
        assert handler.running == 0
        assert await state_in(path, "a") is RecordState.DELAYED
        handler.seconds = 0.0
        result = await ticket
    assert (result.status, result.attempts) == (TaskStatus.SUCCEEDED, 2)


@virtual
async def test_a_task_whose_handler_does_not_stop_is_tried_again_beside_it(path: Path) -> None:
    stubborn = UncancellableHandler(60.0)
    async with make_supervisor(path, stubborn, slots=2, zombie_grace=1.0, retry=SHORT) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", durable=True))
        await until(lambda: len(stubborn.calls) == 2)
        assert 6.0 <= now() < 8.0
        assert ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED


# --- other processes --------------------------------------------------------------------------------------------------


@virtual
async def test_another_process_makes_the_next_attempt_and_counts_those_before(path: Path) -> None:
    first_handler, second_handler = Failing(99), Failing(99)
    retry = Retry(max_attempts=3, base_delay=30.0, max_delay=30.0)
    first = make_supervisor(path, first_handler, retry=retry)
    await first.start()
    ticket = await first.submit(Task("work", "a", task_id="a", durable=True))
    await asyncio.sleep(0.1)
    await first.close()
    assert isinstance(await error_of(ticket), StillSpilled)
    async with make_supervisor(path, second_handler, retry=retry) as second:
        result = await find_result(second, "a")
        assert (result.status, result.attempts) == (TaskStatus.FAILED, 3)
        assert result.error == "ConnectionError: no answer"
        (letter,) = await second.dead_letters.page()
        assert (letter.task_id, letter.attempts, letter.error) == ("a", 3, result.error)
    assert (len(first_handler.attempts), len(second_handler.attempts)) == (1, 2)


@virtual
async def test_a_restart_wakes_a_retry_when_it_is_due_and_not_before(path: Path) -> None:
    handler, events = Failing(1), list[Event]()
    first = make_supervisor(path, handler, retry=LONG, on_event=events.append)
    await first.start()
    await first.submit(Task("work", "a", task_id="a", durable=True))
    await asyncio.sleep(0.1)
    await first.close()
    (retried,) = [event for event in events if isinstance(event, TaskRetried)]
    async with make_supervisor(path, handler, retry=LONG, lease=600.0) as second:
        assert (await find_result(second, "a")).success
    assert handler.attempts[1][1] == pytest.approx(retried.at + retried.delay, abs=0.1)


@virtual
async def test_a_ticket_in_another_process_follows_the_retries_of_a_task(path: Path) -> None:
    async with make_supervisor(path, Failing(2), slots=1) as first:
        await first.submit(Task("work", "a", task_id="a", durable=True))
        watcher = BackpressureSupervisor(overflow=f"sqlite:///{path}")
        watcher.register_worker("other", handler=Agent(), task_types=["other"])
        async with watcher:
            result = await find_result(watcher, "a")
            assert (result.status, result.result, result.attempts) == (TaskStatus.SUCCEEDED, "a", 3)


@virtual
async def test_a_ticket_in_another_process_knows_the_attempts_of_a_task(path: Path) -> None:
    handler = Failing(99)
    retry = Retry(max_attempts=3, base_delay=1000.0, max_delay=1000.0, max_total_delay=1e6)
    async with make_supervisor(path, handler, retry=retry) as first:
        await first.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(0.1)
        watcher = BackpressureSupervisor(overflow=f"sqlite:///{path}")
        watcher.register_worker("other", handler=Agent(), task_types=["other"])
        async with watcher:
            ticket = await find_ticket(watcher, "a")
            assert (ticket.verdict, ticket.status, ticket.attempts) == (Verdict.SPILLED, TaskStatus.SPILLED, 1)
            await until(lambda: len(handler.attempts) == 2)
            await asyncio.sleep(60.0)  # it asks now and then
            assert (ticket.status, ticket.attempts) == (TaskStatus.SPILLED, 2)
            assert (await ticket).attempts == ticket.attempts == 3
    async with watcher:
        letter = await find_ticket(watcher, "a")
        assert (letter.status, letter.attempts, letter.as_dict()["attempts"]) == (TaskStatus.FAILED, 3, 3)


@virtual
async def test_a_task_that_is_cancelled_where_it_was_looked_up_has_the_attempts_of_its_record(path: Path) -> None:
    first = make_supervisor(path, Failing(99), retry=LONG)
    await first.start()
    await first.submit(Task("work", "a", task_id="a", durable=True))
    await asyncio.sleep(0.1)
    await first.close()
    watcher = BackpressureSupervisor(overflow=f"sqlite:///{path}")
    watcher.register_worker("other", handler=Agent(), task_types=["other"])
    async with watcher:
        ticket = await find_ticket(watcher, "a")
        assert ticket.cancel()
        result = await ticket
        assert (result.status, result.attempts) == (TaskStatus.CANCELLED, 1)


@virtual
async def test_a_delay_used_up_in_one_process_counts_in_the_next(path: Path) -> None:
    retry = Retry(max_attempts=100, base_delay=10.0, max_delay=10.0, max_total_delay=60.0)
    handler = Failing(99)
    budget = RetryBudget(extra=10_000)
    for _ in range(20):
        supervisor = make_supervisor(path, handler, retry=retry, retry_budget=budget)
        await supervisor.start()
        if not handler.attempts:
            await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(7.0)
        await supervisor.close()
    assert await state_in(path, "a") is RecordState.DEAD
    assert handler.attempts[-1][1] - handler.attempts[0][1] < 60.0 + 20 * 0.5


@virtual
async def test_lost_processes_do_not_use_up_retries_nor_retries_lost_processes(path: Path) -> None:
    """Three failures, and then two processes that vanish: with `max_attempts` of 3 the task still runs."""
    store = SqliteTaskStore(path)
    await store.open()
    handler = Failing(3)
    first = make_supervisor(path, handler, retry=Retry(max_attempts=9, base_delay=0.1, max_delay=0.1))
    await first.start()
    ticket = await first.submit(Task("work", "a", task_id="a", durable=True))
    await until(lambda: len(handler.attempts) == 3)
    handler.failures = 99
    await first.close()
    del ticket
    for _ in range(2):
        await asyncio.sleep(1.0)
        await store.wake(now=clock.wall_time())
        (lease,) = await store.lease("work", 1, until=clock.wall_time() - 1.0)
        await store.begin_attempt(lease)
        assert list(await store.reap(now=clock.wall_time(), max_attempts=3)) == []
    await store.close()
    handler.failures = 0
    async with make_supervisor(path, handler) as second:
        result = await find_result(second, "a")
        assert (result.status, result.attempts) == (TaskStatus.SUCCEEDED, 6)


# --- conversations ----------------------------------------------------------------------------------------------------


@virtual
async def test_a_message_keeps_its_place_in_its_conversation_while_it_waits_in_the_store(path: Path) -> None:
    handler = Failing(1)
    async with make_supervisor(path, handler, retry=LONG, slots=3) as supervisor:
        first = await supervisor.submit(Task("work", 1, thread_id="t", durable=True))
        await asyncio.sleep(0.1)
        handler.failures = 0
        handler.attempts.clear()
        later = [await supervisor.submit(Task("work", number, thread_id="t")) for number in (2, 3)]
        other = await supervisor.submit(Task("work", "other", thread_id="u"))
        assert await other.value() == "other"
        assert [await ticket.value() for ticket in (first, *later)] == [1, 2, 3]
    assert handler.payloads == ["other", 1, 2, 3]


@virtual
async def test_a_message_with_others_behind_it_here_waits_here(path: Path) -> None:
    handler = Failing(1, seconds=1.0)
    async with make_supervisor(path, handler, retry=Retry(max_attempts=2, base_delay=10.0), slots=3) as supervisor:
        first = await supervisor.submit(Task("work", 1, thread_id="t", durable=True))
        second = await supervisor.submit(Task("work", 2, thread_id="t", retry=Retry(max_attempts=1)))
        await asyncio.sleep(1.1)
        assert first.status is TaskStatus.WAITING
        assert await first.value() == 1
        assert (await second).status is TaskStatus.FAILED
    assert handler.payloads == [1, 1, 2]


@virtual
async def test_a_conversation_goes_on_when_a_message_that_waits_for_its_retry_is_cancelled(path: Path) -> None:
    handler = Failing(1)
    async with make_supervisor(path, handler, retry=LONG) as supervisor:
        first = await supervisor.submit(Task("work", 1, thread_id="t", durable=True))
        await asyncio.sleep(0.1)
        handler.failures = 0
        second = await supervisor.submit(Task("work", 2, thread_id="t"))
        assert second.verdict is Verdict.SPILLED
        first.cancel()
        assert (await first).status is TaskStatus.CANCELLED
        assert await second.value() == 2
        assert supervisor.statistics().outside == 0
    assert handler.payloads == [1, 2]


# --- ends -------------------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_that_waits_for_its_retry_in_the_store_can_be_cancelled(path: Path) -> None:
    handler = Failing(99)
    async with make_supervisor(path, handler, retry=LONG) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(0.1)
        assert ticket.cancel("enough")
        result = await ticket
        assert (result.status, result.error) == (TaskStatus.CANCELLED, "enough")
        assert await state_in(path, "a") is RecordState.DONE
        await asyncio.sleep(2000.0)
    assert len(handler.attempts) == 1


@pytest.mark.parametrize("overflow", ["memory", "sqlite"])
@virtual
async def test_a_delayed_record_that_was_woken_and_has_ended_is_counted_no_more(overflow: str, path: Path) -> None:
    store = MemoryTaskStore() if overflow == "memory" else path
    async with make_supervisor(store, Failing(0)) as supervisor:
        supervisor.pause("work")  # nothing is taken back, which would count again
        ticket = await supervisor.submit(Task("work", "a", not_before=clock.wall_time() + 1.0))
        await asyncio.sleep(1.1)
        assert supervisor.statistics().outside == 1
        ticket.cancel()
        await ticket
        await asyncio.sleep(0.1)
        assert supervisor.statistics().outside == 0


@virtual
async def test_a_task_that_waits_for_its_retry_in_the_store_expires_at_its_deadline(path: Path) -> None:
    handler = Failing(99)
    retry = Retry(max_attempts=99, base_delay=20.0, max_delay=20.0, max_total_delay=1e6)
    async with make_supervisor(path, handler, retry=retry) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", durable=True, deadline=Deadline.within(60.0)))
        result = await ticket
        assert result.status in (TaskStatus.FAILED, TaskStatus.EXPIRED)
        assert now() <= 60.1


@virtual
async def test_the_waiters_of_a_task_that_fails_for_good_get_the_error_of_its_last_attempt(path: Path) -> None:
    async with make_supervisor(path, Failing(99), retry=Retry(max_attempts=2, base_delay=0.1)) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        error = await error_of(ticket.value())
        assert isinstance(error, TaskFailed)
        assert isinstance(error.__cause__, ConnectionError)
        assert [letter.attempts for letter in [each async for each in supervisor.dead_letters]] == [2]


@virtual
async def test_a_stored_task_that_the_retry_budget_refuses_ends_with_its_last_error(path: Path) -> None:
    retry = Retry(max_attempts=9, base_delay=1.0, max_total_delay=5.0)
    budget = RetryBudget(share=0.0, extra=0)
    async with make_supervisor(path, handler := Failing(99), retry=retry, retry_budget=budget) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", durable=True))
        result = await ticket
        assert result.status is TaskStatus.FAILED
        assert result.error is not None
        assert "ConnectionError: no answer" in result.error
        assert "retry budget" in result.error
        assert len([each async for each in supervisor.dead_letters]) == 1
    assert len(handler.attempts) == 1


# --- draining and closing ---------------------------------------------------------------------------------------------


@virtual
async def test_draining_leaves_a_task_that_waits_for_its_retry_in_the_store(path: Path) -> None:
    handler = Failing(1)
    supervisor = make_supervisor(path, handler, retry=LONG)
    await supervisor.start()
    waits = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
    await asyncio.sleep(0.1)
    asked = now()
    await supervisor.drain()
    assert now() - asked < 1.0
    assert isinstance(await error_of(waits), StillSpilled)
    await supervisor.close()
    assert await state_in(path, "a") is RecordState.DELAYED


@virtual
async def test_an_attempt_that_fails_while_draining_is_left_to_the_next_process(path: Path) -> None:
    handler = Failing(1, seconds=2.0)
    supervisor = make_supervisor(path, handler, retry=LONG)
    await supervisor.start()
    runs = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
    await asyncio.sleep(1.0)
    report = await supervisor.drain()
    assert (report.spilled, report.cancelled, report.unanswered) == (1, 0, 0)
    assert isinstance(await error_of(runs), StillSpilled)
    await supervisor.close()
    assert await state_in(path, "a") is RecordState.DELAYED


@virtual
async def test_draining_waits_for_retries_in_a_store_that_ends_with_the_process() -> None:
    handler = Failing(1)
    supervisor = make_supervisor(MemoryTaskStore(), handler, max_queue_size=0, retry=Retry(base_delay=20.0))
    await supervisor.start()
    await supervisor.submit(Task("work", "busy", spill=False, retry=Retry(max_attempts=1)))
    spilled = await supervisor.submit(Task("work", "spilled"))
    await until(lambda: "spilled" in handler.payloads)
    await asyncio.sleep(0.01)
    assert spilled.status is TaskStatus.SPILLED
    await supervisor.drain()
    assert (await spilled).success
    await supervisor.close()


@virtual
async def test_a_nested_task_that_fails_while_draining_is_tried_again_here(path: Path) -> None:
    inner = Failing(1, seconds=1.0)

    async def outer(_: Task) -> Any:
        return await (await supervisor.submit(Task("work", "inner", durable=True))).value()

    supervisor = make_supervisor(path, inner, retry=Retry(base_delay=5.0))
    supervisor.register_worker("outer", handler=outer, task_types=["outer"], timeout=60.0)
    await supervisor.start()
    ticket = await supervisor.submit(Task("outer"))
    await asyncio.sleep(0.5)
    await supervisor.drain()
    assert await ticket.value() == "inner"
    await supervisor.close()


@virtual
async def test_runs_whose_nested_tasks_wait_for_a_retry_in_the_store_do_not_block_it(path: Path) -> None:
    """Every slot is lent by a run that waits, and the queue is full: the retries must come back all the same."""

    async def handle(task: Task) -> Any:
        if task.payload == "inner":
            return await inner(task)
        return await (await supervisor.submit(Task("work", "inner", durable=True))).value()

    inner = Failing(2)
    supervisor = make_supervisor(path, handle, slots=2, max_queue_size=2)
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("work", "outer")) for _ in range(4)]
        assert all(tickets)
        assert [await ticket.value() for ticket in tickets] == ["inner"] * 4


# --- a store that fails -----------------------------------------------------------------------------------------------


class FailingStore(SqliteTaskStore):
    """A store whose `delay` fails, or fails after it has written, or does not answer for a while; and `wake` too."""

    fails = 0
    loses_reply = False
    silent = 0.0
    wake_fails = 0

    async def delay(self, lease: Lease, *, due: float) -> bool:
        if self.loses_reply:
            await super().delay(lease, due=due)
        if self.fails:
            self.fails -= 1
            raise StoreUnavailable(where="here", why="it failed", advice="Wait.")
        delayed = await super().delay(lease, due=due)
        await asyncio.sleep(self.silent)
        return delayed

    async def wake(self, *, now: float) -> WakeResult:
        if self.wake_fails:
            self.wake_fails -= 1
            raise StoreUnavailable(where="here", why="it failed", advice="Wait.")
        return await super().wake(now=now)


@pytest.mark.parametrize("written", ["nothing", "the delay"])
@pytest.mark.parametrize("fails", [1, 3, 9999])
@virtual
async def test_a_task_that_cannot_be_delayed_in_the_store_is_tried_again_all_the_same(
    fails: int, written: str, path: Path
) -> None:
    store = FailingStore(path)
    store.fails, store.loses_reply = fails, written == "the delay"
    handler = Failing(1)
    async with make_supervisor(store, handler, retry=Retry(base_delay=8.0), lease=3.0, slots=3) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", durable=True))
        assert await ticket.value() == "a"
        await asyncio.sleep(30.0)
    assert handler.payloads == ["a", "a"]
    assert handler.attempts[1][1] - handler.attempts[0][1] < 10.0


@virtual
async def test_a_conversation_keeps_its_order_though_a_message_cannot_be_delayed_in_the_store(path: Path) -> None:
    store = FailingStore(path)
    store.fails = 9999
    handler = Failing(1)
    async with make_supervisor(store, handler, retry=Retry(base_delay=8.0), slots=3) as supervisor:
        first = await supervisor.submit(Task("work", 1, thread_id="t", durable=True))
        await asyncio.sleep(0.1)
        handler.failures = 0
        second = await supervisor.submit(Task("work", 2, thread_id="t"))
        assert [await ticket.value() for ticket in (first, second)] == [1, 2]
    assert handler.payloads == [1, 1, 2]


@virtual
async def test_a_task_can_be_cancelled_while_the_store_does_not_take_it_back(path: Path) -> None:
    store = FailingStore(path)
    store.fails = 9999
    async with make_supervisor(store, handler := Failing(99), retry=LONG) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(0.1)
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        assert now() < 2.0
    assert len(handler.attempts) == 1
    assert await state_in(path, "a") is RecordState.DONE


@virtual
async def test_a_task_that_comes_back_before_the_store_has_answered_runs_once(path: Path) -> None:
    store = FailingStore(path)
    store.silent = 10.0
    handler = Failing(1, seconds=1.0)
    async with make_supervisor(store, handler, retry=SHORT, slots=3, lease=3.0) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", durable=True))
        assert await ticket.value() == "a"
        await asyncio.sleep(60.0)
    assert handler.payloads == ["a", "a"]


@virtual
async def test_a_drain_ends_though_the_store_is_slow_to_take_back_a_task_whose_worker_is_gone(path: Path) -> None:
    store = FailingStore(path)
    store.silent = 3.0
    async with make_supervisor(store, Failing(9), retry=LONG) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(0.1)
        await supervisor.unregister_worker("worker")
        report = await supervisor.drain(timeout=0.5)
        assert (report.spilled, isinstance(await error_of(ticket), StillSpilled)) == (1, True)
    assert await state_in(path, "a") is RecordState.DELAYED


@virtual
async def test_a_store_that_cannot_wake_a_retry_is_asked_again(path: Path) -> None:
    store = FailingStore(path)
    handler = Failing(1)
    async with make_supervisor(store, handler, retry=SHORT, lease=600.0) as supervisor:
        store.wake_fails = 3
        assert await (await supervisor.submit(Task("work", "a", durable=True))).value() == "a"
        assert now() < 6.0


@virtual
async def test_a_lease_that_was_lost_leaves_the_retry_to_its_holder(path: Path) -> None:
    handler = Failing(1, seconds=1.0)
    async with make_supervisor(path, handler, retry=SHORT, lease=3.0) as supervisor:
        ticket: Ticket = await supervisor.submit(Task("work", "a", task_id="a", durable=True))
        await asyncio.sleep(0.5)
        store = SqliteTaskStore(path)
        await store.open()
        await store.reap(now=clock.wall_time() + 1000.0, max_attempts=9)
        (theirs,) = await store.lease("work", 1, until=clock.wall_time() + 1000.0)
        await asyncio.sleep(1.0)
        assert ticket.status is TaskStatus.SPILLED
        await asyncio.sleep(5.0)
        assert handler.payloads == ["a"]
        await store.release([theirs])
        await store.close()
        assert await ticket.value() == "a"
    assert handler.payloads == ["a", "a"]


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
@virtual
async def test_a_retry_comes_in_time_though_the_wall_clock_is_set(
    step: float, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = Failing(1)
    async with make_supervisor(path, handler, retry=Retry(base_delay=8.0)) as supervisor:
        ticket = await supervisor.submit(Task("work", "a", durable=True))
        await asyncio.sleep(0.1)
        real = clock.wall_time
        monkeypatch.setattr(clock, "wall_time", lambda: real() + step)
        assert await ticket.value() == "a"
        assert now() < 9.0


@virtual
async def test_what_is_stored_comes_back_once_a_retry_that_waits_here_has_been_given_up() -> None:
    handler = Failing(1, seconds=1.0)
    budget = RetryBudget(share=0.0, extra=0)
    supervisor = make_supervisor(MemoryTaskStore(), handler, max_queue_size=0, retry_budget=budget)
    async with supervisor:
        retry = Retry(max_attempts=2, base_delay=5.0, max_total_delay=20.0)
        given_up = await supervisor.submit(Task("work", "fails", spill=False, retry=retry))
        stored = await supervisor.submit(Task("work", "stored", retry=Retry(max_attempts=1)))
        assert stored.status is TaskStatus.SPILLED
        await until(lambda: "fails" in handler.payloads)
        await asyncio.sleep(0.01)
        assert stored.status is TaskStatus.SPILLED  # the one that waits for its retry has the only place
        assert "retry budget" in ((await given_up).error or "")
        ended = now()
        await stored
        assert now() <= ended + 3.0
