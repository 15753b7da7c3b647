"""Retries of stored tasks: they wait in their store, and no restart forgets an attempt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.test_retries import SLOWLY, THRICE, fail, retried
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import (
    Agent,
    UncancellableHandler,
    approximately,
    error_of,
    find_result,
    now,
    run_ready,
    virtual,
)
from tests.support.task_stores import DURABLE_STORES, STORES, StoreBackend

from forebay import BackpressureSupervisor, Deadline, Retry, Task, TaskStatus, Ticket
from forebay.errors import StillSpilled
from forebay.events import TaskDeadLettered, TaskStarted
from forebay.interfaces import RecordState, TaskRecord, TaskStore
from forebay.overflow import MemoryTaskStore, open_task_store
from forebay.retry import RetryBudget
from forebay.testing import EventRecord, FlakyHandler, HandlerDouble

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

SOON = Retry(max_attempts=3, base_delay=0.1, max_delay=0.1)


class DurableStore(MemoryTaskStore):
    """A store that survives the process, as far as a supervisor can tell, and outlives supervisors here."""

    durable = True

    async def close(self) -> None:
        """Keep the records."""


async def record_of(store: MemoryTaskStore, task_id: str) -> tuple[RecordState, TaskRecord]:
    found = await store.find(task_id)
    assert found is not None
    return found[0], found[1]


@pytest.fixture(params=STORES, ids=str)
def overflow(request: pytest.FixtureRequest, tmp_path: Path) -> TaskStore:
    """Return a store of each kind, which outlives its supervisors."""
    backend = request.param
    assert isinstance(backend, StoreBackend)
    return open_task_store(backend.fast_url(tmp_path)) if backend in DURABLE_STORES else DurableStore()


async def record_in(overflow: TaskStore, task_id: str) -> tuple[RecordState, TaskRecord]:
    """Return what a closed store has."""
    await overflow.open()
    found = await overflow.find(task_id)
    await overflow.close()
    assert found is not None
    return found[0], found[1]


class HangsLater(HandlerDouble):
    """A handler whose first attempts at a message with payload 1 fail, and the next one does not end."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def run(self, task: Task) -> Any:
        await asyncio.sleep(0.1)
        if task.payload == 1 and self.failures:
            self.failures -= 1
            raise ConnectionError(f"no answer, {self.failures} to come")
        await asyncio.sleep(1000.0 if task.payload == 1 else 0.0)
        return task.payload


async def submit_conversation(supervisor: BackpressureSupervisor) -> tuple[Ticket, Ticket]:
    """Submit a stored message, and one behind it that only this process has."""
    first = await supervisor.submit(Task("work", 1, task_id="first", thread_id="c", durable=True))
    second = await supervisor.submit(Task("work", 2, thread_id="c", spill=False))
    assert (first.status, second.status) == (TaskStatus.RUNNING, TaskStatus.WAITING)
    return first, second


def make_supervisor(store: Any, handler: Any, **options: Any) -> BackpressureSupervisor:
    worker = {name: options.pop(name) for name in ("timeout", "max_concurrent") if name in options}
    retry = options.pop("retry", SLOWLY)
    supervisor = BackpressureSupervisor(overflow=store, lease=5.0, **options)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=retry, **worker)
    return supervisor


@virtual
async def test_a_durable_task_waits_for_its_retry_in_the_store() -> None:
    store = DurableStore()
    async with make_supervisor(store, FlakyHandler(1)) as supervisor:
        record = EventRecord(supervisor)
        ticket = await supervisor.submit(Task("work", 7, durable=True))
        await run_ready()
        (retry,) = retried(record)
        state, stored = await record_of(store, ticket.task_id)
        assert (state, stored.attempts, stored.failures) == (RecordState.DELAYED, 1, 1)
        assert (ticket.status, supervisor.statistics().delayed) == (TaskStatus.SPILLED, 0)
        assert supervisor.workers["worker"].current_tasks == 0
        assert await supervisor.run(Task("work", 8)) == 8  # what is delayed keeps nothing else waiting
        assert now() == approximately(1.0) or now() < retry.delay
        result = await ticket
        assert (result.result, result.attempts) == (7, 2)
        assert now() == approximately(retry.delay)
    check_supervisor(record, tickets=[ticket])


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{path}/spill.db"])
@virtual
async def test_a_spilled_task_is_retried_until_it_is_a_dead_letter(url: str, tmp_path: Path) -> None:
    url = url.format(path=tmp_path)
    async with make_supervisor(url, Agent(1.0), retry=SOON, max_queue_size=0) as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("fails", handler=fail, task_types=["fail"], retry=SOON)
        busy = [supervisor.submit_nowait(Task("fail", spill=False)) for _ in range(1)]
        ticket = await supervisor.submit(Task("fail"))
        result = await ticket
        assert (result.status, result.attempts, ticket.verdict.name) == (TaskStatus.FAILED, 3, "SPILLED")
        assert [letter.task_id async for letter in supervisor.dead_letters] == [ticket.task_id]
        (letter,) = record.of_type(TaskDeadLettered)
        assert letter.error == "ConnectionError: no answer"
        await busy[0]


@virtual
async def test_a_restart_forgets_neither_the_retry_nor_the_attempts(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    policy = Retry(max_attempts=3, base_delay=30.0, max_delay=30.0)
    attempts = []
    for number in range(3):
        agent = Agent(error=ConnectionError(f"no answer {number}"), seconds=0.1)
        async with make_supervisor(url, agent, retry=policy) as supervisor:
            record = EventRecord(supervisor)
            if not number:
                ticket = await supervisor.submit(Task("work", task_id="t1", durable=True))
            await agent.wait_for_calls(1)
            await asyncio.sleep(0.2)
        attempts += [event.attempt for event in record.of_type(TaskStarted)]
        if not number:
            assert isinstance(await error_of(ticket), StillSpilled)
    assert attempts == [1, 2, 3]
    assert (record.results["t1"].status, record.results["t1"].attempts) == (TaskStatus.FAILED, 3)
    assert record.results["t1"].error == "ConnectionError: no answer 2"


@virtual
async def test_draining_moves_tasks_that_wait_for_a_retry_with_their_attempts() -> None:
    store = DurableStore()
    supervisor = make_supervisor(store, fail)
    async with supervisor:
        ticket = await supervisor.submit(Task("work", 7))
        await run_ready()
        assert supervisor.statistics().delayed == 1
        report = await supervisor.drain()
        assert (report.spilled, now()) == (1, approximately(0.0))
        assert isinstance(await error_of(ticket), StillSpilled)
    state, stored = await record_of(store, ticket.task_id)
    assert (state, stored.attempts, stored.failures) == (RecordState.WAITING, 1, 1)
    assert stored.last_error == "ConnectionError: no answer"
    async with make_supervisor(store, FlakyHandler(1)) as successor:
        result = await find_result(successor, ticket.task_id)
        assert (result.result, result.attempts) == (7, 3)


@virtual
async def test_a_message_whose_followers_are_here_waits_here() -> None:
    store = DurableStore()
    handler = FlakyHandler(1, seconds=1.0)
    async with make_supervisor(store, handler, max_concurrent=4) as supervisor:
        record = EventRecord(supervisor)
        first = await supervisor.submit(Task("work", 1, thread_id="c", durable=True))
        second = await supervisor.submit(Task("work", 2, thread_id="c"))
        await asyncio.sleep(1.5)
        assert (await record_of(store, first.task_id))[0] is RecordState.LEASED
        assert (supervisor.statistics().delayed, first.status) == (1, TaskStatus.WAITING)
        assert [(await ticket).result for ticket in (first, second)] == [1, 2]
    assert handler.started == [1, 1, 2]
    check_supervisor(record, tickets=[first, second])


@pytest.mark.parametrize("stop", ["close", "drain"])
@virtual
async def test_an_orderly_stop_keeps_the_failures_of_a_message_whose_followers_are_here(
    stop: str, overflow: TaskStore
) -> None:
    handler = HangsLater(failures=2)
    supervisor = make_supervisor(overflow, handler, retry=SOON)
    await supervisor.start()
    first, second = await submit_conversation(supervisor)
    await handler.wait_for_calls(3)  # the third attempt is cut off
    if stop == "drain":
        await supervisor.drain(timeout=1.0)
    await supervisor.close()
    assert isinstance(await error_of(first), StillSpilled)
    assert (await second).status is TaskStatus.CANCELLED
    state, stored = await record_in(overflow, "first")
    assert (state, stored.attempts, stored.failures) == (RecordState.WAITING, 2, 2)
    assert stored.last_error == "ConnectionError: no answer, 0 to come"
    assert 0.0 < stored.total_delay <= 0.2
    async with make_supervisor(overflow, fail, retry=SOON) as successor:
        record = EventRecord(successor)
        result = await find_result(successor, "first")
        assert (result.status, result.attempts, retried(record)) == (TaskStatus.FAILED, 3, [])
        assert [letter.task_id async for letter in successor.dead_letters] == ["first"]


@virtual
async def test_an_orderly_stop_keeps_the_failures_of_a_message_that_waits_for_its_retry_here(
    overflow: TaskStore,
) -> None:
    supervisor = make_supervisor(overflow, HangsLater(failures=2), retry=SLOWLY)
    await supervisor.start()
    await submit_conversation(supervisor)
    await asyncio.sleep(0.3)
    assert supervisor.statistics().delayed == 1
    await supervisor.close()
    state, stored = await record_in(overflow, "first")
    assert (state, stored.attempts, stored.failures) == (RecordState.WAITING, 1, 1)
    assert stored.total_delay > 0.1


@virtual
async def test_the_store_knows_the_failures_of_a_message_that_is_tried_again_here(overflow: TaskStore) -> None:
    """If this process is lost, they do not count as lost leases."""
    handler = HangsLater(failures=2)
    async with make_supervisor(overflow, handler, retry=SOON) as supervisor:
        first, _ = await submit_conversation(supervisor)
        await handler.wait_for_calls(3)
        found = await overflow.find("first")
        assert found is not None
        assert (found[0], found[1].attempts, found[1].failures) == (RecordState.LEASED, 3, 2)
        assert found[1].last_error == "ConnectionError: no answer, 0 to come"
        first.cancel()


@virtual
async def test_an_orderly_stop_keeps_the_failure_of_an_attempt_that_timed_out_and_has_not_stopped() -> None:
    store = DurableStore()
    supervisor = make_supervisor(store, UncancellableHandler(3.0), timeout=1.0, zombie_grace=2.5)
    await supervisor.start()
    ticket = await supervisor.submit(Task("work", durable=True))
    await asyncio.sleep(1.1)
    assert ticket.status is TaskStatus.WAITING
    await supervisor.close()
    state, stored = await record_of(store, ticket.task_id)
    assert (state, stored.attempts, stored.failures) == (RecordState.WAITING, 1, 1)
    assert stored.last_error == "it ran longer than its timeout of 1 s"


@virtual
async def test_a_failure_that_was_stored_while_its_handler_stopped_counts_once() -> None:
    store = DurableStore()
    async with make_supervisor(store, UncancellableHandler(3.0), timeout=1.0) as supervisor:
        ticket = await supervisor.submit(Task("work", durable=True))
        await asyncio.sleep(2.0)
        state, stored = await record_of(store, ticket.task_id)
        assert (state, stored.attempts, stored.failures) == (RecordState.LEASED, 1, 1)
        await asyncio.sleep(1.5)
        state, stored = await record_of(store, ticket.task_id)
        assert (state, stored.attempts, stored.failures) == (RecordState.DELAYED, 1, 1)
        ticket.cancel()


@virtual
async def test_messages_in_the_store_follow_one_that_waits_for_its_retry() -> None:
    handler = FlakyHandler(1, seconds=1.0)
    async with make_supervisor(DurableStore(), handler, max_concurrent=4) as supervisor:
        tickets = [await supervisor.submit(Task("work", number, thread_id="c", durable=True)) for number in range(3)]
        assert [(await ticket).result for ticket in tickets] == [0, 1, 2]
    assert handler.started == [0, 0, 1, 2]


@virtual
async def test_a_stored_task_that_ran_out_of_time_goes_to_its_store_once_its_handler_has_stopped() -> None:
    store = DurableStore()
    stubborn = UncancellableHandler(3.0)
    async with make_supervisor(store, stubborn, timeout=1.0) as supervisor:
        ticket = await supervisor.submit(Task("work", durable=True))
        await asyncio.sleep(2.0)
        assert (await record_of(store, ticket.task_id))[0] is RecordState.LEASED
        await asyncio.sleep(1.5)
        assert (await record_of(store, ticket.task_id))[0] is RecordState.DELAYED
        stubborn.seconds = 0.5
        result = await ticket
        assert (result.status, result.attempts, stubborn.peak) == (TaskStatus.SUCCEEDED, 2, 1)


@virtual
async def test_a_stored_task_can_be_cancelled_and_expires_while_it_waits_for_its_retry() -> None:
    store = DurableStore()
    policy = Retry(max_attempts=3, base_delay=500.0, max_delay=500.0, max_total_delay=1e6)
    async with make_supervisor(store, fail, retry=policy) as supervisor:
        ticket = await supervisor.submit(Task("work", durable=True))
        late = await supervisor.submit(Task("work", durable=True, deadline=Deadline.within(0.5)))
        await run_ready()
        assert ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        assert (await late).status in (TaskStatus.EXPIRED, TaskStatus.FAILED)
        assert now() < 1.0


@virtual
async def test_a_stored_task_whose_retry_the_budget_refuses_waits_on_without_an_attempt() -> None:
    store = DurableStore()
    budget = RetryBudget(share=0.0, extra=1, window=20.0)
    async with make_supervisor(store, FlakyHandler(2), retry_budget=budget, retry=THRICE) as supervisor:
        tickets = [await supervisor.submit(Task("work", number, durable=True)) for number in range(2)]
        results = [await ticket for ticket in tickets]
        assert [(result.success, result.attempts) for result in results] == [(True, 2)] * 2
        assert now() > 17.0


@virtual
async def test_a_stored_task_whose_retry_the_budget_refuses_for_too_long_is_a_dead_letter() -> None:
    budget = RetryBudget(share=0.0, extra=0)
    async with make_supervisor(DurableStore(), fail, retry_budget=budget, retry=THRICE) as supervisor:
        result = await (await supervisor.submit(Task("work", durable=True)))
        assert (result.status, result.attempts) == (TaskStatus.FAILED, 1)
        assert result.error == (
            "ConnectionError: no answer; it is not retried, because the retry budget of the supervisor is used up"
        )
        assert [letter.error async for letter in supervisor.dead_letters] == [result.error]


@virtual
async def test_the_policy_of_a_stored_task_goes_with_it() -> None:
    store = DurableStore()
    supervisor = make_supervisor(store, Agent(60.0), retry=None)
    await supervisor.start()
    ticket = await supervisor.submit(Task("work", durable=True, retry=Retry(max_attempts=2, base_delay=0.25)))
    await run_ready()
    await supervisor.close()
    async with make_supervisor(store, fail, retry=None) as successor:
        assert (await find_result(successor, ticket.task_id)).attempts == 2
