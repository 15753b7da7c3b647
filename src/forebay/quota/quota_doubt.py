"""Doubt about a quota that headers show: calls beyond it are tried from time to time.

Headers may be wrong: of another pool, of a period that they do not tell, made up by a proxy. A refusal shows it when
they allow too much. When they allow too little, only a call shows it that is sent nevertheless.
"""

from __future__ import annotations

import math
from typing import Final

_FIRST_WAIT: Final = 5.0  # periods of the quota before the first trial ...
_MAX_FIRST_WAIT: Final = 300.0  # ... and seconds, at most; each trial that is refused doubles them
_SUSPECT_WAIT: Final = 5.0  # seconds before it if the headers do not fit what is known
_MAX_DOUBLINGS: Final = 10  # of that wait
_LONGEST_WAIT: Final = 3600.0
_MIN_TRIALS: Final = 4  # accepted trials in a row from which a quota may be disbelieved ...
_MIN_EXCESS: Final = 0.05  # ... if they took this share of it: some is always left, because estimates err
_FAR: Final = 2.0  # times what a quota grants: once so much was accepted, a refusal is not for this quota
_DISBELIEF: Final = 600.0  # seconds after which a disbelieved quota is tried again


class QuotaDoubt:
    """The trials of one quota that headers show. Pure: the caller passes the time.

    A trial is a call that is sent although the quota is used up by the headers. If it is accepted, two more go, then
    four. Once enough of them were accepted in a row, the quota is not believed: calls do not wait for it until one is
    refused. A quota that is right costs a refused call now and then, more and more rarely.

    Args:
        now: the time.
        amount: that the quota grants in a period.
        rate: that it grants in a second.
    """

    __slots__ = (
        "_amount",
        "_doubted_since",
        "_doubted_until",
        "_excess",
        "_left",
        "_not_before",
        "_open",
        "_rate",
        "_refused",
        "_refuted",
        "_size",
        "_trials",
        "_try_at",
        "_unanswered",
        "_wait",
    )  # fmt: skip

    def __init__(self, now: float, amount: float, rate: float) -> None:
        self._doubted_since = self._doubted_until = -math.inf
        self._try_at = math.inf
        self._not_before = -math.inf  # no trial goes before, although the quota should be full by its headers
        self._refuted = False  # no refusal makes it believed again
        self._unanswered = 0  # trials in a row that were left before their answers
        self.begin(now, amount, rate)

    def begin(self, now: float, amount: float, rate: float) -> None:
        """Begin again: the quota has changed."""
        self._amount, self._rate = amount, rate
        self._refused = False  # the latest trial was refused
        self._wait = min(_MAX_FIRST_WAIT, _FIRST_WAIT * amount / rate)
        self._try_at = min(self._try_at, now + self._wait)
        self._end_row()

    def _end_row(self) -> None:
        self._size = self._left = 1  # trials of this round, and those that have not been sent
        self._open = 0  # sent, and neither accepted nor refused yet
        self._trials, self._excess = 0, 0.0  # accepted in a row, and what they took

    def suspect(self, now: float) -> None:
        """Let a trial go soon, unless one was refused already: the headers do not fit what is known."""
        if not self._refused:
            self._try_at = min(self._try_at, now + _SUSPECT_WAIT)

    def shift_clock(self, by: float) -> None:
        """Move all times by `by` seconds, because the clock has gone back."""
        self._try_at += by
        self._not_before += by
        self._doubted_since += by
        self._doubted_until += by

    def adopt(self, now: float, seconds: float) -> None:
        """Believe the quota no more for `seconds`, or again for 0: another process has found that out."""
        if seconds > 0.0:
            self._doubted_since, self._doubted_until, self._excess = now, now + seconds, 0.0
        else:
            self._doubted_until = -math.inf
            self._end_row()

    def seconds_disbelieved(self, now: float) -> float:
        """Return the seconds for which calls do not wait for the quota."""
        return max(0.0, self._doubted_until - now)

    def is_believed(self, now: float) -> bool:
        """Return whether calls wait for the quota."""
        return now >= self._doubted_until

    def trial_wait(self, now: float, promised: float) -> float:
        """Return the seconds until a call may be sent that the quota does not allow; infinity while trials are open.

        Args:
            now: the time.
            promised: when the quota is full again, by the latest header. It is tried then, unless that was wrong.
        """
        if not self._left:
            return math.inf
        at = self._try_at if self._refused else min(self._try_at, promised)
        return max(0.0, max(at, self._not_before) - now)

    def record_sent(self) -> None:
        """Note that a trial is sent."""
        self._left -= 1
        self._open += 1

    def cancel(self, now: float) -> None:
        """Note that a trial said nothing, because it was not sent, or failed. Another one goes after some seconds."""
        self._left += 1
        self._not_before = now + _SUSPECT_WAIT
        self._open = max(0, self._open - 1)

    def record_unanswered(self, now: float) -> None:
        """Note that a trial was left before its answer, so that it may have been refused: it ends the row.

        Each one in a row doubles the time to the next. Else callers who leave before they are answered would send a
        trial every few seconds, and the few that are accepted between them would seem to be in a row.
        """
        self._end_row()
        self._unanswered += 1
        wait = _SUSPECT_WAIT * 2.0 ** min(self._unanswered, _MAX_DOUBLINGS)
        self._not_before = now + min(_MAX_FIRST_WAIT, wait)

    def record_trial_accepted(self, now: float, amount: float) -> None:
        """Note that a trial was accepted that took `amount`."""
        self._refused = False
        self._unanswered, self._not_before = 0, -math.inf
        self._open = max(0, self._open - 1)
        self._trials += 1
        self._excess += amount
        if not self._open and not self._left:
            self._size *= 2
            self._left, self._try_at = self._size, now
        if self._trials >= _MIN_TRIALS and self._excess >= _MIN_EXCESS * self._amount and self.is_believed(now):
            self._disbelieve(now)

    def _disbelieve(self, now: float) -> None:
        self._doubted_since, self._doubted_until, self._refuted = now, now + _DISBELIEF, False

    def record_accepted(self, amount: float) -> None:
        """Note that a call was accepted while the quota was not believed."""
        self._excess += amount

    def record_refused(self, now: float) -> None:
        """Note that a call was refused, for a reason that may be this quota: it is believed again, if it may be."""
        if not self.is_believed(now):
            if self._refuted or self._excess > _FAR * (self._amount + self._rate * (now - self._doubted_since)):
                return
            self._doubted_until = -math.inf
        elif not self._open and not self._trials:
            return
        self._refused = True
        self._unanswered = 0
        self._wait = min(_LONGEST_WAIT, 2 * self._wait)
        self._try_at = now + self._wait
        self._end_row()

    def refute(self, now: float) -> None:
        """Believe the quota no more, whatever is refused: its headers contradict each other."""
        self._disbelieve(now)
        self._refuted = True
