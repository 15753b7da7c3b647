"""A worker of a real supervisor, compared with a model of it, in virtual time.

Tasks arrive, succeed, raise, time out, are cancelled and ignore their cancellation; the worker is revived. After every
step the model and the worker must agree on its state, its slots, its zombies, and the status of every task.
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

TIMEOUT, GRACE, MAX_RESET_TIMEOUT = 10.0, 5.0, 60.0  # seconds
FAULTS_TO_OPEN, PROBES_TO_CLOSE = 5, 2
MAX_QUEUE_SIZE = 4  # tasks that may wait
WAITS = st.sampled_from([0.0, 0.3, 1.1, 2.7, 5.3, 11.9, 31.7, 67.3])  # no sum of them equals a bound


class ModelBreakerState(Enum):
    CLOSED, OPEN, HALF_OPEN = range(3)


@dataclass
class ModelTask:
    """A task in the model."""

    number: int
    ignores_cancellation: bool
    status: TaskStatus = TaskStatus.WAITING
    probe_of: int | None = None  # the breaker epoch in which it started, if it was a probe
    epoch: int = 0
    leaving: bool = False  # told to stop, and still running
    zombie: bool = False  # the same, longer than the grace period


@dataclass
class WorkerModel:
    """A model of one worker and its queue."""

    slots: int
    reset_timeout: float | None
    now: float = 0.0
    gate: ModelBreakerState = ModelBreakerState.CLOSED
    epoch: int = 0
    faults: int = 0  # in a row
    passed: int = 0  # probes, since it was half open
    openings: int = 0  # since it was last closed
    stuck: bool = False
    queue: deque[ModelTask] = field(default_factory=deque)
    running_tasks: list[ModelTask] = field(default_factory=list)  # tasks that hold a slot
    timers: list[tuple[float, int, str, ModelTask | int]] = field(default_factory=list)
    order: int = 0

    def plan(self, after: float, what: str, subject: ModelTask | int) -> None:
        self.order += 1
        heapq.heappush(self.timers, (self.now + after, self.order, what, subject))

    # --- readings ---

    @property
    def probes(self) -> list[ModelTask]:
        return [task for task in self.running_tasks if task.probe_of == self.epoch and not task.leaving]

    @property
    def usable(self) -> int:
        return {ModelBreakerState.CLOSED: self.slots, ModelBreakerState.OPEN: 0, ModelBreakerState.HALF_OPEN: 1}[
            self.gate
        ]

    def accepts(self) -> bool:
        if self.gate is ModelBreakerState.OPEN or len(self.running_tasks) >= self.slots:
            return False
        return self.gate is ModelBreakerState.CLOSED or not self.probes

    @property
    def state(self) -> WorkerState:
        if self.gate is ModelBreakerState.OPEN:
            return WorkerState.FAILED
        if len(self.running_tasks) == self.slots:
            return WorkerState.OVERLOADED
        return WorkerState.BUSY if self.running_tasks else WorkerState.IDLE

    def refuses(self) -> bool:
        if self.queue or not self.accepts():
            return not self.usable or len(self.running_tasks) + len(self.queue) >= self.usable + MAX_QUEUE_SIZE
        return False

    # --- events ---

    def arrive(self, task: ModelTask) -> None:
        if self.refuses():
            task.status = TaskStatus.REJECTED
        else:
            self.queue.append(task)
            self.serve()

    def serve(self) -> None:
        while self.queue and self.accepts():
            task = self.queue.popleft()
            task.status, task.epoch = TaskStatus.RUNNING, self.epoch
            task.probe_of = self.epoch if self.gate is ModelBreakerState.HALF_OPEN else None
            self.running_tasks.append(task)
            self.plan(TIMEOUT, "timeout", task)

    def judge(self, task: ModelTask, *, fault: bool | None) -> None:
        """Update the breaker with the outcome of a run; None is neutral."""
        if task.epoch != self.epoch or self.gate is ModelBreakerState.OPEN or fault is None:
            return
        if self.gate is ModelBreakerState.CLOSED:
            self.faults = self.faults + 1 if fault else 0
            if self.faults == FAULTS_TO_OPEN:
                self.open()
        elif fault:
            self.open()
        else:
            self.passed += 1
            if self.passed == PROBES_TO_CLOSE:
                self.close()

    def open(self) -> None:
        self.gate, self.epoch, self.faults, self.passed = ModelBreakerState.OPEN, self.epoch + 1, 0, 0
        self.openings += 1
        if self.reset_timeout is not None:  # a draw of 0.5 gives three quarters of the time, which doubles
            self.plan(
                0.75 * min(MAX_RESET_TIMEOUT, self.reset_timeout * 2 ** (self.openings - 1)) + 1e-6, "awake", self.epoch
            )

    def close(self) -> None:
        self.gate, self.epoch, self.faults, self.passed, self.openings = (
            ModelBreakerState.CLOSED,
            self.epoch + 1,
            0,
            0,
            0,
        )
        self.stuck = False
        self.serve()

    def leave(self, task: ModelTask) -> None:
        """Free the slot: the handler has ended."""
        self.running_tasks.remove(task)
        if task.zombie and self.stuck and self.reset_timeout is not None:
            self.close()  # only zombies had made it FAILED
        self.serve()

    def end(self, task: ModelTask, status: TaskStatus, *, fault: bool | None) -> None:
        """End a run whose handler returns or raises."""
        if task.leaving:
            self.leave(task)
            return
        task.status = status
        self.running_tasks.remove(task)
        self.judge(task, fault=fault)
        self.serve()

    def stop(self, status: TaskStatus, *tasks: ModelTask, fault: bool | None) -> None:
        """End tickets at the same moment, and cancel their handlers."""
        cancelled = []
        for task in tasks:
            if task in self.queue:
                self.queue.remove(task)
                task.status = status
            elif task in self.running_tasks and not task.leaving:
                task.status, task.leaving = status, True
                self.judge(task, fault=fault)
                cancelled.append(task)
        self.serve()
        for task in cancelled:
            if task.ignores_cancellation:
                self.plan(GRACE, "zombie", task)
            else:
                self.leave(task)

    def pass_time(self, until: float) -> None:
        while self.timers and self.timers[0][0] <= until:
            self.now = self.timers[0][0]
            due = []
            while self.timers and self.timers[0][0] == self.now:
                due.append(heapq.heappop(self.timers)[2:])
            late = [subject for what, subject in due if what == "timeout" and isinstance(subject, ModelTask)]
            self.stop(TaskStatus.TIMED_OUT, *(task for task in late if task in self.running_tasks), fault=True)
            for what, subject in due:
                if what == "awake" and subject == self.epoch and self.gate is ModelBreakerState.OPEN:
                    self.gate, self.epoch = ModelBreakerState.HALF_OPEN, self.epoch + 1
                    self.serve()
                elif what == "zombie" and isinstance(subject, ModelTask) and subject in self.running_tasks:
                    subject.zombie = True
                    if (
                        sum(task.zombie for task in self.running_tasks) == self.slots
                        and self.gate is not ModelBreakerState.OPEN
                    ):
                        self.open()
                        self.stuck = True
        self.now = until


class WorkerMachine(RuleBasedStateMachine):
    """A state machine that does the same to the worker and to the model."""

    @initialize(slots=st.integers(1, 3), reset_timeout=st.sampled_from([8.0, 8.0, 30.0, None]))
    def build(self, slots: int, reset_timeout: float | None) -> None:
        logging.disable(logging.CRITICAL)
        self.model = WorkerModel(slots, reset_timeout)
        self.loop = VirtualLoop(0, jitter=0.0)
        self.orders: dict[int, asyncio.Future[None]] = {}
        self.tickets: list[tuple[ModelTask, Ticket]] = []
        self.supervisor = BackpressureSupervisor(
            backpressure_threshold=1.0, max_queue_size=MAX_QUEUE_SIZE, zombie_grace=GRACE
        )
        self.worker = self.supervisor.register_worker(
            "w",
            handler=self.handler,
            task_types=["work"],
            max_concurrent=slots,
            timeout=TIMEOUT,
            reset_timeout=reset_timeout,
        )
        self.loop.run_until_complete(self.supervisor.start())
        self.supervisor._draw = lambda: 0.5

    async def handler(self, task: Task) -> None:
        number, ignores_cancellation = task.payload
        while True:
            try:
                await asyncio.shield(self.orders[number])
            except asyncio.CancelledError:
                if not ignores_cancellation:
                    raise
            else:
                return

    def advance(self, seconds: float = 0.0) -> None:
        """Advance the clock, and run all ready callbacks."""

        async def pause() -> None:
            await asyncio.sleep(seconds)
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(pause())

    @property
    def running(self) -> list[ModelTask]:
        return [task for task, _ in self.tickets if task in self.model.running_tasks]

    # --- rules ---

    @rule(ignores_cancellation=st.sampled_from([False, False, True]))
    def arrive(self, *, ignores_cancellation: bool) -> None:
        task = ModelTask(len(self.tickets), ignores_cancellation)
        self.orders[task.number] = self.loop.create_future()
        self.model.arrive(task)

        async def submit() -> Ticket:
            return self.supervisor.submit_nowait(Task("work", (task.number, ignores_cancellation)))

        self.tickets.append((task, self.loop.run_until_complete(submit())))
        self.advance()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), raises=st.sampled_from([False, True, True]))
    def end(self, data: st.DataObject, *, raises: bool) -> None:
        task = data.draw(st.sampled_from(self.running))
        order = self.orders[task.number]
        if raises:
            order.set_exception(ValueError())
        else:
            order.set_result(None)
        self.model.end(task, TaskStatus.FAILED if raises else TaskStatus.SUCCEEDED, fault=raises)
        self.advance()

    @rule(times=st.integers(1, 6))
    def fail_in_a_row(self, times: int) -> None:
        for _ in range(times):
            self.arrive(ignores_cancellation=False)
            if not (running := [task for task in self.running if not task.leaving]):
                break
            self.orders[running[0].number].set_exception(ValueError())
            self.model.end(running[0], TaskStatus.FAILED, fault=True)
            self.advance()

    @precondition(lambda self: self.model.reset_timeout is not None)
    @rule(ignores_cancellation=st.booleans(), behind=st.integers(0, 2))
    def become_half_open(self, behind: int, *, ignores_cancellation: bool) -> None:
        self.revive()
        self.wait(MAX_RESET_TIMEOUT)  # earlier runs have ended, or are zombies
        self.fail_in_a_row(FAULTS_TO_OPEN)
        self.wait(MAX_RESET_TIMEOUT)
        self.arrive(ignores_cancellation=ignores_cancellation)
        for _ in range(behind):
            self.arrive(ignores_cancellation=False)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        alive = [pair for pair in self.tickets if pair[0] in self.model.running_tasks or pair[0] in self.model.queue]
        task, ticket = data.draw(st.sampled_from(alive or self.tickets))
        self.model.stop(TaskStatus.CANCELLED, task, fault=None)

        async def cancel() -> None:
            ticket.cancel()

        self.loop.run_until_complete(cancel())
        self.advance()

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        self.model.pass_time(self.model.now + seconds)
        self.advance(seconds)

    @rule()
    def revive(self) -> None:
        self.model.close()

        async def revive() -> None:
            self.worker.revive()

        self.loop.run_until_complete(revive())
        self.advance()

    # --- invariants ---

    @invariant()
    def model_and_worker_agree(self) -> None:
        if not hasattr(self, "worker"):  # hypothesis has given the example up in `build`
            logging.disable(logging.NOTSET)
            return
        model, worker = self.model, self.worker
        assert worker.state is model.state
        assert worker.current_tasks == len(model.running_tasks)
        assert worker.zombies == sum(task.leaving for task in model.running_tasks)
        assert worker.can_accept() is model.accepts()
        assert [ticket.status for _, ticket in self.tickets] == [task.status for task, _ in self.tickets]
        statistics = self.supervisor.statistics()
        assert statistics.waiting == len(model.queue)
        assert statistics.zombies >= sum(task.zombie for task in model.running_tasks)
        pool = self.supervisor._running().core.pools.by_type["work"]
        assert pool.slots == model.usable
        assert pool.running == (0 if model.gate is ModelBreakerState.OPEN else len(model.running_tasks))

    def teardown(self) -> None:
        """Close the supervisor at any moment; nothing is left."""
        if not hasattr(self, "worker"):  # hypothesis has given the example up in `build`
            logging.disable(logging.NOTSET)
            return
        try:
            for order in self.orders.values():
                if not order.done():
                    order.set_result(None)
            self.advance()
            self.loop.run_until_complete(self.supervisor.close())
            assert self.worker.current_tasks == self.worker.zombies == 0
            assert all(ticket.done() for _, ticket in self.tickets)
            assert self.loop.pending() == []
            assert self.loop.errors == []
        finally:
            self.loop.close()
            logging.disable(logging.NOTSET)


TestWorker = WorkerMachine.TestCase
TestWorker.settings = settings(stateful_step_count=40)
