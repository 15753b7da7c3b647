"""Random scripts for two supervisors.

One supervisor may be a worker of the other, and tasks use both and await each other. Callers of every kind submit
tasks, and every public operation is called, often at the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from tests.support import run_checks
from tests.support.scripted_life import ScriptedLife
from tests.support.supervisor_checks import InvariantViolation, check_nothing_left, check_task_ends
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, Deadline, ForebayError, Priority, Task, Ticket, progress
from forebay.errors import SupervisorClosed, UnknownTask, UnknownTaskType, UnknownWorker
from forebay.events import Event, TaskStarted
from forebay.overflow import open_task_store
from forebay.simulation import simulate, virtual_loop
from forebay.testing import EventRecord, SlowHandler

KINDS = ("a", "b")
ENDS = (ScriptedLife.crash, ScriptedLife.returns, ScriptedLife.is_cancelled)
TIMEOUT = 8.0  # seconds; tasks may await each other in a cycle, which only a timeout ends
DELAYS = st.sampled_from([0.0, 0.1, 0.5, 0.5, 1.0, 3.0])  # seconds
INSTANTS = st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 5.0, 9.0])  # seconds; many are equal
SUPERVISORS = st.integers(0, 1)

# --- what handlers do: plans -----------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.tuples(st.sampled_from(["sleep", "raise", "ignore cancellation", "cancel itself"]), DELAYS),
    st.just(("progress",)),
    st.tuples(st.sampled_from(["await", "listen", "cancel"]), st.integers(0, 9)),
)


def _nested(plans: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    kinds = st.sampled_from(KINDS)
    return st.one_of(
        st.tuples(st.sampled_from(["run", "submit", "follow", "slot", "submit durably"]), SUPERVISORS, kinds, plans),
        st.tuples(st.just("submit and cancel"), DELAYS, SUPERVISORS, kinds, plans),
        st.tuples(st.sampled_from(["both", "in sequence", "first of", "on cancellation"]), plans, plans),
        st.tuples(st.just("with timeout"), DELAYS, plans),
    )


PLANS = st.recursive(LEAVES, _nested, max_leaves=6)

# --- what callers do -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A task, the method that submits it, and when its caller cancels itself."""

    supervisor: int
    kind: str
    plan: Any
    by: str
    times: int  # at the same moment, each by a separate caller
    priority: Priority
    timeout: float | None
    deadline: float | None
    thread_id: str | None
    key: str | None
    spill: bool
    cancel_after: float | None  # seconds


@dataclass(frozen=True)
class Action:
    """Another operation on a supervisor."""

    what: str
    supervisor: int
    which: int  # index of a ticket, a caller or a worker
    seconds: float


SUBMISSIONS = st.builds(
    Submission,
    supervisor=SUPERVISORS,
    kind=st.sampled_from(KINDS),
    plan=PLANS,
    times=st.sampled_from([1, 1, 2, 5, 9]),
    by=st.sampled_from(["submit", "submit", "submit durably", "submit_nowait", "run", "slot", "follow"]),
    priority=st.sampled_from(Priority),
    timeout=st.sampled_from([None, None, 0.5, 1.0]),
    deadline=st.sampled_from([None, None, None, 0.5, 2.0]),
    thread_id=st.sampled_from([None, None, "t"]),
    key=st.sampled_from([None, None, None, "k"]),
    spill=st.sampled_from([True, True, False]),
    cancel_after=st.sampled_from([None, None, None, 0.0, 0.5, 1.0]),
)
ACTIONS = st.builds(
    Action,
    what=st.sampled_from(
        [
            "cancel",
            "cancel",
            "cancel caller",
            "cancel caller",
            "revive",
            "register",
            "unregister",
            "grow",
            "pause",
            "resume",
            "end a life",
            "end a life",
            "events",
            "statistics",
            "drain",
            "close",
            "exit with error",
        ]
    ),
    supervisor=SUPERVISORS,
    which=st.integers(0, 9),
    seconds=DELAYS,
)


@dataclass(frozen=True)
class SupervisorSetup:
    """The settings of one supervisor."""

    slots: tuple[int, int]
    shared: bool  # both workers take both task types
    max_queue_size: int | None
    overflow: str | None
    reset_timeout: float | None
    grace: float
    threshold: float
    strategy: str
    max_restarts: int
    restart: str


SETUPS = st.builds(
    SupervisorSetup,
    slots=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    shared=st.booleans(),
    max_queue_size=st.sampled_from([0, 0, 1, 3, None]),
    overflow=st.sampled_from([None, None, "memory://", "memory://?bound=2", "sqlite"]),
    reset_timeout=st.sampled_from([None, 0.5, 10.0]),
    grace=st.sampled_from([0.5, 5.0]),
    threshold=st.sampled_from([0.5, 1.0]),
    strategy=st.sampled_from(["one_for_one", "one_for_all", "rest_for_one"]),
    max_restarts=st.sampled_from([0, 1, 3]),
    restart=st.sampled_from(["permanent", "permanent", "transient", "temporary"]),
)


@dataclass(frozen=True)
class SupervisorScript:
    """The settings of two supervisors, and a schedule of operations on them."""

    setups: tuple[SupervisorSetup, SupervisorSetup]
    second_is_worker: bool  # the second supervisor is also a worker of the first
    events: list[tuple[float, Submission | Action]]
    cancel_every: int  # an event sink cancels every n-th task that starts; 0: none
    jitter: float
    seed: int


SCRIPTS = st.builds(
    SupervisorScript,
    setups=st.tuples(SETUPS, SETUPS),
    second_is_worker=st.booleans(),
    events=st.lists(st.tuples(INSTANTS, st.one_of(SUBMISSIONS, SUBMISSIONS, ACTIONS)), min_size=1, max_size=12),
    cancel_every=st.sampled_from([0, 0, 0, 2, 3]),
    jitter=st.sampled_from([0.0, 1e-6]),
    seed=st.integers(0, 1000),
)


class PlannedFailure(Exception):
    """An exception that a handler raises on purpose."""


@dataclass
class SupervisorRun:
    """A supervisor, its record and its tickets."""

    supervisor: BackpressureSupervisor
    record: EventRecord
    setup: SupervisorSetup
    acknowledged: AcknowledgedWrites = field(default_factory=AcknowledgedWrites)
    lives: list[ScriptedLife] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    dispatcher: object = None  # of its first run


class ScriptRun:
    """The execution of one script."""

    def __init__(self, script: SupervisorScript, directory: str) -> None:
        self.script = script
        self.directory = directory
        self.tickets: list[Ticket] = []
        self.callers: list[asyncio.Task[None]] = []
        self.closing: list[asyncio.Task[None]] = []
        self.numbers = itertools.count()
        self.runs = [self.make(number, setup) for number, setup in enumerate(script.setups)]

    # --- supervisors ---

    def url(self, number: int) -> str:
        return f"sqlite:///{self.directory}/{number}.db?fsync=no"

    def make(self, number: int, setup: SupervisorSetup) -> SupervisorRun:
        acknowledged = AcknowledgedWrites()
        overflow: Any = setup.overflow
        if overflow == "sqlite":
            overflow = UnreliableStore(open_task_store(self.url(number)), StoreFaults(), acknowledged, random.Random(0))
        starts = itertools.count(1)

        def cancel_some(event: Event) -> None:
            every = self.script.cancel_every
            if isinstance(event, TaskStarted) and every and next(starts) % every == 0:
                with contextlib.suppress(UnknownTask):  # it has ended, and three others since
                    supervisor.ticket(event.task_id).cancel()

        supervisor = BackpressureSupervisor(
            backpressure_threshold=setup.threshold,
            max_queue_size=setup.max_queue_size,
            overflow=overflow,
            zombie_grace=setup.grace,
            keep_results=3,
            on_event=cancel_some,
            strategy=setup.strategy,
            max_restarts=setup.max_restarts,
        )
        record = EventRecord(supervisor)
        first, second = (KINDS, KINDS) if setup.shared else (KINDS[:1], KINDS[1:])
        lives = [ScriptedLife("w1"), ScriptedLife("w2")]
        for name, kinds, slots, life in (
            ("w1", first, setup.slots[0], lives[0]),
            ("w2", second, setup.slots[1], lives[1]),
        ):
            supervisor.register_worker(
                name,
                handler=self.handler,
                task_types=kinds,
                max_concurrent=slots,
                timeout=TIMEOUT,
                reset_timeout=setup.reset_timeout,
                start=life.start,
                restart=setup.restart,
            )
        return SupervisorRun(supervisor, record, setup, acknowledged, lives)

    async def handler(self, task: Task) -> None:
        await self.execute(task.payload)

    # --- plans ---

    def ticket(self, which: int) -> Ticket | None:
        return self.tickets[which % len(self.tickets)] if self.tickets else None

    def keep(self, run: SupervisorRun, ticket: Ticket) -> Ticket:
        if ticket:
            run.tickets.append(ticket)
            self.tickets.append(ticket)
        return ticket

    async def execute(self, plan: Any) -> None:  # noqa: C901, PLR0912, PLR0915 - one case for each word
        """Execute a plan, a small language of nested tuples."""
        match plan:
            case ("sleep", seconds):
                await asyncio.sleep(seconds)
            case ("raise", seconds):
                await asyncio.sleep(seconds)
                raise PlannedFailure
            case ("ignore cancellation", seconds):
                due = asyncio.get_running_loop().time() + seconds
                while (left := due - asyncio.get_running_loop().time()) > 0:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(left)
            case ("cancel itself", seconds):
                await asyncio.sleep(seconds)
                raise asyncio.CancelledError
            case ("progress",):
                progress("running")
            case ("await", which):
                if (ticket := self.ticket(which)) is not None:
                    await ticket
            case ("listen", which):
                if (ticket := self.ticket(which)) is not None:
                    async for _ in ticket.events():
                        await asyncio.sleep(0.01)
            case ("cancel", which):
                if (ticket := self.ticket(which)) is not None:
                    ticket.cancel()
            case ("run", number, kind, inner):
                await self.runs[number].supervisor.run(Task(kind, inner))
            case (("submit" | "submit durably" | "follow") as how, number, kind, inner):
                run = self.runs[number]
                durable = how == "submit durably" and run.setup.overflow == "sqlite"
                ticket = self.keep(run, await run.supervisor.submit(Task(kind, inner, durable=durable)))
                if how == "follow":
                    async for _ in ticket.events():
                        await asyncio.sleep(0.01)
            case ("slot", number, kind, inner):
                async with self.runs[number].supervisor.slot(kind):
                    await self.execute(inner)
            case ("submit and cancel", seconds, number, kind, inner):
                run = self.runs[number]
                ticket = self.keep(run, await run.supervisor.submit(Task(kind, inner)))
                await asyncio.sleep(seconds)
                ticket.cancel()
                await ticket
            case ("both", first, second):
                await asyncio.gather(self.execute(first), self.execute(second))
            case ("in sequence", first, second):
                await self.execute(first)
                await self.execute(second)
            case ("first of", first, second):
                racing = [asyncio.ensure_future(self.execute(one)) for one in (first, second)]
                try:
                    await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in racing:
                        one.cancel()
                    await asyncio.gather(*racing, return_exceptions=True)
            case ("on cancellation", first, second):
                try:
                    await self.execute(first)
                except asyncio.CancelledError:
                    await self.execute(second)
            case ("with timeout", seconds, inner):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self.execute(inner)

    # --- callers ---

    async def submit(self, submission: Submission) -> None:
        run = self.runs[submission.supervisor]
        options: dict[str, Any] = {
            "priority": submission.priority,
            "timeout": submission.timeout,
            "thread_id": submission.thread_id,
        }
        if submission.deadline is not None:
            options["deadline"] = Deadline.within(submission.deadline)
        durable = submission.by == "submit durably" and run.setup.overflow == "sqlite"
        task = Task(
            submission.kind, submission.plan, key=submission.key, spill=submission.spill, durable=durable, **options
        )
        with contextlib.suppress(ForebayError, PlannedFailure, TimeoutError):
            async with asyncio.timeout(submission.cancel_after):
                match submission.by:
                    case "submit_nowait":
                        await self.keep(run, run.supervisor.submit_nowait(task))
                    case "run":
                        await run.supervisor.run(task)
                    case "slot":
                        async with run.supervisor.slot(submission.kind, **options):
                            await self.execute(submission.plan)
                    case "follow":
                        async for _ in self.keep(run, await run.supervisor.submit(task)).events():
                            pass
                    case _:
                        await self.keep(run, await run.supervisor.submit(task))

    async def perform(self, action: Action) -> None:  # noqa: C901, PLR0912 - one case for each operation
        run = self.runs[action.supervisor]
        supervisor = run.supervisor
        name = f"w{action.which % 2 + 1}"
        with contextlib.suppress(SupervisorClosed, UnknownWorker, UnknownTaskType):
            match action.what:
                case "cancel":
                    if (ticket := self.ticket(action.which)) is not None:
                        ticket.cancel()
                case "cancel caller":
                    if self.callers:
                        self.callers[action.which % len(self.callers)].cancel()
                case "revive":
                    if name in supervisor.workers:
                        supervisor.workers[name].revive()
                case "register":
                    later = f"later{next(self.numbers)}"
                    supervisor.register_worker(later, handler=self.handler, task_types=["a"], timeout=TIMEOUT)
                case "unregister":
                    await supervisor.unregister_worker(name, timeout=action.seconds)
                case "grow":
                    if name in supervisor.workers:
                        supervisor.workers[name].resize(supervisor.workers[name].max_concurrent + 1)
                case "pause":
                    supervisor.pause(KINDS[action.which % 2])
                case "resume":
                    supervisor.resume(KINDS[action.which % 2])
                case "end a life":
                    if run.lives[action.which % 2].alive:
                        ENDS[action.which % 3](run.lives[action.which % 2])
                case "events":
                    async with supervisor.events(bound=5) as events:
                        async for _ in events:
                            await asyncio.sleep(0.1)
                case "statistics":
                    supervisor.statistics()
                case "drain":
                    await supervisor.drain(action.seconds or None)
                case "close":
                    await supervisor.close()
                case "exit with error":
                    await supervisor.__aexit__(ValueError, ValueError(), None)

    # --- the whole script ---

    async def main(self) -> None:
        """Execute the script, close both supervisors, and check the invariants."""
        first, second = (run.supervisor for run in self.runs)
        await second.start()
        if self.script.second_is_worker:
            first.register_worker("second", handler=second, task_types=KINDS, max_concurrent=2, timeout=TIMEOUT)
        await first.start()
        self.note_first_runs()
        jobs: list[asyncio.Task[None]] = []
        for due, what in sorted(self.script.events, key=lambda event: event[0]):
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            if isinstance(what, Action):
                jobs.append(asyncio.ensure_future(self.perform(what)))
            else:
                callers = [asyncio.ensure_future(self.submit(what)) for _ in range(what.times)]
                self.callers += callers
                jobs += callers
        await asyncio.sleep(20.0)
        for supervisor in (first, second):
            with contextlib.suppress(SupervisorClosed):
                await supervisor.drain(30.0)
            await supervisor.close()
        done, waiting = await asyncio.wait(jobs, timeout=60.0)
        if waiting:
            raise InvariantViolation(f"these never ended: {waiting}")
        for job in done:
            if not job.cancelled() and (error := job.exception()) is not None:
                raise error
        await asyncio.sleep(60.0)  # until handlers that ignore cancellation have ended
        for number, run in enumerate(self.runs):
            await self.check(number, run)
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise InvariantViolation(f"asyncio tasks are left: {left}")

    def note_first_runs(self) -> None:
        """Remember the dispatchers, of which each run of a supervisor has its own."""
        for run in self.runs:
            run.dispatcher = run.supervisor._dispatcher

    async def check(self, number: int, run: SupervisorRun) -> None:
        # A supervisor that is closed while its own supervisor starts its workers again is started again by that.
        began_again = run.supervisor._dispatcher is not run.dispatcher
        run_checks.check_closed_supervisor(run.record, began_again=began_again)
        check_nothing_left(run.supervisor)
        if run.setup.overflow == "sqlite":
            await self.finish_leftovers(number, run)
        else:
            run_checks.check_in_memory_run(run.record, run.tickets)

    async def finish_leftovers(self, number: int, run: SupervisorRun) -> None:
        """Check that a new supervisor finishes all tasks that this one left in its store, and no others."""
        successor = BackpressureSupervisor(overflow=self.url(number), lease=3.0)
        successor.register_worker("next", handler=SlowHandler(0.0), task_types=KINDS, max_concurrent=3)
        record = EventRecord(successor)
        async with successor:
            await asyncio.sleep(100.0)
            if successor.statistics().outside:
                raise InvariantViolation(f"records are left: {successor.statistics()}")
        check_task_ends(run.record, record, tickets=run.tickets, left=0)


def run_script(script: SupervisorScript) -> None:
    """Execute a script in virtual time; raise if an invariant is violated or a caller never returns."""
    with tempfile.TemporaryDirectory() as directory, run_checks.fail_on_logged_errors():
        simulate(lambda: ScriptRun(script, directory).main(), seed=script.seed, jitter=script.jitter)
