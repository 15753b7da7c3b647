"""Who is refused for what its calls would draw on is told when that has room, from the first refusal on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.acceptance.test_sources import CallingAgent, Key, house
from tests.support.task_plane import approximately, now, virtual

from forebay import BackpressureSupervisor, Priority, Quota, Task, Ticket, Upstream

LONGEST = 60.0  # seconds that a call may wait
THRESHOLD = 0.8


@pytest.mark.parametrize("calls", [1, 4, 10])
@virtual
async def test_who_comes_back_when_told_to_a_key_that_has_begun_to_bind_is_nearly_always_let_in(calls: int) -> None:
    key = Upstream("key", quotas=[Quota(requests=60, per="minute")])

    async def handler(_: Task) -> None:
        for _number in range(calls):
            async with key.call():
                await asyncio.sleep(0.1)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=50)
        for _ in range(3):  # quick ones: the pool's pace says nothing of what is to come
            await supervisor.run(Task("work"))
        returns: list[asyncio.Task[bool | None]] = []
        flooded = False

        async def come_back(wait: float) -> bool | None:
            """Whether it is let in; None while others come unasked, for those take what it was told of."""
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
        let_in = [back for back in [await back for back in returns] if back is not None]
    assert len(let_in) > 150
    assert sum(let_in) / len(let_in) > 0.95


async def refused(supervisor: BackpressureSupervisor, **how: Any) -> Ticket:
    ticket = await supervisor.submit(Task("work", **how))
    assert not ticket
    return ticket


@virtual
async def test_the_first_is_told_when_the_key_has_room_for_its_priority() -> None:
    key = Key()
    async with house(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        key.reading, key.lasts = 0.9, (7.0, 2.0)
        first = await refused(supervisor)
        second = await refused(supervisor)
        assert first.retry_after is not None
        assert second.retry_after is not None
        assert 7.0 + 2.0 / 0.97 <= first.retry_after <= 7.0 + 1.1 * 2.0 / 0.97
        assert 7.0 + 4.0 / 0.97 <= second.retry_after <= 7.0 + 1.1 * 4.0 / 0.97


@virtual
async def test_a_line_that_is_full_for_want_of_a_key_drains_at_the_pace_of_the_key() -> None:
    key = Key()
    async with house(CallingAgent(key, seconds=0.1), max_queue_size=10) as supervisor:
        await supervisor.run(Task("work"))
        key.open, key.lasts, key.reading = False, (0.0, 2.0), 0.1
        while ticket := await supervisor.submit(Task("work")):
            pass
        assert ticket.limited_by == "upstream:key"
        assert ticket.retry_after is not None
        assert 2.0 / 0.97 <= ticket.retry_after <= 1.1 * 2.0 / 0.97
        key.relieve()


@virtual
async def test_a_pool_that_is_slower_than_the_key_still_counts() -> None:
    key = Key()
    async with house(CallingAgent(key, seconds=100.0), slots=1) as supervisor:
        await supervisor.run(Task("work"))
        key.reading, key.lasts = 0.9, (7.0, 2.0)
        assert ((await refused(supervisor)).retry_after or 0.0) >= 100.0


@virtual
async def test_what_is_not_known_is_not_told() -> None:
    key = Key()
    async with house(CallingAgent(key)) as supervisor:
        await supervisor.run(Task("work"))
        key.reading, key.lasts = 1.0, (float("inf"), 0.0)
        assert (await refused(supervisor)).retry_after is None


@virtual
async def test_the_worker_that_has_room_first_counts() -> None:
    key, spare = Key(), Key("upstream:spare")
    async with house(CallingAgent(key), slots=1) as supervisor:
        supervisor.register_worker("spare", handler=CallingAgent(spare), task_types=["work"])
        await asyncio.gather(*(supervisor.run(Task("work")) for _ in range(2)))  # one each
        key.reading, key.lasts = 0.9, (50.0, 2.0)
        spare.reading, spare.lasts = 0.9, (3.0, 1.0)
        assert (await refused(supervisor)).retry_after == pytest.approx(3.0 + 1.05 / 0.97, rel=0.05)


@virtual
async def test_an_upstream_knows_when_its_wait_has_fallen_and_how_far_apart_calls_fit_in() -> None:
    upstream = Upstream("key", quotas=[Quota(requests=60, per="minute")], max_wait=LONGEST)
    desk = upstream.core.accounts.account("")
    assert desk.time_until_below(Priority.NORMAL, THRESHOLD)[0] == 0.0
    for _ in range(60):
        async with upstream.call():
            pass
    desk.add_expected_calls(54)
    began = now()
    seconds, each = desk.time_until_below(Priority.NORMAL, THRESHOLD)
    assert seconds == approximately(55.0 - THRESHOLD * LONGEST)
    assert each == approximately(1.0)
    await asyncio.sleep(seconds)
    assert now() > began
    assert desk.load()[0] == pytest.approx(THRESHOLD, abs=1e-3)
    assert desk.time_until_below(Priority.NORMAL, THRESHOLD)[0] == approximately(0.0)
    desk.suspend(30.0)
    assert desk.time_until_below(Priority.NORMAL, THRESHOLD) == (approximately(30.0), 0.0)
