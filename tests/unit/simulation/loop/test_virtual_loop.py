"""The virtual loop: its clock, its randomness, and the errors that it reports."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from forebay.errors import InvalidSetting
from forebay.simulation.loop import (
    Deadlock,
    JobStopped,
    LoopAlreadyRunning,
    RealIO,
    RealThread,
    SimulationBoundExceeded,
    UnhandledErrors,
    VirtualLoop,
    VirtualLoopRequired,
    simulate,
    virtual_loop,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

HERE = str(Path(__file__))
SEEDS = range(20)


def line_of(code: Callable[..., Any], mark: str) -> str:
    """Return `file:line` of the line of `code` that contains `mark`."""
    first = code.__code__.co_firstlineno
    for number, line in enumerate(Path(HERE).read_text().splitlines()[first - 1 :], first):
        if mark in line:
            return f"{HERE}:{number}"
    raise AssertionError(mark)


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(5)
def test_a_week_of_heartbeats_takes_seconds() -> None:
    async def main() -> float:
        for _ in range(7 * 24):
            await asyncio.sleep(3600)
        return virtual_loop().time()

    assert simulate(main, max_time=1e6) == pytest.approx(7 * 24 * 3600)


def test_time_stands_still_while_a_callback_is_ready() -> None:
    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return virtual_loop().time()

    assert simulate(main) == 0.0


def test_wall_time_is_the_epoch_and_the_time_since() -> None:
    async def main() -> float:
        await asyncio.sleep(5)
        return virtual_loop().wall_time()

    assert simulate(main, epoch=1000.0, jitter=0.0) == 1005.0


def test_the_loop_has_a_flag_that_it_is_virtual() -> None:
    assert VirtualLoop.virtual is True


def test_a_timer_is_late_by_less_than_the_jitter_and_never_early() -> None:
    async def main() -> list[float]:
        loop, late = virtual_loop(), []
        for n in range(500):
            asked = loop.time() + n / 7
            await asyncio.sleep(n / 7)
            late.append(loop.time() - asked)
        return late

    for seed in SEEDS:
        late = simulate(main, seed=seed, jitter=0.5)
        assert min(late) >= 0
        assert max(late) < 0.5


def test_without_jitter_a_timer_is_exact_however_late_it_is() -> None:
    async def main() -> float:
        await asyncio.sleep(2.0**40)  # at this time a nanosecond is below the precision of the clock
        await asyncio.sleep(0.25)
        return virtual_loop().time()

    assert simulate(main, jitter=0.0, max_time=2.0**41) == 2.0**40 + 0.25


def test_a_stall_makes_timers_late_and_keeps_their_order() -> None:
    async def main() -> None:
        loop = virtual_loop()
        fired: list[tuple[str, float]] = []

        def fire(name: str) -> None:
            fired.append((name, loop.time()))

        for name, after in (("late", 2.0), ("early", 1.0), ("after", 9.0)):
            loop.call_later(after, fire, name)
        loop.stall(5.0)
        assert (loop.time(), fired) == (5.0, [])
        await asyncio.sleep(10.0)
        assert fired == [("early", 5.0), ("late", 5.0), ("after", 9.0)]
        with pytest.raises(InvalidSetting, match="at least 0"):
            loop.stall(-1.0)

    simulate(main, jitter=0.0)


def test_a_timer_at_nan_is_refused() -> None:
    async def main() -> None:
        virtual_loop().call_later(float("nan"), int)

    with pytest.raises(InvalidSetting, match="when=nan"):
        simulate(main)


# --- randomness ------------------------------------------------------------------------------------------------------


async def surge() -> list[str]:  # noqa: C901 - a bit of everything
    """Use everything whose order could be random; return the events with their times."""
    loop, trace = virtual_loop(), []
    lock, queue = asyncio.Lock(), asyncio.Queue[int](3)

    def note(what: object) -> None:
        task = asyncio.current_task()
        trace.append(f"{loop.time():.9f} {task.get_name() if task else '-'} {what}")

    async def produce() -> None:
        for n in range(10):
            await queue.put(n)
            await asyncio.sleep(loop.random.random())

    async def consume() -> None:
        while True:
            n = await queue.get()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1), lock:
                    await asyncio.sleep(0.5)
                    note(await loop.run_in_executor(None, str, n))

    async def fail() -> None:
        await asyncio.sleep(8)
        note("fails")
        raise OSError

    async def noted() -> None:
        try:
            await consume()
        finally:
            note("stops")

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(noted())
            for _ in range(4):
                group.create_task(produce())
            group.create_task(fail())
    except* OSError:
        note("failed")
    waiters = {loop.create_future(): n for n in range(20)}
    sleepers = {loop.create_task(asyncio.sleep(1, n)) for n in range(20)}
    for waiter in set(waiters):
        waiter.add_done_callback(lambda done: note(f"woken {waiters[done]}"))
        loop.call_soon(waiter.set_result, None)
    for sleeper in (await asyncio.wait(sleepers))[0]:
        note(sleeper.result())
    return trace


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_seed_gives_the_same_run_again(seed: int) -> None:
    run = simulate(surge, seed=seed)
    assert len(run) >= 50
    assert simulate(surge, seed=seed) == run


def test_a_seed_gives_the_same_run_in_another_process_with_other_hashes() -> None:
    runs = {
        subprocess.run(
            [sys.executable, HERE, "3"],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hashes in ("1", "2")
    }
    assert runs == {"\n".join(simulate(surge, seed=3)) + "\n"}


def order_of_ties(seed: int) -> tuple[int, ...]:
    async def main() -> tuple[int, ...]:
        order: list[int] = []
        for n in range(5):
            virtual_loop().call_at(1.0, order.append, n)
        await asyncio.sleep(2)
        return tuple(order)

    return simulate(main, seed=seed)


def test_timers_due_together_fire_in_another_order_for_another_seed() -> None:
    assert len({order_of_ties(seed) for seed in SEEDS}) > 10


def test_callbacks_keep_their_order_whatever_the_seed() -> None:
    async def main() -> list[int]:
        order: list[int] = []
        for n in range(50):
            virtual_loop().call_soon(order.append, n)
        await asyncio.sleep(1)
        return order

    assert all(simulate(main, seed=seed) == list(range(50)) for seed in SEEDS)


def test_draws_of_a_model_do_not_depend_on_timers_and_jobs() -> None:
    async def main(timers: int) -> float:
        for _ in range(timers):
            await asyncio.sleep(1)
            await virtual_loop().run_in_executor(None, int)
        return virtual_loop().random.random()

    assert simulate(main(0), seed=7) == simulate(main(9), seed=7)


def test_a_task_group_cancels_tasks_in_order_of_creation() -> None:
    async def main() -> list[int]:
        stopped: list[int] = []

        async def work(n: int) -> None:
            try:
                await forever()
            finally:
                stopped.append(n)

        async def fail() -> None:
            await asyncio.sleep(1)
            raise OSError

        with contextlib.suppress(BaseExceptionGroup):
            async with asyncio.TaskGroup() as group:
                for n in range(30):
                    group.create_task(work(n))
                group.create_task(fail())
        return stopped

    assert simulate(main) == list(range(30))


def test_task_names_are_the_same_in_each_run() -> None:
    async def main() -> str:
        return asyncio.create_task(asyncio.sleep(0)).get_name()

    assert simulate(main) == simulate(main) == "task-2"


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_runs_inline_after_a_delay_drawn_from_the_seed() -> None:
    async def main() -> tuple[int, float]:
        thread = await virtual_loop().run_in_executor(None, threading.get_ident)
        return thread, virtual_loop().time()

    runs = [simulate(main, seed=seed, executor_delay=(1.0, 2.0)) for seed in SEEDS]
    assert {thread for thread, _ in runs} == {threading.get_ident()}
    assert all(1.0 <= took < 2.1 for _, took in runs)
    assert len({took for _, took in runs}) == len(SEEDS)


def test_a_job_sees_the_callers_context_only_if_it_is_copied() -> None:
    var = contextvars.ContextVar("var", default="empty")

    async def main() -> tuple[str, str]:
        var.set("carried")
        bare = await virtual_loop().run_in_executor(None, var.get)
        return bare, await asyncio.to_thread(var.get)  # noqa: TID251 - it is what is tested

    assert simulate(main) == ("empty", "carried")


@pytest.mark.parametrize("error", [OSError("disk"), GeneratorExit()])
def test_an_exception_of_a_job_is_raised_where_it_is_awaited(error: BaseException) -> None:
    def job() -> None:
        raise error

    async def main() -> BaseException | None:
        try:
            await virtual_loop().run_in_executor(None, job)
        except BaseException as raised:  # noqa: BLE001 - any
            return raised
        return None

    assert simulate(main) is error


@pytest.mark.parametrize("stop", [SystemExit(3), KeyboardInterrupt(), StopIteration()])
def test_a_job_cannot_stop_the_loop(stop: BaseException) -> None:
    def job() -> None:
        raise stop

    async def main() -> BaseException | None:
        with pytest.raises(JobStopped) as raised:
            await virtual_loop().run_in_executor(None, job)
        await asyncio.sleep(1)
        return raised.value.__cause__

    assert simulate(main) is stop


def test_a_cancelled_job_runs_for_some_seeds_and_not_for_others() -> None:
    async def main() -> int:
        done: list[None] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await virtual_loop().run_in_executor(None, done.append, None)
        assert not done
        await asyncio.sleep(1)
        return len(done)

    assert {simulate(main, seed=seed, executor_delay=(1.0, 1.0)) for seed in SEEDS} == {0, 1}


def test_jobs_running_at_the_end_are_awaited() -> None:
    done: list[float] = []

    async def main() -> None:
        loop = virtual_loop()
        loop.run_in_executor(None, lambda: done.append(loop.time()))

    simulate(main, executor_delay=(60.0, 90.0))
    assert len(done) == 1


# --- deadlocks and endless runs --------------------------------------------------------------------------------------


def test_a_deadlock_names_the_waiting_tasks_and_their_lines() -> None:
    async def consume(queue: asyncio.Queue[None]) -> None:
        await queue.get()  # nothing is put

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            await asyncio.sleep(3)
            group.create_task(consume(asyncio.Queue()), name="consumer")

    with pytest.raises(Deadlock, match=r"Deadlock at 3\.0000\d\d s .*seed 5") as raised:
        simulate(main, seed=5)
    assert [waits.task for waits in raised.value.waiting] == ["main", "consumer"]
    text = str(raised.value)
    assert f"consumer at {line_of(consume, 'nothing is put')} in " in text
    assert "queues.py:" in text
    assert f"main at {line_of(main, 'TaskGroup')} in " in text


def test_a_deadlock_shows_the_innermost_line_through_generators() -> None:
    async def stream() -> AsyncIterator[int]:
        yield 1
        await forever()  # mid-stream
        yield 2

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[None]:
        async for _ in stream():
            pass
        yield

    async def main() -> None:
        async with opened():
            pass

    with pytest.raises(Deadlock) as raised:
        simulate(main)
    assert f"main at {line_of(forever, 'create_future')} in forever" in str(raised.value)


def test_a_deadlock_of_tasks_that_wait_for_each_other_names_both() -> None:
    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []

        async def wait_for(other: int) -> None:
            await tasks[other]

        tasks.append(asyncio.create_task(wait_for(1), name="chicken"))
        tasks.append(asyncio.create_task(wait_for(0), name="egg"))
        await asyncio.gather(*tasks)

    async def chain() -> None:
        await asyncio.create_task(forever(), name="last")

    with pytest.raises(Deadlock, match=r"main at .* for last"):
        simulate(chain)
    with pytest.raises(Deadlock) as raised:
        simulate(main)
    assert {"chicken", "egg"} <= {waits.task for waits in raised.value.waiting}
    assert "for egg" in str(raised.value)
    assert "for chicken" in str(raised.value)


def test_a_deadlock_of_thousands_of_tasks_has_a_short_message() -> None:
    async def main() -> None:
        await asyncio.gather(*(forever() for _ in range(3000)))

    with pytest.raises(Deadlock, match=r"task-2, task-3, .* and 2980 more at ") as raised:
        simulate(main)
    assert len(raised.value.waiting) == 3001
    assert len(str(raised.value)) < 2000


def test_an_endless_sleep_is_a_deadlock() -> None:
    with pytest.raises(Deadlock, match="main at"):
        simulate(asyncio.sleep(float("inf")))


def test_an_endless_wait_with_a_heartbeat_exceeds_the_time_bound() -> None:
    async def main() -> None:
        async def beat() -> None:
            while True:  # noqa: ASYNC110 - a heart
                await asyncio.sleep(10)

        heart = asyncio.create_task(beat(), name="heart")
        await forever()
        heart.cancel()

    with pytest.raises(SimulationBoundExceeded, match=r"(?s)max_time=600 .* heart at ") as raised:
        simulate(main, max_time=600)
    assert [waits.task for waits in raised.value.waiting] == ["main", "heart"]
    assert raised.value.now <= 600


def test_after_a_bound_is_exceeded_clean_up_gets_a_new_bound() -> None:
    ended: list[float] = []

    async def main() -> None:
        try:
            while True:  # noqa: ASYNC110 - what has no end
                await asyncio.sleep(1)
        finally:
            await asyncio.sleep(50)
            ended.append(virtual_loop().time())

    with pytest.raises(SimulationBoundExceeded):
        simulate(main, max_time=60)
    assert ended == [pytest.approx(109, abs=1.1)]


def test_polling_without_waiting_exceeds_the_step_bound() -> None:
    async def main() -> None:
        while virtual_loop().time() < 1:  # noqa: ASYNC110 - the mistake
            await asyncio.sleep(0)  # polls

    with pytest.raises(SimulationBoundExceeded, match="max_steps=1000") as raised:
        simulate(main, max_steps=1000)
    assert raised.value.steps == 1001
    assert line_of(main, "polls") in str(raised.value)


def test_a_task_that_ignores_its_cancellation_is_named() -> None:
    async def main() -> None:
        async def stubborn() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
            await forever()

        asyncio.create_task(stubborn(), name="stubborn")  # noqa: RUF006 - left over on purpose
        await asyncio.sleep(1)

    with pytest.raises(Deadlock, match="stubborn at "):
        simulate(main)


def test_a_cycle_of_remaining_tasks_is_reported_although_it_cannot_be_cancelled() -> None:
    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []

        async def wait_for(other: int) -> None:
            await tasks[other]

        tasks.append(asyncio.create_task(wait_for(1), name="chicken"))
        tasks.append(asyncio.create_task(wait_for(0), name="egg"))
        await asyncio.sleep(1)

    with pytest.raises(UnhandledErrors, match=r"(?s)chicken: cannot be cancelled.*egg: cannot be cancelled"):
        simulate(main)


# --- unhandled errors ------------------------------------------------------------------------------------------------


async def fail() -> None:
    await asyncio.sleep(1)
    raise OSError("disk")


async def fail_unseen(keep: list[asyncio.Task[None]] | None = None) -> None:
    task = asyncio.create_task(fail(), name="careless")
    if keep is not None:
        keep.append(task)
    del task
    await asyncio.sleep(2)


def test_an_unretrieved_exception_is_raised_at_the_end() -> None:
    with pytest.raises(
        UnhandledErrors, match=r"careless: Task exception was never retrieved: OSError\('disk'\)"
    ) as raised:
        simulate(fail_unseen)
    assert raised.value.count == 1
    assert isinstance(raised.value.__cause__, OSError)


def test_an_unretrieved_exception_of_a_task_that_outlives_the_run_is_raised() -> None:
    kept: list[asyncio.Task[None]] = []
    with pytest.raises(UnhandledErrors, match="careless: "):
        simulate(fail_unseen(kept))


def test_garbage_collection_finds_an_unretrieved_exception_at_the_same_step() -> None:
    async def main() -> tuple[int, float]:
        loop = virtual_loop()

        async def knot() -> None:
            me = asyncio.current_task()  # noqa: F841 - task, error, traceback, frame: a ring
            await fail()

        asyncio.create_task(knot())  # noqa: RUF006 - lost on purpose
        while not loop.errors:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(1)
        loop.errors.clear()
        return loop.steps, loop.time()

    assert simulate(main) == simulate(main)


def test_a_failing_callback_is_raised_at_the_end() -> None:
    async def main() -> None:
        virtual_loop().call_later(1, [].pop)
        await asyncio.sleep(2)

    with pytest.raises(UnhandledErrors, match=r"at 1\.0000\d\d s: Exception in callback .*IndexError"):
        simulate(main)


def test_an_exception_during_the_clean_up_of_a_task_is_raised_at_the_end() -> None:
    async def main() -> None:
        async def clumsy() -> None:
            try:
                await forever()
            finally:
                raise OSError("clean-up")

        asyncio.create_task(clumsy(), name="clumsy")  # noqa: RUF006 - left over on purpose
        await asyncio.sleep(1)

    with pytest.raises(UnhandledErrors, match=r"clumsy: failed when cancelled at the end: OSError\('clean-up'\)"):
        simulate(main)


def test_an_expected_error_can_be_removed() -> None:
    async def main() -> str:
        await fail_unseen()
        return virtual_loop().errors.pop().task

    assert simulate(main) == "careless"


def test_an_exception_of_main_is_raised_with_other_errors_as_notes() -> None:
    async def main() -> None:
        await fail_unseen()
        raise LookupError

    with pytest.raises(LookupError) as raised:
        simulate(main)
    assert "careless: Task exception was never retrieved" in raised.value.__notes__[0]


# --- start and end of a simulation -----------------------------------------------------------------------------------


def test_a_simulation_returns_what_main_returns() -> None:
    async def main() -> int:
        return 42

    assert simulate(main) == simulate(main()) == 42


def test_system_exit_in_any_task_ends_the_simulation() -> None:
    async def leave() -> None:
        await asyncio.sleep(1)
        raise SystemExit(3)

    async def main() -> None:
        await asyncio.gather(leave(), forever())

    with pytest.raises(SystemExit):
        simulate(main)


def test_remaining_tasks_are_cancelled_in_order_and_generators_are_closed() -> None:
    ended: list[object] = []

    async def work(n: int) -> None:
        try:
            await forever()
        finally:
            ended.append(n)
            await asyncio.sleep(1)

    async def stream(n: int) -> AsyncIterator[int]:
        try:
            yield n
        finally:
            await asyncio.sleep(0)
            ended.append(f"stream {n}")

    streams = [stream(n) for n in range(20)]

    async def main() -> None:
        for n in range(20):
            asyncio.create_task(work(n))  # noqa: RUF006 - left over on purpose
            await anext(streams[n])

    simulate(main)
    assert ended == [*range(20), *(f"stream {n}" for n in range(20))]


def test_a_simulation_off_the_main_thread_leaves_signals_alone() -> None:
    results: list[float] = []
    before = signal.getsignal(signal.SIGINT)

    async def main() -> float:
        await asyncio.sleep(5)
        return virtual_loop().time()

    thread = threading.Thread(target=lambda: results.append(simulate(main)))
    thread.start()
    thread.join()
    assert results == [pytest.approx(5)]
    assert signal.getsignal(signal.SIGINT) is before


async def test_a_simulation_inside_a_running_loop_is_refused() -> None:
    with pytest.raises(LoopAlreadyRunning):
        simulate(forever)


def test_a_simulation_restores_the_garbage_collector() -> None:
    async def main() -> bool:
        return gc.isenabled()

    assert simulate(main) is False
    assert gc.isenabled()


def test_an_asyncio_runner_accepts_the_loop() -> None:
    async def main() -> float:
        await asyncio.sleep(100)
        return virtual_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == pytest.approx(100)
        assert runner.run(main()) == pytest.approx(200)


def test_the_features_of_asyncio_work() -> None:
    async def main() -> float:
        loop, order = virtual_loop(), []
        event, condition, slots = asyncio.Event(), asyncio.Condition(), asyncio.Semaphore(2)

        async def work(n: int) -> int:
            async with slots:
                await asyncio.sleep(1)
            async with condition:
                order.append(n)
                condition.notify_all()
            return n

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work(n)) for n in range(6)]
            async with condition:
                await condition.wait_for(lambda: len(order) == 6)
            event.set()
        await event.wait()
        assert sorted(order) == sorted([await task for task in asyncio.as_completed(tasks)]) == list(range(6))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.shield(forever())
        return loop.time()

    assert simulate(main) == pytest.approx(13, abs=1e-3)


# --- unsupported operations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "reach"),
    [
        ("create_connection", lambda: asyncio.open_connection("localhost", 80)),
        ("create_server", lambda: asyncio.start_server(lambda _r, _w: None, "localhost", 0)),
        ("getaddrinfo", lambda: virtual_loop().getaddrinfo("localhost", 80)),
        ("subprocess_exec", lambda: asyncio.create_subprocess_exec("true")),
        ("add_reader", lambda: virtual_loop().add_reader(0, print)),
        ("add_signal_handler", lambda: virtual_loop().add_signal_handler(signal.SIGTERM, print)),
    ],
)
def test_real_io_is_refused_with_advice(what: str, reach: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    async def main() -> None:
        await reach()

    with pytest.raises(RealIO, match=rf"loop\.{what}\(\) needs real input.*simulated.*provider"):
        simulate(main)


def test_call_soon_threadsafe_works_in_the_loops_own_thread() -> None:
    async def main() -> list[int]:
        called: list[int] = []
        virtual_loop().call_soon_threadsafe(called.append, 1)
        await asyncio.sleep(0)
        return called

    assert simulate(main) == [1]


def test_a_callback_from_a_real_thread_is_refused() -> None:
    refused: list[str] = []

    async def main() -> None:
        loop = virtual_loop()

        def call() -> None:
            with pytest.raises(RealThread, match="run_in_executor") as raised:
                loop.call_soon_threadsafe(int)
            refused.append(raised.value.thread)

        thread = threading.Thread(target=call, name="stranger")
        thread.start()
        thread.join()

    simulate(main)
    assert refused == ["stranger"]


async def test_virtual_loop_raises_under_a_real_loop() -> None:
    with pytest.raises(VirtualLoopRequired, match="simulate"):
        virtual_loop()


@pytest.mark.parametrize(
    "setting",
    [{"jitter": -1.0}, {"epoch": float("nan")}, {"executor_delay": (2.0, 1.0)}, {"max_time": 0.0}, {"max_steps": 0}],
)
def test_a_setting_out_of_range_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(setting))):
        simulate(forever, **setting)


if __name__ == "__main__":
    sys.stdout.write("\n".join(simulate(surge, seed=int(sys.argv[1]))) + "\n")
