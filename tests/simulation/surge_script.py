"""The random script of a surge: processes, workers, tasks and faults, all drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.support.unreliable_store import StoreFaults

from forebay import Deadline, Estimate, Priority, Task
from forebay.simulation.provider.provider_config import Bursts, CapacityStep, Faults, ProviderConfig, Slowdown

TYPES = ("research", "summarize", "act")
ENDS = ("drain", "drain", "drain within", "close", "fail", "crash", "crash")
LEASE = 30.0  # seconds


@dataclass(frozen=True)
class ProcessLifetime:
    """The start and the end of one process, in seconds of the loop."""

    starts: float
    ends: float
    end: str
    faults: StoreFaults


@dataclass(frozen=True)
class WorkerPlan:
    """A worker: its handler is a plain callable if it blocks, and raises from `fails_from` to `fails_until`."""

    name: str
    kinds: tuple[str, ...]
    slots: int
    blocks: bool
    fails_from: float
    fails_until: float
    reset_timeout: float | None


@dataclass
class SurgeScript:
    """The values that a seed draws."""

    workers: list[WorkerPlan]
    overflow: str | None  # None, a memory:// URL or "sqlite"
    lifetimes: list[list[ProcessLifetime]]  # of each process that shares the overflow
    max_queue_size: int | None
    threshold: float
    tasks: int
    spread: float  # seconds over which the tasks come
    provider: ProviderConfig
    stalls: list[tuple[float, float]]  # start and duration of code that blocks the loop
    swallow: float  # probabilities of a handler's behaviour
    hang: float
    fail: float
    nest: float
    cancel_share: float  # probabilities of a caller's behaviour
    deadline_share: float
    durable_share: float
    key_share: float
    thread_share: float

    @classmethod
    def draw(cls, rng: random.Random) -> SurgeScript:
        """Draw a supervisor and a surge on it."""
        spread = rng.choice((0.0, 10.0, 60.0))
        overflow = rng.choice((None, "memory://", "memory://?bound=50", "sqlite", "sqlite"))
        workers = _workers(rng)
        return cls(
            workers=workers,
            overflow=overflow,
            lifetimes=[
                _lifetimes(rng, overflow, spread) for _ in range(rng.choice((1, 1, 2)) if overflow == "sqlite" else 1)
            ],
            max_queue_size=rng.choice((None, 0, 3, 30)),
            threshold=rng.choice((0.5, 0.8, 1.0)),
            tasks=rng.choice((40, 120, 300)),
            spread=spread,
            provider=_provider(rng),
            stalls=[(rng.uniform(0, 60), rng.choice((0.2, 3.0, 40.0))) for _ in range(rng.choice((0, 0, 1, 3)))],
            swallow=rng.choice((0, 0.03)),
            hang=rng.choice((0, 0.03)),
            fail=rng.choice((0, 0.05)),
            nest=rng.choice((0, 0.1, 0.5)),
            cancel_share=rng.choice((0, 0.1)),
            deadline_share=rng.choice((0, 0.2)),
            durable_share=rng.choice((0, 0.2, 0.8)) if overflow == "sqlite" else 0,
            key_share=rng.choice((0, 0.1)),
            thread_share=rng.choice((0, 0.1, 0.5)),
        )

    def task(self, rng: random.Random, number: int) -> Task:
        """Draw one task of the surge."""
        moods = {"swallow": self.swallow, "hang": self.hang, "fail": self.fail, "nest": self.nest}
        mood = next((mood for mood, chance in moods.items() if rng.random() < chance), "well")
        durable = rng.random() < self.durable_share
        return Task(
            rng.choice(TYPES),
            {"mood": mood, "depth": 2},
            task_id=f"t{number}",
            priority=rng.choice(list(Priority)),
            timeout=rng.choice((None, 5.0, 20.0)) if mood != "hang" else 5.0,
            deadline=Deadline.within(self.spread + rng.uniform(1, 60)) if rng.random() < self.deadline_share else None,
            spill=rng.random() < 0.8,
            durable=durable,
            key=f"key{rng.randint(0, 9)}" if rng.random() < self.key_share else None,
            thread_id=f"thread{rng.randint(0, 3)}" if rng.random() < self.thread_share else None,
            estimate=Estimate(calls=1 + number % 7) if number % 3 else None,
        )


def clock_steps(seed: int, spread: float) -> list[tuple[float, float]]:
    """Return when the wall clock is set in the surge of a seed, and by how many seconds; never for half of the seeds.

    Drawn apart from the script, so that the surges of the other seeds stay as they are.
    """
    rng = random.Random(f"{seed} clock")
    if rng.random() < 0.5:
        return []
    sizes = [-3600.0, -60.0, -3.0, 3.0, 60.0, 3600.0]
    return [(rng.uniform(0, 30 + spread), rng.choice(sizes)) for _ in range(rng.randint(1, 3))]


def _workers(rng: random.Random) -> list[WorkerPlan]:
    block, fail = rng.choice((0, 0.1)), rng.choice((0, 0.3))

    def worker(name: str, kinds: tuple[str, ...], max_slots: int) -> WorkerPlan:
        fails_from = rng.uniform(0, 40) if rng.random() < fail else float("inf")
        slots, blocks, fails_until = rng.randint(1, max_slots), rng.random() < block, fails_from + rng.uniform(5, 30)
        return WorkerPlan(name, kinds, slots, blocks, fails_from, fails_until, reset_timeout=rng.choice((1.0, 10.0)))

    kinds = [tuple(rng.sample(TYPES, rng.randint(1, len(TYPES)))) for _ in range(rng.randint(2, 5))]
    missing = [kind for kind in TYPES if all(kind not in served for served in kinds)]
    return [
        *(worker(f"w{number}", served, 6) for number, served in enumerate(kinds)),
        *(worker(f"only-{kind}", (kind,), 4) for kind in missing),
    ]


def _lifetimes(rng: random.Random, overflow: str | None, spread: float) -> list[ProcessLifetime]:
    """Draw the lifetimes of one process. All but the last end under load; the last ends when no caller is left."""
    has_faults = rng.random() < 0.5 and overflow == "sqlite"
    lifetimes = []
    at = rng.choice((0.0, 0.0, 5.0))
    for _ in range(rng.choice((0, 1, 2)) if overflow == "sqlite" else rng.choice((0, 0, 1))):
        ends = at + rng.uniform(1, 20 + spread)
        end = rng.choice(ENDS if overflow == "sqlite" else ENDS[:5])
        lifetimes.append(ProcessLifetime(at, ends, end, _store_faults(rng) if has_faults else StoreFaults()))
        at = ends + rng.uniform(0, 2 * LEASE)
    lifetimes.append(ProcessLifetime(at, float("inf"), "drain", _store_faults(rng) if has_faults else StoreFaults()))
    return lifetimes


def _store_faults(rng: random.Random) -> StoreFaults:
    at = rng.uniform(0, 60)
    return StoreFaults(
        slow=rng.choice((0.0, 0.05, 0.5)),
        hangs=rng.choice((0.0, 0.0, 0.02)),
        hang=2 * LEASE,
        loses_reply=rng.choice((0.0, 0.0, 0.02)),
        outages=((at, at + rng.uniform(1, 2 * LEASE)),) if rng.random() < 0.3 else (),
    )


def _provider(rng: random.Random) -> ProviderConfig:
    at = rng.uniform(5, 40)
    slots = rng.choice((5, 20, 60))
    trouble = rng.choice(("none", "slow", "outage", "bursts"))
    return ProviderConfig(
        slots=slots,
        ttft=0.3,
        tpot=0.01,
        capacity_steps=(CapacityStep(at=at, slots=0), CapacityStep(at=at + 20, slots=slots))
        if trouble == "outage"
        else (),
        slowdowns=(Slowdown(at=at, seconds=30, factor=6),) if trouble == "slow" else (),
        faults=Faults(
            error=rng.choice((0, 0.02)),
            cut=rng.choice((0, 0.02)),
            straggler=0.01,
            bursts=Bursts(every=30, seconds=5) if trouble == "bursts" else None,
        ),
    )
