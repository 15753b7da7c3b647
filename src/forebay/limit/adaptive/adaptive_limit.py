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
from forebay.limit.base import AnswerCounts, Grant, Limit
from forebay.limit.outage_backoff import OutageBackoff

_NEARLY_FULL: Final = 0.9  # share of the limit, less one call, from which its use shows whether the limit holds
_FIRST_CALLS: Final = 16  # successes in a row without a slowdown after which none is expected any more
_OFTEN: Final = 0.05  # background of refusals from which a refused probe says little
_LEAP: Final = 4  # times as far as calls were accepted, the limit may rise on its way back to the best one
_UNTRIED: Final = 2  # times the calls in flight that are known not to be slow, the first rise may go
_LONG_CALL: Final = 45.0  # seconds: where no call ends sooner, the limit does not wait for rounds of ended calls
_FAR_BELOW: Final = 0.8  # share of the best limit below which a probe is made more often
_FALL: Final = 0.9  # what each further refusal of a fall leaves of the limit
_CALL_WEIGHT: Final = 0.05  # of one call in the typical duration of a call
_DELAY_DECAY: Final = 0.95  # of the longest time that a refusal took, at each further refusal
_PROMPT: Final = 1.0  # seconds in which a refusal comes, as a rule


_LOWERED = ExperimentStage.LOWERED  # a global costs half of an enum's attribute, and each call asks


class AdaptiveLimitState(Enum):
    """The phase of an adaptive limit."""

    STARTING = "starting"  # nothing is known yet: the limit doubles each round
    RETURNING = "returning"  # below the best limit of late: rising fast, or about to
    HOLDING = "holding"  # at the best limit until a probe is due
    PROBING = "probing"  # above the best limit, by growing steps
    EXPERIMENT = "experiment"  # calls are slow: measuring whether our load is the cause
    BACKING_OFF = "backing_off"  # every call was refused: a lone call now and then


class AdaptiveLimit(Limit):
    """A limit that finds how many calls an LLM provider can serve, from its refusals and from slow calls.

    Latency alone says nothing, because a healthy call takes from half a second to minutes. The signal is refusals
    (Outcome.OVERLOAD). If they are too many to be stray ones, the limit falls to the calls that were in flight when the
    refused one was sent, because the provider serves that many. A moment later it rises again, fast up to the best
    limit of late, then by growing steps; each time that this gains nothing it waits twice as long. Only when calls take
    far longer than their output tokens explain (`slowdown`) does it lower the limit for an experiment, and it stays
    there if that made them faster.

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
        self._initial = initial_limit
        self._unknown = 0  # successes before the first whose slowdown was known
        self._in_flight = 0
        self._typical_seconds = 0.0  # duration of a call; 0 until one has ended
        self._refusal_seconds = 0.0  # that the slowest refusals of late have taken
        self._epoch = 1
        self._falling = False  # the limit has fallen, and nothing was accepted since
        self._successes = 0  # calls of this epoch that succeeded in the present round
        self._round_start = 0.0  # in the clock's seconds
        self._base = 0  # the limit at the beginning of this epoch
        self._confirmed = 0  # the most calls in flight with which a call of this epoch was accepted
        self._full_since = math.inf  # the first call since the last end that used up the limit, in the clock's seconds
        self._held = 0  # the limit that the latest round was made with

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
        if self._experiment.slow or self._experiment.stage is not ExperimentStage.WATCHING:
            return AdaptiveLimitState.EXPERIMENT
        if not self._history.known:
            return AdaptiveLimitState.STARTING
        if self._level < self._history.best:
            return AdaptiveLimitState.RETURNING
        return AdaptiveLimitState.PROBING if self._probe.active else AdaptiveLimitState.HOLDING

    # --- what happens ------------------------------------------------------------------------------------------------

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now; `in_flight` includes it."""
        self._in_flight = in_flight
        grant = Grant(now, in_flight, self._epoch, in_flight >= _NEARLY_FULL * int(self._level) - 1)
        if self._experiment.stage is _LOWERED:
            self._experiment.start(grant)
        if grant.at_limit:
            self._full_since = min(self._full_since, now)
        return grant

    def accepted(self, now: float, grant: Grant) -> None:
        """Count an accepted call, unless it may still be refused; raise a limit that is below the best one."""
        if now - grant.granted_at < self._late:
            return
        self._confirm(now, grant)

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Learn from a finished call; FAULT and IGNORED say nothing about the limit."""
        self._in_flight -= 1
        succeeded = outcome is Outcome.SUCCESS
        long = now - self._full_since >= _LONG_CALL
        if outcome is Outcome.OVERLOAD:
            self._record_refusal(now, grant)
        else:
            self._full_since = math.inf
        if succeeded:
            seconds = now - grant.granted_at
            self._typical_seconds += (
                _CALL_WEIGHT * (seconds - self._typical_seconds) if self._typical_seconds else seconds
            )
            if not grant.accepted:
                self._confirm(now, grant)
            self._unknown = self._unknown + 1 if slowdown is None else 0
        current = succeeded and grant.epoch == self._epoch
        proven = slowdown is not None and self._history.is_proven(self._level)
        result = self._experiment.observe(
            now, grant, self._level, self._in_flight + 1, slowdown if current else None, proven=proven
        )
        if result is not None:
            self._apply(now, result)
        elif current:
            self._record_success(now, grant, long=long)

    # --- down --------------------------------------------------------------------------------------------------------

    def _record_refusal(self, now: float, grant: Grant) -> None:
        history, probe, detector = self._history, self._probe, self._detector
        self._refusal_seconds = max(now - grant.granted_at, _DELAY_DECAY * self._refusal_seconds)
        if grant.epoch != self._epoch:
            return
        level = max(1, min(grant.in_flight, int(self._level)))
        probing = probe.active and level > history.ceiling
        detector.record_refusal(now, grant)
        expected_among = level if probing or self._falling else math.inf
        if int(self._level) > 1 and not detector.is_overload(expected_among=expected_among):
            return  # a stray refusal: only its call is retried
        self._fall(now, level)

    def adopt(self, now: float, level: float, *, cut: bool) -> None:
        """Take over the limit that several processes have learned. A lower one is as if a call was refused here."""
        level = max(1.0, min(self._max_level, level))
        if int(level) < int(self._level):
            self._fall(now, int(level) + 1)
        elif cut:
            self._history.assume(level)
            if int(level) > int(self._level):
                self._probe.begin()  # another process makes one
        self._level = level

    def returns_to(self) -> float:
        """Return the best limit of late, if one is known."""
        return self._history.best if self._history.known else 0.0

    def answers(self) -> AnswerCounts:
        """Return the answers that it has counted as evidence so far."""
        return self._detector.answers

    def add_answers(self, answers: AnswerCounts) -> None:
        """Count the answers that other processes have had, as if one limit had seen all of them."""
        self._detector.add_answers(answers)
        if answers.accepted:
            self._falling = False

    def _fall(self, now: float, level: int) -> None:
        """Lower the limit: `level` calls in flight are too many."""
        history, probe, detector = self._history, self._probe, self._detector
        lowered = level - 1.0
        if probe.active:
            if self._late or (level <= history.ceiling + 1 and detector.background < _OFTEN):
                low = level < _FAR_BELOW * history.best
                served = max(1.0, lowered)  # a lone call is sent again in any case
                probe.record_failure(served / self._typical_seconds if self._typical_seconds else math.inf, low=low)
            if self._late or level >= _NEARLY_FULL * history.best:
                history.lower_best(lowered)
        else:
            if level <= self._held:
                probe.record_change()
            if self._falling:
                lowered = min(lowered, _FALL * level)
            self._falling = True
        history.record_refusal(now, level)
        if level > 1:
            history.assume(lowered)
        else:
            self._backoff.record_refusal(now)
            history.forget_ceiling()
        self._level = max(1.0, min(self._level, lowered))
        self._experiment.abort()
        self._begin_epoch(now)

    # --- up ----------------------------------------------------------------------------------------------------------

    def _confirm(self, now: float, grant: Grant) -> None:
        grant.accepted = True
        if self._backoff.silent_until:
            self._backoff.reset()
            self._history.keep_best(now)
            self._probe.resume(now)
        self._detector.record_accepted(grant, current=grant.epoch == self._epoch)
        if grant.epoch != self._epoch:
            return
        self._falling = False
        history, probe = self._history, self._probe
        if probe.active and grant.in_flight > history.ceiling + 1 and not self._late:
            probe.record_change()
            self._detector.contradict_overload()
            history.raise_ceiling(grant.in_flight)
        self._confirmed = max(self._confirmed, grant.in_flight)
        used = 2 * grant.in_flight >= self._level
        if not used or not self._may_rise(now):
            return
        if history.known and self._level < history.best:
            if self._level < self._base + 1 + _LEAP * max(0, self._confirmed - self._base):
                probe.begin()
                self._raise(1.0)
        elif grant.at_limit and not self._late and self._may_leap(grant):
            self._raise(1.0)

    def _may_leap(self, grant: Grant) -> bool:
        """Return whether an accepted call may raise the limit before it has ended.

        If the provider merely queues what is too much, that is known at the end: hence the bounds.
        """
        if self._history.known:
            return self._history.serves_more(grant.in_flight) and self._level < _LEAP * self._tried
        return self._typical_seconds >= _LONG_CALL and self._level < _UNTRIED * self._experiment.tried

    @property
    def _tried(self) -> float:
        """The calls in flight that are known not to make calls slow."""
        return max(self._initial, self._experiment.tried)

    def _record_success(self, now: float, grant: Grant, *, long: bool) -> None:
        """Raise the limit for a success; `long`: it ended a long time in which all of the limit was in use."""
        # Used up still, not only when the call began: else each of the calls that began at the limit would raise it.
        used = max(grant.in_flight, self._in_flight + 1) >= _NEARLY_FULL * int(self._level) - 1
        self._count_round(now, grant)
        if long and not self._history.known and self._may_rise(now):  # the other calls were accepted long ago
            self._raise(max(0.0, min(2 * self._level, _UNTRIED * self._tried) - self._level))
        if not grant.at_limit or not used or not self._may_rise(now):
            return
        if not self._history.known:
            if self._latency_unknown or self._level < _UNTRIED * self._tried:
                self._raise(1.0)
        elif self._level >= self._history.best and self._successes <= self._level:
            self._raise(self._probe.increment_per_success(self._level, careful=bool(self._late)))

    def _may_rise(self, now: float) -> bool:
        """Return whether the limit may rise: not while calls are slow, and not too soon after a refusal."""
        experiment = self._experiment
        if experiment.slow or experiment.stage is not ExperimentStage.WATCHING:
            return False
        return self._probe.is_due(now) and not self._detector.saturated

    def _count_round(self, now: float, grant: Grant) -> None:
        """Count a success. Once the successes make a round, a limit that was used up has held."""
        self._successes += 1
        long = now - self._round_start >= 2 * self._typical_seconds and self._successes >= self._level // 2
        if (self._successes < self._level and not long) or now - self._round_start < self._late:
            return
        self._successes, self._round_start = 0, now
        if grant.at_limit:
            self._held = int(self._level)
        if grant.at_limit and self._history.known:
            self._history.record_held(now, self._level)
        self._probe.record_clean_round(self._level)

    def _apply(self, now: float, result: ExperimentResult) -> None:
        """Do what the experiment asks for."""
        self._history.assume(self._level)
        self._set_level(self._experiment.target_limit)
        if result is ExperimentResult.KEEP:
            self._history.record_slowdown(self._level)
            self._probe.record_slowdown()
        self._begin_epoch(now)

    def _raise(self, by: float) -> None:
        self._level = min(self._level + by, self._max_level)

    # --- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _late(self) -> float:
        """The seconds after which a call that was not refused is accepted, if refusals come late; otherwise 0."""
        return self._refusal_seconds if self._refusal_seconds > _PROMPT else 0.0

    @property
    def _latency_unknown(self) -> bool:
        """True if the slowdown of calls is hardly ever known."""
        return self._unknown > _FIRST_CALLS

    def _begin_epoch(self, now: float) -> None:
        """Begin an epoch: grants given before now say nothing about the limit from now on."""
        self._epoch += 1
        self._full_since = math.inf
        self._successes, self._round_start = 0, now
        self._base, self._confirmed = int(self._level), 0
        self._detector.reset()
        self._experiment.clear()
        self._probe.stop(now, self._late)
