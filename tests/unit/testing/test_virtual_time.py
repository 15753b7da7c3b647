"""Virtual time without a pytest plugin."""

from __future__ import annotations

import asyncio
import unittest

import pytest

from forebay.simulation.loop import Deadlock, Simulation, UnhandledErrors, virtual_loop
from forebay.testing import now, run_ready, virtual


def test_a_coroutine_function_becomes_a_plain_one() -> None:
    @virtual
    async def hours(count: int) -> float:
        """Documented."""
        await asyncio.sleep(3600.0 * count)
        return now()

    assert hours(3) == pytest.approx(10_800.0, abs=1e-3)
    assert (hours.__name__, hours.__doc__) == ("hours", "Documented.")


def test_settings_are_those_of_a_simulation() -> None:
    @virtual(seed=3, jitter=0.0)
    async def exact() -> tuple[int, float]:
        await asyncio.sleep(1.0)
        return virtual_loop().seed, now()

    assert exact() == (3, 1.0)


def test_a_deadlock_is_an_error() -> None:
    @virtual
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        wait()


def test_unittest_runs_a_virtual_test() -> None:
    class Case(unittest.TestCase):
        @virtual
        async def test_hours(self) -> None:
            await asyncio.sleep(3600.0)
            assert now() > 3599.0

    result = unittest.TestResult()
    Case("test_hours").run(result)
    assert (result.testsRun, result.errors, result.failures) == (1, [], [])


@virtual
async def test_run_ready_passes_no_time() -> None:
    seen = []
    task = asyncio.create_task(asyncio.sleep(0, "done"))
    task.add_done_callback(lambda task: seen.append(task.result()))
    await run_ready()
    assert seen == ["done"]
    assert now() == 0.0


# --- one loop for several coroutines ----------------------------------------------------------------------------------


def test_time_and_tasks_continue_from_one_run_to_the_next() -> None:
    done = []

    async def later() -> None:
        await asyncio.sleep(5.0)
        done.append(now())

    async def first() -> asyncio.Task[None]:
        await asyncio.sleep(1.0)
        return asyncio.create_task(later())

    with Simulation(seed=2, jitter=0.0) as simulation:
        task = simulation.run(first)
        assert (simulation.now, simulation.seed, done) == (1.0, 2, [])
        simulation.run(asyncio.sleep(10.0))
        assert (simulation.now, done, task.done()) == (11.0, [6.0], True)


def test_exit_cancels_remaining_tasks() -> None:
    ended = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.append(now())

    with Simulation(jitter=0.0) as simulation:

        async def start() -> None:
            asyncio.create_task(forever())  # noqa: RUF006 - the loop's own now
            await asyncio.sleep(1.0)

        simulation.run(start)
    assert ended == [1.0]
    assert simulation.loop.is_closed()


async def _lose() -> None:
    asyncio.get_running_loop().call_soon(int, "no number")
    await asyncio.sleep(1.0)


def test_check_raises_unhandled_errors_once() -> None:
    with Simulation() as simulation:
        simulation.run(_lose)
        with pytest.raises(UnhandledErrors, match="no number"):
            simulation.check()
        simulation.check()


def test_exit_raises_unhandled_errors_or_adds_them_as_notes() -> None:
    with pytest.raises(UnhandledErrors, match="no number"), Simulation() as simulation:
        simulation.run(_lose)
    with pytest.raises(KeyError) as raised, Simulation() as simulation:  # noqa: PT012 - both are the point
        simulation.run(_lose)
        raise KeyError
    assert "no number" in raised.value.__notes__[0]
