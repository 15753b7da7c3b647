"""The slot of a saga: its compensations may submit tasks to the worker that runs it, whose slots are all taken."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task, TaskStatus
from forebay.errors import SagaCompensated, StepFailed, WouldDeadlock
from forebay.saga import SagaRun, saga


class Bank:
    """A supervisor with one slot; the compensations of its sagas submit tasks to that slot's worker.

    Attributes:
        most: how many handlers were at work at once, those that await a task not counted.
        done: the payloads of the tasks that were done, in that order.
        errors: what the compensations raised.
    """

    def __init__(self) -> None:
        self.supervisor = BackpressureSupervisor(saga_log="memory://", lag_bound=None)
        self.at_work = self.most = 0
        self.done: list[Any] = []
        self.errors: list[Exception] = []
        self.supervisor.register_worker("bank", handler=self.transfer(), task_types=["transfer"], max_concurrent=1)

    async def work(self, payload: Any) -> None:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await asyncio.sleep(1.0)
        finally:
            self.at_work -= 1
        self.done.append(payload)

    async def fail(self) -> None:
        raise ValueError("closed")

    async def refund(self, _: object, *, key: str) -> None:
        try:
            await self.supervisor.run(Task("transfer", "refund", key=f"refund {key}"))
        except Exception as error:
            self.errors.append(error)
            raise

    def transfer(self) -> Any:
        @saga("transfer")
        async def function(run: SagaRun, payload: Any) -> None:
            match payload:
                case "undone at its end" | "cut off":
                    await run.step("pay", self.work, payload, compensate=self.refund)
                    if payload == "cut off":
                        await asyncio.sleep(100.0)
                    raise ValueError("closed")
                case "undone at once":
                    try:
                        await run.step("pay", self.fail, compensate=self.refund)
                    except StepFailed:
                        await run.step("pay elsewhere", self.work, payload)
                case _:
                    await run.step("pay", self.work, payload)

        return function


@virtual
async def test_a_compensation_at_the_end_of_a_saga_may_need_its_slot() -> None:
    bank = Bank()
    async with bank.supervisor, asyncio.timeout(60.0):
        result = await (await bank.supervisor.submit(Task("transfer", "undone at its end", key="s")))
    assert isinstance(result.cause, SagaCompensated)
    assert bank.done == ["undone at its end", "refund"]


@virtual
async def test_a_compensation_of_a_step_that_failed_may_need_the_slot_of_its_saga() -> None:
    bank = Bank()
    async with bank.supervisor, asyncio.timeout(60.0):
        assert (await (await bank.supervisor.submit(Task("transfer", "undone at once")))).success
    assert bank.done == ["refund", "undone at once"]


@virtual
async def test_a_saga_goes_on_once_it_has_its_slot_again() -> None:
    bank = Bank()
    async with bank.supervisor, asyncio.timeout(60.0):
        tickets = [await bank.supervisor.submit(Task("transfer", "undone at once"))]
        tickets += [await bank.supervisor.submit(Task("transfer", number)) for number in range(3)]
        assert all([(await ticket).success for ticket in tickets])
    assert bank.most == 1


@virtual
async def test_a_saga_that_is_undone_keeps_its_slot_unless_a_compensation_awaits_a_task() -> None:
    supervisor = BackpressureSupervisor(saga_log="memory://", lag_bound=None)
    begun = 0

    async def undo(_: object) -> None:
        await asyncio.sleep(100.0)

    @saga("slow to undo")
    async def function(run: SagaRun, _: object) -> None:
        nonlocal begun
        begun += 1
        await run.step("a", asyncio.sleep, 0.0, compensate=undo)
        raise ValueError

    supervisor.register_worker("worker", handler=function, task_types=["work"], max_concurrent=2)
    async with supervisor:
        for _ in range(5):
            await supervisor.submit(Task("work"))
        await asyncio.sleep(50.0)
        assert begun == 2


@virtual
async def test_who_waits_for_a_saga_that_is_undone_lends_its_slot_to_the_compensations() -> None:
    bank = Bank()
    async with bank.supervisor, asyncio.timeout(60.0):
        first = await bank.supervisor.submit(Task("transfer", "cut off", key="s", timeout=2.0))
        assert (await first).status is TaskStatus.TIMED_OUT
        second = await bank.supervisor.submit(Task("transfer", "again", key="s"))
        assert isinstance((await second).cause, SagaCompensated)
    assert bank.done == ["cut off", "refund"]


@virtual
async def test_a_compensation_that_would_wait_for_its_own_saga_fails() -> None:
    supervisor = BackpressureSupervisor(saga_log="memory://", lag_bound=None)
    errors = []

    async def undo(_: object) -> None:
        try:
            await supervisor.run(Task("work", key="s"))
        except WouldDeadlock as error:
            errors.append(error)

    @saga("deadlock")
    async def function(run: SagaRun, _: object) -> None:
        await run.step("a", asyncio.sleep, 0.0, compensate=undo)
        raise ValueError

    supervisor.register_worker("worker", handler=function, task_types=["work"])
    async with supervisor, asyncio.timeout(60.0):
        ticket = await supervisor.submit(Task("work", key="s"))
        assert isinstance((await ticket).cause, SagaCompensated)
    assert len(errors) == 1


@virtual
@pytest.mark.parametrize("payload", ["undone at its end", "undone at once"])
@pytest.mark.parametrize("seconds", [0.5, 1.5])
async def test_a_saga_whose_time_is_up_while_its_compensation_awaits_a_task_leaves_its_slot(
    payload: str, seconds: float
) -> None:
    bank = Bank()
    async with bank.supervisor, asyncio.timeout(60.0):
        first = await bank.supervisor.submit(Task("transfer", payload, timeout=seconds))
        others = [await bank.supervisor.submit(Task("transfer", number)) for number in range(2)]
        assert (await first).status is TaskStatus.TIMED_OUT
        assert all([(await ticket).success for ticket in others])
        await asyncio.sleep(5.0)
        assert "refund" in bank.done
        worker = bank.supervisor.workers["bank"]
        assert (worker.current_tasks, worker.suspended, worker.pending_claims) == (0, 0, 0)
    assert bank.most == 1
