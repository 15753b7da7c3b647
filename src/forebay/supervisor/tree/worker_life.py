"""WorkerLife: the starts and stops of one worker, and the end of what its `start` returned."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

from forebay._hooks import await_hook, call_hook, is_awaitable, raise_again_if_interrupt, raise_if_cancelled
from forebay._text import format_duration
from forebay.adapters import Handler
from forebay.errors import WorkerNotStarted
from forebay.events import log
from forebay.supervisor.tree.restart_policy import ExitKind, RestartType

MIN_STOP_TIME = 10.0  # seconds, at least, that the `stop` of a Handler has


class SupervisedSupervisor(Protocol):
    """A supervisor that is the handler of a worker, as far as the worker's life needs it."""

    def watch(self) -> asyncio.Future[None]:
        """Return a future that is cancelled when it gives up, because its workers were restarted too often."""

    async def halt(self) -> None:
        """Stop its workers, in reverse order, to be started again."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a worker's life, and the exception of an abnormal one.

    Attributes:
        kind: the way in which it ended.
        error: the exception.
        by_program: the program has cancelled every task of asyncio, as it does when its event loop ends.
    """

    kind: ExitKind
    error: BaseException | None = None
    by_program: bool = False


class WorkerLife:
    """The starts and stops of one worker. What its `start` returned, if awaitable, is its life: it may end by itself.

    A worker whose handler is a supervisor lives until that gives up.

    Args:
        name: of the worker.
        handler: with a `start` and a `stop` of its own, perhaps.
        start: called after the handler's.
        reports_start: True if `start` takes a function that its life calls once it has started.
        start_timeout: seconds that a start may take, the handler's included; None: no limit.
        stop: asks the life to end.
        stop_timeout: seconds that `stop` and the life have for it; and the life, once it is cancelled, again.
        restart: after which ends the worker is started again.
    """

    def __init__(  # noqa: PLR0913 - the arguments of register_worker
        self,
        name: str,
        handler: Handler,
        *,
        start: Callable[..., Any] | None = None,
        reports_start: bool = False,
        start_timeout: float | None = None,
        stop: Callable[[], Any] | None = None,
        stop_timeout: float = 5.0,
        restart: RestartType = RestartType.PERMANENT,
    ) -> None:
        self._name = name
        self._handler = handler
        self._start = start
        self._reports_start = reports_start
        self._start_timeout = start_timeout
        self._stop = stop
        self._stop_timeout = stop_timeout
        self.restart = restart
        self.ended = False  # its life has ended by itself, and it was neither stopped nor started since
        self._life: asyncio.Future[Exit] | None = None
        self._stopping = False  # so that the end of its life is no exit
        self._running = False  # it has been started, and neither stopped nor ended
        self._handler_stopped = False
        self._stop_in_progress: asyncio.Future[None] | None = None

    @property
    def needs_start(self) -> bool:
        """True if the worker takes no task before it has been started."""
        return self._start is not None or self._stop is not None or self._handler.start is not None

    def begin_run(self) -> None:
        """Forget an earlier run of the supervisor, perhaps on another event loop."""
        self._life = self._stop_in_progress = None
        self._running = self.ended = False

    async def start(self, context: Context, on_exit: Callable[[Exit], None]) -> None:
        """Start the handler, then the life. If the life ends by itself, set `ended` and call `on_exit`.

        Args:
            context: of the life.
            on_exit: called soon after the life has ended, unless the worker is being stopped.

        Raises:
            WorkerNotStarted: it took longer than `start_timeout`, or its life ended before it said that it had started.
            BaseException: whatever a start raises. In any case nothing is left running.
        """
        await self._wait_for_stop()
        if self._life is not None:  # a former one that did not end, or whose stop was cut off
            self._life.cancel()
            self._life = None
        self.ended = self._stopping = self._handler_stopped = False
        handler_started = False
        try:
            async with asyncio.timeout(self._start_timeout) as limit:
                if self._handler.start is not None:
                    await self._handler.start()
                handler_started = True
                await self._begin_life(context)
        except BaseException:
            if handler_started:
                await self.stop(grace=0.0, for_good=False)
            if limit.expired() and self._start_timeout is not None:
                why = f"it took longer than its start_timeout of {format_duration(self._start_timeout)}"
                raise WorkerNotStarted(worker=self._name, why=why) from None
            raise
        if self._life is not None:
            self._life.add_done_callback(partial(self._ended, on_exit))

    async def _begin_life(self, context: Context) -> None:
        """Call `start`; if it takes an argument, wait until it has called that or failed to."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] | None = None
        life: Any = None
        if self._start is not None and self._reports_start:
            started = loop.create_future()
            life = context.run(self._start, partial(_set_done, started))
        elif self._start is not None:
            life = context.run(self._start)
        elif self._handler.nested_supervisor is not None:
            life = cast("SupervisedSupervisor", self._handler.nested_supervisor).watch()
        self._running = True
        if life is not None and is_awaitable(life):
            task = self._life = loop.create_task(_live(life), context=context.copy())
            task.add_done_callback(partial(_discard, life))
            if started is not None:
                await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
        if started is not None and not started.done():
            self._running = False
            error = None if self._life is None or self._life.cancelled() else self._life.result().error
            raise WorkerNotStarted(worker=self._name, why="its life ended before it called `started`") from error

    def _ended(self, on_exit: Callable[[Exit], None], life: asyncio.Future[Exit]) -> None:
        if life is self._life:
            self._life = None
            if not self._stopping:
                self._running, self.ended = False, True
                on_exit(Exit(ExitKind.SHUTDOWN, by_program=True) if life.cancelled() else life.result())

    async def stop(self, *, grace: float, for_good: bool = True) -> None:
        """Stop the life, then the handler. Whatever they raise is logged.

        If this is cancelled, the stop goes on in the background, and the next one waits for it first.

        Args:
            grace: seconds that the handler's `stop` has, ten at least; a supervisor takes as long as it needs.
            for_good: False if it is to be started again: then a supervisor only stops its workers.
        """
        self._stopping, self.ended = True, False
        await self._wait_for_stop()
        if self._life is None and self._stop is None and self._handler.stop is None:
            self._running = False
            return  # nothing is to be stopped, and there may be ten thousand workers
        self._stop_in_progress = asyncio.ensure_future(self._stop_now(grace, for_good=for_good))
        self._stop_in_progress.add_done_callback(self._stopped)
        await asyncio.wait((self._stop_in_progress,))

    async def _wait_for_stop(self) -> None:
        """Wait for a stop in progress, whose caller was cancelled."""
        while self._stop_in_progress is not None:
            await asyncio.wait((self._stop_in_progress,))

    def _stopped(self, _: asyncio.Future[None]) -> None:
        self._stop_in_progress = None

    async def _stop_now(self, grace: float, *, for_good: bool) -> None:
        running, self._running = self._running, False
        try:
            if running and self._stop is not None:
                await self._ask_to_stop(self._stop)
        finally:
            life = self._life
            if life is not None and not life.done():
                life.cancel()
        if life is not None and not await _ends(life, self._stop_timeout):
            log.error("the life of worker %r has not ended, and is not waited for any longer", self._name)
        await self._stop_handler(grace, for_good=for_good)

    async def _ask_to_stop(self, stop: Callable[[], Any]) -> None:
        """Call `stop`, and wait until it has returned and the life has ended, for at most `stop_timeout`."""
        what = f"stop of worker {self._name!r}"
        stopping = call_hook(what, stop)
        waited_for: list[asyncio.Future[Any]] = [] if self._life is None else [self._life]
        asked = None
        if is_awaitable(stopping):
            asked = asyncio.ensure_future(await_hook(what, stopping))
            waited_for.append(asked)
        if not waited_for:
            return
        try:
            await asyncio.wait(waited_for, timeout=self._stop_timeout)
        finally:
            if asked is not None and not asked.done():
                asked.cancel()
                log.error("%s has not returned, and is not waited for any longer", what)

    async def _stop_handler(self, grace: float, *, for_good: bool) -> None:
        nested = self._handler.nested_supervisor
        if nested is not None and not for_good:
            await await_hook(f"halt of worker {self._name!r}", cast("SupervisedSupervisor", nested).halt())
            return
        if self._handler.stop is None or self._handler_stopped:
            return
        self._handler_stopped = True
        what = f"stop of worker {self._name!r}"
        stopping = call_hook(what, self._handler.stop)
        if is_awaitable(stopping):
            asked = asyncio.ensure_future(await_hook(what, stopping))
            limit = math.inf if nested is not None else max(grace, MIN_STOP_TIME)
            try:
                await _ends(asked, limit)
            finally:
                if not asked.done():
                    asked.cancel()
                    log.error("%s has not returned, and is not waited for any longer", what)


async def _live(life: Any) -> Exit:
    """Await the life of a worker, and return how it ended."""
    try:
        await life
    except BaseException as error:  # noqa: BLE001 - user code
        raise_if_cancelled(error)
        if issubclass(type(error), asyncio.CancelledError):
            return Exit(ExitKind.SHUTDOWN)
        raise_again_if_interrupt(error)
        return Exit(ExitKind.ABNORMAL, error)
    return Exit(ExitKind.NORMAL)


def _set_done(started: asyncio.Future[None]) -> None:
    if not started.done():
        started.set_result(None)


def _discard(life: Any, _: asyncio.Future[Exit]) -> None:
    """Dispose of what a `start` returned, if the task that awaits it was cancelled before its first step."""
    if inspect.iscoroutine(life):
        life.close()
    elif isinstance(life, asyncio.Future):
        life.cancel()


async def _ends(future: asyncio.Future[Any], seconds: float) -> bool:
    """Wait for a future for at most `seconds`; return whether it is done."""
    await asyncio.wait((future,), timeout=None if seconds == math.inf else seconds)
    return future.done()
