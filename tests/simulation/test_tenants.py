"""Tenants under floods drawn from a seed: shares by weight, and nobody waits for more than turns."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_stores import OVERFLOWS

from forebay import BackpressureSupervisor, Task, Ticket
from forebay.simulation import simulate, virtual_loop
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

SERVICE = 1.0  # seconds of each task


class Scene:
    """A supervisor with one worker and some tenants, whose values are drawn from a seed."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.rng = rng = random.Random(f"tenants {seed}")
        backend = OVERFLOWS[seed % len(OVERFLOWS)]
        self.overflow = None if backend is None else backend.fast_url(directory)
        self.restarts = self.overflow is not None and self.overflow.startswith("sqlite") and rng.random() < 0.6
        self.slots = rng.randint(1, 6)
        self.queue_size = 2_000 if backend is None else rng.choice((0, 5, 30, 2_000))
        self.weights = {name: rng.choice((0.5, 1.0, 1.0, 2.0, 3.0)) for name in "abcd"[: rng.randint(2, 4)]}
        self.starts: list[tuple[float, str, int]] = []  # when, of which tenant, its number

    def supervisor(self) -> BackpressureSupervisor:
        async def handler(task: Task) -> None:
            self.starts.append((virtual_loop().time(), task.tenant, task.payload))
            await asyncio.sleep(SERVICE)

        supervisor = BackpressureSupervisor(
            max_queue_size=self.queue_size, overflow=self.overflow, tenants=self.weights, lease=60.0
        )
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=self.slots)
        return supervisor

    async def submit(self, supervisor: BackpressureSupervisor, tenant: str, number: int, **how: Any) -> Ticket:
        return await supervisor.submit(Task("work", number, tenant=tenant, **how))

    async def end(self, supervisor: BackpressureSupervisor) -> None:
        """Cancel what is left, and check that nothing is left of it."""
        core = supervisor._running().core
        for ticket in [*core.registry.live.values(), *core.registry.weak.values()]:
            ticket.cancel()
        await asyncio.sleep(2 * SERVICE)


@pytest.mark.parametrize("seed", range(24))
def test_tenants_that_have_work_get_turns_by_weight(seed: int, tmp_path: Path) -> None:
    async def main() -> None:
        async with (supervisor := scene.supervisor()):
            record = EventRecord(supervisor)
            names = [name for name in scene.weights for _ in range(150)]
            scene.rng.shuffle(names)
            for number, name in enumerate(names):
                await scene.submit(supervisor, name, number)
            total = sum(scene.weights.values())
            enough = int(130 * total / max(scene.weights.values()))  # the first has work left
            await asyncio.sleep(enough / scene.slots * SERVICE + 1.0)
            counts = Counter(tenant for _, tenant, _ in scene.starts[10:enough])
            for name, weight in scene.weights.items():
                due = (enough - 10) * weight / total
                assert abs(counts[name] - due) <= 0.1 * due + 2, (counts, scene.weights)
            await scene.end(supervisor)
        check_supervisor(record)

    scene = Scene(seed, tmp_path)
    simulate(main, seed=seed)


@pytest.mark.parametrize("seed", range(24, 54))
def test_a_tenant_waits_for_turns_and_not_for_the_flood_of_another(seed: int, tmp_path: Path) -> None:
    async def main() -> None:
        supervisor = scene.supervisor()
        await supervisor.start()
        asked: dict[tuple[str, int], tuple[float, int]] = {}  # when, and how many of its own were ahead
        flood, (first, *others) = scene.rng.choice((30, 150, 600)), list(scene.weights)
        conversations = scene.rng.choice((0, 0, 3))
        for number in range(flood):
            thread_id = f"{number % conversations}" if conversations and number % 2 else None
            await scene.submit(supervisor, first, number, thread_id=thread_id)
        for name in others:
            for number in range(scene.rng.randint(1, 5)):
                if await scene.submit(supervisor, name, number):
                    asked[name, number] = virtual_loop().time(), number
        if scene.restarts:
            await supervisor.drain(timeout=0.1)
            await supervisor.close()
            supervisor = scene.supervisor()
            await supervisor.start()
            asked = {key: (virtual_loop().time(), ahead) for key, (_, ahead) in asked.items()}
        await asyncio.sleep(60 * SERVICE)
        began = {(tenant, number): at for at, tenant, number in scene.starts}
        total = sum(scene.weights.values())
        for (name, number), (at, ahead) in asked.items():
            turns = (ahead + 1) * total / scene.weights[name] + len(scene.weights)
            longest = turns / scene.slots * SERVICE + SERVICE + 0.2
            assert began.get((name, number), 1e9) - at <= longest, (name, number, scene.weights, scene.slots)
        await scene.end(supervisor)
        await supervisor.close()

    scene = Scene(seed, tmp_path)
    simulate(main, seed=seed)
