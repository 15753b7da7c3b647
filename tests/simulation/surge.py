"""A surge drawn from a seed: supervisors, agents, callers and faults, and the invariants that must hold.

Everything runs in virtual time. Agents call the simulated provider. Callers flood the supervisors, cancel, set
deadlines and retry when they are told to. Handlers raise, hang, swallow cancellations, block threads and the loop, and
submit tasks of their own. Processes share a store that is slow, full or silent, and crash at any moment; others
take over the tasks that they left. The checks use only what a user of the public interface can see.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from tests.simulation.surge_script import LEASE, TYPES, ProcessLifetime, SurgeScript, WorkerPlan, clock_steps
from tests.support import run_checks
from tests.support.supervisor_checks import InvariantViolation
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, ForebayError, Priority, Task, TaskFailed, TaskTimedOut, Ticket
from forebay.errors import DeadlinePassed, DuplicateTask, StillSpilled, StoreUnavailable, SupervisorClosed
from forebay.interfaces import TaskStore
from forebay.overflow import open_task_store
from forebay.simulation import simulate, virtual_loop
from forebay.simulation.provider.simulated_provider import AnswerCut, ProviderRefusal, SimulatedProvider
from forebay.simulation.provider.traffic import Traffic
from forebay.testing import EventRecord

COUNTED = (
    "admitted", "spilled", "rejected", "refilled", "succeeded", "failed", "timed_out", "cancelled", "expired", "zombies"
)  # fmt: skip


@dataclass(eq=False)
class SurgeProcess:
    """A supervisor, its store, and its callers."""

    supervisor: BackpressureSupervisor
    record: EventRecord
    store: UnreliableStore | None
    dead: bool = False
    tickets: list[Ticket] = field(default_factory=list)
    callers: set[asyncio.Task[None]] = field(default_factory=set)

    async def is_busy(self) -> bool:
        """Return True if tasks are stored, queued or running."""
        statistics = self.supervisor.statistics()
        stored = self.store is not None and (await self.store.depths() or await self.store.conversations())
        return bool(statistics.running or statistics.waiting or stored)

    async def crash(self) -> None:
        """Crash: from now on nothing reaches the store or the callers."""
        self.dead = True
        self.record.stop()
        if self.store is not None:
            self.store.disconnect()
        for caller in self.callers:
            caller.cancel()
        with contextlib.suppress(StoreUnavailable):
            await self.supervisor.close()


class Surge:
    """One surge on supervisors that share a store."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.script = SurgeScript.draw(self.rng)
        self.acknowledged = AcknowledgedWrites()
        self.processes: list[SurgeProcess] = []  # all that were started
        self.open: list[SurgeProcess] = []  # those that accept tasks
        self.happened: Counter[str] = Counter()
        self.provider: SimulatedProvider
        self.lengths = Traffic.conversation()
        self.url = ""  # of the durable overflow
        self.over: asyncio.Event

    # --- handlers ---

    async def agent(self, supervisor: BackpressureSupervisor, task: Task) -> Any:
        """Make three calls, or misbehave as the payload says."""
        mood = task.payload["mood"]
        try:
            if mood == "hang":
                await asyncio.get_running_loop().create_future()
            for _ in range(3):
                await self.call(task)
            if mood == "fail":
                message = "the agent failed"
                raise ValueError(message)
            if mood == "nest" and task.payload["depth"] > 0:
                child = {"mood": mood, "depth": task.payload["depth"] - 1}
                kinds = [self.rng.choice(TYPES) for _ in range(self.rng.randint(1, 2))]
                await asyncio.gather(*(supervisor.run(Task(kind, child)) for kind in kinds), return_exceptions=True)
        except asyncio.CancelledError:
            if mood != "swallow":
                raise
            await asyncio.sleep(self.rng.uniform(1, 30))  # as some agent frameworks do
        return task.task_id

    async def call(self, task: Task) -> None:
        """Make one LLM call with up to three attempts."""
        for attempt in range(3):
            incoming, outgoing = self.lengths.lengths(self.rng)
            try:
                await self.provider.call(
                    model="gpt-4o-mini", input_tokens=incoming, output_tokens=min(outgoing, 400), run=task.task_id
                )
            except (ProviderRefusal, AnswerCut):
                if attempt == 2:
                    raise
                await asyncio.sleep(self.rng.uniform(0, 2**attempt))
            else:
                return

    def register_workers(self, supervisor: BackpressureSupervisor) -> None:
        """Register the script's workers."""

        async def agent(task: Task, fails_from: float, fails_until: float) -> Any:
            if fails_from <= asyncio.get_running_loop().time() < fails_until:
                message = "the model is unavailable"
                raise ConnectionError(message)
            return await self.agent(supervisor, task)

        for plan in self.script.workers:

            async def handler(task: Task, plan: WorkerPlan = plan) -> Any:
                return await agent(task, plan.fails_from, plan.fails_until)

            supervisor.register_worker(
                plan.name,
                handler=(lambda task: task.task_id) if plan.blocks else handler,
                task_types=plan.kinds,
                max_concurrent=plan.slots,
                timeout=60.0,
                reset_timeout=plan.reset_timeout,
            )

    # --- processes ---

    def overflow(self, faults: StoreFaults) -> TaskStore | str | None:
        """Return the overflow of a new process."""
        if self.script.overflow != "sqlite":
            return self.script.overflow
        store = open_task_store(self.url)
        return UnreliableStore(store, faults, self.acknowledged, random.Random(self.rng.random()))

    async def start(self, faults: StoreFaults, *, lease: float = LEASE) -> SurgeProcess:
        """Start a new process, as soon as its store is available."""
        while True:
            overflow = self.overflow(faults)
            supervisor = BackpressureSupervisor(
                backpressure_threshold=self.script.threshold,
                max_queue_size=self.script.max_queue_size,
                overflow=overflow,
                lease=lease,
            )
            record = EventRecord(supervisor)
            self.register_workers(supervisor)
            try:
                await supervisor.start()
            except StoreUnavailable:
                await asyncio.sleep(1.0)
                continue
            process = SurgeProcess(supervisor, record, overflow if isinstance(overflow, UnreliableStore) else None)
            self.processes.append(process)
            return process

    async def run_lifetimes(self, lifetimes: list[ProcessLifetime]) -> None:
        """Run one process after the other."""
        for lifetime in lifetimes:
            await asyncio.sleep(lifetime.starts - asyncio.get_running_loop().time())
            process = await self.start(lifetime.faults)
            self.open.append(process)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(lifetime.ends):
                    await self.over.wait()
            self.open.remove(process)
            await self.end(process, lifetime.end)

    async def end(self, process: SurgeProcess, how: str) -> None:
        """End a process in the given way."""
        self.happened[how] += 1
        supervisor = process.supervisor
        with contextlib.suppress(StoreUnavailable):
            match how:
                case "drain":
                    await supervisor.drain()
                case "drain within":
                    await supervisor.drain(1.0)
                case "fail":
                    await supervisor.__aexit__(ValueError, ValueError(), None)
                case "crash":
                    await process.crash()
            await supervisor.close()

    async def step_clock(self, at: float, seconds: float) -> None:
        """Set the wall clock, as an operator or a time server does."""
        await asyncio.sleep(at)
        self.happened["clock step"] += 1
        virtual_loop().step_wall_time(seconds)

    async def stall(self, at: float, seconds: float) -> None:
        """Block the loop, as bad code does."""
        await asyncio.sleep(at)
        virtual_loop().stall(seconds)

    # --- callers ---

    async def caller(self, task: Task, at: float) -> None:
        """Submit to an open process, with the retries and the timeout that the seed draws."""
        await asyncio.sleep(at)
        timeout = self.rng.uniform(0, 30) if self.rng.random() < self.script.cancel_share else None
        me = asyncio.current_task()
        assert me is not None
        for attempt in range(5):
            if not self.open:
                await asyncio.sleep(self.rng.uniform(0, 30))
                continue
            process = self.rng.choice(self.open)
            process.callers.add(me)
            try:
                retry_after = await self.submit(process, task, timeout)
            except (StoreUnavailable, SupervisorClosed):
                retry_after = 5.0
            except (DeadlinePassed, DuplicateTask):
                return
            finally:
                process.callers.discard(me)
            if retry_after is None:
                return
            await asyncio.sleep(retry_after)
            # A store that did not answer may have it, and it may have ended: then its id is free for another task.
            try:
                task = msgspec.structs.replace(task, task_id=f"{task.task_id}.{attempt}")
            except DeadlinePassed:
                return

    async def submit(self, process: SurgeProcess, task: Task, seconds: float | None) -> float | None:
        """Submit once; return the seconds after which to retry, or None if the task is done."""
        due = math.inf if task.deadline is None else virtual_loop().time() + task.deadline.remaining()
        if self.rng.random() < 0.1 and not task.durable:
            ticket = process.supervisor.submit_nowait(task)
        else:
            ticket = await process.supervisor.submit(task)
        if not ticket:
            return ticket.retry_after
        process.tickets.append(ticket)
        try:
            async with asyncio.timeout(seconds):
                await ticket.value()
        except TimeoutError:
            ticket.cancel()
        except StillSpilled:
            self.happened["still spilled"] += 1
        except (TaskFailed, TaskTimedOut, ForebayError):
            pass
        if ticket.task is task and self.script.overflow != "sqlite":  # another process goes by the wall clock
            self.check_expiry(ticket, due)
        return None

    def check_expiry(self, ticket: Ticket, due: float) -> None:
        """Check that a task whose deadline is said to have passed had its time, whatever the wall clock was set to."""
        error = "" if ticket.result is None else ticket.result.error or ""
        if ("deadline passed" in error or "after its deadline" in error) and virtual_loop().time() < due - 0.1:
            raise InvariantViolation(f"{ticket} expired {due - virtual_loop().time():.1f} s too early: {error}")

    async def slot_or_events_caller(self, at: float) -> None:
        """Use a slot, or follow the events of a task."""
        await asyncio.sleep(at)
        if not self.open:
            return
        process = self.rng.choice(self.open)
        me = asyncio.current_task()
        assert me is not None
        process.callers.add(me)
        with contextlib.suppress(ForebayError):
            if self.rng.random() < 0.5:
                async with process.supervisor.slot(self.rng.choice(TYPES), timeout=20.0, priority=Priority.HIGH):
                    await asyncio.sleep(self.rng.uniform(0, 30))
            else:
                ticket = await process.supervisor.submit(Task(self.rng.choice(TYPES), {"mood": "well", "depth": 0}))
                async for _ in ticket.events():
                    await asyncio.sleep(self.rng.uniform(0, 1))
        process.callers.discard(me)

    # --- the whole surge ---

    async def main(self) -> None:
        """Run the surge until the last supervisor is closed, and check the invariants."""
        script, rng = self.script, self.rng
        self.over = asyncio.Event()
        self.provider = SimulatedProvider(script.provider, seed=rng.randint(0, 1 << 30))
        tasks = [script.task(rng, number) for number in range(script.tasks)]
        async with asyncio.TaskGroup() as group:
            processes = [group.create_task(self.run_lifetimes(lifetimes)) for lifetimes in script.lifetimes]
            callers = [group.create_task(self.caller(task, rng.uniform(0, script.spread))) for task in tasks]
            callers += [group.create_task(self.slot_or_events_caller(rng.uniform(0, script.spread))) for _ in range(5)]
            for at, seconds in script.stalls:
                group.create_task(self.stall(at, seconds))
            for at, seconds in clock_steps(self.seed, script.spread):
                group.create_task(self.step_clock(at, seconds))
            await asyncio.wait(callers)
            self.over.set()
            await asyncio.wait(processes)
        if script.overflow == "sqlite":
            await self.finish_leftovers()
        self.check()
        await asyncio.sleep(100.0)  # until handlers that swallowed their cancellation have ended
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise InvariantViolation(f"asyncio tasks are left: {left}")

    async def finish_leftovers(self) -> None:
        """Start a last process, with a working store, that finishes all tasks that the others left."""
        successor = await self.start(StoreFaults(), lease=3.0)
        await asyncio.sleep(2 * LEASE)
        assert successor.store is not None
        while await successor.is_busy():  # noqa: ASYNC110 - no event says that the store is empty
            await asyncio.sleep(5.0)
        await successor.supervisor.drain()
        if left := await successor.store.depths():
            raise InvariantViolation(f"records are left that no process takes: {left}")
        await successor.supervisor.close()

    def check(self) -> None:
        """Check the invariants that hold with the drawn overflow."""
        alive = [process for process in self.processes if not process.dead]
        for process in alive:
            run_checks.check_closed_supervisor(process.record)
            self.happened.update({name: getattr(process.supervisor.statistics(), name) for name in COUNTED})
        if self.script.overflow == "sqlite":
            tickets = [ticket for process in alive for ticket in process.tickets]
            run_checks.check_shared_store(self.acknowledged, [process.record for process in self.processes], tickets)
        else:
            for process in alive:
                run_checks.check_in_memory_run(process.record, process.tickets)


# all in `make test`, the first fifty in `make test-quick`
SEEDS = [seed if seed < 50 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(300)]


def has_durable_store(seed: int) -> bool:
    """Return whether the processes of a surge share an overflow that survives them."""
    return Surge(seed).script.overflow == "sqlite"


def run(seed: int, url: str | None = None) -> Surge:
    """Run the surge of one seed; raise if an invariant is violated, or at a deadlock or an unhandled error.

    Args:
        seed: draws it.
        url: a new durable overflow; None: a file.
    """
    surge = Surge(seed)
    with tempfile.TemporaryDirectory() as directory, run_checks.fail_on_logged_errors():
        surge.url = url or f"sqlite:///{directory}/spill.db?fsync=no"
        simulate(surge.main, seed=seed, max_time=36_000.0)
    return surge


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run(int(argument))
        print(argument, outcome.script, outcome.happened, sep="\n")
