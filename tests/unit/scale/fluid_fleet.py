"""A fleet as a fluid: load and capacity are numbers of slots, and an autoscaler decides every two seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from forebay.interfaces import Demand
from forebay.scale import ScaleDecider, ScalePolicy, slots_asked

INTERVAL = 2.0  # seconds


@dataclass(frozen=True)
class Step:
    """The fleet at one reading: after it, `replicas` had been asked for."""

    at: float
    load: float
    backlog: float
    ready: int
    before: int
    replicas: int
    wanted: int
    limited_by: str | None


@dataclass
class FluidFleet:
    """Replicas that start after a delay, and tasks that wait while there are too few.

    Args:
        policy: of the autoscaler.
        service: seconds of a task.
        start_up: seconds until a replica that was asked for takes tasks.
        limited_by: returns what is short at a time, such as a quota; then no more runs than `supply` slots of it allow.
        supply: slots that the quota feeds.
        counts_waiting: whether tasks that wait ask for slots, and not only those that run.
    """

    policy: ScalePolicy
    service: float = 10.0
    start_up: float = 60.0
    limited_by: Callable[[float], str | None] = lambda _: None
    supply: float = 0.0
    counts_waiting: bool = True
    steps: list[Step] = field(default_factory=list)

    def run(self, load: Callable[[float], float], seconds: float, *, first: int = 1) -> list[Step]:
        """Offer `load(time)` slots of work for so many seconds, and return each step."""
        decider, backlog = ScaleDecider(self.policy), 0.0
        starts = [-self.start_up] * first  # when each replica was asked for
        for number in range(int(seconds / INTERVAL)):
            now = number * INTERVAL
            ready = sum(at + self.start_up <= now for at in starts)
            short = self.limited_by(now)
            slots = float(ready * self.policy.seats)
            usable = slots if short is None else min(slots, self.supply)
            offered = load(now) + backlog * self.service / INTERVAL
            running = min(usable, offered)
            backlog = (offered - running) * INTERVAL / self.service
            # What has a slot and waits for the quota holds it.
            taken = slots if short is not None and backlog else running
            demand = Demand(elsewhere=round(taken), spilled=round(backlog) if self.counts_waiting else 0)
            asked = slots_asked(
                demand, refused_per_second=0.0, service=self.service, drain=self.policy.drain_target, outside=True
            )
            before = len(starts)
            decision = decider.decide(now, asked=asked, current=before, ready=ready, limited_by=short)
            starts = starts[: decision.replicas] + [now] * (decision.replicas - before)
            step = Step(now, load(now), backlog, ready, before, decision.replicas, decision.wanted, decision.limited_by)
            self.steps.append(step)
        return self.steps


def reversals(steps: list[Step]) -> tuple[list[float], list[float]]:
    """Return when the fleet turned from growing to shrinking, and when from shrinking to growing."""
    down: list[float] = []
    up: list[float] = []
    last = 0
    for step in steps:
        change = (step.replicas > step.before) - (step.replicas < step.before)
        if change and last == -change:
            (down if change < 0 else up).append(step.at)
        last = change or last
    return down, up
