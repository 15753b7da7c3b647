"""Handlers that do as a test says: slow, flaky, hanging, deaf, blocking, held; each remembers its runs.

All work in virtual time and in real time. Each is a handler for ``register_worker``, and may serve several workers.
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
"""As a `result`: a run returns the payload that it was given."""


class ScriptExhausted(ForebayError, LookupError):
    """The script has {lines} lines, and task {task_id!r} made one run more: write another line for it."""

    lines: int
    task_id: str


class HandlerDouble:
    """What all of them remember.

    Attributes:
        calls: the tasks in the order in which their runs began.
        ended: the payloads in the order in which their runs ended, however they did.
        running: runs under way.
        peak: the most that were under way at a time.
        cancelled: runs that were told to stop.
    """

    def __init__(self) -> None:
        self.calls: list[Task] = []
        self.finished: list[Any] = []
        self.running = 0
        self.peak = 0
        self.cancelled = 0
        self._lock = threading.Lock()  # some run in threads
        self._call_waiters: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def started(self) -> list[Any]:
        """The payloads in the order in which their runs began."""
        return [task.payload for task in self.calls]

    async def wait_for_calls(self, count: int = 1) -> None:
        """Wait until so many runs have begun, in all."""
        expected = asyncio.get_running_loop().create_future()
        with self._lock:
            if len(self.calls) >= count:
                return
            self._call_waiters.append((count, expected))
        await expected

    async def __call__(self, task: Task) -> Any:
        """Run, and remember it."""
        with self._recorded(task):
            try:
                return await self.run(task)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def run(self, task: Task) -> Any:
        """What a run does: for subclasses of your own."""
        return task.payload

    @contextmanager
    def _recorded(self, task: Task) -> Iterator[None]:
        with self._lock:
            self.calls.append(task)
            self.running += 1
            self.peak = max(self.peak, self.running)
            begun = [future for times, future in self._call_waiters if times <= len(self.calls)]
            self._call_waiters = [(times, future) for times, future in self._call_waiters if times > len(self.calls)]
        for future in begun:
            future.get_loop().call_soon_threadsafe(_resolve, future)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1
                self.finished.append(task.payload)


class SlowHandler(HandlerDouble):
    """Takes `seconds`, then returns `result`, or raises `error` if there is one. All may be changed between runs."""

    def __init__(self, seconds: float = 1.0, *, result: Any = PAYLOAD, error: Failure | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.result = result
        self.error = error

    async def run(self, task: Task) -> Any:
        """Take the time."""
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return _result_for(self.result, task)


class FlakyHandler(HandlerDouble):
    """Raises `error` in its first `failures` runs; or, with a `chance`, in that share of all, drawn from the seed.

    Raises:
        InvalidSetting: a chance beside a number of failures, or one outside [0, 1].
    """

    def __init__(  # noqa: PLR0913 - each a word with a default
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
            expected = "a share from 0 to 1, instead of a number of failures"
            raise InvalidSetting(owner="Flaky", name="chance", value=chance, expected=expected)
        self.seconds = seconds
        self.result = result
        self.error = RuntimeError("flaky, as the test asked for") if error is None else error
        self._failures = 1 if failures is None else failures
        self._chance = chance
        self._draw: Callable[[], float] = clock.new_random(seed).random

    async def run(self, task: Task) -> Any:
        """Draw first, so that the order of beginning decides who fails."""
        fails = len(self.calls) <= self._failures if self._chance is None else self._draw() < self._chance
        await asyncio.sleep(self.seconds)
        if fails:
            raise self.error
        return _result_for(self.result, task)


class ScriptedHandler(HandlerDouble):
    """Returns one value of `script` after the other, run by run; what is an exception is raised.

    Raises:
        ScriptEnded: out of a run for which there is no line.
    """

    def __init__(self, script: Iterable[Any], *, seconds: float = 0.0) -> None:
        super().__init__()
        self.script = list(script)
        self.seconds = seconds

    async def run(self, task: Task) -> Any:
        """Take the next line when beginning, so that runs at a time have one each."""
        number = len(self.calls)
        await asyncio.sleep(self.seconds)
        if number > len(self.script):
            raise ScriptExhausted(lines=len(self.script), task_id=task.task_id)
        line = self.script[number - 1]
        if isinstance(line, BaseException) or (isinstance(line, type) and issubclass(line, BaseException)):
            raise line
        return line


class ProgressHandler(HandlerDouble):
    """Passes `values` to ``progress``, one every `seconds`, then returns `result`."""

    def __init__(self, values: Iterable[Any], *, seconds: float = 0.0, result: Any = PAYLOAD) -> None:
        super().__init__()
        self.values = list(values)
        self.seconds = seconds
        self.result = result

    async def run(self, task: Task) -> Any:
        """Report."""
        for value in self.values:
            await asyncio.sleep(self.seconds)
            progress(value)
        return _result_for(self.result, task)


class HeldHandler(HandlerDouble):
    """Waits until the test lets it go on: for whatever must be seen while tasks run."""

    def __init__(self, *, result: Any = PAYLOAD, error: Failure | None = None) -> None:
        super().__init__()
        self.result = result
        self.error = error
        self._releases = asyncio.Semaphore(0)
        self._open = False

    def release(self, count: int | None = None) -> None:
        """Let `count` runs end, those that began first; by default all, those to come too."""
        if count is None:
            self._open = True
            count = self.running
        for _ in range(count):
            self._releases.release()

    async def run(self, task: Task) -> Any:
        """Wait."""
        if not self._open:
            await self._releases.acquire()
        if self.error is not None:
            raise self.error
        return _result_for(self.result, task)


class HangingHandler(HandlerDouble):
    """Never ends by itself; a cancellation ends it."""

    async def run(self, task: Task) -> Any:  # noqa: ARG002 - it comes to nothing
        """Wait for ever."""
        await asyncio.get_running_loop().create_future()


class UncancellableHandler(HandlerDouble):
    """Swallows every cancellation and ends after `seconds`, as some agent teams do: its ticket has ended long before.

    So it makes a zombie.
    """

    def __init__(self, seconds: float = 30.0, *, result: Any = PAYLOAD) -> None:
        super().__init__()
        self.seconds = seconds
        self.result = result

    async def run(self, task: Task) -> Any:
        """Go on, whatever is said."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self.seconds
        while (left := due - loop.time()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                self.cancelled += 1
        return _result_for(self.result, task)


class BlockingHandler(HandlerDouble):
    """A plain callable that blocks its thread for `seconds`, or until `release`; no cancellation reaches it.

    In virtual time, where threads have no place, it takes as long and is as deaf.
    """

    def __init__(self, seconds: float = 1.0, *, result: Any = PAYLOAD) -> None:
        super().__init__()
        self.seconds = seconds
        self.result = result
        self._released = threading.Event()
        self._virtual: list[asyncio.Future[None]] = []

    def release(self) -> None:
        """Let every run end, those to come too."""
        self._released.set()
        for waiting in self._virtual:
            _resolve(waiting)

    def __call__(self, task: Task) -> Any:
        """Block; or, in virtual time, return what waits instead."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            with self._recorded(task):
                self._released.wait(self.seconds)
                return _result_for(self.result, task)
        return self._run_in_virtual_time(task)

    async def _run_in_virtual_time(self, task: Task) -> Any:
        with self._recorded(task):
            loop = asyncio.get_running_loop()
            released = loop.create_future()
            self._virtual.append(released)
            timer = loop.call_later(0.0 if self._released.is_set() else self.seconds, _resolve, released)
            while not released.done():
                try:
                    await asyncio.shield(released)
                except asyncio.CancelledError:
                    self.cancelled += 1
            timer.cancel()
            self._virtual.remove(released)
            return _result_for(self.result, task)


def _result_for(result: Any, task: Task) -> Any:
    return task.payload if result is PAYLOAD else result


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
