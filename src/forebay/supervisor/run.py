"""One attempt at one task: from the slot it takes to the moment its handler has really ended."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from contextvars import Context
from typing import TYPE_CHECKING, Any, NamedTuple

from forebay import context
from forebay.events import Progress, log
from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.timers import Timer
    from forebay.supervisor.worker import WorkerAgent


class Ending(NamedTuple):
    """How a handler ended: with a value, or with an exception of any kind."""

    value: Any
    cause: BaseException | None


class Run:
    """A task under way on a worker. It is what the task's own calls see as the running task."""

    __slots__ = (
        "_in_thread", "abandoned_at", "aio", "awaits", "began_at", "deadline", "ended", "era", "holds", "house",
        "phase", "task", "ticket", "timer", "waits_below", "worker", "zombie",
    )  # fmt: skip

    def __init__(self, house: Dispatcher, ticket: Ticket, worker: WorkerAgent, era: int, now: float) -> None:
        self.house = house
        self.ticket = ticket
        self.task: Task = ticket.task
        self.deadline: Deadline | None = ticket.deadline
        self.worker = worker
        self.era = era  # of the worker's breaker
        self.phase = worker.phase
        self.began_at = now
        self.aio: asyncio.Task[Any] | None = None
        self.timer: Timer | None = None
        self.holds = False  # the slot is taken, not lent
        self.awaits = 0  # tasks of whatever house that it awaits
        self.waits_below = 0  # tasks that it, or a run below it, awaits and that may need its slot
        self.abandoned_at: float | None = None  # when its ticket ended before its handler did
        self.zombie = False  # abandoned, and still there after the grace
        self.ended = False
        self._in_thread = False

    @property
    def lacks_slot(self) -> bool:
        """Whether it goes on, and has no slot: it lent its own, and waits for nothing any more."""
        return not (self.holds or self.lends or self.ended)

    @property
    def lends(self) -> bool:
        """Whether its slot is for others now: see `Loan`."""
        return self.awaits > 0 and self.waits_below > 0

    def report(self, value: Any) -> None:
        """Hand `value` to whoever listens; from any thread."""
        if asyncio._get_running_loop() is self.house.loop:  # noqa: SLF001 - documented for such use; None in a thread
            self._tell(value)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self.house.loop.call_soon_threadsafe(self._tell, value)

    def _tell(self, value: Any) -> None:
        if not self.ended:
            self.house.tell(self.ticket, Progress(at=self.house.loop.time(), task_id=self.task.task_id, value=value))

    def begin(self, surroundings: Context) -> None:
        """Start the handler in a context of its own, a copy of `surroundings`."""
        own = surroundings.copy()
        own.run(context.enter, self)
        self.aio = self.house.loop.create_task(self._execute(own), context=own)
        self.aio.add_done_callback(self._done)

    async def _execute(self, own: Context) -> Ending:
        handler = self.worker.handler
        try:
            if handler.blocking:
                value, cause = await self._in_a_thread(own)
                if cause is not None:
                    return Ending(None, cause)
            else:
                value = handler.call(self.task)
            if inspect.isawaitable(value):
                value = await value
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # noqa: BLE001 - a handler's SystemExit must not end the loop and all other tasks
            return Ending(None, exc)
        return Ending(value, None)

    async def _in_a_thread(self, own: Context) -> Ending:
        # The thread reports by value: neither a future nor a coroutine can carry StopIteration.
        self._in_thread = True
        loop = self.house.loop
        ending = await loop.run_in_executor(
            self.house.threads, own.copy().run, _call, self.worker.handler.call, self.task
        )
        self._in_thread = False
        return ending

    def _done(self, aio: asyncio.Task[Ending]) -> None:
        if aio.cancelled():
            ending = Ending(None, asyncio.CancelledError())
        else:
            exc = aio.exception()
            ending = aio.result() if exc is None else Ending(None, exc)
        self.aio = None
        self.house.ended(self, ending)

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
        if self.aio is not None and not self._in_thread:
            self.aio.cancel()


def _call(call: Any, task: Task) -> Ending:
    try:
        return Ending(call(task), None)
    except BaseException as exc:  # noqa: BLE001 - told to the loop as a value
        return Ending(None, exc)
