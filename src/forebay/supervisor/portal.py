"""Portal: blocking access to a supervisor, for threads and programs without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar, Unpack, overload

from forebay import clock, context
from forebay._text import format_duration
from forebay._validate import check_not_negative
from forebay.errors import (
    ForkedProcess,
    LoopStopped,
    NotStarted,
    SlotMisused,
    SupervisorClosed,
    TaskCancelled,
    WouldDeadlock,
)
from forebay.task import Deadline, Priority, ResultT_co, Task, TaskResult, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.context import RunningTask
    from forebay.errors import ForebayError
    from forebay.events import Event, Subscription
    from forebay.retry import Retry
    from forebay.supervisor.drain import DrainReport
    from forebay.supervisor.fan_out import FanOutOptions, Hedge, MapOptions, OnProgress, TaskOptions
    from forebay.supervisor.slot import Slot
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent

T = TypeVar("T")
ResultT = TypeVar("ResultT")

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

    async def run(self, task: Task[ResultT], *, wait: float | None = None) -> ResultT:
        """Run a task and return its value."""

    async def submit(self, task: Task[ResultT], *, wait: float | None = None) -> Ticket[ResultT]:
        """Submit a task."""

    @property
    def map(self) -> Callable[..., Coroutine[Any, Any, list[Any]]]:
        """The method that runs many tasks and returns their values; it has overloads."""

    async def find(self, task_id: str | None = None, *, key: str | None = None) -> Ticket | None:
        """Return the ticket of a task."""

    def ticket(self, task_id: str) -> Ticket:
        """Return the ticket of a task that this process knows."""

    def slot(  # noqa: PLR0913 - a task's fields
        self,
        task_type: str,
        *,
        priority: Priority = Priority.NORMAL,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        tenant: str = "default",
        thread_id: str | None = None,
    ) -> Slot:
        """Return a slot of a worker."""

    def events(self, *, bound: int = 1000) -> Subscription:
        """Return an iterator over the events."""

    async def start(self) -> None:
        """Start it."""

    async def drain(self, timeout: float | None = None) -> DrainReport:  # noqa: ASYNC109 - as the supervisor's
        """Finish what is inside."""

    async def close(self) -> None:
        """Stop it."""


class PortalTicket(Generic[ResultT_co]):
    """A ticket for threads: what waits blocks. The result of a task that has ended outlives the portal.

    Attributes:
        task: the task that was submitted.
        verdict: ADMITTED, SPILLED or REJECTED.
        reason: why it was not admitted, otherwise None.
        limited_by: the resource that kept it from being admitted, otherwise None.
        load: the load of the fullest resource on the task's path, as admission control read it.
        retry_after: if rejected, seconds after which to try again, or None if unknown.
    """

    def __init__(self, portal: Portal, ticket: Ticket[ResultT_co]) -> None:
        self._portal = portal
        self._ticket = ticket
        self.task: Task[ResultT_co] = ticket.task
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
    def task_id(self) -> str:
        """The task's id."""
        return self.task.task_id

    @property
    def status(self) -> TaskStatus:
        """The present status of the task."""
        return self._ticket.status

    def done(self) -> bool:
        """Return whether `result` returns at once."""
        return self._ticket.done()

    def as_dict(self, *, payload: bool = False, values: bool = True) -> dict[str, Any]:
        """Return it as plain data for JSON: see ``Ticket.as_dict``."""
        return self._ticket.as_dict(payload=payload, values=values)

    def result(self, timeout: float | None = None) -> TaskResult[ResultT_co]:
        """Wait for the task to end, for at most `timeout` seconds; after that the task goes on.

        Raises:
            Overloaded: it was rejected.
            TimeoutError: it has not ended in time.
        """
        if self._ticket.done():
            return self._ticket.outcome()
        return self._wait("result", self._end(), timeout)

    async def _end(self) -> TaskResult[ResultT_co]:
        return await self._ticket

    def value(self, timeout: float | None = None) -> ResultT_co:
        """Wait for the task, for at most `timeout` seconds, and return its handler's value: see ``Ticket.value``.

        Raises:
            Overloaded, TaskFailed, TaskTimedOut, ResultUnavailable: as ``Ticket.value``.
            TimeoutError: it has not ended in time, and goes on.
        """
        return self._wait("value", self._ticket.value(), timeout)

    def events(self, timeout: float | None = None) -> PortalEvents:
        """Return an iterator over what happens to the task from now on: see ``Ticket.events``.

        Args:
            timeout: seconds that it waits for an event, before it raises TimeoutError.

        Raises:
            Overloaded: the task was rejected.
        """
        check_timeout("events", timeout)

        async def listen() -> tuple[list[Event], Subscription | None]:
            return self._ticket.listen()

        first, subscription = self._portal.call("events", listen())
        return PortalEvents(self._portal, first, subscription, self._ticket.next_event, timeout)

    def cancel(self, reason: str = "cancelled by its submitter") -> bool:
        """Cancel the task: see ``Ticket.cancel``. Return False if it had ended already."""
        if self._ticket.done():
            return False

        async def cancel() -> bool:
            return self._ticket.cancel(reason)

        return self._portal.call("cancel", cancel())

    def _wait(self, name: str, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
        late = f"task {self.task_id!r} has not ended"
        return self._portal.call(name, work, timeout=timeout, late=late, after=f"it is {self.status.name} and goes on")


class PortalEvents:
    """Events for threads: an iterator that blocks, and ends when its source does, or by `close`.

    A context manager, which closes it. If no event comes within its timeout, it raises TimeoutError, and may be read
    on.
    """

    def __init__(
        self,
        portal: Portal,
        first: list[Event],
        subscription: Subscription | None,
        wait_for_next: Callable[[Subscription], Awaitable[Event | None]],
        timeout: float | None,
    ) -> None:
        self._portal = portal
        self._loop = portal.loop("events")
        self._read = deque(first)
        self._subscription = subscription
        self._wait_for_next = wait_for_next
        self._timeout = timeout

    @property
    def dropped(self) -> int:
        """The number of events that were dropped, because too many were unread."""
        return 0 if self._subscription is None else self._subscription.dropped

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._read:
            source = self._subscription
            if source is None or source.closed:  # its loop may have gone
                self._read.extend(() if source is None else source.take_unread())
                if not self._read:
                    raise StopIteration
            else:
                fetch = self._fetch(source)
                try:
                    self._portal.call_in(self._loop, "events", fetch, timeout=self._timeout, late="no event came")
                except SupervisorClosed:
                    if not source.closed:
                        raise
        return self._read.popleft()

    async def _fetch(self, subscription: Subscription) -> None:
        """Read every event that is there. They are kept here, since whoever waits for this may have given up."""
        event = await self._wait_for_next(subscription)
        if event is not None:
            self._read.append(event)
            self._read.extend(subscription.take_unread())

    def close(self) -> None:
        """End the iteration."""
        source, self._subscription = self._subscription, None
        self._read.clear()

        async def close(subscription: Subscription) -> None:
            subscription.close()

        if source is not None and not source.closed:
            with suppress(SupervisorClosed):  # its loop has gone
                self._portal.call_in(self._loop, "events", close(source))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PortalSlot:
    """A context manager that holds a worker's slot while its block runs in the calling thread.

    A thread cannot be cut off: a block that takes longer than the slot's timeout keeps the slot until it is left.

    Raises:
        Overloaded: on entering, if it is not admitted.
        TaskExpired: on entering, if the deadline passed first.
        TimeoutError: on entering, if it has waited for as long as it may.
        TaskTimedOut, TaskCancelled: on leaving, if the block took too long or the supervisor stopped.
    """

    def __init__(self, portal: Portal, make_slot: Callable[[], Slot], wait_timeout: float | None) -> None:
        self._portal = portal
        self._make_slot = make_slot
        self._wait_timeout = wait_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slot: Slot | None = None
        self._holder: asyncio.Task[None] | None = None  # enters and leaves the slot
        self._entered: asyncio.Future[None] | None = None
        self._left: asyncio.Future[BaseException | None] | None = None
        self._outer_run: RunningTask | None = None

    @property
    def task_id(self) -> str:
        """The id under which it appears in events."""
        return self._held().task_id

    @property
    def worker(self) -> WorkerAgent:
        """The worker whose slot it holds, inside the block."""
        return self._held().worker

    def _held(self) -> Slot:
        if self._slot is None:
            raise SlotMisused(why="was asked for its worker or its id outside of its block")
        return self._slot

    def __enter__(self) -> Self:
        if self._loop is not None:
            raise SlotMisused(why="was entered twice")
        self._loop = self._portal.loop("slot")
        self._portal.call("slot", self._enter(), timeout=self._wait_timeout, late="no slot became free")
        self._outer_run = context.running_task()
        context.set_running_task(self._held().run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._loop is not None  # noqa: S101 - entered
        context.set_running_task(self._outer_run)
        try:
            if self._holder is not None and self._holder.done():  # its loop may have gone
                self._holder.result()
            else:  # straight to its loop: a supervisor that closes waits for this, too
                self._portal.call_in(self._loop, "slot", self._leave(error))
        except Exception:
            if error is None:
                raise

    async def _enter(self) -> None:
        loop = asyncio.get_running_loop()
        self._entered, self._left = loop.create_future(), loop.create_future()
        holder = self._holder = asyncio.ensure_future(self._hold(self._entered, self._left))
        try:
            await asyncio.wait((holder, self._entered), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # whoever enters has given up
            self._left.set_result(asyncio.CancelledError())
            holder.cancel()
            holder.add_done_callback(lambda _: holder.cancelled() or holder.exception())
            raise
        if holder.done():
            holder.result()

    async def _hold(self, entered: asyncio.Future[None], left: asyncio.Future[BaseException | None]) -> None:
        slot = self._make_slot()
        await slot.__aenter__()
        self._slot = slot
        entered.set_result(None)
        error = await self._wait_until_left(slot, left)
        await slot.__aexit__(None if error is None else type(error), error, None)
        if not left.done():
            why = "the event loop of its supervisor ended"
            raise TaskCancelled(task_id=slot.task_id, worker_id=slot.worker.name, error=why)

    async def _wait_until_left(self, slot: Slot, left: asyncio.Future[BaseException | None]) -> BaseException | None:
        """Wait until the block is left, even if its time is up or it is to stop, but no longer than the loop runs."""
        cancelled = False
        while not left.done():
            try:
                await asyncio.wait((left,))
            except asyncio.CancelledError as error:
                if cancelled and (task := asyncio.current_task()) is not None:
                    task.uncancel()  # the slot counts the first one
                if cancelled or not slot.is_ending:
                    return error
                cancelled = True
        return left.result() or (asyncio.CancelledError() if cancelled else None)

    async def _leave(self, error: BaseException | None) -> None:
        assert self._holder is not None  # noqa: S101 - entered
        assert self._left is not None  # noqa: S101 - entered
        if not self._left.done():
            self._left.set_result(error)
        await asyncio.wait((self._holder,))
        self._holder.result()


class Portal:
    """Blocking access to a supervisor, from any thread except its loop's.

    If the supervisor runs, the portal is ready at once. If it has not been started, the portal is a context manager: it
    runs an event loop in a thread of its own, starts the supervisor there, and drains it on leaving.

    Whatever waits takes a `timeout` in seconds, or a `wait_timeout` where the task has a `timeout` of its own. After it
    TimeoutError is raised; None: as long as it takes. Besides what it says, each method raises WouldDeadlock on the
    supervisor's own loop, LoopStopped if that loop does not run, and NotStarted or SupervisorClosed if the supervisor
    does not.
    """

    def __init__(self, supervisor: PortalSupervisor) -> None:
        self._supervisor = supervisor
        self._loop: asyncio.AbstractEventLoop | None = None  # the one in the portal's thread
        self._thread: threading.Thread | None = None
        self._stop_requested: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._abort = False

    def run(self, task: Task[ResultT], *, wait: float | None = None, timeout: float | None = None) -> ResultT:
        """Run a task and return its value: see ``supervisor.run``. After `timeout` seconds the task is cancelled."""
        late = f"task {task.task_id!r} has not ended" if isinstance(task, Task) else ""
        work = self._supervisor.run(task, wait=wait)
        return self.call("run", work, timeout=timeout, late=late, after="it was cancelled")

    def submit(
        self, task: Task[ResultT], *, wait: float | None = None, timeout: float | None = None
    ) -> PortalTicket[ResultT]:
        """Submit a task: see ``supervisor.submit``. It may wait for room, and for the overflow."""
        late, after = "the task was not submitted, or the overflow has not answered", "it may be stored"
        work = self._supervisor.submit(task, wait=wait)
        return PortalTicket(self, self.call("submit", work, timeout=timeout, late=late, after=after))

    @overload
    def map(
        self,
        tasks: Iterable[Task[ResultT]],
        /,
        *,
        return_exceptions: Literal[False] = False,
        wait_timeout: float | None = None,
        **options: Unpack[FanOutOptions],
    ) -> list[ResultT]: ...
    @overload
    def map(
        self,
        tasks: Iterable[Task[ResultT]],
        /,
        *,
        return_exceptions: bool,
        wait_timeout: float | None = None,
        **options: Unpack[FanOutOptions],
    ) -> list[ResultT | ForebayError]: ...
    @overload
    def map(
        self,
        task_type: str,
        payloads: Iterable[Any],
        *,
        return_exceptions: bool = False,
        wait_timeout: float | None = None,
        **options: Unpack[MapOptions],
    ) -> list[Any]: ...
    def map(  # noqa: PLR0913 - as the supervisor's
        self,
        task_type: str | Iterable[Task],
        payloads: Iterable[Any] | None = None,
        *,
        retry: Retry | None = None,
        limit: int | None = None,
        hedge: Hedge | None = None,
        progress: OnProgress | None = None,
        return_exceptions: bool = False,
        wait_timeout: float | None = None,
        **options: Unpack[TaskOptions],
    ) -> list[Any]:
        """Run a task for each payload, or these tasks, and return their values in order: see ``supervisor.map``.

        Args:
            task_type: as ``supervisor.map``, and so are the others but `wait_timeout`.
            payloads: see there. A generator is read in the supervisor's loop, so it must not block.
            retry: see there.
            limit: see there.
            hedge: see there.
            progress: see there; it is called in the supervisor's loop.
            return_exceptions: see there.
            wait_timeout: seconds for all of it. Then the tasks that have not ended are cancelled.
            options: fields of all tasks, such as `timeout`, which is for each attempt.
        """
        check_timeout("map", wait_timeout, name="wait_timeout")
        work = self._supervisor.map(
            task_type,
            payloads,
            retry=retry,
            limit=limit,
            hedge=hedge,
            progress=progress,
            return_exceptions=return_exceptions,
            **options,
        )
        late, after = "the tasks have not all ended", "the others were cancelled"
        return self.call("map", work, timeout=wait_timeout, late=late, after=after)

    def find(
        self, task_id: str | None = None, *, key: str | None = None, timeout: float | None = None
    ) -> PortalTicket | None:
        """Return the ticket of a task by its id or its key, or None: see ``supervisor.find``."""
        work = self._supervisor.find(task_id, key=key)
        ticket = self.call("find", work, timeout=timeout, late="the overflow has not answered")
        return None if ticket is None else PortalTicket(self, ticket)

    def ticket(self, task_id: str) -> PortalTicket:
        """Return the ticket of a task that this process knows: see ``supervisor.ticket``.

        Raises:
            UnknownTask: this process knows no such task.
        """

        async def ticket() -> Ticket:
            return self._supervisor.ticket(task_id)

        return PortalTicket(self, self.call("ticket", ticket()))

    def slot(  # noqa: PLR0913 - a task's fields
        self,
        task_type: str,
        *,
        priority: Priority = Priority.NORMAL,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        tenant: str = "default",
        thread_id: str | None = None,
        wait_timeout: float | None = None,
    ) -> PortalSlot:
        """Return a slot of a worker for the calling thread: ``with portal.slot("write"): ...``.

        Args:
            task_type: as ``supervisor.slot``, and so are the others but the last.
            priority: see there.
            timeout: seconds that the block may run.
            deadline: see there.
            tenant: see there.
            thread_id: see there.
            wait_timeout: seconds that entering may wait before it raises TimeoutError.
        """
        check_timeout("slot", wait_timeout, name="wait_timeout")

        def make_slot() -> Slot:
            return self._supervisor.slot(
                task_type, priority=priority, timeout=timeout, deadline=deadline, tenant=tenant, thread_id=thread_id
            )

        return PortalSlot(self, make_slot, wait_timeout)

    def events(self, *, bound: int = 1000, timeout: float | None = None) -> PortalEvents:
        """Return an iterator over the events from now on, which keeps the newest `bound` unread ones.

        Args:
            bound: how many events are kept until they are read.
            timeout: seconds that it waits for an event, before it raises TimeoutError.
        """
        check_timeout("events", timeout)

        async def subscribe() -> Subscription:
            return self._supervisor.events(bound=bound)

        async def wait_for_next(subscription: Subscription) -> Event | None:
            return await anext(subscription, None)

        return PortalEvents(self, [], self.call("events", subscribe()), wait_for_next, timeout)

    def drain(self, timeout: float | None = None) -> DrainReport:
        """Let what is inside finish for at most `timeout` seconds, and cancel the rest: see ``supervisor.drain``."""
        return self.call("drain", self._supervisor.drain(timeout))

    # --- what its tickets, slots and events call ---

    def loop(self, name: str) -> asyncio.AbstractEventLoop:
        """Return the supervisor's loop, if the method `name` may wait for it in this thread."""
        loop = self._supervisor.loop
        self._check_may_wait(loop, name)
        if loop is None or loop.is_closed():
            raise SupervisorClosed(state="closed") if self._supervisor.started else NotStarted
        return loop

    def _check_may_wait(self, loop: asyncio.AbstractEventLoop | None, name: str) -> None:
        if (parent := self._supervisor.forked_from) is not None:
            raise ForkedProcess(what="The supervisor", parent=parent)
        if loop is not None and asyncio._get_running_loop() is loop:  # noqa: SLF001 - documented; None in a thread
            what = f"portal.{name}() blocks its thread and was called on the supervisor's own event loop, which"
            raise WouldDeadlock(what=what, advice=f"await supervisor.{name}(...) here")

    def call(
        self, name: str, work: Coroutine[Any, Any, T], *, timeout: float | None = None, late: str = "", after: str = ""
    ) -> T:
        """Return the result of `work` in the supervisor's loop, which the method `name` waits for.

        Args:
            name: of the method.
            work: done in the loop, and cancelled if nobody waits for it any more.
            timeout: seconds.
            late: what has not happened in that time.
            after: what becomes of the work then.

        Raises:
            TimeoutError: it takes longer.
        """
        try:
            check_timeout(name, timeout)
            loop = self.loop(name)
        except BaseException:
            work.close()
            raise
        return self.call_in(loop, name, work, timeout=timeout, late=late, after=after)

    def call_in(  # noqa: PLR0913 - as `call`
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        work: Coroutine[Any, Any, T],
        *,
        timeout: float | None = None,
        late: str = "",
        after: str = "",
    ) -> T:
        """Return the result of `work` in `loop`, whether or not the supervisor still runs there: see `call`."""
        try:
            self._check_may_wait(loop, name)
            # The caller's context is copied, so that a nested task knows its parent.
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except BaseException as error:
            work.close()
            if loop.is_closed():
                raise SupervisorClosed(state="closed") from error
            raise
        try:
            if _wait_until_done(future, loop, name, timeout):
                return future.result()
        except BaseException:
            future.cancel()  # the caller has gone (Ctrl-C); no effect if the work has ended
            raise
        future.cancel()
        within = format_duration(timeout or 0.0)
        raise TimeoutError(f"{late} within {within}" + (f"; {after}" if after else ""))

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


def check_timeout(owner: str, timeout: object, *, name: str = "timeout") -> None:
    """Check a number of seconds to wait, or None.

    Raises:
        InvalidSetting: it is neither.
    """
    check_not_negative(owner, name, timeout, unit="seconds", none="for no limit")


def _wait_until_done(future: Future[Any], loop: asyncio.AbstractEventLoop, name: str, timeout: float | None) -> bool:
    """Wait for work that was passed to `loop`, by the method `name` of a portal; return False if the time is up.

    Raises:
        SupervisorClosed: the loop was closed in the moment of the call, and has dropped the work.
        LoopStopped: the loop does not run.
    """
    until = None if timeout is None else clock.monotonic() + timeout
    paused = 0.0
    while True:
        left = _LOOP_CHECK_INTERVAL if until is None else min(_LOOP_CHECK_INTERVAL, until - clock.monotonic())
        if wait((future,), timeout=max(0.0, left)).done:
            return True
        if loop.is_closed():
            raise SupervisorClosed(state="closed")
        if left < _LOOP_CHECK_INTERVAL:
            return False
        paused = 0.0 if loop.is_running() else paused + _LOOP_CHECK_INTERVAL
        if paused >= _MAX_LOOP_PAUSE:
            raise LoopStopped(call=name, seconds=paused)
