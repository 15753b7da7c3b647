"""Tenants in the overflow: the flood of one keeps neither the records nor the new tasks of another waiting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import Agent, now, results, submit_all, virtual
from tests.support.task_stores import DURABLE_STORES, STORES, StoreBackend

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskStatus, Tenant, Ticket, Verdict
from forebay.interfaces import Lease
from forebay.overflow import MemoryTaskStore
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

Make = Callable[..., BackpressureSupervisor]


@pytest.fixture(params=STORES, ids=str)
def backend(request: pytest.FixtureRequest) -> StoreBackend:
    assert isinstance(request.param, StoreBackend)
    return request.param


@pytest.fixture
def order() -> list[str]:
    """The tenants of the tasks in the order of their starts."""
    return []


@pytest.fixture
def make(backend: StoreBackend, tmp_path: Path, order: list[str]) -> Make:
    """Return a function that makes a supervisor with an overflow, and a worker whose tasks take a second."""

    def make(slots: int = 1, **options: Any) -> BackpressureSupervisor:
        supervisor = BackpressureSupervisor(overflow=backend.fast_url(tmp_path), **options)

        async def handler(task: Task) -> None:
            order.append(task.tenant)
            await asyncio.sleep(1.0)

        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=slots)
        return supervisor

    return make


async def submitted(supervisor: BackpressureSupervisor, tenant: str, count: int, **options: Any) -> list[Ticket]:
    return await submit_all(supervisor, (Task("work", tenant=tenant, **options) for _ in range(count)))


@virtual
async def test_a_new_task_does_not_wait_behind_the_records_of_another_tenant(make: Make, order: list[str]) -> None:
    supervisor = make(max_queue_size=10)
    async with supervisor:
        record = EventRecord(supervisor)
        big = await submitted(supervisor, "big", 60)
        assert big[-1].verdict is Verdict.SPILLED
        small = await submitted(supervisor, "small", 1)
        assert small[0].verdict is Verdict.ADMITTED
        await small[0]
        assert order.index("small") <= 2
        await results(big)
    check_supervisor(record, tickets=big + small)


@virtual
@pytest.mark.parametrize("slots", [1, 4])
async def test_a_record_does_not_wait_behind_those_of_another_tenant(make: Make, order: list[str], slots: int) -> None:
    supervisor = make(slots, max_queue_size=0)
    async with supervisor:
        big = await submitted(supervisor, "big", 60)
        small = await submitted(supervisor, "small", 3)
        assert small[0].verdict is Verdict.SPILLED
        await results(small)
        assert [index for index, tenant in enumerate(order) if tenant == "small"][-1] <= slots + 6
        await results(big)


@virtual
@pytest.mark.parametrize("queue_size", [0, 20])
@pytest.mark.parametrize("slots", [1, 3])
async def test_records_come_back_by_weight(make: Make, order: list[str], slots: int, queue_size: int) -> None:
    supervisor = make(slots, max_queue_size=queue_size, tenants={"acme": 3, "free": 0.5})
    async with supervisor:
        tickets = []
        for tenant in ("free", "other", "acme"):
            tickets += await submitted(supervisor, tenant, 150)
        await results(tickets)
    counts = Counter(order[20:155])  # while each has some waiting
    assert [counts[name] for name in ("acme", "other", "free")] == [
        pytest.approx(135 * share, abs=4) for share in (3 / 4.5, 1 / 4.5, 0.5 / 4.5)
    ]


@virtual
async def test_new_tasks_take_turns_with_records(make: Make, order: list[str]) -> None:
    supervisor = make(max_queue_size=10, tenants={"busy": 2})
    async with supervisor:
        big = await submitted(supervisor, "big", 60)
        busy: list[Ticket] = []
        while len(busy) < 40:  # one waits at a time
            busy += await submitted(supervisor, "busy", 1)
            while busy[-1].status is TaskStatus.WAITING:  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(0.05)
        assert Counter(order)["big"] == pytest.approx(20, abs=3)
        await results(big + busy)


@virtual
@pytest.mark.parametrize("slots", [1, 2])
async def test_a_caller_that_submits_as_soon_as_a_slot_is_free_takes_turns_with_records(
    make: Make, order: list[str], slots: int
) -> None:
    async def caller() -> None:
        while len(order) < 60:
            await supervisor.run(Task("work", tenant="caller"))

    supervisor = make(slots, max_queue_size=4)
    async with supervisor:
        big = await submitted(supervisor, "big", 90)
        callers = [asyncio.ensure_future(caller()) for _ in range(slots)]
        await asyncio.gather(*callers)
        assert Counter(order[:60])["big"] >= 25
        await results(big)


@virtual
async def test_one_record_of_each_of_many_tenants_comes_back_in_turn(make: Make, order: list[str]) -> None:
    supervisor = make(max_queue_size=0)
    async with supervisor:
        tickets = await submitted(supervisor, "big", 50)
        for number in range(60):
            tickets += await submitted(supervisor, f"tenant {number}", 1)
        await results(tickets)
    assert Counter(order[:65])["big"] <= 5


@virtual
async def test_slots_are_used_while_tenants_take_turns(make: Make) -> None:
    supervisor = make(5, max_queue_size=3)
    async with supervisor:
        tickets = []
        for number in range(20):
            for tenant in ("a", "b", "c"):
                tickets += await submitted(supervisor, tenant, 1 + number % 3)
        await results(tickets)
        assert now() == pytest.approx(len(tickets) / 5, abs=1.5)


@virtual
async def test_the_records_of_a_blocked_tenant_keep_those_of_no_other(make: Make) -> None:
    supervisor = make(3, max_queue_size=5, tenants={"acme": Tenant(max_running=1)})
    async with supervisor:
        acme = await submitted(supervisor, "acme", 30, priority=Priority.HIGH)
        assert acme[-1].verdict is Verdict.SPILLED
        other = await submitted(supervisor, "other", 20)
        await results(other)
        assert now() == pytest.approx(10.0, abs=1.1)
        await results(acme)
        assert now() == pytest.approx(30.0, abs=1.1)


@virtual
async def test_a_better_priority_in_the_overflow_goes_before_any_turn(make: Make, order: list[str]) -> None:
    supervisor = make(max_queue_size=0)
    async with supervisor:
        tickets = await submitted(supervisor, "a", 20)
        tickets += await submitted(supervisor, "b", 20)
        tickets += await submitted(supervisor, "c", 5, priority=Priority.HIGH)
        await results(tickets)
    assert order[2:7] == ["c"] * 5 or order[1:6] == ["c"] * 5


@virtual
async def test_the_deadlines_of_one_tenant_do_not_go_before_the_turn_of_another(make: Make, order: list[str]) -> None:
    supervisor = make(max_queue_size=0)
    async with supervisor:
        urgent = await submitted(supervisor, "urgent", 40, deadline=Deadline.within(100))
        patient = await submitted(supervisor, "patient", 3)
        await results(patient)
        assert len(order) <= 9
        await results(urgent)


class StuckStore(MemoryTaskStore):
    """A store in memory that answers no lease while the event is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()
        self.answers.set()

    async def lease(self, *of: Any, **how: Any) -> Sequence[Lease]:
        await self.answers.wait()
        return await super().lease(*of, **how)


@virtual
async def test_a_store_that_does_not_answer_keeps_no_slot_from_the_new_tasks_of_others() -> None:
    store = StuckStore()
    supervisor = BackpressureSupervisor(overflow=store, max_queue_size=4)
    supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
    async with supervisor:
        floods = await submitted(supervisor, "big", 20) + await submitted(supervisor, "huge", 20)
        await asyncio.sleep(3.5)
        store.answers.clear()
        while supervisor.statistics().running:  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.01)
        new = await submitted(supervisor, "new", 2)
        async with asyncio.timeout(3.0):
            await results(new)
        store.answers.set()
        await results(floods)


@virtual
async def test_cancelled_records_leave_no_turn_behind(make: Make) -> None:
    supervisor = make(max_queue_size=0, tenants={"other": Tenant(max_waiting=9)})
    async with supervisor:
        tickets = []
        for number in range(12):
            tickets += await submitted(supervisor, f"tenant {number}", 4)
        for ticket in tickets[1::2]:
            ticket.cancel()
        await results(tickets)
        pool = supervisor._running().core.pools.by_type["work"]
        assert not pool.spilled
        assert pool._turns is not None
        for groups in pool._turns._lanes:
            for lanes in groups.values():
                assert not lanes.turns._absent.by_tenant
                assert not lanes.turns._elsewhere


@virtual
async def test_a_restart_forgets_whose_turn_it_is_and_nothing_else(tmp_path: Path, order: list[str]) -> None:
    async def handler(task: Task) -> None:
        order.append(task.tenant)
        await asyncio.sleep(1.0)

    def make() -> BackpressureSupervisor:
        supervisor = BackpressureSupervisor(
            overflow=DURABLE_STORES[0].fast_url(tmp_path), max_queue_size=5, tenants={"acme": 2}
        )
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        return supervisor

    async with make() as supervisor:
        await submitted(supervisor, "big", 60)
        await submitted(supervisor, "acme", 60)
        await supervisor.drain(timeout=1.5)
    del order[:]
    async with make() as supervisor:
        (new,) = await submitted(supervisor, "new", 1)
        await new
        assert order.index("new") <= 4
        while len(order) < 62:  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.5)
        assert Counter(order)["acme"] == pytest.approx(41, abs=4)
        while supervisor.statistics().outside or supervisor.statistics().running:  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.5)
    assert Counter(order)["big"] >= 58


@virtual
async def test_nested_records_go_before_the_turns_of_others(make: Make, order: list[str]) -> None:
    async def parent(_: Task) -> None:
        order.append("parent")
        await asyncio.gather(*(supervisor.run(Task("work", tenant="nests")) for _ in range(3)))

    supervisor = make(max_queue_size=2)
    supervisor.register_worker("parents", handler=parent, task_types=["parent"])
    async with supervisor:
        big = await submitted(supervisor, "big", 20)
        await supervisor.run(Task("parent", tenant="nests"))
        assert Counter(order)["big"] <= 2
        await results(big)


@virtual
async def test_the_tenant_of_a_task_that_has_ended_is_known_after_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    for _ in range(2):
        supervisor = BackpressureSupervisor(overflow=url)
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        async with supervisor:
            if await supervisor.find("t1") is None:
                await (await supervisor.submit(Task("work", task_id="t1", key="k", tenant="acme", durable=True)))
            found = await supervisor.find("t1")
            assert found is not None
            assert found.task.tenant == "acme"
            assert (await found).success
