"""The line against a list that is searched from end to end, whatever joins, leaves and is served, in whatever order."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.admission import RANK_LAST, PriorityQueue, QueueEntry
from forebay.task import Priority

RANKS = [(False, 1.0), (True, 1.0), (True, 2.0), RANK_LAST, RANK_LAST, RANK_LAST]


@dataclass(frozen=True)
class Guest:
    rung: Priority
    rank: tuple[bool, float]
    turn: int


class LineMachine(RuleBasedStateMachine):
    """A line beside its naive model: a list, and how often each rung was passed over."""

    @initialize(floor=st.integers(1, 5))
    def build(self, floor: int) -> None:
        self.floor = floor
        self.line: PriorityQueue[Guest] = PriorityQueue(starvation_bound=floor)
        self.waiting: dict[Guest, QueueEntry] = {}
        self.gone: list[QueueEntry] = []
        self.passed = dict.fromkeys(Priority, 0)
        self.turn = 0

    def forget(self) -> None:
        """Who joins a rung where nobody waits has not waited."""
        for rung in Priority:
            if all(guest.rung is not rung for guest in self.waiting):
                self.passed[rung] = 0

    def next_guest(self) -> Guest:
        rungs = {guest.rung for guest in self.waiting}
        starving = [rung for rung in sorted(rungs) if self.passed[rung] >= self.floor]
        rung = starving[0] if starving else min(rungs)
        return min((guest for guest in self.waiting if guest.rung is rung), key=lambda guest: (guest.rank, guest.turn))

    @rule(rung=st.sampled_from(Priority), rank=st.sampled_from(RANKS))
    def join(self, rung: Priority, rank: tuple[bool, float]) -> None:
        self.turn += 1
        guest = Guest(rung, rank, self.turn)
        self.waiting[guest] = self.line.push(guest, rung, rank, self.turn)

    @rule(count=st.integers(1, 80), rung=st.sampled_from(Priority), rank=st.sampled_from(RANKS))
    def crowd(self, count: int, rung: Priority, rank: tuple[bool, float]) -> None:
        for _ in range(count):
            self.join(rung, rank)

    @rule(rung=st.sampled_from(Priority))
    def come_back(self, rung: Priority) -> None:
        """Join with a turn from before: whoever gives turns may do so."""
        self.turn += 1
        guest = Guest(rung, RANK_LAST, -self.turn)
        self.waiting[guest] = self.line.push(guest, rung, RANK_LAST, -self.turn)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(list(self.waiting)))
        place = self.waiting.pop(guest)
        self.line.remove(place)
        self.gone.append(place)

    @precondition(lambda self: self.waiting)
    @rule(share=st.integers(1, 4))
    def disperse(self, share: int) -> None:
        for guest in list(self.waiting)[::share]:
            self.line.remove(self.waiting.pop(guest))
        assert len(self.line) == len(self.waiting)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def leave_again(self, data: st.DataObject) -> None:
        self.line.remove(data.draw(st.sampled_from(self.gone)))

    @precondition(lambda self: self.waiting)
    @rule(times=st.integers(1, 30))
    def serve(self, times: int) -> None:
        for _ in range(min(times, len(self.waiting))):
            self.forget()
            expected = self.next_guest()
            head = self.line.head()
            assert head is not None
            assert head[2] is expected
            assert self.line.pop() is expected
            self.gone.append(self.waiting.pop(expected))
            self.passed[expected.rung] = 0
            for rung in Priority:
                if rung > expected.rung and any(guest.rung is rung for guest in self.waiting):
                    self.passed[rung] += 1

    @precondition(lambda self: self.waiting)
    @rule(times=st.integers(1, 30), data=st.data())
    def serve_who_was_moved_up(self, times: int, data: st.DataObject) -> None:
        """Only those are passed over who are of lower rungs than the one on which it came."""
        for _ in range(min(times, len(self.waiting))):
            self.forget()
            expected = self.next_guest()
            came_on = data.draw(st.sampled_from(list(Priority)[expected.rung :]))
            head = self.line.head()
            assert head is not None
            assert head[2] is expected
            self.line.serve(head, came_on)
            self.gone.append(self.waiting.pop(expected))
            self.passed[expected.rung] = 0
            for rung in Priority:
                if rung > came_on and any(guest.rung is rung for guest in self.waiting):
                    self.passed[rung] += 1

    @precondition(lambda self: not self.waiting)
    @rule()
    def nobody(self) -> None:
        assert self.line.head() is None
        with pytest.raises(IndexError):
            self.line.pop()

    @invariant()
    def counts(self) -> None:
        self.forget()
        assert len(self.line) == len(self.waiting)
        assert bool(self.line) == bool(self.waiting)
        assert set(self.line) == set(self.waiting)
        row = sorted(self.waiting, key=lambda guest: (guest.rung, guest.rank, guest.turn))
        if row:
            row.insert(0, row.pop(row.index(self.next_guest())))
        assert list(self.line.in_order()) == row
        for rung in Priority:
            assert self.line.ahead(rung) == sum(guest.rung <= rung for guest in self.waiting)


TestLine = LineMachine.TestCase
TestLine.settings = settings(max_examples=40, stateful_step_count=40)


@given(rungs=st.lists(st.sampled_from(Priority), min_size=1, max_size=200), floor=st.integers(1, 20))
def test_under_a_flood_of_better_work_each_rung_is_served_within_its_floor(rungs: list[Priority], floor: int) -> None:
    line: PriorityQueue[str] = PriorityQueue(starvation_bound=floor)
    line.push("low", Priority.LOW, RANK_LAST, 0)
    for turn, rung in enumerate(rungs, start=1):
        line.push("other", min(rung, Priority.NORMAL), RANK_LAST, turn)
        if line.pop() == "low":
            return
        assert turn <= 3 * floor + 3  # one better rung may take its own floor first
    assert "low" in set(line)


@pytest.mark.parametrize("rank", [(True, 1.0), RANK_LAST])
def test_those_who_left_are_not_kept(rank: tuple[bool, float]) -> None:
    line: PriorityQueue[int] = PriorityQueue()
    for turn in range(10_000):
        line.remove(line.push(turn, Priority.NORMAL, rank, turn))
    assert sum(map(len, [*line._heaps, *line._queues])) < 200
