"""AgentRun: one run of an agent or a team, which stops with all that it has begun."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from inspect import CORO_CREATED, getcoroutinestate
from typing import Any, Final

from autogen_core import CancellationToken, SingleThreadedAgentRuntime

#: The packages whose coroutines are tasks of AutoGen.
_PACKAGES: Final = frozenset({"autogen_agentchat", "autogen_core", "autogen_ext"})
#: They end once the other tasks of their team have; but what a runtime runs goes on if what stops it was cancelled.
_RUNS: Final = "RunContext._run"
_STOPS: Final = "BaseGroupChat.run_stream.<locals>.stop_runtime"


class AgentRun:
    """One run.

    Attributes:
        token: cancels it, for AutoGen.
    """

    def __init__(self) -> None:
        self.token = CancellationToken()
        self._errors: list[Exception] = []

    async def result(self, function: Callable[[CancellationToken], Coroutine[Any, Any, Any]]) -> Any:
        """Return what `function` returns; if it fails or this is cancelled, once all its tasks have ended."""
        context = copy_context()
        context.run(_current.set, self)
        main = asyncio.get_running_loop().create_task(_outcome(function, self.token), context=context)
        try:
            await asyncio.wait([main])
        finally:
            if not main.done() or main.cancelled() or main.result()[1] is not None:
                await self._stop(main)
        value, error = main.result()
        if error is not None:
            raise self._original(error)
        return value

    def record(self, error: Exception) -> None:
        """Keep an exception that a runtime has met, before its team makes a text of it."""
        self._errors.append(error)

    async def _stop(self, main: asyncio.Task[Any]) -> None:
        """Cancel all tasks of the run, and wait until they have ended.

        They are cancelled in one turn of the loop, in which the token has cancelled what they wait for: so each of
        them gets one CancelledError. One that has not started ends by itself, because the token is cancelled; cancelled
        then, it would not count the message that it was made for as done, for which its runtime waits.
        """
        self.token.cancel()
        main.cancel()
        for task in self._tasks():
            if _name(task) not in (_RUNS, _STOPS) and getcoroutinestate(_coroutine(task)) != CORO_CREATED:
                task.cancel()
        while left := self._tasks():
            if all(_name(task) == _RUNS for task in left):
                for task in left:
                    task.cancel()
            await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)

    def _tasks(self) -> list[asyncio.Task[Any]]:
        """Return the tasks of this run that have not ended: AutoGen has references to some of its own only."""
        return [task for task in asyncio.all_tasks() if _is_of_run(task) and _context(task).get(_current) is self]

    def _original(self, error: BaseException) -> BaseException:
        """Return the exception that a team has made a text of; `error` if it has not."""
        told = str(error) if type(error) is RuntimeError else ""
        return next((each for each in self._errors if f"{type(each).__name__}: {each}" in told), error)


_current: ContextVar[AgentRun] = ContextVar("forebay_autogen_run")


def is_stopped() -> bool:
    """Return whether the current run was cancelled or has failed."""
    run = _current.get(None)
    return run is None or run.token.is_cancelled()


class RunRuntime(SingleThreadedAgentRuntime):  # type: ignore[misc]  # without its package it has no type
    """The runtime of a team's copy: it delivers nothing once its run is cancelled, and keeps exceptions."""

    def __init__(self) -> None:
        super().__init__(ignore_unhandled_exceptions=False)  # as a team makes its own

    async def _process_publish(self, message_envelope: Any) -> None:
        run = _current.get()
        if run.token.is_cancelled():
            self._message_queue.task_done()
            return
        await super()._process_publish(message_envelope)
        if isinstance(self._background_exception, Exception):
            run.record(self._background_exception)


async def _outcome(
    function: Callable[[CancellationToken], Coroutine[Any, Any, Any]], token: CancellationToken
) -> tuple[Any, BaseException | None]:
    """Return a value or an exception as a value: a task that ends with SystemExit would end the event loop."""
    try:
        return await function(token), None
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - it is raised by who waits for it
        return None, error


def _is_of_run(task: asyncio.Task[Any]) -> bool:
    """Return whether a task runs code of AutoGen or of this module, and not what a tool has begun."""
    frame = getattr(_coroutine(task), "cr_frame", None)
    module = "" if frame is None else frame.f_globals.get("__name__", "")
    return module == __name__ or module.partition(".")[0] in _PACKAGES


def _coroutine(task: asyncio.Task[Any]) -> Any:
    return task.get_coro()


def _name(task: asyncio.Task[Any]) -> str:
    return str(_coroutine(task).__qualname__)


def _context(task: asyncio.Task[Any]) -> Context:
    """Return the context that a task runs in."""
    if sys.version_info >= (3, 12):
        return task.get_context()
    return next(each for each in gc.get_referents(task) if isinstance(each, Context))
