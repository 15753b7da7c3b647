"""A storm on the task plane, drawn from a seed: conversations and nested tasks under cancellations, kills and stops.

Processes share a store that is slow, fails or vanishes; they drain and close within limits, or crash, and others take
over. Conversations are busy, handlers run nested tasks several levels deep and leave them by timeouts, the wall clock
is set, workers start late or not at all, and hooks raise anything and call the supervisor. The lives of workers end
while tasks run on them, and are started again or given up, some in supervisors below; workers are unregistered and come
back, and types are paused. Handlers and callers watch what they see themselves; the other checks use the record of
events and the writes that the store acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from tests.simulation.storm_lives import CHANGES, LivesScript, Trouble, WorkerLives
from tests.simulation.storm_script import (
    GRACE,
    LATE_TYPE,
    LEASE,
    TYPES,
    StormLifetime,
    StormRetries,
    StormScript,
    StormWorker,
)
from tests.support import run_checks
from tests.support.supervisor_checks import InvariantViolation, fail_if_any
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, Deadline, Estimate, ForebayError, Priority, Task, Tenant, Ticket, Verdict
from forebay.adapters import Handler
from forebay.errors import StoreUnavailable, SupervisorClosed, TaskCancelled, UnknownTaskType, WorkerNotStarted
from forebay.events import (
    Event,
    TaskDeadLettered,
    TaskFinished,
    TaskRetried,
    TaskStarted,
    WorkerExited,
    WorkerFailed,
    WorkerRestarted,
)
from forebay.interfaces import PutResult, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.retry import RetryBudget
from forebay.simulation import simulate, virtual_loop
from forebay.supervisor import WorkerAgent
from forebay.testing import EventRecord

PATIENCE: Final = 10_000.0  # seconds in which everything must have ended: many times the work of a storm
HURRY: Final = 2.0  # seconds: four of the slowest writes
MAX_DELAY: Final = 2 * LEASE + GRACE + 10.0  # seconds until a process sees what another one did, or failed to do
TAKE_OVER: Final = 400.0  # seconds in which a process knows that a lease is another clock's, and takes the task over
MAX_ACTIONS: Final = 200  # of all hooks of one storm
MAX_ATTEMPTS: Final = 3  # of a stored task without a policy under which the lives of its workers end
TENANTS: Final = ("big", "big", "big", "small", "default")


class StrangeError(BaseException):
    """Derived from nothing that code usually catches."""


ERRORS: Final[tuple[type[BaseException], ...]] = (
    ValueError, SystemExit, GeneratorExit, asyncio.CancelledError, RecursionError, StopIteration, MemoryError,
    StrangeError,
)  # fmt: skip


class HookedAgent:
    """An agent with the hooks of a Handler."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __forebay_handler__(self) -> Handler:
        return self._handler


class StormStore(UnreliableStore):
    """The store of one process, which reports what it acknowledges into a file that was removed before."""

    lost = False
    acknowledged_into_lost_file: list[str]

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        lost = self.lost
        put = await super().put(record, fence=fence, until=until, now=now)
        if lost and put.written:
            self.acknowledged_into_lost_file.append(record.task_id)
        return put


@dataclass(eq=False)
class StormProcess:
    """A supervisor, its store, its callers, and what its handlers see.

    Attributes:
        at_work: by worker, how many handlers work now: those that await a nested task do not.
        talking: by conversation, how many of its handlers have begun and not ended.
        stopping: True from the beginning of its end.
        lives: by worker, those whose lives end.
        agents: all workers that were registered, those below others included.
        below: the records of supervisors that are workers.
        removals: the workers that are being unregistered.
        cut: the tasks whose handler was stopped with the life of its worker, and when.
    """

    number: int
    supervisor: BackpressureSupervisor
    record: EventRecord
    store: StormStore | None
    dead: bool = False
    stopping: bool = False
    is_last: bool = False
    limit: float | None = None  # of its drain
    started_at: float = 0.0
    closing_from: float = math.inf  # the number of its events before it was closed without a drain
    at_work: Counter[WorkerAgent] = field(default_factory=Counter)
    talking: Counter[str] = field(default_factory=Counter)
    lives: dict[str, WorkerLives] = field(default_factory=dict)
    agents: list[WorkerAgent] = field(default_factory=list)
    below: list[EventRecord] = field(default_factory=list)
    removals: list[asyncio.Future[None]] = field(default_factory=list)
    cut: list[tuple[str, float]] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    callers: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def hurried(self) -> bool:
        """True if the store had not the time for a few writes while it drained."""
        return self.limit is not None and self.limit < HURRY


class ProcessSink:
    """An event sink that is a hook of its process."""

    def __init__(self, hook: Callable[[StormProcess], object]) -> None:
        self._hook = hook
        self.process: StormProcess

    def __call__(self, _: Event) -> None:
        self._hook(self.process)


class TaskStorm:
    """One storm.

    Args:
        seed: draws it.
        path: the file of its overflow in SQLite, if it has a durable one.
        url: another durable overflow, which no other storm uses. It has no file that could be lost.

    Attributes:
        happened: how often each thing happened.
        violations: what handlers and callers saw that must not be.
    """

    def __init__(self, seed: int, path: Path, url: str | None = None) -> None:
        self.rng = random.Random(f"storm {seed}")
        self.attempts = random.Random(f"attempts {seed}")  # apart, so that retries change nothing else of a seed
        self.tenancy = random.Random(f"tenants {seed}")  # apart, so that tenants change no other draw of a seed
        self.changes = random.Random(f"changes {seed}")  # apart, so that resizes and fan-outs change no other draw
        self.resizes = self.changes.random() < 0.3
        self.fans_out = self.changes.random() < 0.3
        self.tenants = _draw_tenants(self.tenancy)
        script = StormScript.draw(self.rng, StormRetries.draw(self.attempts))
        lives = random.Random(f"lives {seed}")  # apart, so that restarts change no other draw of a seed
        self.lives = LivesScript.draw(lives, [worker.name for worker in script.workers])
        self.script = script if url is None else dataclasses.replace(script, file_lost=None)
        self.happened: Counter[str] = Counter()
        self.trouble = Trouble(lives, self.happened)
        self.violations: list[str] = []
        self.acknowledged = AcknowledgedWrites()
        self.acknowledged_into_lost_file: list[str] = []
        self.processes: list[StormProcess] = []  # all that were started
        self.open: list[StormProcess] = []  # those that accept tasks
        self.running: dict[str, list[StormProcess]] = defaultdict(list)  # by task id
        self.due: dict[str, float] = {}  # loop time of the deadlines, by task id
        self.order: dict[str, list[int]] = defaultdict(list)  # by conversation, the first starts of its messages
        self._path = path
        self._url = url or f"sqlite:///{path}?fsync=no"
        self._actions = 0  # of hooks
        self._slots = {worker.name: worker.slots for worker in self.script.workers}
        self._over: asyncio.Event

    def _wrong(self, what: str) -> None:
        self.violations.append(f"at {virtual_loop().time():.3f} s {what}")

    # --- hooks ---

    def _hook(self, process: StormProcess, *, within: Task | None = None) -> Any:
        if self._actions >= MAX_ACTIONS:
            return
        self._actions += 1
        actions = ("raise", "submit", "cancel", "revive", "nothing", "drain", "close")
        ends = 0.0 if process.is_last else 0.3
        action = self.rng.choices(actions, (25, 25, 15, 3, 31, ends, ends))[0]
        self.happened[f"hook: {action}"] += 1
        supervisor = process.supervisor
        match action:
            case "raise":
                raise self.rng.choice(ERRORS)
            case "submit":
                task = self._draw_task(0, self.script.conversations)
                if within is not None:
                    self._inherit_deadline(task, within)
                with contextlib.suppress(ForebayError):
                    self._keep(process, supervisor.submit_nowait(task))
            case "cancel" if process.tickets:
                self.rng.choice(process.tickets).cancel()
            case "revive" if supervisor.workers:
                self.rng.choice(list(supervisor.workers.values())).revive()
            case "drain":
                process.stopping = True
                _forget(asyncio.ensure_future(supervisor.drain(self.rng.choice((0.0, 1.0, None)))))
            case "close":
                process.stopping = True
                _forget(asyncio.ensure_future(supervisor.close()))

    # --- handlers ---

    @contextlib.contextmanager
    def _working(self, process: StormProcess, worker: WorkerAgent) -> Iterator[None]:
        process.at_work[worker] += 1
        slots = self._slots[worker.name]
        if self.resizes:  # one that was made smaller goes on with what runs on it
            slots = max(worker.max_concurrent, worker.current_tasks)
        if process.at_work[worker] > slots and not process.dead:
            self._wrong(f"{process.at_work[worker]} tasks are at work on {worker.name!r} of {slots} slots")
        try:
            yield
        finally:
            process.at_work[worker] -= 1

    @contextlib.contextmanager
    def _talking(self, process: StormProcess, task: Task) -> Iterator[None]:
        thread = task.thread_id
        if thread is None:
            yield
            return
        process.talking[thread] += 1
        if process.talking[thread] > 1 and not process.dead:
            self._wrong(f"{process.talking[thread]} tasks of conversation {thread!r} run at a time")
        number = task.payload["number"]
        if number is not None and not process.dead and number not in self.order[thread]:
            self.order[thread].append(number)
        try:
            yield
        finally:
            process.talking[thread] -= 1

    @contextlib.contextmanager
    def _running(self, process: StormProcess, task: Task) -> Iterator[None]:
        """Check that no other living process runs the task, unless the store makes it look abandoned."""
        others = self.running[task.task_id]
        alive = [other for other in others if not other.dead and other is not process]
        faults = self.script.faults
        excused = faults.hangs or faults.loses_reply or self.script.file_lost is not None or self._started_after_step()
        if alive and not excused and not self.script.wild:
            self._wrong(f"{task.task_id!r} runs in two living processes")
        others.append(process)
        try:
            yield
        finally:
            others.remove(process)

    async def _handle(self, process: StormProcess, worker: WorkerAgent, task: Task) -> Any:
        with self._talking(process, task), self._running(process, task):
            mood = task.payload["mood"]
            try:
                await self._work(process, worker, task)
            except asyncio.CancelledError:
                if mood != "swallow":
                    raise
                await asyncio.sleep(self.rng.uniform(0.0, 5.0))
            if mood == "fail":
                message = "the agent failed \ud83d"  # half of a surrogate pair
                raise ValueError(message)
            if self.script.retries is not None and self.attempts.random() < self.script.retries.fails:
                message = "the agent failed this time"
                raise ConnectionError(message)
            if mood == "strange":
                raise self.rng.choice(ERRORS)
            return task.task_id

    async def _work(self, process: StormProcess, worker: WorkerAgent, task: Task) -> None:
        rng, depth, lowest = self.rng, task.payload["depth"], task.payload["lowest"]
        for _ in range(rng.randint(1, 2)):
            with self._working(process, worker):
                await asyncio.sleep(task.payload["work"])
                if self.script.wild and rng.random() < 0.05:
                    self._hook(process, within=task)
            if depth:
                children = [self._draw_task(depth - 1, lowest) for _ in range(rng.choice((1, 1, 2, 4)))]
                for child in children:
                    self._inherit_deadline(child, task)
                await self._nest(process, children)
        with self._working(process, worker):
            await asyncio.sleep(task.payload["work"])

    def _inherit_deadline(self, child: Task, parent: Task) -> None:
        self.due[child.task_id] = min(self.due.get(each.task_id, math.inf) for each in (parent, child))

    async def _nest(self, process: StormProcess, children: list[Task]) -> None:
        """Run nested tasks: some parents are impatient, cancel, or look at several at once."""
        rng, supervisor = self.rng, process.supervisor
        impatient = rng.random() < self.script.impatient
        with contextlib.suppress(ForebayError, TimeoutError):
            if len(children) > 1 and self.fans_out and self.changes.random() < 0.5:
                self.happened["fan-out"] += 1
                quorum = self.changes.choice((None, None, 1))
                async with (
                    asyncio.timeout(rng.uniform(0.0, 2.0) if impatient else None),
                    supervisor.fan_out(children, limit=self.changes.choice((None, 1)), quorum=quorum) as results,
                ):
                    async for _ in results:
                        pass
            elif len(children) > 1:
                async with asyncio.timeout(rng.uniform(0.0, 2.0) if impatient else None):
                    await asyncio.gather(*map(supervisor.run, children), return_exceptions=True)
            elif impatient:
                async with asyncio.timeout(rng.uniform(0.0, 1.0)), asyncio.timeout(rng.uniform(0.0, 1.0)):
                    await supervisor.run(children[0])
            elif rng.random() < 0.2:
                ticket = self._keep(process, await supervisor.submit(children[0]))
                if rng.random() < 0.5:
                    await asyncio.sleep(0)
                    ticket.cancel()
                await ticket
            else:
                await supervisor.run(children[0])

    def _draw_task(self, depth: int, lowest: int, *, number: int | None = None, **options: Any) -> Task:
        """Return a task. The conversation of a nested one has at least the number `lowest`: none waits for itself."""
        rng, script = self.rng, self.script
        if number is None and lowest < script.conversations and rng.random() < 0.2:
            chosen = rng.randrange(lowest, script.conversations)
            options["thread_id"], lowest = f"c{chosen}", chosen + 1
        moods = {"fail": script.fails, "strange": 0.02 if script.wild else 0.0, "swallow": 0.02 if script.wild else 0.0}
        mood = next((mood for mood, chance in moods.items() if rng.random() < chance), "well")
        work = rng.choice((0.0, script.work / 5, script.work))
        deadline = Deadline.within(rng.uniform(0.1, 30.0)) if rng.random() < script.deadlines else None
        task = Task(
            LATE_TYPE if number is None and not depth and rng.random() < 0.1 else rng.choice(TYPES),
            {"number": number, "depth": depth, "lowest": lowest, "work": work, "mood": mood},
            priority=rng.choice(tuple(Priority)),
            timeout=rng.choice((None, None, None, 3.0)) if script.fails else None,
            deadline=deadline,
            spill=rng.random() < 0.8 or options.get("durable", False),
            tenant=self.tenancy.choice(TENANTS) if self.tenants else "default",
            estimate=Estimate(calls=1 + round(100 * work)) if number is None or number % 3 else None,
            **options,
        )
        if deadline is not None:
            self.due[task.task_id] = virtual_loop().time() + deadline.remaining()
        return task

    def _register(self, process: StormProcess, plan: StormWorker) -> None:
        ready = plan.start_time is None

        async def start() -> None:
            nonlocal ready
            await asyncio.sleep(plan.start_time or 0.0)
            if self.rng.random() < plan.start_fails:
                message = "the handler cannot start yet"
                raise ConnectionError(message)
            ready = True

        lives = self._lives_of(plan)

        async def call(task: Task) -> Any:
            if not (ready or process.dead):
                self._wrong(f"worker {plan.name!r} was given {task.task_id!r} before its handler had started")
            with self._in_one_life(process, plan, lives, task):
                return await self._handle(process, agent, task)

        def hook(*_: object) -> Any:
            return self._hook(process)

        async def async_hook(*_: object) -> None:
            await asyncio.sleep(0.1)
            self._hook(process)

        handler = HookedAgent(
            Handler(
                call=call,
                start=None if plan.start_time is None else start,
                on_end=hook if "on_end" in plan.hooks else None,
                on_cancel=async_hook
                if "async on_cancel" in plan.hooks
                else hook
                if "on_cancel" in plan.hooks
                else None,
                stop=async_hook if "stop" in plan.hooks else None,
            )
        )
        options: dict[str, Any] = {"task_types": plan.kinds, "timeout": plan.timeout, "reset_timeout": 1.0}
        outer: dict[str, Any] = {
            "max_open": plan.max_open,
            "retry": None if self.script.retries is None else self.script.retries.policy,
        }
        supervisor, life = process.supervisor, {} if lives is None else lives.options(plan.start_time or 0.0)
        if self.lives is not None and self.lives.workers[plan.name].nested:
            below = BackpressureSupervisor(max_queue_size=100, zombie_grace=GRACE, **self._supervision(self.lives))
            agent = below.register_worker(plan.name, handler=handler, max_concurrent=plan.slots, **options, **life)
            process.below.append(EventRecord(below))
            process.agents.append(agent)
            restart = self.lives.workers[plan.name].restart
            process.agents.append(
                supervisor.register_worker(
                    plan.name, handler=below, max_concurrent=plan.slots, restart=restart, **options, **outer
                )
            )
        else:
            agent = supervisor.register_worker(
                plan.name, handler=handler, max_concurrent=plan.slots, **options, **outer, **life
            )
            process.agents.append(agent)
        if lives is not None:
            process.lives[plan.name] = lives

    # --- the lives of workers ---

    def _supervision(self, lives: LivesScript | None) -> dict[str, Any]:
        """Return settings of a supervisor."""
        if lives is None:
            return {}
        return {"strategy": lives.strategy, "max_restarts": lives.max_restarts, "within": lives.within}

    def _lives_of(self, plan: StormWorker) -> WorkerLives | None:
        if self.lives is None:
            return None
        errors = (ConnectionError, StrangeError, MemoryError) if self.script.wild else (ConnectionError,)
        return WorkerLives(plan.name, self.lives.workers[plan.name], self.trouble, errors)

    @contextlib.contextmanager
    def _in_one_life(
        self, process: StormProcess, plan: StormWorker, lives: WorkerLives | None, task: Task
    ) -> Iterator[None]:
        """Check that a task begins while its worker is up, and does not go on in the next life of it."""
        if lives is None or process.dead:
            yield
            return
        if lives.is_down:
            self._wrong(f"{task.task_id!r} began on worker {plan.name!r}, which is down")
        number = lives.number
        try:
            yield
        except asyncio.CancelledError:
            if not lives.up or lives.number != number:
                process.cut.append((task.task_id, virtual_loop().time()))
            raise
        if lives.number != number and not self.script.wild and not process.dead:
            self._wrong(f"{task.task_id!r} began in life {number} of {plan.name!r}, and ended in its {lives.number}th")

    async def _change_lives(self, process: StormProcess, lives: LivesScript) -> None:
        """Unregister and revive workers, and pause types, now and then."""
        rng, supervisor = self.trouble.rng, process.supervisor
        while lives.changes_every is not None:
            await asyncio.sleep(rng.expovariate(1 / lives.changes_every))
            if not supervisor.workers or not self.trouble.draw(what := rng.choice(CHANGES), 1.0):
                continue
            worker = rng.choice(list(supervisor.workers.values()))
            with contextlib.suppress(SupervisorClosed, UnknownTaskType):
                match what:
                    case "unregister":
                        gone = supervisor.unregister_worker(worker.name, timeout=rng.choice((None, 0.0, 1.0)))
                        process.removals.append(asyncio.ensure_future(gone))
                    case "pause":
                        supervisor.pause(rng.choice(worker.task_types))
                    case "revive":
                        worker.revive()

    async def _restore_lives(self, process: StormProcess, lives: LivesScript) -> None:
        """Bring back what is down for good, again and again."""
        while True:
            await asyncio.sleep(self.trouble.rng.uniform(0.1, lives.restores_after))
            self._restore(process)

    def _restore(self, process: StormProcess) -> None:
        supervisor = process.supervisor
        for plan in self.script.workers:
            if plan.name not in process.lives:  # it is registered later
                continue
            with contextlib.suppress(SupervisorClosed):
                if plan.name not in supervisor.workers:
                    self.happened["registered again"] += 1
                    self._register(process, plan)
        for record in (process.record, *process.below):
            for worker in list(record.supervisor.workers.values()):
                if worker.failed and worker.breaker.retry_after(virtual_loop().time()) is None:
                    self.happened["revived"] += 1
                    worker.revive()
        for kind in (*TYPES, LATE_TYPE):
            with contextlib.suppress(SupervisorClosed, UnknownTaskType):
                supervisor.resume(kind)

    # --- processes ---

    def _overflow(self, faults: StoreFaults) -> TaskStore | str | None:
        if self.script.overflow != "sqlite":
            return self.script.overflow
        store = open_task_store(self._url)
        unreliable = StormStore(store, faults, self.acknowledged, random.Random(self.rng.random()))
        unreliable.acknowledged_into_lost_file = self.acknowledged_into_lost_file
        return unreliable

    async def _start(self, faults: StoreFaults, *, lease: float = LEASE) -> StormProcess:
        """Start a new process, as soon as its store is available."""
        while True:
            overflow = self._overflow(faults)
            sink = ProcessSink(self._hook)
            supervisor = BackpressureSupervisor(
                max_queue_size=self.script.max_queue_size,
                overflow=overflow,
                lease=lease,
                zombie_grace=GRACE,
                keep_results=self.script.keep_results,
                on_event=self._sinks(sink),
                retry_budget=self._retry_budget(),
                tenants=self.tenants,
                max_attempts=MAX_ATTEMPTS,
                **self._supervision(self.lives),
            )
            store = overflow if isinstance(overflow, StormStore) else None
            process = StormProcess(len(self.processes), supervisor, EventRecord(supervisor), store)
            sink.process = process
            for plan in self.script.workers:
                if plan.late is None:
                    self._register(process, plan)
            try:
                await supervisor.start()
            except (StoreUnavailable, WorkerNotStarted, OSError) as error:
                left = [name for name, lives in process.lives.items() if lives.up]
                if left and not isinstance(error, StoreUnavailable):
                    self._wrong(f"after a start that failed, {left} live")
                await asyncio.sleep(1.0)
                continue
            process.started_at = virtual_loop().time()
            self.processes.append(process)
            return process

    def _sinks(self, sink: ProcessSink) -> list[Callable[[Event], None]]:
        def revive(event: Event) -> None:
            supervisor = sink.process.supervisor
            if isinstance(event, WorkerFailed) and event.retry_in is None and event.worker_id in supervisor.workers:
                supervisor.workers[event.worker_id].revive()

        by_sink = self.lives is not None and self.lives.revived_by_sink
        return [*([sink] if self.script.sinks else []), *([revive] if by_sink else [])]

    def _retry_budget(self) -> RetryBudget | None:
        retries = self.script.retries
        return None if retries is None else RetryBudget(share=retries.budget_share, extra=retries.budget_extra)

    async def _register_late(self, process: StormProcess, plan: StormWorker) -> None:
        await asyncio.sleep(plan.late or 0.0)
        with contextlib.suppress(SupervisorClosed):
            self._register(process, plan)

    async def _run_lifetimes(self, lifetimes: tuple[StormLifetime, ...]) -> None:
        """Run one process after the other."""
        for lifetime in lifetimes:
            await asyncio.sleep(lifetime.starts - virtual_loop().time())
            process = await self._start(self.script.faults)
            late = [
                asyncio.ensure_future(self._register_late(process, plan))
                for plan in self.script.workers
                if plan.late is not None
            ]
            background = [asyncio.ensure_future(self._resize(process)), *self._supervise(process)]
            self.open.append(process)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(lifetime.ends):
                    await self._over.wait()
            self.open.remove(process)
            await asyncio.gather(*late)
            if lifetime.ends == math.inf:
                await self._calm_down(process)
            await self._end(process, lifetime)
            await self._end_background(process, background)

    def _supervise(self, process: StormProcess) -> list[asyncio.Future[None]]:
        """Begin to change and to restore the lives of the workers of a process."""
        lives = self.lives
        if lives is None:
            return []
        return [asyncio.ensure_future(work(process, lives)) for work in (self._change_lives, self._restore_lives)]

    async def _end_background(self, process: StormProcess, background: list[asyncio.Future[None]]) -> None:
        for work in background:
            if work.done():
                work.result()
            work.cancel()
        for gone in process.removals:
            with contextlib.suppress(SupervisorClosed):
                await gone

    async def _resize(self, process: StormProcess) -> None:
        """Give the workers other numbers of slots now and then, in some storms."""
        while self.resizes:
            await asyncio.sleep(self.changes.expovariate(0.5))
            if not process.supervisor.workers:
                continue
            worker = self.changes.choice(list(process.supervisor.workers.values()))
            worker.resize(self.changes.randint(1, 2 * self._slots[worker.name]))
            self.happened["resize"] += 1

    async def _calm_down(self, process: StormProcess) -> None:
        """Let nothing go wrong any more, and check that all workers come back, and nothing stands still."""
        if self.lives is None:
            return
        fail_if_any("what handlers and callers see is as promised", self.violations)  # else the drain may never end
        self.trouble.end()
        supervisor, due = process.supervisor, virtual_loop().time() + PATIENCE
        while (busy := self._what_is_busy(process)) and not process.stopping:
            if virtual_loop().time() > due:
                message = f"{PATIENCE:.0f} s after the last trouble {busy}"
                raise InvariantViolation(message)
            await asyncio.sleep(5.0)
        for kind in TYPES:
            if process.stopping:
                return
            self.happened["calmed down"] += 1
            work = {"number": None, "depth": 0, "lowest": 0, "work": 0.0, "mood": "well"}
            with contextlib.suppress(ForebayError):
                await asyncio.wait_for(supervisor.run(Task(kind, work)), 100.0)

    def _what_is_busy(self, process: StormProcess) -> str:
        """Return what keeps a process from being at rest."""
        supervisor = process.supervisor
        counts = supervisor.statistics()
        outside = 0 if self.script.overflow == "sqlite" else counts.outside  # where others may have them
        if counts.running or counts.waiting or counts.suspended or outside:
            return f"{counts.running} tasks run, {counts.waiting + outside} wait, {counts.suspended} are suspended"
        for plan in self.script.workers:
            late = plan.late is not None and plan.start_time is not None and plan.start_fails
            if plan.name not in process.lives or late:
                continue
            worker = supervisor.workers.get(plan.name)
            if worker is None:
                return f"worker {plan.name!r} is not back"
            if worker.leaving or not (worker.can_accept() and process.lives[plan.name].up):
                return f"{worker!r} takes no task, and its life is {'up' if process.lives[plan.name].up else 'down'}"
        loads = {kind: supervisor.load_of(kind) for kind in TYPES}
        return f"the loads are {loads}" if any(loads.values()) else ""

    async def _end(self, process: StormProcess, lifetime: StormLifetime) -> None:
        """End a process in the given way, and check how long that takes."""
        self.happened[lifetime.end] += 1
        supervisor, process.stopping, process.limit = process.supervisor, True, lifetime.limit
        with contextlib.suppress(StoreUnavailable):
            match lifetime.end:
                case "drain":
                    report = await supervisor.drain()
                    self.happened["moved by a drain"] += report.spilled
                case "drain within":
                    before = virtual_loop().time()
                    report = await supervisor.drain(lifetime.limit)
                    took = virtual_loop().time() - before
                    self.happened["moved by a drain"] += report.spilled
                    if took > (lifetime.limit or 0.0) + GRACE + 0.1:
                        self._wrong(f"a drain of at most {lifetime.limit} s and a grace of {GRACE} s took {took:.3f} s")
                case "close":
                    process.closing_from = len(process.record.events)
                case "fail":
                    process.closing_from = len(process.record.events)
                    await supervisor.__aexit__(ValueError, ValueError(), None)
                case "crash":
                    await self._crash(process)
            await supervisor.close()

    async def _crash(self, process: StormProcess) -> None:
        """Crash: from now on nothing reaches the store or the callers."""
        process.dead = True
        process.record.stop()
        if process.store is not None:
            process.store.disconnect()
        for caller in process.callers:
            caller.cancel()
        with contextlib.suppress(StoreUnavailable):
            await process.supervisor.close()

    async def _step_clock(self, at: float, seconds: float) -> None:
        await asyncio.sleep(at)
        self.happened["clock step"] += 1
        virtual_loop().step_wall_time(seconds)

    async def _lose_file(self, at: float) -> None:
        await asyncio.sleep(at)
        self.happened["file lost"] += 1
        for path in self._path.parent.glob(f"{self._path.name}*"):
            path.unlink()
        for process in self.processes:
            if process.store is not None:
                process.store.lost = True
        self.acknowledged.uncertain |= self.acknowledged.stored
        self.acknowledged.stored.clear()

    # --- callers ---

    def _keep(self, process: StormProcess, ticket: Ticket) -> Ticket:
        self.happened[ticket.verdict.value if ticket.verdict is not None else "looked up"] += 1
        if ticket:
            process.tickets.append(ticket)
        return ticket

    async def _converse(self, conversation: int, messages: int, *, durable: bool) -> None:
        """Submit the messages of a conversation one after the other, without waiting for their ends."""
        rng, spread = self.rng, self.script.spread
        for number in range(messages):
            await asyncio.sleep(rng.uniform(0.0, 2 * spread / messages))
            thread = f"c{conversation}"
            stored = durable or rng.random() < self.script.durable
            task = self._draw_task(self._depth(), conversation + 1, number=number, thread_id=thread, durable=stored)
            ticket = await self._submit(task)
            if ticket is None or not ticket:
                self.happened["message not taken"] += 1
            elif rng.random() < 0.1:
                ticket.cancel()

    def _depth(self) -> int:
        return self.rng.randint(1, 3) if self.rng.random() < self.script.nests else 0

    async def _submit(self, task: Task) -> Ticket | None:
        """Submit to an open process; return None if that could not be done."""
        if not self.open:
            return None
        process = self.rng.choice(self.open)
        me = asyncio.current_task()
        assert me is not None
        process.callers.add(me)
        try:
            if not task.durable and self.rng.random() < 0.1:
                return self._keep(process, process.supervisor.submit_nowait(task))
            return self._keep(process, await process.supervisor.submit(task))
        except (StoreUnavailable, ForebayError):
            return None
        except asyncio.CancelledError:
            if not process.dead:
                raise
            return None
        finally:
            process.callers.discard(me)

    async def _call(self, at: float) -> None:
        """Submit one task without a conversation, wait for it for a while, and perhaps leave or cancel it."""
        rng = self.rng
        await asyncio.sleep(at)
        task = self._draw_task(self._depth(), 0, durable=rng.random() < self.script.durable)
        if rng.random() < self.script.keyed:
            await self._call_together(task)
            return
        ticket = await self._submit(task)
        if ticket is None:
            return
        if rng.random() < self.script.lookups and self.open:
            await self._look_up(self.rng.choice(self.open), task)
        impatient = rng.random() < self.script.impatient
        with contextlib.suppress(ForebayError, TimeoutError):
            async with asyncio.timeout(rng.uniform(0.0, 5.0) if impatient else PATIENCE):
                await ticket
        if not (ticket.done() or impatient or (task.task_type == LATE_TYPE and not self.script.serves_late)):
            self._wrong(f"{ticket!r} has not ended in {PATIENCE:.0f} s")
        ticket.cancel()

    async def _call_together(self, task: Task) -> None:
        """Submit one task by several callers at a time, by its key: the impatient ones must not end it for the last."""
        if not self.open:
            return
        process, key = self.rng.choice(self.open), f"key of {task.task_id}"
        tasks = [msgspec.structs.replace(task, task_id=f"{task.task_id}-{number}", key=key) for number in range(3)]
        self.due.update({each.task_id: self.due.get(task.task_id, math.inf) for each in tasks})
        impatient = [asyncio.ensure_future(self._leave_early(process, each)) for each in tasks[:2]]
        await asyncio.sleep(0)
        with contextlib.suppress(ForebayError):
            try:
                self.happened["keyed"] += 1
                await process.supervisor.run(tasks[2])
            except TaskCancelled as error:
                unregistered = "was unregistered" in str(error)
                if not (process.stopping or self.script.wild or unregistered):
                    self._wrong(f"a caller of {key!r} who waits got {error}, when another one had left")
        await asyncio.gather(*impatient)

    async def _leave_early(self, process: StormProcess, task: Task) -> None:
        with contextlib.suppress(ForebayError, TimeoutError):
            async with asyncio.timeout(self.rng.choice((0.0, 0.002, 0.1, 1.0))):
                await process.supervisor.run(task)

    async def _look_up(self, process: StormProcess, task: Task) -> None:
        """Ask a process for a task that another one may have, and check that the answer comes in time."""
        if process.supervisor.loop is None:
            return
        due = math.inf if task.deadline is None else task.deadline.remaining()
        try:
            async with asyncio.timeout(max(due, 0.0) + MAX_DELAY):
                if (found := await process.supervisor.find(task.task_id)) is not None:
                    self.happened["looked up"] += 1
                    await found
        except TimeoutError:
            if due < math.inf and self.script.calm and not process.dead:
                self._wrong(f"{task.task_id!r} has not ended {MAX_DELAY:.0f} s after its deadline for who looked it up")
        except ForebayError:
            pass

    async def _use_slot(self, at: float) -> None:
        await asyncio.sleep(at)
        if not self.open:
            return
        process, task = self.rng.choice(self.open), self._draw_task(0, 0)
        with contextlib.suppress(ForebayError, TimeoutError):
            async with asyncio.timeout(20.0), process.supervisor.slot(task.task_type, thread_id=task.thread_id) as slot:
                with self._talking(process, task), self._working(process, slot.worker):
                    await asyncio.sleep(self.rng.uniform(0.0, 3.0))

    # --- the whole storm ---

    async def run(self) -> None:
        """Run the storm until the last supervisor is closed, and check what was promised."""
        script, rng = self.script, self.rng
        self._over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            processes = [group.create_task(self._run_lifetimes(lifetimes)) for lifetimes in script.lifetimes]
            shared = len(script.lifetimes) > 1  # processes exclude each other by what is stored
            callers = [
                group.create_task(self._converse(number, script.messages >> number, durable=shared))
                for number in range(script.conversations)
            ]
            callers += [group.create_task(self._call(rng.uniform(0.0, script.spread))) for _ in range(script.tasks)]
            callers += [group.create_task(self._use_slot(rng.uniform(0.0, script.spread))) for _ in range(3)]
            for at, seconds in script.clock_steps:
                group.create_task(self._step_clock(at, seconds))
            if script.file_lost is not None:
                group.create_task(self._lose_file(script.file_lost))
            await asyncio.wait(callers)
            self._over.set()
            await asyncio.wait(processes)
        if script.overflow == "sqlite":
            await self._finish_leftovers()
            while self._unfinished():  # what the last process began while it drained
                await self._finish_leftovers()
        await asyncio.sleep(100.0)  # until handlers that ignored their cancellation have ended
        self._check()
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise InvariantViolation(f"asyncio tasks are left: {left}")

    async def _finish_leftovers(self) -> None:
        """Start a last process, with a working store, that finishes all tasks that the others left."""
        successor = await self._start(StoreFaults(), lease=3.0)
        for plan in self.script.workers:
            if plan.late is not None:
                self._register(successor, dataclasses.replace(plan, start_fails=0.0))
        successor.is_last = True
        store, due = successor.store, virtual_loop().time() + TAKE_OVER
        assert store is not None
        await asyncio.sleep(2 * LEASE)
        ended_before = self.acknowledged.ended.total()
        while await store.depths() or self._unfinished() or successor.supervisor.statistics().running:
            if (ended := self.acknowledged.ended.total()) > ended_before:
                ended_before, due = ended, virtual_loop().time() + TAKE_OVER
            if virtual_loop().time() > due:
                message = f"for {TAKE_OVER:.0f} s nothing ended of what others have left: {self._unfinished()[:10]}"
                raise InvariantViolation(message)
            await asyncio.sleep(5.0)
        await self._end(successor, StormLifetime(0.0, 0.0, "drain", None))

    def _unfinished(self) -> list[str]:
        """Return the ids of the tasks that a store acknowledged and that have not ended."""
        writes = self.acknowledged
        return [task_id for task_id in writes.stored - writes.uncertain if not writes.ended[task_id]]

    def _check(self) -> None:
        fail_if_any("what handlers and callers see is as promised", self.violations)
        fail_if_any("nothing is acknowledged into a file that was removed", self.acknowledged_into_lost_file)
        alive = [process for process in self.processes if not process.dead]
        for process in alive:
            run_checks.check_closed_supervisor(process.record)
            fail_if_any("what the supervisor did is as promised", [*self._wrong_events(process)])
            for record in process.below:
                run_checks.check_closed_supervisor(record)
                fail_if_any("below, a task ends as often as it was taken", [*_unequal_ends(record)])
            fail_if_any("what is stopped with its worker does not succeed", [*self._wrong_cuts(process)])
            fail_if_any("no slot of a worker is lost", [*_held_slots(process)])
            self._count_restarts(process)
        if self.script.overflow == "sqlite":
            tickets = [ticket for process in alive for ticket in process.tickets]
            run_checks.check_shared_store(self.acknowledged, [process.record for process in self.processes], tickets)
        else:
            for process in alive:
                run_checks.check_in_memory_run(process.record, process.tickets)
        self._check_order()

    def _count_restarts(self, process: StormProcess) -> None:
        for record in (process.record, *process.below):
            self.happened["worker exited"] += len(record.of_type(WorkerExited))
            self.happened["worker restarted"] += len(record.of_type(WorkerRestarted))
            given_up = sum(event.retry_in is None for event in record.of_type(WorkerFailed))
            self.happened["worker given up"] += given_up

    def _wrong_events(self, process: StormProcess) -> Iterator[str]:
        """Yield what events say that must not be, in a storm in which it has no excuse."""
        script = self.script
        orderly = script.orderly and not self._started_after_step()
        retried = self._retried()
        for number, event in enumerate(process.record.events):
            if isinstance(event, TaskStarted) and number >= process.closing_from and not script.wild:
                yield f"{event.task_id} started at {event.at:.3f} s, after closing had begun"
            elif isinstance(event, TaskStarted) and event.attempt > 1 + retried[event.task_id] and orderly:
                yield f"{event.task_id} started for the {event.attempt}th time, though no process crashed"
            elif isinstance(event, TaskRetried) and orderly and self._was_retried_too_often(event.task_id, retried):
                yield f"{event.task_id} was retried {retried[event.task_id]} times, more often than its policy allows"
            elif isinstance(event, TaskDeadLettered) and orderly and event.error.startswith("LeaseLost"):
                yield f"{event.task_id} is a dead letter, though no process crashed: {event.error}"
            elif isinstance(event, WorkerFailed) and self._is_blamed(event):
                yield f"at {event.at:.3f} s worker {event.worker_id!r} was blamed: {event.reason}"
            elif isinstance(event, TaskFinished):
                error = event.result.error or ""
                if "the overflow has not stored it" in error and script.orderly and not process.hurried:
                    yield f"{event.task_id} was lost by a drain with {process.limit} s: {error}"
                expired = "deadline passed" in error or "after its deadline" in error
                if expired and script.overflow != "sqlite" and event.at < self.due.get(event.task_id, 0.0) - 0.1:
                    yield f"{event.task_id} expired {self.due[event.task_id] - event.at:.1f} s too early: {error}"

    def _wrong_cuts(self, process: StormProcess) -> Iterator[str]:
        """Yield the tasks that succeeded in an attempt that ended with the life of its worker."""
        if self.script.overflow == "sqlite":  # another process may have made the next attempt
            return
        self.happened["cut"] += len(process.cut)
        for task_id, at in process.cut:
            later = (event for event in process.record.for_task(task_id) if event.at >= at)
            following = next((event for event in later if isinstance(event, TaskStarted | TaskFinished)), None)
            if isinstance(following, TaskFinished) and following.result.success:
                yield f"{task_id} succeeded, though its handler was stopped at {at:.3f} s with the life of its worker"

    def _is_blamed(self, event: WorkerFailed) -> bool:
        """Return whether a worker is FAILED because of tasks, though none is at fault."""
        stopped = self.lives is not None and event.retry_in is None
        return self.script.blameless and "start" not in event.reason and not stopped

    def _retried(self) -> Counter[str]:
        """Return how often tasks were retried, in any process, by their ids."""
        records = (process.record for process in self.processes)
        return Counter(event.task_id for record in records for event in record.of_type(TaskRetried))

    def _was_retried_too_often(self, task_id: str, retried: Counter[str]) -> bool:
        """Return whether a task had more retries than its policy allows: no orderly stop forgets one."""
        retries = self.script.retries
        attempts = 1 if self.lives is None else MAX_ATTEMPTS
        if retries is not None:
            attempts = retries.policy.max_attempts
        return retried[task_id] > attempts - 1

    def _started_after_step(self) -> bool:
        """Return whether a process started so shortly after a step of the clock that it could not know of it."""
        starts = [process.started_at for process in self.processes]
        return any(at <= start <= at + 2 * LEASE for at, _ in self.script.clock_steps for start in starts)

    def _check_order(self) -> None:
        """Check that the messages of each conversation began in the order of their submission."""
        back = any(step < 0 for _, step in self.script.clock_steps)
        if not self.script.calm or (back and len(self.processes) > 1):  # they go by the wall clock
            return
        violations = [
            f"conversation {thread!r} began in the order {numbers}"
            for thread, numbers in self.order.items()
            if numbers != sorted(numbers)
        ]
        fail_if_any("the messages of a conversation begin in the order of their submission", violations)


def _draw_tenants(rng: random.Random) -> dict[str, float | Tenant]:
    """Return the tenants of a storm, in half of them none."""
    if rng.random() < 0.5:
        return {}
    bound = Tenant(max_running=rng.choice((None, 1, 3)), max_waiting=rng.choice((None, 0, 20)))
    return {"big": rng.choice((1.0, bound)), "small": rng.choice((0.5, 3.0))}


def _unequal_ends(record: EventRecord) -> Iterator[str]:
    """Yield the tasks that a supervisor below took and did not end, or ended twice. The one above may retry them."""
    taken = Counter(event.task_id for event in record.submitted if event.verdict is not Verdict.REJECTED)
    ended = Counter(event.task_id for event in record.of_type(TaskFinished))
    for task_id in taken.keys() | ended.keys():
        if ended[task_id] != taken[task_id]:
            yield f"{task_id!r} was taken {taken[task_id]} times, and ended {ended[task_id]} times"


def _held_slots(process: StormProcess) -> Iterator[str]:
    """Yield what the workers of a closed process hold, those that were unregistered included."""
    for worker in process.agents:
        if worker.current_tasks != worker.zombies or worker.suspended:
            yield f"{worker!r} has {worker.zombies} zombies, and {worker.suspended} suspended runs"


def _forget(work: asyncio.Future[Any]) -> None:
    work.add_done_callback(lambda done: done.cancelled() or done.exception())


def has_durable_store(seed: int) -> bool:
    """Return whether the processes of a storm share an overflow that survives them."""
    return TaskStorm(seed, Path()).script.overflow == "sqlite"


def run(seed: int, url: str | None = None) -> TaskStorm:
    """Run the storm of one seed; raise if an invariant is violated, or at a deadlock or an unhandled error.

    Args:
        seed: draws it.
        url: a new durable overflow; None: a file.
    """
    storms: list[TaskStorm] = []
    with tempfile.TemporaryDirectory() as directory:

        async def main() -> None:
            storms.append(TaskStorm(seed, Path(directory, "spill.db"), url))
            await storms[0].run()

        simulate(main, seed=seed, max_time=1e6)
    return storms[0]


if __name__ == "__main__":
    import logging
    import sys

    from tests.support.redis_servers import redis_server

    logging.disable()
    on_redis = "--redis" in sys.argv
    for argument in sys.argv[1 + on_redis :]:
        with redis_server() if on_redis else contextlib.nullcontext() as redis:
            outcome = run(int(argument), None if redis is None else redis.url)
        print(argument, outcome.script, outcome.happened, sep="\n")
