"""A worker process on a machine that may be removed: no task begins while the machine is not protected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.simulated_machine import SimulatedMachine

from forebay import BackpressureSupervisor, Task
from forebay.errors import ScalingFailed
from forebay.supervisor.worker_protection import WorkerProtection
from forebay.testing import virtual

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

IDLE = 30.0


class Worker:
    """A worker process, its machine, and another process that stores tasks for it."""

    def __init__(self, folder: Path, machine: SimulatedMachine) -> None:
        self.machine = machine
        self.unprotected_runs: list[Any] = []  # tasks that have run while the machine was not protected
        self.runs = 0
        overflow = f"sqlite:///{folder}/spill.db?fsync=no"
        self.supervisor = BackpressureSupervisor(overflow=overflow)
        self.supervisor.register_worker("worker", handler=self._work, task_types=["work"], max_concurrent=2)
        self.protection = WorkerProtection(self.supervisor, machine, idle=IDLE)
        self.told_to_go = asyncio.Event()
        self._submitter = BackpressureSupervisor(overflow=overflow, max_queue_size=0)
        self._submitter.register_worker("elsewhere", handler=self._work, task_types=["work", "other"])

    async def _work(self, task: Task) -> None:
        self.runs += 1
        end = asyncio.get_running_loop().time() + task.payload
        while (left := end - asyncio.get_running_loop().time()) > 0:
            if not self.machine.protected:
                self.unprotected_runs.append(task)
            await asyncio.sleep(min(0.25, left))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the process, as `run_worker` does."""
        async with self._submitter:
            self._submitter.pause("work")
            self._submitter.pause("other")
            assert await self.protection.open()
            async with self.supervisor:
                guarding = asyncio.ensure_future(self.protection.run(self.told_to_go.set))
                try:
                    yield
                finally:
                    guarding.cancel()
                    await asyncio.wait((guarding,))
            await self.protection.close()

    async def store(self, seconds: float, task_type: str = "work") -> Any:
        """Store a task that runs for some seconds."""
        return await self._submitter.submit(Task(task_type, seconds))


@pytest.fixture
def make_worker(tmp_path: Path) -> Callable[[], Worker]:
    return lambda: Worker(tmp_path, SimulatedMachine())


def test_it_is_protected_before_the_first_task_and_not_after_the_last(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            assert worker.machine.log == ["open", "protect"]
            assert (await (await worker.store(1.0))).success
        assert worker.machine.log == ["open", "protect", "unprotect", "close"]
        assert not worker.unprotected_runs

    run()


def test_the_protection_goes_off_when_idle_and_on_before_a_task(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        worker.machine.seconds = 0.7
        async with worker.running():
            for _ in range(3):
                await asyncio.sleep(IDLE + 5.0)
                assert not worker.machine.protected
                assert (await (await worker.store(2.0))).success
                assert worker.machine.protected
        assert not worker.unprotected_runs
        assert worker.runs == 3

    run()


def test_short_pauses_cost_no_call(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            for _ in range(20):
                assert (await (await worker.store(0.1))).success
                await asyncio.sleep(IDLE * 0.8)
            assert worker.machine.log == ["open", "protect"]

    run()


def test_a_long_task_keeps_the_protection(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            assert (await (await worker.store(8 * IDLE))).success
            assert worker.machine.log == ["open", "protect"]

    run()


def test_tasks_that_wait_for_a_quota_keep_the_protection(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            for each in worker.supervisor.workers.values():
                each.resize(1)
            first, second = await worker.store(3 * IDLE), await worker.store(1.0)
            await first
            await second
            assert worker.machine.log == ["open", "protect"]

    run()


def test_a_task_that_comes_while_the_protection_goes_off_waits_for_it(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        stored: list[asyncio.Task[Any]] = []
        worker.machine.seconds = 3.0
        worker.machine.before_unprotect = lambda: stored.append(asyncio.ensure_future(worker.store(5.0)))
        async with worker.running():
            await asyncio.sleep(IDLE + 3.0)
            assert (await (await stored[0])).success
            assert not worker.unprotected_runs

    run()


@pytest.mark.parametrize("late", [0, 1])
def test_no_task_begins_until_a_call_that_failed_has_succeeded(make_worker: Callable[[], Worker], late: int) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            worker.machine.faults, worker.machine.late = 1, late  # of `unprotect`: on or off, who knows
            await asyncio.sleep(IDLE + 1.5)
            ticket = await worker.store(2.0)
            worker.machine.faults, worker.machine.late = 3 + late, late
            await asyncio.sleep(1.0)
            assert worker.runs == 0
            assert (await ticket).success
            assert not worker.unprotected_runs

    run()


def test_a_protection_that_could_not_be_taken_off_is_taken_off_later(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            worker.machine.faults = 2
            await asyncio.sleep(IDLE + 1.5)
            assert worker.machine.protected
            await asyncio.sleep(10.0)
            assert not worker.machine.protected

    run()


def test_a_machine_that_is_to_go_is_drained_and_then_completes(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            ticket = await worker.store(10.0)
            await asyncio.sleep(2.0)
            worker.machine.leaving = True
            await worker.told_to_go.wait()
            await asyncio.sleep(0)
            assert worker.machine.kept_waiting
            worker.protection.drain()
            await worker.supervisor.drain()
            assert (await ticket).success
        assert worker.machine.log == ["open", "protect", "complete", "close"]

    run()


def test_a_machine_that_is_chosen_while_idle_runs_no_task(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            await asyncio.sleep(IDLE + 2.0)

            async def not_yet() -> bool:
                return False

            worker.machine.leaving, worker.machine.is_leaving = True, not_yet  # type: ignore[method-assign]
            await worker.store(1.0)
            await worker.told_to_go.wait()
            assert worker.runs == 0

    run()


def test_a_machine_that_is_leaving_when_it_starts_takes_nothing(tmp_path: Path) -> None:
    @virtual
    async def run() -> None:
        machine = SimulatedMachine()
        machine.leaving = True
        protection = Worker(tmp_path, machine).protection
        assert not await protection.open()
        await protection.close()
        assert machine.log == ["open", "protect", "complete", "close"]

    run()


def test_trouble_at_the_start_is_outlived(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        worker.machine.faults, worker.machine.late = 5, 2
        async with worker.running():
            assert (await (await worker.store(1.0))).success
        assert not worker.unprotected_runs

    run()


def test_a_machine_that_may_have_been_protected_is_unprotected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @virtual
    async def run() -> None:
        machine = SimulatedMachine()
        machine.faults = machine.late = 8
        protection = Worker(tmp_path, machine).protection
        with pytest.raises(ScalingFailed, match="the test says so, later"):
            await protection.open()
        await protection.close()
        assert not machine.protected

    run()
    assert len(caplog.records) == 7  # attempts before the last


@pytest.mark.parametrize(("faults", "starts"), [(7, True), (8, False)])
def test_a_state_that_cannot_be_read_at_the_start_is_asked_for_again(
    tmp_path: Path, faults: int, *, starts: bool
) -> None:
    @virtual
    async def run() -> None:
        machine = SimulatedMachine()
        machine.faults_at_start = faults
        protection = Worker(tmp_path, machine).protection
        if starts:
            assert await protection.open()
        else:
            with pytest.raises(ScalingFailed, match="at the start"):
                await protection.open()
        assert machine.protected == starts
        assert machine.log.count("open") == 1
        await protection.close()

    run()


def test_a_last_call_that_fails_is_logged(make_worker: Callable[[], Worker], caplog: pytest.LogCaptureFixture) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            worker.machine.faults = 1
        assert worker.machine.log[-1] == "close"

    run()
    assert "machine may stay protected though its worker has ended" in caplog.text


def test_types_that_someone_else_has_paused_stay_paused(make_worker: Callable[[], Worker]) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        worker.supervisor.register_worker("second", handler=worker._work, task_types=["other"])
        async with worker.running():
            worker.supervisor.pause("other")
            await worker.store(1.0, "other")
            await asyncio.sleep(IDLE + 2.0)
            assert not worker.machine.protected  # what waits for a paused type is no reason
            assert (await (await worker.store(1.0))).success
            assert worker.supervisor.statistics().paused == ("other",)

    run()


def test_a_worker_that_is_added_while_idle_takes_no_task_before_the_protection(
    make_worker: Callable[[], Worker],
) -> None:
    @virtual
    async def run() -> None:
        worker = make_worker()
        async with worker.running():
            await asyncio.sleep(IDLE + 2.0)
            worker.supervisor.register_worker("second", handler=worker._work, task_types=["other"])
            await asyncio.sleep(2.0)
            assert (await (await worker.store(1.0, "other"))).success
            assert not worker.unprotected_runs

    run()
