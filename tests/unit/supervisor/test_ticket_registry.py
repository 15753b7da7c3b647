"""The tickets of a supervisor: which are held, and for how long."""

from __future__ import annotations

import asyncio
import gc

from tests.support.task_plane import virtual
from tests.unit.supervisor.test_ticket import new_ticket, success

from forebay import TaskStatus
from forebay.events import Event, EventBus, TaskFinished
from forebay.supervisor.ticket import unsuccessful_result
from forebay.supervisor.ticket_registry import TicketRegistry


def new_registry(keep: int = 2) -> TicketRegistry:
    return TicketRegistry(asyncio.get_running_loop(), EventBus(), keep=keep, keep_bytes=1_000_000)


@virtual
async def test_the_latest_ended_tickets_are_kept() -> None:
    registry = new_registry(keep=2)
    for task_id in "abc":
        ticket = new_ticket(task_id)
        registry.add(ticket)
        registry.settle(ticket, success(ticket))
    assert [registry.get(task_id) is not None for task_id in "abc"] == [False, True, True]
    assert not registry.live
    assert registry.succeeded == 3


@virtual
async def test_ends_without_success_are_counted_by_status() -> None:
    registry = new_registry()
    for task_id, status in (("a", TaskStatus.EXPIRED), ("b", TaskStatus.EXPIRED), ("c", TaskStatus.FAILED)):
        ticket = new_ticket(task_id)
        registry.settle(ticket, unsuccessful_result(ticket, status, "why"))
    assert (registry.ends[TaskStatus.EXPIRED], registry.ends[TaskStatus.FAILED], registry.succeeded) == (2, 1, 0)


@virtual
async def test_a_weakly_held_ticket_goes_with_its_last_holder() -> None:
    registry = new_registry()
    ticket = new_ticket("a")
    registry.add(ticket)
    registry.hold_weakly(ticket)
    assert registry.get("a") is None
    assert registry.weak.get("a") is ticket
    assert registry.all_unfinished() == [ticket]
    del ticket
    gc.collect()
    assert registry.all_unfinished() == []


@virtual
async def test_a_weakly_held_ticket_is_held_again_on_demand() -> None:
    registry = new_registry()
    ticket = new_ticket("a")
    registry.hold_weakly(ticket)
    assert registry.hold_strongly("a") is ticket
    assert registry.get("a") is ticket
    assert registry.hold_strongly("a") is None


@virtual
async def test_only_the_ticket_itself_is_discarded() -> None:
    registry = new_registry()
    ticket, twin = new_ticket("a"), new_ticket("a")
    registry.add(ticket)
    registry.discard(twin)
    assert registry.get("a") is ticket
    registry.discard(ticket)
    assert registry.get("a") is None


@virtual
async def test_settling_reports_the_end_and_wakes_the_listeners() -> None:
    events: list[Event] = []
    progress: list[None] = []
    bus = EventBus()
    bus.add_observer(events.append)
    registry = TicketRegistry(asyncio.get_running_loop(), bus, keep=1, keep_bytes=1_000_000)

    def listener() -> None:
        progress.append(None)

    registry.add_listener(listener)
    ticket = new_ticket()
    registry.settle(ticket, success(ticket))
    registry.remove_listener(listener)
    registry.notify_progress()
    assert [type(event) for event in events] == [TaskFinished]
    assert len(progress) == 1
