"""Random mixes of conversations, nested tasks, cancellations and deadlines on one supervisor, from a seed."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.support.supervisor_checks import check_supervisor

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task, Ticket, clock
from forebay.simulation import simulate
from forebay.testing import EventRecord

TYPES: Final = ("plan", "act", "write")
_PATIENCE: Final = 5_000.0  # seconds in which all of a mix must have ended: many times its work


@dataclass
class ConversationMix:
    """One mix. The conversation of a nested task has a higher number than those above it, so none waits for itself.

    Attributes:
        started: by conversation, the numbers of its submitted tasks in the order of their starts.
        running: by conversation, how many of its tasks run now.
        happened: how often each thing happened.
    """

    seed: int
    overflow: str | None
    started: dict[str, list[int]] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.supervisor = BackpressureSupervisor(
            overflow=self.overflow, max_queue_size=rng.choice([None, None, 0, 1, 5, 20]), lease=rng.choice([3.0, 30.0])
        )
        for number in range(rng.randint(1, 3)):
            slots = rng.randint(1, 4)
            self.supervisor.register_worker(
                f"w{number}",
                handler=self.handle,
                task_types=TYPES if number == 0 else rng.sample(TYPES, rng.randint(1, 3)),
                max_concurrent=slots,
                max_open=rng.choice([None, None, slots, 3 * slots]),
                timeout=rng.choice([20.0, 300.0]),
                reset_timeout=1.0,
            )
        self.conversations = rng.randint(1, 6)
        self.nests = rng.choice([0.0, 0.3, 0.9])

    async def handle(self, task: Task) -> None:
        """Run nested tasks as the payload says, and work for a while."""
        thread = task.thread_id
        if thread is not None:
            self.running[thread] += 1
            assert self.running[thread] == 1, f"two tasks of conversation {thread} run at a time"
            if (number := task.payload.get("number")) is not None:
                self.started.setdefault(thread, []).append(number)
        try:
            await asyncio.sleep(task.payload["work"])
            children = [self.supervisor.run(child) for child in self.children(task)]
            for end in await asyncio.gather(*children, return_exceptions=True):
                self.happened[f"nested: {type(end).__name__}"] += 1
            await asyncio.sleep(task.payload["work"])
        finally:
            if thread is not None:
                self.running[thread] -= 1

    def children(self, task: Task) -> list[Task]:
        """Return the nested tasks of a task."""
        depth, lowest = task.payload["depth"], task.payload["lowest"]
        if not depth:
            return []
        return [self.draw(depth - 1, lowest, spill=self.rng.random() < 0.8) for _ in range(self.rng.randint(1, 3))]

    def draw(self, depth: int, lowest: int, *, number: int | None = None, **options: Any) -> Task:
        """Return a random task whose conversation, if any, has at least the number `lowest`."""
        rng, thread = self.rng, None
        if lowest < self.conversations and rng.random() < (0.7 if number is not None else 0.2):
            chosen = min(rng.randrange(lowest, self.conversations), rng.randrange(lowest, self.conversations))
            thread, lowest = f"c{chosen}", chosen + 1
        payload = {"number": number, "depth": depth, "lowest": lowest, "work": rng.choice([0.0, 0.05, 0.3])}
        deadline = Deadline(clock.wall_time() + rng.uniform(0.1, 60.0)) if rng.random() < 0.1 else None
        return Task(
            rng.choice(TYPES),
            payload,
            thread_id=thread,
            priority=rng.choice(tuple(Priority)),
            deadline=deadline,
            **options,
        )

    async def submit(self, number: int) -> Ticket:
        """Submit a task that is not nested."""
        rng = self.rng
        depth = rng.randint(1, 3) if rng.random() < self.nests else 0
        durable = self.overflow is not None and "sqlite" in self.overflow and rng.random() < 0.2
        task = self.draw(depth, 0, number=number, durable=durable)
        if rng.random() < 0.1:
            task = Task(task.task_type, task.payload, thread_id=task.thread_id, priority=task.priority)
            return self.supervisor.submit_nowait(task)
        return await self.supervisor.submit(task)

    async def run(self) -> None:
        """Submit everything, cancel some of it, and check what the record and the handlers saw."""
        rng = self.rng
        async with self.supervisor:
            record = EventRecord(self.supervisor)
            tickets: list[Ticket] = []
            for number in range(rng.randint(30, 150)):
                tickets.append(await self.submit(number))
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.uniform(0.0, 1.0))
                if rng.random() < 0.1:
                    rng.choice(tickets).cancel()
            waiting = [asyncio.ensure_future(ticket._wait()) for ticket in tickets]
            _, left = await asyncio.wait(waiting, timeout=_PATIENCE)
            assert not left, f"{len(left)} of {len(waiting)} tasks hang: {self.supervisor.statistics()}"
            for ticket, end in zip(tickets, waiting, strict=True):
                assert end.exception() is None or (not ticket and isinstance(end.exception(), Overloaded))
                self.happened[ticket.status.value] += 1
            await asyncio.wait_for(self.supervisor.drain(), _PATIENCE)
        for thread, numbers in self.started.items():
            assert numbers == sorted(numbers), f"conversation {thread} ran in the order {numbers}"
        check_supervisor(record, tickets=tickets, nested=True)


def run(seed: int) -> ConversationMix:
    """Run the mix of a seed."""
    with tempfile.TemporaryDirectory() as directory:
        overflow = (None, "memory://", f"sqlite:///{directory}/spill.db?fsync=no")[seed % 3]
        mixes: list[ConversationMix] = []

        async def main() -> None:
            mixes.append(ConversationMix(seed, overflow))
            await mixes[0].run()

        simulate(main, seed=seed, max_time=1e6)
        return mixes[0]


def main(first: int, last: int, report: Callable[[str], object] = print) -> None:
    """Run the seeds from `first` to before `last`, and report what fails."""
    for seed in range(first, last):
        try:
            run(seed)
        except BaseException as failure:  # noqa: BLE001 - the next seed is tried, whatever happened
            report(f"seed {seed}: {type(failure).__name__}: {str(failure)[:1000]}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
