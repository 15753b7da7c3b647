"""From the first step of a simulation to its clean end."""

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

_LONG: Final = 100_000  # steps after which garbage of the run may have grown old


class LoopSettings(TypedDict, total=False):
    """What `VirtualLoop` takes beside the seed."""

    jitter: float
    epoch: float
    executor_delay: tuple[float, float]
    max_time: float
    max_steps: int


class Simulation:
    """A virtual loop and what is run on it, one coroutine after the other, to a clean end: `asyncio.Runner` for it.

    A context manager. Leaving it cancels, as ``asyncio.run`` does, the tasks left over, and closes what is open. The
    same seed gives the same run.

    Args:
        seed: what all chance is drawn from.
        **settings: of the `VirtualLoop`.

    Raises:
        InvalidSetting: a setting is out of its bounds.
        Deadlock, Endless: on leaving, a cancelled task did not end.
        Unhandled: on leaving, an error reached nobody.
    """

    def __init__(self, seed: int = 0, **settings: Unpack[LoopSettings]) -> None:
        self.loop = VirtualLoop(seed, **settings)
        self._manual_gc = manual_gc()

    @property
    def seed(self) -> int:
        """What all chance is drawn from."""
        return self.loop.seed

    @property
    def now(self) -> float:
        """Virtual seconds since it began."""
        return self.loop.time()

    def run(self, main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, or what makes one, to its end. What it leaves running goes on with the next one.

        Raises:
            AlreadyRunning: this thread runs a loop already.
            Deadlock: nothing was left to do, and it was not done.
            Endless: it passed `max_time` or `max_steps`.
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
                task.exception()  # seen: one that stops the loop (SystemExit) comes out by itself

    def check(self) -> None:
        """Pass if every error so far has reached somebody; those that did not are told once.

        Raises:
            Unhandled: some did not.
        """
        gc.collect(1 if self.loop.steps < _LONG else 2)  # what is lost reports when it is collected
        self.loop.report_unretrieved()
        if self.loop.errors:
            lost = tuple(self.loop.errors)
            self.loop.errors.clear()
            listing = "".join(f"\n  {error}" for error in lost)
            cause = next((error.exception for error in lost if error.exception), None)
            raise UnhandledErrors(seed=self.seed, count=len(lost), lost=lost, listing=listing) from cause

    def __enter__(self) -> Self:
        self._manual_gc.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end()
        except SimulationError as trouble:
            if failure is None:
                raise
            failure.add_note(f"And at the end of the simulation: {trouble}")
        finally:
            self._manual_gc.__exit__(None, None, None)

    def _end(self) -> None:
        try:
            self.loop.run_until_complete(self.loop.create_task(_cancel_remaining(self.loop), name="wind-up"))
        finally:
            self.loop.close()
        self.check()


def simulate(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    seed: int = 0,
    **settings: Unpack[LoopSettings],
) -> T:
    """Run `main` in virtual time to its end and return its result; the same seed gives the same run.

    Then, as ``asyncio.run`` does, cancel the tasks left over and close what is open. What `main` raises is raised; what
    else went wrong is noted on it.

    Args:
        main: a coroutine, or what makes one.
        seed: what all chance is drawn from.
        **settings: of the `VirtualLoop`.

    Raises:
        AlreadyRunning: this thread runs a loop already.
        Deadlock: nothing was left to do, and `main`, or a cancelled task after it, was not done.
        Endless: `main`, or the end after it, passed `max_time` or `max_steps`.
        Unhandled: `main` ended well, but an error reached nobody.
        InvalidSetting: a setting is out of its bounds.
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
    rest = []
    for task in loop.pending():
        if task is asyncio.current_task():
            continue
        try:
            task.cancel()
        except RecursionError:  # tasks that wait for each other in a ring hand a cancellation round and round
            loop.call_exception_handler({"message": "cannot be cancelled: it waits for a ring of tasks", "task": task})
        else:
            rest.append(task)
    if rest:
        await asyncio.wait(rest)
    for task in rest:
        if not task.cancelled() and (error := task.exception()):
            loop.call_exception_handler(
                {"message": "failed when cancelled at the end", "exception": error, "task": task}
            )
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
