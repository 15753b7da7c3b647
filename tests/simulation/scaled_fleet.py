"""A fleet that an autoscaler scales, in virtual time: real supervisors on one overflow, which start after a minute.

Each seed draws a fleet and a load. A surge is met within two windows. A sine load turns the fleet around at most once
for each stabilization window. While a quota, a budget or an open breaker is short, no replica is added. Whatever comes
and goes, each task runs once, and succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.support.supervisor_checks import InvariantViolation

from forebay import BackpressureSupervisor, Task, Ticket, Upstream
from forebay.breaker import BreakerRules
from forebay.events import Scaled
from forebay.quota import Budget, Price, Quota
from forebay.scale import Autoscaler, ReplicaReport, Replicas, sum_up
from forebay.simulation import simulate

WINDOW: Final = 60.0  # seconds
STABILIZATION: Final = 300.0
START_UP: Final = 60.0  # seconds until a replica takes tasks
SCENES: Final = ("surge", "sine", "quota", "budget", "breaker")


class SimulatedTarget:
    """Supervisors on one overflow, each of which starts a while after it was asked for, and drains before it goes."""

    name = "fleet"
    outside = True

    def __init__(self, make: Callable[[], BackpressureSupervisor], delay: Callable[[], float]) -> None:
        self._make = make
        self._delay = delay
        self._starting: list[asyncio.Task[None]] = []
        self._running: list[BackpressureSupervisor] = []
        self._ending: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> int:
        """How many take tasks."""
        return len(self._running)

    @property
    def current(self) -> int:
        """How many were asked for."""
        return len(self._running) + len(self._starting)

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Have all drain."""
        await self.scale(0)
        await asyncio.gather(*self._ending)

    async def replicas(self) -> Replicas:
        """Return them, with what they say of themselves."""
        demands = [await supervisor.demand(["work"], ask_overflow=False) for supervisor in self._running]
        reports = [ReplicaReport(service=demand.service, limited_by=demand.limited_by) for demand in demands]
        return sum_up(self.current, reports)

    async def scale(self, replicas: int) -> None:
        """Start some, or have some drain, those that have not started first."""
        while self.current < replicas:
            self._starting.append(asyncio.ensure_future(self._start()))
        while self.current > replicas:
            if self._starting:
                self._starting.pop().cancel()
            else:
                self._ending.append(asyncio.ensure_future(self._end(self._running.pop())))

    async def _start(self) -> None:
        await asyncio.sleep(self._delay())
        supervisor = self._make()
        await supervisor.start()
        task = asyncio.current_task()
        assert task is not None
        self._starting.remove(task)
        self._running.append(supervisor)

    async def _end(self, supervisor: BackpressureSupervisor) -> None:
        await supervisor.drain()
        await supervisor.close()


class ScaledFleet:
    """One fleet and one load, drawn from a seed."""

    def __init__(self, seed: int, *, scene: str | None = None) -> None:
        rng = self._rng = random.Random(f"scaled fleet {seed}")
        self.seed = seed
        self.scene = scene or SCENES[seed % len(SCENES)]
        self.seats = rng.choice((2, 4, 8))
        self.service = rng.uniform(8.0, 30.0)
        self.spread = rng.choice((0.0, 0.3))
        self.slots = rng.uniform(3.0, 8.0)  # that the load asks for
        self.factor = rng.uniform(2.0, 5.0)
        self.period = rng.uniform(120.0, 1500.0)
        self.at = rng.uniform(300.0, 330.0)
        self.minimum = rng.choice((0, 1))
        self.seconds = {"surge": 1200.0, "sine": 3000.0}.get(self.scene, 600.0)  # for which tasks come
        self.knows_service = rng.random() < 0.5
        self.tickets: list[Ticket] = []
        self.runs: Counter[int] = Counter()
        self.events: list[Scaled] = []
        self.ready: list[tuple[float, int]] = []  # time, slots that take tasks
        self.short_from = math.inf  # loop time at which the upstream was found to be short
        self.happened: Counter[str] = Counter()
        self._key = self._make_key()

    # --- the scene ---

    def _make_key(self) -> Upstream:
        """Return the upstream of all replicas: one object, as an account that they share."""
        per_minute = max(1, round(60 * self.slots / self.service / 2))  # half of what the load needs
        settings: dict[str, dict[str, Any]] = {
            "quota": {"quotas": [Quota(requests=per_minute, per="minute")]},
            "budget": {"budget": Budget(usd=0.6 * self.slots * self.at / self.service, per="day")},
            "breaker": {"breaker": BreakerRules(reset_timeout=3600.0, max_reset_timeout=3600.0)},
        }
        return Upstream(
            "key",
            max_concurrent=10_000,
            max_wait=1e6,
            prices={"m": Price(input=1_000_000, output=0)},
            **settings.get(self.scene, {}),
        )

    def _make_supervisor(self, overflow: str) -> BackpressureSupervisor:
        supervisor = BackpressureSupervisor(overflow=overflow, lease=120.0, max_queue_size=0)
        uses = [(self._key, "m")] if self.scene in ("quota", "budget", "breaker") else []
        supervisor.register_worker(
            "worker", handler=self._work, task_types=["work"], max_concurrent=self.seats, timeout=1e6, upstreams=uses
        )
        return supervisor

    async def _work(self, task: Task) -> None:
        loop = asyncio.get_running_loop()
        self.runs[task.payload] += 1
        seconds = self.service * self._rng.lognormvariate(-(self.spread**2) / 2, self.spread)
        if self.scene in ("surge", "sine"):
            await asyncio.sleep(seconds)
            return
        async with self._key.call("m", input_tokens=1):
            await asyncio.sleep(seconds)
            if self.scene == "breaker" and loop.time() > self.at:
                message = "the provider is broken"
                raise ConnectionError(message)

    def _load(self, now: float) -> float:
        """Return the slots that the load asks for."""
        if self.scene == "sine":
            return self.slots * (1 + 0.9 * math.sin(2 * math.pi * now / self.period))
        if self.scene == "surge" and self.at <= now < self.at + 250.0:
            return self.slots * self.factor
        return self.slots

    @property
    def short_by(self) -> float:
        """The time by which a quota, budget or breaker is short at the latest."""
        return self.at + 2 * self.service + WINDOW

    # --- the run ---

    async def _main(self, folder: str) -> None:
        overflow = f"sqlite:///{Path(folder, 'spill.db')}?fsync=no"

        def keep(event: Any) -> None:
            if isinstance(event, Scaled):
                self.events.append(event)

        front = BackpressureSupervisor(overflow=overflow, lease=120.0, max_queue_size=0, on_event=keep)
        front.register_worker("elsewhere", handler=self._work, task_types=["work"])
        target = SimulatedTarget(
            lambda: self._make_supervisor(overflow), lambda: START_UP * self._rng.uniform(0.9, 1.0)
        )
        async with front:
            front.pause("work")
            scaler = Autoscaler(
                front,
                target,
                task_types=["work"],
                seats=self.seats,
                minimum=self.minimum,
                maximum=60,
                window=WINDOW,
                stabilization=STABILIZATION,
                service=self.service if self.knows_service else None,
            )
            async with scaler:
                sampling = asyncio.ensure_future(self._sample(target, scaler))
                await self._offer(front)
                sampling.cancel()
                if self.scene in ("surge", "sine"):
                    for ticket in self.tickets:
                        await ticket
                self.statistics = scaler.statistics()
            self.left = (await front.demand(["work"])).spilled

    async def _sample(self, target: SimulatedTarget, scaler: Autoscaler) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.ready.append((loop.time(), target.ready * self.seats))
            if scaler.statistics().limited_by is not None:
                self.short_from = min(self.short_from, loop.time())
            await asyncio.sleep(1.0)

    async def _offer(self, front: BackpressureSupervisor) -> None:
        loop, number = asyncio.get_running_loop(), 0
        while (now := loop.time()) < self.seconds:
            self.tickets.append(await front.submit(Task("work", number)))
            number += 1
            await asyncio.sleep(self._rng.expovariate(max(0.05, self._load(now)) / self.service))

    def run(self) -> None:
        """Run it, and check what must hold."""
        with tempfile.TemporaryDirectory() as folder:
            simulate(lambda: self._main(folder), seed=self.seed, max_time=1e6)
        self.check_tasks()
        if self.scene == "surge":
            self.check_surge()
        if self.scene in ("surge", "sine"):
            self.check_reversals()
        else:
            self.check_nothing_bought()

    # --- what must hold ---

    def check_tasks(self) -> None:
        """Check that no task was lost or run twice, though replicas went while they ran some."""
        if any(count > 1 for count in self.runs.values()):
            raise InvariantViolation(f"{sum(count > 1 for count in self.runs.values())} tasks were run twice")
        if self.scene in ("surge", "sine") and len(self.runs) < len(self.tickets):
            raise InvariantViolation(f"{len(self.tickets) - len(self.runs)} tasks were not run")
        if len(self.runs) + self.left < len(self.tickets):
            raise InvariantViolation(
                f"{len(self.tickets) - len(self.runs) - self.left} tasks are neither run nor stored"
            )
        self.happened["tasks"] += len(self.tickets)
        self.happened["replicas removed"] += sum(max(0, event.before - event.after) for event in self.events)

    def met_after(self) -> float:
        """Return after how many seconds the surge was met: as many slots took tasks as it asked for."""
        needed = self.slots * self.factor
        return next((at - self.at for at, slots in self.ready if at >= self.at and slots >= needed), math.inf)

    def check_surge(self) -> None:
        """Check that the surge was met within two windows."""
        if (after := self.met_after()) > 2 * WINDOW:
            raise InvariantViolation(f"a surge by {self.factor:.1f} was met after {after:.0f} s")
        self.happened["surges met"] += 1

    def check_reversals(self) -> None:
        """Check that there is at most one reversal for each stabilization window."""
        directions = [event.after > event.before for event in self.events]
        turns = [
            event.at
            for event, before, after in zip(self.events[1:], directions, directions[1:], strict=False)
            if before != after
        ]
        span = self.events[-1].at if self.events else 0.0
        if len(turns) > span / STABILIZATION + 1:
            raise InvariantViolation(f"{len(turns)} reversals in {span:.0f} s: at {turns}")
        self.happened["reversals"] += len(turns)

    def bought(self) -> int:
        """Return how many replicas were added since the upstream was short."""
        since = min(self.short_from, self.short_by)
        return sum(max(0, event.after - event.before) for event in self.events if event.at > since)

    def check_nothing_bought(self) -> None:
        """Check that no replica was added while the upstream was short, and that it was found to be, in time."""
        if self.short_from > self.short_by:
            raise InvariantViolation(f"nobody has noticed by {self.short_by:.0f} s that the {self.scene} is short")
        if bought := self.bought():
            raise InvariantViolation(f"{bought} replicas were added while the {self.scene} was short")
        self.happened[f"held by the {self.scene}"] += self.statistics.limited_by is not None
        self.happened["replicas not bought"] += self.statistics.wanted > self.statistics.current


def run(seed: int) -> ScaledFleet:
    """Run the fleet of one seed; raise if a promise is broken."""
    fleet = ScaledFleet(seed)
    fleet.run()
    return fleet


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        with contextlib.suppress(BrokenPipeError):
            done = run(int(argument))
            print(argument, done.scene, dict(done.happened), done.statistics)
