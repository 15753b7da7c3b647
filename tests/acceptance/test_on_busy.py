"""A task whose conversation is busy waits, is rejected, or takes the place of what was before it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import Agent, statuses, virtual

from forebay import BackpressureSupervisor, Task, TaskStatus, Verdict
from forebay.errors import InvalidTask
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

CANCELLED, SUCCEEDED = TaskStatus.CANCELLED, TaskStatus.SUCCEEDED


def make_supervisor(agent: Any, overflow: str | None, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=overflow, **options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=3)
    return supervisor


def message(text: str, on_busy: Any = "enqueue", *, thread: str = "alice", **options: Any) -> Task:
    return Task("work", text, thread_id=thread, on_busy=on_busy, **options)


@virtual
@pytest.mark.parametrize("durable", [False, True])
async def test_a_task_that_does_not_wait_is_rejected_while_its_conversation_is_busy(
    overflow: str | None, *, durable: bool
) -> None:
    if durable and (overflow is None or overflow.startswith("memory")):
        return
    agent = Agent(seconds=1.0)
    async with make_supervisor(agent, overflow) as supervisor:
        record = EventRecord(supervisor)
        tickets = []
        for text in ("first", "second"):
            tickets.append(await supervisor.submit(message(text, durable=durable)))
            busy = await supervisor.submit(message("refused", "reject", durable=durable, key="once"))
            assert (busy.verdict, busy.limited_by) == (Verdict.REJECTED, "conversation:alice")
            assert busy.reason == "another task of its conversation has not ended"
            tickets.append(busy)
        other = await supervisor.submit(message("other", "reject", thread="bob", durable=durable))
        assert await statuses([tickets[0], tickets[2], other]) == [SUCCEEDED] * 3
        now_free = await supervisor.submit(message("free", "reject", durable=durable, key="once"))
        assert await statuses([now_free]) == [SUCCEEDED]
        assert agent.started == ["first", "other", "second", "free"]
    check_supervisor(record, tickets=[*tickets, other, now_free])


@virtual
@pytest.mark.parametrize("durable", [False, True])
async def test_a_task_that_interrupts_cancels_what_was_before_it_and_is_next(
    overflow: str | None, *, durable: bool
) -> None:
    if durable and (overflow is None or overflow.startswith("memory")):
        return
    agent = Agent(seconds=10.0)
    async with make_supervisor(agent, overflow) as supervisor:
        record = EventRecord(supervisor)
        first = await supervisor.submit(message("first", durable=durable))
        await agent.wait_for_calls(1)
        second = await supervisor.submit(message("second", "enqueue"))
        other = await supervisor.submit(message("other", thread="bob"))
        third = await supervisor.submit(message("third", "interrupt", durable=durable))
        fourth = await supervisor.submit(message("fourth"))
        results = [await ticket for ticket in (first, second, third, fourth, other)]
        if durable and second.verdict is Verdict.SPILLED:  # it waited in the overflow, which is not this supervisor
            assert [result.status for result in results] == [CANCELLED, *[SUCCEEDED] * 4]
        else:
            assert [result.status for result in results] == [CANCELLED, CANCELLED, *[SUCCEEDED] * 3]
        assert results[0].error == f"interrupted by task {third.task_id!r} of its conversation"
        assert agent.started[:1] == ["first"]
        assert agent.started.index("third") < agent.started.index("fourth")
    check_supervisor(record, tickets=[first, second, third, fourth, other])


@virtual
async def test_a_task_that_interrupts_an_idle_conversation_just_runs(overflow: str | None) -> None:
    agent = Agent(seconds=1.0)
    async with make_supervisor(agent, overflow) as supervisor:
        assert await supervisor.run(message("first", "interrupt")) is not None
        assert agent.started == ["first"]


@virtual
async def test_a_conversation_may_be_interrupted_as_often_as_one_likes(overflow: str | None) -> None:
    agent = Agent(seconds=1.0)
    async with make_supervisor(agent, overflow, max_queue_size=5) as supervisor:
        tickets = []
        for number in range(100):
            tickets.append(await supervisor.submit(message(f"{number}", "interrupt")))
            await asyncio.sleep(0.001)
        assert await statuses(tickets) == [CANCELLED] * 99 + [SUCCEEDED]


@virtual
async def test_a_conversation_that_is_busy_in_another_process_rejects_too(tmp_path: Path) -> None:
    overflow = f"sqlite:///{tmp_path}/spill.db?fsync=no"
    agent = Agent(seconds=1.0)
    async with make_supervisor(agent, overflow) as here, make_supervisor(agent, overflow) as there:
        running = await there.submit(message("first", durable=True))
        busy = await here.submit(message("second", "reject", durable=True))
        assert (busy.verdict, busy.limited_by) == (Verdict.REJECTED, "conversation:alice")
        await running
        assert await here.run(message("third", "reject", durable=True)) is not None
        assert agent.started == ["first", "third"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"thread_id": "t", "on_busy": "wait"}, "on_busy"),
        ({"on_busy": "reject"}, "thread_id"),
        ({"on_busy": None}, "on_busy"),
    ],
)
def test_what_cannot_be_done_is_an_error(options: Any, field: str) -> None:
    with pytest.raises(InvalidTask, match=f"Task {field} is"):
        Task("work", **options)
