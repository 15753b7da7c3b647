"""A limit of the user's own, guarded: its errors cost no permit."""

from __future__ import annotations

from functools import partial
from typing import Final

from forebay._hooks import call_hook
from forebay._validate import is_number
from forebay.interfaces import Outcome
from forebay.limit import AnswerCounts, Grant, Limit

_RETRY: Final = 1.0  # seconds after which a limit of 0 is asked again, if it could not say when it rises


class GuardedLimit(Limit):
    """A limit that passes everything on to another one. What that raises is logged; its last limit holds until then.

    Permits are granted and closed in several steps, and an error between two of them would lose the permit.
    """

    def __init__(self, guarded: Limit) -> None:
        super().__init__()
        self._guarded = guarded
        self._name = f"limit {type(guarded).__qualname__}"
        self._last = 1

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Pass a finished call on."""
        call_hook(self._name, partial(self._guarded.observe, now, grant, outcome, slowdown=slowdown))

    def limit(self, now: float) -> int:
        """Return the limit or, if that fails or is not a number, the one before."""
        limit = call_hook(self._name, self._guarded.limit, now)
        if is_number(limit) and 0 <= limit < float("inf"):
            self._last = int(limit)
        return self._last

    def reopens_at(self, now: float) -> float | None:
        """Return when time alone will raise the limit from 0."""
        when = call_hook(self._name, self._guarded.reopens_at, now)
        if is_number(when):
            return when
        return None if self._last else now + _RETRY

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now."""
        grant = call_hook(self._name, self._guarded.grant, now, in_flight)
        return grant if isinstance(grant, Grant) else Grant(now, in_flight, at_limit=in_flight >= self._last)

    def accepted(self, now: float, grant: Grant) -> None:
        """Pass on that the provider accepted a call."""
        call_hook(self._name, self._guarded.accepted, now, grant)

    def learned_level(self, now: float) -> float:
        """Return the limit that was learned or, if that fails or is not a number, the last limit."""
        if type(self._guarded).limit is not Limit.limit and type(self._guarded).learned_level is Limit.learned_level:
            return float(self.limit(now) or max(1, self._last))  # its own way to answer: `Limit`'s may know nothing
        level = call_hook(self._name, self._guarded.learned_level, now)
        return max(1.0, level) if is_number(level) and level < float("inf") else float(max(1, self._last))

    def highest_level(self) -> float:
        """Return the most calls that may ever be in flight."""
        level = call_hook(self._name, self._guarded.highest_level)
        return level if is_number(level) and level >= 1.0 else self._max_level

    def adopt(self, now: float, level: float, *, cut: bool) -> None:
        """Pass on the limit that several processes have learned."""
        call_hook(self._name, partial(self._guarded.adopt, now, level, cut=cut))

    def returns_to(self) -> float:
        """Return the level that it goes back to; none if that fails or is not a number."""
        level = call_hook(self._name, self._guarded.returns_to)
        return level if is_number(level) else 0.0

    def answers(self) -> AnswerCounts:
        """Return the answers that it has counted; none if that fails."""
        answers = call_hook(self._name, self._guarded.answers)
        return answers if isinstance(answers, AnswerCounts) else AnswerCounts()

    def add_answers(self, answers: AnswerCounts) -> None:
        """Pass on the answers that other processes have had."""
        call_hook(self._name, self._guarded.add_answers, answers)


def guarded_limit(limit: Limit) -> Limit:
    """Return `limit`, guarded unless it is one of this package."""
    return limit if type(limit).__module__.startswith("forebay.") else GuardedLimit(limit)
