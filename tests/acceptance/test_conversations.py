"""Conversations: order, bounds, and what a busy one costs the others, with an overflow and without."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import (
    Agent,
    admitted,
    flood,
    now,
    rejected,
    results,
    run_ready,
    statuses,
    submit_all,
    virtual,
)

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskStatus, Verdict
from forebay.interfaces import TaskRecord
from forebay.overflow import SqliteTaskStore, encode_task, open_task_store
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/spill.db?fsync=no"


def make_supervisor(agent: Any, overflow: str | None, *, slots: int = 10, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=overflow, **options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


def talk(*payloads: Any, thread: str = "alice", **options: Any) -> list[Task]:
    return [Task("work", payload, thread_id=thread, **options) for payload in payloads]


# --- a conversation with many messages delays nobody else ------------------------------------------------------------


@virtual
async def test_a_conversation_whose_handler_runs_a_task_of_its_type_goes_on(overflow: str) -> None:
    async def handler(task: Task) -> Any:
        if task.payload == "child":
            await asyncio.sleep(0.01)
            return "done"
        return await supervisor.run(Task("work", "child"))

    supervisor = make_supervisor(handler, overflow)
    async with supervisor:
        record = EventRecord(supervisor)
        tickets = await submit_all(supervisor, talk(*range(200)))
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 200
        assert now() < 3.3
    check_supervisor(record, tickets=tickets, nested=True)


async def longest_wait(overflow: str | None, *, conversations: int, messages: int) -> float:
    """Return the longest wait of fifty users beside busy conversations; each run takes 0.05 seconds."""
    waits: list[float] = []

    async def handler(task: Task) -> None:
        if task.payload is not None:
            waits.append(now() - task.payload)
        await asyncio.sleep(0.05)

    async with make_supervisor(handler, overflow) as supervisor:
        record = EventRecord(supervisor)
        hot = [
            await supervisor.submit(Task("work", thread_id=f"hot {number}"))
            for _ in range(messages)
            for number in range(conversations)
        ]
        users = [await supervisor.submit(Task("work", now(), thread_id=f"user {number}")) for number in range(50)]
        assert not rejected(users)
        assert await statuses(users) == [TaskStatus.SUCCEEDED] * 50
        await results(ticket for ticket in hot if ticket)
    check_supervisor(record, tickets=[*hot, *users])
    return max(waits)


@pytest.mark.parametrize(("conversations", "messages"), [(1, 300), (5, 100)])
@virtual
async def test_others_wait_as_if_a_busy_conversation_had_one_message(
    any_overflow: str | None, conversations: int, messages: int
) -> None:
    alone = await longest_wait(any_overflow, conversations=conversations, messages=1)
    beside = await longest_wait(any_overflow, conversations=conversations, messages=messages)
    assert beside <= alone + 0.051  # the slots of the busy ones are taken for one service time more


@virtual
async def test_a_conversation_is_rejected_beyond_its_bound_and_named_and_told_when_to_come_back() -> None:
    async with make_supervisor(Agent(), None) as supervisor:
        await results(flood(supervisor, "work", 8))  # the service time is known
        tickets = flood(supervisor, "work", 110, thread_id="alice")
        refused = rejected(tickets)
        assert len(refused) == 9  # one runs, and a hundred wait: half of twice the queue's room
        assert {ticket.limited_by for ticket in refused} == {"conversation:alice"}
        retries = [ticket.retry_after or 0.0 for ticket in refused]
        assert len(set(retries)) == 9  # one place is free in each service time, of one second
        assert 1.0 < min(retries) < 1.2
        assert 9.0 < max(retries) < 10.3
        assert len(admitted(flood(supervisor, "work", 3, thread_id="bob"))) == 3
        await supervisor.drain(timeout=0.0)


@virtual
async def test_many_busy_conversations_leave_room_for_the_next_one() -> None:
    async with make_supervisor(Agent(), None) as supervisor:
        for number in range(9):
            flood(supervisor, "work", 200, thread_id=f"hot {number}")
        assert len(admitted(flood(supervisor, "work", 10, thread_id="alice"))) == 10
        await supervisor.drain(timeout=0.0)


# --- order -----------------------------------------------------------------------------------------------------------


@virtual
async def test_messages_keep_their_order_beyond_the_bound_of_their_conversation(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=3) as supervisor:
        tickets = await submit_all(supervisor, talk(*range(30)))
        assert {ticket.verdict for ticket in tickets} == {Verdict.ADMITTED, Verdict.SPILLED}
        await results(tickets)
    assert agent.started == list(range(30))
    assert agent.peak == 1


@virtual
async def test_a_new_message_does_not_overtake_spilled_ones_of_its_conversation(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=2) as supervisor:
        tickets = await submit_all(supervisor, talk(*range(8)))
        for number in range(8, 16):
            await tickets[number - 8]
            await run_ready()
            tickets += await submit_all(supervisor, talk(number))
        await results(tickets)
    assert agent.started == list(range(16))


@virtual
async def test_messages_spilled_by_a_full_queue_keep_their_order_whatever_their_priority(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, slots=1, max_queue_size=4) as supervisor:
        others = await submit_all(supervisor, [Task("work", f"other {number}") for number in range(12)])
        tickets = []
        for number, priority in enumerate([Priority.LOW, Priority.NORMAL, Priority.CRITICAL, Priority.HIGH] * 3):
            tickets += await submit_all(supervisor, talk(number, priority=priority))
        await results([*others, *tickets])
    assert [payload for payload in agent.started if isinstance(payload, int)] == list(range(12))


@virtual
async def test_a_conversation_keeps_its_order_over_task_types(overflow: str) -> None:
    agent = Agent()
    supervisor = make_supervisor(agent, overflow, max_queue_size=2)
    supervisor.register_worker("other", handler=agent, task_types=["other"], max_concurrent=3)
    async with supervisor:
        tasks = [Task(("work", "other")[number % 2], number, thread_id="alice") for number in range(20)]
        await results(await submit_all(supervisor, tasks))
        assert now() < 21.0  # the next one of another type is found at once
    assert agent.started == list(range(20))


@virtual
async def test_spilled_and_durable_messages_have_one_order(file: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, file, max_queue_size=2) as supervisor:
        tickets = []
        for number in range(24):
            tickets += await submit_all(supervisor, talk(number, durable=number % 3 == 1))
        await results(tickets)
    assert agent.started == list(range(24))
    assert agent.peak == 1


@virtual
async def test_messages_keep_their_order_over_a_restart(file: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, file, max_queue_size=2) as supervisor:
        await submit_all(supervisor, talk(*range(10)))
        await asyncio.sleep(1.5)
        await supervisor.drain(timeout=1.0)
    async with make_supervisor(agent, file, max_queue_size=2) as supervisor:
        tickets = await submit_all(supervisor, talk(*range(10, 15)))
        await results(tickets)
    assert agent.started == list(range(15))


@pytest.mark.parametrize("first", [{}, {"durable": True}])
@virtual
async def test_no_message_starts_while_those_before_it_move_to_the_overflow(file: str, first: dict[str, Any]) -> None:
    agent = Agent()
    supervisor = make_supervisor(agent, file, slots=1)
    supervisor.register_worker("other", handler=agent, task_types=["other"])
    async with supervisor:
        busy = await supervisor.submit(Task("work", "busy"))
        messages = [Task(("work", "other")[number > 0], number, thread_id="alice") for number in range(1, 5)]
        tickets = await submit_all(supervisor, [*talk(0, **first), *messages])
        report = await supervisor.drain(timeout=3.0)
        assert (report.finished, report.spilled) == (1, 5)
        assert busy.status is TaskStatus.SUCCEEDED
        assert {ticket.status for ticket in tickets} == {TaskStatus.SPILLED}
    assert agent.started == ["busy"]


@virtual
async def test_what_may_not_spill_ends_when_messages_before_it_move_to_the_overflow(file: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        tickets = await submit_all(supervisor, [*talk(0, 1), *talk(2, spill=False)])
        others = await submit_all(supervisor, [*talk(0, 1, thread="bob", spill=False), *talk(2, thread="bob")])
        await supervisor.drain()
        assert [ticket.status for ticket in tickets] == [
            TaskStatus.SUCCEEDED,
            TaskStatus.SPILLED,
            TaskStatus.CANCELLED,
        ]
        assert "earlier tasks of its conversation" in str((await tickets[2]).error)
        assert [ticket.status for ticket in others] == [
            TaskStatus.SUCCEEDED,
            TaskStatus.SUCCEEDED,
            TaskStatus.SPILLED,
        ]
    assert sorted(agent.started) == [0, 0, 1]


@virtual
async def test_processes_that_share_an_overflow_run_a_conversation_one_at_a_time_in_order(file: str) -> None:
    agent = Agent()
    async with (
        make_supervisor(agent, file, max_queue_size=3, lease=3.0) as here,
        make_supervisor(agent, file, max_queue_size=3, lease=3.0),
    ):
        tickets = await submit_all(here, talk(*range(30)))
        await results(tickets)
    assert agent.started == list(range(30))
    assert agent.peak == 1


@virtual
async def test_a_message_behind_one_that_runs_while_its_process_drains_does_not_start_in_another(file: str) -> None:
    agent = Agent(10.0)
    async with make_supervisor(agent, file, lease=3.0):
        async with make_supervisor(agent, file, lease=3.0) as draining:
            await submit_all(draining, talk(0, 1, 2))
            await asyncio.sleep(1.0)
            await draining.drain()
            assert 10.0 < now() < 11.0
        await asyncio.sleep(25.0)
    assert agent.started == [0, 1, 2]
    assert agent.peak == 1


@virtual
async def test_durable_messages_submitted_to_two_processes_run_one_at_a_time(file: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, file, lease=3.0) as here, make_supervisor(agent, file, lease=3.0) as there:
        tickets = []
        for number in range(12):
            tickets += await submit_all((here, there)[number % 2], talk(number, durable=True))
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 12
    assert agent.started == list(range(12))
    assert agent.peak == 1


@virtual
async def test_messages_submitted_at_once_keep_the_order_of_their_calls(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=2) as supervisor:
        await results(await asyncio.gather(*map(supervisor.submit, talk(*range(20)))))
    assert agent.started == list(range(20))


@virtual
async def test_submit_nowait_and_what_may_not_spill_are_rejected_behind_spilled_messages(overflow: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, max_queue_size=1) as supervisor:
        tickets = await submit_all(supervisor, talk(*range(6)))
        for refused in (
            supervisor.submit_nowait(*talk("now")),
            await supervisor.submit(*talk("inside", spill=False)),
        ):
            assert refused.verdict is Verdict.REJECTED
            assert refused.limited_by == "conversation:alice"
        await results(tickets)
        await supervisor.run(*talk("later"))
    assert agent.started == [*range(6), "later"]


# --- ends of those that are parked -----------------------------------------------------------------------------------


@virtual
async def test_parked_tasks_expire_and_are_cancelled_wherever_they_wait(overflow: str) -> None:
    agent = Agent(10.0)
    async with make_supervisor(agent, overflow, max_queue_size=2) as supervisor:
        tickets = await submit_all(supervisor, talk(*range(12)))
        late = await submit_all(supervisor, talk("late", deadline=Deadline.within(2.0)))
        for ticket in tickets[1::2]:
            assert ticket.cancel()
        assert await statuses(late) == [TaskStatus.EXPIRED]
        assert now() < 2.1
        expected = [TaskStatus.SUCCEEDED, TaskStatus.CANCELLED] * 6
        assert await statuses(tickets) == expected
        assert supervisor.statistics().outside == 0
    assert agent.started == list(range(0, 12, 2))


@virtual
async def test_statistics_count_parked_tasks_in_the_overflow_as_outside(overflow: str) -> None:
    async with make_supervisor(Agent(), overflow, max_queue_size=2) as supervisor:
        tickets = await submit_all(supervisor, talk(*range(20)))
        await run_ready()
        statistics = supervisor.statistics()
        assert statistics.running + statistics.waiting + statistics.outside == 20
        assert statistics.outside > 10
        assert statistics.load < 0.2  # nine of ten slots are idle
        await results(tickets)
        assert supervisor.statistics().outside == 0


@pytest.mark.parametrize("fails", [ValueError, asyncio.CancelledError])
@virtual
async def test_a_conversation_goes_on_after_a_failure_of_a_stored_task(overflow: str, fails: type[Exception]) -> None:
    async def handler(task: Task) -> None:
        if task.payload % 3 == 1:
            raise fails

    async with make_supervisor(handler, overflow, max_queue_size=1) as supervisor:
        ended = await results(await submit_all(supervisor, talk(*range(12))))
    assert [result.success for result in ended] == [number % 3 != 1 for number in range(12)]


@virtual
async def test_a_conversation_goes_on_after_a_message_that_cannot_be_read(file: str) -> None:
    store = open_task_store(file)
    await store.open()
    for number, envelope in enumerate((b"damaged", encode_task(talk("next", task_id="1")[0], "next", bound=100))):
        await store.put(
            TaskRecord(
                task_id=f"{number}",
                task_type="work",
                priority=Priority.NORMAL,
                envelope=envelope,
                enqueued_at=float(number),
                thread_id="alice",
            )
        )
    await store.close()
    agent = Agent()
    async with make_supervisor(agent, file) as supervisor:
        ticket = await supervisor.submit(*talk("last"))
        assert ticket.verdict is Verdict.SPILLED  # the store knows of earlier ones
        await ticket
        assert now() < 2.1
    assert agent.started == ["next", "last"]


# --- many messages that come too late --------------------------------------------------------------------------------


async def sleep_for(task: Task) -> None:
    await asyncio.sleep(task.payload)


@virtual
async def test_hundreds_of_messages_that_come_too_late_at_one_turn_all_end_and_the_conversation_goes_on() -> None:
    supervisor = make_supervisor(sleep_for, None, slots=20, max_queue_size=1000)
    async with supervisor:
        record = EventRecord(supervisor)
        tickets = await submit_all(supervisor, talk(*[4.0] * 600, deadline=Deadline.within(6.0)))
        await results(flood_seconds(supervisor, 3.0, 8))  # from now on a task is known to take three seconds
        flood_seconds(supervisor, 3.0, 5, deadline=Deadline.within(0.1))  # one of them tests whether that is still so
        await tickets[0]
        assert [ticket.status for ticket in tickets[1:]] == [TaskStatus.EXPIRED] * 599
        assert now() < 5.0  # so they were too late at their turn, and did not wait for their deadline
        (last,) = await submit_all(supervisor, talk(1.0))
        assert await statuses([last]) == [TaskStatus.SUCCEEDED]
    check_supervisor(record, tickets=tickets)


@virtual
async def test_hundreds_of_nested_messages_that_come_too_late_all_end() -> None:
    """On a worker that begins no new run, with other work in the queue, each of them is queued before it ends."""

    async def handler(task: Task) -> None:
        if task.payload == "talks":
            tickets.extend(await submit_all(supervisor, talk(*[4.0] * 600, deadline=Deadline.within(6.0))))
            await asyncio.gather(*tickets)
            assert now() < 5.0  # so they were too late at their turn, and did not wait for their deadline
        elif task.payload == "waits":
            await asyncio.gather(*flood_seconds(supervisor, 3.0, 1))  # from now on a task is known to take that long
            flood_seconds(supervisor, 3.0, 5, deadline=Deadline.within(0.1))  # one of them tests whether it is so
            await asyncio.gather(*flood_seconds(supervisor, 8.0, 1))
        else:
            await asyncio.sleep(task.payload)

    tickets: list[Any] = []
    supervisor = BackpressureSupervisor(max_queue_size=1000)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=10, max_open=10)
    async with supervisor:
        record = EventRecord(supervisor)
        parents = [supervisor.submit_nowait(Task("work", payload)) for payload in ["talks", *["waits"] * 9]]
        await run_ready()
        others = flood_seconds(supervisor, 1.0, 5)
        assert await statuses([*parents, *others]) == [TaskStatus.SUCCEEDED] * 15
        assert [ticket.status for ticket in tickets] == [TaskStatus.SUCCEEDED, *[TaskStatus.EXPIRED] * 599]
    check_supervisor(record, tickets=tickets, nested=True)


def flood_seconds(supervisor: BackpressureSupervisor, seconds: float, count: int, **options: Any) -> list[Any]:
    """Submit `count` tasks that take so many seconds at once."""
    return [supervisor.submit_nowait(Task("work", seconds, **options)) for _ in range(count)]


class SlowlyCountingStore(SqliteTaskStore):
    """A store whose counts of conversations are half a second old when they arrive."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.counted = asyncio.Event()

    async def conversations(self) -> Mapping[str, int]:
        counts = await super().conversations()
        self.counted.set()
        await asyncio.sleep(0.5)
        return counts


@pytest.mark.blocks
@virtual
async def test_a_count_that_was_made_before_a_message_was_stored_does_not_let_the_next_one_overtake_it(
    tmp_path: Path,
) -> None:
    store = SlowlyCountingStore(tmp_path / "store.db")
    agent = Agent(1.0)
    supervisor = BackpressureSupervisor(overflow=store, max_queue_size=0, lease=9.0)
    supervisor.register_worker("w", handler=Agent(100.0), task_types=["full"])
    supervisor.register_worker("free", handler=agent, task_types=["free"])
    async with supervisor:
        await supervisor.submit(Task("full", spill=False))
        store.counted.clear()
        await store.counted.wait()
        first = await supervisor.submit(Task("full", "first", thread_id="c"))
        await asyncio.sleep(0.6)
        second = await supervisor.submit(Task("free", "second", thread_id="c"))
        assert [ticket.status for ticket in (first, second)] == [TaskStatus.SPILLED] * 2
        await asyncio.sleep(50.0)
        assert agent.started == []
