"""A limit that this process learns together with others: the ledger of its account has what all have learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from forebay.interfaces import Outcome
from forebay.limit import AnswerCounts, Grant, Limit
from forebay.upstream.shared.ledger.messages import LimitReply, LimitRequest

_EPSILON: Final = 1e-9  # calls: less is a rounding error


class LeasedLimit(Limit):
    """A limit of all the processes that share an account, as this one has learned it with them. See `limit_learning`.

    It passes everything on to a limit of this process, which is shown all calls in flight of the account, and is set to
    what all have learned at each exchange.

    Args:
        limit: of this process.
        others: returns the calls in flight of other processes; it is given the time, and the calls of this one.

    Attributes:
        has_refusals: calls were refused, and the others do not know that yet.
    """

    def __init__(self, limit: Limit, others: Callable[[float, int], int]) -> None:
        super().__init__()
        self._limit = limit
        self._others = others
        self._epoch = -1
        self._answers_of_all = AnswerCounts()  # of this epoch, as the ledger told them
        self._reset()
        self._silent_until = 0.0  # as this limit had it when that was last reported, or as the ledger told it

    def _reset(self) -> None:
        self._cut: float | None = None  # since the latest request
        self._raised = 0.0  # ... and the cut
        self._returned = self._returns_to = 0.0  # rises besides, back to a level that has held, and that level
        self._reported = self._limit.answers()  # until then
        self.has_refusals = False

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Pass a finished call on."""
        before = self._limit.learned_level(now)
        self._limit.observe(now, grant, outcome, slowdown=slowdown)
        if outcome is Outcome.OVERLOAD:
            self.has_refusals = self._limit.answers().refused > self._reported.refused
        if (after := self._limit.learned_level(now)) != before:
            self._note(before, after)

    def accepted(self, now: float, grant: Grant) -> None:
        """Pass on that the provider accepted a call."""
        before = self._limit.learned_level(now)
        self._limit.accepted(now, grant)
        if (after := self._limit.learned_level(now)) != before:
            self._note(before, after)

    def _note(self, before: float, after: float) -> None:
        if after < before - _EPSILON:
            self._reset()
            self._cut = after
        elif before < (level := self._limit.returns_to()):
            self._returned += after - before
            self._returns_to = max(level, after)
        else:
            self._raised += after - before

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now, with the calls of all processes in flight."""
        if others := self._others(now, in_flight):
            # What they were allowed may be out of date; the ledger allows no more than the limit in all.
            in_flight = min(max(in_flight, self._limit.limit(now)), in_flight + others)
        return self._limit.grant(now, in_flight)

    def limit(self, now: float) -> int:
        """Return how many calls may be in flight in all processes now."""
        return self._limit.limit(now)

    def reopens_at(self, now: float) -> float | None:
        """Return when time alone will raise the limit from 0."""
        return self._limit.reopens_at(now)

    # --- exchanges ---

    def has_news(self, now: float) -> bool:
        """Return whether the ledger is to be told at once that it was cut, or soon that it has risen."""
        if self._cut is not None or self._raised + self._returned >= 1.0:
            return True
        return self._limit.reopens_at(now) is not None and self.is_cut(now)

    @property
    def is_cut_alone(self) -> bool:
        """True if this process has cut it, and has not told that yet."""
        return self._cut is not None

    def is_cut(self, now: float) -> bool:
        """Return whether it was cut, or a silence has begun, since the latest request."""
        return self._cut is not None or self._silence(now) > 0.0

    def report(self, now: float, *, members: int = 1) -> LimitRequest:
        """Return what to tell the ledger.

        Args:
            now: the time.
            members: processes that have learned the same at the same time, each for itself: no exchange was possible.
        """
        silence = self._silence(now)
        if silence:
            self._silent_until = now + silence
        request = LimitRequest(
            epoch=self._epoch,
            level=self._limit.learned_level(now),
            most=self._limit.highest_level(),
            cut=self._cut,
            raised=self._raised / members,
            returned=self._returned,
            returns_to=self._returns_to,
            silence=silence,
            answers=self._limit.answers() - self._reported,
        )
        self._reset()
        return request

    def receive(self, now: float, request: LimitRequest, reply: LimitReply) -> None:
        """Take over what all have learned, and what this process has since the request."""
        own_cut = request.cut is not None and reply.epoch == request.epoch + 1
        others = reply.answers
        if reply.epoch == request.epoch:
            others -= self._answers_of_all + request.answers
        elif own_cut:
            others -= request.answers
        else:
            self._reset()  # it comes from calls that were sent before a cut of another process
        self._epoch, self._answers_of_all = reply.epoch, reply.answers
        level = reply.level if self._cut is None else min(reply.level, self._cut)
        if reply.silence > 0.0:
            self._silent_until = max(self._silent_until, now + reply.silence)
        level = max(level, min(level + self._returned, self._returns_to))
        self._limit.adopt(now, level + self._raised, cut=reply.epoch > 0)
        if self._cut is None and min(others.accepted, others.refused, others.contradicted) >= 0:
            self._limit.add_answers(others)

    def _silence(self, now: float) -> float:
        """Return the seconds of a silence that the ledger does not know of."""
        reopens_at = self._limit.reopens_at(now)
        return 0.0 if reopens_at is None or reopens_at <= self._silent_until + _EPSILON else reopens_at - now
