"""From the first step of a simulation to its clean end."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar

from forebay.errors import ForebayError
from forebay.sim.errors import AlreadyRunning, SimulationError, Unhandled
from forebay.sim.loop import VirtualLoop
from forebay.sim.order import collecting_by_hand

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Unpack

T = TypeVar("T")

_LONG: Final = 100_000  # steps after which garbage of the run may have grown old


class Settings(TypedDict, total=False):
    """What `VirtualLoop` takes beside the seed."""

    jitter: float
    epoch: float
    executor_delay: tuple[float, float]
    max_time: float
    max_steps: int


def simulate(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    seed: int = 0,
    **settings: Unpack[Settings],
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
        loop = VirtualLoop(seed, **settings)
    except ForebayError:
        coro.close()
        raise
    with collecting_by_hand():
        try:
            result = _run(loop, coro)
        except BaseException as failure:
            trouble = _end(loop)
            if trouble is not None:
                failure.add_note(f"And at the end of the simulation: {trouble}")
            raise
        trouble = _end(loop)
        if trouble is not None:
            raise trouble
        return result


def _check_no_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise AlreadyRunning


def _run(loop: VirtualLoop, coro: Coroutine[Any, Any, T]) -> T:
    task = loop.create_task(coro, name="main")
    try:
        return loop.run_until_complete(task)
    finally:
        if task.done() and not task.cancelled():
            task.exception()  # seen: one that stops the loop (SystemExit) comes out by itself


def _end(loop: VirtualLoop) -> SimulationError | None:
    """End what is left, close the loop, and return what is wrong."""
    try:
        loop.run_until_complete(loop.create_task(_wind_up(loop), name="wind-up"))
    except SimulationError as trouble:
        return trouble
    finally:
        loop.close()
    gc.collect(1 if loop.steps < _LONG else 2)  # what is lost reports when it is collected
    loop.report_unseen()
    if not loop.errors:
        return None
    lost = tuple(loop.errors)
    unhandled = Unhandled(seed=loop.seed, count=len(lost), lost=lost, listing="".join(f"\n  {error}" for error in lost))
    unhandled.__cause__ = next((error.exception for error in lost if error.exception), None)
    return unhandled


async def _wind_up(loop: VirtualLoop) -> None:
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
