"""The limit for LLM calls: the capacity is unknown and changes, and no two calls take equally long."""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

from forebay.interfaces import Outcome
from forebay.limit.adaptive.limit_history import LimitHistory
from forebay.limit.adaptive.limit_probe import LimitProbe
from forebay.limit.adaptive.refusal_detector import RefusalDetector
from forebay.limit.adaptive.slowdown_experiment import ExperimentResult, ExperimentStage, SlowdownExperiment
from forebay.limit.base import Grant, Limit
from forebay.limit.outage_backoff import OutageBackoff

_NEARLY_FULL: Final = 0.9  # share of the limit, less one call, from which its use shows whether the limit holds
_NEAR_BEST: Final = 0.8  # share of the best limit up to which acceptances raise the limit, not only successes
_HEAVY: Final = 0.1  # share of an epoch's calls refused from which an overshooting probe does not explain it
_CUTS: Final = (1.0, 0.9, 0.8, 0.7)  # what heavy refusals leave of the limit, for each time in a row
_CALL_WEIGHT: Final = 0.05  # of one call in the typical duration of a call


class AdaptiveLimitState(Enum):
    """The phase of an adaptive limit."""

    STARTING = "starting"  # nothing is known yet: the limit doubles each round
    RETURNING = "returning"  # below the best limit: rising fast
    HOLDING = "holding"  # at the best limit until a probe is due
    PROBING = "probing"  # above the best limit, by growing steps
    EXPERIMENT = "experiment"  # calls are slow: measuring whether our load is the cause
    BACKING_OFF = "backing_off"  # every call was refused: a lone call now and then


class AdaptiveLimit(Limit):
    """A limit that finds how many calls an LLM provider can serve, from its refusals and from slow calls.

    Latency alone says nothing, because a healthy call takes from half a second to minutes. The signal is refusals
    (Outcome.OVERLOAD): the limit falls once per epoch, if they are too many to be stray ones. It remembers the best
    limit and is soon back there after trouble; above it, it probes. Only when calls take far longer than their output
    tokens explain (`slowdown`) does it lower the limit for an experiment, and it stays there if that made them faster.

    It is never below 1, except that `limit` is 0 for up to 5 seconds at a time after a lone call was refused.

    Args:
        initial_limit: calls in flight to begin with.
        max_limit: most calls that may ever be in flight.

    Raises:
        InvalidSetting: not two whole numbers with 1 <= initial_limit <= max_limit.
    """

    def __init__(self, *, initial_limit: int = 10, max_limit: int = 10_000) -> None:
        super().__init__(initial_limit=initial_limit, max_limit=max_limit)
        self._history = LimitHistory()
        self._detector = RefusalDetector()
        self._probe = LimitProbe()
        self._experiment = SlowdownExperiment()
        self._backoff = OutageBackoff()
        self._heavy_in_a_row = 0
        self._in_flight = 0
        self._typical_seconds = 0.0  # duration of a call; 0 until one has ended
        self._epoch = 1
        self._accepted = 0  # calls of this epoch that were accepted
        self._refusals = 0  # ... that were refused
        self._successes = 0  # ... that succeeded in the present round
        self._round_start = 0.0  # in the clock's seconds

    # --- its state ---------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch: it changes when the limit falls, so that earlier grants say nothing about the limit."""
        return self._epoch

    def limit(self, now: float) -> int:
        """Return how many calls may be in flight now; 0 between the trial calls of an outage."""
        return 0 if now < self._backoff.silent_until else int(self._level)

    def reopens_at(self, now: float) -> float | None:
        """Return when the next trial call is due, in the clock's seconds; None while the limit is above 0."""
        return self._backoff.silent_until if now < self._backoff.silent_until else None

    def state(self, now: float) -> AdaptiveLimitState:
        """Return the phase at `now`."""
        if now < self._backoff.silent_until:
            return AdaptiveLimitState.BACKING_OFF
        if self._experiment.stage is not ExperimentStage.WATCHING:
            return AdaptiveLimitState.EXPERIMENT
        if self._probe.active:
            return AdaptiveLimitState.PROBING
        if not self._history.known:
            return AdaptiveLimitState.STARTING
        return AdaptiveLimitState.RETURNING if self._level < self._history.safe else AdaptiveLimitState.HOLDING

    # --- what happens ------------------------------------------------------------------------------------------------

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now; `in_flight` includes it."""
        self._in_flight = in_flight
        return Grant(now, in_flight, self._epoch, in_flight >= _NEARLY_FULL * int(self._level) - 1)

    def accepted(self, now: float, grant: Grant) -> None:
        """Count an accepted call, and raise the limit while it is far below the best one."""
        self._detector.record_accepted()
        self._backoff.reset()
        if grant.epoch != self._epoch:
            return
        self._accepted += 1
        history, probe = self._history, self._probe
        if not grant.at_limit or not history.known or self._level >= _NEAR_BEST * history.best:
            return
        if self._experiment.stage is not ExperimentStage.WATCHING:
            return  # else the experiment would compare the limit with itself
        if self._level < history.ceiling:
            self._raise(1.0)
        elif probe.fast_return and probe.is_due(now, fast=True):
            self._raise(probe.increment_per_accepted())

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Learn from a finished call; FAULT and IGNORED say nothing about the limit."""
        self._in_flight -= 1
        if outcome is Outcome.OVERLOAD:
            self._record_refusal(now, grant)
        elif outcome is Outcome.SUCCESS:
            seconds = now - grant.granted_at
            self._typical_seconds += (
                _CALL_WEIGHT * (seconds - self._typical_seconds) if self._typical_seconds else seconds
            )
            if grant.epoch == self._epoch:
                self._record_success(now, grant, slowdown)

    # --- down --------------------------------------------------------------------------------------------------------

    def _record_refusal(self, now: float, grant: Grant) -> None:
        history, probe, detector = self._history, self._probe, self._detector
        if grant.epoch != self._epoch:
            return
        self._refusals += 1
        level = max(1, min(grant.in_flight, int(self._level)))
        expected = probe.active and level > history.ceiling
        detector.record_refusal()
        if int(self._level) > 1 and not detector.is_overload(expected=expected):
            return  # a stray refusal: only its call is retried
        heavy = self._refusals >= _HEAVY * (self._accepted + self._refusals)
        if probe.active and (heavy or expected):
            probe.record_failure(low=level < _NEAR_BEST * history.best)
        lowered = float(level - 1)
        if heavy and not probe.active:
            lowered = min(lowered, _CUTS[min(self._heavy_in_a_row, len(_CUTS) - 1)] * level)
            probe.fast_return = probe.fast_return or (history.known and level >= _NEAR_BEST * history.best)
            self._heavy_in_a_row += 1
        if heavy or probe.active or not history.known:
            history.record_refusal(level)
        if level > 1:
            history.assume(level - 1.0)
        else:
            self._backoff.record_refusal(now)
            history.ceiling = math.inf  # every call is refused, so the limit is not the cause
        self._level = max(1.0, min(self._level, lowered))
        self._experiment.abort()
        self._begin_epoch(now)

    # --- up ----------------------------------------------------------------------------------------------------------

    def _record_success(self, now: float, grant: Grant, slowdown: float | None) -> None:
        in_flight = max(grant.in_flight, self._in_flight + 1)
        proven = self._history.is_proven(self._level)
        result = self._experiment.observe(now, self._level, in_flight, slowdown, proven=proven)
        if result is not None:
            self._apply(now, result)
            if result is not ExperimentResult.FALSE_ALARM:
                return
        self._count_round(now, grant)
        # Used up still, not only when the call began: else each of the calls that began at the limit would raise it.
        used = in_flight >= _NEARLY_FULL * int(self._level) - 1
        if not grant.at_limit or not used or self._experiment.stage is not ExperimentStage.WATCHING:
            return
        if self._level < self._history.safe:
            self._raise(1.0)
        elif self._probe.is_due(now, fast=self._experiment.calls_are_fast):
            self._raise(self._probe.increment_per_success(self._level))

    def _count_round(self, now: float, grant: Grant) -> None:
        """Count a success. Once the successes make a round, a limit that was used up has held."""
        self._successes += 1
        long = now - self._round_start >= 2 * self._typical_seconds and self._successes >= self._level // 2
        if self._successes < self._level and not long:
            return
        self._successes, self._round_start = 0, now
        self._heavy_in_a_row = 0
        if grant.at_limit and self._history.known:
            self._history.record_held(now, self._level)
        self._probe.record_clean_round(self._level)
        if self._probe.active and self._level > self._history.ceiling + 1:
            self._probe.record_success()
            self._history.ceiling = math.inf

    def _apply(self, now: float, result: ExperimentResult) -> None:
        """Do what the experiment asks for."""
        if result is ExperimentResult.FALSE_ALARM:
            return
        if result is ExperimentResult.STOP_GROWTH:
            self._history.assume(self._level / 2)
        else:
            self._set_level(self._experiment.target_limit)
        if result is ExperimentResult.KEEP:
            self._history.record_slowdown(self._level)
            self._probe.record_failure(low=False)
        self._begin_epoch(now)

    def _raise(self, by: float) -> None:
        self._level = min(self._level + by, self._max_level)

    def _begin_epoch(self, now: float) -> None:
        """Begin an epoch: grants given before now say nothing about the limit from now on."""
        self._epoch += 1
        self._accepted = self._refusals = self._successes = 0
        self._round_start = now
        self._detector.reset()
        self._experiment.clear_samples()
        self._probe.stop(now, self._typical_seconds)
