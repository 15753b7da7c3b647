"""Tasks that wait for a cheaper worker: none is lost, and no slot that one needs idles, whatever else happens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.task_plane import Agent, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Priority, Task, Ticket, Upstream

HEAVY, LIGHT = 2.0, 10.0  # seconds that a run takes


class Fleet:
    """A supervisor with a heavy worker, fast and dear, and a light one, on which tasks of each type have run."""

    def __init__(self, kinds: tuple[str, ...] = ("a",), *, light: Agent | None = None, **options: Any) -> None:
        self.heavy, self.light = Agent(HEAVY), light or Agent(LIGHT)
        self.supervisor = BackpressureSupervisor(max_cost_wait=math.inf)
        self.add("heavy", self.heavy, task_types=kinds, cost=0.02, max_concurrent=2)
        self.add("light", self.light, task_types=kinds, cost=0.002, **options)
        self._kinds = kinds

    def add(self, name: str, agent: Agent, **options: Any) -> None:
        self.supervisor.register_worker(name, handler=agent, **options)

    async def learn(self, urgent: int = 3) -> None:
        """Run enough tasks, at least one of which finds no other slot than one of `light`."""
        for _ in range(8):
            for kind in self._kinds:
                for ticket in [await self.submit("learn", kind, priority=Priority.HIGH) for _ in range(urgent)]:
                    await ticket
        for agent in (self.heavy, self.light):
            agent.calls.clear()

    async def submit(self, payload: str, kind: str = "a", *, within: float | None = None, **fields: Any) -> Ticket:
        deadline = None if within is None else Deadline.within(within)
        ticket = await self.supervisor.submit(Task(kind, payload, deadline=deadline, **fields))
        await run_ready()
        return ticket

    @property
    def held(self) -> int:
        return self.supervisor.statistics().held


@asynccontextmanager
async def running(fleet: Fleet, urgent: int = 3) -> AsyncIterator[Fleet]:
    async with fleet.supervisor:
        await fleet.learn(urgent)
        yield fleet


@virtual
async def test_no_task_waits_for_a_worker_whose_slots_are_all_reserved() -> None:
    async with running(Fleet(max_concurrent=4, reserve=4), urgent=4) as fleet:
        heavy = [await fleet.submit("heavy", priority=Priority.HIGH) for _ in range(2)]
        await fleet.submit("light", priority=Priority.HIGH)
        for ticket in heavy:
            await ticket
        await fleet.submit("normal", within=60.0)
        assert fleet.heavy.started[-1] == "normal"


@virtual
async def test_a_slot_that_is_reserved_takes_no_held_task_into_a_queue_that_nobody_serves() -> None:
    async with running(Fleet(max_concurrent=2, reserve=1), urgent=4) as fleet:
        await fleet.submit("normal", within=500.0)
        fleet.light.seconds = 600.0
        fleet.supervisor.workers["heavy"].resize(1)
        await fleet.submit("heavy", priority=Priority.CRITICAL)
        stuck = await fleet.submit("stuck", priority=Priority.CRITICAL)
        await asyncio.sleep(HEAVY + 1.0)
        assert fleet.light.started == ["normal", "stuck"]
        held = await fleet.submit("held", within=60.0)
        assert fleet.held == 1
        await asyncio.sleep(LIGHT)
        assert fleet.supervisor.workers["light"].current_tasks == 1  # and the slot that is free is reserved
        later = await fleet.submit("later")
        assert (await later).worker_id == (await held).worker_id == "heavy"
        stuck.cancel()


@virtual
async def test_a_slot_that_was_lent_takes_no_held_task_into_a_queue_that_nobody_serves() -> None:
    nested = Agent(400.0)

    class Parent(Agent):
        async def run(self, task: Task) -> Any:
            if task.payload == "parent":
                await asyncio.sleep(3.0)
                await fleet.supervisor.run(Task("nested"))
            return await super().run(task)

    fleet = Fleet(light=Parent(LIGHT), max_concurrent=1, max_open=1)
    fleet.add("nested", nested, task_types=["nested"], timeout=1_000.0)
    async with running(fleet):
        await fleet.submit("parent", within=2_000.0)
        held = await fleet.submit("held", within=60.0)
        assert fleet.held == 1
        await asyncio.sleep(5.0)  # the slot of the parent is lent
        await fleet.submit("later")
        assert fleet.heavy.started[-1] == "later"
        assert (await held).worker_id == "heavy"
        assert (await held).success


@virtual
async def test_a_slot_whose_upstream_is_short_keeps_no_held_task_from_another_worker() -> None:
    key = Upstream("key", max_concurrent=1)

    class Caller(Agent):
        async def run(self, task: Task) -> Any:
            async with key.call("m"):
                return await super().run(task)

    async with running(Fleet(light=Caller(LIGHT), max_concurrent=1)) as fleet:

        async def call() -> None:
            async with key.call("m"):
                await asyncio.sleep(200.0)

        await fleet.submit("first", within=500.0)
        held = await fleet.submit("held", within=60.0)
        assert fleet.held == 1
        calls = [asyncio.create_task(call()) for _ in range(4)]
        await asyncio.sleep(20.0)
        await fleet.submit("later", within=20.0)
        assert fleet.heavy.started == ["later"]
        result = await held
        assert (result.worker_id, result.success) == ("heavy", True)
        for each in calls:
            each.cancel()


@virtual
async def test_one_slot_of_a_worker_of_two_types_is_promised_to_one_held_task() -> None:
    async with running(Fleet(("a", "b"), max_concurrent=1)) as fleet:
        await fleet.submit("first", within=500.0)
        tickets = [await fleet.submit("held", kind, within=26.0) for kind in ("a", "b")]
        assert fleet.held == 2
        done = [await ticket for ticket in tickets]
        assert [result.success for result in done] == [True, True]
        assert {result.worker_id for result in done} == {"light", "heavy"}


@virtual
async def test_a_held_task_is_not_started_on_a_worker_that_is_too_slow_for_it() -> None:
    slow, fleet = Agent(40.0), Fleet(max_concurrent=1)
    async with running(fleet):
        fleet.add("slow", slow, task_types=["a"], cost=0.005, timeout=1_000.0)
        for _ in range(8):
            tickets = [await fleet.submit("learn") for _ in range(2)]
            for ticket in tickets:
                await ticket
        await fleet.submit("first", within=500.0)
        await fleet.submit("slow")
        await asyncio.sleep(35.0)  # `slow` is free in 5 seconds, `light` in 10
        fleet.light.seconds = LIGHT
        await fleet.submit("second", within=500.0)
        held = await fleet.submit("held", within=27.0)
        assert fleet.held == 1
        result = await held
        assert (result.success, result.worker_id) == (True, "light")
