"""The breaker of a worker that runs sagas: how a saga ends is no fault of its worker."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task, WorkerState
from forebay.errors import ForebayError, SagaCompensated, SagaParked, SagaTaken, StoreUnavailable
from forebay.overflow import encode_task
from forebay.saga import MemorySagaLog, SagaRun, SagaState, saga
from forebay.saga.records import SagaHeader, StoredSaga

MANY = 30


class LogThatLosesSagas(MemorySagaLog):
    """A log that takes no entry: each saga is taken by another process, or the log is away."""

    error = StoreUnavailable(where="the log", why="it is away", advice="")

    def __init__(self, *, is_away: bool) -> None:
        super().__init__()
        self.is_away = is_away

    async def append(self, *_: object, **__: object) -> bool:
        if self.is_away:
            raise self.error
        return False

    async def claim(self, *_: object, **__: object) -> Sequence[StoredSaga]:
        return ()

    async def renew(self, holders: Mapping[str, str], **_: object) -> Sequence[str]:
        if self.is_away:
            raise self.error
        return list(holders)


@saga("pay")
async def pay(run: SagaRun, how: str | None) -> None:
    async def decline() -> None:
        raise ValueError("card declined")

    await run.step("reserve", asyncio.sleep, 0.0, compensate=lambda _: None)
    if how == "declined":
        await run.step("pay", decline, pivot=True)
    elif how == "broken later":
        await run.step("pay", asyncio.sleep, 0.0, pivot=True)
        await run.step("tell", decline)


async def causes(supervisor: BackpressureSupervisor, how: str | None) -> set[type[BaseException | None]]:
    """Submit many sagas one after the other, and return what they failed with."""
    tickets = [await supervisor.submit(Task("pay", how, key=f"{how} {number}")) for number in range(MANY)]
    return {type((await ticket).cause) for ticket in tickets}


def supervisor_of(log: MemorySagaLog) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None, lease=1.0)
    supervisor.register_worker("worker", handler=pay, task_types=["pay"])
    return supervisor


@virtual
@pytest.mark.parametrize(("how", "cause"), [("declined", SagaCompensated), ("broken later", SagaParked)])
async def test_sagas_that_fail_leave_their_worker_to_others(how: str, cause: type[ForebayError]) -> None:
    async with supervisor_of(MemorySagaLog()) as supervisor:
        assert await causes(supervisor, how) == {cause}
        assert supervisor.workers["worker"].state is not WorkerState.FAILED
        assert (await (await supervisor.submit(Task("pay", None)))).success


@virtual
@pytest.mark.parametrize("cause", [StoreUnavailable, SagaTaken])
async def test_a_log_that_loses_sagas_is_no_fault_of_their_worker(cause: type[ForebayError]) -> None:
    async with supervisor_of(LogThatLosesSagas(is_away=cause is StoreUnavailable)) as supervisor:
        assert await causes(supervisor, None) == {cause}
        assert supervisor.workers["worker"].state is not WorkerState.FAILED
        await asyncio.sleep(2.0)


@virtual
async def test_sagas_that_are_left_and_undone_do_not_wait_for_their_worker() -> None:
    log = MemorySagaLog()
    for number in range(MANY):
        envelope = encode_task(Task("pay", None, key=f"{number}"), "declined", bound=1000)
        header = SagaHeader(saga_id=f"{number}", name="pay", version="", envelope=envelope, submission=0.0)
        await log.begin(header, b"", fence="lost", until=0.0, now=0.0)
    async with supervisor_of(log):
        await asyncio.sleep(5.0)
        assert len(await log.list(states=[SagaState.COMPENSATED], limit=MANY)) == MANY
