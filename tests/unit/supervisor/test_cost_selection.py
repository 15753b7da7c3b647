"""Cost selection compared with a search through all workers, whatever they cost, run, finish and fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.adapters import as_handler
from forebay.breaker import Breaker, BreakerRules
from forebay.supervisor.cost_selection import _SAME_TIME, NO_COST, CostSelector, compared_cost
from forebay.supervisor.pool import Pool
from forebay.supervisor.pools import PoolGroup, Pools
from forebay.supervisor.tenants import Tenants
from forebay.supervisor.worker import WorkerAgent
from forebay.supervisor.worker_selection import WorkerSelector
from forebay.task import Priority, Task

KIND = "work"
NORMAL = Priority.NORMAL
COSTS = (None, 0.0, 0.002, 0.00201, 0.02)
_LEARNED_APART = 1.5**2  # two learned costs of one class may each differ from it by half


async def nothing(_: Task) -> None: ...


def make(name: str, cost: float | Mapping[str, float] | None = None, slots: int = 1, **settings: Any) -> WorkerAgent:
    return WorkerAgent(
        name,
        as_handler(nothing),
        max_concurrent=slots,
        timeout=1.0,
        breaker=Breaker(BreakerRules(), draw=lambda: 0.0),
        probes=1,
        on_revive=lambda _: None,
        cost=cost,
        **{"task_types": [KIND], **settings},
    )


class Fleet:
    """Workers and their selector, updated as the dispatcher updates it."""

    def __init__(self) -> None:
        self.median: float | None = None
        self.workers: list[WorkerAgent] = []
        self.selector = CostSelector(KIND, lambda: self.median)

    def add(self, cost: float | None = None, slots: int = 1, seconds: float | None = None) -> WorkerAgent:
        worker = make(f"w{len(self.workers)}", cost, slots)
        self.workers.append(worker)
        if seconds is not None:
            worker.record_success(KIND, seconds)
        self.announce(worker, new=True)
        return worker

    def take(self, worker: WorkerAgent) -> None:
        worker.current_tasks += 1

    def finish(self, worker: WorkerAgent, seconds: float | None = None, usd: float | None = None) -> None:
        worker.current_tasks -= 1
        if seconds is None:
            worker.raise_penalty()
        else:
            worker.record_success(KIND, seconds)
            if worker.given_cost(KIND) is None:
                worker.record_cost(KIND, usd)
            self.selector.record(0.0, worker, seconds)
        self.announce(worker)

    def announce(self, worker: WorkerAgent, *, new: bool = False) -> None:
        if new or worker.can_accept():
            self.selector.update(worker)

    def cheapest(self, within: float = math.inf, now: float = 0.0, priority: Priority = NORMAL) -> WorkerAgent | None:
        return self.selector.pick_cheapest(now, within, priority)


class GroupedFleet(Fleet):
    """Workers of many task types, whose selectors are asked to update once their scores have fallen."""

    def __init__(self) -> None:
        super().__init__()
        self.group = PoolGroup([])

    def announce(self, worker: WorkerAgent, *, new: bool = False) -> None:
        if new:
            self.group.add_worker(worker)
            self.selector.expect(worker, self.group)
        elif worker.can_accept():
            self.group.score_fell(worker)


class CostMachine(RuleBasedStateMachine):
    """A state machine: no dearer worker is picked while a cheaper one that can accept makes the deadline."""

    make_fleet: type[Fleet] = Fleet

    @initialize(workers=st.lists(st.tuples(st.sampled_from(COSTS), st.integers(1, 4)), max_size=6))
    def build(self, workers: list[tuple[float | None, int]]) -> None:
        self.fleet = self.make_fleet()
        for cost, slots in workers:
            self.fleet.add(cost, slots)

    @rule(cost=st.sampled_from(COSTS), slots=st.integers(1, 4), seconds=st.none() | st.floats(0.1, 100.0))
    def come(self, cost: float | None, slots: int, seconds: float | None) -> None:
        self.fleet.add(cost, slots, seconds)

    @precondition(lambda self: self.accepting)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        self.fleet.take(data.draw(st.sampled_from(self.accepting)))

    @precondition(lambda self: any(worker.current_tasks for worker in self.fleet.workers))
    @rule(
        data=st.data(), seconds=st.none() | st.floats(0.01, 100.0), usd=st.none() | st.sampled_from((0.0, 0.001, 0.1))
    )
    def finish(self, data: st.DataObject, seconds: float | None, usd: float | None) -> None:
        busy = [worker for worker in self.fleet.workers if worker.current_tasks]
        self.fleet.finish(data.draw(st.sampled_from(busy)), seconds, usd)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data())
    def forgive(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.fleet.workers))
        worker.lower_penalty()
        self.fleet.announce(worker)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data(), failed=st.booleans())
    def fail_or_recover(self, data: st.DataObject, *, failed: bool) -> None:
        worker = data.draw(st.sampled_from(self.fleet.workers))
        worker.failed = failed
        self.fleet.announce(worker)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data(), seconds=st.floats(0.1, 100.0))
    def cut_off(self, data: st.DataObject, seconds: float) -> None:
        worker = data.draw(st.sampled_from(self.fleet.workers))
        self.fleet.selector.record_cut_off(0.0, worker, seconds)
        self.fleet.announce(worker)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.fleet.workers))
        self.fleet.workers.remove(worker)
        self.fleet.selector.forget(worker)

    @rule(median=st.none() | st.floats(0.01, 100.0))
    def pace_of_the_pool_changes(self, median: float | None) -> None:
        self.fleet.median = median

    @property
    def accepting(self) -> list[WorkerAgent]:
        return [worker for worker in self.fleet.workers if worker.can_accept()]

    def is_fast(self, worker: WorkerAgent) -> bool:
        seconds = {each: self.fleet.selector.expected_time(each) * each.penalty for each in self.accepting}
        return seconds[worker] <= _SAME_TIME * 1.001 * min(seconds.values())

    def is_untried(self, worker: WorkerAgent) -> bool:
        trial = self.fleet.selector._trials.get(worker)
        return trial is not None and trial.due <= 0.0 and not worker.current_tasks

    @invariant()
    def picks_the_cheapest_that_makes_it(self) -> None:
        for within in (math.inf, 0.0, 1.0, 10.0, 100.0):
            picked, accepting = self.fleet.cheapest(within), self.accepting
            assert (picked is None) == (not accepting)
            if picked is None:
                continue
            assert picked in accepting
            able = [
                worker
                for worker in accepting
                if worker.cost(KIND) is not None
                and worker.penalty == 1.0
                and (within == math.inf or self.fleet.selector.expected_time(worker) <= within)
            ]
            if self.is_untried(picked):
                continue
            if not able:
                assert self.is_fast(picked)
                continue
            assert picked in able
            given = [cost for worker in able if (cost := worker.given_cost(KIND)) is not None]
            cost, learned = picked.cost(KIND), [worker.cost(KIND) for worker in able]
            assert cost is not None
            if picked.given_cost(KIND) is not None and given:
                assert compared_cost(cost) <= compared_cost(min(given))
            assert all(cost <= _LEARNED_APART * 1.05 * (other or 0.0) for other in learned)

    @invariant()
    def picks_one_of_the_fastest_where_costs_are_no_matter(self) -> None:
        picked, accepting = self.fleet.selector.pick(), self.accepting
        assert (picked is None) == (not accepting)
        assert picked is None or self.is_fast(picked)

    @invariant()
    def keeps_no_more_than_it_needs(self) -> None:
        selector = self.fleet.selector
        assert set(selector._filed) <= {*self.fleet.workers}
        assert sorted(selector._classes) == selector._costs
        for found in selector._classes.values():
            assert found.workers
            for each in (found.by_score, found.by_speed):
                assert sum(map(len, each._heaps)) <= 2 * len(found.workers) + 16 + 1


TestCosts = CostMachine.TestCase
TestCosts.settings = settings(max_examples=60, stateful_step_count=40)


class GroupedCostMachine(CostMachine):
    make_fleet = GroupedFleet


TestGroupedCosts = GroupedCostMachine.TestCase
TestGroupedCosts.settings = settings(max_examples=60, stateful_step_count=40)


# --- which worker -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_without_a_deadline_the_cheapest_worker_is_picked_however_slow(fleet: Fleet) -> None:
    fleet.add(0.02, slots=10, seconds=1.0)
    light = fleet.add(0.002, seconds=100.0)
    assert fleet.cheapest() is light


def test_a_worker_is_too_slow_if_an_average_run_would_make_it_but_not_nearly_all(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002, seconds=10.0)
    assert fleet.cheapest(12.0) is heavy
    assert fleet.cheapest(25.0) is light


def test_a_worker_whose_times_vary_is_not_trusted_with_a_deadline_that_half_of_them_miss(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002)
    for number in range(40):
        fleet.take(light)
        fleet.finish(light, (5.0, 15.0)[number % 2])
    assert fleet.cheapest(12.0) is heavy
    assert fleet.cheapest(25.0) is light


def test_a_worker_with_steady_times_is_trusted_with_short_deadlines(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002)
    for _ in range(40):
        fleet.take(light)
        fleet.finish(light, 10.0)
    assert fleet.cheapest(11.0) is light
    assert fleet.cheapest(9.9) is heavy


def test_of_one_cost_the_least_score_is_picked_and_a_fast_one_if_that_is_too_slow(fleet: Fleet) -> None:
    fast = fleet.add(0.002, slots=2, seconds=4.0)
    slow = fleet.add(0.002, slots=20, seconds=20.0)
    fleet.add(0.02, slots=50, seconds=1.0)
    fleet.take(fast)
    assert fleet.cheapest() is slow
    assert fleet.cheapest(15.0) is fast


def test_costs_that_are_the_same_to_two_digits_count_as_equal(fleet: Fleet) -> None:
    fleet.add(0.002, seconds=4.0)
    faster = fleet.add(0.00201, seconds=1.0)
    assert fleet.cheapest() is faster


def test_if_no_worker_makes_it_the_fastest_is_picked(fleet: Fleet) -> None:
    heavy = fleet.add(0.02, seconds=3.0)
    fleet.add(0.002, seconds=10.0)
    assert fleet.cheapest(1.0) is heavy


def test_a_worker_that_has_failed_lately_comes_last(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002, seconds=1.0)
    fleet.take(light)
    fleet.finish(light)
    assert fleet.cheapest() is heavy
    light.lower_penalty()
    fleet.announce(light)
    assert fleet.cheapest() is light


def test_one_that_fails_is_passed_over_although_nobody_has_told_the_selector(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002, seconds=1.0)
    light.raise_penalty()
    assert fleet.cheapest() is heavy


def test_a_worker_without_a_cost_comes_after_those_with_one(fleet: Fleet) -> None:
    unknown, dear = fleet.add(seconds=1.0), fleet.add(5.0, seconds=10.0)
    fleet.take(unknown)
    fleet.finish(unknown, 1.0)
    assert fleet.cheapest() is dear
    assert fleet.cheapest(5.0) is unknown


def test_a_worker_whose_cost_is_not_known_is_tried_with_one_task(fleet: Fleet) -> None:
    fleet.add(0.02, slots=10, seconds=1.0)
    light = fleet.add(slots=10)
    assert fleet.cheapest() is light
    fleet.take(light)
    assert fleet.cheapest() is not light
    fleet.finish(light, 10.0, usd=0.002)
    assert fleet.cheapest() is light


def test_a_free_run_counts_once_others_have_cost_something() -> None:
    worker = make("w")
    worker.record_cost(KIND, None)
    assert worker.cost(KIND) is None
    worker.record_cost(KIND, 1.0)
    worker.record_cost(KIND, None)
    assert worker.cost(KIND) == pytest.approx(0.8)


def test_learned_costs_of_equal_workers_count_as_equal_though_runs_differ(fleet: Fleet) -> None:
    first, second = fleet.add(slots=2, seconds=1.0), fleet.add(slots=2, seconds=1.0)
    for worker, usd in ((first, 1.0), (second, 1.3)):
        fleet.take(worker)
        fleet.finish(worker, 1.0, usd)
    fleet.take(first)
    assert fleet.cheapest() is second


def test_a_cost_that_falls_makes_the_worker_the_cheapest(fleet: Fleet) -> None:
    other, worker = fleet.add(0.5, seconds=1.0), fleet.add(seconds=1.0)
    for usd in (1.0, *[0.1] * 20):
        fleet.take(worker)
        fleet.finish(worker, 1.0, usd)
    assert fleet.cheapest() is worker
    assert other.cost(KIND) == 0.5


# --- deadlines that were missed ---------------------------------------------------------------------------------------


def test_a_worker_whose_runs_are_cut_off_is_not_taken_for_a_fast_one(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002)
    fleet.median = 1.0
    assert fleet.cheapest(8.0) is light
    fleet.selector.record_cut_off(0.0, light, 8.0)
    fleet.announce(light)
    assert fleet.cheapest(8.0) is heavy


def test_a_run_that_was_cut_off_early_tells_nothing(fleet: Fleet) -> None:
    light = fleet.add(0.002)
    fleet.take(light)
    fleet.finish(light, 10.0)
    before = fleet.selector.expected_time(light)
    fleet.selector.record_cut_off(0.0, light, 1.0)
    assert fleet.selector.expected_time(light) == before


def test_a_cost_that_was_slow_for_a_time_is_tried_again_and_less_often_if_in_vain(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002)
    fleet.selector.record_cut_off(0.0, light, 50.0)
    fleet.announce(light)
    tried = []
    for now in range(400):
        picked = fleet.cheapest(50.0, now=float(now))
        if picked is light:
            tried.append(now)
            fleet.selector.record_cut_off(float(now), light, 50.0)
        else:
            assert picked is heavy
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert tried
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 2 * gaps[0]


def test_a_task_without_a_chance_is_not_used_to_try_a_slow_cost(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=1.0), fleet.add(0.002, seconds=100.0)
    assert {fleet.cheapest(40.0, now=float(now)) for now in range(0, 3_000, 10)} == {heavy}
    assert fleet.cheapest(70.0, now=3_000.0) is light


def test_a_task_without_the_time_of_the_fastest_success_never_tries_a_slow_cost(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, seconds=0.1), fleet.add(0.002, seconds=10.0)
    for _ in range(6):
        fleet.take(light)
        fleet.finish(light, 10.0)
    assert {fleet.cheapest(2.0, now=3_000.0 * hour) for hour in range(20)} == {heavy}
    for _ in range(10):
        fleet.take(light)
        fleet.finish(light, 100.0)
    assert fleet.cheapest(11.0, now=100_000.0) is light  # it may be fast again


# --- who is in a hurry ---


def test_many_slots_make_no_worker_fast(fleet: Fleet) -> None:
    heavy = fleet.add(0.02, slots=1, seconds=1.0)
    fleet.add(0.002, slots=20, seconds=10.0)
    assert fleet.selector.pick(Priority.HIGH, idle_first=True) is heavy
    assert fleet.cheapest(0.5) is heavy


def test_an_idle_worker_is_preferred_only_if_it_is_about_as_fast(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, slots=4, seconds=1.0), fleet.add(0.002, seconds=10.0)
    fleet.take(heavy)
    assert fleet.selector.pick(Priority.HIGH, idle_first=True) is heavy
    middle = fleet.add(0.01, seconds=1.2)
    assert fleet.selector.pick(Priority.HIGH, idle_first=True) is middle
    assert light.current_tasks == 0


# --- costs to be learned ---


def test_a_run_that_cost_nothing_is_not_the_last_trial(fleet: Fleet) -> None:
    heavy, light = fleet.add(0.02, slots=10, seconds=1.0), fleet.add(slots=10)
    fleet.take(light)
    fleet.finish(light, 1.0, usd=None)
    tried = []
    for now in range(3_600):
        if (picked := fleet.cheapest(now=float(now))) is light:
            tried.append(now)
            fleet.selector.record(float(now), light, 1.0)
        else:
            assert picked is heavy
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert 4 <= len(tried) <= 10
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 2 * gaps[0]


def test_a_busy_worker_keeps_no_other_from_being_tried(fleet: Fleet) -> None:
    fleet.add(0.02, slots=10, seconds=1.0)
    busy = [fleet.add(slots=50) for _ in range(12)]
    for worker in busy:
        fleet.take(worker)
    light = fleet.add(slots=10)
    assert light in {fleet.cheapest() for _ in range(10)}


# --- speed ------------------------------------------------------------------------------------------------------------


def test_a_pick_examines_few_workers_however_many_there_are(monkeypatch: pytest.MonkeyPatch, fleet: Fleet) -> None:
    for number in range(4000):
        fleet.add((0.002, 0.02)[number % 2], slots=2, seconds=10.0)
    examined = 0
    can_accept = WorkerAgent.can_accept

    def counting(worker: WorkerAgent) -> bool:
        nonlocal examined
        examined += 1
        return can_accept(worker)

    monkeypatch.setattr(WorkerAgent, "can_accept", counting)
    taken: list[WorkerAgent] = []
    for number in range(6000):
        worker = fleet.cheapest((math.inf, 30.0, 5.0)[number % 3])
        assert worker is not None
        fleet.take(worker)
        taken.append(worker)
        if len(taken) > 4500:
            fleet.finish(taken.pop(0), 10.0)
    assert examined < 12 * 6000


# --- when a pool selects by cost --------------------------------------------------------------------------------------


def pool_of(*workers: WorkerAgent) -> Pool:
    pools = Pools(None, Tenants({}))
    for worker in workers:
        pools.add_worker(worker)
        worker.count_slots()
        for counts in pools.counts_of[worker]:
            counts.count_slots(worker, 0)
            counts.score_fell(worker)
    return pools.by_type[KIND]


@pytest.mark.parametrize("cost", [None, 0.0, 0.02, {KIND: 0.02}, {"other": 1.0}])
def test_workers_of_one_cost_are_selected_as_if_there_were_no_costs(cost: float | None) -> None:
    kinds = [KIND, "other"]
    pool = pool_of(*(make(f"w{number}", cost, task_types=kinds) for number in range(3)))
    assert isinstance(pool.selector, WorkerSelector)
    assert not pool.tracks_costs


@pytest.mark.parametrize(("first", "second"), [(None, 0.02), (0.02, None), (0.02, 0.03), ({KIND: 1.0}, {"other": 1.0})])
def test_a_pool_selects_by_cost_once_two_workers_differ(first: Any, second: Any) -> None:
    kinds = [KIND, "other"]
    pool = pool_of(make("first", first, task_types=kinds), make("second", second, task_types=kinds))
    assert isinstance(pool.selector, CostSelector)


def test_a_pool_selects_by_cost_once_one_of_two_workers_has_learned_its_own() -> None:
    first, second = make("first"), make("second")
    pool = pool_of(first, second)
    pool.record_cost(0.0, first, 1.0, 0.02)
    assert pool.by_cost is not None
    assert pool.by_cost.pick_cheapest(0.0, math.inf, NORMAL) is second  # to learn its cost
    second.record_success(KIND, 1.0)
    pool.record_cost(0.0, second, 1.0, 0.5)
    pool.score_fell(second)
    assert pool.by_cost.pick_cheapest(0.0, math.inf, NORMAL) is first


def test_a_worker_that_joins_one_that_has_learned_its_cost_is_tried() -> None:
    first, second = make("first"), make("second")
    pools = Pools(None, Tenants({}))
    pools.add_worker(first)
    pool = pools.by_type[KIND]
    pool.record_cost(0.0, first, 1.0, 0.02)
    assert isinstance(pool.selector, WorkerSelector)
    pools.add_worker(second)
    assert pool.by_cost is not None
    assert pool.by_cost.compared_cost_of(first) == 0.02
    assert pool.by_cost.compared_cost_of(second) == NO_COST


def test_workers_of_many_types_are_known_to_a_selector_by_cost() -> None:
    kinds = [KIND, *(f"kind-{number}" for number in range(20))]
    heavy, light = make("heavy", 0.02, task_types=kinds), make("light", 0.002, task_types=kinds)
    pool = pool_of(heavy, light)
    assert pool.by_cost is not None
    assert pool.by_cost.pick_cheapest(0.0, math.inf, NORMAL) is light
    light.current_tasks += 1
    assert pool.by_cost.pick_cheapest(0.0, math.inf, NORMAL) is heavy
    light.current_tasks -= 1
    for counts in pool._groups:
        counts.score_fell(light)  # type: ignore[attr-defined]
    assert pool.by_cost.pick_cheapest(0.0, math.inf, NORMAL) is light
