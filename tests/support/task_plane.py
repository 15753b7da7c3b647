"""Helpers of the task plane's tests: virtual time, agents that take their seconds, and tickets of many tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import Any

import pytest

from forebay import BackpressureSupervisor, Priority, Task, TaskResult, TaskStatus, Ticket, Verdict
from forebay.testing import SlowHandler, UncancellableHandler, now, run_ready, virtual

__all__ = [
    "Agent",
    "UncancellableHandler",
    "admitted",
    "approximately",
    "error_of",
    "fill",
    "find_result",
    "find_ticket",
    "flood",
    "now",
    "rejected",
    "results",
    "run_ready",
    "statuses",
    "submit_all",
    "virtual",
]  # fmt: skip

Agent = SlowHandler  # the handler of most tests: it takes its seconds and remembers its runs

TIMER_JITTER = 1e-3  # seconds by which virtual timers may jitter, many times over


def approximately(seconds: float) -> Any:
    """Return something equal to `seconds` except for the jitter of timers."""
    return pytest.approx(seconds, abs=TIMER_JITTER)


async def submit_all(supervisor: BackpressureSupervisor, tasks: Iterable[Task]) -> list[Ticket]:
    """Submit tasks in order."""
    return [await supervisor.submit(task) for task in tasks]


def flood(supervisor: BackpressureSupervisor, task_type: str, count: int, **options: Any) -> list[Ticket]:
    """Submit `count` tasks at once, their payloads 0, 1, ..."""
    return [supervisor.submit_nowait(Task(task_type, number, **options)) for number in range(count)]


def admitted(tickets: Iterable[Ticket]) -> list[Ticket]:
    """Return the tickets that were admitted."""
    return [ticket for ticket in tickets if ticket.verdict is Verdict.ADMITTED]


def rejected(tickets: Iterable[Ticket]) -> list[Ticket]:
    """Return the tickets that were rejected."""
    return [ticket for ticket in tickets if ticket.verdict is Verdict.REJECTED]


async def fill(supervisor: BackpressureSupervisor, task_type: str, priority: Priority = Priority.CRITICAL) -> int:
    """Submit tasks until one of `priority` is rejected; return how many were admitted."""
    count = 0
    while supervisor.submit_nowait(Task(task_type, count, priority=priority)):
        count += 1
    return count


async def results(tickets: Iterable[Ticket]) -> list[TaskResult]:
    """Return the result of each."""
    return [await ticket for ticket in tickets]


async def statuses(tickets: Iterable[Ticket]) -> list[TaskStatus]:
    """Return the final status of each."""
    return [result.status for result in await results(tickets)]


async def find_ticket(supervisor: BackpressureSupervisor, task_id: str) -> Ticket:
    """Return the ticket of a task that is inside, has ended lately, or is stored."""
    ticket = await supervisor.find(task_id)
    assert ticket is not None, task_id
    return ticket


async def find_result(supervisor: BackpressureSupervisor, task_id: str) -> TaskResult:
    """Return the result of such a task."""
    return await (await find_ticket(supervisor, task_id))


async def error_of(awaitable: Awaitable[Any]) -> BaseException:
    """Return what awaiting it raises."""
    try:
        value = await awaitable
    except BaseException as error:  # noqa: BLE001 - the test judges it
        return error
    message = f"it returned {value!r}"
    raise AssertionError(message)
