"""retry_after of tasks that are rejected because of a load source: when the source has room again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.acceptance.test_sources import CallingAgent, Key, make_supervisor
from tests.support.task_plane import approximately, now, virtual

from forebay import BackpressureSupervisor, Priority, Quota, Task, Ticket, Upstream

LONGEST = 60.0  # seconds that a call may wait
THRESHOLD = 0.8


@pytest.mark.parametrize("calls", [1, 4, 10])
@virtual
async def test_tasks_that_come_back_after_the_retry_after_of_a_loaded_source_are_nearly_always_admitted(
    calls: int,
) -> None:
    key = Upstream("key", quotas=[Quota(requests=60, per="minute")])

    async def handler(_: Task) -> None:
        for _number in range(calls):
            async with key.call():
                await asyncio.sleep(0.1)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=50)
        for _ in range(3):  # quick runs: the pool's durations say nothing about the source
            await supervisor.run(Task("work"))
        returns: list[asyncio.Task[bool | None]] = []
        flooded = False

        async def come_back(wait: float) -> bool | None:
            """Return whether it is admitted; None while other tasks are submitted that take its retry slot."""
            await asyncio.sleep(wait)
            ticket = supervisor.submit_nowait(Task("work"))
            return bool(ticket) if flooded else None

        for _ in range(300):
            ticket = supervisor.submit_nowait(Task("work"))
            if not ticket:
                assert ticket.limited_by == "upstream:key"
                assert ticket.retry_after is not None
                returns.append(asyncio.create_task(come_back(ticket.retry_after)))
            await asyncio.sleep(0.05)
        flooded = True
        admissions = [back for back in [await back for back in returns] if back is not None]
    assert len(admissions) > 150
    assert sum(admissions) / len(admissions) > 0.95


async def rejected_ticket(supervisor: BackpressureSupervisor, **how: Any) -> Ticket:
    ticket = await supervisor.submit(Task("work", **how))
    assert not ticket
    return ticket


@virtual
async def test_the_first_retry_after_is_when_the_source_has_room_for_the_priority() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        key.reading, key.lasts = 0.9, (7.0, 2.0)
        first = await rejected_ticket(supervisor)
        second = await rejected_ticket(supervisor)
        assert first.retry_after is not None
        assert second.retry_after is not None
        assert 7.0 + 2.0 / 0.97 <= first.retry_after <= 7.0 + 1.1 * 2.0 / 0.97
        assert 7.0 + 4.0 / 0.97 <= second.retry_after <= 7.0 + 1.1 * 4.0 / 0.97


@virtual
async def test_a_queue_that_is_full_because_of_a_source_drains_at_its_pace() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key, seconds=0.1), max_queue_size=10) as supervisor:
        await supervisor.run(Task("work"))
        key.open, key.lasts, key.reading = False, (0.0, 2.0), 0.1
        while ticket := await supervisor.submit(Task("work")):
            pass
        assert ticket.limited_by == "upstream:key"
        assert ticket.retry_after is not None
        assert 2.0 / 0.97 <= ticket.retry_after <= 1.1 * 2.0 / 0.97
        key.relieve()


@virtual
async def test_a_pool_that_is_slower_than_the_source_still_counts() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key, seconds=100.0), slots=1) as supervisor:
        await supervisor.run(Task("work"))
        key.reading, key.lasts = 0.9, (7.0, 2.0)
        assert ((await rejected_ticket(supervisor)).retry_after or 0.0) >= 100.0


@virtual
async def test_an_unknown_retry_after_is_none() -> None:
    key = Key()
    async with make_supervisor(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        key.reading, key.lasts = 1.0, (float("inf"), 0.0)
        assert (await rejected_ticket(supervisor)).retry_after is None


@virtual
async def test_retry_after_is_that_of_the_worker_that_has_room_first() -> None:
    key, spare = Key(), Key("upstream:spare")
    async with make_supervisor(CallingAgent(key), slots=1) as supervisor:
        supervisor.register_worker("spare", handler=CallingAgent(spare), task_types=["work"])
        await asyncio.gather(*(supervisor.run(Task("work")) for _ in range(2)))  # one each
        key.reading, key.lasts = 0.9, (50.0, 2.0)
        spare.reading, spare.lasts = 0.9, (3.0, 1.0)
        assert (await rejected_ticket(supervisor)).retry_after == pytest.approx(3.0 + 1.05 / 0.97, rel=0.05)


@virtual
async def test_an_upstream_estimates_when_its_wait_has_fallen_and_the_time_between_calls() -> None:
    upstream = Upstream("key", quotas=[Quota(requests=60, per="minute")], max_wait=LONGEST)
    shared_account = upstream.core.accounts.account("")
    assert shared_account.time_until_below(Priority.NORMAL, THRESHOLD)[0] == 0.0
    for _ in range(60):
        async with upstream.call():
            pass
    shared_account.add_expected_calls(54)
    started = now()
    seconds, each = shared_account.time_until_below(Priority.NORMAL, THRESHOLD)
    assert seconds == approximately(55.0 - THRESHOLD * LONGEST)
    assert each == approximately(1.0)
    await asyncio.sleep(seconds)
    assert now() > started
    assert shared_account.load()[0] == pytest.approx(THRESHOLD, abs=1e-3)
    assert shared_account.time_until_below(Priority.NORMAL, THRESHOLD)[0] == approximately(0.0)
    shared_account.suspend(30.0)
    assert shared_account.time_until_below(Priority.NORMAL, THRESHOLD) == (approximately(30.0), 0.0)
