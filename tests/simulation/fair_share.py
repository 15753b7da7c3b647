"""What busy conversations, important tasks and agents cost the others, for values drawn from a seed.

Each seed runs four experiments in virtual time. In the first, users wait beside conversations with many messages, and
no longer than beside conversations with one message each. In the second, more agents than there are slots each run
nested tasks: every agent that has begun ends in time, and no more than `max_open` have begun. In the third, agents do
not stop when they are cancelled: they take the slots that they work in, and no drain waits for them. In the fourth,
tasks come faster than they are served: they start in their order, and one of low priority starts beside a flood of
better ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.support.supervisor_checks import InvariantViolation, check_supervisor

from forebay import BackpressureSupervisor, Priority, Task, Verdict
from forebay.simulation import simulate, virtual_loop
from forebay.testing import EventRecord

SERVICE: Final = 0.1  # seconds of work before a nested task, and after it
GRACE: Final = 2.0  # seconds that a cancelled handler has to stop
STARVATION_BOUND: Final = 20  # tasks of better priority that start before one that waits
KIND, OTHER_KIND = "work", "tool"


class FairShare:
    """The experiments of one seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"fair share {seed}")
        self.seed = seed
        self.overflow = rng.choice((None, "memory://", "sqlite"))
        self.slots = rng.randint(2, 10)
        self.conversations = rng.randint(1, max(1, self.slots // 2))
        self.messages = rng.choice((30, 100))
        self.users = rng.randint(10, 40)
        self.nests = rng.random() < 0.5
        self.agents = rng.choice((20, 60))
        self.agent_slots = rng.randint(1, 4)
        self.depth = rng.randint(1, 2)
        self.fan_out = rng.choice((1, 1, 3))
        self.queue_size = rng.choice((0, 1, 5, 20))
        self.gap = rng.uniform(0.3, 0.9)  # between two tasks, of the time in which one is served
        self.kinds = (KIND, rng.choice((KIND, OTHER_KIND)))
        self.happened: Counter[str] = Counter()

    def _simulate(self, experiment: Callable[[BackpressureSupervisor], Any], **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as directory:
            url = f"sqlite:///{Path(directory, 'spill.db')}?fsync=no" if self.overflow == "sqlite" else None

            async def main() -> Any:
                return await experiment(BackpressureSupervisor(overflow=url or self.overflow, **options))

            return simulate(main, seed=self.seed, max_time=1e5)

    # --- users beside busy conversations ---

    async def _longest_wait(self, supervisor: BackpressureSupervisor, messages: int) -> float:
        waits: list[float] = []

        async def handle(task: Task) -> None:
            if task.payload is not None:
                waits.append(virtual_loop().time() - task.payload)
            await asyncio.sleep(SERVICE)
            if task.thread_id is not None and self.nests:
                await supervisor.run(Task(self.kinds[1]))

        supervisor.register_worker("w", handler=handle, task_types=(KIND, OTHER_KIND), max_concurrent=self.slots)
        async with supervisor:
            record = EventRecord(supervisor)
            busy = [f"busy {number}" for _ in range(messages) for number in range(self.conversations)]
            tickets = [await supervisor.submit(Task(KIND, thread_id=conversation)) for conversation in busy]
            users = [await supervisor.submit(Task(KIND, virtual_loop().time())) for _ in range(self.users)]
            if rejected := [ticket.reason for ticket in users if ticket.verdict is Verdict.REJECTED]:
                raise InvariantViolation(f"{len(rejected)} users were rejected: {rejected[0]}")
            for ticket in (*tickets, *users):
                if ticket:
                    await asyncio.wait_for(ticket, 2000.0)
            self.happened["users"] += len(users)
        check_supervisor(record, tickets=tickets, nested=True)
        return max(waits)

    def check_users(self) -> None:
        """Check that users wait no longer beside conversations with many messages."""
        alone = self._simulate(lambda supervisor: self._longest_wait(supervisor, 1))
        beside = self._simulate(lambda supervisor: self._longest_wait(supervisor, self.messages))
        # The busy conversations take a slot each all the time, and a nested task of theirs goes first.
        share = self.slots / (self.slots - self.conversations) if self.slots > self.conversations else 2.0
        if beside > share * alone + 3 * SERVICE:
            raise InvariantViolation(f"users wait {beside:.2f} s beside busy conversations, {alone:.2f} s otherwise")

    # --- agents that await nested tasks ---

    async def _run_agents(self, supervisor: BackpressureSupervisor) -> None:
        open_agents: set[str] = set()
        max_open = 2 * self.agent_slots
        most = 0

        async def handle(task: Task) -> None:
            nonlocal most
            depth = self.depth if task.payload is None else task.payload
            if task.payload is None:
                open_agents.add(task.task_id)
                most = max(most, len(open_agents))
            try:
                await asyncio.sleep(SERVICE)
                if depth:
                    children = [Task(self.kinds[1], depth - 1) for _ in range(self.fan_out)]
                    await asyncio.gather(*map(supervisor.run, children))
                    await asyncio.sleep(SERVICE)
            finally:
                open_agents.discard(task.task_id)

        solo = SERVICE * 2 * sum(self.fan_out**level for level in range(self.depth + 1))
        supervisor.register_worker(
            "w",
            handler=handle,
            task_types=(KIND, OTHER_KIND),
            max_concurrent=self.agent_slots,
            max_open=max_open,
            timeout=solo * 2 * max_open / self.agent_slots + 1.0,
        )
        async with supervisor:
            record = EventRecord(supervisor)
            tickets = [await supervisor.submit(Task(KIND)) for _ in range(self.agents)]
            ends = [await asyncio.wait_for(ticket, 2000.0) for ticket in tickets if ticket]
            self.happened["agents"] += len(ends)
        if failures := [end for end in ends if not end.success]:
            counts = dict(Counter(end.status.value for end in failures))
            raise InvariantViolation(f"of {self.agents} agents {counts}: {failures[0].error}")
        if self.overflow is None and most > max_open:  # with one, agents that wait for a stored task do not count
            raise InvariantViolation(f"{most} agents were open, and at most {max_open} may be")
        check_supervisor(record, tickets=tickets, nested=True)

    def check_agents(self) -> None:
        """Check that all agents that begin end in time."""
        self._simulate(self._run_agents)

    # --- agents that do not stop ---

    async def _run_stubborn(self, supervisor: BackpressureSupervisor) -> None:
        at_work = most = 0
        over = asyncio.Event()

        async def handle(_: Task) -> None:
            nonlocal at_work, most
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor.run(Task(OTHER_KIND))
            at_work += 1
            most = max(most, at_work)
            while not over.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await over.wait()
            at_work -= 1

        async def work(_: Task) -> None:
            await asyncio.sleep(100.0)

        supervisor.register_worker("agents", handler=handle, task_types=[KIND], max_concurrent=self.agent_slots)
        supervisor.register_worker("tools", handler=work, task_types=[OTHER_KIND], max_concurrent=self.agents)
        async with supervisor:
            for _ in range(self.agents):
                ticket = await supervisor.submit(Task(KIND))
                await asyncio.sleep(SERVICE)
                ticket.cancel()
            await supervisor.submit(Task(KIND))  # it waits behind them
            if most > self.agent_slots + 1:  # the last one had begun when the one before it did not stop
                raise InvariantViolation(f"{most} agents that do not stop are at work in {self.agent_slots} slots")
            before = virtual_loop().time()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(supervisor.drain(), 1000.0)
            if (took := virtual_loop().time() - before) > 3 * GRACE:
                raise InvariantViolation(f"beside handlers that do not stop a drain took {took:.0f} s")
            over.set()

    def check_stubborn_agents(self) -> None:
        """Check that agents that do not stop keep their slots, and keep no drain from ending."""
        self._simulate(self._run_stubborn, zombie_grace=GRACE)

    # --- more tasks than are served ---

    async def _starts(self, supervisor: BackpressureSupervisor, priorities: list[Priority]) -> list[int]:
        """Return the numbers of tasks of these priorities, in the order in which they start."""
        order: list[int] = []

        async def handle(task: Task) -> None:
            order.append(task.payload)
            await asyncio.sleep(SERVICE)

        supervisor.register_worker("w", handler=handle, task_types=[KIND], max_concurrent=self.agent_slots)
        async with supervisor:
            tickets = []
            for number, priority in enumerate(priorities):
                tickets.append(await supervisor.submit(Task(KIND, number, priority=priority)))
                if number > self.agent_slots:
                    await asyncio.sleep(self.gap * SERVICE / self.agent_slots)
            for ticket in tickets:
                if ticket:
                    await asyncio.wait_for(ticket, 2000.0)
            self.happened["tasks in a flood"] += len(order)
        return order

    def check_order(self) -> None:
        """Check that no task overtakes one of its priority, and that better ones overtake only so many times."""
        like = [Priority.NORMAL] * 60
        order = self._simulate(lambda supervisor: self._starts(supervisor, like), max_queue_size=self.queue_size)
        if order != sorted(order):
            raise InvariantViolation(f"tasks of one priority start in the order {order}")
        low = self.agent_slots  # the number of the first one that waits
        flood = [Priority.LOW if number == low else Priority.CRITICAL for number in range(100)]
        order = self._simulate(lambda supervisor: self._starts(supervisor, flood), max_queue_size=None)
        if order.index(low) > low + STARVATION_BOUND:
            raise InvariantViolation(f"{order.index(low)} tasks start before one of low priority that waits")


def run(seed: int) -> FairShare:
    """Run the experiments of one seed; raise if the others starve, or if agents do not end."""
    share = FairShare(seed)
    share.check_users()
    share.check_agents()
    share.check_stubborn_agents()
    share.check_order()
    return share


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        print(argument, vars(run(int(argument))))
