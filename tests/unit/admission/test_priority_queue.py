"""The priority queue compared with a plain list, under pushes, removals and dequeues in any order."""

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
class Item:
    priority: Priority
    rank: tuple[int, float]
    sequence: int


class QueueMachine(RuleBasedStateMachine):
    """A queue compared with its naive model: a list, and how often each priority was passed over."""

    @initialize(bound=st.integers(1, 5))
    def build(self, bound: int) -> None:
        self.bound = bound
        self.queue: PriorityQueue[Item] = PriorityQueue(starvation_bound=bound)
        self.waiting: dict[Item, QueueEntry] = {}
        self.removed: list[QueueEntry] = []
        self.passed = dict.fromkeys(Priority, 0)
        self.sequence = 0

    def reset_empty_priorities(self) -> None:
        """Reset the count of each priority without items: an item that is pushed later has not waited."""
        for priority in Priority:
            if all(item.priority is not priority for item in self.waiting):
                self.passed[priority] = 0

    def next_item(self) -> Item:
        priorities = {item.priority for item in self.waiting}
        starving = [priority for priority in sorted(priorities) if self.passed[priority] >= self.bound]
        priority = starving[0] if starving else min(priorities)
        return min(
            (item for item in self.waiting if item.priority is priority), key=lambda item: (item.rank, item.sequence)
        )

    @rule(priority=st.sampled_from(Priority), rank=st.sampled_from(RANKS))
    def push(self, priority: Priority, rank: tuple[int, float]) -> None:
        self.sequence += 1
        item = Item(priority, rank, self.sequence)
        self.waiting[item] = self.queue.push(item, priority, rank, self.sequence)

    @rule(count=st.integers(1, 80), priority=st.sampled_from(Priority), rank=st.sampled_from(RANKS))
    def push_many(self, count: int, priority: Priority, rank: tuple[int, float]) -> None:
        for _ in range(count):
            self.push(priority, rank)

    @rule(priority=st.sampled_from(Priority))
    def push_with_an_early_sequence_number(self, priority: Priority) -> None:
        """Push with a smaller sequence number than those before, which is allowed."""
        self.sequence += 1
        item = Item(priority, RANK_LAST, -self.sequence)
        self.waiting[item] = self.queue.push(item, priority, RANK_LAST, -self.sequence)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(list(self.waiting)))
        entry = self.waiting.pop(item)
        self.queue.remove(entry)
        self.removed.append(entry)

    @precondition(lambda self: self.waiting)
    @rule(share=st.integers(1, 4))
    def remove_many(self, share: int) -> None:
        for item in list(self.waiting)[::share]:
            self.queue.remove(self.waiting.pop(item))
        assert len(self.queue) == len(self.waiting)

    @precondition(lambda self: self.removed)
    @rule(data=st.data())
    def remove_again(self, data: st.DataObject) -> None:
        self.queue.remove(data.draw(st.sampled_from(self.removed)))

    @precondition(lambda self: self.waiting)
    @rule(times=st.integers(1, 30))
    def serve(self, times: int) -> None:
        for _ in range(min(times, len(self.waiting))):
            self.reset_empty_priorities()
            expected = self.next_item()
            head = self.queue.head()
            assert head is not None
            assert head[2] is expected
            assert self.queue.pop() is expected
            self.removed.append(self.waiting.pop(expected))
            self.passed[expected.priority] = 0
            for priority in Priority:
                if priority > expected.priority and any(item.priority is priority for item in self.waiting):
                    self.passed[priority] += 1

    @precondition(lambda self: self.waiting)
    @rule(times=st.integers(1, 30), data=st.data())
    def serve_a_promoted_item(self, times: int, data: st.DataObject) -> None:
        """Check that only priorities below the one that the item joined with are passed over."""
        for _ in range(min(times, len(self.waiting))):
            self.reset_empty_priorities()
            expected = self.next_item()
            joined_priority = data.draw(st.sampled_from(list(Priority)[expected.priority :]))
            head = self.queue.head()
            assert head is not None
            assert head[2] is expected
            self.queue.serve(head, joined_priority)
            self.removed.append(self.waiting.pop(expected))
            self.passed[expected.priority] = 0
            for priority in Priority:
                if priority > joined_priority and any(item.priority is priority for item in self.waiting):
                    self.passed[priority] += 1

    @precondition(lambda self: not self.waiting)
    @rule()
    def an_empty_queue_has_no_head(self) -> None:
        assert self.queue.head() is None
        with pytest.raises(IndexError):
            self.queue.pop()

    @invariant()
    def the_queue_equals_the_model(self) -> None:
        self.reset_empty_priorities()
        assert len(self.queue) == len(self.waiting)
        assert bool(self.queue) == bool(self.waiting)
        assert set(self.queue) == set(self.waiting)
        order = sorted(self.waiting, key=lambda item: (item.priority, item.rank, item.sequence))
        if order:
            order.insert(0, order.pop(order.index(self.next_item())))
        assert list(self.queue.in_order()) == order
        for priority in Priority:
            assert self.queue.ahead(priority) == sum(item.priority <= priority for item in self.waiting)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=40)


@given(priorities=st.lists(st.sampled_from(Priority), min_size=1, max_size=200), bound=st.integers(1, 20))
def test_each_priority_is_served_within_the_starvation_bound(priorities: list[Priority], bound: int) -> None:
    queue: PriorityQueue[str] = PriorityQueue(starvation_bound=bound)
    queue.push("low", Priority.LOW, RANK_LAST, 0)
    for sequence, priority in enumerate(priorities, start=1):
        queue.push("other", min(priority, Priority.NORMAL), RANK_LAST, sequence)
        if queue.pop() == "low":
            return
        assert sequence <= 3 * bound + 3  # one higher priority may use up its own bound first
    assert "low" in set(queue)


@pytest.mark.parametrize("rank", [(True, 1.0), RANK_LAST])
def test_removed_entries_are_not_kept(rank: tuple[int, float]) -> None:
    queue: PriorityQueue[int] = PriorityQueue()
    for sequence in range(10_000):
        queue.remove(queue.push(sequence, Priority.NORMAL, rank, sequence))
    assert sum(map(len, [*queue._heaps, *queue._fifos])) < 200
