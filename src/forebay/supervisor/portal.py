"""Portal: blocking access to a supervisor, for threads and programs without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from forebay._text import format_duration
from forebay.errors import ForkedProcess, LoopStopped, NotStarted, SupervisorClosed, WouldDeadlock
from forebay.task import Task, TaskResult, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.supervisor.drain import DrainReport
    from forebay.supervisor.ticket import Ticket

T = TypeVar("T")

_LOOP_CHECK_INTERVAL = 1.0  # seconds
_MAX_LOOP_PAUSE = 5.0  # seconds for which the loop may stand still, as between two `run_until_complete`


class PortalSupervisor(Protocol):
    """The supervisor, as far as a portal needs it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it runs on, while it runs."""

    @property
    def started(self) -> bool:
        """True once it has been started."""

    @property
    def forked_from(self) -> int | None:
        """The process in which it was started, if this is another one."""

    async def run(self, task: Task) -> Any:
        """Run a task and return its value."""

    async def submit(self, task: Task) -> Ticket:
        """Submit a task."""

    async def start(self) -> None:
        """Start it."""

    async def drain(self) -> DrainReport:
        """Finish what is inside."""

    async def close(self) -> None:
        """Stop it."""


class PortalTicket:
    """A ticket for threads, with a `result` that blocks."""

    def __init__(self, portal: Portal, ticket: Ticket) -> None:
        self._portal = portal
        self._ticket = ticket
        self.task_id: str = ticket.task_id
        self.verdict: Verdict = ticket.verdict
        self.reason: str | None = ticket.reason
        self.limited_by: str | None = ticket.limited_by
        self.load: float | None = ticket.load
        self.retry_after: float | None = ticket.retry_after

    def __bool__(self) -> bool:
        return bool(self._ticket)

    def __repr__(self) -> str:
        return f"PortalTicket({self._ticket!r})"

    @property
    def status(self) -> TaskStatus:
        """The present status of the task."""
        return self._ticket.status

    def result(self, timeout: float | None = None) -> TaskResult:
        """Wait for the task to end, for at most `timeout` seconds; after that the task goes on.

        The result of a task that has ended is there after the portal has closed, too.

        Raises:
            Overloaded: it was rejected.
            TimeoutError: it has not ended in time.
        """
        if self._ticket.done():
            return self._ticket.outcome()

        async def ended() -> TaskResult:
            async with asyncio.timeout(timeout):
                return await self._ticket

        try:
            return self._portal._call(ended(), "result")  # noqa: SLF001 - a portal and its tickets are one thing
        except TimeoutError:
            within = format_duration(timeout or 0.0)
            message = f"task {self.task_id!r} is {self.status.name} and has not ended within {within}; it goes on"
            raise TimeoutError(message) from None

    def cancel(self) -> bool:
        """Cancel the task; return False if it had ended already."""
        if self._ticket.done():
            return False

        async def cancel() -> bool:
            return self._ticket.cancel()

        return self._portal._call(cancel(), "cancel")  # noqa: SLF001 - a portal and its tickets are one thing


class Portal:
    """Blocking access to a supervisor, from any thread except its loop's.

    If the supervisor runs, the portal is ready at once. If it has not been started, the portal is a context manager: it
    runs an event loop in a thread of its own, starts the supervisor there, and drains it on leaving.
    """

    def __init__(self, supervisor: PortalSupervisor) -> None:
        self._supervisor = supervisor
        self._loop: asyncio.AbstractEventLoop | None = None  # the one in the portal's thread
        self._thread: threading.Thread | None = None
        self._stop_requested: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._abort = False

    def run(self, task: Task) -> Any:
        """Run a task and return its value: see ``supervisor.run``.

        Raises:
            WouldDeadlock: it was called on the supervisor's own loop.
            LoopStopped: that loop does not run.
        """
        return self._call(self._supervisor.run(task), "run")

    def submit(self, task: Task) -> PortalTicket:
        """Submit a task: see ``supervisor.submit``.

        Raises:
            WouldDeadlock: it was called on the supervisor's own loop.
            LoopStopped: that loop does not run.
        """
        return PortalTicket(self, self._call(self._supervisor.submit(task), "submit"))

    def _call(self, work: Coroutine[Any, Any, T], name: str) -> T:
        if (parent := self._supervisor.forked_from) is not None:
            work.close()
            raise ForkedProcess(what="The supervisor", parent=parent)
        loop = self._supervisor.loop
        if loop is None or loop.is_closed():
            work.close()
            raise SupervisorClosed(state="closed") if self._supervisor.started else NotStarted
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - documented for such use; None in a thread
            work.close()
            what = f"portal.{name}() blocks its thread and was called on the supervisor's own event loop, which"
            raise WouldDeadlock(what=what, advice=f"await supervisor.{name}(...) here")
        # The caller's context is copied, so that a nested task knows its parent.
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            _wait_until_done(future, loop, name)
            return future.result()
        except BaseException:
            future.cancel()  # the caller has gone (Ctrl-C); no effect if the work has ended
            raise

    def __enter__(self) -> Self:
        if self._supervisor.loop is None:
            ready = threading.Event()
            self._thread = threading.Thread(target=self._serve, args=(ready,), name="forebay-portal", daemon=True)
            self._thread.start()
            ready.wait()
            if self._failure is not None:
                self._thread.join()
                raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None and self._loop is not None and self._stop_requested is not None:
            self._abort = kind is not None
            self._loop.call_soon_threadsafe(self._stop_requested.set)
            self._thread.join()
            self._loop = None
            if self._failure is not None and kind is None:
                raise self._failure

    def _serve(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._stop_requested = asyncio.Event()
            await self._supervisor.start()
            self._loop = asyncio.get_running_loop()
            ready.set()
            await self._stop_requested.wait()
            if not self._abort:
                await self._supervisor.drain()
            await self._supervisor.close()

        try:
            asyncio.run(main())
        except BaseException as exc:  # noqa: BLE001 - raised again in the thread that entered the portal
            self._failure = exc
        finally:
            ready.set()


def _wait_until_done(future: Future[Any], loop: asyncio.AbstractEventLoop, name: str) -> None:
    """Wait for work that was passed to `loop`, by the method `name` of a portal.

    Raises:
        SupervisorClosed: the loop was closed in the moment of the call, and has dropped the work.
        LoopStopped: the loop does not run.
    """
    paused = 0.0
    while not wait((future,), timeout=_LOOP_CHECK_INTERVAL).done:
        if loop.is_closed():
            raise SupervisorClosed(state="closed")
        paused = 0.0 if loop.is_running() else paused + _LOOP_CHECK_INTERVAL
        if paused >= _MAX_LOOP_PAUSE:
            raise LoopStopped(call=name, seconds=paused)
