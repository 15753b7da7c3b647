"""Retries of tasks: which attempts are followed by another, when, where, and how many of them there may be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import (
    Agent,
    UncancellableHandler,
    approximately,
    error_of,
    flood,
    now,
    run_ready,
    virtual,
)

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Overloaded,
    Priority,
    Retry,
    Task,
    TaskFailed,
    TaskStatus,
    TaskTimedOut,
    Upstream,
    progress,
)
from forebay.breaker import BreakerRules
from forebay.context import running_task
from forebay.errors import (
    InvalidSetting,
    InvalidTask,
    NotSerializable,
    RemoteError,
    UnusableTask,
    WouldDeadlock,
)
from forebay.events import TaskFinished, TaskProgress, TaskRetried, TaskStarted, WorkerFailed
from forebay.retry import RetryBudget
from forebay.testing import EventRecord, FlakyHandler, PassthroughSupervisor, ScriptedHandler

THRICE = Retry(max_attempts=3)
SLOWLY = Retry(max_attempts=3, base_delay=60.0, max_total_delay=1e6)  # up to a minute, then two


async def fail(_: Task) -> None:
    message = "no answer"
    raise ConnectionError(message)


def retried(record: EventRecord) -> list[TaskRetried]:
    return record.of_type(TaskRetried)


def starts(record: EventRecord) -> list[tuple[str, int]]:
    return [(event.worker_id, event.attempt) for event in record.of_type(TaskStarted)]


# --- attempts ---


@virtual
async def test_a_failed_task_is_tried_again_until_it_succeeds() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=FlakyHandler(2), task_types=["work"], retry=THRICE)
        result = await (await supervisor.submit(Task("work", 7)))
        assert (result.status, result.result, result.attempts) == (TaskStatus.SUCCEEDED, 7, 3)


@virtual
async def test_a_task_ends_as_its_last_attempt_did() -> None:
    handler = ScriptedHandler([ValueError("first"), ValueError("second"), KeyError("third")])
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=THRICE)
        result = await (await supervisor.submit(Task("work")))
        assert (result.status, result.error, result.attempts) == (TaskStatus.FAILED, "KeyError: 'third'", 3)
        assert isinstance(result.cause, KeyError)


@virtual
async def test_without_a_policy_nothing_is_retried() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"])
        assert (await (await supervisor.submit(Task("work")))).attempts == 1


@virtual
async def test_the_policy_of_a_task_overrules_that_of_its_worker() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=THRICE)
        once = await supervisor.submit(Task("work", retry=Retry(max_attempts=1)))
        five = await supervisor.submit(Task("work", retry=Retry(max_attempts=5)))
        assert [(await ticket).attempts for ticket in (once, five)] == [1, 5]


@virtual
async def test_each_retry_waits_for_the_delay_that_its_event_gives() -> None:
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=SLOWLY)
        await (await supervisor.submit(Task("work")))
    first, second = retried(record)
    times = [event.at for event in record.of_type(TaskStarted)]
    assert times == [0.0, approximately(first.delay), approximately(first.delay + second.delay)]
    assert (first.attempt, first.worker_id, first.error) == (1, "worker", "ConnectionError: no answer")
    assert second.attempt == 2


@virtual
async def test_the_listeners_of_a_ticket_hear_of_its_attempts() -> None:
    async def handler(_: Task) -> None:
        await asyncio.sleep(1.0)
        progress("here")
        message = "no answer"
        raise ConnectionError(message)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=Retry(max_attempts=2))
        ticket = await supervisor.submit(Task("work"))
        kinds = [type(event) async for event in ticket.events()]
    attempt = [TaskStarted, TaskProgress]
    assert kinds == [*attempt, TaskRetried, *attempt, TaskFinished]


@virtual
async def test_the_statistics_count_retries_and_the_tasks_that_wait_for_one() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=SLOWLY, max_concurrent=3)
        tickets = flood(supervisor, "work", 3)
        await run_ready()
        statistics = supervisor.statistics()
        assert (statistics.running, statistics.delayed, statistics.waiting, statistics.retries) == (0, 3, 3, 0)
        assert [ticket.status for ticket in tickets] == [TaskStatus.WAITING] * 3
        for ticket in tickets:
            await ticket
        statistics = supervisor.statistics()
        assert (statistics.failed, statistics.delayed, statistics.waiting, statistics.retries) == (3, 0, 0, 6)


@virtual
async def test_the_handler_knows_the_number_of_its_attempt() -> None:
    seen = []

    async def handler(_: Task) -> None:
        running = running_task()
        assert running is not None
        seen.append(running.attempt)
        message = "no answer"
        raise ConnectionError(message)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=THRICE)
        await (await supervisor.submit(Task("work")))
    assert seen == [1, 2, 3]


# --- what is worth a retry ---


@pytest.mark.parametrize(
    ("on", "attempts"),
    [
        (ConnectionError, 3),
        ((KeyError, OSError), 3),
        (ValueError, 1),
        ((KeyError, ValueError), 1),
        (lambda error: "answer" in str(error), 3),
        (lambda error: "no such" in str(error), 1),
    ],
)
@virtual
async def test_only_the_errors_of_the_policy_are_retried(on: Any, attempts: int) -> None:
    async with BackpressureSupervisor() as supervisor:
        policy = Retry(max_attempts=3, on=on)
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=policy)
        assert (await (await supervisor.submit(Task("work")))).attempts == attempts


@virtual
async def test_a_filter_of_errors_that_raises_is_logged_and_retries_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: BaseException) -> bool:
        raise ZeroDivisionError

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=Retry(on=broken))
        assert (await (await supervisor.submit(Task("work")))).error == "ConnectionError: no answer"
    assert "on of a Retry raised ZeroDivisionError" in caplog.text


def a_remote(kind: str) -> RemoteError:
    return RemoteError(type=kind, message="no answer", traceback="")


@pytest.mark.parametrize(
    ("error", "on", "attempts"),
    [
        (a_remote("ConnectionResetError"), ConnectionError, 2),
        (a_remote("AgentError"), type("AgentError", (Exception,), {}), 2),
        (a_remote("ValueError"), ConnectionError, 1),
        (a_remote("ValueError"), Exception, 2),
        (a_remote("UnusableTask"), Exception, 1),
        (a_remote("InvalidResult"), Exception, 1),
        (UnusableTask(field="payload", value=1, expected="a str"), Exception, 1),
        (WouldDeadlock(what="it", advice="no"), Exception, 1),
        (Overloaded("it is too large", load=float("inf")), Exception, 1),
        (Overloaded("it is full"), Exception, 2),
        (SystemExit(1), Exception, 1),
        (SystemExit(1), BaseException, 2),
    ],
    ids=str,
)
@virtual
async def test_errors_of_other_processes_count_by_name_and_mistakes_not_at_all(
    error: BaseException, on: type[BaseException], attempts: int
) -> None:
    async with BackpressureSupervisor() as supervisor:
        policy = Retry(max_attempts=2, on=on)
        supervisor.register_worker("worker", handler=Agent(error=error), task_types=["work"], retry=policy)
        assert (await (await supervisor.submit(Task("work")))).attempts == attempts


@virtual
async def test_a_result_of_the_wrong_type_is_not_retried() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(result="x"), task_types=["work"], result=int, retry=THRICE)
        result = await (await supervisor.submit(Task("work")))
        assert (result.status, result.attempts) == (TaskStatus.FAILED, 1)


@virtual
async def test_an_attempt_that_was_overloaded_waits_for_its_retry_after() -> None:
    handler = ScriptedHandler([Overloaded("the account is full", retry_after=20.0), "done"])
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=THRICE)
        assert await supervisor.run(Task("work")) == "done"
        assert 20.0 <= now() < 26.0


@virtual
async def test_a_cancelled_task_is_not_retried() -> None:
    async def cancelled(_: Task) -> None:
        raise asyncio.CancelledError

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=cancelled, task_types=["work"], retry=THRICE)
        result = await (await supervisor.submit(Task("work")))
        assert (result.status, result.attempts) == (TaskStatus.CANCELLED, 1)


@virtual
async def test_a_slot_is_not_retried() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=THRICE)

        async def body() -> None:
            async with supervisor.slot("work"):
                await fail(Task("work"))

        assert isinstance(await error_of(body()), ConnectionError)
        assert (supervisor.statistics().failed, supervisor.statistics().delayed) == (1, 0)


# --- timeouts ---


@virtual
async def test_an_attempt_that_runs_out_of_time_is_retried() -> None:
    async with BackpressureSupervisor() as supervisor:
        agent = Agent(100.0)
        supervisor.register_worker("worker", handler=agent, task_types=["work"], timeout=2.0, retry=THRICE)
        ticket = await supervisor.submit(Task("work", 7))
        await agent.wait_for_calls(2)
        agent.seconds = 1.0
        result = await ticket
        assert (result.status, result.result, result.attempts) == (TaskStatus.SUCCEEDED, 7, 3)


@virtual
async def test_a_timeout_that_the_policy_does_not_name_ends_the_task() -> None:
    policy = Retry(max_attempts=2, on=ConnectionError)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(9.0), task_types=["work"], timeout=2.0, retry=policy)
        result = await (await supervisor.submit(Task("work")))
        assert (result.status, result.attempts) == (TaskStatus.TIMED_OUT, 1)


@pytest.mark.parametrize("on", [TimeoutError, TaskTimedOut, lambda error: isinstance(error, TaskTimedOut)])
@virtual
async def test_a_timeout_is_a_timeout_error_for_the_policy(on: Any) -> None:
    async with BackpressureSupervisor() as supervisor:
        policy = Retry(max_attempts=2, on=on)
        supervisor.register_worker("worker", handler=Agent(9.0), task_types=["work"], timeout=2.0, retry=policy)
        result = await (await supervisor.submit(Task("work")))
        assert (result.status, result.attempts) == (TaskStatus.TIMED_OUT, 2)


@virtual
async def test_the_next_attempt_begins_once_the_handler_of_the_last_one_has_stopped() -> None:
    stubborn = UncancellableHandler(3.0)
    async with BackpressureSupervisor() as supervisor:
        policy = Retry(max_attempts=2, base_delay=0.01, max_delay=0.01)
        supervisor.register_worker("a", handler=stubborn, task_types=["work"], timeout=1.0, retry=policy)
        supervisor.register_worker("b", handler=stubborn, task_types=["work"], timeout=10.0, retry=policy)
        result = await (await supervisor.submit(Task("work")))
        assert (result.status, result.attempts, stubborn.peak) == (TaskStatus.SUCCEEDED, 2, 1)


@virtual
async def test_a_handler_that_does_not_stop_delays_the_next_attempt_by_the_grace() -> None:
    stubborn = UncancellableHandler(60.0)
    async with BackpressureSupervisor(zombie_grace=5.0) as supervisor:
        record = EventRecord(supervisor)
        policy = Retry(max_attempts=2, base_delay=0.01, max_delay=0.01)
        supervisor.register_worker("a", handler=stubborn, task_types=["work"], timeout=1.0, retry=policy)
        supervisor.register_worker("b", handler=Agent(1.0), task_types=["other"], timeout=1.0)
        supervisor.register_worker("c", handler=Agent(1.0, result="done"), task_types=["work"])
        await supervisor.submit(Task("work"))  # on one of the two
        ticket = await supervisor.submit(Task("work"))
        del ticket
    assert [event.at for event in record.of_type(TaskStarted) if event.attempt == 2] == [approximately(6.0)]


@virtual
async def test_a_message_whose_handler_does_not_stop_is_not_retried_and_the_next_one_waits_for_it() -> None:
    stubborn = UncancellableHandler(60.0)
    async with BackpressureSupervisor(zombie_grace=5.0) as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker(
            "worker", handler=stubborn, task_types=["work"], timeout=1.0, retry=THRICE, max_concurrent=3
        )
        first = await supervisor.submit(Task("work", 1, thread_id="c"))
        second = await supervisor.submit(Task("work", 2, thread_id="c", timeout=100.0))
        result = await first
        assert (result.status, result.attempts, now()) == (TaskStatus.TIMED_OUT, 1, approximately(6.0))
        assert result.error is not None
        assert "does not stop" in result.error
        await second
    assert stubborn.peak == 1
    assert [event.at for event in record.of_type(TaskStarted)] == [0.0, approximately(60.0)]


@pytest.mark.parametrize("thread_id", [None, "c"])
@virtual
async def test_a_task_can_be_cancelled_while_the_handler_of_its_last_attempt_stops(thread_id: str | None) -> None:
    stubborn = UncancellableHandler(3.0)
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker(
            "worker", handler=stubborn, task_types=["work"], timeout=1.0, retry=THRICE, max_concurrent=2
        )
        first = await supervisor.submit(Task("work", 1, thread_id=thread_id))
        second = await supervisor.submit(Task("work", 2, thread_id="c", retry=Retry(max_attempts=1), timeout=9.0))
        await asyncio.sleep(2.0)
        assert first.cancel()
        result = await first
        assert (result.status, now()) == (TaskStatus.CANCELLED, approximately(2.0))
        assert result.error is not None
        assert "its last attempt ended with it ran longer than its timeout" in result.error
        await second
    begun = {event.task_id: event.at for event in record.of_type(TaskStarted)}
    assert begun[second.task_id] == approximately(3.0 if thread_id else 0.0)
    check_supervisor(record, tickets=[first, second])


# --- between the attempts ---


@virtual
async def test_a_task_holds_no_slot_between_its_attempts() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=FlakyHandler(1), task_types=["work"], retry=SLOWLY)
        first = await supervisor.submit(Task("work", 1))
        await run_ready()
        assert supervisor.workers["worker"].current_tasks == 0
        assert await supervisor.run(Task("work", 2)) == 2
        assert now() < 0.1
        assert (await first).result == 1


@virtual
async def test_tasks_that_wait_for_a_retry_count_as_if_they_were_queued() -> None:
    async with BackpressureSupervisor(max_queue_size=3) as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=SLOWLY)
        for number in range(3):
            await supervisor.submit(Task("work", number))
            await run_ready()
        assert supervisor.system_load() == 0.75
        assert await supervisor.submit(Task("work", 3))  # a worker is free
        await run_ready()
        assert supervisor.system_load() == 1.0
        assert not await supervisor.submit(Task("work", 4))  # a free worker is no room for one more that fails at once
        await supervisor.close()


@virtual
async def test_tasks_that_fail_at_once_do_not_pile_up_beyond_the_room_of_the_queue() -> None:
    async def work(task: Task) -> None:
        if task.tenant == "bad":
            await supervisor.run(Task("full"))  # it is rejected, which is no fault of the worker

    async with BackpressureSupervisor(max_queue_size=20) as supervisor:
        supervisor.register_worker("worker", handler=work, task_types=["work"], retry=SLOWLY)
        supervisor.register_worker("full", handler=work, task_types=["full"], reserve=1)
        for _ in range(20):
            for task in flood(supervisor, "work", 5, tenant="bad"):
                assert task or task.limited_by == "pool:work"
            await run_ready()
            assert await supervisor.submit(Task("work", tenant="good"))  # nor do they take the room of others
            await run_ready()
        assert supervisor.statistics().delayed <= 20
        await supervisor.close()


@virtual
async def test_a_retry_goes_to_the_end_of_its_queue() -> None:
    handler = FlakyHandler(1, seconds=2.0)
    async with BackpressureSupervisor() as supervisor:
        policy = Retry(max_attempts=2, base_delay=0.1, max_delay=0.1)
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=policy)
        tickets = flood(supervisor, "work", 4)
        tickets += flood(supervisor, "work", 1, priority=Priority.HIGH)
        for ticket in tickets:
            await ticket
    assert handler.started == [0, 0, 1, 2, 3, 0]


@virtual
async def test_the_following_messages_of_a_conversation_wait_for_the_retry() -> None:
    handler = FlakyHandler(1, seconds=1.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=SLOWLY, max_concurrent=5)
        record = EventRecord(supervisor)
        tickets = flood(supervisor, "work", 3, thread_id="c")
        assert [(await ticket).result for ticket in tickets] == [0, 1, 2]
    assert handler.started == [0, 0, 1, 2]
    check_supervisor(record, tickets=tickets)


@virtual
async def test_a_message_that_is_cancelled_between_its_attempts_lets_the_next_one_go() -> None:
    handler = FlakyHandler(1, seconds=1.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=SLOWLY)
        first, second = flood(supervisor, "work", 2, thread_id="c")
        await asyncio.sleep(1.5)
        assert first.cancel()
        assert (await second).result == 1
        assert now() == approximately(2.5)
        assert (await first).status is TaskStatus.CANCELLED


@virtual
async def test_a_cancelled_task_is_not_tried_again() -> None:
    handler = FlakyHandler(9)
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=SLOWLY)
        ticket = await supervisor.submit(Task("work"))
        await run_ready()
        assert ticket.cancel()
        result = await ticket
        assert (result.status, result.attempts) == (TaskStatus.CANCELLED, 1)
        await asyncio.sleep(1000.0)
    assert len(handler.calls) == 1
    check_supervisor(record, tickets=[ticket])


# --- deadlines ---


@virtual
async def test_no_retry_begins_that_could_not_end_before_the_deadline() -> None:
    handler = Agent(10.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=THRICE)
        for _ in range(8):  # so that the duration is known
            await supervisor.run(Task("work"))
        handler.error = ConnectionError("no answer")
        result = await (await supervisor.submit(Task("work", deadline=Deadline.within(19.0))))
        assert (result.status, result.attempts) == (TaskStatus.FAILED, 1)
        result = await (await supervisor.submit(Task("work", deadline=Deadline.within(29.0))))
        assert (result.status, result.attempts) == (TaskStatus.FAILED, 2)


@virtual
async def test_a_retry_that_waits_in_the_queue_expires_at_its_deadline() -> None:
    async with BackpressureSupervisor() as supervisor:
        handler = FlakyHandler(1, seconds=1.0)
        policy = Retry(max_attempts=2, base_delay=0.1, max_delay=0.1)
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=policy)
        ticket = await supervisor.submit(Task("work", deadline=Deadline.within(5.0)))
        await handler.wait_for_calls(1)
        handler.seconds = 100.0
        await supervisor.submit(Task("work", priority=Priority.CRITICAL))
        result = await ticket
        assert (result.status, now()) == (TaskStatus.EXPIRED, approximately(5.0))
        assert result.error is not None
        assert "RuntimeError" in result.error


@virtual
async def test_delays_are_drawn_from_what_is_left_to_the_deadline() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=FlakyHandler(1), task_types=["work"], retry=SLOWLY)
        for _ in range(10):
            ticket = await supervisor.submit(Task("work", deadline=Deadline.within(2.0)))
            assert (await ticket).success


# --- workers ---


@virtual
async def test_a_task_that_fails_again_and_again_does_not_make_its_worker_failed() -> None:
    async with BackpressureSupervisor() as supervisor:
        agent = FlakyHandler(6)
        supervisor.register_worker("worker", handler=agent, task_types=["work"], retry=Retry(max_attempts=10))
        assert (await (await supervisor.submit(Task("work")))).attempts == 7
        assert now() < 500.0
        assert not supervisor.workers["worker"].failed


@virtual
async def test_first_attempts_that_fail_make_their_worker_failed_and_its_probes_keep_it_so() -> None:
    async with BackpressureSupervisor() as supervisor:
        policy = Retry(max_attempts=10, base_delay=0.1, max_delay=0.1)
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=policy, max_concurrent=5)
        record = EventRecord(supervisor)
        flood(supervisor, "work", 5)
        await asyncio.sleep(1.0)
        assert supervisor.workers["worker"].failed
        assert [event.attempt for event in record.of_type(TaskStarted)] == [1] * 5
        await asyncio.sleep(60.0)
        assert supervisor.workers["worker"].failed
        assert len(record.of_type(TaskStarted)) < 15
        await supervisor.close()


@virtual
async def test_a_worker_whose_breaker_allows_it_fails_a_fifth_of_its_attempts_without_a_pause() -> None:
    async with BackpressureSupervisor(retry_budget=RetryBudget(share=0.5)) as supervisor:
        record = EventRecord(supervisor)
        agent = FlakyHandler(chance=0.2, seconds=0.1)
        supervisor.register_worker(
            "worker",
            handler=agent,
            task_types=["work"],
            max_concurrent=5,
            retry=Retry(max_attempts=10, base_delay=0.1),
            breaker=BreakerRules(),
        )
        assert await supervisor.map("work", range(2_000)) == list(range(2_000))
        assert record.of_type(WorkerFailed) == []
        assert now() < 2_000 * 0.1 / 5 * 1.5  # a quarter more attempts than tasks, and the last retries


@virtual
async def test_a_retry_goes_to_another_worker_than_the_one_that_failed() -> None:
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("bad", handler=fail, task_types=["work"], max_concurrent=9, retry=THRICE)
        supervisor.register_worker("good", handler=Agent(100.0), task_types=["work"])
        await asyncio.sleep(0.0)
        assert (await (await supervisor.submit(Task("work", 1)))).result == 1
    assert starts(record) == [("bad", 1), ("good", 2)]


@virtual
async def test_a_retry_does_not_wait_for_another_worker_than_the_one_that_failed() -> None:
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        good, bad = Agent(1000.0), FlakyHandler(1)
        supervisor.register_worker("good", handler=good, task_types=["work"])
        supervisor.register_worker("bad", handler=bad, task_types=["work"], retry=THRICE)
        first, second = flood(supervisor, "work", 2)
        result = await second
        assert (result.success, result.attempts) == (True, 2)
        assert now() < 100.0
        first.cancel()
    assert starts(record) == [("good", 1), ("bad", 1), ("bad", 2)]


# --- the budget ---


@virtual
async def test_the_retry_budget_bounds_the_retries_of_all_tasks() -> None:
    budget = RetryBudget(share=0.5, extra=2, window=1e6)
    async with PassthroughSupervisor(retry_budget=budget) as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=Retry(max_attempts=9))
        results = [await (await supervisor.submit(Task("work"))) for _ in range(20)]
        assert supervisor.statistics().retries <= 12
        assert sum(result.attempts - 1 for result in results) == supervisor.statistics().retries
        used_up = [result for result in results if "budget of the supervisor is used up" in (result.error or "")]
        assert len(used_up) >= 15
        assert all(result.status is TaskStatus.FAILED for result in results)
        assert (used_up[0].error or "").startswith("ConnectionError: no answer; ")


@virtual
async def test_a_retry_that_the_budget_refuses_backs_off_without_using_an_attempt() -> None:
    budget = RetryBudget(share=0.0, extra=1, window=30.0)
    async with BackpressureSupervisor(retry_budget=budget) as supervisor:
        policy = Retry(max_attempts=2, max_total_delay=1000.0)
        supervisor.register_worker("worker", handler=FlakyHandler(2), task_types=["work"], retry=policy)
        tickets = [await supervisor.submit(Task("work", number)) for number in range(2)]
        results = [await ticket for ticket in tickets]
        assert [(result.success, result.attempts) for result in results] == [(True, 2)] * 2
        assert 27.0 < now() < 120.0  # the second had to wait for the next window


@virtual
async def test_retries_that_fail_again_leave_budget_for_first_retries() -> None:
    budget = RetryBudget(share=0.0, extra=8, window=1e6)
    async with BackpressureSupervisor(retry_budget=budget) as supervisor:
        supervisor.register_worker("hopeless", handler=fail, task_types=["hopeless"], retry=Retry(max_attempts=100))
        supervisor.register_worker("flaky", handler=FlakyHandler(1), task_types=["flaky"], retry=THRICE)
        hopeless = await (await supervisor.submit(Task("hopeless")))
        assert hopeless.attempts == 7
        assert (await (await supervisor.submit(Task("flaky")))).success


@virtual
async def test_tasks_without_a_policy_add_nothing_to_the_budget() -> None:
    budget = RetryBudget(share=1.0, extra=0, window=1e6)
    async with BackpressureSupervisor(retry_budget=budget) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        supervisor.register_worker("flaky", handler=fail, task_types=["flaky"], retry=Retry(max_attempts=9))
        for ticket in flood(supervisor, "work", 20):
            await ticket
        assert (await (await supervisor.submit(Task("flaky")))).attempts == 2


# --- nested tasks ---


@virtual
async def test_a_run_lends_its_slot_to_the_retries_of_its_nested_tasks() -> None:
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        flaky = FlakyHandler(2)

        async def handler(task: Task) -> Any:
            return await (flaky(task) if task.payload else supervisor.run(Task("work", 1)))

        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=THRICE)
        ticket = await supervisor.submit(Task("work", 0))
        assert (await ticket).result == 1
    check_supervisor(record, tickets=[ticket], nested=True)


@virtual
async def test_a_nested_task_is_still_nested_in_its_next_attempt() -> None:
    async with BackpressureSupervisor() as supervisor:
        order = []

        async def handler(task: Task) -> Any:
            order.append(task.payload)
            await asyncio.sleep(1.0)
            if task.payload == "parent":
                return await supervisor.run(Task("work", "child"))
            if order.count("child") == 1 and task.payload == "child":
                message = "no answer"
                raise ConnectionError(message)
            return task.payload

        policy = Retry(max_attempts=2, base_delay=0.1, max_delay=0.1)
        supervisor.register_worker("worker", handler=handler, task_types=["work"], retry=policy)
        parent = await supervisor.submit(Task("work", "parent"))
        others = [await supervisor.submit(Task("work", number)) for number in range(3)]
        assert (await parent).result == "child"
        for other in others:
            await other
    assert order == ["parent", "child", 0, "child", 1, 2]


@virtual
async def test_the_policy_of_a_task_counts_in_one_supervisor_only() -> None:
    async with BackpressureSupervisor() as outer:
        inner, agent = BackpressureSupervisor(), Agent(error=ConnectionError("no answer"))
        inner.register_worker("worker", handler=agent, task_types=["work"], retry=Retry(max_attempts=5))
        outer.register_worker("team", handler=inner, task_types=["work"])
        await (await outer.submit(Task("work", retry=THRICE)))
        assert len(agent.calls) == 3
        await (await outer.submit(Task("work")))
        assert len(agent.calls) == 3 + 5


# --- draining and closing ---


@virtual
async def test_draining_lets_retries_finish() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=FlakyHandler(2), task_types=["work"], retry=SLOWLY)
    async with supervisor:
        ticket = await supervisor.submit(Task("work", 1))
        await run_ready()
        report = await supervisor.drain()
        assert (report.finished, report.cancelled) == (1, 0)
        assert (await ticket).result == 1


@virtual
async def test_draining_ends_at_its_limit_though_a_task_waits_for_its_retry() -> None:
    supervisor = BackpressureSupervisor()
    policy = Retry(max_attempts=2, base_delay=500.0, max_delay=500.0, max_total_delay=1e6)
    supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=policy, max_concurrent=20)
    async with supervisor:
        record = EventRecord(supervisor)
        tickets = flood(supervisor, "work", 20)
        await run_ready()
        report = await supervisor.drain(5.0)
        assert now() == approximately(5.0)
        assert (report.finished + report.cancelled, report.cancelled > 10) == (20, True)
        for ticket in tickets:
            assert (await ticket).status in (TaskStatus.CANCELLED, TaskStatus.FAILED)
        cut = [result.error for ticket in tickets if (result := await ticket).status is TaskStatus.CANCELLED]
        assert cut[0] is not None
        assert "its last attempt ended with ConnectionError: no answer" in cut[0]
    check_supervisor(record, tickets=tickets)


@virtual
async def test_draining_does_not_wait_for_the_retry_budget() -> None:
    budget = RetryBudget(share=0.0, extra=0)
    supervisor = BackpressureSupervisor(retry_budget=budget)
    policy = Retry(max_attempts=3, max_total_delay=float("inf"))
    supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=policy)
    async with supervisor:
        ticket = await supervisor.submit(Task("work"))
        await asyncio.sleep(1000.0)
        assert ticket.status is TaskStatus.WAITING
        await supervisor.drain()
        assert (await ticket).status is TaskStatus.FAILED
        assert now() < 1100.0


@virtual
async def test_draining_does_not_wait_for_a_retry_that_no_worker_can_make() -> None:
    supervisor = BackpressureSupervisor()
    policy = Retry(max_attempts=100, base_delay=0.1, max_delay=0.1)
    supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=policy, reset_timeout=None)
    async with supervisor:
        tickets = flood(supervisor, "work", 5)
        await asyncio.sleep(10.0)
        assert supervisor.workers["worker"].failed
        await supervisor.drain()
        assert now() < 20.0
        assert {(await ticket).status for ticket in tickets} == {TaskStatus.CANCELLED}


@virtual
async def test_closing_ends_the_tasks_that_wait_for_a_retry() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=SLOWLY)
    await supervisor.start()
    record = EventRecord(supervisor)
    ticket = await supervisor.submit(Task("work"))
    await run_ready()
    await supervisor.close()
    assert (await ticket).status is TaskStatus.CANCELLED
    check_supervisor(record, tickets=[ticket])


# --- keys ---


async def succeed(_: Task) -> str:
    return "done"


async def hang(_: Task) -> None:
    await asyncio.sleep(1000.0)


@pytest.mark.parametrize(
    ("handler", "options", "status"),
    [
        (fail, {}, TaskStatus.FAILED),
        (hang, {"timeout": 1.0}, TaskStatus.TIMED_OUT),
        (hang, {"deadline": 5.0}, TaskStatus.EXPIRED),
        (hang, {}, TaskStatus.CANCELLED),
        (succeed, {}, TaskStatus.SUCCEEDED),
    ],
    ids=lambda value: value.name if isinstance(value, TaskStatus) else "",
)
@virtual
async def test_a_key_remembers_success_only(handler: Any, options: dict[str, float], status: TaskStatus) -> None:
    handlers: list[Callable[[Task], Any]] = [handler, succeed]

    async def scripted(task: Task) -> Any:
        return await handlers.pop(0)(task)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=scripted, task_types=["pay"], max_concurrent=2)
        deadline = Deadline.within(options["deadline"]) if "deadline" in options else None
        task = Task("pay", key="invoice-7", timeout=options.get("timeout"), deadline=deadline)
        first = await supervisor.submit(task)
        if status is TaskStatus.CANCELLED:
            await asyncio.sleep(1.0)
            first.cancel()
        assert (await first).status is status
        second = await supervisor.submit(Task("pay", key="invoice-7"))
        assert (second.task_id == first.task_id) is (status is TaskStatus.SUCCEEDED)
        assert (await second).result == "done"
        assert supervisor.submit_nowait(Task("pay", key="invoice-7")).task_id == second.task_id


@virtual
async def test_a_task_that_waits_for_its_retry_is_shared_by_its_key() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=FlakyHandler(1), task_types=["pay"], retry=SLOWLY)
        first = await supervisor.submit(Task("pay", 1, key="invoice-7"))
        await run_ready()
        assert first.status is TaskStatus.WAITING
        assert await supervisor.submit(Task("pay", 2, key="invoice-7")) is first
        assert supervisor.submit_nowait(Task("pay", 3, key="invoice-7")) is first
        assert (await first).result == 1


# --- tasks that would wait for themselves ---


@pytest.mark.parametrize(
    ("call", "own"),
    [
        *((call, {"thread_id": "c"}) for call in ("submit", "submit_nowait", "run", "slot")),
        *((call, {"key": "k"}) for call in ("submit", "submit_nowait", "run")),  # a slot has no key
    ],
)
@virtual
async def test_a_nested_task_of_its_parents_conversation_or_key_is_an_error(call: str, own: dict[str, Any]) -> None:
    async with BackpressureSupervisor() as supervisor:

        async def handler(task: Task) -> Any:
            if task.payload == "top":
                return await supervisor.run(Task("work", "below"))
            if call == "slot":
                async with supervisor.slot("work", **own):
                    return None
            nested = getattr(supervisor, call)(Task("work", "nested", **own))
            return nested if call == "submit_nowait" else await nested

        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=9)
        result = await (await supervisor.submit(Task("work", "top", **own)))
        assert result.error is not None
        assert "WouldDeadlock" in result.error
        assert "in which it is nested" in result.error
        assert now() < 1.0


@virtual
async def test_the_task_of_a_supervisor_in_another_one_does_not_wait_for_itself() -> None:
    async with BackpressureSupervisor() as outer:
        inner = BackpressureSupervisor()

        async def handler(task: Task) -> Any:
            if task.payload == "leaf":
                return "leaf"
            supervisor = outer if task.payload == "up" else inner
            return await supervisor.run(Task("leaf", "leaf", thread_id="c"))

        inner.register_worker("worker", handler=handler, task_types=["work", "leaf"], max_concurrent=4)
        outer.register_worker("team", handler=inner, task_types=["work"], max_concurrent=4)
        outer.register_worker("leaf", handler=handler, task_types=["leaf"])
        assert await outer.run(Task("work", "leaf", thread_id="c", key="k")) == "leaf"
        for payload in ("up", "down"):
            error = await error_of(outer.run(Task("work", payload, thread_id="c")))
            assert isinstance(error, TaskFailed)
            assert "WouldDeadlock" in str(error)


@virtual
async def test_a_task_of_a_conversation_whose_run_has_ended_does_not_wait_for_itself() -> None:
    async with BackpressureSupervisor() as supervisor:
        later = []

        async def follow_up() -> Any:
            await asyncio.sleep(1.0)
            return await supervisor.run(Task("work", "second", thread_id="c", key="k"))

        async def handler(task: Task) -> Any:
            if task.payload == "first":
                later.append(asyncio.ensure_future(follow_up()))
                message = "no answer"
                raise ConnectionError(message)
            return task.payload

        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        await (await supervisor.submit(Task("work", "first", thread_id="c", key="k")))
        assert await later[0] == "second"


# --- invalid settings ---


@pytest.mark.parametrize("on", [None, "ValueError", (), (ValueError, 1), int, fail, [ValueError]])
def test_a_filter_of_errors_is_types_or_a_plain_function(on: Any) -> None:
    with pytest.raises(InvalidSetting, match="an exception type, a tuple of them, or a plain function"):
        Retry(on=on)


def test_a_policy_is_a_retry() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match="retry='3'; it must be a Retry, such as Retry"):
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry="3")  # type: ignore[arg-type]
    with pytest.raises(InvalidTask, match="Task retry is 3; it must be a Retry"):
        Task("work", retry=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="it must be a RetryBudget"):
        BackpressureSupervisor(retry_budget=0.2)  # type: ignore[arg-type]


def test_an_upstream_judges_errors_by_itself() -> None:
    with pytest.raises(InvalidSetting, match="a Retry without `on`"):
        Upstream("openai", retry=Retry(on=ValueError))


@virtual
async def test_a_task_that_may_be_stored_cannot_have_errors_of_its_own() -> None:
    task = Task("work", retry=Retry(on=ConnectionError))
    async with BackpressureSupervisor(overflow="memory://") as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"])
        with pytest.raises(NotSerializable, match=r"at retry\.on it holds a type\. .* let its worker say it"):
            await supervisor.submit(task)
        with pytest.raises(NotSerializable):
            supervisor.submit_nowait(task)
        ticket = await supervisor.submit(Task("work", spill=False, retry=Retry(max_attempts=2, on=ConnectionError)))
        assert (await ticket).attempts == 2
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"])
        assert (await (await supervisor.submit(task))).attempts == 6


@virtual
async def test_what_the_budget_refuses_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "forebay")
    async with BackpressureSupervisor(retry_budget=RetryBudget(share=0.0, extra=0)) as supervisor:
        supervisor.register_worker("worker", handler=fail, task_types=["work"], retry=THRICE)
        await (await supervisor.submit(Task("work", task_id="t1")))
    assert "task 't1' has failed, and it is not retried, because the retry budget of the supervisor" in caplog.text
