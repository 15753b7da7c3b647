"""The interface of a concurrency limit.

A limit of your own is a subclass of `Limit` with one method, `observe`; docs/limits.md has an example. To add one to
this package, follow "Add a limit" in CONTRIBUTING.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from forebay._validate import check_whole
from forebay.interfaces import Outcome


class Grant(msgspec.Struct):
    """One slot of a limit, held by a call from its start to its end.

    Attributes:
        granted_at: seconds, on the clock of the limit's owner.
        in_flight: calls in flight at that moment, this one included.
        epoch: the limit's epoch at that moment, for a limit that has epochs.
        at_limit: whether the limit was used up, or nearly, at that moment. Raise a limit only for calls that have it:
            their success shows that the provider serves so many, while others would raise the limit of an idle account
            far above any load that was ever tried.
        accepted: whether the limit knows that the provider accepted the call.
        sample: the number of the sample of calls that this one belongs to, for a limit that compares samples.
    """

    granted_at: float
    in_flight: int
    epoch: int = 0
    at_limit: bool = False
    accepted: bool = False
    sample: int = 0


class AnswerCounts(msgspec.Struct, frozen=True):
    """Counts of calls that were accepted and refused, from which several processes learn a limit together.

    Attributes:
        accepted: calls that were accepted, of those sent under the limit that held when their answers came.
        refused: calls that were refused, of those.
        contradicted: refused calls that say nothing about the limit, because as many in flight were accepted.
    """

    accepted: int = 0
    refused: int = 0
    contradicted: int = 0

    def __add__(self, other: AnswerCounts) -> AnswerCounts:
        return AnswerCounts(
            self.accepted + other.accepted, self.refused + other.refused, self.contradicted + other.contradicted
        )

    def __sub__(self, other: AnswerCounts) -> AnswerCounts:
        return AnswerCounts(
            self.accepted - other.accepted, self.refused - other.refused, self.contradicted - other.contradicted
        )


class Limit(ABC):
    """A limit on the calls in flight at one account. Pure: it sees grants, outcomes and times, nothing else.

    A subclass has to write `observe`, which learns from finished calls and moves the limit by `_set_level`; `_level` is
    the limit before rounding. Every other method has a default. Times are seconds on one clock that does not go back,
    and each grant is passed to `observe` exactly once.

    Args:
        initial_limit: calls in flight to begin with.
        max_limit: most calls that may ever be in flight.

    Raises:
        InvalidSetting: not two whole numbers with 1 <= initial_limit <= max_limit.
    """

    def __init__(self, *, initial_limit: int = 10, max_limit: int = 10_000) -> None:
        owner = type(self).__name__
        check_whole(owner, "max_limit", max_limit)
        check_whole(owner, "initial_limit", initial_limit, maximum=max_limit)
        self._level = float(initial_limit)
        self._max_level = float(max_limit)

    @abstractmethod
    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Learn from one finished call.

        Args:
            now: when it ended.
            grant: what `grant` returned when the call started.
            outcome: OVERLOAD means that the provider refused the call because it is at its capacity. FAULT and IGNORED
                say nothing about the capacity.
            slowdown: how long the call took over how long its output tokens should take; 1 is as expected, None is
                unknown.
        """

    def limit(self, now: float) -> int:  # noqa: ARG002 - a subclass may need it
        """Return how many calls may be in flight now; 0 while none may."""
        return int(self._level)

    def reopens_at(self, now: float) -> float | None:  # noqa: ARG002 - a subclass may need it
        """Return when time alone will raise `limit` from 0, in the clock's seconds; None while it is above 0."""
        return None

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now; `in_flight` includes it."""
        return Grant(now, in_flight, at_limit=in_flight >= self.limit(now))

    def accepted(self, now: float, grant: Grant) -> None:  # noqa: B027 - few limits need it
        """Note that the provider accepted a call: its answer has begun, or no refusal came within a second.

        Called at most once for a grant, before `observe`. The default does nothing.
        """

    # --- for a limit that several processes learn together, see docs/guide/shared-accounts.md ---

    def learned_level(self, now: float) -> float:  # noqa: ARG002 - a subclass may need it
        """Return the limit that was learned, before rounding, at least 1. It does not count that calls pause."""
        return self._level

    def highest_level(self) -> float:
        """Return the most calls that may ever be in flight."""
        return self._max_level

    def adopt(self, now: float, level: float, *, cut: bool) -> None:  # noqa: ARG002 - a subclass may need it
        """Take over the limit that several processes have learned. A limit that overrides `limit` overrides this too.

        Args:
            now: the time.
            level: the limit, before rounding.
            cut: it has been cut before, by whatever process, so it is more than a first guess.
        """
        self._set_level(level)

    def returns_to(self) -> float:
        """Return the level that it goes back to by rises that several processes make at once; 0 if there is none.

        Above it, rises of several processes add up.
        """
        return 0.0

    def answers(self) -> AnswerCounts:
        """Return the answers that it has counted as evidence so far. One that falls at the first refusal has none."""
        return AnswerCounts()

    def add_answers(self, answers: AnswerCounts) -> None:  # noqa: B027 - few limits weigh evidence
        """Count the answers that other processes have had under the present limit. The default does nothing."""

    def _set_level(self, level: float) -> None:
        """Set the limit, kept between 1 and `max_limit`. Fractions add up; `limit` rounds down."""
        self._level = max(1.0, min(self._max_level, level))
