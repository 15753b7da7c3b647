"""Slot counts: how many slots some workers have, how many of them are taken, and how many runs have lent theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod

from forebay.supervisor.worker import WorkerAgent


class SlotCounts(ABC):
    """The counts of some workers: those of one pool, or those that serve the same many pools.

    Attributes:
        own_slots: slots of workers that are not FAILED.
        own_running: slots taken on workers that are not FAILED.
        own_suspended: runs that have lent their slot.
        own_blocked: workers that the start gate keeps from using all their slots.
        own_reserved: of the slots, those that only CRITICAL and HIGH tasks take.
        own_reserved_taken: how many of these are taken, as tasks of other priorities see it: all but those left free.
    """

    __slots__ = (
        "_reserves", "own_blocked", "own_reserved", "own_reserved_taken", "own_running", "own_slots", "own_suspended",
    )  # fmt: skip

    def __init__(self) -> None:
        self.own_slots = self.own_running = self.own_suspended = self.own_reserved = self.own_reserved_taken = 0
        self._reserves: dict[WorkerAgent, tuple[int, int]] = {}  # what each worker adds to the last two
        self.own_blocked: dict[WorkerAgent, None] = {}

    @abstractmethod
    def score_fell(self, worker: WorkerAgent) -> None:
        """Take `worker` into account again, because it is new, finished a task, or can accept tasks again."""

    @property
    def own_idle_blocked(self) -> int:
        """The free slots that the start gate keeps free."""
        return sum(max(0, worker.slots - worker.current_tasks) for worker in self.own_blocked)

    def count_slots(self, worker: WorkerAgent, before: int) -> None:
        """Count the slots of `worker` after a change; `before` is the number that was counted for it until now."""
        now = worker.counted_slots
        self.own_slots += now - before
        if before and not now:
            self.own_running -= worker.current_tasks
        elif now and not before:
            self.own_running += worker.current_tasks
        if worker.reserve:
            self.count_reserve(worker)

    def count_reserve(self, worker: WorkerAgent) -> None:
        """Count the reserved slots of `worker` after a change of its slots."""
        reserved = worker.counted_slots - worker.open_slots
        taken = max(0, worker.current_tasks - worker.open_slots) if worker.counted_slots else 0
        before = self._reserves.get(worker, (0, 0))
        self._reserves[worker] = reserved, taken
        self.own_reserved += reserved - before[0]
        self.own_reserved_taken += taken - before[1]

    def forget_worker(self, worker: WorkerAgent) -> None:
        """Forget a worker that has no slots any more."""
        self.own_blocked.pop(worker, None)
        self._reserves.pop(worker, None)

    def slot_taken(self, worker: WorkerAgent) -> None:
        """Record that `worker` has one more slot taken."""
        if worker.counted_slots:
            self.own_running += 1

    def slot_returned(self, worker: WorkerAgent) -> None:
        """Record that `worker` has one slot less taken."""
        if worker.counted_slots:
            self.own_running -= 1

    def suspend(self) -> None:
        """Count a run of one of its workers that has lent its slot."""
        self.own_suspended += 1

    def resume(self) -> None:
        """Stop counting a run that had lent its slot."""
        self.own_suspended -= 1

    def block_worker(self, worker: WorkerAgent) -> None:
        """Stop counting the free slots of `worker` as usable: the start gate holds runs back."""
        self.own_blocked[worker] = None

    def unblock_worker(self, worker: WorkerAgent) -> None:
        """Count the free slots of `worker` as usable again."""
        self.own_blocked.pop(worker, None)
