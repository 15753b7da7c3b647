"""An event loop in virtual time: what takes minutes takes milliseconds, and one seed always gives the same run.

Time stands still while anything is ready, and jumps to the next timer when nothing is. Chance comes from the seed
alone: it delays timers a little, so that those due at the same moment come out in another order for another seed.
Callbacks given to ``call_soon`` keep their order, as asyncio promises.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import math
import random
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple

from forebay.errors import InvalidSetting
from forebay.simulation.loop.determinism import NumberedFuture, NumberedTask, OrderedWeakSet, collect_garbage
from forebay.simulation.loop.no_io_loop import NoIOLoop
from forebay.simulation.loop.simulation_errors import (
    Deadlock,
    JobStopped,
    RealThread,
    SimulationBoundExceeded,
    UnhandledError,
    VirtualLoopRequired,
)
from forebay.simulation.loop.waiting_tasks import describe_waiting, format_waiting

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Coroutine, Generator
    from concurrent.futures import Executor

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

EPOCH: Final = 1_767_225_600.0  # 2026-01-01T00:00:00Z, in epoch seconds
JITTER: Final = 1e-6  # seconds
EXECUTOR_DELAY: Final = (0.000_1, 0.005)  # seconds
MAX_TIME: Final = 86_400.0  # virtual seconds
MAX_STEPS: Final = 10_000_000

_COLLECT_EVERY: Final = 10_000  # steps


class VirtualLoop(NoIOLoop):
    """An asyncio event loop in virtual time, its chance drawn from `seed`. Run it with `simulate`.

    Args:
        seed: what all chance is drawn from; the same seed gives the same run.
        jitter: seconds by which a timer may come late, at most; never early. With 0 timers are exact, and those due at
            the same moment come in one fixed order, not always the first first.
        epoch: wall time at the loop's time 0, in epoch seconds.
        executor_delay: the shortest and the longest that a job in `run_in_executor` takes, in virtual seconds.
        max_time: virtual seconds that one run may take.
        max_steps: callbacks that one run may make (timers that come due together count as one).

    Attributes:
        virtual: True, for those that must know that no thread may watch this loop by real time.
        random: a source of draws for models; what the loop itself draws does not come from it.
        errors: what reached nobody, in order: what asyncio would have logged and forgotten.
        steps: callbacks made so far.

    Raises:
        InvalidSetting: a setting is out of its bounds.
    """

    virtual: Final = True

    # asyncio's own, which a loop without selector must know
    _closed = True  # until made: what a wrong setting stops halfway has nothing to close
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(  # noqa: PLR0913 - each a number with a name and a default
        self,
        seed: int = 0,
        *,
        jitter: float = JITTER,
        epoch: float = EPOCH,
        executor_delay: tuple[float, float] = EXECUTOR_DELAY,
        max_time: float = MAX_TIME,
        max_steps: int = MAX_STEPS,
    ) -> None:
        _check("jitter", jitter, 0 <= jitter < math.inf, "a number of seconds, at least 0")
        _check("epoch", epoch, math.isfinite(epoch), "a number of epoch seconds")
        _check(
            "executor_delay",
            executor_delay,
            0 <= executor_delay[0] <= executor_delay[1] < math.inf,
            "(low, high) seconds",
        )
        _check("max_time", max_time, max_time > 0, "a positive number of virtual seconds")
        _check("max_steps", max_steps, max_steps > 0, "a positive number of steps")
        super().__init__()
        self.seed: Final = seed
        self.random: Final = random.Random(seed)
        self.errors: Final[list[UnhandledError]] = []
        self.steps = 0
        self.max_time = max_time
        self.max_steps = max_steps
        self.executor_delay = executor_delay
        self._epoch = epoch
        self._jitter = jitter
        self._timer_random = random.Random(f"{seed} lateness").random
        self._executor_random = random.Random(f"{seed} jobs").random
        self._jobs = 0
        self._now = 0.0
        self._time_bound = max_time
        self._step_bound = max_steps
        self._next_check = _COLLECT_EVERY
        self._owner = threading.get_ident()
        self._task_numbers = itertools.count(1)
        self._future_numbers = itertools.count(1)
        self._tasks: OrderedWeakSet[asyncio.Task[Any]] = OrderedWeakSet()
        self._asyncgens: OrderedWeakSet[Any] = OrderedWeakSet()  # asyncio keeps a WeakSet, closed in order of address
        self._clock_resolution = math.ulp(0.0)
        self._selector = self  # to wait is to move the clock

    # --- time -----------------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def wall_time(self) -> float:
        """Virtual epoch seconds."""
        return self._epoch + self._now

    def stall(self, seconds: float) -> None:
        """Let time pass in which nothing runs, as code does that blocks the loop: timers that fall due come late."""
        _check("stall", seconds, 0 <= seconds < math.inf, "a number of seconds, at least 0")
        self._now += seconds

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call `callback` at the loop's time `when`, or up to the jitter later.

        Raises:
            InvalidSetting: `when` is not a number.
        """
        if math.isnan(when):  # it would derange the heap of timers, and with it time
            raise InvalidSetting(owner="loop.call_at", name="when", value=when, expected="a number of seconds")
        if self._jitter:
            when += self._jitter * self._timer_random()
        return super().call_at(when, callback, *args, context=context)

    def select(self, timeout: float | None) -> tuple[()]:
        """Stand in for asyncio's selector, which it asks once a turn: instead of waiting for I/O, move the clock.

        Raises:
            Deadlock: there is nothing left to wait for.
            Endless: the run has passed `max_time` or `max_steps`.
        """
        self.steps += len(self._ready) or 1
        if self.steps >= self._next_check:
            self._check_steps()
        if timeout != 0:  # nothing is ready
            when = self._scheduled[0].when() if self._scheduled else math.inf
            if when == math.inf:
                waits = describe_waiting(self.pending())
                raise Deadlock(now=self._now, seed=self.seed, waiting=waits, listing=format_waiting(waits))
            if when > self._time_bound:
                raise self._bound_exceeded(f"max_time={self.max_time:g}")
            self._now = when
            self._clock_resolution = math.ulp(when)  # so that asyncio takes what is due, and nothing early
        return ()

    def _process_events(self, event_list: tuple[()]) -> None:
        """Nothing comes from outside."""

    def _check_steps(self) -> None:
        if self.steps > self._step_bound:
            raise self._bound_exceeded(f"max_steps={self.max_steps}")
        if not gc.isenabled():
            collect_garbage(self.steps // _COLLECT_EVERY)
        self._next_check = min(self.steps + _COLLECT_EVERY, self._step_bound + 1)

    def _bound_exceeded(self, bound: str) -> SimulationBoundExceeded:
        waits = describe_waiting(self.pending())
        return SimulationBoundExceeded(
            bound=bound, now=self._now, seed=self.seed, steps=self.steps, waiting=waits, listing=format_waiting(waits)
        )

    def run_forever(self) -> None:
        """Run until stopped; the bounds count from here, so that what ended a run leaves it room to clean up."""
        self._owner = threading.get_ident()
        self._time_bound = self._now + self.max_time
        self._step_bound = self.steps + self.max_steps
        self._next_check = min(self._next_check, self._step_bound + 1)
        super().run_forever()

    # --- tasks and futures ----------------------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        """Make a future whose place in a set is the same in each run."""
        future: NumberedFuture[Any] = NumberedFuture(loop=self)
        future.number = next(self._future_numbers)
        return future

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: contextvars.Context | None = None,
        **options: Any,
    ) -> asyncio.Task[T]:
        """Make a task whose default name and place in a set are the same in each run."""
        number = next(self._task_numbers)
        name = f"task-{number}" if name is None else str(name)
        task: asyncio.Task[T]
        if self.get_task_factory() is None:
            task = NumberedTask(coro, number, loop=self, name=name, context=context, **options)
        else:
            task = super().create_task(coro, name=name, context=context, **options)
        self._tasks.add(task)
        return task

    def pending(self) -> list[asyncio.Task[Any]]:
        """The tasks that are not done, in order of making."""
        return [task for task in self._tasks if not task.done()]

    # --- errors ---------------------------------------------------------------------------------------------------

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what reached nobody in `errors`, then handle it as asyncio does."""
        source = context.get("task") or context.get("future")
        who = source.get_name() if isinstance(source, asyncio.Task) else ""
        self.errors.append(
            UnhandledError(
                at=self._now, task=who, message=context.get("message", ""), exception=context.get("exception")
            )
        )
        super().call_exception_handler(context)

    def report_unretrieved(self) -> None:
        """Report the failures of tasks that nobody has looked at, although somebody still holds the task.

        asyncio reports such a failure when the task is collected: too late, if what holds it outlives the run.
        """
        for task in list(self._tasks):
            if task.done() and task._log_traceback:  # noqa: SLF001 - asyncio's own mark; reading the exception clears it
                self.call_exception_handler(
                    {"message": "Task exception was never retrieved", "exception": task.exception(), "task": task}
                )

    # --- threads --------------------------------------------------------------------------------------------------

    def run_in_executor(
        self,
        executor: Executor | None,  # noqa: ARG002 - all jobs run here
        func: Callable[[*Ts], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """Run a blocking job in line, after a drawn delay; `executor` is not used.

        The job sees the running loop, and its time. Cancelling the future stops a thread no more than it does in life:
        by the draw, the job still waited for a thread and is dropped, or it runs and its result is.
        """
        low, high = self.executor_delay
        delay = low + (high - low) * self._executor_random()
        future: asyncio.Future[T] = self.create_future()
        # A thread starts with an empty context.
        self.call_later(delay, self._run_job, future, func, args, context=contextvars.Context())
        self._jobs += 1
        return future

    def _run_job(self, future: asyncio.Future[T], func: Callable[..., T], args: tuple[Any, ...]) -> None:
        self._jobs -= 1
        if future.cancelled() and self._executor_random() < 0.5:  # noqa: PLR2004 - even odds
            return
        try:
            result = func(*args)
        except (SystemExit, KeyboardInterrupt, StopIteration) as stop:
            wrapped = JobStopped(raised=repr(stop))
            wrapped.__cause__ = stop
            _fail(future, wrapped)
        except BaseException as error:  # noqa: BLE001 - it is for whoever awaits the job, as from a real executor
            _fail(future, error)
        else:
            if not future.done():
                future.set_result(result)
        finally:
            del future  # which holds the error, which holds this frame

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109 - asyncio's
        """Wait for the jobs under way, as asyncio waits for its threads."""
        while self._jobs:  # noqa: ASYNC110 - a job ends when its time has come, and by nothing else
            await asyncio.sleep(self.executor_delay[1])

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Call `callback` soon, from the loop's own thread.

        Raises:
            RealThread: it came from another thread, whose time no seed rules.
        """
        if threading.get_ident() != self._owner:
            raise RealThread(thread=threading.current_thread().name)
        return super().call_soon_threadsafe(callback, *args, context=context)

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""


def virtual_loop() -> VirtualLoop:
    """The running loop, for a model that draws from its `random` or a test that reads its `errors`.

    Raises:
        NotVirtual: no loop is running, or it is not a virtual one.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise VirtualLoopRequired(what="virtual_loop()") from None
    if not isinstance(loop, VirtualLoop):
        raise VirtualLoopRequired(what="virtual_loop()")
    return loop


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _check(name: str, value: object, good: bool, expected: str) -> None:  # noqa: FBT001 - a verdict
    if not good:
        raise InvalidSetting(owner="VirtualLoop", name=name, value=value, expected=expected)
