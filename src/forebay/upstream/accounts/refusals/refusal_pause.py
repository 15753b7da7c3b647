"""The pause after refusals: nothing is sent for a growing time, then a single trial call."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

_FIRST_SILENCE: Final = 0.25  # seconds without a call after a refusal that speaks for a rate
_PLATEAU: Final = 8.0  # seconds; each trial call that is refused doubles the silence up to this ...
_LONG_BLOCK: Final = 60.0  # ... for so many seconds, and then ...
_MAX_SILENCE: Final = 120.0  # ... up to this
_ROW: Final = (
    8  # calls refused one after the other, sent after the first refusal, that begin a pause whatever their cause
)
_ROUNDS: Final = 3  # refused one after the other, after which a silence as long as the latest block needed is tried
TRIAL_TIME: Final = 1.0  # seconds after which a trial call that was not refused counts as accepted
_MAX_TRUSTED: Final = 60.0  # seconds of a Retry-After that are believed; after these, trial calls go
_MAX_UNCHECKED: Final = 30.0  # seconds of the first Retry-After that others have to expect to wait
_EARLY: Final = 0.9  # of a Retry-After: a trial call accepted before that proves it too long
_FORGET: Final = 60.0  # seconds after a pause without any call that end the block


class Block(NamedTuple):
    """A row of refusals. Times are seconds of the clock.

    Attributes:
        began: when the first refusal arrived.
        refused: when the last call was sent that was refused, or would have been by a Retry-After that was right.
        ended: when the first call was sent that was accepted.
        refusals: calls that were refused.
        paused: calls have paused.
    """

    began: float
    refused: float
    ended: float
    refusals: int
    paused: bool


class RefusalPause:
    """The times at which calls may be sent while a provider refuses them.

    A *block* begins with a refusal, and ends when a call that was sent after it is accepted. Within it nothing is sent
    for a silence that doubles, and then one trial call.

    A Retry-After moves the trial calls: one goes when it has passed. Before that time none goes once its word has been
    kept; until then the silence decides. So a value that is too long costs a trial call, and so does one that is too
    short.
    """

    __slots__ = (
        "_again",
        "_allowed_at",
        "_blocked_since",
        "_needed",
        "_refusals",
        "_refused_early",
        "_refused_sent_at",
        "_round_at",
        "_rounds",
        "_silence",
        "_silent_until",
        "_trial_at",
        "_trusted",
    )

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._needed = 0.0  # seconds of the silence that ended the latest block, if only a long one did
        self._trusted: bool | None = None  # the latest Retry-After that could be checked was right
        self._end()

    def record_mixed(self, sent_at: float) -> None:
        """Note that a call was accepted while it is not clear yet why others were refused."""
        if sent_at >= self._blocked_since:
            self._again = 0

    def end(self) -> None:
        """End the block, whose refusals had no cause that a pause helps against."""
        self._end()

    def _end(self) -> None:
        self._blocked_since = math.inf
        self._refused_sent_at = -math.inf  # when the latest call was sent that was refused
        self._refusals = 0
        self._again = 0  # one after the other, of calls sent after the first one arrived
        self._rounds = 0
        self._round_at = -math.inf
        self._silence = 0.0
        self._silent_until = -math.inf
        self._trial_at = -math.inf
        self._allowed_at = -math.inf  # when the latest Retry-After has passed
        self._refused_early = False  # in this block, before that time

    @property
    def blocked(self) -> bool:
        """True from a refusal until a call is accepted that was sent after it."""
        return self._blocked_since < math.inf

    @property
    def silent(self) -> bool:
        """True from the beginning of a silence until a call is accepted: all calls wait for the trial calls."""
        return self._silence > 0.0

    @property
    def disbelieves_retry_after(self) -> bool:
        """True if the latest Retry-After that could be checked was too long: a call was accepted long before."""
        return self._trusted is False

    def wait(self, now: float) -> float:
        """Return the seconds until a call may be sent; 0 for now."""
        if not self._silence:
            return 0.0
        return max(0.0, self._silent_until - now, self._trial_at + TRIAL_TIME - now)

    def expected_wait(self, now: float) -> float:
        """Return the seconds that a call has to expect to wait: for a Retry-After, unless one was wrong."""
        wait = self.wait(now)
        if not wait or self._trusted is False:
            return wait
        return max(wait, min(_MAX_TRUSTED if self._trusted else _MAX_UNCHECKED, self._allowed_at - now))

    def record_sent(self, now: float) -> None:
        """Note that a call is sent; in a block it is the trial call."""
        if self._silence:
            if now > self._silent_until + _FORGET:
                self._end()
            else:
                self._trial_at = now

    def record_accepted(self, sent_at: float) -> Block | None:
        """Note that a call was accepted. Return the block if this ends one, else None."""
        if sent_at < self._blocked_since:
            return None
        if self._allowed_at > self._blocked_since:
            if sent_at < self._blocked_since + _EARLY * (self._allowed_at - self._blocked_since):
                self._trusted = False
            elif self._refused_early:
                self._trusted = True
        refused = self._refused_sent_at
        if self._trusted and self._allowed_at <= sent_at:
            refused = max(refused, self._allowed_at)  # calls before would have been refused too
        if self._silence > _PLATEAU:
            refused = sent_at  # so long a silence was needed because each call extends a penalty
        block = Block(self._blocked_since, refused, sent_at, self._refusals, self.silent)
        self._needed = self._silence if self._silence > _PLATEAU else 0.0
        self._end()
        return block

    def record_refused(
        self, now: float, sent_at: float, *, retry_after: float, certain: bool, first_silence: float = 0.0
    ) -> bool:
        """Note that a call was refused, and begin or lengthen the silence. Return whether a block begins with it.

        Args:
            now: when the refusal arrived.
            sent_at: when the call was sent.
            retry_after: seconds that the provider asked for, or 0.
            certain: a rate is the cause; otherwise only several refusals in a row begin a silence.
            first_silence: seconds of the first silence, about.
        """
        self._refused_sent_at = max(self._refused_sent_at, sent_at)
        first_silence = min(_PLATEAU, max(_FIRST_SILENCE, first_silence))
        begins = self._blocked_since == math.inf
        self._refusals += 1
        self._again += sent_at >= self._blocked_since
        silence = certain or self._again >= _ROW
        if begins:
            self._blocked_since = now
        elif sent_at < self._round_at:
            if silence and not self._silence:  # the first of this round did not show it yet
                self._begin_silence(now, first_silence)
            return False
        elif now < self._allowed_at:
            self._refused_early = True
        self._round_at = now
        self._rounds += 1
        if retry_after:
            self._allowed_at = now + retry_after
        if silence or self._silence:
            self._begin_silence(now, first_silence)
        return begins

    def _next_silence(self, now: float, first: float) -> float:
        """Return the seconds of the next silence.

        They double, but stay at a few seconds for a minute: most limits accept calls again within it. After that each
        call may prolong a penalty, and only a silence that goes on doubling becomes longer than it.
        """
        if not self._silence:
            return first
        if self._needed and self._rounds > _ROUNDS:
            return max(self._needed, 2 * self._silence) if self._silence > self._needed else self._needed
        if now < self._blocked_since + _LONG_BLOCK:
            return max(self._silence, min(_PLATEAU, 2 * self._silence))
        return min(_MAX_SILENCE, 2 * self._silence)

    def _begin_silence(self, now: float, first: float) -> None:
        self._silence = self._next_silence(now, first)
        self._trial_at = -math.inf
        until = now + self._silence
        if now < self._allowed_at:
            trusted = min(self._allowed_at, now + max(_MAX_TRUSTED, self._silence))
            until = trusted if self._trusted else min(until, self._allowed_at)
        self._silent_until = until
