"""The line of calls before an account: where each stands, who goes up a rung, and whose deadline has passed."""

from __future__ import annotations

from forebay.admission import PriorityQueue, QueueEntry
from forebay.task import Priority
from forebay.upstream.call_request import CallRequest
from forebay.upstream.deadline_heap import DeadlineHeap
from forebay.upstream.fair_order import FairOrder
from forebay.upstream.waiters import QueuedCall, Waiter

_GAIN = 0.05  # weight of the newest wait in the typical one
_RUNG_UP = 4  # typical waits after which a call goes one rung up


class CallQueue(PriorityQueue[QueuedCall]):
    """A line in which what has begun goes first, as `FairOrder` has it, and nobody waits on one rung for ever.

    Args:
        order: of the account.
    """

    __slots__ = ("_deadlines", "_order", "_turn", "_typical_wait")

    def __init__(self, order: FairOrder) -> None:
        super().__init__()
        self._order = order
        self._deadlines: DeadlineHeap[QueuedCall] = DeadlineHeap()
        self._turn = 0
        self._typical_wait = 0.0  # seconds, as a moving mean

    def enqueue(self, now: float, ask: CallRequest, waiter: Waiter) -> QueuedCall:
        """Stand in it, until served, or withdrawn."""
        waiting = QueuedCall(ask, waiter, rank=self._order.rank(ask), now=now)
        self._put(waiting)
        self._deadlines.add(ask.deadline, waiting, length=self.length)
        return waiting

    def _put(self, waiting: QueuedCall) -> None:
        self._turn += 1
        waiting.entry = self.push(waiting, waiting.priority, waiting.rank, self._turn)

    def withdraw(self, waiting: QueuedCall) -> None:
        """Give a place up. Twice, or after it was served, this does nothing."""
        if waiting.entry is not None:
            self.remove(waiting.entry)
            waiting.entry = None

    def serve_head(self, now: float, head: QueueEntry) -> QueuedCall:
        """Serve the head."""
        waiting: QueuedCall = head[2]
        self._typical_wait += _GAIN * (now - waiting.enqueued_at - self._typical_wait)
        self._order.record_served(waiting.rank)
        self.serve(head, waiting.request.priority)
        waiting.entry = None
        return waiting

    def promote(self, now: float, typical: float) -> None:
        """Who has waited four times as long as is typical goes one rung up: a low run that has begun must end too.

        `typical`: seconds that a call takes; no wait is typical that is shorter.
        """
        patience = _RUNG_UP * max(self._typical_wait, typical)
        for rung in list(Priority)[1:]:
            place = self.first_of(rung)
            if place is not None and now - place[2].priority_since > patience:
                waiting: QueuedCall = place[2]
                self.withdraw(waiting)
                waiting.priority, waiting.priority_since = Priority(rung - 1), now
                self._put(waiting)

    def next_deadline(self) -> float | None:
        """When the next one passes of those who stand in it; None for never."""
        return self._deadlines.next_deadline()

    def pop_overdue(self, now: float) -> QueuedCall | None:
        """One whose deadline has passed by `now`; it is not told of twice."""
        return self._deadlines.pop_overdue(now)
