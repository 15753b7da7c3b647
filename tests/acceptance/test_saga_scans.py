"""The scans for sagas that were left in the log, and the renewals of leases: nothing ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task, clock
from forebay.overflow import encode_task
from forebay.saga import MemorySagaLog, Saga, SagaRun, SagaState, saga
from forebay.saga.records import SagaHeader, StoredSaga


async def nothing() -> None:
    pass


class WatchedLog(MemorySagaLog):
    """A log that calls `on_claim` and `on_renew` before it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.on_claim: Callable[[], Awaitable[None]] = nothing
        self.on_renew: Callable[[], Awaitable[None]] = nothing

    async def claim(self, *names: Any, **options: Any) -> Sequence[StoredSaga]:
        claimed = await super().claim(*names, **options)
        if claimed:
            await self.on_claim()
        return claimed

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        await self.on_renew()
        return await super().renew(holders, until=until)

    async def leave(self, saga_id: str) -> None:
        """Store a saga of a process that was lost."""
        envelope = encode_task(Task("work", None, key=saga_id), None, bound=1000)
        header = SagaHeader(saga_id=saga_id, name="short", version="", envelope=envelope, submission=0.0)
        await self.begin(header, b"", fence="lost", until=0.0, now=0.0)

    async def reaches(self, saga_id: str, state: SagaState) -> None:
        async with asyncio.timeout(60.0):
            while True:
                stored = await self.get(saga_id)
                if stored is not None and stored.header.state is state:
                    return
                await asyncio.sleep(0.1)


def short(step: Callable[[], Any]) -> Saga:
    @saga("short")
    async def function(run: SagaRun, _: object) -> None:
        await run.step("only", step, idempotent=True)

    return function


def supervisor_of(log: MemorySagaLog, definition: Saga) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None, lease=3.0)
    supervisor.register_worker("worker", handler=definition, task_types=["work"])
    return supervisor


def fail_once() -> Callable[[], Awaitable[None]]:
    failures = [KeyError("a defect")]

    async def fail() -> None:
        if failures:
            raise failures.pop()

    return fail


@virtual
async def test_a_saga_whose_worker_is_unregistered_while_it_is_claimed_is_left_to_others() -> None:
    log, definition = WatchedLog(), short(nothing)
    await log.leave("s")
    supervisor = supervisor_of(log, definition)

    async def unregister() -> None:
        log.on_claim = nothing
        await supervisor.unregister_worker("worker")

    log.on_claim = unregister
    async with supervisor:
        await asyncio.sleep(1.0)
        stored = await log.get("s")
        assert stored is not None
        assert (stored.holder, stored.header.state, stored.header.claims) == ("", SagaState.RUNNING, 0)
        supervisor.register_worker("worker again", handler=definition, task_types=["work"])
        await log.reaches("s", SagaState.DONE)


@virtual
async def test_scans_go_on_after_any_error() -> None:
    log = WatchedLog()
    log.on_claim = fail_once()
    await log.leave("s")
    async with supervisor_of(log, short(nothing)):
        await log.reaches("s", SagaState.DONE)


@virtual
async def test_renewals_go_on_after_any_error() -> None:
    log = WatchedLog()
    async with supervisor_of(log, short(lambda: asyncio.sleep(30.0))) as supervisor:
        ticket = await supervisor.submit(Task("work", key="s"))
        await asyncio.sleep(1.0)
        drained = asyncio.ensure_future(supervisor.drain())  # which ends the scans
        await asyncio.sleep(2.0)
        log.on_renew = fail_once()
        await asyncio.sleep(20.0)
        stored = await log.get("s")
        assert stored is not None
        assert stored.until > clock.wall_time()
        await drained
        assert (await ticket).success
