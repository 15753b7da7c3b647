"""A worker inside a real supervisor, in virtual time, beside a model that knows only the words of the design.

Tasks come, succeed, raise, run out of time, are cancelled, do not stop; the worker is revived. After every step the
model and the worker agree on its state, its slots, its zombies, who runs, who waits and how everything ended.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay import BackpressureSupervisor, Task, TaskStatus, Ticket, WorkerState
from forebay.simulation import VirtualLoop

TIMEOUT, GRACE, CEILING = 10.0, 5.0, 60.0  # seconds
IN_A_ROW, PROBES_TO_CLOSE = 5, 2
ROOM = 4  # tasks that may wait
WAITS = st.sampled_from([0.0, 0.3, 1.1, 2.7, 5.3, 11.9, 31.7, 67.3])  # no sum of them meets a bound exactly


class ModelBreakerState(Enum):
    CLOSED, OPEN, HALF_OPEN = range(3)


@dataclass
class ModelTask:
    """A task as the model sees it."""

    number: int
    stubborn: bool
    status: TaskStatus = TaskStatus.WAITING
    probe_of: int | None = None  # the era in which it began, if it was a probe
    era: int = 0
    leaving: bool = False  # told to stop, and still there
    zombie: bool = False  # the same, beyond the grace


@dataclass
class WorkerModel:
    """What the design says of one worker and its line."""

    slots: int
    reset_timeout: float | None
    now: float = 0.0
    gate: ModelBreakerState = ModelBreakerState.CLOSED
    era: int = 0
    faults: int = 0  # in a row
    passed: int = 0  # probes, since it was half open
    openings: int = 0  # since it was last closed
    stuck: bool = False
    line: deque[ModelTask] = field(default_factory=deque)
    inside: list[ModelTask] = field(default_factory=list)  # they hold a slot
    agenda: list[tuple[float, int, str, ModelTask | int]] = field(default_factory=list)
    order: int = 0

    def plan(self, after: float, what: str, whom: ModelTask | int) -> None:
        self.order += 1
        heapq.heappush(self.agenda, (self.now + after, self.order, what, whom))

    # --- questions ---

    @property
    def probes(self) -> list[ModelTask]:
        return [being for being in self.inside if being.probe_of == self.era and not being.leaving]

    @property
    def usable(self) -> int:
        return {ModelBreakerState.CLOSED: self.slots, ModelBreakerState.OPEN: 0, ModelBreakerState.HALF_OPEN: 1}[
            self.gate
        ]

    def accepts(self) -> bool:
        if self.gate is ModelBreakerState.OPEN or len(self.inside) >= self.slots:
            return False
        return self.gate is ModelBreakerState.CLOSED or not self.probes

    @property
    def state(self) -> WorkerState:
        if self.gate is ModelBreakerState.OPEN:
            return WorkerState.FAILED
        if len(self.inside) == self.slots:
            return WorkerState.OVERLOADED
        return WorkerState.BUSY if self.inside else WorkerState.IDLE

    def refuses(self) -> bool:
        if self.line or not self.accepts():
            return not self.usable or len(self.inside) + len(self.line) >= self.usable + ROOM
        return False

    # --- what happens ---

    def come(self, being: ModelTask) -> None:
        if self.refuses():
            being.status = TaskStatus.REJECTED
        else:
            self.line.append(being)
            self.serve()

    def serve(self) -> None:
        while self.line and self.accepts():
            being = self.line.popleft()
            being.status, being.era = TaskStatus.RUNNING, self.era
            being.probe_of = self.era if self.gate is ModelBreakerState.HALF_OPEN else None
            self.inside.append(being)
            self.plan(TIMEOUT, "timeout", being)

    def judge(self, being: ModelTask, *, fault: bool | None) -> None:
        """Hear how a run went; None says nothing."""
        if being.era != self.era or self.gate is ModelBreakerState.OPEN or fault is None:
            return
        if self.gate is ModelBreakerState.CLOSED:
            self.faults = self.faults + 1 if fault else 0
            if self.faults == IN_A_ROW:
                self.open()
        elif fault:
            self.open()
        else:
            self.passed += 1
            if self.passed == PROBES_TO_CLOSE:
                self.close()

    def open(self) -> None:
        self.gate, self.era, self.faults, self.passed = ModelBreakerState.OPEN, self.era + 1, 0, 0
        self.openings += 1
        if self.reset_timeout is not None:  # with an even chance, three quarters of a time that doubles
            self.plan(0.75 * min(CEILING, self.reset_timeout * 2 ** (self.openings - 1)) + 1e-6, "awake", self.era)

    def close(self) -> None:
        self.gate, self.era, self.faults, self.passed, self.openings = ModelBreakerState.CLOSED, self.era + 1, 0, 0, 0
        self.stuck = False
        self.serve()

    def leave(self, being: ModelTask) -> None:
        """Its handler has really ended: the slot is free."""
        self.inside.remove(being)
        if being.zombie and self.stuck and self.reset_timeout is not None:
            self.close()  # nothing but zombies had made it FAILED
        self.serve()

    def end(self, being: ModelTask, status: TaskStatus, *, fault: bool | None) -> None:
        """The handler ends by itself."""
        if being.leaving:
            self.leave(being)
            return
        being.status = status
        self.inside.remove(being)
        self.judge(being, fault=fault)
        self.serve()

    def stop(self, status: TaskStatus, *beings: ModelTask, fault: bool | None) -> None:
        """The tickets end at the same moment, and their handlers are told to."""
        told = []
        for being in beings:
            if being in self.line:
                self.line.remove(being)
                being.status = status
            elif being in self.inside and not being.leaving:
                being.status, being.leaving = status, True
                self.judge(being, fault=fault)
                told.append(being)
        self.serve()
        for being in told:
            if being.stubborn:
                self.plan(GRACE, "zombie", being)
            else:
                self.leave(being)

    def pass_time(self, until: float) -> None:
        while self.agenda and self.agenda[0][0] <= until:
            self.now = self.agenda[0][0]
            due = []
            while self.agenda and self.agenda[0][0] == self.now:
                due.append(heapq.heappop(self.agenda)[2:])
            late = [whom for what, whom in due if what == "timeout" and isinstance(whom, ModelTask)]
            self.stop(TaskStatus.TIMED_OUT, *(being for being in late if being in self.inside), fault=True)
            for what, whom in due:
                if what == "awake" and whom == self.era and self.gate is ModelBreakerState.OPEN:
                    self.gate, self.era = ModelBreakerState.HALF_OPEN, self.era + 1
                    self.serve()
                elif what == "zombie" and isinstance(whom, ModelTask) and whom in self.inside:
                    whom.zombie = True
                    if (
                        sum(being.zombie for being in self.inside) == self.slots
                        and self.gate is not ModelBreakerState.OPEN
                    ):
                        self.open()
                        self.stuck = True
        self.now = until


class WorkerMachine(RuleBasedStateMachine):
    """Does the same to both."""

    @initialize(slots=st.integers(1, 3), reset_timeout=st.sampled_from([8.0, 8.0, 30.0, None]))
    def build(self, slots: int, reset_timeout: float | None) -> None:
        logging.disable(logging.CRITICAL)
        self.model = WorkerModel(slots, reset_timeout)
        self.loop = VirtualLoop(0, jitter=0.0)
        self.orders: dict[int, asyncio.Future[None]] = {}
        self.tickets: list[tuple[ModelTask, Ticket]] = []
        self.house = BackpressureSupervisor(backpressure_threshold=1.0, max_queue_size=ROOM, zombie_grace=GRACE)
        self.worker = self.house.register_worker(
            "w",
            handler=self.handler,
            task_types=["work"],
            max_concurrent=slots,
            timeout=TIMEOUT,
            reset_timeout=reset_timeout,
        )
        self.loop.run_until_complete(self.house.start())
        self.house._draw = lambda: 0.5

    async def handler(self, task: Task) -> None:
        number, stubborn = task.payload
        while True:
            try:
                await asyncio.shield(self.orders[number])
            except asyncio.CancelledError:
                if not stubborn:
                    raise
            else:
                return

    def let(self, seconds: float = 0.0) -> None:
        """Let time pass, and what is ready happen."""

        async def pause() -> None:
            await asyncio.sleep(seconds)
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(pause())

    @property
    def running(self) -> list[ModelTask]:
        return [being for being, _ in self.tickets if being in self.model.inside]

    # --- what may happen ---

    @rule(stubborn=st.sampled_from([False, False, True]))
    def come(self, *, stubborn: bool) -> None:
        being = ModelTask(len(self.tickets), stubborn)
        self.orders[being.number] = self.loop.create_future()
        self.model.come(being)

        async def submit() -> Ticket:
            return self.house.submit_nowait(Task("work", (being.number, stubborn)))

        self.tickets.append((being, self.loop.run_until_complete(submit())))
        self.let()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), raises=st.sampled_from([False, True, True]))
    def end(self, data: st.DataObject, *, raises: bool) -> None:
        being = data.draw(st.sampled_from(self.running))
        order = self.orders[being.number]
        if raises:
            order.set_exception(ValueError())
        else:
            order.set_result(None)
        self.model.end(being, TaskStatus.FAILED if raises else TaskStatus.SUCCEEDED, fault=raises)
        self.let()

    @rule(times=st.integers(1, 6))
    def fail_in_a_row(self, times: int) -> None:
        for _ in range(times):
            self.come(stubborn=False)
            if not (running := [being for being in self.running if not being.leaving]):
                break
            self.orders[running[0].number].set_exception(ValueError())
            self.model.end(running[0], TaskStatus.FAILED, fault=True)
            self.let()

    @precondition(lambda self: self.model.reset_timeout is not None)
    @rule(stubborn=st.booleans(), behind=st.integers(0, 2))
    def become_half_open(self, behind: int, *, stubborn: bool) -> None:
        self.revive()
        self.wait(CEILING)  # what was there is gone, or a zombie
        self.fail_in_a_row(IN_A_ROW)
        self.wait(CEILING)
        self.come(stubborn=stubborn)
        for _ in range(behind):
            self.come(stubborn=False)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        alive = [pair for pair in self.tickets if pair[0] in self.model.inside or pair[0] in self.model.line]
        being, ticket = data.draw(st.sampled_from(alive or self.tickets))
        self.model.stop(TaskStatus.CANCELLED, being, fault=None)

        async def cancel() -> None:
            ticket.cancel()

        self.loop.run_until_complete(cancel())
        self.let()

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        self.model.pass_time(self.model.now + seconds)
        self.let(seconds)

    @rule()
    def revive(self) -> None:
        self.model.close()

        async def revive() -> None:
            self.worker.revive()

        self.loop.run_until_complete(revive())
        self.let()

    # --- what must hold then ---

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "worker"):
            return
        model, worker = self.model, self.worker
        assert worker.state is model.state
        assert worker.current_tasks == len(model.inside)
        assert worker.zombies == sum(being.leaving for being in model.inside)
        assert worker.can_accept() is model.accepts()
        assert [ticket.status for _, ticket in self.tickets] == [being.status for being, _ in self.tickets]
        statistics = self.house.statistics()
        assert statistics.waiting == len(model.line)
        assert statistics.zombies >= sum(being.zombie for being in model.inside)
        pool = self.house._running().core.pools.by_type["work"]
        assert pool.slots == model.usable
        assert pool.running == (0 if model.gate is ModelBreakerState.OPEN else len(model.inside))

    def teardown(self) -> None:
        """It ends, whatever is under way; nothing is left."""
        if not hasattr(self, "worker"):
            return
        try:
            for order in self.orders.values():
                if not order.done():
                    order.set_result(None)
            self.let()
            self.loop.run_until_complete(self.house.close())
            assert self.worker.current_tasks == self.worker.zombies == 0
            assert all(ticket.done() for _, ticket in self.tickets)
            assert self.loop.pending() == []
            assert self.loop.errors == []
        finally:
            self.loop.close()
            logging.disable(logging.NOTSET)


TestWorker = WorkerMachine.TestCase
TestWorker.settings = settings(stateful_step_count=40)
