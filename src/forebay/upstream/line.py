"""The line of calls before an account: where each stands, who goes up a rung, and whose deadline has passed."""

from __future__ import annotations

from forebay.admission import Line, Place
from forebay.task import Priority
from forebay.upstream.ask import Ask
from forebay.upstream.deadlines import Deadlines
from forebay.upstream.order import Order
from forebay.upstream.waiting import Waiter, Waiting

_GAIN = 0.05  # weight of the newest wait in the typical one
_RUNG_UP = 4  # typical waits after which a call goes one rung up


class CallLine(Line[Waiting]):
    """A line in which what has begun goes first, as `Order` has it, and nobody waits on one rung for ever.

    Args:
        order: of the account.
    """

    __slots__ = ("_deadlines", "_order", "_turn", "_typical_wait")

    def __init__(self, order: Order) -> None:
        super().__init__()
        self._order = order
        self._deadlines: Deadlines[Waiting] = Deadlines()
        self._turn = 0
        self._typical_wait = 0.0  # seconds, as a moving mean

    def stand(self, now: float, ask: Ask, waiter: Waiter) -> Waiting:
        """Stand in it, until served, or withdrawn."""
        waiting = Waiting(ask, waiter, rank=self._order.rank(ask), now=now)
        self._put(waiting)
        self._deadlines.add(ask.deadline, waiting, length=self.length)
        return waiting

    def _put(self, waiting: Waiting) -> None:
        self._turn += 1
        waiting.place = self.join(waiting, waiting.rung, waiting.rank, self._turn)

    def withdraw(self, waiting: Waiting) -> None:
        """Give a place up. Twice, or after it was served, this does nothing."""
        if waiting.place is not None:
            self.leave(waiting.place)
            waiting.place = None

    def send(self, now: float, head: Place) -> Waiting:
        """Serve the head."""
        waiting: Waiting = head[2]
        self._typical_wait += _GAIN * (now - waiting.joined - self._typical_wait)
        self._order.served(waiting.rank)
        self.serve(head, waiting.ask.priority)
        waiting.place = None
        return waiting

    def promote(self, now: float, typical: float) -> None:
        """Who has waited four times as long as is typical goes one rung up: a low run that has begun must end too.

        `typical`: seconds that a call takes; no wait is typical that is shorter.
        """
        patience = _RUNG_UP * max(self._typical_wait, typical)
        for rung in list(Priority)[1:]:
            place = self.first(rung)
            if place is not None and now - place[2].since > patience:
                waiting: Waiting = place[2]
                self.withdraw(waiting)
                waiting.rung, waiting.since = Priority(rung - 1), now
                self._put(waiting)

    def next_deadline(self) -> float | None:
        """When the next one passes of those who stand in it; None for never."""
        return self._deadlines.next()

    def overdue(self, now: float) -> Waiting | None:
        """One whose deadline has passed by `now`; it is not told of twice."""
        return self._deadlines.passed(now)
