"""What a user says of a rate: so much of one thing, in a period."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import msgspec

from forebay.errors import InvalidQuota

Period = Literal["second", "minute", "hour", "day"]

PERIODS: Final[Mapping[str, float]] = MappingProxyType({"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0})
"""Seconds in each period, the shortest first."""

UNITS: Final = ("requests", "input_tokens", "output_tokens", "tokens")
"""What can be counted: the fields of a `Charge`."""


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """A rate that a provider grants, or that you allow: so many requests or LLM tokens in a period.

    It refills all the time. Not used for a while it holds at most the whole amount, so over any span of t seconds it
    lets through no more than ``amount + amount * t / period``.

    Attributes:
        requests: calls.
        input_tokens: tokens sent.
        output_tokens: tokens received.
        tokens: of the quotas that count both together.
        per: ``"second"``, ``"minute"``, ``"hour"`` or ``"day"``.

    Raises:
        InvalidQuota: not exactly one amount, one that is not a whole number of at least 1, or an unknown period.
    """

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    tokens: int | None = None
    per: Period

    def __post_init__(self) -> None:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none"
            problem = f"it needs exactly one amount and has {named}; give a list of quotas if several hold at once"
            raise InvalidQuota(problem=problem)
        amount = getattr(self, given[0])
        if not isinstance(amount, int) or isinstance(amount, bool) or amount < 1:
            problem = (
                f"{given[0]}={amount!r} is not a whole number of at least 1; to let nothing through, leave the upstream"
                " out, and for no limit leave the quota out"
            )
            raise InvalidQuota(problem=problem)
        if not isinstance(self.per, str) or self.per not in PERIODS:
            raise InvalidQuota(problem=f"per={self.per!r} is not a period; it is one of {', '.join(PERIODS)}")

    @property
    def unit(self) -> str:
        """What it counts, a field of `Charge`."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def amount(self) -> int:
        """How much of it a period grants."""
        amount: int = getattr(self, self.unit)
        return amount

    @property
    def seconds(self) -> float:
        """The length of its period."""
        return PERIODS[self.per]
