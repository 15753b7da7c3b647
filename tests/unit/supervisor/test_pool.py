"""Pools: counting slots and waiting tasks, and the order in which a shared worker serves them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forebay.adapters import as_handler
from forebay.breaker import Breaker, BreakerRules
from forebay.interfaces import Outcome
from forebay.supervisor.pool import DEFAULT_QUEUE_SIZE, NESTED, Pool
from forebay.supervisor.pools import FewPools, Pools, first_for
from forebay.supervisor.tenants import Tenant, Tenants
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Deadline, Estimate, Priority, Task

TICKET: Any = SimpleNamespace(task=Task("a"))


async def nothing(_: Task) -> None: ...


def worker(name: str = "w", *, slots: int = 2, task_types: tuple[str, ...] = ("a",), probes: int = 1) -> WorkerAgent:
    return WorkerAgent(
        name,
        as_handler(nothing),
        task_types=task_types,
        max_concurrent=slots,
        timeout=1.0,
        breaker=Breaker(BreakerRules(), draw=lambda: 0.0),
        probes=probes,
        on_revive=lambda _: None,
    )


def counted(pools: Pools, agent: WorkerAgent) -> list[Pool]:
    """Add a worker to the pools as the dispatcher does, and return its pools."""
    pools.add_worker(agent)
    before = agent.count_slots()
    for counts in pools.counts_of[agent]:
        counts.count_slots(agent, before)
    return list(pools.by_worker[agent].pools)


def test_an_added_worker_brings_its_slots_to_each_of_its_pools() -> None:
    pools = Pools(None, Tenants({}))
    counted(pools, worker("w1", slots=2, task_types=("a", "b")))
    counted(pools, worker("w2", slots=3, task_types=("b",)))
    assert {name: pool.slots for name, pool in pools.by_type.items()} == {"a": 2, "b": 5}


def test_adding_a_worker_returns_the_pools_that_are_new() -> None:
    pools = Pools(None, Tenants({}))
    assert [pool.task_type for pool in pools.add_worker(worker("w1", task_types=("a", "b")))] == ["a", "b"]
    assert [pool.task_type for pool in pools.add_worker(worker("w2", task_types=("b", "c")))] == ["c"]


def test_a_failed_worker_takes_its_slots_and_its_runs_out_of_the_count() -> None:
    pools = Pools(None, Tenants({}))
    agent = worker(slots=2)
    (pool,) = counted(pools, agent)
    agent.take_slot(0.0, probe=False)
    pool.slot_taken(agent)
    assert (pool.slots, pool.running) == (2, 1)
    agent.breaker.trip(0.0)
    agent.update_from_breaker(0.0)
    pool.count_slots(agent, agent.count_slots())
    assert (pool.slots, pool.running) == (0, 0)
    assert pool.load() == 1.0
    agent.return_slot(0.0, probe=False)
    pool.slot_returned(agent)
    agent.close_breaker()
    agent.update_from_breaker(0.0)
    pool.count_slots(agent, agent.count_slots())
    assert (pool.slots, pool.running) == (2, 0)


def test_the_load_counts_running_queued_and_reserved_but_not_parked() -> None:
    (pool,) = counted(Pools(6, Tenants({})), agent := worker(slots=2))
    agent.take_slot(0.0, probe=False)
    pool.slot_taken(agent)
    pool.park(TICKET)
    pool.reserve(2)
    assert pool.waiting == 3
    assert pool.load() == (1 + 2) / (2 + 6)
    pool.unpark(TICKET)
    pool.unreserve(2)
    assert pool.load() == 1 / 8


def test_conversations_share_the_room_for_parked_tasks() -> None:
    (pool,) = counted(Pools(60, Tenants({})), worker(slots=2))
    parked = [0, 0]
    for _ in range(100):
        for conversation in (0, 1):
            if pool.may_park(parked[conversation]):
                pool.park(TICKET)
                parked[conversation] += 1
    assert parked == [40, 40]  # a third of twice the queue's room each
    assert pool.may_park(0)  # and a third conversation finds room
    for _ in range(60):
        pool.park(TICKET)
    assert [pool.may_park(own) for own in (9, 10)] == [True, False]  # ten in any case


def test_slots_that_the_start_gate_blocks_are_not_usable() -> None:
    (pool,) = counted(Pools(None, Tenants({})), agent := worker(slots=3))
    agent.take_slot(0.0, probe=False)
    pool.slot_taken(agent)
    pool.block_worker(agent)
    assert pool.usable_slots == 1
    pool.unblock_worker(agent)
    assert pool.usable_slots == 3


@pytest.mark.parametrize(("slots", "bound"), [(2, DEFAULT_QUEUE_SIZE), (150, 150)])
def test_the_default_queue_holds_a_hundred_or_the_number_of_slots(slots: int, bound: int) -> None:
    (pool,) = counted(Pools(None, Tenants({})), worker(slots=slots))
    assert pool.queue_bound == bound


def test_spilled_tasks_of_a_better_priority_are_ahead() -> None:
    pool = Pool("a", None, Tenants({}))
    pool.add_spilled(Priority.HIGH, "a")
    pool.spilled.begin_spill(Priority.NORMAL, "a")
    assert [pool.spilled_ahead(priority, "a") for priority in Priority] == [0, 1, 2, 2]
    assert [pool.spilled_ahead(priority, "b") for priority in Priority] == [0, 0, 1, 2]
    pool.spilled.end_spill(Priority.NORMAL, "a")
    pool.remove_spilled(Priority.HIGH, "a")
    pool.remove_spilled(Priority.HIGH, "a")  # there were fewer than counted
    assert not any(pool.spilled_ahead(priority, "a") for priority in Priority)


def test_a_pool_that_is_passed_over_too_often_is_served() -> None:
    pools = Pools(None, Tenants({}))
    important, patient = counted(pools, worker(task_types=("important", "patient")))
    ticket: Any = object()
    patient.queue.push(ticket, Priority.LOW, (True, 0.0), 0)
    served = []
    for sequence in range(1, 30):
        important.queue.push(ticket, Priority.HIGH, (True, 0.0), sequence)
        chosen = FewPools([important, patient]).next_pool()
        assert chosen is not None
        served.append(chosen.task_type)
    assert served.index("patient") == 20


def test_a_worker_with_many_open_runs_serves_the_pool_that_it_passed_over_too_often() -> None:
    pools = Pools(None, Tenants({}))
    agent = worker(task_types=("important", "patient"))
    important, patient = counted(pools, agent)
    ticket: Any = object()
    patient.queue.push(ticket, Priority.LOW, (NESTED, 0.0), 0)
    served = []
    for sequence in range(1, 30):
        important.queue.push(ticket, Priority.HIGH, (NESTED, 0.0), sequence)
        chosen, _ = first_for(agent, [important, patient])
        assert chosen is not None
        served.append(chosen.task_type)
    assert served.index("patient") == 20


def test_probes_that_hold_a_slot_count_and_abandoned_ones_do_not() -> None:
    agent = worker(slots=3, probes=1)
    agent.breaker.trip(0.0)
    agent.update_from_breaker(0.0)
    assert not agent.can_accept()
    retry_after = agent.breaker.retry_after(0.0)
    assert retry_after is not None
    agent.update_from_breaker(retry_after)
    assert agent.probing
    assert agent.can_accept()
    agent.take_slot(0.0, probe=True)
    assert not agent.can_accept()
    agent.abandon_probe()
    assert agent.can_accept()
    agent.take_slot(0.0, probe=True)
    agent.breaker.record(retry_after, Outcome.SUCCESS, agent.breaker.allow(retry_after))
    agent.close_breaker()
    agent.update_from_breaker(retry_after)
    assert agent.can_accept()  # a new phase: none of the runs is a probe of it
    assert agent.current_tasks == 2


def test_a_claim_for_a_lent_slot_comes_before_new_tasks() -> None:
    agent = worker(slots=2)
    agent.add_claim()
    assert not agent.can_accept()
    assert agent.has_free_slot()
    agent.remove_claim()
    assert agent.can_accept()


# --- waits of tasks with deadlines ---


def late_turn(waited: float, *, time: float = 20.0, **fields: Any) -> Any:
    """Return a ticket whose turn comes after it has `waited`, and the seconds that it has left."""
    deadline = Deadline(1000.0 + time)
    known = {
        "nested": False,
        "retries": None,
        "held": False,
        "submitted_at": 1000.0,
        "deadline": deadline,
        "task": Task("a"),
        **fields,
    }
    return SimpleNamespace(**known), time - waited


def serve_late(pool: Pool, start: float, seconds: int, **fields: Any) -> None:
    """Have the turn of a task come late in each second."""
    for second in range(seconds):
        ticket, remaining = late_turn(15.0, **fields)
        pool.turn_came(start + second, ticket, remaining)


def queue_of_a_second() -> Pool:
    """Return a pool whose tasks take one second, a tenth of them ten."""
    pool = Pool("a", None, Tenants({}))
    for number in range(20):
        pool.service_times.record(10.0 if number % 10 == 0 else 1.0, success=True)
    return pool


def may_wait(pool: Pool, now: float, wait: float = 12.0, priority: Priority = Priority.NORMAL) -> bool:
    pool.estimate_bypass.should_reject(now, needed=1.0, remaining=0.0)  # or the first doubt would pass
    return not pool.would_wait_too_long(now, wait, 20.0, priority)


def test_a_task_may_wait_as_long_as_most_would_fit() -> None:
    pool = queue_of_a_second()
    assert may_wait(pool, 0.0, wait=19.0)
    assert not may_wait(pool, 0.0, wait=19.5)


def test_a_task_may_not_wait_that_long_while_the_queue_of_its_priority_stands() -> None:
    pool = queue_of_a_second()
    serve_late(pool, 0.0, seconds=11)
    assert not may_wait(pool, 11.0)
    assert may_wait(pool, 11.0, priority=Priority.HIGH)
    assert may_wait(pool, 11.0, wait=7.0)  # twelve and a half are left, as nearly every task needs
    assert not may_wait(pool, 20.0)  # it was rejected nine seconds ago
    assert may_wait(pool, 31.0)


@pytest.mark.parametrize(
    "fields", [{"nested": True}, {"retries": object()}, {"task": Task("a", thread_id="t")}, {"submitted_at": None}]
)
def test_tasks_that_wait_for_more_than_the_queue_do_not_make_it_stand(fields: dict[str, Any]) -> None:
    pool = queue_of_a_second()
    serve_late(pool, 0.0, seconds=11, **fields)
    assert may_wait(pool, 11.0)


def crowded_pool(remaining: float = 10.0, tenants: Tenants | None = None) -> Pool:
    """Return a pool with one slot that has not admitted a task with `remaining` seconds, at time 0."""
    pools = Pools(None, Tenants({}) if tenants is None else tenants)
    (pool,) = counted(pools, worker(slots=1))
    for number in range(20):
        pool.service_times.record(10.0 if number % 10 == 0 else 1.0, success=True)
    serve_late(pool, 0.0, seconds=1)
    pool.record_not_admitted(0.0, Task("a"), remaining)
    return pool


def test_a_pool_is_crowded_until_four_more_tasks_could_have_started() -> None:
    pool, (ticket, _) = crowded_pool(), late_turn(5.0)
    last = 4 * (pool.service_times.occupancy or 0.0)
    assert pool.is_crowded(last, ticket)
    assert not pool.is_crowded(last + 0.1, ticket)


def test_a_task_that_would_have_been_cut_off_in_any_slot_crowds_nobody() -> None:
    ticket, _ = late_turn(5.0)
    assert not crowded_pool(remaining=9.9).is_crowded(0.0, ticket)


@pytest.mark.parametrize(
    "fields", [{"nested": True}, {"retries": object()}, {"task": Task("a", priority=Priority.HIGH)}]
)
def test_what_has_begun_and_other_priorities_are_not_crowded_out(fields: dict[str, Any]) -> None:
    ticket, _ = late_turn(5.0, **fields)
    assert not crowded_pool().is_crowded(0.0, ticket)


def test_where_tenants_take_turns_none_is_crowded_out_by_another() -> None:
    ticket, _ = late_turn(5.0)
    assert not crowded_pool(tenants=Tenants({"a": Tenant(max_waiting=5)})).is_crowded(0.0, ticket)


def test_where_tenants_take_turns_a_queue_counts_as_standing() -> None:
    pool = Pool("a", None, Tenants({"a": Tenant(max_waiting=5)}))
    for number in range(20):
        pool.service_times.record(10.0 if number % 10 == 0 else 1.0, success=True)
    assert not may_wait(pool, 0.0)
    assert may_wait(pool, 0.0, wait=7.0)


def test_a_large_task_may_wait_less_than_a_small_one() -> None:
    pool = Pool("a", None, Tenants({}))
    for number in range(20):
        pool.service_times.record(1.0 + number, success=True)
        pool.record_estimated(1.0 + number, Estimate(calls=1 + number))
    pool.estimate_bypass.should_reject(0.0, needed=1.0, remaining=0.0)
    waits = {calls: 60.0 - 1.25 * calls for calls in (1, 8, 16)}
    for calls, longest in waits.items():
        estimate = Estimate(calls=calls)
        assert pool.max_wait(60.0, estimate) == pytest.approx(longest)
        assert not pool.would_wait_too_long(0.0, 60.0 - calls, 60.0, Priority.NORMAL, estimate=estimate)
        assert pool.would_wait_too_long(0.0, 60.1 - calls, 60.0, Priority.NORMAL, estimate=estimate)


def test_an_estimate_that_was_cut_off_counts_as_longer() -> None:
    pool = Pool("a", None, Tenants({}))
    for number in range(20):
        pool.record_timeout(1.0 + number, Estimate(calls=1 + number))
    times, units = pool.times_of(Estimate(calls=10))
    assert units * times.likely() == pytest.approx(15.0)
    assert pool.service_times.likely() == pytest.approx(24.0)
