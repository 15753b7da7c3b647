"""A surge drawn from a seed: its houses, its agents, its callers and what goes wrong; and the promises it must keep.

Everything runs in virtual time. The agents call the simulated provider; the callers flood the house, give up, cancel,
set deadlines, come back when they are told to; handlers raise, hang, swallow cancellations, block threads and the loop,
submit work of their own. Processes share a store that is slow, full or silent, and die at any moment; others start on
what they left. Nothing here knows how the house decides: it sees what a user sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.simulation.surge_script import LEASE, TYPES, ProcessLifetime, SurgeScript
from tests.support import run_checks as promises
from tests.support.run_checks import InvariantViolation
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
    """A house, its way to the store, and who waits for it."""

    supervisor: BackpressureSupervisor
    record: EventRecord
    ledger: UnreliableStore | None
    dead: bool = False
    tickets: list[Ticket] = field(default_factory=list)
    callers: set[asyncio.Task[None]] = field(default_factory=set)

    async def crash(self) -> None:
        """It is gone: no word of it reaches its store, its callers or anyone any more."""
        self.dead = True
        self.record.stop()
        if self.ledger is not None:
            self.ledger.disconnect()
        for caller in self.callers:
            caller.cancel()
        with contextlib.suppress(StoreUnavailable):
            await self.supervisor.close()


class Surge:
    """One surge on the houses that share a store."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.script = SurgeScript.draw(self.rng)
        self.acknowledged = AcknowledgedWrites()
        self.processes: list[SurgeProcess] = []  # all that ever were
        self.open: list[SurgeProcess] = []  # those that take work
        self.happened: Counter[str] = Counter()
        self.provider: SimulatedProvider
        self.lengths = Traffic.conversation()
        self.path = ""
        self.over: asyncio.Event

    # --- the house's side ---

    async def agent(self, house: BackpressureSupervisor, task: Task) -> Any:
        """A run of three calls, or of trouble, as the payload says."""
        mood = task.payload["mood"]
        try:
            if mood == "hang":
                await asyncio.get_running_loop().create_future()
            for _ in range(3):
                await self.call(task)
            if mood == "fail":
                message = "the agent gave up"
                raise ValueError(message)
            if mood == "nest" and task.payload["depth"] > 0:
                child = {"mood": mood, "depth": task.payload["depth"] - 1}
                kinds = [self.rng.choice(TYPES) for _ in range(self.rng.randint(1, 2))]
                await asyncio.gather(*(house.run(Task(kind, child)) for kind in kinds), return_exceptions=True)
        except asyncio.CancelledError:
            if mood != "swallow":
                raise
            await asyncio.sleep(self.rng.uniform(1, 30))  # as some agent teams do
        return task.task_id

    async def call(self, task: Task) -> None:
        """One LLM call, tried up to three times."""
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

    def register_workers(self, house: BackpressureSupervisor) -> None:
        """The script's workers."""

        async def agent(task: Task, sick: float, well: float) -> Any:
            if sick <= asyncio.get_running_loop().time() < well:
                message = "the model is gone"
                raise ConnectionError(message)
            return await self.agent(house, task)

        for plan in self.script.workers:

            async def handler(task: Task, sick: float = plan.fails_from, well: float = plan.fails_until) -> Any:
                return await agent(task, sick, well)

            house.register_worker(
                plan.name,
                handler=(lambda task: task.task_id) if plan.blocks else handler,
                task_types=plan.kinds,
                max_concurrent=plan.slots,
                timeout=60.0,
                reset_timeout=plan.reset_timeout,
            )

    # --- processes ---

    def ledger(self, trouble: StoreFaults) -> TaskStore | str | None:
        """What a process is given as its overflow."""
        if self.script.overflow != "sqlite":
            return self.script.overflow
        ledger = open_task_store(f"sqlite:///{self.path}?synchronous=off")
        return UnreliableStore(ledger, trouble, self.acknowledged, random.Random(self.rng.random()))

    async def start(self, trouble: StoreFaults, *, lease: float = LEASE) -> SurgeProcess:
        """A new process, when its store lets it start."""
        while True:
            overflow = self.ledger(trouble)
            house = BackpressureSupervisor(
                backpressure_threshold=self.script.threshold,
                max_queue_size=self.script.max_queue_size,
                overflow=overflow,
                lease=lease,
            )
            record = EventRecord(house)
            self.register_workers(house)
            try:
                await house.start()
            except StoreUnavailable:
                await asyncio.sleep(1.0)
                continue
            process = SurgeProcess(house, record, overflow if isinstance(overflow, UnreliableStore) else None)
            self.processes.append(process)
            return process

    async def run_lifetimes(self, lives: list[ProcessLifetime]) -> None:
        """One process after the other."""
        for life in lives:
            await asyncio.sleep(life.starts - asyncio.get_running_loop().time())
            process = await self.start(life.faults)
            self.open.append(process)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(life.ends):
                    await self.over.wait()
            self.open.remove(process)
            await self.end(process, life.end)

    async def end(self, process: SurgeProcess, how: str) -> None:
        """Leave, in the one way or the other."""
        self.happened[how] += 1
        house = process.supervisor
        with contextlib.suppress(StoreUnavailable):
            match how:
                case "drain":
                    await house.drain()
                case "drain within":
                    await house.drain(1.0)
                case "fail":
                    await house.__aexit__(ValueError, ValueError(), None)
                case "crash":
                    await process.crash()
            await house.close()

    async def stall(self, at: float, seconds: float) -> None:
        """Code that blocks the loop."""
        await asyncio.sleep(at)
        virtual_loop().stall(seconds)

    # --- the callers' side ---

    async def caller(self, task: Task, at: float) -> None:
        """Submit to a process that is there, and behave as the draw says."""
        await asyncio.sleep(at)
        patience = self.rng.uniform(0, 30) if self.rng.random() < self.script.cancel_share else None
        me = asyncio.current_task()
        assert me is not None
        for _ in range(5):
            if not self.open:
                await asyncio.sleep(self.rng.uniform(0, 30))
                continue
            process = self.rng.choice(self.open)
            process.callers.add(me)
            try:
                retry_after = await self.submit(process, task, patience)
            except (StoreUnavailable, SupervisorClosed):
                retry_after = 5.0
            except (DeadlinePassed, DuplicateTask):
                return
            finally:
                process.callers.discard(me)
            if retry_after is None:
                return
            await asyncio.sleep(retry_after)

    async def submit(self, process: SurgeProcess, task: Task, patience: float | None) -> float | None:
        """Submit once. Seconds after which to come back, or None if that is all."""
        if self.rng.random() < 0.1 and not task.durable:
            ticket = process.supervisor.submit_nowait(task)
        else:
            ticket = await process.supervisor.submit(task)
        if not ticket:
            return ticket.retry_after
        process.tickets.append(ticket)
        try:
            async with asyncio.timeout(patience):
                await ticket.value()
        except TimeoutError:
            ticket.cancel()
        except StillSpilled:
            self.happened["still spilled"] += 1
        except (TaskFailed, TaskTimedOut, ForebayError):
            pass
        return None

    async def slot_or_events_caller(self, at: float) -> None:
        """Somebody who streams from a slot, or listens to a task."""
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

    # --- all of it ---

    async def main(self) -> None:
        """The surge from the first task to the last closed house, and what must hold then."""
        script, rng = self.script, self.rng
        self.over = asyncio.Event()
        self.provider = SimulatedProvider(script.provider, seed=rng.randint(0, 1 << 30))
        tasks = [script.task(rng, number) for number in range(script.tasks)]
        async with asyncio.TaskGroup() as group:
            living = [group.create_task(self.run_lifetimes(lives)) for lives in script.lifetimes]
            callers = [group.create_task(self.caller(task, rng.uniform(0, script.spread))) for task in tasks]
            callers += [group.create_task(self.slot_or_events_caller(rng.uniform(0, script.spread))) for _ in range(5)]
            for at, seconds in script.stalls:
                group.create_task(self.stall(at, seconds))
            await asyncio.wait(callers)
            self.over.set()
            await asyncio.wait(living)
        if script.overflow == "sqlite":
            await self.finish_leftovers()
        self.check()
        await asyncio.sleep(100.0)  # until the last handler that swallowed its cancellation has ended
        if (left := virtual_loop().pending()) != [asyncio.current_task()]:
            raise InvariantViolation(f"asyncio tasks are left: {left}")

    async def finish_leftovers(self) -> None:
        """A last process, whose store works, ends whatever the others left."""
        heir = await self.start(StoreFaults(), lease=3.0)
        await asyncio.sleep(2 * LEASE)
        assert heir.ledger is not None
        while (
            await heir.ledger.depths() or heir.supervisor.statistics().running or heir.supervisor.statistics().waiting
        ):
            await asyncio.sleep(5.0)
        await heir.supervisor.drain()
        if left := await heir.ledger.depths():
            raise InvariantViolation(f"rows are left that nobody takes: {left}")
        await heir.supervisor.close()

    def check(self) -> None:
        """What the seed's draw promises."""
        alive = [process for process in self.processes if not process.dead]
        for process in alive:
            promises.check_closed_supervisor(process.record)
            self.happened.update({name: getattr(process.supervisor.statistics(), name) for name in COUNTED})
        if self.script.overflow == "sqlite":
            tickets = [ticket for process in alive for ticket in process.tickets]
            promises.check_shared_store(self.acknowledged, [process.record for process in self.processes], tickets)
        else:
            for process in alive:
                promises.check_in_memory_run(process.record, process.tickets)


# all in `make test`, the first fifty in `make test-quick`
SEEDS = [seed if seed < 50 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(300)]


def run(seed: int) -> Surge:
    """Run the surge of one seed; raises if a promise is broken, nothing is left to do, or an error reached nobody."""
    surge = Surge(seed)
    with tempfile.TemporaryDirectory() as directory, promises.fail_on_logged_errors():
        surge.path = str(Path(directory, "spill.db"))
        simulate(surge.main, seed=seed, max_time=36_000.0)
    return surge


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run(int(argument))
        print(argument, outcome.script, outcome.happened, sep="\n")
