"""The decision of an autoscaler: windows, panic, stabilization, and no replica while something else is short."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from forebay._validate import check_between, check_not_negative, check_positive, check_whole, is_number, reject
from forebay.interfaces import Demand
from forebay.scale.ratio import clamp, desired_replicas, whole_replicas

_OWNER: Final = "Autoscaler"
_PANIC_RATIO: Final = 2.0  # of what is wanted over what is ready; Knative's
_FROZEN_SHARE: Final = 0.5  # of the readings of the panic window that name a bottleneck
_LEAST_SERVICE: Final = 1e-6  # seconds that a task counts as taking at least: whatever waits asks for something


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePolicy:
    """The settings by which an autoscaler decides.

    Attributes:
        seats: slots of one replica.
        load: share of the slots that should be taken.
        minimum: the least replicas.
        maximum: the most.
        window: seconds over which the slots asked for are averaged.
        panic_window: the same while twice as many replicas are wanted as are ready.
        stabilization: seconds for which fewer replicas must have been enough before any is given back.
        drain: seconds within which tasks that wait should have begun; None for half of the window.
        tolerance: share by which the load may differ from `load` without a change.
    """

    seats: int = 1
    load: float = 0.7
    minimum: int = 1
    maximum: int = 1
    window: float = 60.0
    panic_window: float = 6.0
    stabilization: float = 300.0
    drain: float | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        check_whole(_OWNER, "seats", self.seats)
        if not (is_number(self.load) and 0 < self.load <= 1):
            reject(_OWNER, "load", self.load, "a share of the slots above 0 and up to 1, such as 0.7")
        check_whole(_OWNER, "minimum", self.minimum, minimum=0)
        check_whole(_OWNER, "maximum", self.maximum)
        if self.maximum < self.minimum:
            reject(_OWNER, "maximum", self.maximum, f"at least the minimum, {self.minimum}")
        check_positive(_OWNER, "window", self.window, unit="seconds")
        check_positive(_OWNER, "panic_window", self.panic_window, unit="seconds")
        if self.panic_window > self.window:
            reject(_OWNER, "panic_window", self.panic_window, f"at most the window, {self.window:g} seconds")
        check_not_negative(_OWNER, "stabilization", self.stabilization, unit="seconds")
        check_positive(_OWNER, "drain", self.drain, unit="seconds", none="for half of the window")
        check_between(_OWNER, "tolerance", self.tolerance, -1e-12, 1.0)

    @property
    def drain_target(self) -> float:
        """The seconds within which tasks that wait should have begun."""
        return self.window / 2 if self.drain is None else self.drain

    def replicas_for(self, asked: float, current: int) -> int:
        """Return how many replicas `asked` slots need, unless the `current` ones are about as many.

        From zero it is by demand, since there is no ratio to nothing. However little is asked for, one is needed.
        """
        least = max(self.minimum, 1) if asked > 0 else self.minimum
        if not current:
            needed = min(asked / (self.seats * self.load), float(self.maximum))
            return clamp(whole_replicas(needed), least, self.maximum)
        return desired_replicas(
            current=current,
            reading=asked / (current * self.seats),
            target=self.load,
            tolerance=self.tolerance,
            minimum=least,
            maximum=self.maximum,
        )


def slots_asked(
    demand: Demand, *, refused_per_second: float, service: float | None, drain: float, outside: bool
) -> float:
    """Return the slots that the tasks ask for.

    Those that run have one each. Of those that wait, as many need one at a time as let them all begin within `drain`
    seconds. Those that are refused would hold ``refused per second * service`` slots (Little's law).

    While the service time is unknown, those that wait count as at most as many as run, and one: the first to end tell
    it. Whoever scales by this adds no more replicas than are ready until then; see `ScaleDecider.decide`.

    Args:
        demand: the reading.
        refused_per_second: how many tasks are refused because there is no room for them.
        service: seconds for which a task holds a slot, or None if unknown.
        drain: seconds within which tasks that wait should have begun.
        outside: the slots are those of other processes, which take tasks from the overflow alone.
    """
    running = (demand.elsewhere or 0) if outside else demand.running
    waiting = demand.spilled if outside else demand.spilled - demand.paused + demand.queued
    if service is None:
        return running + min(float(waiting), max(1.0, float(running)))
    return running + refused_per_second * service + waiting * min(1.0, max(service, _LEAST_SERVICE) / drain)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """A number of replicas, and why.

    Attributes:
        replicas: how many.
        wanted: how many the slots asked for need, whatever is short.
        asked: slots asked for, averaged over the window that counted.
        panic: whether the panic window counts.
        limited_by: what is short instead of workers, so that no replica is added; None if nothing is.
    """

    replicas: int
    wanted: int
    asked: float
    panic: bool
    limited_by: str | None


class ScaleDecider:
    """Decides how many replicas there should be, reading by reading.

    Up at once, by the mean of the window; by that of the panic window while at least twice as many replicas are wanted
    as are ready, and for one window after that. Down to the most that was wanted within the stabilization window, never
    in panic, and to a turn down only once in two such windows: so over a run there is at most one reversal for each.
    Never up while a quota, a budget or a breaker is short: more workers would wait for it as well. From zero one may
    start all the same: whether it is short of that too, it alone can tell.

    Sources: Kubernetes, "Horizontal Pod Autoscaling" (ratio, tolerance, stabilization); Knative, "KPA" (panic).
    """

    def __init__(self, policy: ScalePolicy) -> None:
        self.policy = policy
        self._readings: deque[tuple[float, float, str | None]] = deque()  # time, slots asked for, what is short
        self._wanted: deque[tuple[float, int]] = deque()  # falling: the most of the stabilization window is the first
        self._panic_until = -math.inf
        self._goes_up = True  # the direction of the last change
        self._turned_down_at = -math.inf

    def decide(  # noqa: PLR0913 - a reading
        self,
        now: float,
        *,
        asked: float,
        current: int,
        ready: int,
        limited_by: str | None = None,
        double: bool = False,
    ) -> ScaleDecision:
        """Return how many replicas there should be.

        Args:
            now: loop time in seconds; it never goes back.
            asked: slots asked for now.
            current: replicas that there are, or that have been asked for; those that drain do not count.
            ready: those of them that take tasks.
            limited_by: what is short now instead of workers, or None.
            double: go no further up than to twice what is ready, because too little is known of what is asked for.
        """
        policy = self.policy
        if not self._wanted:
            self._recommend(now, clamp(current, policy.minimum, policy.maximum))
        self._read(now, asked, limited_by)
        mean, burst = self._mean(now, policy.window), self._mean(now, policy.panic_window)
        wanted, sudden = policy.replicas_for(mean, current), policy.replicas_for(burst, current)
        if sudden > policy.minimum and sudden >= _PANIC_RATIO * ready:
            self._panic_until = now + policy.window
        panic = now <= self._panic_until
        if panic:
            wanted, mean = max(wanted, sudden, clamp(current, policy.minimum, policy.maximum)), max(mean, burst)
        short = self._bottleneck(now)
        allowed = wanted
        if short is not None:
            allowed = min(allowed, max(current, policy.minimum, 1))
        if double:
            allowed = min(allowed, max(current, policy.minimum, 2 * ready, 1))
        self._recommend(now, allowed)
        replicas = self._stabilized(now, allowed, current)
        return ScaleDecision(replicas=replicas, wanted=wanted, asked=mean, panic=panic, limited_by=short)

    def _read(self, now: float, asked: float, limited_by: str | None) -> None:
        self._readings.append((now, asked, limited_by))
        while self._readings[0][0] <= now - self.policy.window:
            self._readings.popleft()

    def _mean(self, now: float, window: float) -> float:
        """Return the mean of the slots asked for in the last `window` seconds; the last reading is always in it."""
        asked = [slots for at, slots, _ in self._readings if at > now - window]
        return sum(asked) / len(asked)

    def _bottleneck(self, now: float) -> str | None:
        """Return what is short now, or was in most readings of the panic window: it comes and goes as calls end."""
        latest = self._readings[-1][2]
        if latest is not None:
            return latest
        recent = [limited_by for at, _, limited_by in self._readings if at > now - self.policy.panic_window]
        named = [limited_by for limited_by in recent if limited_by is not None]
        return named[-1] if named and len(named) >= _FROZEN_SHARE * len(recent) else None

    def _recommend(self, now: float, replicas: int) -> None:
        """Remember what was wanted, as far as it may still be the most of a stabilization window."""
        while self._wanted and self._wanted[-1][1] <= replicas:
            self._wanted.pop()
        self._wanted.append((now, replicas))
        while self._wanted[0][0] < now - self.policy.stabilization:
            self._wanted.popleft()

    def _stabilized(self, now: float, allowed: int, current: int) -> int:
        """Return `allowed` if it is more than `current`, and otherwise what may be given back."""
        policy = self.policy
        if allowed >= current:
            self._goes_up = self._goes_up or allowed > current
            return allowed
        replicas = min(current, self._wanted[0][1])
        if replicas < current and self._goes_up:
            if now < self._turned_down_at + 2 * policy.stabilization:
                return clamp(current, policy.minimum, policy.maximum)
            self._goes_up, self._turned_down_at = False, now
        return replicas
