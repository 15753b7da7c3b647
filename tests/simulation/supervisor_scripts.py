"""Scripts for whole houses: two supervisors, one of which may hold the other, whose tasks work on both and await each
other; callers of every kind; and everything that may be done to a house, at instants that often coincide."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from tests.support import run_checks as promises
from tests.support.run_checks import InvariantViolation
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, Deadline, ForebayError, Priority, Task, Ticket, progress
from forebay.errors import SupervisorClosed
from forebay.events import Event, TaskStarted
from forebay.overflow import open_task_store
from forebay.simulation import simulate, virtual_loop
from forebay.testing import EventRecord, SlowHandler, check_nothing_left, check_task_ends

KINDS = ("a", "b")
TIMEOUT = 8.0  # seconds; tasks may await each other in a ring, which only this ends
SHARES = st.sampled_from([0.0, 0.1, 0.5, 0.5, 1.0, 3.0])  # seconds
INSTANTS = st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 5.0, 9.0])  # seconds; many coincide
SUPERVISORS = st.integers(0, 1)

# --- what handlers do ------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.tuples(st.sampled_from(["sleep", "raise", "stubborn", "give up"]), SHARES),
    st.just(("progress",)),
    st.tuples(st.sampled_from(["await", "listen", "cancel"]), st.integers(0, 9)),
)


def _nested(plans: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    kinds = st.sampled_from(KINDS)
    return st.one_of(
        st.tuples(st.sampled_from(["run", "leave", "follow", "slot", "durably"]), SUPERVISORS, kinds, plans),
        st.tuples(st.just("drop"), SHARES, SUPERVISORS, kinds, plans),
        st.tuples(st.sampled_from(["together", "in turn", "either", "insist"]), plans, plans),
        st.tuples(st.just("within"), SHARES, plans),
    )


PLANS = st.recursive(LEAVES, _nested, max_leaves=6)

# --- what callers do -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A task, how it is offered, and when its caller loses patience."""

    supervisor: int
    kind: str
    plan: Any
    by: str
    times: int  # at the same moment, each by a caller of its own
    priority: Priority
    timeout: float | None
    deadline: float | None
    thread: str | None
    key: str | None
    spill: bool
    cancel_after: float | None  # cancels itself


@dataclass(frozen=True)
class Action:
    """Something else that is done to a house."""

    what: str
    supervisor: int
    which: int  # of the tickets or the callers so far, or of the workers
    seconds: float


SUBMISSIONS = st.builds(
    Submission,
    house=SUPERVISORS,
    kind=st.sampled_from(KINDS),
    plan=PLANS,
    times=st.sampled_from([1, 1, 2, 5, 9]),
    by=st.sampled_from(["submit", "submit", "durable", "nowait", "run", "slot", "follow"]),
    priority=st.sampled_from(Priority),
    timeout=st.sampled_from([None, None, 0.5, 1.0]),
    deadline=st.sampled_from([None, None, None, 0.5, 2.0]),
    thread_id=st.sampled_from([None, None, "t"]),
    key=st.sampled_from([None, None, None, "k"]),
    spill=st.sampled_from([True, True, False]),
    leaves_after=st.sampled_from([None, None, None, 0.0, 0.5, 1.0]),
)
ACTIONS = st.builds(
    Action,
    what=st.sampled_from(
        ["cancel", "cancel", "leave", "leave", "revive", "register", "listen", "look", "drain", "close", "fail"]
    ),
    house=SUPERVISORS,
    which=st.integers(0, 9),
    seconds=SHARES,
)


@dataclass(frozen=True)
class SupervisorSetup:
    """What a house is like."""

    slots: tuple[int, int]
    shared: bool  # both workers take both kinds
    max_queue_size: int | None
    overflow: str | None
    reset_timeout: float | None
    grace: float
    threshold: float


SETUPS = st.builds(
    SupervisorSetup,
    slots=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    shared=st.booleans(),
    room=st.sampled_from([0, 0, 1, 3, None]),
    overflow=st.sampled_from([None, None, "memory://", "memory://?bound=2", "sqlite"]),
    reset_timeout=st.sampled_from([None, 0.5, 10.0]),
    grace=st.sampled_from([0.5, 5.0]),
    threshold=st.sampled_from([0.5, 1.0]),
)


@dataclass(frozen=True)
class SupervisorScript:
    """Two houses, and what happens to them when."""

    setups: tuple[SupervisorSetup, SupervisorSetup]
    second_is_worker: bool  # the second is a worker of the first as well
    events: list[tuple[float, Submission | Action]]
    cancel_every: int  # a sink cancels the task of every so manieth start; 0: it does not
    jitter: float
    seed: int


SCRIPTS = st.builds(
    SupervisorScript,
    setups=st.tuples(SETUPS, SETUPS),
    held=st.booleans(),
    events=st.lists(st.tuples(INSTANTS, st.one_of(SUBMISSIONS, SUBMISSIONS, ACTIONS)), min_size=1, max_size=12),
    cancel_every=st.sampled_from([0, 0, 0, 2, 3]),
    jitter=st.sampled_from([0.0, 1e-6]),
    seed=st.integers(0, 1000),
)


class PlannedFailure(Exception):
    """What a handler raises on purpose."""


@dataclass
class SupervisorRun:
    """A supervisor with all that is seen of it."""

    supervisor: BackpressureSupervisor
    record: EventRecord
    setup: SupervisorSetup
    acknowledged: AcknowledgedWrites = field(default_factory=AcknowledgedWrites)
    tickets: list[Ticket] = field(default_factory=list)


class ScriptRun:
    """One script under way."""

    def __init__(self, script: SupervisorScript, directory: str) -> None:
        self.script = script
        self.directory = directory
        self.tickets: list[Ticket] = []
        self.callers: list[asyncio.Task[None]] = []
        self.closing: list[asyncio.Task[None]] = []
        self.runs = [self.make(number, build) for number, build in enumerate(script.setups)]

    # --- houses ---

    def url(self, number: int) -> str:
        return f"sqlite:///{self.directory}/{number}.db?synchronous=off"

    def make(self, number: int, build: SupervisorSetup) -> SupervisorRun:
        score = AcknowledgedWrites()
        overflow: Any = build.overflow
        if overflow == "sqlite":
            overflow = UnreliableStore(open_task_store(self.url(number)), StoreFaults(), score, random.Random(0))
        imp = itertools.count(1)

        def cancel_some(event: Event) -> None:
            if (
                isinstance(event, TaskStarted)
                and self.script.cancel_every
                and next(imp) % self.script.cancel_every == 0
            ):
                supervisor.ticket(event.task_id).cancel()

        supervisor = BackpressureSupervisor(
            backpressure_threshold=build.threshold,
            max_queue_size=build.max_queue_size,
            overflow=overflow,
            zombie_grace=build.grace,
            keep_results=3,
            on_event=cancel_some,
        )
        record = EventRecord(supervisor)
        first, second = (KINDS, KINDS) if build.shared else (KINDS[:1], KINDS[1:])
        for name, kinds, slots in (("w1", first, build.slots[0]), ("w2", second, build.slots[1])):
            supervisor.register_worker(
                name,
                handler=self.handler,
                task_types=kinds,
                max_concurrent=slots,
                timeout=TIMEOUT,
                reset_timeout=build.reset_timeout,
            )
        return SupervisorRun(supervisor, record, build, score)

    async def handler(self, task: Task) -> None:
        await self.execute(task.payload)

    # --- plans ---

    def known(self, which: int) -> Ticket | None:
        return self.tickets[which % len(self.tickets)] if self.tickets else None

    def keep(self, house: SupervisorRun, ticket: Ticket) -> Ticket:
        if ticket:
            house.tickets.append(ticket)
            self.tickets.append(ticket)
        return ticket

    async def execute(self, plan: Any) -> None:  # noqa: C901, PLR0912, PLR0915 - a small language
        """Do what the plan says."""
        again = self.execute
        match plan:
            case ("sleep", seconds):
                await asyncio.sleep(seconds)
            case ("raise", seconds):
                await asyncio.sleep(seconds)
                raise PlannedFailure
            case ("stubborn", seconds):
                due = asyncio.get_running_loop().time() + seconds
                while (left := due - asyncio.get_running_loop().time()) > 0:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(left)
            case ("give up", seconds):
                await asyncio.sleep(seconds)
                raise asyncio.CancelledError
            case ("progress",):
                progress("going on")
            case ("await", which):
                if (ticket := self.known(which)) is not None:
                    await ticket
            case ("listen", which):
                if (ticket := self.known(which)) is not None:
                    async for _ in ticket.events():
                        await asyncio.sleep(0.01)
            case ("cancel", which):
                if (ticket := self.known(which)) is not None:
                    ticket.cancel()
            case ("run", number, kind, inner):
                await self.runs[number].supervisor.run(Task(kind, inner))
            case (("leave" | "durably" | "follow") as how, number, kind, inner):
                house = self.runs[number]
                durable = how == "durably" and house.build.overflow == "sqlite"
                ticket = self.keep(house, await house.supervisor.submit(Task(kind, inner, durable=durable)))
                if how == "follow":
                    async for _ in ticket.events():
                        await asyncio.sleep(0.01)
            case ("slot", number, kind, inner):
                async with self.runs[number].supervisor.slot(kind):
                    await again(inner)
            case ("drop", seconds, number, kind, inner):
                house = self.runs[number]
                ticket = self.keep(house, await house.supervisor.submit(Task(kind, inner)))
                await asyncio.sleep(seconds)
                ticket.cancel()
                await ticket
            case ("together", first, second):
                await asyncio.gather(again(first), again(second))
            case ("in turn", first, second):
                await again(first)
                await again(second)
            case ("either", first, second):
                racing = [asyncio.ensure_future(again(one)) for one in (first, second)]
                try:
                    await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in racing:
                        one.cancel()
                    await asyncio.gather(*racing, return_exceptions=True)
            case ("insist", first, second):
                try:
                    await again(first)
                except asyncio.CancelledError:
                    await again(second)
            case ("within", seconds, inner):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await again(inner)

    # --- callers ---

    async def submit(self, offer: Submission) -> None:
        house = self.runs[offer.supervisor]
        options: dict[str, Any] = {"priority": offer.priority, "timeout": offer.timeout, "thread": offer.thread}
        if offer.deadline is not None:
            options["deadline"] = Deadline.within(offer.deadline)
        durable = offer.by == "durable" and house.setup.overflow == "sqlite"
        task = Task(offer.kind, offer.plan, key=offer.key, spill=offer.spill, durable=durable, **options)
        with contextlib.suppress(ForebayError, PlannedFailure, TimeoutError):
            async with asyncio.timeout(offer.cancel_after):
                match offer.by:
                    case "nowait":
                        await self.keep(house, house.supervisor.submit_nowait(task))
                    case "run":
                        await house.supervisor.run(task)
                    case "slot":
                        async with house.supervisor.slot(offer.kind, **options):
                            await self.execute(offer.plan)
                    case "follow":
                        async for _ in self.keep(house, await house.supervisor.submit(task)).events():
                            pass
                    case _:
                        await self.keep(house, await house.supervisor.submit(task))

    async def perform(self, act: Action) -> None:  # noqa: C901 - one line a deed
        house = self.runs[act.supervisor]
        supervisor = house.supervisor
        with contextlib.suppress(SupervisorClosed):
            match act.what:
                case "cancel":
                    if (ticket := self.known(act.which)) is not None:
                        ticket.cancel()
                case "leave":
                    if self.callers:
                        self.callers[act.which % len(self.callers)].cancel()
                case "revive":
                    supervisor.workers[f"w{act.which % 2 + 1}"].revive()
                case "register":
                    name = f"later{len(supervisor.workers)}"
                    supervisor.register_worker(name, handler=self.handler, task_types=["a"], timeout=TIMEOUT)
                case "listen":
                    async with supervisor.events(bound=5) as events:
                        async for _ in events:
                            await asyncio.sleep(0.1)
                case "look":
                    supervisor.statistics()
                case "drain":
                    await supervisor.drain(act.seconds or None)
                case "close":
                    await supervisor.close()
                case "fail":
                    await supervisor.__aexit__(ValueError, ValueError(), None)

    # --- all of it ---

    async def main(self) -> None:
        """Play the script, close what is open, and see whether all is in order."""
        first, second = (house.supervisor for house in self.runs)
        await second.start()
        if self.script.second_is_worker:
            first.register_worker("held", handler=second, task_types=KINDS, max_concurrent=2, timeout=TIMEOUT)
        await first.start()
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
            raise InvariantViolation(f"these wait for ever: {waiting}")
        for job in done:
            if not job.cancelled() and (error := job.exception()) is not None:
                raise error
        await asyncio.sleep(60.0)  # what is stubborn ends
        for number, house in enumerate(self.runs):
            await self.check(number, house)
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise InvariantViolation(f"asyncio tasks are left: {left}")

    async def check(self, number: int, house: SupervisorRun) -> None:
        promises.check_closed_supervisor(house.record)
        check_nothing_left(house.supervisor)
        if house.setup.overflow == "sqlite":
            await self.inherit(number, house)
        else:
            promises.check_in_memory_run(house.record, house.tickets)

    async def inherit(self, number: int, house: SupervisorRun) -> None:
        """What the house took and did not end, the next one does: all of it, and nothing else."""
        heir = BackpressureSupervisor(overflow=self.url(number), lease=3.0)
        heir.register_worker("next", handler=SlowHandler(0.0), task_types=KINDS, max_concurrent=3)
        record = EventRecord(heir)
        async with heir:
            await asyncio.sleep(100.0)
            if heir.statistics().outside:
                raise InvariantViolation(f"rows are left: {heir.statistics()}")
        check_task_ends(house.record, record, tickets=house.tickets, kept=0)


def run_script(script: SupervisorScript) -> None:
    """Play a script in virtual time; raises if a promise is broken, or somebody would wait for ever."""
    with tempfile.TemporaryDirectory() as directory, promises.fail_on_logged_errors():
        simulate(lambda: ScriptRun(script, directory).main(), seed=script.seed, jitter=script.jitter)
