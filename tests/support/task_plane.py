"""The words in which the acceptance tests speak: virtual time, agents that do as told, and tickets of many tasks."""

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
    """Equal, but for the jitter of timers."""
    return pytest.approx(seconds, abs=TIMER_JITTER)


async def submit_all(supervisor: BackpressureSupervisor, tasks: Iterable[Task]) -> list[Ticket]:
    """Submit in order."""
    return [await supervisor.submit(task) for task in tasks]


def flood(supervisor: BackpressureSupervisor, task_type: str, count: int, **options: Any) -> list[Ticket]:
    """Submit `count` tasks at once, their payloads 0, 1, ..."""
    return [supervisor.submit_nowait(Task(task_type, number, **options)) for number in range(count)]


def admitted(tickets: Iterable[Ticket]) -> list[Ticket]:
    """Those that were let in."""
    return [ticket for ticket in tickets if ticket.verdict is Verdict.ADMITTED]


def rejected(tickets: Iterable[Ticket]) -> list[Ticket]:
    """Those that were sent away."""
    return [ticket for ticket in tickets if ticket.verdict is Verdict.REJECTED]


async def fill(supervisor: BackpressureSupervisor, task_type: str, priority: Priority = Priority.CRITICAL) -> int:
    """Submit tasks until the house takes no more of `priority`; how many it took."""
    count = 0
    while supervisor.submit_nowait(Task(task_type, count, priority=priority)):
        count += 1
    return count


async def results(tickets: Iterable[Ticket]) -> list[TaskResult]:
    """How each ended."""
    return [await ticket for ticket in tickets]


async def statuses(tickets: Iterable[Ticket]) -> list[TaskStatus]:
    """How each ended, in a word."""
    return [result.status for result in await results(tickets)]


async def error_of(awaitable: Awaitable[Any]) -> BaseException:
    """What awaiting it raises."""
    try:
        value = await awaitable
    except BaseException as error:  # noqa: BLE001 - the test judges it
        return error
    message = f"it returned {value!r}"
    raise AssertionError(message)
