"""One attempt at one task: from the slot it takes to the moment its handler has really ended."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVarTuple

import msgspec

from forebay.events import TaskProgress, log
from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.errors import Overloaded
    from forebay.interfaces import LoadSource
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.runs.runner import Runner
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent

Ts = TypeVarTuple("Ts")


class StopIterationCarrier(BaseException):
    """Brings a handler's StopIteration out of a coroutine, which takes one for its own end."""

    def __init__(self, cause: StopIteration) -> None:
        self.cause = cause


class Run(msgspec.Struct, eq=False):  # a Struct, since it is made in C
    """A task under way on a worker. It is what the task's own calls see as the running task."""

    dispatcher: Dispatcher
    ticket: Ticket
    task: Task
    deadline: Deadline | None
    worker: WorkerAgent
    breaker_epoch: int  # of the worker's breaker
    breaker_phase: int
    started_at: float
    holds_slot: bool = False  # the slot is taken, not lent
    runner: Runner | None = None  # what steps its handler
    timer: Timer | None = None
    awaited_tasks: int = 0  # tasks of whatever house that it awaits
    slot_loans: int = 0  # tasks that it, or a run below it, awaits and that may need its slot
    abandoned_at: float | None = None  # when its ticket ended before its handler did
    zombie: bool = False  # abandoned, and still there after the grace
    ended: bool = False
    calls: dict[LoadSource, int] | None = None  # how often it has called what it draws on
    expected_sources: dict[LoadSource, None] | None = None  # on which its first call is still to come
    rejections: dict[object, Overloaded] | None = None  # of its calls, for good, by what refused them
    upstream_failed: bool = False  # an upstream failed one of its calls
    in_thread: bool = False  # what steps its handler only waits for a thread

    @property
    def attempt(self) -> int:
        """Which start of the task's handler this is."""
        return self.ticket.attempts

    @property
    def lacks_slot(self) -> bool:
        """Whether it goes on, and has no slot: it lent its own, and waits for nothing any more."""
        return not (self.holds_slot or self.lends_slot or self.ended)

    @property
    def lends_slot(self) -> bool:
        """Whether its slot is for others now: see `SlotLoan`."""
        return self.awaited_tasks > 0 and self.slot_loans > 0

    def record_call(self, source: LoadSource) -> None:
        """Its worker's runs draw on `source`. From any thread."""
        calls = self.calls
        if calls is None:
            calls = self.calls = {}
        calls[source] = calls.get(source, 0) + 1
        if self.expected_sources is not None and source in self.expected_sources:
            self._in_loop(self.first_call_made, source)
        elif source not in self.worker.sources:
            self._in_loop(self.dispatcher.source_used, self, source)

    def first_call_made(self, source: LoadSource) -> None:
        """Its first call of `source` is there, or will never come."""
        if self.expected_sources is not None and source in self.expected_sources:
            del self.expected_sources[source]
            source.add_expected_calls(-1)

    def record_rejection(self, by: object, error: Overloaded) -> None:
        """A call was refused for good."""
        self.rejections = {**(self.rejections or {}), by: error}

    def record_upstream_fault(self) -> None:
        """An upstream failed one of its calls."""
        self.upstream_failed = True

    def report(self, value: Any) -> None:
        """Hand `value` to whoever listens; from any thread."""
        self._in_loop(self._emit_progress, value)

    def _in_loop(self, callback: Callable[[*Ts], object], *arguments: *Ts) -> None:
        if asyncio._get_running_loop() is self.dispatcher.loop:  # noqa: SLF001 - documented for such use; None in a thread
            callback(*arguments)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self.dispatcher.loop.call_soon_threadsafe(callback, *arguments)

    def _emit_progress(self, value: Any) -> None:
        if not self.ended:
            self.dispatcher.emit(
                self.ticket, TaskProgress(at=self.dispatcher.loop.time(), task_id=self.task.task_id, value=value)
            )

    async def call_in_thread(self) -> Any:
        """Call the handler in a thread; its value."""
        # The thread reports by value: no future can carry StopIteration.
        self.in_thread = True
        loop, work = self.dispatcher.loop, copy_context().run
        try:
            value, cause = await loop.run_in_executor(
                self.dispatcher.threads, work, _call_handler, self.worker.handler.call, self.task
            )
        finally:
            self.in_thread = False
        if isinstance(cause, StopIteration):
            raise StopIterationCarrier(cause)
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
                    self.dispatcher.run_in_background(asked)
            except Exception:  # noqa: BLE001 - it is the user's, and the run must be stopped all the same
                log.exception("on_cancel of worker %r failed for task %r", self.worker.name, self.task.task_id)
        if self.runner is not None and not self.in_thread:
            self.runner.stop(self)


def _call_handler(call: Any, task: Task) -> tuple[Any, BaseException | None]:
    try:
        return call(task), None
    except BaseException as exc:  # noqa: BLE001 - told to the loop as a value
        return None, exc
