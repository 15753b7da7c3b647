"""The leases of sagas: a log that is gone, and an event loop that stands still."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task
from forebay.errors import SagaTaken, StoreUnavailable
from forebay.saga import MemorySagaLog, SagaRun, saga
from forebay.saga.records import Finished, LogWrite, Parked, StoredSaga, decode_entries
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
        if isinstance(decode_entries(saga_id, write.entries)[-1], Finished | Parked):
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
