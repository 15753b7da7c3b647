"""The engine that runs every task in a process: a stuck handler is really killed, and a crash affects no other task."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from forebay import clock, context
from forebay._text import format_duration
from forebay._threads import DaemonThreadExecutor
from forebay._validate import check_positive, check_whole
from forebay.adapters import Handler
from forebay.adapters.factory import check_factory
from forebay.adapters.handler_spec import HandlerSpec
from forebay.adapters.import_paths import import_path_of
from forebay.carried_context import capture_context
from forebay.engine import messages
from forebay.engine.child_process import ChildProcess, spawn
from forebay.errors import (
    InvalidSetting,
    NotSerializable,
    NotTransferable,
    PayloadTooLarge,
    ProcessNotStarted,
)
from forebay.overflow import encode_result, encode_task
from forebay.task import Task

_MAX_MESSAGE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEngine:
    """An engine that runs every task in a process of its worker, one task at a time per process.

    At most `max_concurrent` processes of a worker are started, the first with the supervisor, the others when they are
    needed; they are reused. The handler is named by its import path; payload, result and progress are sent as plain
    data, like those of stored tasks.

    Args:
        grace: seconds that a cancelled handler has to stop; then its process is killed, with all that it started.
        max_tasks: runs after which a process is replaced by a new one, for handlers that leak; None: never.
        idle_timeout: seconds after which a process without work is ended.
        start_timeout: seconds in which a process must have loaded its handler.
        max_message_bytes: bytes that an encoded payload, result or progress value may take.

    Raises:
        InvalidSetting: a setting is out of range.
    """

    grace: float = 2.0
    max_tasks: int | None = None
    idle_timeout: float = 300.0
    start_timeout: float = 60.0
    max_message_bytes: int = 16_000_000

    def __post_init__(self) -> None:
        for name in ("grace", "idle_timeout", "start_timeout"):
            check_positive("ProcessEngine", name, getattr(self, name), unit="seconds")
        check_whole("ProcessEngine", "max_tasks", self.max_tasks, none="for no limit")
        check_whole("ProcessEngine", "max_message_bytes", self.max_message_bytes, maximum=_MAX_MESSAGE_BYTES)

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:
        """Return the handler of a worker that runs up to `slots` tasks at a time, each in a process.

        Raises:
            NotImportable: another process cannot import its handler, factory or config.
            InvalidHandler, InvalidSetting: it cannot be run at all.
        """
        processes = _Processes(self, _load_request(self, spec), slots)
        return Handler(
            call=processes.call,
            on_cancel=spec.on_cancel,
            start=processes.start,
            stop=processes.stop,
            resize=processes.resize,
        )


def _load_request(engine: ProcessEngine, spec: HandlerSpec) -> messages.LoadHandler:
    """Return the request to load a handler, after every check that needs no import and makes no agent."""
    worker, handler, factory, config = spec.worker, spec.handler, spec.factory, spec.config
    if factory is None:
        if not isinstance(handler, str):
            spec.build()
    elif not isinstance(factory, str):
        check_factory(factory, worker)
    encoded = None
    if isinstance(config, Mapping):
        try:
            encoded = encode_result(dict(config), task_id="", bound=engine.max_message_bytes)
        except (NotSerializable, PayloadTooLarge):
            expected = "plain data, or a module's function that makes it from the Task: it is sent to other processes"
            raise InvalidSetting(owner=f"worker {worker!r}", name="config", value=config, expected=expected) from None
    path_of = partial(import_path_of, worker=worker)
    return messages.LoadHandler(
        version=messages.VERSION,
        worker=worker,
        handler=None if factory is not None else path_of(handler, what="handler"),
        factory=None if factory is None else path_of(factory, what="factory"),
        config=encoded,
        config_path=None if config is None or encoded is not None else path_of(config, what="config"),
        bound=engine.max_message_bytes,
        grace=engine.grace,
    )


class _Processes:
    """The processes of one worker, through every start and stop of it: a new pool each time."""

    def __init__(self, engine: ProcessEngine, load: messages.LoadHandler, slots: int) -> None:
        self._new_pool = partial(_ProcessPool, engine, load)
        self._slots = slots
        self._pool = self._new_pool(slots)

    async def start(self) -> None:
        """Start one process: see `_ProcessPool`."""
        if self._pool.closed:
            self._pool = self._new_pool(self._slots)
        await self._pool.start()

    async def call(self, task: Task) -> Any:
        """Run a task in a process: see `_ProcessPool`."""
        return await self._pool.call(task)

    async def stop(self) -> None:
        """End every process: see `_ProcessPool`."""
        await self._pool.stop()

    def resize(self, slots: int) -> None:
        """Have as many processes at most: see `_ProcessPool`."""
        self._slots = slots
        self._pool.resize(slots)


class _ProcessPool:
    """The processes of one worker, from a start to a stop. It belongs to the event loop that first uses it."""

    def __init__(self, engine: ProcessEngine, load: messages.LoadHandler, slots: int) -> None:
        self._engine = engine
        self._load = load
        self._slots = slots
        self._threads = DaemonThreadExecutor()
        self._children: set[ChildProcess] = set()  # all that may not have ended yet
        self._idle: list[ChildProcess] = []
        self._starting: set[asyncio.Task[ChildProcess]] = set()
        self._unclaimed: set[asyncio.Task[ChildProcess]] = set()  # those of _starting that no particular task waits for
        self._waiters: list[asyncio.Future[None]] = []
        self.closed = False

    async def start(self) -> None:
        """Start one process, so that a handler that cannot be imported fails now.

        Raises:
            ProcessNotStarted: it does not start.
        """
        try:
            self._check_open()
            if self._has_room():
                await asyncio.shield(self._start_spare())
        except asyncio.CancelledError:  # otherwise nobody would use or end the process that is starting
            await self.stop()
            raise

    async def call(self, task: Task) -> Any:
        """Run a task in a process.

        Raises:
            NotTransferable: its payload cannot be sent between processes; nothing was begun.
            ProcessNotStarted: no process could be started; nothing was begun.
            RemoteError, Overloaded, CancelledError, WorkerDied: as `ChildProcess.run`.
        """
        running = context.running_task()
        request = self._run_request(task, running)
        child = await self._acquire()
        try:
            report = _ignore if running is None else running.report
            observer = context.usage_observer()
            return await child.run(
                request,
                task_id=task.task_id,
                report=report,
                record_usage=_ignore if observer is None else observer.record_usage,
                grace=self._engine.grace,
            )
        finally:
            self._release(child)
            if not child.usable and not self._idle and not self._starting and self._has_room():
                self._start_spare()  # now, so that the next task does not wait for the start

    def _run_request(self, task: Task, running: context.RunningTask | None) -> messages.RunTask:
        deadline = task.deadline if running is None else running.deadline
        if task.retry is not None:  # the supervisor's business, and its `on` may be a function
            task = msgspec.structs.replace(task, retry=None)
        try:
            encoded = encode_task(task, task.payload, bound=self._engine.max_message_bytes, context=capture_context())
        except (NotSerializable, PayloadTooLarge) as error:
            why = messages.why_not_transferable(error)
            raise NotTransferable(what="payload or the context", task_id=task.task_id, why=why) from None
        attempt, submission = (1, clock.wall_time()) if running is None else (running.attempt, running.submission)
        until = None if deadline is None else deadline.by_wall_clock()
        return messages.RunTask(0, encoded, until, attempt, submission)

    async def stop(self) -> None:
        """End every process: the idle ones by closing their channels, the others by killing them."""
        self.closed = True
        self._wake_waiters()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for child in self._children:
            if child in self._idle:
                child.retire(self._engine.grace)
            else:
                child.kill()
        await asyncio.gather(*(child.gone for child in self._children))
        self._threads.shutdown()

    def resize(self, slots: int) -> None:
        """Have up to `slots` processes; those that are too many end as soon as they run nothing."""
        self._slots = slots
        while self._idle and self._has_too_many():
            self._idle.pop().retire(self._engine.grace)
        self._wake_waiters()

    # --- acquiring and releasing ---

    async def _acquire(self) -> ChildProcess:
        """Return a process that runs nothing, started if necessary; the caller has it until `_release`."""
        while True:
            self._check_open()
            while self._idle:
                child = self._idle.pop()
                child.cancel_idle_timer()
                if child.usable:
                    return child
            if self._has_room() and len(self._unclaimed) <= len(self._waiters):
                starting = self._start_one()
                try:
                    return await asyncio.shield(starting)
                except asyncio.CancelledError:
                    self._keep_when_started(starting)  # the next task uses it
                    raise
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)

    def _release(self, child: ChildProcess) -> None:
        if child.usable and not self.closed:
            worn_out = self._engine.max_tasks is not None and child.runs >= self._engine.max_tasks
            if worn_out or self._has_too_many():
                child.retire(self._engine.grace)
            else:
                child.retire_after(self._engine.idle_timeout, self._engine.grace)
                self._idle.append(child)
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _has_room(self) -> bool:
        return not self.closed and len(self._children) + len(self._starting) < self._slots

    def _has_too_many(self) -> bool:
        started = len(self._children) + len(self._starting)
        if started <= self._slots:
            return False
        return sum(child.usable for child in self._children) + len(self._starting) > self._slots

    # --- starting ---

    def _start_one(self) -> asyncio.Task[ChildProcess]:
        starting = asyncio.ensure_future(self._start_child())
        self._starting.add(starting)
        starting.add_done_callback(self._on_start_done)
        return starting

    def _on_start_done(self, starting: asyncio.Task[ChildProcess]) -> None:
        self._starting.discard(starting)
        self._wake_waiters()  # if it failed, there is room again

    def _start_spare(self) -> asyncio.Task[ChildProcess]:
        """Start a process that no particular task waits for."""
        starting = self._start_one()
        self._keep_when_started(starting)
        return starting

    def _keep_when_started(self, starting: asyncio.Task[ChildProcess]) -> None:
        self._unclaimed.add(starting)
        starting.add_done_callback(self._add_started)

    def _add_started(self, starting: asyncio.Task[ChildProcess]) -> None:
        self._unclaimed.discard(starting)
        if not starting.cancelled() and starting.exception() is None:
            self._release(starting.result())

    async def _start_child(self) -> ChildProcess:
        """Return a new process that has loaded its handler."""
        loop = asyncio.get_running_loop()
        worker = self._load.worker
        try:
            spawned = await loop.run_in_executor(self._threads, spawn)
        except OSError as error:
            advice = "Lower max_concurrent, or allow this program more processes."
            raise ProcessNotStarted(worker=worker, why=f"the system refused: {error}", advice=advice) from error
        child = ChildProcess(spawned, self._load, loop=loop, threads=self._threads)
        self._children.add(child)
        child.gone.add_done_callback(partial(self._on_gone, child))
        reaping = loop.run_in_executor(self._threads, child.reap)
        reaping.add_done_callback(lambda done: child.on_exit(done.result()))
        await loop.create_unix_connection(lambda: child, sock=spawned.channel)
        failure: messages.RemoteFailure | None
        try:
            async with asyncio.timeout(self._engine.start_timeout):
                failure = await asyncio.shield(child.ready)
        except TimeoutError:
            limit = format_duration(self._engine.start_timeout)
            failure = messages.RemoteFailure("", f"it had not loaded its handler after {limit}", "")
        if failure is None:
            return child
        child.kill()
        await child.gone
        why = f"{failure.type}: {failure.message}" if failure.type else failure.message
        not_started = ProcessNotStarted(worker=worker, why=why, advice="Each process imports the handler itself.")
        if failure.traceback:
            not_started.add_note(f"In its process:\n{failure.traceback.rstrip()}")
        raise not_started

    def _on_gone(self, child: ChildProcess, _: object) -> None:
        self._children.discard(child)
        if child in self._idle:
            self._idle.remove(child)
        self._wake_waiters()

    def _check_open(self) -> None:
        worker = self._load.worker
        if self.closed:
            raise ProcessNotStarted(worker=worker, why="its supervisor is closed", advice="Start the supervisor again.")
        if messages.ImportState.importing:
            advice = 'Put what your program starts below `if __name__ == "__main__":`.'
            why = "this is a worker's process that is still importing its handler"
            raise ProcessNotStarted(worker=worker, why=why, advice=advice)
        if clock.is_virtual(asyncio.get_running_loop()):
            advice = 'In a simulation register it with engine="thread", or without an engine.'
            raise ProcessNotStarted(worker=worker, why="there are no processes in virtual time", advice=advice)


def _ignore(_: Any) -> None:
    """Drop a progress value, or a usage, because no task runs here."""
