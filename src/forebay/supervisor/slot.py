"""Slot: the caller's own code, in its own coroutine, admitted like a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from forebay import context
from forebay.errors import ForebayError, SlotMisused, TaskCancelled, TaskTimedOut, fresh_copy
from forebay.supervisor.ticket import Reclaim, Ticket, TicketOwner, TicketRun, as_error
from forebay.task import TaskResult

if TYPE_CHECKING:
    from forebay.supervisor.worker import WorkerAgent


class Slot:
    """An async context manager that holds a worker's slot while its body runs.

    Entering waits in the queue. The body may run as long as an attempt of a handler may; then it is cancelled, and
    ``TaskTimedOut`` leaves the block.

    Raises:
        Overloaded: on entering, if the task is not admitted. A slot never waits in the overflow.
        TaskExpired: on entering, if the deadline passed first.
        TaskTimedOut, TaskCancelled: on leaving, if the body took too long or the supervisor stopped.
    """

    def __init__(self, dispatcher: TicketOwner, ticket: Ticket, try_admit: Callable[[Ticket], None]) -> None:
        self._dispatcher = dispatcher
        self._ticket = ticket
        self._try_admit = try_admit
        self._granted: asyncio.Future[TicketRun] = dispatcher.loop.create_future()
        self._run: TicketRun | None = None
        self._owner: asyncio.Task[object] | None = None
        self._cancelling = 0  # cancellations of the owner that were pending on entering
        self._timeout: asyncio.Timeout | None = None
        self._outer_run: context.RunningTask | None = None
        self._reclaim: Reclaim | None = None
        self._stopped = False

    @property
    def task_id(self) -> str:
        """The id under which it appears in events."""
        return self._ticket.task_id

    @property
    def worker(self) -> WorkerAgent:
        """The worker whose slot it holds, inside the block."""
        return self._entered().worker

    async def __aenter__(self) -> Self:
        ticket = self._ticket
        if ticket.slot is not None:
            raise SlotMisused(why="was entered twice")
        self._outer_run = context.running_task()
        self._owner = asyncio.current_task()
        self._cancelling = self._owner.cancelling() if self._owner is not None else 0
        ticket.occupy(self)
        self._try_admit(ticket)
        if not ticket:
            raise ticket.refusal()
        # Lent for as long as the body runs, because the body may need the slot of the outer run.
        self._reclaim = self._dispatcher.lend_slots(ticket.parent, ticket)
        try:
            run = await self._granted
        except asyncio.CancelledError:
            if self._run is not None:  # granted in the same turn of the loop
                self._run.handler_ended(None, asyncio.CancelledError())
            else:
                ticket.cancel("its caller has gone")
            await self._return_loan()
            if self._was_stopped():
                raise self._stop_error() from None
            raise
        except ForebayError:
            await self._return_loan()
            raise
        # asyncio itself cancels the body in time, and distinguishes that cancellation from others.
        self._timeout = asyncio.timeout_at(run.ends_at())
        await self._timeout.__aenter__()
        context.set_running_task(run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        run = self._entered()
        assert self._timeout is not None  # noqa: S101 - entered
        # Set, not reset with a token, because an async generator may be closed from another context.
        context.set_running_task(self._outer_run)
        try:
            await self._timeout.__aexit__(kind, cause, trace)
        except TimeoutError:
            run.time_out()
            result, worker_id = self._ticket.result, run.worker.name
            if result is None:
                raise TaskTimedOut(task_id=self.task_id, worker_id=worker_id, error="its time was up") from None
            raise as_error(result) from None
        finally:
            # If the body is in a generator that its reader closes, the caller has gone: not the worker's fault.
            gone = isinstance(cause, GeneratorExit)
            run.handler_ended(None, asyncio.CancelledError() if gone else cause)
            await self._return_loan()
        if isinstance(cause, asyncio.CancelledError) and self._was_stopped():
            raise self._stop_error() from None

    def _was_stopped(self) -> bool:
        """Take back the cancellation by `stop`; return whether there was one, and nobody else cancelled the owner."""
        if not self._stopped or self._owner is None:
            return False
        self._stopped = False
        return self._owner.uncancel() <= self._cancelling

    def _stop_error(self) -> ForebayError:
        """Return the error that leaves the block because the task was ended from outside."""
        result = self._ticket.result
        if result is not None:
            return as_error(result)
        worker_id = self._entered().worker.name
        return TaskCancelled(task_id=self.task_id, worker_id=worker_id, error="its slot was ended from outside")

    @property
    def is_ending(self) -> bool:
        """True once its time is up, or it was asked to stop: its owner has been cancelled."""
        return self._stopped or (self._timeout is not None and self._timeout.expired())

    @property
    def run(self) -> TicketRun:
        """Its run, inside the block."""
        return self._entered()

    def _entered(self) -> TicketRun:
        if self._run is None:
            raise SlotMisused(why="was asked for its worker outside of its block")
        return self._run

    async def _return_loan(self) -> None:
        if self._reclaim is not None:
            reclaim, self._reclaim = self._reclaim, None
            await reclaim()

    # --- what its ticket and its run call ---

    def grant(self, run: TicketRun) -> None:
        """Let the body run. If the caller was cancelled in the same turn of the loop, `__aenter__` returns the slot."""
        self._run = run
        if not self._granted.done():
            self._granted.set_result(run)

    def resolve(self, outcome: TaskResult | ForebayError) -> None:
        """Record that its ticket has ended; if it has no slot yet, entering raises."""
        if not self._granted.done():
            self._granted.set_exception(as_error(outcome) if isinstance(outcome, TaskResult) else fresh_copy(outcome))

    def stop(self) -> None:
        """Cancel the body."""
        if self._timeout is not None and self._timeout.expired():
            return
        if self._owner is not None:
            self._stopped = True
            self._owner.cancel()
