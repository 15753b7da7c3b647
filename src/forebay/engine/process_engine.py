"""In processes of our own: what is stuck there is really killed, and what crashes there harms nobody else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from forebay import clock, context
from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec
from forebay.adapters.import_paths import import_path_of
from forebay.engine import messages as wire
from forebay.engine.child_process import ChildProcess, spawn
from forebay.engine.thread_executor import DaemonThreadExecutor
from forebay.errors import (
    InvalidHandler,
    InvalidSetting,
    NotSerializable,
    NotTransferable,
    PayloadTooLarge,
    ProcessNotStarted,
)
from forebay.overflow import encode_result, encode_task
from forebay.task import Task

_LARGEST = 1 << 30  # bytes of a message


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEngine:
    """Every run in a process of a worker's own, one task at a time in each, `max_concurrent` processes at most.

    They are started as they are needed, the first with the supervisor, and used again. The handler is named by its
    import path; payload, result and progress travel as those of stored tasks do.

    Args:
        grace: seconds that a handler has to stop once it was asked; then its process is killed, and all it started.
        max_tasks: runs after which a process is replaced by a new one, for handlers that leak; None: never.
        idle: seconds after which a process without work is ended.
        start_within: seconds in which a process must have loaded its handler.
        max_message_bytes: bound of an encoded payload, result or value of progress.

    Raises:
        InvalidSetting: one cannot be meant.
    """

    grace: float = 2.0
    max_tasks: int | None = None
    idle_timeout: float = 300.0
    start_timeout: float = 60.0
    max_message_bytes: int = 16_000_000

    def __post_init__(self) -> None:
        for name in ("grace", "idle_timeout", "start_timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                self._refuse(name, "a positive number of seconds")
        if self.max_tasks is not None and not _whole(self.max_tasks):
            self._refuse("max_tasks", "a whole number of at least 1, or None")
        if not _whole(self.max_message_bytes) or self.max_message_bytes > _LARGEST:
            self._refuse("max_message_bytes", f"a whole number from 1 to {_LARGEST}")

    def _refuse(self, name: str, expected: str) -> None:
        raise InvalidSetting(owner="InProcess", name=name, value=getattr(self, name), expected=expected)

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:
        """Take a worker that runs up to `slots` tasks at a time.

        Raises:
            NotImportable: its handler, factory or config cannot be named for another process.
            InvalidHandler, InvalidSetting: it cannot be run at all.
        """
        pool = _ProcessPool(self, _load_message(self, spec), slots)
        return Handler(call=pool.call, on_cancel=spec.on_cancel, start=pool.start, stop=pool.stop)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _load_message(engine: ProcessEngine, recipe: HandlerSpec) -> wire.LoadHandler:
    """What a process is told to run; what can be checked without importing or making anything is checked here."""
    worker, handler, factory, config = recipe.worker, recipe.handler, recipe.factory, recipe.config
    if factory is None and not isinstance(handler, str):
        recipe.build()
    elif factory is not None and not isinstance(factory, str) and not callable(factory):
        hint = "factory= takes a callable without arguments that makes an agent"
        raise InvalidHandler(worker=worker, type=type(factory).__name__, hint=hint)
    encoded = None
    if isinstance(config, Mapping):
        try:
            encoded = encode_result(dict(config), task_id="", bound=engine.max_message_bytes)
        except (NotSerializable, PayloadTooLarge):
            expected = "plain data, or a function of a module that makes it of the Task: it goes to other processes"
            raise InvalidSetting(owner=f"worker {worker!r}", name="config", value=config, expected=expected) from None
    return wire.LoadHandler(
        version=wire.VERSION,
        worker=worker,
        handler=None if factory is not None else import_path_of(handler, worker=worker, what="handler"),
        factory=None if factory is None else import_path_of(factory, worker=worker, what="factory"),
        config=encoded,
        config_path=None
        if config is None or encoded is not None
        else import_path_of(config, worker=worker, what="config"),
        bound=engine.max_message_bytes,
        grace=engine.grace,
    )


class _ProcessPool:
    """The processes of one worker. It belongs to the event loop that it is first used on."""

    def __init__(self, engine: ProcessEngine, loading: wire.LoadHandler, slots: int) -> None:
        self._engine = engine
        self._loading = loading
        self._slots = slots
        self._threads = DaemonThreadExecutor()
        self._children: set[ChildProcess] = set()  # all that may still be there
        self._idle: list[ChildProcess] = []
        self._starting: set[asyncio.Task[ChildProcess]] = set()
        self._unclaimed: set[asyncio.Task[ChildProcess]] = set()  # of these, those that nobody waits for by name
        self._waiters: list[asyncio.Future[None]] = []
        self._closed = False

    async def start(self) -> None:
        """Start one process, so that a handler that cannot be imported shows now.

        Raises:
            ProcessNotStarted: it does not start.
        """
        try:
            self._check_open()
            if self._has_room():
                await asyncio.shield(self._start_spare())
        except asyncio.CancelledError:  # nobody will use what is being started, nor end it
            await self.stop()
            raise

    async def call(self, task: Task) -> Any:
        """Run a task in a process.

        Raises:
            CannotCross, ProcessNotStarted: nothing was begun.
            Others: as `ChildProcess.run`.
        """
        begin = self._run_message(task)
        running = context.running_task()
        child = await self._acquire()
        try:
            report = _ignore_progress if running is None else running.report
            return await child.run(begin, task_id=task.task_id, report=report, grace=self._engine.grace)
        finally:
            self._release(child)
            if not child.usable and not self._idle and not self._starting and self._has_room():
                self._start_spare()  # the next task's time is not to pass with its start

    def _run_message(self, task: Task) -> wire.RunTask:
        running = context.running_task()
        deadline = task.deadline if running is None else running.deadline
        try:
            encoded = encode_task(task, task.payload, bound=self._engine.max_message_bytes)
        except (NotSerializable, PayloadTooLarge) as error:
            raise NotTransferable(what="payload", task_id=task.task_id, why=wire.why_not_transferable(error)) from None
        attempt = 1 if running is None else running.attempt
        return wire.RunTask(0, encoded, None if deadline is None else deadline.at, attempt)

    async def stop(self) -> None:
        """End every process: those without work by hanging up, the others at once."""
        self._closed = True
        self._wake_waiters()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for child in self._children:
            if child in self._idle:
                child.retire(self._engine.grace)
            else:
                child.kill()
        await asyncio.gather(*(child.gone for child in self._children))
        self._threads.shutdown()

    # --- who has which process ---

    async def _acquire(self) -> ChildProcess:
        """A process that runs nothing, started if need be; it is the caller's until it is put back."""
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
                    self._keep_when_started(starting)  # it goes on, for the next
                    raise
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)

    def _release(self, child: ChildProcess) -> None:
        if child.usable and not self._closed:
            if self._engine.max_tasks is not None and child.runs >= self._engine.max_tasks:
                child.retire(self._engine.grace)
            else:
                loop = asyncio.get_running_loop()
                child.idle_timer = loop.call_later(self._engine.idle_timeout, child.retire, self._engine.grace)
                self._idle.append(child)
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _has_room(self) -> bool:
        return not self._closed and len(self._children) + len(self._starting) < self._slots

    def _start_one(self) -> asyncio.Task[ChildProcess]:
        starting = asyncio.ensure_future(self._start_child())
        self._starting.add(starting)
        starting.add_done_callback(self._on_start_done)
        return starting

    def _on_start_done(self, starting: asyncio.Task[ChildProcess]) -> None:
        self._starting.discard(starting)
        self._wake_waiters()  # if it failed, there is room again

    def _start_spare(self) -> asyncio.Task[ChildProcess]:
        """Start one for whoever comes."""
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
        """A new process that has loaded its handler."""
        loop = asyncio.get_running_loop()
        worker = self._loading.worker
        try:
            spawned = await loop.run_in_executor(self._threads, spawn)
        except OSError as error:
            advice = "Lower max_concurrent, or allow this program more processes."
            raise ProcessNotStarted(worker=worker, why=f"the system refused: {error}", advice=advice) from error
        child = ChildProcess(spawned, worker=worker, bound=self._engine.max_message_bytes, loop=loop)
        self._children.add(child)
        child.gone.add_done_callback(partial(self._on_gone, child))
        reaping = loop.run_in_executor(self._threads, child.reap)
        reaping.add_done_callback(lambda done: child.on_exit(done.result()))
        await loop.create_unix_connection(lambda: child, sock=spawned.channel)
        child.load(self._loading)
        failure: wire.RemoteFailure | None
        try:
            async with asyncio.timeout(self._engine.start_timeout):
                failure = await asyncio.shield(child.ready)
        except TimeoutError:
            failure = wire.RemoteFailure(
                "", f"it had not loaded its handler after {self._engine.start_timeout:g} s", ""
            )
        if failure is None:
            return child
        child.kill()
        await child.gone
        why = f"{failure.type}: {failure.message}" if failure.type else failure.message
        unready = ProcessNotStarted(worker=worker, why=why, advice="Its handler is imported there anew.")
        if failure.traceback:
            unready.add_note(f"In its process:\n{failure.traceback.rstrip()}")
        raise unready

    def _on_gone(self, child: ChildProcess, _: object) -> None:
        self._children.discard(child)
        if child in self._idle:
            self._idle.remove(child)
        self._wake_waiters()

    def _check_open(self) -> None:
        worker = self._loading.worker
        if self._closed:
            raise ProcessNotStarted(worker=worker, why="its supervisor has closed", advice="Make a new one.")
        if wire.ImportState.importing:
            advice = 'Begin what your program does below `if __name__ == "__main__":`.'
            raise ProcessNotStarted(worker=worker, why="its own handler is only just being imported", advice=advice)
        if clock.is_virtual(asyncio.get_running_loop()):
            advice = 'In a simulation register it with engine="thread", or without one.'
            raise ProcessNotStarted(worker=worker, why="virtual time has no processes", advice=advice)


def _ignore_progress(_: Any) -> None:
    """Nobody listens."""
