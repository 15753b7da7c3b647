"""What a limit that only writes `observe` gets from the base class."""

from __future__ import annotations

import pytest

from forebay.errors import InvalidSetting
from forebay.interfaces import Outcome
from forebay.limit import Grant, Limit


class HalvingLimit(Limit):
    """The example of docs/limits.md: half after a refusal, one more after a success while all of it is used."""

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        if outcome is Outcome.OVERLOAD:
            self._set_level(self._level / 2)
        elif outcome is Outcome.SUCCESS and grant.at_limit:
            self._set_level(self._level + 1)


def test_a_subclass_that_writes_only_observe_is_a_limit() -> None:
    limit = HalvingLimit(initial_limit=4)
    limit.observe(1.0, limit.grant(0.0, 4), Outcome.SUCCESS)
    assert limit.limit(1.0) == 5
    limit.observe(2.0, limit.grant(1.0, 5), Outcome.OVERLOAD)
    assert limit.limit(2.0) == 2
    assert limit.reopens_at(2.0) is None


def test_a_limit_does_not_rise_while_less_than_all_of_it_is_used() -> None:
    limit = HalvingLimit(initial_limit=4)
    for _ in range(100):
        limit.observe(1.0, limit.grant(0.0, in_flight=1), Outcome.SUCCESS)
    assert limit.limit(1.0) == 4


def test_a_grant_is_at_the_limit_from_the_last_slot_on() -> None:
    limit = HalvingLimit(initial_limit=2)
    assert limit.grant(3.0, 1) == Grant(3.0, 1, at_limit=False)
    assert limit.grant(3.0, 2) == Grant(3.0, 2, at_limit=True)


def test_the_level_stays_between_one_and_max_limit() -> None:
    limit = HalvingLimit(initial_limit=2, max_limit=3)
    for _ in range(5):
        limit.observe(0.0, limit.grant(0.0, 3), Outcome.SUCCESS)
    assert limit.limit(0.0) == 3
    for _ in range(5):
        limit.observe(0.0, limit.grant(0.0, 3), Outcome.OVERLOAD)
    assert limit.limit(0.0) == 1


def test_an_invalid_bound_is_reported_under_the_name_of_the_subclass() -> None:
    with pytest.raises(InvalidSetting, match=r"HalvingLimit.*initial_limit"):
        HalvingLimit(initial_limit=0)


def test_a_limit_without_observe_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="observe"):
        Limit()  # type: ignore[abstract]
