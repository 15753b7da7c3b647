"""Goodput under overload does not fall, and recovers after an outage."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, field

import pytest
from tests.simulation import surge

from forebay import BackpressureSupervisor, Task, Ticket
from forebay.simulation import simulate
from forebay.simulation.provider.provider_config import CapacityStep, ProviderConfig
from forebay.simulation.provider.simulated_provider import AnswerCut, ProviderRefusal, SimulatedProvider

SLOTS = 20  # what the provider serves at full speed
CALL_SECONDS = 0.5 + 100 * 0.01  # duration of a call that runs alone
CAPACITY = SLOTS / (3 * CALL_SECONDS)  # runs a second
FEW_SLOTS = 3  # of the small service that every seed simulates
CALLER_TIMEOUT = 30.0  # seconds after which a result is worthless
MINUTES = 5


@dataclass
class SimulatedService:
    """A provider, agents that make three calls, and callers with a timeout."""

    offered_rate: float  # runs a second
    config: ProviderConfig
    seed: int
    minutes: float = MINUTES
    done: list[float] = field(default_factory=list)  # times of the results that came in time

    async def agent(self, task: Task) -> None:
        for _ in range(3):
            await self.call(task)

    async def call(self, task: Task) -> None:
        for _ in range(6):  # as agents retry, with any provider
            try:
                await self.provider.call(model="gpt-4o-mini", input_tokens=500, output_tokens=100, run=task.task_id)
            except (ProviderRefusal, AnswerCut):
                await asyncio.sleep(1.0)
            else:
                return

    async def arrivals(self, serve: object) -> None:
        """Start runs for some minutes; `serve` handles each of them."""
        rng = random.Random(self.seed)
        loop = asyncio.get_running_loop()
        self.provider = SimulatedProvider(self.config, seed=self.seed)
        async with asyncio.TaskGroup() as group:
            while loop.time() < 60 * self.minutes:
                group.create_task(serve(Task("run")))  # type: ignore[operator]
                await asyncio.sleep(rng.expovariate(self.offered_rate))

    def record_result(self, start: float) -> None:
        now = asyncio.get_running_loop().time()
        if now - start <= CALLER_TIMEOUT and now <= 60 * self.minutes:
            self.done.append(now)

    def per_second(self, since: float, until: float = 60.0 * MINUTES) -> float:
        return sum(since <= at < until for at in self.done) / (until - since)


async def forebay(service: SimulatedService) -> None:
    slots = service.config.slots
    supervisor = BackpressureSupervisor(max_queue_size=2 * slots)
    supervisor.register_worker("agents", handler=service.agent, task_types=["run"], max_concurrent=slots)

    async def serve(task: Task) -> None:
        start = asyncio.get_running_loop().time()
        ticket: Ticket = await supervisor.submit(task)
        if ticket and (await ticket).success:
            service.record_result(start)

    async with supervisor:
        await service.arrivals(serve)


async def classic(service: SimulatedService) -> None:
    """Serve without admission control: every run starts at once."""

    async def serve(task: Task) -> None:
        start = asyncio.get_running_loop().time()
        await service.agent(task)
        service.record_result(start)

    await service.arrivals(serve)


def goodput(
    supervisor: object, times: float, *, config: ProviderConfig | None = None, seed: int = 1
) -> SimulatedService:
    config = config or ProviderConfig(slots=SLOTS, ttft=0.5, tpot=0.01)
    service = SimulatedService(times * CAPACITY, config, seed)
    simulate(lambda: supervisor(service), seed=seed)  # type: ignore[operator]
    return service


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_goodput_never_falls_as_more_is_offered(seed: int) -> None:
    reached = [goodput(forebay, times, seed=seed).per_second(60) for times in (0.5, 1, 2, 4, 7, 10)]
    for less, more in itertools.pairwise(reached):
        assert more >= 0.95 * less, reached
    assert reached[-1] >= 0.95 * CAPACITY, reached


def test_without_admission_control_goodput_collapses() -> None:
    """The negative control: a service that cannot be overloaded would prove nothing."""
    assert goodput(classic, 3).per_second(60) < 0.2 * CAPACITY


@pytest.mark.parametrize("seed", range(3))
def test_goodput_recovers_after_an_outage(seed: int) -> None:
    outage = (CapacityStep(at=90, slots=0), CapacityStep(at=150, slots=SLOTS))
    service = goodput(
        forebay, 3, config=ProviderConfig(slots=SLOTS, ttft=0.5, tpot=0.01, capacity_steps=outage), seed=seed
    )
    before, after = service.per_second(60, 90), service.per_second(150 + 90)
    assert after >= 0.95 * before, (before, after)


def small(times: float, seed: int, **fields: object) -> SimulatedService:
    """Simulate two minutes of a small service at `times` its capacity."""
    config = ProviderConfig(slots=FEW_SLOTS, ttft=0.5, tpot=0.01, **fields)  # type: ignore[arg-type]
    service = SimulatedService(times * CAPACITY * FEW_SLOTS / SLOTS, config, seed, minutes=2)
    simulate(lambda: forebay(service), seed=seed)
    return service


@pytest.mark.parametrize("seed", surge.SEEDS)
def test_every_seed_keeps_its_goodput_and_recovers(seed: int) -> None:
    rng = random.Random(seed)
    times, start = rng.uniform(2, 6), rng.uniform(10, 20)
    at_capacity, flooded = small(1, seed), small(times, seed)
    assert flooded.per_second(20, 120) >= 0.95 * at_capacity.per_second(20, 120)
    outage = (CapacityStep(at=start, slots=0), CapacityStep(at=start + rng.uniform(5, 20), slots=FEW_SLOTS))
    interrupted = small(times, seed, capacity_steps=outage)
    last = outage[-1].at + 8 * 3 * CALL_SECONDS  # eight service times: less than 90 s
    # the outage synchronizes the slots: the calls that end in a window are known to one round of them only
    assert interrupted.per_second(last, 120) >= 0.95 * flooded.per_second(last, 120) - FEW_SLOTS / (120 - last)
