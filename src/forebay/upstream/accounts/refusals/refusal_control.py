"""The reaction of an account to 429s: which of them count for the limit, when calls pause, and how fast they go."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from forebay.upstream.accounts.refusals.learned_rate import LearnedRate
from forebay.upstream.accounts.refusals.refusal_cause import RefusalCause
from forebay.upstream.accounts.refusals.refusal_pause import Block, RefusalPause
from forebay.upstream.accounts.refusals.refusal_trial import RIGHT_AFTER, RefusalTrial, TrialVerdict
from forebay.upstream.shared.ledger.rate_messages import SharedRate

_PENALTY_COST: Final = 30.0  # times as long as a penalty, for which the calls in flight stay below what caused it ...
_MAX_CAP_SECONDS: Final = 600.0  # ... up to this
_MIN_PENALTY: Final = 1.0  # seconds of a block from which it may be a penalty
_SURE: Final = 3  # trials, one after the other, that found a limit: each more lets a further row go untried ...
_MAX_UNTRIED: Final = 7  # ... up to so many, if a measured rate explains them
_LONG_RETRY_AFTER: Final = 3.0  # seconds from which one is believed where too few calls come for a trial
_SOLE_TRIAL: Final = 10.0  # seconds for which one of the processes that share an account tries, if a rate is measured
_SURELY_MORE: Final = 1.5  # times the calls in flight that were accepted, from which a refused call had more of them
_GAP: Final = 3.0  # calls at the learned rate that the first silence leaves out


class RefusalControl:
    """The refusals of one account. Pure: the caller passes the time.

    Args:
        pause: the pause after refusals; None for one of this process.

    Attributes:
        rate: at which calls are sent, once one is learned.
    """

    def __init__(self, pause: RefusalPause | None = None) -> None:
        self.rate = LearnedRate()
        self._cause = RefusalCause()
        self._pause = RefusalPause() if pause is None else pause
        self._trial = RefusalTrial()
        self._tried_elsewhere_until = -math.inf  # another process tries until then, for all
        self._trial_asked: float | None = None  # when the refused call was sent for which all are asked for a trial
        self._limits = 0  # trials one after the other that found a limit
        self._untried = 0  # rows of refusals since the latest trial
        self._more = False  # the row began with more calls in flight than were accepted before, which may be the cause
        self._judged = False  # a trial of the present row has found a limit
        self._named = False  # the latest refusal names a rate, and no trial can tell
        self._quota_explains = False  # a known quota is used up in the present block
        self._began_above = False  # the block began with more calls in flight than were accepted before ...
        self._refused_below = False  # ... and then refused a call with no more than that
        self._blocked_in_flight = 0  # calls in flight when the first refused call of the block was sent
        self._cap = math.inf  # calls in flight, after a refusal that blocked the account for long
        self._cap_until = -math.inf
        self._now = -math.inf

    def export(self, now: float) -> SharedRate:
        """Return what has been learned of a rate, for the other processes of the account."""
        cause = self._cause
        return msgspec.structs.replace(
            self.rate.export(now), limits=self._limits, score=cause.score, is_disproved=cause.is_disproved
        )

    def adopt(self, now: float, shared: SharedRate, *, age: float) -> None:
        """Take over what another process has learned `age` seconds ago."""
        self.rate.adopt(now, shared, age=age)
        if shared.limits > self._limits:
            self._untried = 0
        self._limits = shared.limits
        chance = not shared.limits and shared.score < 0.0
        self._cause.adopt(now, shared.score, is_disproved=shared.is_disproved, chance=chance)

    @property
    def wanted_trial(self) -> float:
        """The seconds for which this process would try, alone of all, why calls are refused; 0 if it would not."""
        return 0.0 if self._trial_asked is None else _SOLE_TRIAL

    def answer_trial(self, now: float, elsewhere: float) -> None:
        """Begin the trial that was wanted, unless another process tries for `elsewhere` seconds."""
        asked, self._trial_asked = self._trial_asked, None
        self._tried_elsewhere_until = now + elsewhere
        if asked is not None and elsewhere <= 0.0 and not self._pause.silent:
            self._trial.begin(now, asked, self.rate.recent(now))

    def wait(self, now: float) -> float:
        """Return the seconds until a call may be sent; 0 for now."""
        if now < self._now:  # the clock went back: no pause must become longer
            self.rate, self._cause = LearnedRate(), RefusalCause()
            self._pause.reset()
            self._trial = RefusalTrial()
            self._cap_until = -math.inf
        self._now = now
        if self.rate.rate == math.inf and not self._pause.silent:  # as of most accounts at most times
            return 0.0
        pause = self._pause.wait(now)
        return pause if self._trial.wants_call(now) else max(pause, self.rate.wait(now))

    def expected_wait(self, now: float, ahead: int) -> float:
        """Return the seconds that a call has to expect to wait, after `ahead` others."""
        return max(self._pause.expected_wait(now), self.rate.wait(now, ahead))

    @property
    def blocked(self) -> bool:
        """True from a refusal until a call is accepted that was sent after it: a call sent now is a trial call."""
        return self._pause.blocked

    @property
    def disbelieves_retry_after(self) -> bool:
        """True if the latest Retry-After that could be checked was too long."""
        return self._pause.disbelieves_retry_after

    def paused(self, now: float) -> bool:
        """Return whether calls are refused, and not even a trial call may be sent now."""
        return self._pause.wait(now) > 0.0

    def limit(self, now: float, limit: int) -> int:
        """Return how many calls may be in flight: `limit`, fewer after a penalty, or as many as before in a trial."""
        if now < self._cap_until:
            return min(limit, int(self._cap))
        if now >= self._trial.over_at:
            return limit
        return max(limit, self._blocked_in_flight) if self._trial.wants_call(now) and not self._more else limit

    def record_sent(self, now: float) -> None:
        """Note that a call is sent."""
        if silent := self._pause.silent:
            self._pause.record_sent(now)
            silent = self._pause.silent
        self._trial.record_sent(now)
        self.rate.record_sent(now, blocked=silent)

    def record_unsent(self, granted_at: float) -> None:
        """Note that a call that was recorded as sent at `granted_at` was not."""
        self.rate.record_refused(granted_at)

    def record_accepted(self, now: float, sent_at: float, in_flight: int) -> None:
        """Note that a call was accepted that was sent when `in_flight` calls were in flight, itself included."""
        self._cause.record_accepted(now, sent_at, in_flight, paused=self._pause.silent)
        if not self._pause.blocked and sent_at >= self._trial.over_at:
            return  # as of most calls: it ends no block, and is part of no trial
        if self._trial.record_accepted(sent_at) is TrialVerdict.CHANCE:
            self._record_chance()
        elif self._trial.is_open(now):
            self._pause.record_mixed(sent_at)
            return
        if (block := self._pause.record_accepted(sent_at)) is not None:
            self._learn_from(now, block)

    def _learn_from(self, now: float, block: Block) -> None:
        """Learn from a row of refusals that is over whether a rate is the cause, and which."""
        lasted = block.ended - block.began
        if block.paused:
            self._cause.leave_out(lasted)
        rate = self._cause.is_rate(measured=self.rate.measured, named=self._named)
        if self._quota_explains or rate:
            self.rate.learn(now, block, guess=not self._quota_explains)
            if self.rate.is_disproved():
                self.rate.forget()
                self._cause.disprove_rate()
        else:
            self.rate.forget()
            if block.paused and lasted >= _MIN_PENALTY:
                self.rate.resume(now, block)
        if self.rate.measured:
            self._cap_until = -math.inf
        elif block.paused and lasted >= _MIN_PENALTY and self._began_above and self._refused_below:
            self._cap = max(1, self._blocked_in_flight - 1)
            self._cap_until = now + min(_MAX_CAP_SECONDS, _PENALTY_COST * lasted)

    def record_refused(  # noqa: PLR0913 - what a refusal says
        self,
        now: float,
        sent_at: float,
        in_flight: int,
        *,
        named: bool = False,
        retry_after: float | None = None,
        quota_explains: bool = False,
        repeated: bool = False,
    ) -> bool:
        """Note that a call was refused with a 429, and return whether a rate is the likely cause.

        Args:
            now: when the refusal arrived.
            sent_at: when the call was sent.
            in_flight: calls in flight at that time, itself included.
            named: the refusal names a rate, or a time after which to come back.
            retry_after: seconds that the provider asked for, or None.
            quota_explains: a quota that is known is used up.
            repeated: the call was refused several times before: what it asks for may be the cause.
        """
        if repeated and not (self._pause.blocked or self.rate.known):
            self.rate.record_refused(sent_at)
            self._cause.record_unserved(now, sent_at, in_flight)
            return True
        above, begins = in_flight > self._cause.peak, not self._pause.blocked
        late = now >= sent_at + RIGHT_AFTER
        verdict = self._trial.record_refused(sent_at)
        says_nothing = self.rate.rising or not begins
        if self.rate.share < 1.0:  # how many calls other processes have in flight is not known well
            says_nothing = says_nothing or self.rate.measured or in_flight <= _SURELY_MORE * self._cause.peak
        more = self._cause.record_refused(now, sent_at, in_flight, rising=says_nothing, paused=self._pause.silent)
        if begins:
            untried = self.rate.share < 1.0 and not self._cause.peak  # others may have all that is accepted
            self._more, self._judged = more or untried, False
            self._untried += 1
        if verdict is TrialVerdict.LIMIT:
            self._record_limit(now)
        if self._pause.silent and not (self._began_above or late or repeated):
            self._cause.record_silent_refusal(in_flight)
        rate = quota_explains or self._cause.is_rate(named=named, measured=self.rate.measured)
        after = 0.0 if retry_after is None or not retry_after > 0 else retry_after
        quiet = after >= _LONG_RETRY_AFTER and not self._trial.can_decide(now)  # then its word is all that there is
        certain = self._judged or quota_explains or late or quiet or not self._begin_trial(now, sent_at)
        self.rate.record_refused(sent_at)
        silence = _GAP / (self.rate.rate * self.rate.share) if rate and self.rate.known else 0.0
        if self._pause.record_refused(now, sent_at, retry_after=after, certain=rate and certain, first_silence=silence):
            self._quota_explains = False
            self._blocked_in_flight = in_flight
            self._began_above, self._refused_below = above, False
        self._refused_below = self._refused_below or not above
        self._quota_explains = self._quota_explains or quota_explains
        self._named = named and late
        return rate

    def _begin_trial(self, now: float, sent_at: float) -> bool:
        """Let the next calls go at once; return False if the row of refusals needs no trial."""
        if self._pause.silent or now < self._tried_elsewhere_until:
            return False
        if self.rate.measured and self._untried <= min(_MAX_UNTRIED, self._limits - _SURE):
            return False
        if self.rate.share < 1.0 and self.rate.measured and not self._trial.is_open(now):
            self._trial_asked = sent_at if self._trial_asked is None else self._trial_asked
        else:
            self._trial.begin(now, sent_at, self.rate.recent(now))
        return True

    def _record_limit(self, now: float) -> None:
        """Note that a limit is the cause of the present row of refusals: a rate, unless more calls were in flight."""
        if not (self._judged or self._more):
            self._cause.record_limit(now)
        self._judged = True
        self._limits, self._untried = self._limits + 1, 0
        self.rate.version += 1  # other processes need not try

    def _record_chance(self) -> None:
        """Note that no load of ours is the cause of a refusal."""
        self._pause.end()
        self._limits = self._untried = 0
        self.rate.version += 1
        if not self.rate.measured:
            self._cause.record_chance()
            if self.rate.known and not self._cause.is_rate(measured=False):
                self.rate.forget()
