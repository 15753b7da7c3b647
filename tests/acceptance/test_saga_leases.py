"""The leases of sagas: a log that is gone, an event loop that stands still, and a clock that is set back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task, clock
from forebay.errors import SagaTaken, StoreUnavailable
from forebay.overflow import encode_task
from forebay.saga import MemorySagaLog, SagaRun, saga
from forebay.saga.records import FinishedEntry, LogWrite, ParkedEntry, SagaHeader, StoredSaga, decode_entries
from forebay.simulation import virtual_loop

LEASE = 3.0


@pytest.mark.blocks
@virtual
async def test_a_saga_ends_within_its_lease_once_the_file_of_its_log_was_removed(tmp_path: Path) -> None:
    @saga("long")
    async def definition(run: SagaRun, _: object) -> None:
        for number in range(100):
            await run.step(f"{number}", asyncio.sleep, 1.0)

    path = tmp_path / "saga.db"
    supervisor = BackpressureSupervisor(saga_log=f"sqlite:///{path}?fsync=no", lag_bound=None, lease=LEASE)
    supervisor.register_worker("worker", handler=definition, task_types=["work"])
    async with supervisor:
        ticket = await supervisor.submit(Task("work"))
        await asyncio.sleep(5.0)
        path.unlink()
        async with asyncio.timeout(2 * LEASE):
            assert isinstance((await ticket).cause, StoreUnavailable)


# --- the event loop stands still ---


class StallingLog(MemorySagaLog):
    """A log that has answered long before its caller has its turn.

    Attributes:
        claimed: the ids of the sagas that were claimed.
    """

    stalls = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.claimed: list[str] = []

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        lost = await super().renew(holders, until=until)
        virtual_loop().stall(self.stalls)
        return lost

    async def claim(self, *names: Any, **options: Any) -> Sequence[StoredSaga]:
        claimed = await super().claim(*names, **options)
        self.claimed += [each.header.saga_id for each in claimed]
        return claimed


@virtual
@pytest.mark.parametrize("stalls", [0.0, 1.5 * LEASE])
async def test_a_supervisor_whose_loop_stood_still_does_not_take_its_own_sagas(stalls: float) -> None:
    calls = 0

    async def block() -> None:
        nonlocal calls
        calls += 1
        virtual_loop().stall(1.5 * LEASE)
        await asyncio.sleep(0.1)

    @saga("blocks")
    async def definition(run: SagaRun, _: object) -> None:
        for number in range(10):
            await run.step(f"{number}", block, idempotent=True)

    log = StallingLog()
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None, lease=LEASE)
    supervisor.register_worker("worker", handler=definition, task_types=["work"])
    async with supervisor:
        log.stalls = stalls
        ticket = await supervisor.submit(Task("work"))
        await asyncio.sleep(0.5)
        assert (await ticket).success
    assert (log.claimed, calls) == ([], 10)


# --- sagas that were taken ---


class LogThatLosesSagas(MemorySagaLog):
    """A log in which another process takes each saga just before it ends or is parked."""

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        if isinstance(decode_entries(saga_id, write.entries)[-1], FinishedEntry | ParkedEntry):
            await self.release(saga_id, fence=fence)
            await self.claim(["pays"], limit=1, fence="other", until=now + 1000.0, now=now)
        return await super().append(saga_id, write, fence=fence, now=now)


@virtual
@pytest.mark.parametrize("fails", [False, True])
async def test_a_saga_that_was_taken_as_it_ended_has_not_failed(fails: bool, caplog: pytest.LogCaptureFixture) -> None:  # noqa: FBT001 - a parameter
    @saga("pays")
    async def definition(run: SagaRun, _: object) -> None:
        await run.step("pay", asyncio.sleep, 0.0, pivot=True)
        if fails:
            raise ValueError

    supervisor = BackpressureSupervisor(saga_log=LogThatLosesSagas(), lag_bound=None, lease=LEASE)
    supervisor.register_worker("worker", handler=definition, task_types=["work"])
    async with supervisor:
        assert isinstance((await (await supervisor.submit(Task("work")))).cause, SagaTaken)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


# --- the wall clock is set back ---


@virtual
async def test_after_the_clock_was_set_back_what_a_lost_process_left_goes_on_and_what_lives_is_not_taken() -> None:
    calls = 0

    async def work() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(2_000.0)

    @saga("works")
    async def definition(run: SagaRun, _: object) -> None:
        await run.step("work", work, idempotent=True)

    log = MemorySagaLog()
    supervisors = [BackpressureSupervisor(saga_log=log, lag_bound=None, lease=LEASE) for _ in range(2)]
    for each in supervisors:
        each.register_worker("worker", handler=definition, task_types=["work"], timeout=5_000.0)
    async with supervisors[0], supervisors[1]:
        ticket = await supervisors[0].submit(Task("work", key="lives"))
        at = clock.wall_time()
        envelope = encode_task(Task("work", key="lost"), None, bound=1_000)
        header = SagaHeader(saga_id="lost", name="works", version="", envelope=envelope, submission=at)
        await log.begin(header, b"", fence="lost", until=at + LEASE, now=at)
        await asyncio.sleep(0.5 * LEASE)
        virtual_loop().step_wall_time(-3_600.0)
        await asyncio.sleep(700.0)
        assert calls == 2
        assert (await ticket).success
    assert calls == 2
