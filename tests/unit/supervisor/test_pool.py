"""Pools: counting slots and waiting tasks, and the order in which a shared worker serves them."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.adapters import as_handler
from forebay.breaker import Breaker, BreakerRules
from forebay.interfaces import Outcome
from forebay.supervisor.pool import DEFAULT_QUEUE_SIZE, NESTED, Pool
from forebay.supervisor.pools import FewPools, Pools, first_for
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Priority, Task


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
    pools = Pools(max_queue_size=None)
    counted(pools, worker("w1", slots=2, task_types=("a", "b")))
    counted(pools, worker("w2", slots=3, task_types=("b",)))
    assert {name: pool.slots for name, pool in pools.by_type.items()} == {"a": 2, "b": 5}


def test_adding_a_worker_returns_the_pools_that_are_new() -> None:
    pools = Pools(max_queue_size=None)
    assert [pool.task_type for pool in pools.add_worker(worker("w1", task_types=("a", "b")))] == ["a", "b"]
    assert [pool.task_type for pool in pools.add_worker(worker("w2", task_types=("b", "c")))] == ["c"]


def test_a_failed_worker_takes_its_slots_and_its_runs_out_of_the_count() -> None:
    pools = Pools(max_queue_size=None)
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
    (pool,) = counted(Pools(max_queue_size=6), agent := worker(slots=2))
    agent.take_slot(0.0, probe=False)
    pool.slot_taken(agent)
    pool.park()
    pool.reserve(2)
    assert pool.waiting == 3
    assert pool.load() == (1 + 2) / (2 + 6)
    pool.unpark()
    pool.unreserve(2)
    assert pool.load() == 1 / 8


def test_conversations_share_the_room_for_parked_tasks() -> None:
    (pool,) = counted(Pools(max_queue_size=60), worker(slots=2))
    parked = [0, 0]
    for _ in range(100):
        for conversation in (0, 1):
            if pool.may_park(parked[conversation]):
                pool.park()
                parked[conversation] += 1
    assert parked == [40, 40]  # a third of twice the queue's room each
    assert pool.may_park(0)  # and a third conversation finds room
    for _ in range(60):
        pool.park()
    assert [pool.may_park(own) for own in (9, 10)] == [True, False]  # ten in any case


def test_slots_that_the_start_gate_blocks_are_not_usable() -> None:
    (pool,) = counted(Pools(max_queue_size=None), agent := worker(slots=3))
    agent.take_slot(0.0, probe=False)
    pool.slot_taken(agent)
    pool.block_worker(agent)
    assert pool.usable_slots == 1
    pool.unblock_worker(agent)
    assert pool.usable_slots == 3


@pytest.mark.parametrize(("slots", "bound"), [(2, DEFAULT_QUEUE_SIZE), (150, 150)])
def test_the_default_queue_holds_a_hundred_or_the_number_of_slots(slots: int, bound: int) -> None:
    (pool,) = counted(Pools(max_queue_size=None), worker(slots=slots))
    assert pool.queue_bound == bound


def test_spilled_tasks_of_a_better_priority_are_ahead() -> None:
    pool = Pool("a", None)
    pool.add_spilled(Priority.HIGH)
    pool.begin_spill(Priority.NORMAL)
    assert [pool.spilled_ahead(priority) for priority in Priority] == [0, 1, 2, 2]
    pool.end_spill(Priority.NORMAL)
    pool.remove_spilled(Priority.HIGH)
    pool.remove_spilled(Priority.HIGH)  # there were fewer than counted
    assert not any(pool.spilled_ahead(priority) for priority in Priority)


def test_a_pool_that_is_passed_over_too_often_is_served() -> None:
    pools = Pools(max_queue_size=None)
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
    pools = Pools(max_queue_size=None)
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
