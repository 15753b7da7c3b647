"""A model of supervision trees: what starts and ends, in which order, and what is FAILED.

It knows no code of Forebay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

NORMAL, SHUTDOWN, ABNORMAL = "normal", "shutdown", "abnormal"


@dataclass(eq=False)
class ModelWorker:
    """A worker with a life, or with a supervisor below it."""

    name: str
    restart: str
    below: ModelSupervisor | None = None
    alive: bool = False
    ended: bool = False  # its life has, and it was neither stopped nor started since
    failed: bool = False  # until it is revived
    restarts: int = 0
    failing_starts: int = 0
    failed_with: list[ModelWorker] = field(default_factory=list)

    def is_restarted_after(self, end: str) -> bool:
        return self.restart == "permanent" or (self.restart == "transient" and end == ABNORMAL)


@dataclass(eq=False)
class ModelSupervisor:
    """A supervisor; `worker` is what it is to the supervisor above, if there is one."""

    strategy: str
    max_restarts: int
    within: float
    log: list[str]
    children: list[ModelWorker] = field(default_factory=list)
    above: ModelSupervisor | None = None
    worker: ModelWorker | None = None
    halted: bool = False
    restarts: list[float] = field(default_factory=list)
    jobs: list[Callable[[], None]] = field(default_factory=list)
    working: bool = False
    unstarted: dict[ModelWorker, Sequence[ModelWorker]] = field(default_factory=dict)

    def child(self, name: str) -> ModelWorker:
        return next(child for child in self.children if child.name == name)

    # --- lives ---

    def start(self, workers: Sequence[ModelWorker], *, again: bool = True) -> ModelWorker | None:
        """Start workers in order; return the first that fails to."""
        for worker in workers:
            if worker.below is not None:
                if not worker.below.start_all(again=again):
                    return worker
            elif worker.failing_starts:
                worker.failing_starts -= 1
                self.log.append(f"{worker.name} fails to start")
                return worker
            else:
                self.log.append(f"{worker.name} starts")
            worker.alive, worker.ended, worker.failed = True, False, False
            worker.restarts += again
        return None

    def stop(self, workers: Sequence[ModelWorker]) -> None:
        for worker in reversed(workers):
            if worker.below is not None:
                worker.below.halted = True
                worker.below.stop(worker.below.children)
            elif worker.alive:
                self.log.append(f"{worker.name} ends")
            worker.alive = worker.ended = False

    def start_all(self, *, again: bool) -> bool:
        self.restarts = []
        if self.start(self.children, again=again) is not None:
            self.halted = True
            self.stop(self.children)
            return False
        self.halted = False
        return True

    # --- ends of lives ---

    def lives_end(self, ends: Sequence[tuple[ModelWorker, str]], now: float) -> None:
        """End some lives at the same moment."""
        for worker, _ in ends:
            self.log.append(f"{worker.name} ends")
            worker.alive, worker.ended = False, True
        self.jobs += [partial(self.handle_now, worker, end, now) for worker, end in ends]
        self.work()

    def handle(self, worker: ModelWorker, end: str, now: float) -> None:
        self.jobs.append(partial(self.handle_now, worker, end, now))
        self.work()

    def work(self) -> None:
        if not self.working:
            self.working = True
            while self.jobs:
                self.jobs.pop(0)()
            self.working = False

    def handle_now(self, worker: ModelWorker, end: str, now: float) -> None:
        if self.halted or not worker.ended or worker not in self.children:
            return
        if worker.is_restarted_after(end):
            self.restart(worker, now)
            return
        self.stop([worker])
        if worker.restart == "temporary":
            self.children.remove(worker)
        else:
            self.fail([worker])

    def restart(self, failed: ModelWorker, now: float) -> None:
        """Restart a worker. If a start fails, that is tried again behind the ends of other lives."""
        index = self.children.index(failed)
        together = {
            "one_for_one": [failed],
            "one_for_all": self.children[:],
            "rest_for_one": self.children[index:],
        }[self.strategy]
        self.unstarted = {other: left for other, left in self.unstarted.items() if not {*left} & {*together}}
        self.restarts.append(now)
        if sum(now - time <= self.within for time in self.restarts) > self.max_restarts:
            self.give_up(failed, together, now)
            return
        self.stop(together)
        self.start_or_try_again(self.without_temporary(together), now)

    def start_or_try_again(self, workers: Sequence[ModelWorker], now: float) -> None:
        failed = self.start(workers)
        if failed is not None:
            self.unstarted[failed] = workers
            self.jobs.append(partial(self.try_again, failed, now))

    def try_again(self, failed: ModelWorker, now: float) -> None:
        if self.unstarted.pop(failed, None) is not None:  # otherwise it was stopped with another one
            self.restart(failed, now)

    def without_temporary(self, workers: Sequence[ModelWorker]) -> list[ModelWorker]:
        self.children = [child for child in self.children if child not in workers or child.restart != "temporary"]
        return [worker for worker in workers if worker.restart != "temporary"]

    def give_up(self, failed: ModelWorker, together: Sequence[ModelWorker], now: float) -> None:
        if self.above is not None and self.worker is not None:
            self.halted = True
            self.jobs.clear()
            self.unstarted.clear()
            failed.failed, failed.alive = True, False
            failed.failed_with = [failed]
            self.worker.alive, self.worker.ended = False, True
            self.above.handle(self.worker, SHUTDOWN, now)
            return
        self.stop(together)
        self.fail(self.without_temporary(together))

    def fail(self, workers: Sequence[ModelWorker]) -> None:
        for worker in workers:
            worker.failed, worker.failed_with = True, list(workers)
            if worker.below is not None:
                worker.below.fail(worker.below.children)

    # --- what the user does ---

    def revive(self, worker: ModelWorker, now: float) -> None:
        if self.halted or not worker.failed:
            return
        self.restarts = []
        group = [other for other in worker.failed_with if other.failed and other in self.children]
        for other in group:
            other.failed = False
        self.start_or_try_again(group, now)
        self.work()

    def unregister(self, worker: ModelWorker) -> None:
        self.stop([worker])
        self.children.remove(worker)
