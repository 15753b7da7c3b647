"""The random script of a task storm: processes, workers, conversations and faults, all drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from tests.support.unreliable_store import StoreFaults

from forebay import Retry

TYPES: Final = ("plan", "act", "write")
LATE_TYPE: Final = "late"  # only served by workers that are registered late
LEASE: Final = 10.0  # seconds
GRACE: Final = 2.0  # seconds that a cancelled handler has to stop
_ENDS: Final = ("drain", "drain within", "drain within", "close", "fail", "crash", "crash")


@dataclass(frozen=True)
class StormLifetime:
    """The start and the end of one process, in seconds of the loop."""

    starts: float
    ends: float
    end: str
    limit: float | None  # of the drain


@dataclass(frozen=True)
class StormWorker:
    """A worker of each process: when it is registered, how long its handler takes to start, and its hooks."""

    name: str
    kinds: tuple[str, ...]
    slots: int
    max_open: int | None
    timeout: float
    late: float | None  # seconds after the start of its process at which it is registered
    start_time: float | None  # seconds; None: its handler need not be started
    start_fails: float  # probability
    hooks: frozenset[str]


@dataclass(frozen=True)
class StormRetries:
    """The retries of a storm: the policy of its workers, and how often an attempt fails that the next one may not."""

    policy: Retry
    fails: float  # probability of an attempt
    budget_share: float
    budget_extra: int

    @classmethod
    def draw(cls, rng: random.Random) -> StormRetries | None:
        """Draw retries, or none."""
        if rng.random() < 0.5:
            return None
        delay = rng.choice((0.05, 0.5, 0.5, 5.0))
        attempts = rng.choice((2, 3, 5))
        policy = Retry(max_attempts=attempts, base_delay=delay, max_delay=rng.choice((delay, 10.0)))
        return cls(policy, rng.choice((0.1, 0.3)), rng.choice((0.05, 0.2, 1.0)), rng.choice((0, 10, 1000)))


@dataclass(frozen=True)
class StormScript:
    """The values that a seed draws.

    Attributes:
        wild: hooks and handlers raise anything and call the supervisor, and handlers ignore their cancellation.
        file_lost: the second at which the file of the store is removed, if it is.
        clock_steps: when the wall clock is set, and by how much.
    """

    overflow: str | None  # None, a memory:// URL or "sqlite"
    faults: StoreFaults
    lifetimes: tuple[tuple[StormLifetime, ...], ...]  # of each process that shares the store
    workers: tuple[StormWorker, ...]
    max_queue_size: int | None
    keep_results: int
    spread: float  # seconds over which the messages and tasks come
    conversations: int
    messages: int  # of the busiest conversation
    tasks: int  # without a conversation
    work: float  # seconds at most, before a nested task and after it
    nests: float  # probabilities
    impatient: float
    durable: float
    keyed: float  # of the tasks without a conversation: several callers submit them
    lookups: float  # probability that a task is asked for by its id in another process
    deadlines: float
    fails: float
    wild: bool
    sinks: bool
    file_lost: float | None
    clock_steps: tuple[tuple[float, float], ...]
    retries: StormRetries | None

    @property
    def calm(self) -> bool:
        """True if nothing happens to the store: what callers are told is what it has."""
        faults = self.faults
        return not (faults.hangs or faults.loses_reply or faults.outages) and self.file_lost is None

    @property
    def serves_late(self) -> bool:
        """True if a worker for the late type starts at some time; else a stored task of it may wait without end."""
        late = [worker for worker in self.workers if worker.late is not None]
        return any(worker.start_time is None or worker.start_fails < 1.0 for worker in late)

    @property
    def blameless(self) -> bool:
        """True if no handler fails, hangs, or waits for a store that hangs or for a worker that never starts."""
        never_starts = any(worker.late is not None for worker in self.workers) and not self.serves_late
        return not (self.wild or self.fails or self.faults.hangs or self.retries or never_starts)

    @property
    def orderly(self) -> bool:
        """True if no process crashes, no handler outlives its process, and the store does what it is told."""
        ends = {lifetime.end for lifetimes in self.lifetimes for lifetime in lifetimes}
        return self.calm and not self.wild and "crash" not in ends

    @classmethod
    def draw(cls, rng: random.Random, retries: StormRetries | None = None) -> StormScript:
        """Draw a storm with the given retries."""
        choice = rng.choice
        overflow = choice((None, "memory://", "memory://?bound=50", "sqlite", "sqlite", "sqlite"))
        wild, spread, stored = choice((False, False, True)), choice((0.0, 3.0, 20.0)), overflow == "sqlite"
        calm, fails = rng.random() < 0.5, choice((0.0, 0.03))
        lifetimes = tuple(_lifetimes(rng, stored, spread) for _ in range(choice((1, 1, 1, 2)) if stored else 1))
        return cls(
            overflow=overflow,
            faults=StoreFaults() if calm or not stored else _store_faults(rng),
            lifetimes=lifetimes,
            workers=_workers(rng, wild=wild, fails=fails),
            max_queue_size=choice((None, None, 0, 1, 5, 20)),
            keep_results=1000 if stored else choice((0, 5, 1000)),  # a dropped one that is asked for would end again
            spread=spread,
            conversations=rng.randint(0, 5),
            messages=choice((5, 15, 40)),
            tasks=choice((5, 20, 60, 120)),
            work=choice((0.3, 0.3, 2.0)),
            nests=choice((0.0, 0.3, 0.9)),
            impatient=choice((0.0, 0.2)),
            durable=choice((0.0, 0.3, 1.0)) if stored else 0.0,
            keyed=choice((0.0, 0.3)),
            lookups=choice((0.0, 0.5)) if stored else 0.0,
            deadlines=choice((0.0, 0.2)),
            fails=fails,
            wild=wild,
            sinks=wild and choice((False, True)),
            file_lost=rng.uniform(0.0, spread + 5.0) if stored and rng.random() < 0.1 else None,
            clock_steps=_clock_steps(rng, spread),
            retries=retries,
        )


def _workers(rng: random.Random, *, wild: bool, fails: float) -> tuple[StormWorker, ...]:
    workers = []
    split = rng.random() < 0.5  # each type has a worker of its own
    for number in range(len(TYPES) if split else rng.randint(1, 3)):
        slots = rng.randint(1, 4)
        late = None if split or number == 0 or rng.random() < 0.7 else rng.uniform(0.0, 5.0)
        kinds = (TYPES[number],) if split else TYPES if number == 0 else tuple(rng.sample(TYPES, rng.randint(1, 3)))
        if late is not None:
            kinds += (LATE_TYPE,)
        hooks = ("on_end", "on_cancel", "async on_cancel", "stop")
        workers.append(
            StormWorker(
                f"w{number}",
                kinds,
                slots,
                rng.choice((None, None, slots, 3 * slots)),
                rng.choice((10.0, 1000.0, 1000.0)) if fails else 1000.0,
                late,
                None if late is None or rng.random() < 0.3 else rng.uniform(0.0, 3.0),
                start_fails=rng.choice((0.0, 0.5, 1.0)),
                hooks=frozenset(hook for hook in hooks if wild and rng.random() < 0.5),
            )
        )
    return tuple(workers)


def _lifetimes(rng: random.Random, stored: bool, spread: float) -> tuple[StormLifetime, ...]:  # noqa: FBT001
    """Draw the lifetimes of one process. All but the last end under load; the last ends when no caller is left."""
    lifetimes = []
    at = rng.choice((0.0, 0.0, 1.0))
    for _ in range(rng.choice((0, 1, 1, 3)) if stored else rng.choice((0, 0, 1))):
        ends = at + rng.uniform(0.1, rng.choice((1.0, 5.0 + spread)))
        end = rng.choice(_ENDS if stored else _ENDS[:5])
        lifetimes.append(StormLifetime(at, ends, end, rng.choice((0.0, 0.005, 0.1, 1.0, 5.0))))
        at = ends + rng.uniform(0.0, 2 * LEASE)
    lifetimes.append(StormLifetime(at, float("inf"), "drain", None))
    return tuple(lifetimes)


def _store_faults(rng: random.Random) -> StoreFaults:
    at = rng.uniform(0.0, 20.0)
    return StoreFaults(
        slow=rng.choice((0.005, 0.05, 0.5)),
        hangs=rng.choice((0.0, 0.0, 0.02, 0.2)),
        hang=2 * LEASE,
        loses_reply=rng.choice((0.0, 0.0, 0.02)),
        outages=((at, at + rng.uniform(0.5, 2 * LEASE)),) if rng.random() < 0.3 else (),
    )


def _clock_steps(rng: random.Random, spread: float) -> tuple[tuple[float, float], ...]:
    if rng.random() < 0.7:
        return ()
    sizes = (-3600.0, -60.0, -3.0, 3.0, 60.0, 3600.0)
    return tuple((rng.uniform(0.0, 10.0 + spread), rng.choice(sizes)) for _ in range(rng.randint(1, 3)))
