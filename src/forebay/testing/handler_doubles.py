"""Handlers for tests: slow, flaky, scripted, held, hanging, uncancellable, blocking. Each records its runs.

All work in virtual time and in real time. Pass one to ``register_worker``; several workers may share it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from forebay import clock, progress
from forebay.errors import ForebayError, InvalidSetting
from forebay.task import Task

Failure = BaseException | type[BaseException]


class _Payload:
    def __repr__(self) -> str:
        return "PAYLOAD"


PAYLOAD: Final = _Payload()
"""The default `result`: a run returns the payload of its task."""


class ScriptExhausted(ForebayError, LookupError):
    """The script has {lines} lines, and task {task_id!r} started one run more: add a line for it."""

    lines: int
    task_id: str


class HandlerDouble:
    """The base class of all handlers here: it returns the payload, and records its runs.

    Attributes:
        calls: the tasks, in the order in which their runs started.
        finished: the payloads, in the order in which their runs finished, with any outcome.
        running: runs in progress.
        peak: the largest number of runs in progress at one time.
        cancelled: cancellations that runs received.
    """

    def __init__(self) -> None:
        self.calls: list[Task] = []
        self.finished: list[Any] = []
        self.running = 0
        self.peak = 0
        self.cancelled = 0
        self._lock = threading.Lock()  # some runs are in threads
        self._call_waiters: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def started(self) -> list[Any]:
        """The payloads, in the order in which their runs started."""
        return [task.payload for task in self.calls]

    async def wait_for_calls(self, count: int = 1) -> None:
        """Wait until `count` runs have started in total."""
        waiter = asyncio.get_running_loop().create_future()
        with self._lock:
            if len(self.calls) >= count:
                return
            self._call_waiters.append((count, waiter))
        await waiter

    async def __call__(self, task: Task) -> Any:
        """Run the task and record the run."""
        with self._recorded(task):
            try:
                return await self.run(task)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def run(self, task: Task) -> Any:
        """Return the result of a run; subclasses override it."""
        return task.payload

    @contextmanager
    def _recorded(self, task: Task) -> Iterator[None]:
        with self._lock:
            self.calls.append(task)
            self.running += 1
            self.peak = max(self.peak, self.running)
            due = [future for count, future in self._call_waiters if count <= len(self.calls)]
            self._call_waiters = [(count, future) for count, future in self._call_waiters if count > len(self.calls)]
        for future in due:
            future.get_loop().call_soon_threadsafe(_resolve, future)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1
                self.finished.append(task.payload)


class SlowHandler(HandlerDouble):
    """A handler that takes `seconds`, then returns `result` or raises `error`. All three may be changed between runs.

    Args:
        seconds: duration of a run.
        result: return value; by default the payload of the task.
        error: exception to raise; None: none.
    """

    def __init__(self, seconds: float = 1.0, *, result: Any = PAYLOAD, error: Failure | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.result = result
        self.error = error

    async def run(self, task: Task) -> Any:
        """Sleep, then return or raise."""
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return _result_for(task, self.result)


class FlakyHandler(HandlerDouble):
    """A handler that raises in its first `failures` runs or, with a `chance`, in a random share of all runs.

    Args:
        failures: number of runs that fail, counted from the first; by default 1.
        chance: probability that a run fails, instead of `failures`.
        seed: seeds the draws of `chance`.
        seconds: duration of a run.
        result: return value; by default the payload of the task.
        error: exception to raise; by default a RuntimeError.

    Raises:
        InvalidSetting: both `failures` and `chance` were given, or `chance` is outside [0, 1].
    """

    def __init__(  # noqa: PLR0913 - each is a word with a default
        self,
        failures: int | None = None,
        *,
        chance: float | None = None,
        seed: int = 0,
        seconds: float = 0.0,
        result: Any = PAYLOAD,
        error: Failure | None = None,
    ) -> None:
        super().__init__()
        if chance is not None and (failures is not None or not 0 <= chance <= 1):
            expected = "a probability from 0 to 1, and given without a number of failures"
            raise InvalidSetting(owner="FlakyHandler", name="chance", value=chance, expected=expected)
        self.seconds = seconds
        self.result = result
        self.error = RuntimeError("the failure that the test asked for") if error is None else error
        self._failures = 1 if failures is None else failures
        self._chance = chance
        self._draw: Callable[[], float] = clock.new_random(seed).random

    async def run(self, task: Task) -> Any:
        """Sleep, then return or raise. The draw comes first, so that the order of starts decides which runs fail."""
        fails = len(self.calls) <= self._failures if self._chance is None else self._draw() < self._chance
        await asyncio.sleep(self.seconds)
        if fails:
            raise self.error
        return _result_for(task, self.result)


class ScriptedHandler(HandlerDouble):
    """A handler that returns the values of `script` in order, one for each run; exceptions in it are raised.

    Raises:
        ScriptExhausted: from a run for which there is no line left.
    """

    def __init__(self, script: Iterable[Any], *, seconds: float = 0.0) -> None:
        super().__init__()
        self.script = list(script)
        self.seconds = seconds

    async def run(self, task: Task) -> Any:
        """Take the next line at the start, so that concurrent runs get one each; sleep, then return or raise it."""
        number = len(self.calls)
        await asyncio.sleep(self.seconds)
        if number > len(self.script):
            raise ScriptExhausted(lines=len(self.script), task_id=task.task_id)
        line = self.script[number - 1]
        if isinstance(line, BaseException) or (isinstance(line, type) and issubclass(line, BaseException)):
            raise line
        return line


class ProgressHandler(HandlerDouble):
    """A handler that passes `values` to ``progress``, one every `seconds`, then returns `result`."""

    def __init__(self, values: Iterable[Any], *, seconds: float = 0.0, result: Any = PAYLOAD) -> None:
        super().__init__()
        self.values = list(values)
        self.seconds = seconds
        self.result = result

    async def run(self, task: Task) -> Any:
        """Report every value, then return."""
        for value in self.values:
            await asyncio.sleep(self.seconds)
            progress(value)
        return _result_for(task, self.result)


class HeldHandler(HandlerDouble):
    """A handler whose runs wait until the test releases them, then return `result` or raise `error`."""

    def __init__(self, *, result: Any = PAYLOAD, error: Failure | None = None) -> None:
        super().__init__()
        self.result = result
        self.error = error
        self._releases = asyncio.Semaphore(0)
        self._released_all = False

    def release(self, count: int | None = None) -> None:
        """Let `count` runs end, in the order of their starts; None: all runs, including future ones."""
        if count is None:
            self._released_all = True
            count = self.running
        for _ in range(count):
            self._releases.release()

    async def run(self, task: Task) -> Any:
        """Wait for the release, then return or raise."""
        if not self._released_all:
            await self._releases.acquire()
        if self.error is not None:
            raise self.error
        return _result_for(task, self.result)


class HangingHandler(HandlerDouble):
    """A handler that never returns; a cancellation ends it."""

    async def run(self, task: Task) -> Any:  # noqa: ARG002 - there is no result
        """Wait until cancelled."""
        await asyncio.get_running_loop().create_future()


class UncancellableHandler(HandlerDouble):
    """A handler that swallows every cancellation and ends after `seconds`, as some agent frameworks do.

    Its ticket ends before the run does, which makes the run a zombie.
    """

    def __init__(self, seconds: float = 30.0, *, result: Any = PAYLOAD) -> None:
        super().__init__()
        self.seconds = seconds
        self.result = result

    async def run(self, task: Task) -> Any:
        """Sleep through every cancellation, then return."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self.seconds
        while (left := due - loop.time()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                self.cancelled += 1
        return _result_for(task, self.result)


class BlockingHandler(HandlerDouble):
    """A plain callable that blocks its thread for `seconds`, or until `release`; a cancellation does not reach it.

    In virtual time, where there are no threads, it is a coroutine that takes as long and ignores cancellations.
    """

    def __init__(self, seconds: float = 1.0, *, result: Any = PAYLOAD) -> None:
        super().__init__()
        self.seconds = seconds
        self.result = result
        self._released = threading.Event()
        self._virtual_runs: list[asyncio.Future[None]] = []

    def release(self) -> None:
        """Let all runs end, including future ones."""
        self._released.set()
        for future in self._virtual_runs:
            _resolve(future)

    def __call__(self, task: Task) -> Any:
        """Block the thread and return the result; in virtual time, return a coroutine."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            with self._recorded(task):
                self._released.wait(self.seconds)
                return _result_for(task, self.result)
        return self._run_in_virtual_time(task)

    async def _run_in_virtual_time(self, task: Task) -> Any:
        with self._recorded(task):
            loop = asyncio.get_running_loop()
            done = loop.create_future()
            self._virtual_runs.append(done)
            timer = loop.call_later(0.0 if self._released.is_set() else self.seconds, _resolve, done)
            while not done.done():
                try:
                    await asyncio.shield(done)
                except asyncio.CancelledError:
                    self.cancelled += 1
            timer.cancel()
            self._virtual_runs.remove(done)
            return _result_for(task, self.result)


def _result_for(task: Task, result: Any) -> Any:
    return task.payload if result is PAYLOAD else result


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
