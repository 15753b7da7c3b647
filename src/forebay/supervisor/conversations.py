"""Conversations: one task of a `thread_id` is queued or runs at a time, and the others wait behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from forebay.admission import RetryAfterSchedule

if TYPE_CHECKING:
    from forebay.supervisor.ticket import Ticket


class Conversation:
    """The tasks of one conversation that are inside.

    Attributes:
        tickets: the first is queued or runs; the others are parked behind it, in the order of submission. Any of them
            may leave at any time: cancelling thousands must not be quadratic.
        retry_schedule: when its rejected tasks are to come back.
    """

    __slots__ = ("retry_schedule", "tickets")

    def __init__(self, first: Ticket) -> None:
        self.tickets: OrderedDict[Ticket, None] = OrderedDict.fromkeys((first,))
        self.retry_schedule = RetryAfterSchedule()

    @property
    def first(self) -> Ticket:
        """The task that is queued or runs."""
        return next(iter(self.tickets))

    @property
    def parked(self) -> int:
        """The number of tasks that wait behind the first one."""
        return len(self.tickets) - 1


class Conversations:
    """The conversations of a supervisor: their tasks inside, and how many of their tasks wait in the overflow.

    While tasks of a conversation wait in the overflow, new ones join them there, so that none overtakes another. The
    store leases them one at a time; with the tasks inside, this makes one order. The count of those in the overflow
    may be too high, when another process has taken some: then a task takes a way around, and its place is right.
    """

    def __init__(self) -> None:
        self._open: dict[str, Conversation] = {}
        self._stored: dict[str, int] = {}  # records that are not leased here, as far as known
        self._spilling: dict[str, int] = {}  # tasks on their way to the overflow
        self._recounts = 0  # that the store has not answered yet
        self._stored_since: dict[str, int] = {}  # counted here since the first of them was asked for

    # --- inside ---

    def get(self, thread_id: str | None) -> Conversation | None:
        """Return the conversation of that id if a task of it is inside."""
        return None if thread_id is None else self._open.get(thread_id)

    def __iter__(self) -> Iterator[tuple[str, Conversation]]:
        """Iterate over the ids and the conversations that have tasks inside."""
        return iter(self._open.items())

    def enter(self, ticket: Ticket) -> bool:
        """Add a task that comes inside; return False if it is parked behind another one."""
        thread_id = ticket.task.thread_id
        if thread_id is None:
            return True
        conversation = self._open.get(thread_id)
        if conversation is None:
            self._open[thread_id] = Conversation(ticket)
            return True
        conversation.tickets[ticket] = None
        return False

    def is_parked(self, ticket: Ticket) -> bool:
        """Return whether a task waits inside behind another one of its conversation."""
        conversation = self.get(ticket.task.thread_id)
        return conversation is not None and conversation.first is not ticket and ticket in conversation.tickets

    def remove_parked(self, ticket: Ticket) -> None:
        """Remove a task that is parked."""
        conversation = self.get(ticket.task.thread_id)
        assert conversation is not None  # noqa: S101 - see is_parked
        del conversation.tickets[ticket]

    def end_first(self, ticket: Ticket) -> Ticket | None:
        """Remove a task that has really ended, if it is the first; return the one that follows it, if any."""
        conversation = self.get(ticket.task.thread_id)
        if conversation is None or conversation.first is not ticket:
            return None
        del conversation.tickets[ticket]
        if conversation.tickets:
            return conversation.first
        del self._open[ticket.task.thread_id or ""]
        return None

    # --- in the overflow ---

    def waits_in_overflow(self, thread_id: str) -> bool:
        """Return whether tasks of a conversation wait in the overflow, or are on their way there."""
        return thread_id in self._stored or thread_id in self._spilling

    def is_ahead_here(self, thread_id: str | None) -> bool:
        """Return whether this process has tasks of a conversation that may not be in the overflow yet."""
        return thread_id is not None and (thread_id in self._open or thread_id in self._spilling)

    @property
    def parked_in_overflow(self) -> int:
        """The number of tasks in the overflow that no process can lease now, as far as is known."""
        return sum(count - (not self._leased_here(thread_id)) for thread_id, count in self._stored.items())

    def _leased_here(self, thread_id: str) -> bool:
        conversation = self._open.get(thread_id)
        return conversation is not None and any(ticket.lease is not None for ticket in conversation.tickets)

    def begin_spill(self, thread_id: str | None) -> None:
        """Count a task that is on its way to the overflow."""
        if thread_id is not None:
            self._spilling[thread_id] = self._spilling.get(thread_id, 0) + 1

    def end_spill(self, thread_id: str | None, *, stored: bool) -> None:
        """Stop counting a task as on its way to the overflow; count it there if it is `stored`."""
        if thread_id is not None:
            _decrement(self._spilling, thread_id)
            if stored:
                self.add_stored(thread_id)

    def add_stored(self, thread_id: str | None) -> None:
        """Count one more record in the overflow that is not leased here."""
        if thread_id is not None:
            self._stored[thread_id] = self._stored.get(thread_id, 0) + 1
            if self._recounts:
                self._stored_since[thread_id] = self._stored_since.get(thread_id, 0) + 1

    def remove_stored(self, thread_id: str | None) -> None:
        """Count one record less in the overflow, but not less than none: the count may be out of date."""
        if thread_id is not None and thread_id in self._stored:
            _decrement(self._stored, thread_id)

    @property
    def recounting(self) -> bool:
        """True while the store counts its records."""
        return self._recounts > 0

    def begin_recount(self) -> None:
        """Note that the store counts its records: its answer may miss those that are stored before it comes."""
        self._recounts += 1

    def end_recount(self) -> None:
        """Note that the store has answered, or failed."""
        self._recounts -= 1
        if not self._recounts:
            self._stored_since.clear()

    def recount(self, unfinished: Mapping[str, int], held: Mapping[str, int]) -> None:
        """Replace the counts by those of the store: of the records that have not ended, less those leased here."""
        counts = ((thread_id, count - held.get(thread_id, 0)) for thread_id, count in unfinished.items())
        self._stored = {thread_id: count for thread_id, count in counts if count > 0}
        for thread_id, count in self._stored_since.items():
            self._stored[thread_id] = self._stored.get(thread_id, 0) + count


def _decrement(counts: dict[str, int], thread_id: str) -> None:
    counts[thread_id] -= 1
    if not counts[thread_id]:
        del counts[thread_id]
