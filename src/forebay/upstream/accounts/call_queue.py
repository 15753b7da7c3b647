"""The queue of calls in front of an account: their order, their promotion, and their deadlines."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from typing import Final

from forebay.admission import PriorityQueue, QueueEntry
from forebay.task import Priority
from forebay.upstream.accounts.fair_order import FairOrder
from forebay.upstream.accounts.waiters import Waiter
from forebay.upstream.call_request import CallRequest

_GAIN: Final = 0.05  # weight of the newest wait in the typical one
_PROMOTE_AFTER: Final = 4  # typical waits after which a call rises to the next better priority
_GAPS_SHARE: Final = 0.25  # of a tenant's queued calls: how many turns it may have lost by calls that have left
_MIN_SWEEP: Final = 64  # deadlines below which removing those of calls that have left does not pay


class QueuedCall:
    """A call in the queue, and the caller that waits for the decision."""

    __slots__ = ("enqueued_at", "entry", "priority", "priority_since", "rank", "request", "waiter")

    def __init__(self, request: CallRequest, waiter: Waiter, *, rank: tuple[float, float], now: float) -> None:
        self.request = request
        self.waiter = waiter
        self.rank = rank
        self.priority = request.priority
        self.enqueued_at = now
        self.priority_since = now
        self.entry: QueueEntry | None = None

    @property
    def is_queued(self) -> bool:
        """True while it is in the queue."""
        return self.entry is not None


class CallQueue(PriorityQueue[QueuedCall]):
    """Calls by priority and then by `FairOrder`, in which no call waits at one priority without end.

    Args:
        order: of the account.
        longest_wait: seconds after which a call has waited for too long.

    Attributes:
        nested: the number of calls whose caller holds a slot of the account while they wait.
    """

    __slots__ = (
        "_deadlines",
        "_gaps",
        "_longest_wait",
        "_order",
        "_ranks",
        "_sequence",
        "_tenants",
        "_typical_wait",
        "nested",
    )

    def __init__(self, order: FairOrder, *, longest_wait: float = math.inf) -> None:
        super().__init__()
        self._order = order
        self._longest_wait = longest_wait
        self.nested = 0
        self._ranks: tuple[list[tuple[float, float]], ...] = tuple([] for _ in Priority)  # sorted, of queued calls
        self._tenants: dict[str, dict[QueuedCall, None]] = {}  # the queued calls by tenant, as they joined
        self._gaps: dict[str, int] = {}  # by tenant: turns to come of calls that have left
        self._deadlines: list[tuple[float, int, QueuedCall]] = []  # a heap, with calls that have left the queue
        self._sequence = 0
        self._typical_wait = 0.0  # seconds, as a moving mean

    def enqueue(self, now: float, request: CallRequest, waiter: Waiter) -> QueuedCall:
        """Add a call, and return its entry."""
        call = QueuedCall(request, waiter, rank=self._order.rank(request), now=now)
        self._insert(call)
        leave_at = min(request.deadline, now + self._longest_wait)
        if leave_at < math.inf:
            if len(self._deadlines) > 2 * self.length + _MIN_SWEEP:
                self._deadlines = [item for item in self._deadlines if item[2].is_queued]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (leave_at, self._sequence, call))
        return call

    def _insert(self, call: QueuedCall) -> None:
        self._sequence += 1
        call.entry = self.push(call, call.priority, call.rank, self._sequence)
        insort(self._ranks[call.priority], call.rank)
        self.nested += call.request.holder is not None
        self._tenants.setdefault(call.request.tenant, {})[call] = None

    def _forget(self, call: QueuedCall) -> None:
        """Note that a call is not in the queue any more."""
        call.entry = None
        self.nested -= call.request.holder is not None
        ranks, tenant = self._ranks[call.priority], call.request.tenant
        del ranks[bisect_left(ranks, call.rank)]
        calls = self._tenants[tenant]
        del calls[call]
        if not calls:
            del self._tenants[tenant]
            self._gaps.pop(tenant, None)

    def ahead_of(self, request: CallRequest) -> int:
        """Return how many calls would be served before this one, if it joined the queue now."""
        better = sum(self.lengths[: request.priority])
        return better + bisect_right(self._ranks[request.priority], self._order.expected_rank(request))

    def position(self, call: QueuedCall) -> int:
        """Return how many calls would be served before this one, which is in the queue."""
        return sum(self.lengths[: call.priority]) + bisect_left(self._ranks[call.priority], call.rank)

    def withdraw(self, call: QueuedCall) -> None:
        """Remove a call that leaves before its turn. Nothing happens if it is not in the queue any more."""
        if call.entry is None:
            return
        self.take(call)
        if self._order.is_ahead(call.rank):
            self._order.return_turn(call.request)
            self._close_gaps(call.request.tenant)

    def _close_gaps(self, tenant: str) -> None:
        """Move a tenant's calls up into the turns of those that have left, once it has lost a quarter of its turns."""
        calls = self._tenants.get(tenant, ())
        self._gaps[tenant] = self._gaps.get(tenant, 0) + 1
        if self._gaps[tenant] < _GAPS_SHARE * len(calls):
            return
        del self._gaps[tenant]
        waiting = sorted((call for call in calls if self._order.is_ahead(call.rank)), key=lambda call: call.rank)
        tags = self._order.close_gaps(tenant, [(call.rank, call.request) for call in waiting])
        for call, tag in zip(waiting, tags, strict=True):
            if tag < call.rank[0]:
                self.take(call)
                call.rank = (tag, call.rank[1])
                self._insert(call)

    def take(self, call: QueuedCall) -> None:
        """Remove a call that is sent before the head. Nothing happens if it is not in the queue any more."""
        if call.entry is not None:
            self.remove(call.entry)
            self._forget(call)

    def serve_head(self, now: float, head: QueueEntry) -> QueuedCall:
        """Remove the head, and return its call."""
        call: QueuedCall = head[2]
        self._typical_wait += _GAIN * (now - call.enqueued_at - self._typical_wait)
        self._order.record_served(call.rank)
        self.serve(head, call.request.priority)
        self._forget(call)
        return call

    def promote(self, now: float, typical: float) -> None:
        """Raise the calls that have waited four times the typical wait by one priority: LOW runs must end too.

        Args:
            now: the time.
            typical: seconds that a call takes; the typical wait is at least as long.
        """
        patience = _PROMOTE_AFTER * max(self._typical_wait, typical)
        for priority in list(Priority)[1:]:
            entry = self.first_of(priority)
            if entry is not None and now - entry[2].priority_since > patience:
                call: QueuedCall = entry[2]
                self.take(call)
                call.priority, call.priority_since = Priority(priority - 1), now
                self._insert(call)

    def next_deadline(self) -> float | None:
        """Return the earliest time at which a call in the queue must be sent or leave; None if there is none."""
        heap = self._deadlines
        while heap and not heap[0][2].is_queued:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def pop_overdue(self, now: float) -> QueuedCall | None:
        """Return a call whose deadline or longest wait has passed by `now`, once; None if there is none.

        The call is still in the queue: the caller withdraws it.
        """
        deadline = self.next_deadline()
        return heapq.heappop(self._deadlines)[2] if deadline is not None and deadline <= now else None
