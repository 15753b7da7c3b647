"""The words in which the acceptance tests speak: virtual time, agents that do as told, and tickets of many tasks."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, ParamSpec

import pytest

from forebay import BackpressureSupervisor, Priority, Task, TaskResult, TaskStatus, Ticket, Verdict
from forebay.sim import simulate

P = ParamSpec("P")

SOON = 1e-3  # seconds by which virtual timers may jitter, many times over


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test in virtual time: minutes pass in milliseconds, and a deadlock is an error."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        simulate(lambda: test(*args, **kwargs))

    return run


def now() -> float:
    """Loop time in seconds."""
    return asyncio.get_running_loop().time()


def about(seconds: float) -> Any:
    """Equal, but for the jitter of timers."""
    return pytest.approx(seconds, abs=SOON)


async def turns(count: int = 10) -> None:
    """Let everything that is ready happen; no time passes."""
    for _ in range(count):
        await asyncio.sleep(0)


class Agent:
    """A handler that takes `seconds`, raises what it is told to, and remembers what it saw.

    Attributes:
        seconds: how long a run takes; may be changed between runs.
        error: what each run raises at its end, or None.
        began: payloads in the order in which their runs began.
        ended: payloads in the order in which their runs ended, however.
        running: runs under way.
        peak: the most that were under way at a time.
    """

    def __init__(self, seconds: float = 1.0, *, error: BaseException | None = None) -> None:
        self.seconds = seconds
        self.error = error
        self.began: list[Any] = []
        self.ended: list[Any] = []
        self.running = 0
        self.peak = 0

    async def __call__(self, task: Task) -> Any:
        self.began.append(task.payload)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.seconds)
            if self.error is not None:
                raise self.error
            return task.payload
        finally:
            self.running -= 1
            self.ended.append(task.payload)


class Stubborn:
    """A handler that swallows every cancellation and ends after `seconds`, as some agent teams do."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ended = 0

    async def __call__(self, task: Task) -> Any:
        due = now() + self.seconds
        while (left := due - now()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                continue
        self.ended += 1
        return task.payload


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
