"""One attempt at one task: from the slot it takes to the moment its handler has really ended."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVarTuple

import msgspec

from forebay.events import Progress, log
from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.errors import Overloaded
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.runner import Runner
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.timers import Timer
    from forebay.supervisor.worker import WorkerAgent
    from forebay.typing import Source

Ts = TypeVarTuple("Ts")


class Carrier(BaseException):
    """Brings a handler's StopIteration out of a coroutine, which takes one for its own end."""

    def __init__(self, cause: StopIteration) -> None:
        self.cause = cause


class Run(msgspec.Struct, eq=False):  # a Struct, since it is made in C
    """A task under way on a worker. It is what the task's own calls see as the running task."""

    house: Dispatcher
    ticket: Ticket
    task: Task
    deadline: Deadline | None
    worker: WorkerAgent
    era: int  # of the worker's breaker
    phase: int
    began_at: float
    holds: bool = False  # the slot is taken, not lent
    runner: Runner | None = None  # what steps its handler
    timer: Timer | None = None
    awaits: int = 0  # tasks of whatever house that it awaits
    waits_below: int = 0  # tasks that it, or a run below it, awaits and that may need its slot
    abandoned_at: float | None = None  # when its ticket ended before its handler did
    zombie: bool = False  # abandoned, and still there after the grace
    ended: bool = False
    calls: dict[Source, int] | None = None  # how often it has called what it draws on
    expected: dict[Source, None] | None = None  # on which its first call is still to come
    refusals: dict[object, Overloaded] | None = None  # of its calls, for good, by what refused them
    blameless: bool = False  # an upstream failed one of its calls
    in_thread: bool = False  # what steps its handler only waits for a thread

    @property
    def attempt(self) -> int:
        """Which start of the task's handler this is."""
        return self.ticket.attempts

    @property
    def lacks_slot(self) -> bool:
        """Whether it goes on, and has no slot: it lent its own, and waits for nothing any more."""
        return not (self.holds or self.lends or self.ended)

    @property
    def lends(self) -> bool:
        """Whether its slot is for others now: see `Loan`."""
        return self.awaits > 0 and self.waits_below > 0

    def meet(self, source: Source) -> None:
        """Its worker's runs draw on `source`. From any thread."""
        calls = self.calls
        if calls is None:
            calls = self.calls = {}
        calls[source] = calls.get(source, 0) + 1
        if self.expected is not None and source in self.expected:
            self._in_loop(self.called, source)
        elif source not in self.worker.sources:
            self._in_loop(self.house.link, self, source)

    def called(self, source: Source) -> None:
        """Its first call of `source` is there, or will never come."""
        if self.expected is not None and source in self.expected:
            del self.expected[source]
            source.coming(-1)

    def refused(self, by: object, error: Overloaded) -> None:
        """A call was refused for good."""
        self.refusals = {**(self.refusals or {}), by: error}

    def let_down(self) -> None:
        """An upstream failed one of its calls."""
        self.blameless = True

    def report(self, value: Any) -> None:
        """Hand `value` to whoever listens; from any thread."""
        self._in_loop(self._tell, value)

    def _in_loop(self, callback: Callable[[*Ts], object], *arguments: *Ts) -> None:
        if asyncio._get_running_loop() is self.house.loop:  # noqa: SLF001 - documented for such use; None in a thread
            callback(*arguments)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self.house.loop.call_soon_threadsafe(callback, *arguments)

    def _tell(self, value: Any) -> None:
        if not self.ended:
            self.house.tell(self.ticket, Progress(at=self.house.loop.time(), task_id=self.task.task_id, value=value))

    async def in_a_thread(self) -> Any:
        """Call the handler in a thread; its value."""
        # The thread reports by value: no future can carry StopIteration.
        self.in_thread = True
        loop, work = self.house.loop, copy_context().run
        try:
            value, cause = await loop.run_in_executor(
                self.house.threads, work, _call, self.worker.handler.call, self.task
            )
        finally:
            self.in_thread = False
        if isinstance(cause, StopIteration):
            raise Carrier(cause)
        if cause is not None:
            raise cause
        return await value if inspect.isawaitable(value) else value

    def stop(self) -> None:
        """Ask the handler to stop. It may not: then it is a zombie until it does.

        A thread cannot be stopped; cancelling what waits for it would only hide it.
        """
        on_cancel = self.worker.handler.on_cancel
        if on_cancel is not None:
            try:
                asked = on_cancel(self.task)
                if inspect.isawaitable(asked):
                    self.house.background(asked)
            except Exception:  # noqa: BLE001 - it is the user's, and the run must be stopped all the same
                log.exception("on_cancel of worker %r failed for task %r", self.worker.name, self.task.task_id)
        if self.runner is not None and not self.in_thread:
            self.runner.stop(self)


def _call(call: Any, task: Task) -> tuple[Any, BaseException | None]:
    try:
        return call(task), None
    except BaseException as exc:  # noqa: BLE001 - told to the loop as a value
        return None, exc
