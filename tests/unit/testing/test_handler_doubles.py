"""Handler doubles, in virtual time and in real time."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from forebay import Task, TaskFailed, TaskResult, TaskStatus
from forebay.errors import InvalidSetting
from forebay.events import TaskProgress
from forebay.testing import (
    BlockingHandler,
    FlakyHandler,
    HandlerDouble,
    HangingHandler,
    HeldHandler,
    PassthroughSupervisor,
    ProgressHandler,
    ScriptedHandler,
    ScriptExhausted,
    SlowHandler,
    UncancellableHandler,
    now,
    run_ready,
    virtual,
)


def started_supervisor(handler: Any, slots: int = 10, **options: Any) -> PassthroughSupervisor:
    supervisor = PassthroughSupervisor(zombie_grace=0.5)
    supervisor.register_worker("w", handler=handler, task_types=["work"], max_concurrent=slots, **options)
    return supervisor


async def ran(handler: Any, count: int = 1, **options: Any) -> list[TaskResult]:
    """Run `count` tasks at once, with the payloads 0, 1, ..., and return their results."""
    async with started_supervisor(handler, **options) as supervisor:
        return [await ticket for ticket in [await supervisor.submit(Task("work", n)) for n in range(count)]]


def values(results: list[TaskResult]) -> list[Any]:
    return [result.result if result.success else result.error for result in results]


@virtual
async def test_slow_handler_returns_the_payload_after_its_duration() -> None:
    slow = SlowHandler(2.0)
    assert values(await ran(slow, 3, slots=2)) == [0, 1, 2]
    assert now() == pytest.approx(4.0, abs=1e-3)
    assert (slow.started, sorted(slow.finished), slow.running, slow.peak, slow.cancelled) == (
        [0, 1, 2],
        [0, 1, 2],
        0,
        2,
        0,
    )
    assert [task.payload for task in slow.calls] == slow.started


@virtual
async def test_result_and_error_can_be_set_and_changed() -> None:
    slow = SlowHandler(0.1, result=None)
    assert values(await ran(slow)) == [None]
    slow.error = KeyError
    assert values(await ran(slow)) == ["KeyError"]
    slow.error = ValueError("no such river")
    assert values(await ran(slow)) == ["ValueError: no such river"]


@virtual
async def test_flaky_handler_fails_in_its_first_runs() -> None:
    flaky = FlakyHandler(2, error=OSError("down"))
    assert values(await ran(flaky, 4)) == ["OSError: down", "OSError: down", 2, 3]
    assert values(await ran(FlakyHandler(), 2)) == ["RuntimeError: the failure that the test asked for", 1]


@virtual
async def test_flaky_handler_fails_in_a_share_drawn_from_its_seed() -> None:
    runs = [[result.success for result in await ran(FlakyHandler(chance=0.3, seed=seed), 100)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert 15 < runs[0].count(False) < 45
    assert not any(result.success for result in await ran(FlakyHandler(chance=1.0), 4))


@pytest.mark.parametrize("options", [{"failures": 1, "chance": 0.5}, {"chance": 1.5}, {"chance": -0.1}])
def test_a_chance_is_a_probability_and_excludes_failures(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match="a probability from 0 to 1, and given without a number of failures"):
        FlakyHandler(**options)


@virtual
async def test_scripted_handler_returns_one_line_per_run() -> None:
    scripted = ScriptedHandler(["notes", ValueError("torn"), TimeoutError, None], seconds=1.0)
    results = values(await ran(scripted, 5, slots=2))
    assert results[:4] == ["notes", "ValueError: torn", "TimeoutError", None]
    assert "ScriptExhausted: The script has 4 lines, and task" in results[4]


@virtual
async def test_a_script_that_is_too_short_raises_script_exhausted() -> None:
    async with started_supervisor(ScriptedHandler([])) as supervisor:
        with pytest.raises(TaskFailed) as failed:
            await supervisor.run(Task("work"))
    assert isinstance(failed.value.__cause__, ScriptExhausted)


@virtual
async def test_progress_handler_reports_its_values() -> None:
    supervisor = started_supervisor(ProgressHandler(["a", "b"], seconds=1.0, result="c"))
    async with supervisor:
        assert await supervisor.run(Task("work")) == "c"
    assert [(event.value, round(event.at)) for event in supervisor.record.of_type(TaskProgress)] == [("a", 1), ("b", 2)]


@virtual
async def test_held_handler_releases_runs_in_order_of_their_start() -> None:
    held = HeldHandler()
    async with started_supervisor(held, slots=3) as supervisor:
        tickets = [await supervisor.submit(Task("work", n)) for n in range(5)]
        await held.wait_for_calls(3)
        held.release(1)
        assert (await tickets[0]).result == 0
        await held.wait_for_calls(4)
        await run_ready()
        assert [ticket.status for ticket in tickets[1:]] == [TaskStatus.RUNNING] * 3 + [TaskStatus.WAITING]
        held.error = ValueError("late")
        held.release()
        assert values([await ticket for ticket in tickets[1:]]) == ["ValueError: late"] * 4


@virtual
async def test_wait_for_calls_returns_at_once_for_past_calls() -> None:
    slow = SlowHandler(0.1)
    await ran(slow, 2)
    await slow.wait_for_calls(2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await slow.wait_for_calls(3)


@virtual
async def test_hanging_handler_ends_when_cancelled() -> None:
    hangs = HangingHandler()
    assert [result.status for result in await ran(hangs, timeout=5.0)] == [TaskStatus.TIMED_OUT]
    assert now() == pytest.approx(5.0, abs=1e-3)
    assert (hangs.cancelled, hangs.running) == (1, 0)


@virtual
async def test_uncancellable_handler_becomes_a_zombie_and_ends_after_its_duration() -> None:
    stubborn = UncancellableHandler(10.0)
    async with started_supervisor(stubborn, timeout=1.0) as supervisor:
        assert (await (await supervisor.submit(Task("work")))).status is TaskStatus.TIMED_OUT
        await asyncio.sleep(1.0)
        assert supervisor.statistics().zombies == 1
        assert stubborn.running == 1
        await asyncio.sleep(10.0)
    assert (stubborn.cancelled, stubborn.running, stubborn.finished) == (1, 0, [None])


@virtual
async def test_blocking_handler_ignores_cancellation_in_virtual_time() -> None:
    blocking = BlockingHandler(10.0, result="done")
    async with started_supervisor(blocking, timeout=1.0) as supervisor:
        assert (await (await supervisor.submit(Task("work")))).status is TaskStatus.TIMED_OUT
        await asyncio.sleep(5.0)
        assert supervisor.workers["w"].zombies == 1
        await asyncio.sleep(5.0)
        assert supervisor.workers["w"].zombies == 0
        ticket = await supervisor.submit(Task("work", timeout=60.0))
        await blocking.wait_for_calls(2)
        began = now()
        blocking.release()
        assert await ticket.value() == "done"
        assert now() == began
        assert await supervisor.run(Task("work", timeout=1.0)) == "done"


class Own(HandlerDouble):
    async def run(self, task: Task) -> Any:
        return task.payload + 1


@virtual
async def test_a_subclass_of_handler_double_defines_the_run() -> None:
    own = Own()
    assert values(await ran(own, 2)) == [1, 2]
    assert own.started == [0, 1]
    assert values(await ran(HandlerDouble(), 2)) == [0, 1]


# --- real time --------------------------------------------------------------------------------------------------------


async def test_handlers_work_in_real_time() -> None:
    held, flaky, scripted, slow = HeldHandler(), FlakyHandler(), ScriptedHandler([1]), SlowHandler(0.01)
    assert values(await ran(flaky, 2)) == ["RuntimeError: the failure that the test asked for", 1]
    assert values(await ran(scripted)) == [1]
    assert values(await ran(slow)) == [0]
    assert [result.status for result in await ran(HangingHandler(), timeout=0.02)] == [TaskStatus.TIMED_OUT]
    assert [result.status for result in await ran(UncancellableHandler(0.1), timeout=0.02)] == [TaskStatus.TIMED_OUT]
    async with started_supervisor(held) as supervisor:
        ticket = await supervisor.submit(Task("work", 7))
        await held.wait_for_calls()
        held.release()
        assert await ticket.value() == 7


async def test_blocking_handler_blocks_a_thread_until_released() -> None:
    blocking = BlockingHandler(60.0)
    threads = set()

    def block(task: Task) -> Any:
        threads.add(threading.current_thread())
        return blocking(task)

    async with started_supervisor(block) as supervisor:
        tickets = [await supervisor.submit(Task("work", n)) for n in range(2)]
        async with asyncio.timeout(30.0):
            await blocking.wait_for_calls(2)
        assert blocking.peak == blocking.running == 2
        blocking.release()
        assert sorted(values([await ticket for ticket in tickets])) == [0, 1]
    assert threading.main_thread() not in threads
    assert blocking.running == 0
