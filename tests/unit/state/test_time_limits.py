"""Time limits with one timer for all."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.support.task_plane import now, virtual

from forebay.state.time_limits import TimeLimits


async def limited(limits: TimeLimits, seconds: float) -> float:
    """Sleep for so long; return the time at the end, and raise TimeoutError if the limit ends first."""
    loop = asyncio.get_running_loop()
    limit = limits.start(loop)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        if not limit.has_cancelled():
            raise
        raise TimeoutError(f"{now()}") from None
    finally:
        limits.stop(limit, loop)
    return now()


@virtual
async def test_each_ends_in_its_own_time() -> None:
    limits = TimeLimits(1.0)

    async def one(start: float, seconds: float) -> float | str:
        await asyncio.sleep(start)
        try:
            return await limited(limits, seconds)
        except TimeoutError as error:
            return str(error)

    found = await asyncio.gather(one(0.0, 0.5), one(0.2, 5.0), one(0.6, 0.9), one(0.7, 5.0), one(3.0, 5.0))
    assert [round(float(each), 3) for each in found] == [0.5, 1.2, 1.5, 1.7, 4.0]


@virtual
async def test_the_task_goes_on_after_its_limit() -> None:
    limits = TimeLimits(1.0)
    with pytest.raises(TimeoutError):
        await limited(limits, 5.0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert await limited(limits, 0.5) == pytest.approx(1.5)


@virtual
async def test_a_cancellation_from_outside_is_one() -> None:
    limits = TimeLimits(1.0)
    task = asyncio.ensure_future(limited(limits, 5.0))
    asyncio.get_running_loop().call_later(0.5, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_answer_that_came_while_the_loop_was_blocked_is_in_time() -> None:
    """A real loop: virtual time does not pass while it is blocked."""
    limits, loop = TimeLimits(0.2), asyncio.get_running_loop()

    async def ask() -> str:
        limit = limits.start(loop)
        try:
            return await loop.run_in_executor(None, lambda: "answer")
        except asyncio.CancelledError:
            return "cancelled" if limit.has_cancelled() else "by another"
        finally:
            limits.stop(limit, loop)

    calls = [asyncio.ensure_future(ask()) for _ in range(3)]
    loop.call_soon(block, 0.6)
    assert await asyncio.gather(*calls) == ["answer"] * 3


async def test_a_blocked_loop_puts_a_limit_off_once() -> None:
    limits, loop = TimeLimits(0.1), asyncio.get_running_loop()
    started = loop.time()
    blocking = asyncio.ensure_future(block_often())
    with pytest.raises(TimeoutError):
        await limited(limits, 20.0)
    blocking.cancel()
    assert loop.time() - started < 10.0


async def block_often() -> None:
    while True:
        block(0.3)
        await asyncio.sleep(0.0)


def block(seconds: float) -> None:
    """Block the event loop for so long, as a handler that computes does."""
    threading.Event().wait(seconds)
