"""The queue in which tenants take turns, compared with a plain model; and the shares that the turns give."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forebay.admission import RANK_LAST, PriorityQueue, QueueEntry, TenantQueue, TenantTurns
from forebay.supervisor.spilled_counts import SpilledCounts
from forebay.task import Priority

RANKS = [(0, 1.0), (1, 2.0), (2, 1.0), (2, 2.0), RANK_LAST, RANK_LAST]
TENANTS = ["a", "b", "c"]


@dataclass(frozen=True)
class Item:
    priority: Priority
    rank: tuple[int, float]
    sequence: int
    tenant: str


def tenant_of(item: Item) -> str:
    return item.tenant


class TenantQueueMachine(RuleBasedStateMachine):
    """A queue compared with what must hold of it: the order but for turns, the lengths, and who is blocked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked: set[str] = set()
        self.queue: TenantQueue[Item] = TenantQueue(tenant_of, {"a": 3.0}, blocked=self.blocked)
        self.waiting: dict[Item, QueueEntry] = {}
        self.sequence = 0

    @rule(
        count=st.integers(1, 40),
        priority=st.sampled_from(Priority),
        rank=st.sampled_from(RANKS),
        tenant=st.sampled_from(TENANTS),
    )
    def push(self, count: int, priority: Priority, rank: tuple[int, float], tenant: str) -> None:
        for _ in range(count):
            self.sequence += 1
            item = Item(priority, rank, self.sequence, tenant)
            self.waiting[item] = self.queue.push(item, priority, rank, self.sequence)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), twice=st.booleans())
    def remove(self, data: st.DataObject, twice: bool) -> None:  # noqa: FBT001 - drawn
        entry = self.waiting.pop(data.draw(st.sampled_from(list(self.waiting))))
        self.queue.remove(entry)
        if twice:
            self.queue.remove(entry)

    @precondition(lambda self: self.waiting)
    @rule(share=st.integers(1, 4))
    def remove_many(self, share: int) -> None:
        for item in list(self.waiting)[::share]:
            self.queue.remove(self.waiting.pop(item))

    @rule(tenant=st.sampled_from(TENANTS))
    def block_or_unblock(self, tenant: str) -> None:
        if tenant in self.blocked:
            self.blocked.remove(tenant)
            self.queue.unblock(tenant)
        else:
            self.blocked.add(tenant)
            self.queue.block(tenant)

    @rule(times=st.integers(1, 20))
    def serve(self, times: int) -> None:
        for _ in range(times):
            able = [item for item in self.waiting if item.tenant not in self.blocked]
            head = self.queue.head()
            if not able:
                assert head is None
                with pytest.raises(IndexError):
                    self.queue.pop()
                return
            assert head is not None
            item = head[2]
            assert item in able
            if not self.queue.is_overdue(item.priority):
                assert item.priority == min(item.priority for item in able)
            same = [other for other in able if other.priority is item.priority]
            assert item.rank[0] == min(other.rank[0] for other in same)
            mine = [other for other in same if other.tenant == item.tenant]
            assert item == min(mine, key=lambda other: (other.rank, other.sequence))
            assert self.queue.pop() is item
            del self.waiting[item]

    @invariant()
    def the_lengths_are_right(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert set(self.queue) == set(self.waiting)
        counts = Counter(item.priority for item in self.waiting)
        assert list(self.queue.lengths) == [counts[priority] for priority in Priority]
        order = sorted(self.waiting, key=lambda item: (item.priority, item.rank, item.sequence))
        assert list(self.queue.in_order()) == order
        for tenant in TENANTS:
            mine = [item for item in self.waiting if item.tenant == tenant]
            assert self.queue.length_of(tenant) == len(mine)
            assert self.queue.length_in_group(tenant, 0) == sum(item.rank[0] == 0 for item in mine)


TestTenantQueue = TenantQueueMachine.TestCase
TestTenantQueue.settings = settings(max_examples=40, stateful_step_count=30)


def served(queue: TenantQueue[str], count: int) -> list[str]:
    return [queue.pop()[0] for _ in range(count)]


def pushed(weights: dict[str, float], lengths: dict[str, int]) -> TenantQueue[str]:
    queue: TenantQueue[str] = TenantQueue(lambda item: item[0], weights)
    for sequence, item in enumerate(f"{tenant}{n}" for tenant, length in lengths.items() for n in range(length)):
        queue.push(item, Priority.NORMAL, RANK_LAST, sequence)
    return queue


@given(
    weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0]), min_size=2),
    turns=st.integers(100, 300),
)
def test_turns_are_shared_by_weight(weights: dict[str, float], turns: int) -> None:
    counts = Counter(served(pushed(weights, dict.fromkeys(weights, 300)), turns))
    for tenant, weight in weights.items():
        assert abs(counts[tenant] - turns * weight / sum(weights.values())) <= 1 + len(weights)


@given(flood=st.integers(1, 500), served_before=st.integers(0, 400), weight=st.sampled_from([1.0, 2.0, 0.5]))
def test_the_next_item_of_another_tenant_waits_for_its_turn_alone(
    flood: int, served_before: int, weight: float
) -> None:
    queue = pushed({"b": weight}, {"a": flood})
    served(queue, min(served_before, flood))
    for number in range(5):
        queue.push(f"b{number}", Priority.NORMAL, RANK_LAST, 10_000 + number)
    order = served(queue, len(queue))
    for number in range(5):
        position = [index for index, tenant in enumerate(order) if tenant == "b"][number]
        assert position <= number + (number + 1) / weight + 1


def test_a_tenant_that_was_idle_saves_no_turns() -> None:
    queue = pushed({}, {"a": 100, "b": 1})
    assert served(queue, 60).count("b") == 1
    for number in range(40):
        queue.push(f"b{number}", Priority.NORMAL, RANK_LAST, 1000 + number)
    assert 9 <= served(queue, 20).count("b") <= 11


def test_a_blocked_tenant_saves_no_turns() -> None:
    blocked = {"b"}
    queue: TenantQueue[str] = TenantQueue(lambda item: item[0], {}, blocked=blocked)
    for sequence in range(200):
        queue.push("ab"[sequence % 2], Priority.NORMAL, RANK_LAST, sequence)
    assert served(queue, 50) == ["a"] * 50
    blocked.clear()
    queue.unblock("b")
    assert 9 <= served(queue, 20).count("b") <= 11


def test_entries_that_are_taken_over_can_be_removed() -> None:
    plain: PriorityQueue[str] = PriorityQueue()
    entries = [plain.push(f"a{number}", Priority.LOW, RANK_LAST, number) for number in range(4)]
    queue: TenantQueue[str] = TenantQueue(lambda item: item[0], {})
    queue.take_over(plain)
    queue.push("b0", Priority.LOW, RANK_LAST, 9)
    queue.remove(entries[0])
    assert [queue.pop() for _ in range(4)] == ["a1", "b0", "a2", "a3"]
    assert not queue


def test_removed_entries_and_tenants_are_not_kept() -> None:
    queue: TenantQueue[str] = TenantQueue(lambda item: item, {})
    for sequence in range(10_000):
        queue.remove(queue.push(str(sequence), Priority.NORMAL, RANK_LAST, sequence))
        queue.remove(queue.push("same", Priority.NORMAL, (2, float(-sequence)), sequence + 20_000))
    (lanes,) = queue._lanes[Priority.NORMAL].values()
    assert not lanes.by_tenant
    assert len(lanes.turns._present._heap) < 200
    keeper = queue.push("keeper", Priority.NORMAL, RANK_LAST, 10**6)
    for sequence in range(10_000):
        queue.remove(queue.push("keeper", Priority.NORMAL, RANK_LAST, sequence))
    assert sum(map(len, lanes.by_tenant.values())) < 200
    assert queue.head() is keeper


def test_turns_of_many_tenants_are_forgotten() -> None:
    turns = TenantTurns({})
    turns.join("stays")
    for number in range(10_000):
        turns.join(str(number))
        turns.leave(str(number))
    assert len(turns._present._heap) < 100
    assert turns.next() == "stays"
    assert list(turns) == ["stays"]


def test_what_goes_ahead_of_a_new_item_is_counted_by_turns() -> None:
    queue = pushed({"a": 1.0, "b": 2.0}, {"a": 100})
    ahead = {tenant: queue.ahead_of(tenant, Priority.NORMAL, 2) for tenant in "ab"}
    assert ahead == {"a": 100, "b": 1}
    queue.push("b0", Priority.NORMAL, RANK_LAST, 1000)
    assert queue.ahead_of("b", Priority.NORMAL, 2) == 3  # its own, and a turn or two of the other


# --- items elsewhere ---


def test_items_elsewhere_keep_the_turn_of_their_tenant_until_they_are_here() -> None:
    queue = pushed({}, {"a": 100})
    for tenant in "bc":
        queue.begin_elsewhere(tenant, Priority.NORMAL)
    elsewhere = {"b": 5, "c": 1}
    assert queue.shares(Priority.NORMAL, 1, elsewhere) == {}  # the first turn is that of "a"
    assert queue.shares(Priority.NORMAL, 9, elsewhere) == {"b": 4, "c": 1}
    assert queue.shares(Priority.NORMAL, 2, elsewhere, overdue=True) == {"b": 1, "c": 1}
    assert served(queue, 10) == ["a"] * 10
    for number, tenant in enumerate("bbc"):
        queue.push(tenant, Priority.NORMAL, RANK_LAST, 1000 + number)
    assert served(queue, 4) == ["b", "c", "b", "a"]  # "a" has had more turns than "b" would have had


def test_a_tenant_with_items_elsewhere_gets_no_second_turn_by_coming_and_going() -> None:
    queue = pushed({}, {"a": 100})
    queue.begin_elsewhere("b", Priority.NORMAL)
    order = []
    for number in range(20):
        if not queue.length_of("b"):
            queue.push("b", Priority.NORMAL, RANK_LAST, 1000 + number)
        order += served(queue, 1)
    assert order.count("b") == 10
    queue.end_elsewhere("b", Priority.NORMAL)
    assert queue.shares(Priority.NORMAL, 9, {}) == {}


def test_a_blocked_tenant_has_no_share_of_what_comes_back() -> None:
    blocked = {"b"}
    queue: TenantQueue[str] = TenantQueue(lambda item: item[0], {}, blocked=blocked)
    for tenant in "bc":
        queue.begin_elsewhere(tenant, Priority.NORMAL)
    for sequence in range(3):
        queue.push("b", Priority.NORMAL, RANK_LAST, sequence)
    assert queue.shares(Priority.NORMAL, 4, {"b": 5, "c": 5}) == {"c": 4}
    assert list(queue.lengths_without_blocked()) == [0, 0, 0, 0]


@given(
    weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2),
    turns=st.integers(1, 100),
    here=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 20)),
)
def test_shares_are_what_the_next_turns_would_serve(
    weights: dict[str, float], turns: int, here: dict[str, int]
) -> None:
    queue, all_here = pushed(weights, here), pushed(weights, here)
    elsewhere = dict.fromkeys(weights, 30)
    for number, tenant in enumerate(weights):
        queue.begin_elsewhere(tenant, Priority.NORMAL)
        for each in range(30):
            all_here.push(f"{tenant}{each}", Priority.NORMAL, RANK_LAST, 1000 + 100 * number + each)
    shares = queue.shares(Priority.NORMAL, turns, elsewhere)
    counts = Counter(served(all_here, min(turns, len(all_here))))
    expected = {tenant: counts[tenant] - here.get(tenant, 0) for tenant in weights}
    assert shares == {tenant: count for tenant, count in expected.items() if count > 0}


def test_tenants_that_were_elsewhere_are_forgotten() -> None:
    turns = TenantTurns({})
    turns.join("stays")
    for number in range(10_000):
        turns.begin_elsewhere(str(number))
        turns.join(str(number))
        turns.leave(str(number))
        turns.end_elsewhere(str(number))
    assert len(turns._absent._heap) < 100
    assert not turns._absent.by_tenant
    assert list(turns) == ["stays"]


class CountedName(str):
    """A name that counts how often a table is asked for it."""

    asked = 0
    __slots__ = ()

    def __hash__(self) -> int:
        CountedName.asked += 1
        return str.__hash__(self)


def test_each_of_many_tenants_takes_as_little_time_as_of_few() -> None:
    turns = TenantTurns({})
    elsewhere: dict[str, int] = {CountedName(number): 1 for number in range(2000)}
    for tenant in elsewhere:
        turns.begin_elsewhere(tenant)
    CountedName.asked = 0
    while elsewhere:  # as they come back from the overflow, in the order of their turns
        tenant = next(iter(turns.shares(1, here={}, elsewhere=elsewhere)))
        turns.join(tenant)
        turns.end_elsewhere(tenant)
        turns.serve(tenant)
        turns.leave(tenant)
        del elsewhere[tenant]
    assert CountedName.asked < 2000 * 50


@given(
    here=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 20)),
    elsewhere=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 20)),
    blocked=st.sets(st.sampled_from("abef")),
    tenant=st.sampled_from("abg"),
)
def test_what_goes_ahead_counts_what_is_elsewhere(
    here: dict[str, int], elsewhere: dict[str, int], blocked: set[str], tenant: str
) -> None:
    weights = {"a": 3.0, "e": 0.5}
    queue: TenantQueue[str] = TenantQueue(str, weights, blocked=blocked)
    for number, name in enumerate(sorted(Counter(here).elements())):
        queue.push(name, Priority.NORMAL, RANK_LAST, number)
    spilled = SpilledCounts(lambda name: weights.get(name, 1.0))
    for name in (*elsewhere, *elsewhere):
        spilled.set(Priority.NORMAL, name, 30)
        spilled.set(Priority.NORMAL, name, elsewhere[name])
    own = here.get(tenant, 0) + elsewhere.get(tenant, 0)
    expected = own + sum(
        min(
            here.get(name, 0) + elsewhere.get(name, 0),
            int((own + 1) * weights.get(name, 1.0) / weights.get(tenant, 1.0) + 1),
        )
        for name in {*here, *elsewhere} - {tenant} - blocked
    )
    assert expected == queue.ahead_of(
        tenant,
        Priority.NORMAL,
        RANK_LAST[0],
        elsewhere=spilled.of(Priority.NORMAL),
        tenants_elsewhere=spilled.tenants(Priority.NORMAL),
        behind=elsewhere.get(tenant, 0),
    )
    assert spilled.servable(blocked)[Priority.NORMAL] == sum(
        count for name, count in elsewhere.items() if name not in blocked
    )
    for name in elsewhere:
        spilled.set(Priority.NORMAL, name, 0)
    assert not spilled.tenants(Priority.NORMAL)


def test_what_goes_ahead_is_found_without_a_look_at_each_tenant_elsewhere() -> None:
    queue: TenantQueue[str] = TenantQueue(str, {})
    spilled = SpilledCounts(lambda _: 1.0)
    for number in range(2000):
        spilled.set(Priority.NORMAL, CountedName(number), 1)
    of, tenants = spilled.of(Priority.NORMAL), spilled.tenants(Priority.NORMAL)
    CountedName.asked = 0
    ahead = queue.ahead_of("new", Priority.NORMAL, RANK_LAST[0], elsewhere=of, tenants_elsewhere=tenants)
    assert (ahead, CountedName.asked) == (2000, 0)
    assert spilled.servable({"new"})[Priority.NORMAL] == 2000
    assert CountedName.asked == 0
