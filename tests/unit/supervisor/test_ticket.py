"""The states of a ticket, and what a user of it sees."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.task_plane import error_of, virtual

from forebay import Overloaded, Task, TaskCancelled, TaskResult, TaskStatus, Ticket, Verdict
from forebay.errors import StillSpilled
from forebay.events import Event, TaskFinished
from forebay.interfaces import Lease, TaskRecord
from forebay.supervisor.ticket import Refusal, as_error, spilled_ticket, unsuccessful_result
from forebay.task import Priority


class Owner:
    """As much of a dispatcher as a ticket needs."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.cancelled: list[str] = []
        self.held: list[str] = []

    def cancel(self, ticket: Ticket, reason: str) -> None:
        self.cancelled.append(f"{ticket.task_id}: {reason}")

    def lend_slots(self, running: Any, awaited: Ticket | None) -> None:
        assert running is None
        assert isinstance(awaited, Ticket)

    def hold_strongly(self, task_id: str) -> None:
        self.held.append(task_id)


def new_ticket(task_id: str = "a") -> Ticket:
    return Ticket(Owner(), Task("work", task_id=task_id), None, None)


def success(ticket: Ticket) -> TaskResult:
    return TaskResult(
        task_id=ticket.task_id,
        worker_id="w",
        success=True,
        status=TaskStatus.SUCCEEDED,
        result="value",
        duration_ms=1.0,
        attempts=1,
    )


def lease_on(ticket: Ticket, *, attempts: int) -> Lease:
    record = TaskRecord(
        task_id=ticket.task_id,
        task_type="work",
        priority=Priority.NORMAL,
        envelope=b"",
        enqueued_at=0.0,
        attempts=attempts,
    )
    return Lease(record=record, fence="f", until=1.0)


@virtual
async def test_awaiting_an_ended_ticket_returns_at_once_and_again() -> None:
    ticket = new_ticket()
    ticket.resolve(success(ticket))
    assert (await ticket).result == (await ticket).result == "value"
    assert ticket.done()


@virtual
async def test_every_waiter_is_woken_by_the_result() -> None:
    ticket = new_ticket()
    waiters = [asyncio.ensure_future(ticket.value()) for _ in range(3)]
    await asyncio.sleep(0)
    assert ticket.has_waiters
    ticket.resolve(success(ticket))
    assert await asyncio.gather(*waiters) == ["value"] * 3
    assert not ticket.has_waiters


@virtual
async def test_a_rejected_ticket_has_the_facts_of_its_refusal() -> None:
    ticket = new_ticket()
    ticket.reject(Refusal("it is full", "pool:work", 0.9, may_spill=False), 3.0)
    error = await error_of(ticket)
    assert isinstance(error, Overloaded)
    assert (error.limited_by, error.load, error.retry_after) == ("pool:work", 0.9, 3.0)
    assert not ticket
    assert ticket.done()
    assert (ticket.verdict, ticket.status) == (Verdict.REJECTED, TaskStatus.REJECTED)


@virtual
async def test_a_ticket_is_resolved_exactly_once() -> None:
    ticket = new_ticket()
    ticket.resolve(success(ticket))
    with pytest.raises(AssertionError):
        ticket.resolve(success(ticket))


@virtual
async def test_a_refilled_ticket_has_the_attempts_of_its_record() -> None:
    ticket = new_ticket()
    ticket.spill()
    assert (ticket.verdict, ticket.status, ticket.stored) == (Verdict.SPILLED, TaskStatus.SPILLED, True)
    ticket.refill(lease_on(ticket, attempts=2))
    assert ticket.attempts == 2
    assert ticket.lease is not None
    ticket.drop_lease()
    assert ticket.lease is None
    assert ticket.stored


@virtual
async def test_an_adopted_ticket_waits_again() -> None:
    ticket = new_ticket()
    ticket.move_to_store()
    ticket.adopt(lease_on(ticket, attempts=0))
    assert ticket.status is TaskStatus.WAITING


@virtual
async def test_a_spilled_ticket_is_held_once_somebody_waits() -> None:
    owner = Owner()
    ticket = spilled_ticket(owner, Task("work", task_id="a"))
    ticket.move_to_store()
    waiter = asyncio.ensure_future(error_of(ticket))
    await asyncio.sleep(0)
    assert owner.held == ["a"]
    ticket.resolve(StillSpilled(task_id="a"))
    assert isinstance(await waiter, StillSpilled)


@virtual
async def test_cancel_asks_the_owner_until_the_task_has_ended() -> None:
    ticket = new_ticket()
    owner = ticket._dispatcher
    assert isinstance(owner, Owner)
    assert ticket.cancel("because")
    ticket.resolve(success(ticket))
    assert not ticket.cancel()
    assert owner.cancelled == ["a: because"]


@virtual
async def test_events_of_an_ended_ticket_are_its_end() -> None:
    ticket = new_ticket()
    ticket.resolve(success(ticket))
    events: list[Event] = [event async for event in ticket.events()]
    assert [type(event) for event in events] == [TaskFinished]


@virtual
async def test_dir_lists_what_is_documented() -> None:
    names = [name for name in dir(new_ticket()) if not name.startswith("_")]
    assert names == [
        "as_dict",
        "cancel",
        "deadline",
        "done",
        "events",
        "limited_by",
        "load",
        "priority",
        "reason",
        "refusal",
        "result",
        "retry_after",
        "status",
        "task",
        "task_id",
        "value",
        "verdict",
    ]
    assert all(hasattr(new_ticket(), name) for name in names)


@virtual
async def test_an_unsuccessful_result_becomes_the_error_of_its_status() -> None:
    ticket = new_ticket()
    error = as_error(unsuccessful_result(ticket, TaskStatus.CANCELLED, "because", worker_id="w"))
    assert isinstance(error, TaskCancelled)
    assert "because" in str(error)
