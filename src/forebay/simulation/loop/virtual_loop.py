"""An event loop in virtual time: minutes pass in milliseconds, and one seed always gives the same run.

The clock stands still while a callback is ready, and jumps to the next timer when none is. All randomness comes from
the seed. It delays timers by up to a microsecond, so that timers due at the same moment fire in another order for
another seed. Callbacks given to ``call_soon`` keep their order, as asyncio promises.
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
    """An asyncio event loop in virtual time. Run it with `simulate`.

    Args:
        seed: seeds all randomness; the same seed gives the same run.
        jitter: maximum delay of a timer, in seconds; a timer never fires early. With 0 timers are exact, and timers due
            at the same moment fire in one fixed order, which is not always the order in which they were set.
        epoch: wall time at the loop's time 0, in epoch seconds.
        executor_delay: shortest and longest duration of a job in `run_in_executor`, in virtual seconds.
        max_time: maximum virtual seconds of one run.
        max_steps: maximum number of callbacks in one run (timers that come due together count as one).

    Attributes:
        virtual: always True. Code that would watch the loop from a thread, in real time, checks it.
        random: a generator for models; the loop draws from other generators.
        errors: errors that no code handled, in order. asyncio only logs them.
        suspension: seconds for which its machine was suspended, see `suspend`.
        steps: callbacks run so far.

    Raises:
        InvalidSetting: a setting is out of range.
    """

    virtual: Final = True

    # attributes of asyncio's base class that a loop without a selector uses
    _closed = True  # until __init__ succeeds: a loop that an invalid setting left half made needs no closing
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(  # noqa: PLR0913 - each is a named number with a default
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
        self.suspension = 0.0
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
        # asyncio keeps a WeakSet, which closes them in order of address
        self._asyncgens: OrderedWeakSet[Any] = OrderedWeakSet()
        self._clock_resolution = math.ulp(0.0)
        self._selector = self  # instead of waiting for I/O, `select` moves the clock

    # --- time -----------------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Return the virtual seconds since the loop was created."""
        return self._now

    def wall_time(self) -> float:
        """Return the virtual wall time, in epoch seconds."""
        return self._epoch + self._now

    def step_wall_time(self, seconds: float) -> None:
        """Move the wall clock by `seconds`, as an operator or a time server does; the loop's own time goes on."""
        _check("step_wall_time", seconds, math.isfinite(seconds), "a finite number of seconds")
        self._epoch += seconds

    def suspend(self, seconds: float) -> None:
        """Suspend the machine, as a closed lid does: the wall clock goes on, and the loop's own time does not."""
        _check("suspend", seconds, 0 <= seconds < math.inf, "a number of seconds, at least 0")
        self._epoch += seconds
        self.suspension += seconds

    def stall(self, seconds: float) -> None:
        """Advance the clock by `seconds` without running callbacks, as code that blocks the loop does."""
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
        if math.isnan(when):  # it would corrupt the order of the timer heap
            raise InvalidSetting(owner="loop.call_at", name="when", value=when, expected="a number of seconds")
        if self._jitter:
            when += self._jitter * self._timer_random()
        return super().call_at(when, callback, *args, context=context)

    def select(self, timeout: float | None) -> tuple[()]:
        """Move the clock to the next timer. asyncio calls its selector once in each iteration to wait for I/O.

        Raises:
            Deadlock: nothing is ready and no timer is set.
            SimulationBoundExceeded: the run exceeded `max_time` or `max_steps`.
        """
        self.steps += len(self._ready) or 1
        if self.steps >= self._next_check:
            self._check_steps()
        if timeout != 0:  # nothing is ready
            when = self._scheduled[0].when() if self._scheduled else math.inf
            if when == math.inf:
                waiting = describe_waiting(self.pending())
                raise Deadlock(now=self._now, seed=self.seed, waiting=waiting, listing=format_waiting(waiting))
            if when > self._time_bound:
                raise self._bound_exceeded(f"max_time={self.max_time:g}")
            self._now = when
            self._clock_resolution = math.ulp(when)  # asyncio then takes the timers that are due, and none early
        return ()

    def _process_events(self, event_list: tuple[()]) -> None:
        """Do nothing: there are no I/O events."""

    def _check_steps(self) -> None:
        if self.steps > self._step_bound:
            raise self._bound_exceeded(f"max_steps={self.max_steps}")
        if not gc.isenabled():
            collect_garbage(self.steps // _COLLECT_EVERY)
        self._next_check = min(self.steps + _COLLECT_EVERY, self._step_bound + 1)

    def _bound_exceeded(self, bound: str) -> SimulationBoundExceeded:
        waiting = describe_waiting(self.pending())
        return SimulationBoundExceeded(
            bound=bound,
            now=self._now,
            seed=self.seed,
            steps=self.steps,
            waiting=waiting,
            listing=format_waiting(waiting),
        )

    def run_forever(self) -> None:
        """Run until stopped. The bounds count from this call, so that a run that exceeded one can still clean up."""
        self._owner = threading.get_ident()
        self._time_bound = self._now + self.max_time
        self._step_bound = self.steps + self.max_steps
        self._next_check = min(self._next_check, self._step_bound + 1)
        super().run_forever()

    # --- tasks and futures ----------------------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future whose position in a set is the same in each run."""
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
        """Start a task whose default name and position in a set are the same in each run."""
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
        """Return the tasks that are not done, in order of creation."""
        return [task for task in self._tasks if not task.done()]

    # --- errors ---------------------------------------------------------------------------------------------------

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Add the error to `errors`, then handle it as asyncio does."""
        source = context.get("task") or context.get("future")
        self.errors.append(
            UnhandledError(
                at=self._now,
                task=source.get_name() if isinstance(source, asyncio.Task) else "",
                message=context.get("message", ""),
                exception=context.get("exception"),
            )
        )
        super().call_exception_handler(context)

    def report_unretrieved(self) -> None:
        """Pass failed tasks whose exception was never retrieved to the exception handler, each of them once.

        asyncio reports such a task when it is garbage collected: too late, if a reference to it outlives the run.
        """
        for task in list(self._tasks):
            if task.done() and task._log_traceback:  # noqa: SLF001 - asyncio's own flag; reading the exception clears it
                self.call_exception_handler(
                    {"message": "Task exception was never retrieved", "exception": task.exception(), "task": task}
                )

    # --- threads --------------------------------------------------------------------------------------------------

    def run_in_executor(
        self,
        executor: Executor | None,  # noqa: ARG002 - all jobs run inline
        func: Callable[[*Ts], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """Run a blocking job inline, after a random delay; `executor` is not used.

        The job sees the running loop and its clock. Cancelling the future does not stop a real thread either: at even
        odds the job was still queued and never runs, or it runs and its result is discarded.
        """
        low, high = self.executor_delay
        delay = low + (high - low) * self._executor_random()
        future: asyncio.Future[T] = self.create_future()
        # An executor's thread starts with an empty context.
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
        except BaseException as error:  # noqa: BLE001 - passed to the code that awaits the job, as a real executor does
            _fail(future, error)
        else:
            if not future.done():
                future.set_result(result)
        finally:
            del future  # it holds the error, which holds this frame

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109 - asyncio's
        """Wait for the running jobs, as asyncio waits for its threads."""
        while self._jobs:  # noqa: ASYNC110 - a job ends when its delay has passed, and nothing announces it
            await asyncio.sleep(self.executor_delay[1])

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Call `callback` soon, from the loop's own thread.

        Raises:
            RealThread: the call came from another thread, whose timing no seed controls.
        """
        if threading.get_ident() != self._owner:
            raise RealThread(thread=threading.current_thread().name)
        return super().call_soon_threadsafe(callback, *args, context=context)

    def _write_to_self(self) -> None:
        """Do nothing: this loop never blocks, so it need not be woken."""


def virtual_loop() -> VirtualLoop:
    """Return the running virtual loop: models draw from its `random`, tests read its `errors`.

    Raises:
        VirtualLoopRequired: no loop is running, or it is not a virtual one.
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


def _check(name: str, value: object, valid: bool, expected: str) -> None:  # noqa: FBT001 - the condition itself
    if not valid:
        raise InvalidSetting(owner="VirtualLoop", name=name, value=value, expected=expected)
