"""Tree storms: random supervision trees whose lives end at random, against a model; and tasks on them meanwhile.

In a *wild* storm starts and stops take time, handlers ignore their cancellation, and lives end while others are being
restarted. There is no model of that: the promises are checked at the end.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.simulation.tree_model import ABNORMAL, NORMAL, SHUTDOWN, ModelSupervisor, ModelWorker
from tests.support.run_checks import fail_on_logged_errors
from tests.support.scripted_life import ScriptedLife, settle
from tests.support.supervisor_checks import InvariantViolation, check_nothing_left, check_task_ends

from forebay import BackpressureSupervisor, ForebayError, Task, Ticket
from forebay.adapters import Handler
from forebay.events import WorkerExited, WorkerFailed, WorkerRestarted
from forebay.simulation import simulate
from forebay.testing import EventRecord

STEP = 0.4  # seconds between two events; no multiple of it is near a period of the restart intensity
PERIODS = (1.0, 5.0)
ENDS = {NORMAL: ScriptedLife.returns, SHUTDOWN: ScriptedLife.is_cancelled, ABNORMAL: ScriptedLife.crash}
GRACE = 1.0
QUIET = 300.0  # seconds after which a wild storm is over


class Leaf:
    """A worker with a life; its handler runs a payload of seconds, or passes the task on to another supervisor."""

    def __init__(self, storm: TreeStorm, name: str) -> None:
        self._storm = storm
        self.life = ScriptedLife(name, storm.log)

    def __forebay_handler__(self) -> Handler:
        slow = self._storm.wild and self._storm.draw.random() < 0.5
        return Handler(call=self.run, start=self._pause if slow else None, stop=self._pause if slow else None)

    async def run(self, task: Task) -> Any:
        if not self.life.alive and not self._storm.wild:
            message = f"{self.life.name} runs a task, and its life has ended"
            raise InvariantViolation(message)
        seconds, stubborn = task.payload
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if not stubborn:
                raise
            await asyncio.sleep(2 * GRACE)
        return seconds

    async def _pause(self) -> None:
        await asyncio.sleep(self._storm.draw.choice([0.0, 0.1, 1.0]))


class UncheckedModel(ModelSupervisor):
    """A model that remembers its workers and follows nothing, for a storm without a model."""

    def child(self, name: str) -> ModelWorker:
        return ModelWorker(name, "")

    def handle(self, worker: ModelWorker, end: str, now: float) -> None:
        """Ignore it."""

    def unregister(self, worker: ModelWorker) -> None:
        """Ignore it."""

    def revive(self, worker: ModelWorker, now: float) -> None:
        """Ignore it."""


class Branch:
    """A supervisor of the tree, the model of it, and what is below it."""

    def __init__(self, storm: TreeStorm, depth: int) -> None:
        draw = storm.draw
        self._storm = storm
        self.type = f"t{next(storm.numbers)}"
        strategy = draw.choice(["one_for_one", "one_for_all", "rest_for_one"])
        max_restarts, within = draw.choice([0, 1, 3, 3, 10]), draw.choice(PERIODS)
        self.supervisor = BackpressureSupervisor(
            strategy=strategy, max_restarts=max_restarts, within=within, zombie_grace=GRACE, lag_bound=None
        )
        self.record = EventRecord(self.supervisor)
        model = UncheckedModel if storm.wild else ModelSupervisor
        self.model = model(strategy, max_restarts, within, storm.log_of_model)
        self.leaves: dict[str, Leaf] = {}
        self.below: dict[str, Branch] = {}
        storm.branches.append(self)
        for _ in range(draw.randint(1, 4)):
            if depth and draw.random() < 0.4:
                self._add_branch(depth - 1)
            else:
                self.add_leaf()
        if not self.leaves:
            self.add_leaf()

    @property
    def types(self) -> list[str]:
        return [self.type, *(kind for branch in self.below.values() for kind in branch.types)]

    def add_leaf(self) -> ModelWorker:
        name = f"w{next(self._storm.numbers)}"
        leaf = self.leaves[name] = Leaf(self._storm, name)
        restart = self._restart_type()
        self.supervisor.register_worker(
            name,
            handler=leaf,
            task_types=[self.type],
            max_concurrent=self._storm.draw.randint(1, 3),
            start=leaf.life.start,
            restart=restart,
        )
        self.model.children.append(ModelWorker(name, restart))
        return self.model.children[-1]

    def _add_branch(self, depth: int) -> None:
        branch = Branch(self._storm, depth)
        name = f"s{next(self._storm.numbers)}"
        restart = self._restart_type()
        self.supervisor.register_worker(
            name, handler=branch.supervisor, task_types=branch.types, max_concurrent=20, restart=restart
        )
        worker = ModelWorker(name, restart, below=branch.model)
        branch.model.above, branch.model.worker = self.model, worker
        self.model.children.append(worker)
        self.below[name] = branch

    def _restart_type(self) -> str:
        return self._storm.draw.choice(["permanent", "permanent", "transient", "temporary"])

    def check_against_model(self) -> None:
        """Compare the workers, what lives, what is FAILED, and the counts of restarts."""
        now = asyncio.get_running_loop().time()
        workers = self.supervisor.workers
        found = [
            (
                name,
                self.leaves[name].life.alive if name in self.leaves else None,
                worker.failed and worker.breaker.retry_after(now) is None,
                worker.restarts,
            )
            for name, worker in workers.items()
        ]
        expected = [
            (child.name, None if child.below else child.alive, child.failed, child.restarts)
            for child in self.model.children
        ]
        if found != expected:
            message = f"(name, alive, failed, restarts) are {found}, and should be {expected}"
            raise InvariantViolation(message)
        for name, branch in self.below.items():
            if name in workers:
                branch.check_against_model()

    def check_quiet(self) -> None:
        """Check that each worker lives or is FAILED, once nothing happens any more."""
        for name, worker in self.supervisor.workers.items():
            node = next(child for child in self.supervisor.tree().children if child.name == name)
            lives = self.leaves[name].life.alive if name in self.leaves else True
            if not (worker.failed or (lives and worker.ready and not worker.starting)):
                message = f"{worker!r} is neither FAILED nor does it live: {node}"
                raise InvariantViolation(message)
            if name in self.below and not worker.failed:
                self.below[name].check_quiet()


class TreeStorm:
    """One storm: a tree, and what happens to it.

    Attributes:
        happened: how often each kind of thing did.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.wild = self.draw.random() < 0.3
        self.numbers: Iterator[int] = iter(range(10_000))
        self.log: list[str] = []
        self.log_of_model: list[str] = []
        self.branches: list[Branch] = []
        self.happened = Counter[str]()
        self._tickets: list[Ticket] = []

    async def run(self) -> None:
        """Run the storm, and check what it promises."""
        root = Branch(self, self.draw.choice([0, 1, 1, 2]))
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with root.supervisor:
            root.model.start_all(again=False)
            for number in range(self.draw.randint(5, 40)):
                await asyncio.sleep(begun + STEP * number - loop.time())
                await self._one_event(root)
                self._submit(root)
                if not self.wild:
                    await settle()
                    self._check(root, number)
            if self.wild and self.draw.random() < 0.7:  # otherwise it closes in the middle of restarts
                await asyncio.sleep(QUIET)
                root.check_quiet()
        if self.wild:
            await asyncio.sleep(10 * GRACE)  # until handlers that ignore their cancellation have ended
        check_task_ends(root.record, tickets=self._tickets)
        for branch in self.branches:
            check_nothing_left(branch.supervisor)
            self.happened += Counter(f"life ended: {event.exit}" for event in branch.record.of_type(WorkerExited))
            self.happened["restarts"] += len(branch.record.of_type(WorkerRestarted))
            self.happened["failed for good"] += sum(
                event.retry_in is None for event in branch.record.of_type(WorkerFailed)
            )
            self.happened["gave up"] += sum(
                event.exit == SHUTDOWN and event.worker_id in branch.below
                for event in branch.record.of_type(WorkerExited)
            )
        self.happened += Counter(ticket.status.value for ticket in self._tickets)
        self.happened["wild" if self.wild else "modelled"] += 1

    def _check(self, root: Branch, number: int) -> None:
        try:
            self._check_log()
            root.check_against_model()
        except InvariantViolation as violation:
            violation.add_note(f"after event {number}: {self._last}")
            raise

    def _check_log(self) -> None:
        if self.log != self.log_of_model:
            message = f"the log is\n{self.log}, and should be\n{self.log_of_model}"
            raise InvariantViolation(message)

    async def _one_event(self, root: Branch) -> None:
        branch = self.draw.choice([branch for branch in self.branches if self._is_present(branch, root)])
        what = self.draw.choices(["ends", "fails to start", "revive", "unregister", "register"], [10, 3, 3, 0.5, 0.5])[
            0
        ]
        name = self.draw.choice([*branch.supervisor.workers, ""])
        self._last = f"{what} in {branch.type}, of {name!r}"
        if what == "ends":
            self._end_lives(branch)
        elif what == "register":
            self._register(branch)
        elif not name:
            return
        elif what == "fails to start" and name in branch.leaves:
            branch.model.child(name).failing_starts += 1
            branch.leaves[name].life.start_errors.append("no")
        elif what == "revive":
            branch.supervisor.workers[name].revive()
            branch.model.revive(branch.model.child(name), asyncio.get_running_loop().time())
        elif what == "unregister":
            await branch.supervisor.unregister_worker(name, timeout=0)
            branch.model.unregister(branch.model.child(name))

    def _register(self, branch: Branch) -> None:
        worker = branch.add_leaf()
        if not branch.model.halted:
            branch.model.start([worker], again=False)

    def _end_lives(self, branch: Branch) -> None:
        alive = [name for name in branch.supervisor.workers if name in branch.leaves and branch.leaves[name].life.alive]
        ending = self.draw.sample(alive, min(len(alive), self.draw.choice([1, 1, 1, 2, 3])))
        ends = [(name, self.draw.choice([NORMAL, SHUTDOWN, ABNORMAL, ABNORMAL, ABNORMAL])) for name in ending]
        for name, end in ends:
            self._last += f", {name} {end}"
            ENDS[end](branch.leaves[name].life)
        now = asyncio.get_running_loop().time()
        branch.model.lives_end([(branch.model.child(name), end) for name, end in ends], now)

    def _is_present(self, branch: Branch, root: Branch) -> bool:
        """Return whether the workers that a branch is to the supervisors above have not been removed."""
        if branch is root:
            return True
        above = next(other for other in self.branches if branch in other.below.values())
        name = next(name for name, below in above.below.items() if below is branch)
        return name in above.supervisor.workers and self._is_present(above, root)

    def _submit(self, root: Branch) -> None:
        for _ in range(self.draw.choice([0, 0, 1, 5])):
            payload = (self.draw.choice([0.0, 0.1, 0.5, 2.0]), self.wild and self.draw.random() < 0.1)
            task = Task(self.draw.choice(root.types), payload, timeout=20.0)
            try:
                self._tickets.append(root.supervisor.submit_nowait(task))
            except ForebayError as error:
                self.happened[type(error).__name__] += 1


def run(seed: int) -> TreeStorm:
    """Run the storm of one seed; raise if it breaks a promise or differs from the model."""
    storm = TreeStorm(seed)
    with fail_on_logged_errors(OSError):  # of starts
        simulate(storm.run, seed=seed, max_time=1e6)
    return storm


if __name__ == "__main__":
    import logging
    import sys

    logging.disable()
    for argument in sys.argv[1:]:
        print(argument, dict(run(int(argument)).happened))
