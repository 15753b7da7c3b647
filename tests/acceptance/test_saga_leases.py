"""The leases of sagas: a log that is gone, and an event loop that stands still."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task
from forebay.errors import StoreUnavailable
from forebay.saga import SagaRun, saga

LEASE = 3.0


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
