"""A pause after refusals that several processes share: the ledger of their account has it."""

from __future__ import annotations

from typing import Final

from forebay.upstream.accounts.refusals.refusal_pause import TRIAL_TIME, Block, RefusalPause
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest

_UNCHECKED: Final = -1.0  # stands for a Retry-After that nobody could check yet
_ELSEWHERE: Final = 0.5  # seconds after which it is asked what has become of the trial call of another process


class LeasedPause(RefusalPause):
    """The pause after refusals of an account in one of the processes that share it. It is a `CallStoppage`.

    A silence that one process begins holds for all. After it, all processes send one trial call together, and the
    first call that is accepted ends the silence for all.

    Attributes:
        changes: see `CallStoppage`.
        passes: see `CallStoppage`; none, since the first trial call that is accepted ends the silence.
    """

    __slots__ = ("_accepted", "_is_own_trial", "_refused", "changes", "passes")

    def __init__(self) -> None:
        self.changes = self.passes = 0
        self._is_own_trial = False
        self._refused = self._accepted = 0  # calls since that was described last, from the first refused one on
        self._silence = 0.0
        super().__init__()

    # --- see CallStoppage ---

    def is_stopping(self, now: float) -> bool:
        """See `CallStoppage`."""
        del now
        return self.silent

    def is_probing(self, now: float) -> bool:
        """See `CallStoppage`."""
        return self._silence > 0.0 and self.wait(now) <= 0.0

    def probes(self, now: float) -> int:
        """See `CallStoppage`."""
        return int(self._silence > 0.0 and self._is_own_trial and now < self._trial_at + TRIAL_TIME)

    def has_faults_to_tell(self) -> bool:
        """See `CallStoppage`."""
        return self._refused > 0 and not self._silence

    def is_quiet(self, now: float) -> bool:
        """See `CallStoppage`."""
        del now
        return not (self._silence or self._refused)

    def describe(self, now: float) -> StoppageRequest:
        """See `CallStoppage`."""
        refused, accepted = self._refused, self._accepted
        self._refused = self._accepted = 0
        return StoppageRequest(
            openings=int(self.silent),
            calls=refused + accepted,
            faults=refused,
            seconds=max(0.0, self._silent_until - now) if self.silent else 0.0,
            probes=self.probes(now),
            details=(
                _UNCHECKED if self._trusted is None else float(self._trusted),
                self._needed,
                self._silence,
                now - self._blocked_since,
                now - self._refused_sent_at,
                self._allowed_at - now,
                float(self._refusals),
                float(self._rounds),
                float(self._refused_early),
            ),
        )

    def adopt(self, now: float, reply: StoppageReply) -> None:
        """See `CallStoppage`. Calls in flight do not lengthen it: they were sent before."""
        self._end()
        if not reply.details:
            return  # nothing has been told yet
        trusted, self._needed, silence, began, refused, allowed, refusals, rounds, early = reply.details
        self._trusted = None if trusted == _UNCHECKED else trusted > 0.0
        if not reply.openings:
            return
        self._silence, told_at = silence, now - reply.age
        self._blocked_since, self._refused_sent_at = told_at - began, told_at - refused
        self._allowed_at, self._refused_early = told_at + allowed, early > 0.0
        self._refusals, self._rounds = int(refusals), int(rounds)
        self._round_at = now
        self._silent_until = now + reply.seconds

    def refresh(self, now: float, reply: StoppageReply, *, passes: int, alone: bool) -> None:
        """See `CallStoppage`."""

    def note_elsewhere(self, now: float, until: float, reply: StoppageReply) -> None:
        """See `CallStoppage`."""
        del until
        if self.blocked and reply.calls:
            self._again = self._again + reply.faults if reply.calls == reply.faults else 0
        if reply.elsewhere and self.is_probing(now):
            self._trial_at, self._is_own_trial = now - TRIAL_TIME + _ELSEWHERE, False

    # --- see RefusalPause ---

    def record_sent(self, now: float) -> None:
        """See `RefusalPause`."""
        super().record_sent(now)
        self._is_own_trial = True

    def record_refused(
        self, now: float, sent_at: float, *, retry_after: float, certain: bool, first_silence: float = 0.0
    ) -> bool:
        """See `RefusalPause`."""
        self._refused += 1
        return super().record_refused(
            now, sent_at, retry_after=retry_after, certain=certain, first_silence=first_silence
        )

    def record_mixed(self, sent_at: float) -> None:
        """See `RefusalPause`."""
        self._accepted += self._refused > 0
        super().record_mixed(sent_at)

    def record_accepted(self, sent_at: float) -> Block | None:
        """See `RefusalPause`."""
        self._accepted += self._refused > 0
        return super().record_accepted(sent_at)

    def _begin_silence(self, now: float, first: float) -> None:
        self.changes += 1
        super()._begin_silence(now, first)

    def _end(self) -> None:
        self.changes += self._silence > 0.0
        super()._end()
