"""The limit for calls to language models: the capacity is unknown and moves, and no two calls take equally long."""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

from forebay.interfaces import Grant, Outcome
from forebay.limit.adaptive.limit_history import LimitHistory
from forebay.limit.adaptive.limit_probe import LimitProbe
from forebay.limit.adaptive.refusal_detector import RefusalDetector
from forebay.limit.adaptive.slowdown_experiment import ExperimentResult, ExperimentStage, SlowdownExperiment
from forebay.limit.bounds import check_bounds
from forebay.limit.outage_backoff import OutageBackoff

_NEARLY_FULL: Final = 0.9  # of the limit, less one: who uses so much of it has tried whether it holds
_NEAR: Final = 0.8  # of the level that held: up to here the limit returns by acceptances, not by successes
_HEAVY: Final = 0.1  # share of an epoch's calls refused from which a probe too far does not explain it
_CUTS: Final = (1.0, 0.9, 0.8, 0.7)  # what heavy refusals leave of the limit, for each time in a row
_WEIGHT: Final = 0.05  # of one call in the typical time of a call


class AdaptiveLimitState(Enum):
    """What an adaptive limit is doing."""

    STARTING = "starting"  # nothing is known: doubling each round
    RETURNING = "returning"  # below the level that held: up again fast
    HOLDING = "holding"  # at the level that held, until a probe is due
    PROBING = "probing"  # beyond it, by growing steps
    EXPERIMENT = "trial"  # calls are slow: finding out whether it is our load
    BACKING_OFF = "knocking"  # everything was refused: a lone call now and then


class AdaptiveLimit:
    """Finds how many calls an LLM provider bears, by its refusals, and by a silent slow-down of its calls.

    Latency alone cannot tell, since a healthy call takes from half a second to minutes. So the signal is refusals
    (Outcome.OVERLOAD), answered once per epoch, if they are too many to be noise. The level that held is remembered,
    and after trouble the limit is soon back there; beyond it, it probes. Only when calls take far longer than their
    tokens explain (`stretch`) is the limit lowered for a trial, and left there if that made them faster.

    It is never below 1, but that `limit` is 0 for up to 5 seconds at a time after a lone call was refused.

    Args:
        start: calls in flight to begin with.
        largest: calls in flight at most, whatever the provider bears.

    Raises:
        InvalidSetting: not 1 <= start <= largest, whole numbers.
    """

    def __init__(self, *, initial_limit: int = 10, max_limit: int = 10_000) -> None:
        check_bounds("AdaptiveLimit", initial_limit, max_limit)
        self._largest = max_limit
        self._level = float(initial_limit)
        self._memory = LimitHistory()
        self._noise = RefusalDetector()
        self._probe = LimitProbe()
        self._trial = SlowdownExperiment()
        self._knock = OutageBackoff()
        self._heavy_in_a_row = 0
        self._in_flight = 0
        self._rtt = 0.0  # seconds of a typical call; 0 until one has ended
        self._epoch = 1
        self._accepted = 0  # calls of this epoch that were let in
        self._refusals = 0  # ... that were refused
        self._successes = 0  # ... that ended well in this round of it
        self._round_began = 0.0  # in the clock's seconds

    # --- what it says -----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Counts the changes of the limit that make earlier grants say nothing about it."""
        return self._epoch

    def limit(self, now: float) -> int:
        """Calls that may be in flight; 0 while knocking."""
        return 0 if now < self._knock.silent_until else int(self._level)

    def reopens_at(self, now: float) -> float | None:
        """When the next knock is due; None if the limit is not 0."""
        return self._knock.silent_until if now < self._knock.silent_until else None

    def state(self, now: float) -> AdaptiveLimitState:
        """What it is doing."""
        if now < self._knock.silent_until:
            return AdaptiveLimitState.BACKING_OFF
        if self._trial.stage is not ExperimentStage.WATCHING:
            return AdaptiveLimitState.EXPERIMENT
        if self._probe.active:
            return AdaptiveLimitState.PROBING
        if not self._memory.known:
            return AdaptiveLimitState.STARTING
        return AdaptiveLimitState.RETURNING if self._level < self._memory.safe else AdaptiveLimitState.HOLDING

    # --- what it is told --------------------------------------------------------------------------------------------

    def grant(self, now: float, in_flight: int) -> Grant:
        """Mark a slot that is taken now; `in_flight` counts it."""
        self._in_flight = in_flight
        return Grant(now, in_flight, self._epoch, in_flight >= _NEARLY_FULL * int(self._level) - 1)

    def accepted(self, now: float, grant: Grant) -> None:
        """Its call was not refused."""
        self._noise.record_accepted()
        self._knock.reset()
        if grant.epoch != self._epoch:
            return
        self._accepted += 1
        memory, probe = self._memory, self._probe
        if not grant.at_limit or not memory.known or self._level >= _NEAR * memory.best:
            return
        if self._trial.stage is not ExperimentStage.WATCHING:
            return  # else a trial would compare the limit with itself
        if self._level < memory.ceiling:
            self._raise(1.0)
        elif probe.fast_return and probe.is_due(now, fast=True):
            self._raise(probe.increment_per_accepted())

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Its call has ended; FAULT and IGNORED say nothing about the limit."""
        self._in_flight -= 1
        if outcome is Outcome.OVERLOAD:
            self._refused(now, grant)
        elif outcome is Outcome.SUCCESS:
            took = now - grant.granted_at
            self._rtt += _WEIGHT * (took - self._rtt) if self._rtt else took
            if grant.epoch == self._epoch:
                self._succeeded(now, grant, slowdown)

    # --- down -------------------------------------------------------------------------------------------------------

    def _refused(self, now: float, grant: Grant) -> None:
        memory, probe, noise = self._memory, self._probe, self._noise
        if grant.epoch != self._epoch:
            return
        self._refusals += 1
        level = max(1, min(grant.in_flight, int(self._level)))
        suspect = probe.active and level > memory.ceiling
        noise.record_refusal()
        if int(self._level) > 1 and not noise.is_overload(expected=suspect):
            return  # noise: only this call is retried
        heavy = self._refusals >= _HEAVY * (self._accepted + self._refusals)
        if probe.active and (heavy or suspect):
            probe.record_failure(low=level < _NEAR * memory.best)
        lowered = float(level - 1)
        if heavy and not probe.active:
            lowered = min(lowered, _CUTS[min(self._heavy_in_a_row, len(_CUTS) - 1)] * level)
            probe.fast_return = probe.fast_return or (memory.known and level >= _NEAR * memory.best)
            self._heavy_in_a_row += 1
        if heavy or probe.active or not memory.known:
            memory.record_refusal(level)
        if level > 1:
            memory.assume(level - 1.0)
        else:
            self._knock.record_refusal(now)
            memory.ceiling = math.inf  # all is refused, so no level is at fault
        self._level = max(1.0, min(self._level, lowered))
        self._trial.abort()
        self._begin_epoch(now)

    # --- up ---------------------------------------------------------------------------------------------------------

    def _succeeded(self, now: float, grant: Grant, stretch: float | None) -> None:
        beside = max(grant.in_flight, self._in_flight + 1)
        finding = self._trial.observe(now, self._level, beside, stretch, proven=self._memory.is_proven(self._level))
        if finding is not None:
            self._follow(now, finding)
            if finding is not ExperimentResult.FALSE_ALARM:
                return
        self._round(now, grant)
        used = beside >= _NEARLY_FULL * int(self._level) - 1  # still: not every call that found it full may raise it
        if not grant.at_limit or not used or self._trial.stage is not ExperimentStage.WATCHING:
            return
        if self._level < self._memory.safe:
            self._raise(1.0)
        elif self._probe.is_due(now, fast=self._trial.calls_are_fast):
            self._raise(self._probe.increment_per_success(self._level))

    def _round(self, now: float, grant: Grant) -> None:
        """Count a success; once they make a round, what was full has held."""
        self._successes += 1
        long = now - self._round_began >= 2 * self._rtt and self._successes >= self._level // 2
        if self._successes < self._level and not long:
            return
        self._successes, self._round_began = 0, now
        self._heavy_in_a_row = 0
        if grant.at_limit and self._memory.known:
            self._memory.record_held(now, self._level)
        self._probe.record_clean_round(self._level)
        if self._probe.active and self._level > self._memory.ceiling + 1:
            self._probe.record_success()
            self._memory.ceiling = math.inf

    def _follow(self, now: float, finding: ExperimentResult) -> None:
        """Do what the trial asks for."""
        trial = self._trial
        if finding is ExperimentResult.FALSE_ALARM:
            return
        if finding is ExperimentResult.STOP_GROWTH:
            self._memory.assume(self._level / 2)
        else:
            self._level = max(1.0, min(trial.target_limit, float(self._largest)))
        if finding is ExperimentResult.KEEP:
            self._memory.record_slowdown(self._level)
            self._probe.record_failure(low=False)
        self._begin_epoch(now)

    def _raise(self, by: float) -> None:
        self._level = min(self._level + by, float(self._largest))

    def _begin_epoch(self, now: float) -> None:
        """Grants given before now say nothing about the limit from now on."""
        self._epoch += 1
        self._accepted = self._refusals = self._successes = 0
        self._round_began = now
        self._noise.reset()
        self._trial.clear_samples()
        self._probe.stop(now, self._rtt)
