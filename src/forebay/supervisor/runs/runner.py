"""Runners: asyncio tasks that are reused to run one handler after another, each in a context of its own.

Creating an asyncio task, calling it back and disposing of it costs more than everything else that a supervised task
needs. So the asyncio task that ran the last handler of a slot runs the next one too: it steps the handler by hand in a
fresh context. Handlers see an ordinary ``asyncio.current_task()``. An asyncio task is not reused if it was ever
cancelled, or if other code still holds a reference, a weak reference or a callback.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from sys import getrefcount
from typing import Any
from weakref import getweakrefcount

from forebay import context
from forebay._hooks import raise_again_if_interrupt
from forebay.context import NO_VARIABLES
from forebay.events import log
from forebay.supervisor.runs.run import Run, StopIterationCarrier, was_interrupted

_MAX_BURST = 16  # handlers that end without ever waiting, before the loop gets a turn

OnEnd = Callable[[Run, Any, BaseException | None], None]


class RunnerPool:
    """The runners of a dispatcher. Each handler runs in a copy of the context in which its task was submitted.

    Args:
        loop: the event loop of the runners.
        on_end: called with a run, and the value or the exception of its handler, when the handler has ended.
        base_context: the context of handlers whose tasks have none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_end: OnEnd, base_context: Context) -> None:
        self.loop = loop
        self.on_end = on_end
        self.base_context = base_context
        self.idle: list[Runner] = []  # at most as many as have run at a time
        self.reusable: Runner | None = None  # its handler has just ended: it can go on with the next at once
        self.closed = False

    def start(self, run: Run) -> None:
        """Run the handler of `run`, though not within this call."""
        runner = self.reusable
        if runner is not None:
            self.reusable = None
        elif self.idle:
            runner = self.idle.pop()
            runner.wake()
        else:
            runner = Runner(self)
        runner.next_run = run
        run.attach(runner)

    def close(self) -> None:
        """Let the idle runners end; the others end with their handler."""
        self.closed = True
        while self.idle:
            self.idle.pop().wake()


class Runner:
    """One asyncio task of a pool, which runs handlers."""

    __slots__ = ("_pool", "_wakeup", "aio", "next_run", "run")

    def __init__(self, pool: RunnerPool) -> None:
        self._pool = pool
        self._wakeup: asyncio.Future[None] | None = None
        self.next_run: Run | None = None
        self.run: Run | None = None  # its handler is running
        self.aio: asyncio.Task[None] | None = None
        self.aio = pool.loop.create_task(self._work(), context=pool.base_context.copy())
        pool.loop.call_soon(self._check_start)  # after its first step

    def _check_start(self) -> None:
        """End the run if a program that cancels every task of asyncio did so before the first step."""
        if (run := self.next_run) is not None and self.aio is not None and self.aio.done():
            self.next_run = None
            self._pool.on_end(run, None, asyncio.CancelledError())

    def wake(self) -> None:
        """Wake it, because it has a handler to run or may end."""
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def stop(self, run: Run) -> None:
        """Cancel the handler of `run`. If it has not started, it will not."""
        if self.run is run and self.aio is not None:
            self.aio.cancel()

    def handles(self, run: Run, aio: asyncio.Task[Any] | None) -> bool:
        """Return whether the handler of `run` is running, in `aio`."""
        return self.run is run and self.aio is not None and self.aio is aio

    async def _work(self) -> None:
        """Run one handler after another, until this asyncio task cannot be reused."""
        try:
            pool, in_a_row = self._pool, 0
            loop, on_end = pool.loop, pool.on_end
            if self.aio is None:
                await asyncio.sleep(0)  # an eager task factory starts this before `create_task` has returned
            aio: Any = self.aio
            # How many references there are to it while no other code has one; unknown for other kinds of tasks.
            references = getrefcount(aio) + getweakrefcount(aio) if isinstance(aio, asyncio.Task) else -1
            while (run := self.next_run) is not None:
                self.next_run = None
                self.run = run
                if run.abandoned_at is None:
                    value, cause, waited = await _step(run, pool.base_context)
                else:
                    value, cause, waited = None, asyncio.CancelledError(), False
                self.run = None
                reusable = (
                    getrefcount(aio) + getweakrefcount(aio) == references
                    and not (aio.cancelling() or aio._must_cancel or aio._callbacks)  # noqa: SLF001 - no public way to ask
                    and not pool.closed
                )
                if reusable:
                    pool.reusable = self
                try:
                    on_end(run, value, cause)
                except BaseException:  # noqa: BLE001 - the runner goes on with other handlers
                    log.exception("the end of task %r could not be processed", run.task.task_id)
                if cause is not None and was_interrupted(run, cause):
                    raise_again_if_interrupt(cause)
                pool.reusable = run = value = cause = None
                if not reusable:
                    return
                in_a_row = 0 if waited else in_a_row + 1
                if self.next_run is None:
                    pool.idle.append(self)
                    self._wakeup = loop.create_future()
                    await self._wakeup
                    self._wakeup = None
                    in_a_row = 0
                elif in_a_row >= _MAX_BURST:
                    await asyncio.sleep(0)
                    in_a_row = 0
        finally:
            self._leave()

    def _leave(self) -> None:
        """Leave the pool, because this asyncio task ends."""
        if self in self._pool.idle:
            self._pool.idle.remove(self)
        if (run := self.next_run) is not None:  # the loop is being shut down
            self._pool.on_end(run, None, asyncio.CancelledError())


@types.coroutine
def _step(run: Run, base: Context) -> Generator[Any, None, tuple[Any, BaseException | None, bool]]:
    """Run a handler to its end, in the context of its submitter, or in a copy of `base` if there is none.

    Returns:
        Its value, or the exception that ended it; and whether it waited for anything.
    """
    own = run.ticket.context
    if own is None:
        own = base.copy()
    elif (
        own is NO_VARIABLES
        or run.ticket.lease is not None
        or run.worker.retry is not None
        or run.task.retry is not None
    ):
        own = own.copy()  # other tasks, or another attempt, must not see what this run sets
    waited = loop_gone = False
    try:
        coroutine, awaited = own.run(_start_handler, run)
        while True:
            waited, thrown = True, None
            try:
                yield awaited
            except GeneratorExit:
                loop_gone = True
                raise
            except BaseException as exc:  # noqa: BLE001 - thrown into the handler below
                thrown = exc
            awaited = own.run(coroutine.send, None) if thrown is None else own.run(coroutine.throw, thrown)
    except StopIteration as end:
        return end.value, None, waited
    except StopIterationCarrier as carrier:
        return None, carrier.cause, waited
    except BaseException as exc:  # a SystemExit must not end the loop and all other tasks
        if loop_gone:
            raise
        return None, exc, waited


def _start_handler(run: Run) -> tuple[Coroutine[Any, Any, Any], Any]:
    """Call the handler, in its own context, and take its first step.

    Raises:
        StopIteration: it has ended, with this value.
    """
    context.set_running_task(run)
    handler = run.worker.handler
    try:
        value = run.call_in_thread() if handler.blocking else handler.call(run.task)
    except StopIteration as exc:
        raise StopIterationCarrier(exc) from None
    if type(value) is not types.CoroutineType:
        if not inspect.isawaitable(value):
            raise StopIteration(value)
        value = _awaiting(value)
    return value, value.send(None)


async def _awaiting(value: Any) -> Any:
    return await value
