"""Tenants: turns by weight, room beside the flood of another one, and bounds for each."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import Agent, flood, now, rejected, results, statuses, virtual

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskStatus, Tenant, Upstream, Verdict
from forebay.errors import InvalidSetting
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


class Starts:
    """A handler that takes a second, or the seconds of the payload, and remembers whose tasks started and ran."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    async def __call__(self, task: Task) -> None:
        self.order.append(task.tenant)
        self.running[task.tenant] += 1
        self.most[task.tenant] = max(self.most[task.tenant], self.running[task.tenant])
        try:
            await asyncio.sleep(task.payload if isinstance(task.payload, float) else 1.0)
        finally:
            self.running[task.tenant] -= 1


def supervised(slots: int = 1, **options: Any) -> tuple[BackpressureSupervisor, Starts]:
    supervisor, handler = BackpressureSupervisor(**options), Starts()
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=slots)
    return supervisor, handler


# --- settings ---


@pytest.mark.parametrize(
    "tenants",
    [
        ["acme"],
        "acme",
        {"acme": 0},
        {"acme": -1.0},
        {"acme": "3"},
        {"acme": float("inf")},
        {"acme": 1e-7},
        {"acme": 1e7},
        {"": 1},
        {1: 1},
        {"a": True},
    ],
)
def test_tenants_are_checked(tenants: Any) -> None:
    with pytest.raises(InvalidSetting, match="tenants"):
        BackpressureSupervisor(tenants=tenants)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": 0},
        {"weight": "1"},
        {"weight": 1e-200},
        {"weight": 1e200},
        {"max_running": 0},
        {"max_running": 1.5},
        {"max_waiting": -1},
    ],
)
def test_the_settings_of_a_tenant_are_checked(settings: Any) -> None:
    with pytest.raises(InvalidSetting, match="Tenant"):
        Tenant(**settings)


# --- turns ---


@virtual
async def test_a_tenant_waits_for_its_turn_and_not_for_the_flood_of_another() -> None:
    supervisor, handler = supervised()
    async with supervisor:
        tickets = flood(supervisor, "work", 12, tenant="big")
        tickets += flood(supervisor, "work", 1, tenant="small")
        await results(tickets)
    assert handler.order.index("small") <= 2


@virtual
async def test_turns_are_shared_by_weight() -> None:
    supervisor, handler = supervised(slots=2, max_queue_size=1000, tenants={"acme": 3, "free": Tenant(weight=0.5)})
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("work", tenant=name)) for name in ("acme", "free", "other") * 100]
        await results(tickets)
    counts = Counter(handler.order[:135])  # while each has some waiting
    assert [counts[name] for name in ("acme", "other", "free")] == [
        pytest.approx(135 * share, abs=3) for share in (3 / 4.5, 1 / 4.5, 0.5 / 4.5)
    ]


@virtual
async def test_a_better_priority_goes_before_any_turn() -> None:
    supervisor, handler = supervised()
    async with supervisor:
        tickets = flood(supervisor, "work", 3, tenant="a") + flood(supervisor, "work", 3, tenant="b")
        tickets += flood(supervisor, "work", 2, tenant="a", priority=Priority.HIGH)
        await results(tickets)
    assert handler.order[:3] == ["a", "a", "a"]


@virtual
async def test_deadlines_order_the_tasks_of_one_tenant() -> None:
    async def handler(task: Task) -> None:
        order.append((task.tenant, task.payload))
        await asyncio.sleep(1.0)

    order: list[tuple[str, int]] = []
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    async with supervisor:
        first = supervisor.submit_nowait(Task("work", 0, tenant="a"))
        tickets = [
            supervisor.submit_nowait(Task("work", seconds, tenant=tenant, deadline=Deadline.within(seconds)))
            for tenant, seconds in (("a", 90), ("a", 60), ("a", 30), ("b", 95), ("b", 70))
        ]
        await results([first, *tickets])
    assert [payload for tenant, payload in order if tenant == "a"] == [0, 30, 60, 90]
    assert [payload for tenant, payload in order if tenant == "b"] == [70, 95]
    assert [tenant for tenant, _ in order[1:5]] in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


@virtual
async def test_nested_tasks_go_first_and_take_turns_among_themselves() -> None:
    async def handler(task: Task) -> None:
        order.append(task.payload)
        await asyncio.sleep(1.0)
        if task.payload == "parent":
            children = [Task("work", f"{task.tenant} child", tenant=task.tenant) for _ in range(3)]
            await asyncio.gather(*map(supervisor.run, children))

    order: list[str] = []
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2)
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("work", "parent", tenant=tenant)) for tenant in ("a", "b")]
        tickets += [supervisor.submit_nowait(Task("work", "other", tenant="c")) for _ in range(3)]
        await results(tickets)
    assert order[:2] == ["parent", "parent"]
    assert order[2:].index("other") == 6
    assert set(order[2:5]) == {"a child", "b child"}


@virtual
async def test_the_tasks_of_one_tenant_keep_their_order_when_another_comes_and_goes() -> None:
    async def handler(task: Task) -> None:
        order.append((task.tenant, task.payload))
        await asyncio.sleep(0.1)

    order: list[tuple[str, int]] = []
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    async with supervisor:
        tickets = []
        for start in range(0, 100, 10):
            for number in range(start, start + 10):
                tickets.append(supervisor.submit_nowait(Task("work", number, tenant="a")))
                if number % 7 == 3:
                    tickets.append(supervisor.submit_nowait(Task("work", number, tenant="b")))
            tickets[-2].cancel()
            await asyncio.sleep(0.1 * (start % 30))
        await results(tickets)
    for tenant in "ab":
        numbers = [number for name, number in order if name == tenant]
        assert numbers == sorted(numbers)


# --- room ---


@virtual
@pytest.mark.parametrize("queue_size", [None, 10, 4])
@pytest.mark.parametrize("priority", Priority)
async def test_the_flood_of_one_tenant_keeps_no_other_out(queue_size: int | None, priority: Priority) -> None:
    supervisor, handler = supervised(max_queue_size=queue_size)
    async with supervisor:
        big = flood(supervisor, "work", 500, tenant="big", priority=priority)
        assert rejected(big)
        small = flood(supervisor, "work", 1, tenant="small", priority=priority)
        assert small[0].verdict is Verdict.ADMITTED
        third = flood(supervisor, "work", 1, tenant="third", priority=priority)
        assert third[0].verdict is Verdict.ADMITTED
        await results([ticket for ticket in (*big, *small, *third) if ticket])
    assert max(handler.order.index("small"), handler.order.index("third")) <= 3


@virtual
async def test_tenants_share_the_room_of_the_queue_and_it_stays_bounded() -> None:
    supervisor, _ = supervised(max_queue_size=60)
    async with supervisor:
        alone = sum(map(bool, flood(supervisor, "work", 200, tenant="tenant 0", priority=Priority.CRITICAL)))
        assert alone == 61  # one runs
        total = alone + sum(
            sum(map(bool, flood(supervisor, "work", 200, tenant=f"tenant {number}", priority=Priority.CRITICAL)))
            for number in range(1, 50)
        )
        assert total <= 1 + 2 * 60
        for ticket in list(supervisor._running().core.registry.live.values()):
            ticket.cancel()


@virtual
async def test_one_tenant_alone_is_rejected_from_the_same_load_whatever_its_name() -> None:
    counts = []
    for tenant in ("default", "acme"):
        supervisor, _ = supervised(max_queue_size=20)
        async with supervisor:
            counts.append(sum(map(bool, flood(supervisor, "work", 60, tenant=tenant))))
    assert counts == [17, 17]


@virtual
async def test_the_nested_tasks_of_one_tenant_keep_out_those_of_no_other() -> None:
    async def parent(task: Task) -> None:
        children = [supervisor.submit_nowait(Task("child", tenant=task.tenant)) for _ in range(task.payload)]
        refused[task.tenant] = len(rejected(children))
        await results([child for child in children if child])

    refused: dict[str, int] = {}
    supervisor = BackpressureSupervisor(max_queue_size=10)
    supervisor.register_worker("parents", handler=parent, task_types=["parent"], max_concurrent=2)
    supervisor.register_worker("children", handler=Agent(), task_types=["child"])
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("parent", 50, tenant="big"))]
        await asyncio.sleep(0.5)
        tickets.append(supervisor.submit_nowait(Task("parent", 2, tenant="small")))
        await results(tickets)
    assert refused["big"]
    assert not refused["small"]


@virtual
async def test_a_deadline_is_judged_by_the_turns_that_come_before() -> None:
    supervisor, _ = supervised(max_queue_size=200)
    async with supervisor:
        await results(flood(supervisor, "work", 10, tenant="warm-up"))
        big = flood(supervisor, "work", 100, tenant="big")
        late = [supervisor.submit_nowait(Task("work", tenant="big", deadline=Deadline.within(20))) for _ in range(2)]
        assert rejected(late)  # all but one in ten seconds, which may correct the estimate
        small = supervisor.submit_nowait(Task("work", tenant="small", deadline=Deadline.within(20)))
        assert small
        assert (await small).success
        for ticket in big:
            ticket.cancel()


# --- bounds ---


@virtual
async def test_a_tenant_holds_no_more_slots_than_it_may() -> None:
    supervisor, handler = supervised(slots=5, tenants={"acme": Tenant(max_running=2)})
    async with supervisor:
        record = EventRecord(supervisor)
        tickets = flood(supervisor, "work", 20, tenant="acme")
        assert handler.running["acme"] == 0
        await asyncio.sleep(0.5)
        others = flood(supervisor, "work", 9, tenant="other")
        await results(tickets + others)
        assert now() == pytest.approx(10.0, abs=1.1)
    assert handler.most["acme"] == 2
    assert handler.most["other"] >= 3
    check_supervisor(record, tickets=tickets + others)


@virtual
async def test_what_waits_for_a_bound_keeps_no_slot_idle_for_others() -> None:
    supervisor, handler = supervised(slots=3, tenants={"acme": Tenant(max_running=1)})
    async with supervisor:
        tickets = flood(supervisor, "work", 5, tenant="acme")
        other = supervisor.submit_nowait(Task("work", tenant="other"))
        assert other.status is TaskStatus.RUNNING
        low = supervisor.submit_nowait(Task("work", tenant="other", priority=Priority.LOW))
        assert low.status is TaskStatus.RUNNING
        await results([*tickets, other, low])
    assert handler.most["acme"] == 1


@virtual
async def test_the_end_of_a_run_starts_a_task_of_its_tenant_on_another_worker() -> None:
    handler = Starts()
    supervisor = BackpressureSupervisor(tenants={"acme": Tenant(max_running=1)})
    for kind in ("one", "two"):
        supervisor.register_worker(kind, handler=handler, task_types=[kind])
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task(kind, tenant="acme")) for kind in ("one", "two", "two", "one")]
        await results(tickets)
        assert now() == pytest.approx(4.0, abs=0.1)
    assert handler.most["acme"] == 1


@virtual
async def test_a_run_that_awaits_a_nested_task_cannot_block_its_tenant() -> None:
    async def handler(task: Task) -> None:
        running[task.tenant] += 1
        assert running[task.tenant] <= 2
        await asyncio.sleep(0.5)
        if task.payload:
            running[task.tenant] -= 1
            await asyncio.gather(
                *(supervisor.run(Task(kind, task.payload - 1, tenant="acme")) for kind in ("one", "two"))
            )
            running[task.tenant] += 1
            assert running[task.tenant] <= 2
            await asyncio.sleep(0.5)
        running[task.tenant] -= 1

    running: Counter[str] = Counter()
    supervisor = BackpressureSupervisor(tenants={"acme": Tenant(max_running=2)})
    for kind in ("one", "two"):
        supervisor.register_worker(kind, handler=handler, task_types=[kind], max_concurrent=2)
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("one", 3, tenant="acme")) for _ in range(3)]
        assert set(await statuses(tickets)) == {TaskStatus.SUCCEEDED}


@virtual
@pytest.mark.parametrize("agents", [1, 2, 4])
async def test_a_run_that_has_begun_goes_on_before_new_tasks_of_its_tenant(agents: int) -> None:
    async def agent(_: Task) -> None:
        await supervisor.run(Task("child", tenant="acme"))
        went_on.append(now())

    async def child(_: Task) -> None:
        await asyncio.sleep(1.0)

    went_on: list[float] = []
    supervisor = BackpressureSupervisor(tenants={"acme": Tenant(max_running=2)})
    supervisor.register_worker("agents", handler=agent, task_types=["agent"], max_concurrent=4)
    supervisor.register_worker("children", handler=child, task_types=["child"], max_concurrent=2)
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("agent", tenant="acme")) for _ in range(agents)]
        await asyncio.sleep(0.5)
        tickets += [supervisor.submit_nowait(Task("child", tenant="acme")) for _ in range(60)]
        await results(tickets)
    # Two run at a time; when the nested tasks end, newer tasks already hold the slots that they leave over.
    assert max(went_on) <= agents // 2 + 2.0
    assert now() == pytest.approx((60 + agents) / 2, abs=1.0)


@virtual
async def test_a_run_that_may_not_have_its_slot_back_keeps_no_other_tenant_waiting() -> None:
    async def handler(task: Task) -> None:
        if task.payload == "nests":
            await supervisor.run(Task("other"))
        await asyncio.sleep(5.0)

    supervisor = BackpressureSupervisor(tenants={"acme": Tenant(max_running=1)})
    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=3)
    supervisor.register_worker("other", handler=Agent(), task_types=["other"])
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("work", "nests", tenant="acme"))]
        await asyncio.sleep(0.5)
        tickets.append(supervisor.submit_nowait(Task("work", tenant="acme")))
        await asyncio.sleep(2.0)
        assert (worker.current_tasks, worker.pending_claims) == (1, 1)
        tickets.append(supervisor.submit_nowait(Task("work", tenant="other")))
        assert tickets[-1].status is TaskStatus.RUNNING
        await results(tickets)
    assert now() == pytest.approx(10.5, abs=0.1)


@virtual
async def test_a_tenant_is_rejected_from_its_own_load() -> None:
    supervisor, _ = supervised(tenants={"acme": Tenant(max_waiting=10)})
    async with supervisor:
        tickets = flood(supervisor, "work", 30, tenant="acme", priority=Priority.CRITICAL)
        assert sum(map(bool, tickets)) == 11  # one runs
        refusal = rejected(tickets)[0]
        assert refusal.limited_by == "tenant:acme"
        assert refusal.reason is not None
        assert "tenant:acme is at 100%" in refusal.reason
        assert refusal.load == 1.0
        normal = supervisor.submit_nowait(Task("work", tenant="other"))
        assert normal
        await results([*filter(None, tickets), normal])


@virtual
async def test_each_priority_of_a_tenant_is_rejected_from_a_load_of_its_own() -> None:
    supervisor, _ = supervised(tenants={"acme": Tenant(max_waiting=10)})
    async with supervisor:
        counts = [
            sum(map(bool, flood(supervisor, "work", 30, tenant="acme", priority=priority)))
            for priority in reversed(Priority)
        ]
    assert counts == [7, 2, 1, 1]  # one of LOW runs; 6, 8, 9 and 10 wait


@virtual
async def test_a_tenant_that_may_not_wait_gets_free_slots_alone() -> None:
    supervisor, _ = supervised(slots=2, tenants={"acme": Tenant(max_waiting=0)})
    async with supervisor:
        tickets = flood(supervisor, "work", 5, tenant="acme")
        assert [bool(ticket) for ticket in tickets] == [True, True, False, False, False]
        await results(tickets[:2])
        assert supervisor.submit_nowait(Task("work", tenant="acme"))


@virtual
async def test_messages_of_a_conversation_count_towards_the_bound() -> None:
    supervisor, _ = supervised(slots=5, tenants={"acme": Tenant(max_waiting=5)})
    async with supervisor:
        tickets = flood(supervisor, "work", 20, tenant="acme", thread_id="one", priority=Priority.CRITICAL)
        assert sum(map(bool, tickets)) == 6
        await results([ticket for ticket in tickets if ticket])
        assert supervisor._running().core.tenants.load("acme") == 0.0


@virtual
async def test_cancelled_tasks_are_no_longer_counted() -> None:
    supervisor, _ = supervised(tenants={"acme": Tenant(max_waiting=5, max_running=1)})
    async with supervisor:
        for _ in range(5):
            tickets = flood(supervisor, "work", 6, tenant="acme", priority=Priority.CRITICAL)
            assert all(tickets)
            for ticket in tickets:
                ticket.cancel()
            await asyncio.sleep(0.1)
        tenants = supervisor._running().core.tenants
        assert tenants.load("acme") == 0.0
        assert not tenants.blocked


# --- on the call plane ---


@virtual
@pytest.mark.parametrize(("weights", "share"), [(None, 0.75), ({"other": 3}, 0.5), ({"acme": 1 / 3}, 0.25)])
@pytest.mark.parametrize("given", [False, True])
async def test_calls_have_the_weight_of_their_tenant(
    weights: dict[str, float] | None, share: float, *, given: bool
) -> None:
    upstream = Upstream("llm", max_concurrent=1, max_wait=1e9, max_start_wait=1e9, weights=weights)
    served: list[str] = []

    async def agent(task: Task) -> None:
        async with upstream.call(tenant=task.tenant if given else None):
            served.append(task.tenant)
            await asyncio.sleep(1.0)

    supervisor = BackpressureSupervisor(tenants={"acme": 3})
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=100, timeout=1e4)
    async with supervisor:
        tickets = [supervisor.submit_nowait(Task("work", tenant=name)) for name in ("acme", "other") * 50]
        await results(tickets)
    assert served[:40].count("acme") == pytest.approx(40 * share, abs=2)


@virtual
async def test_a_call_for_another_tenant_than_its_task_has_the_weight_that_the_upstream_knows() -> None:
    upstream = Upstream("llm", max_concurrent=1, max_wait=1e9, max_start_wait=1e9)
    served: list[str] = []

    async def agent(task: Task) -> None:
        async with upstream.call(tenant=task.payload):
            served.append(task.payload)
            await asyncio.sleep(1.0)

    supervisor = BackpressureSupervisor(tenants={"acme": 3})
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=100, timeout=1e4)
    async with supervisor:
        await results([supervisor.submit_nowait(Task("work", name, tenant="acme")) for name in "ab" * 20])
    assert served[:20].count("a") == pytest.approx(10, abs=2)


@virtual
async def test_a_rejected_tenant_is_not_told_to_come_back_after_the_flood_of_another() -> None:
    supervisor, _ = supervised(max_queue_size=20)
    async with supervisor:
        await results(flood(supervisor, "work", 10, tenant="warm-up"))
        assert rejected(flood(supervisor, "work", 2000, tenant="big"))
        refusal = rejected(flood(supervisor, "work", 60, tenant="small"))[0]
        assert refusal.retry_after is not None
        assert refusal.retry_after < 10.0
        for ticket in list(supervisor._running().core.registry.live.values()):
            ticket.cancel()


@virtual
async def test_a_supervisor_that_starts_again_counts_from_nothing() -> None:
    supervisor, handler = BackpressureSupervisor(tenants={"acme": Tenant(max_running=2, max_waiting=9)}), Starts()
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=4, reserve=1)
    for _ in range(3):
        handler.order.clear()
        async with supervisor:
            flood(supervisor, "work", 3, tenant="acme", priority=Priority.HIGH)
            flood(supervisor, "work", 5, tenant="other")
            await asyncio.sleep(0.5)
            assert Counter(handler.order) == {"acme": 2, "other": 1}
            assert supervisor._running().core.tenants.blocked == {"acme"}
            await supervisor.drain(timeout=0.1)


@virtual
@pytest.mark.parametrize("end", ["unregistered", "not started"])
async def test_what_waits_for_a_bound_ends_with_its_last_worker(end: str) -> None:
    supervisor, handler = BackpressureSupervisor(tenants={"a": Tenant(max_running=1)}), Starts()
    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    async with supervisor:
        running = supervisor.submit_nowait(Task("work", 10.0, tenant="a"))
        starting = asyncio.Event()

        async def start() -> None:
            await starting.wait()
            raise OSError

        supervisor.register_worker("other", handler=handler, task_types=["other"], start=start)
        waiting = [supervisor.submit_nowait(Task("other", tenant="a")) for _ in range(3)]
        if end == "unregistered":
            await supervisor.unregister_worker("other")
        else:
            starting.set()
        for ticket in waiting:
            async with asyncio.timeout(1):
                assert (await ticket).status is TaskStatus.FAILED
        assert supervisor.statistics().waiting == 0
        assert (await running).success


@virtual
async def test_a_drain_does_not_wait_for_a_tenant_whose_slots_are_held_by_zombies() -> None:
    supervisor = BackpressureSupervisor(tenants={"a": Tenant(max_running=1)})
    released = asyncio.Event()

    async def never_stops(_: Task) -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    supervisor.register_worker("worker", handler=never_stops, task_types=["work"], max_concurrent=3)
    async with supervisor:
        zombie, waiting = flood(supervisor, "work", 2, tenant="a")
        await asyncio.sleep(1)
        zombie.cancel()
        await asyncio.sleep(10)
        async with asyncio.timeout(100):
            report = await supervisor.drain()
        assert (report.cancelled, waiting.status) == (1, TaskStatus.CANCELLED)
        released.set()


@virtual
async def test_weights_that_differ_most_are_served_and_judged() -> None:
    supervisor, handler = supervised(tenants={"big": 1e6, "small": 1e-6}, max_queue_size=100)
    async with supervisor:
        await results(flood(supervisor, "work", 10))
        handler.order.clear()
        tickets = [
            supervisor.submit_nowait(Task("work", tenant=name, deadline=Deadline.within(1000)))
            for name in ("small", "big", "other") * 10
        ]
        assert set(await statuses(tickets)) == {TaskStatus.SUCCEEDED}
    assert handler.order == ["small"] + ["big"] * 10 + ["other"] * 10 + ["small"] * 9


@virtual
async def test_a_tenant_is_told_to_come_back_when_its_bound_allows() -> None:
    supervisor, _ = supervised(slots=50, tenants={"acme": Tenant(max_running=1, max_waiting=10)})
    async with supervisor:
        await results(flood(supervisor, "work", 20))
        tickets = flood(supervisor, "work", 12, tenant="acme")
        refusals = rejected(tickets)
        assert {refusal.limited_by for refusal in refusals} == {"tenant:acme"}
        for number, refusal in enumerate(refusals, 1):
            assert refusal.retry_after == pytest.approx(number, rel=0.2)
        await results([ticket for ticket in tickets if ticket])


@virtual
async def test_a_deadline_is_judged_by_the_bound_of_its_tenant() -> None:
    supervisor, _ = supervised(slots=50, tenants={"acme": Tenant(max_running=1)})
    async with supervisor:
        await results(flood(supervisor, "work", 20))
        tickets = flood(supervisor, "work", 20, tenant="acme")
        late = [supervisor.submit_nowait(Task("work", tenant="acme", deadline=Deadline.within(5))) for _ in range(2)]
        assert rejected(late)  # all but one in ten seconds, which may correct the estimate
        assert supervisor.submit_nowait(Task("work", tenant="other", deadline=Deadline.within(5)))
        await results(tickets)
