"""Time limits with one timer for all."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.task_plane import now, virtual

from forebay.state.time_limits import TimeLimits


async def limited(limits: TimeLimits, seconds: float) -> float:
    """Sleep for so long; return the time at the end, and raise TimeoutError if the limit ends first."""
    limit = limits.start()
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        if not limit.has_cancelled():
            raise
        raise TimeoutError(f"{now()}") from None
    finally:
        limit.stop()
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
