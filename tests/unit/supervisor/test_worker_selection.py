"""Worker selection compared with a search through all workers, whatever they run, finish and fail."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.adapters import as_handler
from forebay.breaker import Breaker, BreakerRules
from forebay.supervisor.pools import PoolGroup
from forebay.supervisor.worker import WorkerAgent
from forebay.supervisor.worker_selection import WorkerSelector
from forebay.task import Task

KIND = "work"
TYPICAL = 1.0


async def nothing(_: Task) -> None: ...


def make(name: str, slots: int = 1) -> WorkerAgent:
    return WorkerAgent(
        name,
        as_handler(nothing),
        task_types=[KIND],
        max_concurrent=slots,
        timeout=1.0,
        breaker=Breaker(BreakerRules(), draw=lambda: 0.0),
        probes=1,
        on_revive=lambda _: None,
    )


class Workers:
    """Workers and their selector, updated as the dispatcher updates it."""

    def __init__(self) -> None:
        self.typical = TYPICAL
        self.workers: list[WorkerAgent] = []
        self.selector = WorkerSelector(KIND, lambda: self.typical)

    def add(self, slots: int = 1) -> WorkerAgent:
        worker = make(f"w{len(self.workers)}", slots)
        self.workers.append(worker)
        self.selector.update(worker)
        return worker

    def take(self, worker: WorkerAgent) -> None:
        worker.current_tasks += 1

    def finish(self, worker: WorkerAgent, seconds: float | None = None) -> None:
        worker.current_tasks -= 1
        if seconds is None:
            worker.raise_penalty()
        else:
            worker.record_success(KIND, seconds)
        self.announce(worker)

    def announce(self, worker: WorkerAgent) -> None:
        if worker.can_accept():
            self.selector.update(worker)

    def score(self, worker: WorkerAgent) -> float:
        return worker.score(KIND, self.typical)

    @property
    def accepting(self) -> list[WorkerAgent]:
        return [worker for worker in self.workers if worker.can_accept()]


class GroupedWorkers(Workers):
    """Workers of many task types, whose selectors are told once that a score has fallen."""

    def __init__(self) -> None:
        super().__init__()
        self.group = PoolGroup([])

    def add(self, slots: int = 1) -> WorkerAgent:
        worker = make(f"w{len(self.workers)}", slots)
        self.workers.append(worker)
        self.group.add_worker(worker)
        self.selector.expect(worker, self.group)
        return worker

    def announce(self, worker: WorkerAgent) -> None:
        if worker.can_accept():
            self.group.score_fell(worker)


class SelectionMachine(RuleBasedStateMachine):
    """A state machine: whatever happens to the workers, the pick has the least score of those that can accept."""

    make_fleet: Callable[[], Workers] = Workers

    @initialize(slots=st.lists(st.integers(1, 4), max_size=6))
    def build(self, slots: list[int]) -> None:
        self.fleet = type(self).make_fleet()
        for count in slots:
            self.fleet.add(count)

    def draw(self, data: st.DataObject, workers: list[WorkerAgent]) -> WorkerAgent:
        return data.draw(st.sampled_from(sorted(workers, key=lambda worker: worker.name)))

    @rule(slots=st.integers(1, 4))
    def come(self, slots: int) -> None:
        self.fleet.add(slots)

    @precondition(lambda self: self.fleet.accepting)
    @rule(idle_first=st.booleans())
    def dispatch(self, *, idle_first: bool) -> None:
        worker = self.fleet.selector.pick(idle_first=idle_first)
        assert worker is not None
        self.fleet.take(worker)

    @precondition(lambda self: self.fleet.accepting)
    @rule(data=st.data())
    def take_elsewhere(self, data: st.DataObject) -> None:
        """Have a worker of several pools take a task of another one."""
        self.fleet.take(self.draw(data, self.fleet.accepting))

    @precondition(lambda self: any(worker.current_tasks for worker in self.fleet.workers))
    @rule(data=st.data(), seconds=st.none() | st.floats(0.01, 100.0))
    def finish(self, data: st.DataObject, seconds: float | None) -> None:
        busy = [worker for worker in self.fleet.workers if worker.current_tasks]
        self.fleet.finish(self.draw(data, busy), seconds)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data())
    def forgive(self, data: st.DataObject) -> None:
        worker = self.draw(data, self.fleet.workers)
        worker.lower_penalty()
        self.fleet.announce(worker)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data(), failed=st.booleans())
    def fail_or_recover(self, data: st.DataObject, *, failed: bool) -> None:
        worker = self.draw(data, self.fleet.workers)
        worker.failed = failed
        self.fleet.announce(worker)

    @rule(typical=st.floats(0.01, 100.0))
    def pace_of_the_pool_changes(self, typical: float) -> None:
        self.fleet.typical = typical

    @invariant()
    def picks_the_least(self) -> None:
        picked = self.fleet.selector.pick()
        accepting = self.fleet.accepting
        assert (picked is None) == (not accepting)
        if picked is not None:
            assert picked in accepting
            assert self.fleet.score(picked) == pytest.approx(min(map(self.fleet.score, accepting)))

    @invariant()
    def picks_an_idle_one_first_if_asked(self) -> None:
        picked = self.fleet.selector.pick(idle_first=True)
        accepting = self.fleet.accepting
        assert (picked is None) == (not accepting)
        if picked is not None:
            assert picked in accepting
            if any(not worker.current_tasks for worker in accepting):
                assert not picked.current_tasks

    @invariant()
    def keeps_no_more_than_it_needs(self) -> None:
        held = sum(map(len, self.fleet.selector._heaps))
        assert held <= 2 * len(self.fleet.workers) + 16 + 1


TestRouter = SelectionMachine.TestCase
TestRouter.settings = settings(max_examples=60, stateful_step_count=40)


class GroupedSelectionMachine(SelectionMachine):
    make_fleet = GroupedWorkers


TestGroupedRouter = GroupedSelectionMachine.TestCase
TestGroupedRouter.settings = settings(max_examples=60, stateful_step_count=40)


def test_without_workers_none_is_picked() -> None:
    assert WorkerSelector(KIND, lambda: TYPICAL).pick() is None


def test_the_score_is_the_expected_finish() -> None:
    worker = make("w", slots=4)
    worker.record_success(KIND, 8.0)
    worker.current_tasks = 2
    assert worker.score(KIND, TYPICAL) == 3 * 8.0 / 4


def test_a_failure_raises_the_score_by_half_until_it_is_lowered_again() -> None:
    worker = make("w")
    worker.raise_penalty()
    assert worker.score(KIND, TYPICAL) == pytest.approx(1.5)
    worker.raise_penalty()
    assert worker.score(KIND, TYPICAL) == pytest.approx(2.25)
    worker.lower_penalty()
    assert worker.score(KIND, TYPICAL) == pytest.approx(1.5)
    worker.lower_penalty()
    assert worker.score(KIND, TYPICAL) == 1.0


def test_the_penalty_of_many_failures_is_bounded() -> None:
    worker = make("w")
    for _ in range(100):
        worker.raise_penalty()
    assert worker.score(KIND, TYPICAL) < 10.0


def test_the_duration_follows_the_latest_successes() -> None:
    worker = make("w")
    for _ in range(30):
        worker.record_success(KIND, 10.0)
    for _ in range(30):
        worker.record_success(KIND, 1.0)
    assert worker.score(KIND, TYPICAL) == pytest.approx(1.0, rel=0.05)


def test_a_pick_examines_few_workers_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Workers()
    for _ in range(5000):
        fleet.add(slots=2)
    scored = 0
    score = WorkerAgent.score

    def counting(worker: WorkerAgent, task_type: str, typical: float) -> float:
        nonlocal scored
        scored += 1
        return score(worker, task_type, typical)

    monkeypatch.setattr(WorkerAgent, "score", counting)
    for _ in range(5000):
        worker = fleet.selector.pick()
        assert worker is not None
        fleet.take(worker)
        fleet.finish(worker, 1.0)
    assert scored < 10 * 5000
