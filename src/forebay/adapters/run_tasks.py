"""RunTasks: what one run of an agent has begun in the event loop, so that it ends with its run and harms no other.

Frameworks make asyncio tasks of their tools, and give plain functions to the loop's default executor. Three things
follow, which no framework prevents:

- A SystemExit in a task ends the event loop, and with it the tasks of all workers.
- A run that fails or is cancelled ends while its tools go on: its slot would be given to another.
- The default executor has a few threads, which name resolution needs as well: plain tools that hang there keep the
  calls of all workers waiting.

So an event loop in which agents run gets a task factory and a default executor that look at whose task or function it
is: `RunTasks` is in the context of a run. Both pass everything else on to those that the loop had before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context, ContextVar
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from forebay._hooks import is_interrupt
from forebay._threads import LoopExecutor
from forebay.adapters.tool_threads import ToolThreads, exit_error

#: Plain functions of one run that have threads of their own at once; more of them share those of the loop.
_MOST_THREADS: Final = 32


class RunTasks:
    """The tasks and threads of one run, an async context manager around it.

    Args:
        modules: what the names of the modules begin with whose coroutines end with their run. Others are contained,
            and may go on, such as what a tool leaves running, or a connection that a framework keeps.

    Attributes:
        threads: of the plain functions.
    """

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.threads = ToolThreads()
        self._modules = modules
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = False

    async def __aenter__(self) -> Self:
        """Begin the run in the current context."""
        _prepare(asyncio.get_running_loop())
        self._token = _current.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what a failed or a cancelled run leaves, and wait for it; a result waits for nothing."""
        _current.reset(self._token)
        try:
            if error is not None:
                await self._stop()
                await self.threads.wait()
        finally:
            self._ended = True

    async def _stop(self) -> None:
        for task in self._tasks:
            if not task.cancelling():  # once more would cut the clean-up short of one that its framework has cancelled
                task.cancel()
        while self._tasks:
            ended, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                if not task.cancelled():
                    task.exception()  # nobody else asks for it
            self._tasks -= ended

    def add(self, task: asyncio.Task[Any], coroutine: Any) -> None:
        """Note a task that was made in the context of the run, if it is one that ends with it."""
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None and frame.f_globals.get("__name__", "").startswith(self._modules):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def executor_for(self, function: Callable[..., Any]) -> Executor | None:
        """Return the executor of a function that is given to the loop's default one; None for that itself."""
        from_to_thread = isinstance(function, partial) and isinstance(getattr(function.func, "__self__", None), Context)
        return self.threads if from_to_thread and not self._ended and self.threads.running < _MOST_THREADS else None


def run_threads() -> ToolThreads:
    """Return the threads of the current run."""
    run = _current.get()
    return ToolThreads() if run is None else run.threads


_current: ContextVar[RunTasks | None] = ContextVar("forebay_run_tasks", default=None)


def _prepare(loop: asyncio.AbstractEventLoop) -> None:
    """Give an event loop the task factory and the executor, unless it has them."""
    factory = loop.get_task_factory()
    if isinstance(factory, _TaskFactory):
        return
    if isinstance(loop, asyncio.BaseEventLoop) and type(loop).create_task is not asyncio.BaseEventLoop.create_task:
        return  # it makes tasks of its own kind, which a factory would replace: in virtual time
    loop.set_task_factory(_TaskFactory(factory))
    before = getattr(loop, "_default_executor", None)
    if not isinstance(before, LoopExecutor):
        loop.set_default_executor(LoopExecutor(before, _elsewhere))


def _elsewhere(function: Callable[..., Any]) -> Executor | None:
    run = _current.get()
    return None if run is None else run.executor_for(function)


class _TaskFactory:
    """Makes the tasks of an event loop: those of a run cannot end the loop."""

    def __init__(self, before: Any) -> None:
        self._make = before or _make_task

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        run = _current.get()
        if run is None:
            return self._make(loop, coroutine, **options)
        task = self._make(loop, _Contained(coroutine), **options)
        run.add(task, coroutine)
        return task


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(coroutine, loop=loop, **options)


def _contained(error: BaseException) -> BaseException:
    return error if is_interrupt(error) else exit_error(error)


class _Contained(Coroutine[Any, Any, Any]):
    """A coroutine that fails where the one in it exits."""

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)  # its frame and state, for those who look at tasks

    def send(self, value: Any) -> Any:
        """Run on to where it waits next."""
        try:
            return self._coroutine.send(value)
        except (KeyboardInterrupt, SystemExit) as error:
            raise _contained(error) from error

    def throw(self, *error: Any) -> Any:
        """Raise an exception where it waits, and run on."""
        try:
            return self._coroutine.throw(*error)
        except (KeyboardInterrupt, SystemExit) as raised:
            raise _contained(raised) from raised

    def close(self) -> None:
        """End it where it waits."""
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()
