"""Run coroutines on a virtual loop, and end it cleanly."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar

from forebay.errors import ForebayError
from forebay.simulation.loop.determinism import manual_gc
from forebay.simulation.loop.simulation_errors import LoopAlreadyRunning, SimulationError, UnhandledErrors
from forebay.simulation.loop.virtual_loop import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType
    from typing import Self, Unpack

T = TypeVar("T")

_LONG_RUN: Final = 100_000  # steps after which garbage may be in the oldest generation


class LoopSettings(TypedDict, total=False):
    """The settings of a `VirtualLoop` other than the seed."""

    jitter: float
    epoch: float
    executor_delay: tuple[float, float]
    max_time: float
    max_steps: int


class Simulation:
    """A virtual loop on which coroutines run one after the other: what `asyncio.Runner` is for a real loop.

    A context manager. On exit it cancels the remaining tasks and closes async generators, as ``asyncio.run`` does. The
    same seed gives the same run.

    Args:
        seed: seeds all randomness.
        **settings: settings of the `VirtualLoop`.

    Raises:
        InvalidSetting: a setting is out of range.
        Deadlock, SimulationBoundExceeded: on exit, a cancelled task did not end.
        UnhandledErrors: on exit, an error had not been handled.
    """

    def __init__(self, seed: int = 0, **settings: Unpack[LoopSettings]) -> None:
        self.loop = VirtualLoop(seed, **settings)
        self._manual_gc = manual_gc()

    @property
    def seed(self) -> int:
        """The seed of all randomness."""
        return self.loop.seed

    @property
    def now(self) -> float:
        """Virtual seconds since the simulation began."""
        return self.loop.time()

    def run(self, main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, or the coroutine that `main` returns, and return its result.

        Tasks that it leaves running continue with the next call of `run`.

        Raises:
            LoopAlreadyRunning: this thread already runs an event loop.
            Deadlock: `main` is not done, and nothing is left that could continue it.
            SimulationBoundExceeded: the run exceeded `max_time` or `max_steps`.
        """
        coro = main() if callable(main) else main
        try:
            _check_no_loop()
        except ForebayError:
            coro.close()
            raise
        task = self.loop.create_task(coro, name="main")
        try:
            return self.loop.run_until_complete(task)
        finally:
            if task.done() and not task.cancelled():
                task.exception()  # mark as retrieved: an exception that stops the loop (SystemExit) is raised anyway

    def check(self) -> None:
        """Raise the errors that no code has handled so far, each of them once.

        Raises:
            UnhandledErrors: there are such errors.
        """
        gc.collect(1 if self.loop.steps < _LONG_RUN else 2)  # asyncio reports an unhandled error on collection
        self.loop.report_unretrieved()
        if self.loop.errors:
            errors = tuple(self.loop.errors)
            self.loop.errors.clear()
            listing = "".join(f"\n  {error}" for error in errors)
            cause = next((error.exception for error in errors if error.exception), None)
            raise UnhandledErrors(seed=self.seed, count=len(errors), errors=errors, listing=listing) from cause

    def __enter__(self) -> Self:
        self._manual_gc.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end()
        except SimulationError as error:
            if failure is None:
                raise
            failure.add_note(f"And at the end of the simulation: {error}")
        finally:
            self._manual_gc.__exit__(None, None, None)

    def _end(self) -> None:
        try:
            self.loop.run_until_complete(self.loop.create_task(_cancel_remaining(self.loop), name="cancel-remaining"))
        finally:
            self.loop.close()
        self.check()


def simulate(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    seed: int = 0,
    **settings: Unpack[LoopSettings],
) -> T:
    """Run `main` in virtual time and return its result; the same seed gives the same run.

    Afterwards cancel the remaining tasks and close async generators, as ``asyncio.run`` does. An exception of `main` is
    raised; other errors are added to it as notes.

    Args:
        main: a coroutine, or a function that returns one.
        seed: seeds all randomness.
        **settings: settings of the `VirtualLoop`.

    Raises:
        LoopAlreadyRunning: this thread already runs an event loop.
        Deadlock: `main`, or a cancelled task after it, is not done, and nothing is left that could continue it.
        SimulationBoundExceeded: `main`, or the cancellation after it, exceeded `max_time` or `max_steps`.
        UnhandledErrors: `main` succeeded, but an error was not handled.
        InvalidSetting: a setting is out of range.
    """
    coro = main() if callable(main) else main
    try:
        _check_no_loop()
        simulation = Simulation(seed, **settings)
    except ForebayError:
        coro.close()
        raise
    with simulation:
        return simulation.run(coro)


def _check_no_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise LoopAlreadyRunning


async def _cancel_remaining(loop: VirtualLoop) -> None:
    cancelled = []
    for task in loop.pending():
        if task is asyncio.current_task():
            continue
        try:
            task.cancel()
        except RecursionError:  # tasks that await each other in a cycle pass a cancellation on without end
            loop.call_exception_handler({"message": "cannot be cancelled: it awaits a cycle of tasks", "task": task})
        else:
            cancelled.append(task)
    if cancelled:
        await asyncio.wait(cancelled)
    for task in cancelled:
        if not task.cancelled() and (error := task.exception()):
            loop.call_exception_handler(
                {"message": "failed when cancelled at the end", "exception": error, "task": task}
            )
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
