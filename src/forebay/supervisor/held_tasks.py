"""Held tasks: tasks that wait for a cheaper worker, for as long as that makes their deadline, though a slot is free."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from forebay.supervisor.worker import URGENT

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent


class HoldingDispatcher(Protocol):
    """The dispatcher, as far as held tasks need it."""

    def arm_expiry(self, ticket: Ticket) -> None:
        """Set the timer that ends a waiting task at its deadline."""

    def enqueue(self, ticket: Ticket, pool: Pool) -> None:
        """Put a ticket into the queue."""

    def serve(self, pool: Pool) -> None:
        """Start what waits in the queue of `pool`, on workers that have a free slot."""


class _Hold:
    """One held task.

    Attributes:
        ticket: of the task.
        cost: of the worker that was free: the task waits for a cheaper one.
        order: among the held tasks of its type: by priority, deadline, and time.
        timer: fires when it waits no longer.
    """

    __slots__ = ("cost", "order", "ticket", "timer")

    def __init__(self, ticket: Ticket, cost: float, order: tuple[int, float, int], timer: Timer) -> None:
        self.ticket = ticket
        self.cost = cost
        self.order = order
        self.timer = timer

    def __lt__(self, other: _Hold) -> bool:
        return self.order < other.order


class HeldTasks:
    """The tasks of a supervisor that wait for a cheaper worker though a slot is free.

    A task is held when its turn has come, while every cheaper worker is busy and one of them is expected to have a slot
    in time, after all that waits already. It counts in the load as if it were queued, but only a cheaper worker serves
    it: one that has a free slot, makes its deadline, and may begin it. When the cheaper worker would not make the
    deadline any more, or when the slots of a worker change, it joins the queue, where any worker takes it. No task is
    held while work waits in the overflow, tenants take turns, or the supervisor drains; none that is urgent, nested,
    retried or stored; and none twice.

    Args:
        core: the objects that the parts of the supervisor share.
        dispatcher: the dispatcher.
        max_wait: seconds for which a task is held at most.

    Attributes:
        count: how many tasks are held.
    """

    def __init__(self, core: Core, dispatcher: HoldingDispatcher, *, max_wait: float) -> None:
        self._loop = core.loop
        self._timers = core.timers
        self._pools: Mapping[str, Pool] = core.pools.by_type
        self._dispatcher = dispatcher
        self._max_wait = max_wait
        self._holds: dict[Ticket, _Hold] = {}
        self._queues: dict[Pool, dict[float, list[_Hold]]] = {}  # by the cost of the worker that was free
        self._sequence = 0
        self._slots_version = 0  # counts changes of the slots of workers
        self.count = 0

    def begin_drain(self) -> None:
        """Hold no task any more: draining must end."""
        self._max_wait = 0.0
        for pool in tuple(self._queues):
            self._release(pool)

    def hold(self, ticket: Ticket, pool: Pool, worker: WorkerAgent) -> bool:
        """Hold a task that could start on `worker`, if it is to wait for a cheaper one; return whether."""
        if not self._max_wait or not self._may_wait(ticket, pool):
            return False
        assert pool.by_cost is not None and ticket.deadline is not None  # noqa: S101, PT018 - see `_may_wait`
        priority = ticket.task.priority
        seconds = pool.by_cost.wait_for_cheaper(
            worker,
            ticket.deadline.remaining(),
            priority,
            size=pool.relative_size(ticket.task.estimate),
            ahead=pool.queue.length + pool.held,
            max_wait=self._max_wait,
            slots_version=self._slots_version,
        )
        if not seconds:
            return False
        ticket.hold()
        pool.hold()
        self._sequence += 1
        order = priority, ticket.deadline.at, self._sequence
        timer = self._timers.at(self._loop.time() + seconds, HeldTasks._on_due, self, ticket)
        held = self._holds[ticket] = _Hold(ticket, pool.by_cost.compared_cost_of(worker), order, timer)
        insort(self._queues.setdefault(pool, {}).setdefault(held.cost, []), held)
        self.count += 1
        self._dispatcher.arm_expiry(ticket)
        return True

    @staticmethod
    def _may_wait(ticket: Ticket, pool: Pool) -> bool:
        task = ticket.task
        if pool.by_cost is None or ticket.deadline is None or task.priority <= URGENT:
            return False
        if ticket.held or ticket.nested or ticket.retries is not None or ticket.lease is not None or ticket.stored:
            return False
        # Held tasks leave half of the queue to those that no worker can take.
        return not (pool.takes_turns or pool.spilled) and 2 * (pool.queued + 1) <= pool.queue_bound

    def is_waiting(self, ticket: Ticket) -> bool:
        """Return whether a task is held."""
        return ticket in self._holds

    def leave(self, ticket: Ticket) -> None:
        """Stop holding a task; nothing happens if it is not held."""
        if (held := self._holds.pop(ticket, None)) is None:
            return
        self.count -= 1
        self._timers.cancel(held.timer)
        pool = self._pools[ticket.task.task_type]
        pool.stop_hold()
        queue = self._queues[pool][held.cost]
        del queue[bisect_left(queue, held)]
        if not queue:
            del self._queues[pool][held.cost]
            if not self._queues[pool]:
                del self._queues[pool]

    def next_for(self, worker: WorkerAgent) -> Ticket | None:
        """Return the most urgent held task that may start on `worker`, or None.

        It is cheaper there, and is expected to end in time. It stays held: the start gate may stop it, and then nobody
        else could start it from the queue, though other workers have free slots.
        """
        found: list[_Hold] = []
        for pool in tuple(self._queues):
            if worker not in pool.workers or pool.by_cost is None or pool.paused:
                continue
            if pool.takes_turns or pool.spilled:
                self._release(pool)  # they take their turns, too
                continue
            cost, seconds = pool.by_cost.compared_cost_of(worker), pool.by_cost.expected_time(worker)
            for other, queue in self._queues[pool].items():
                if cost < other and (held := _first_in_time(queue, worker, pool, seconds)) is not None:
                    found.append(held)
        return min(found).ticket if found else None

    def slots_changed(self, worker: WorkerAgent) -> None:
        """Judge held tasks again, because `worker` has more slots or fewer, or is FAILED or leaving."""
        self._slots_version += 1
        for pool in tuple(self._queues):
            if worker in pool.workers:
                self._release(pool)

    def _release(self, pool: Pool) -> None:
        for held in sorted(held for queue in self._queues[pool].values() for held in queue):
            self._join_queue(held.ticket, pool)
        self._loop.call_soon(self._dispatcher.serve, pool)  # not now: a slot may be about to be counted

    def _on_due(self, ticket: Ticket) -> None:
        pool = self._pools[ticket.task.task_type]
        self._join_queue(ticket, pool)
        self._dispatcher.serve(pool)

    def _join_queue(self, ticket: Ticket, pool: Pool) -> None:
        self.leave(ticket)
        self._dispatcher.enqueue(ticket, pool)


def _first_in_time(queue: list[_Hold], worker: WorkerAgent, pool: Pool, seconds: float) -> _Hold | None:
    """Return the first of the held tasks that `worker` may begin, and makes if an average one takes `seconds`."""
    for held in queue:
        task, deadline = held.ticket.task, held.ticket.deadline
        if not worker.may_begin(task.priority):
            return None
        if deadline is not None and pool.relative_size(task.estimate) * seconds <= deadline.remaining():
            return held
    return None
