"""A quota as its user writes it: an amount of one unit in a period."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import msgspec

from forebay._validate import is_whole, reject
from forebay.errors import InvalidQuota

Period = Literal["second", "minute", "hour", "day"]

PERIODS: Final[Mapping[str, float]] = MappingProxyType({"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0})
"""Seconds in each period, the shortest first."""

UNITS: Final = ("requests", "input_tokens", "output_tokens", "tokens")
"""The units that can be counted: fields of a `Charge`."""

_STRICT_UNITS: Final = ("output_tokens", "tokens")
_AT_MOST: Final = "_at_most"  # with which the attributes of a `Charge` end that strict quotas count


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """A rate limit, set by the provider or by you: an amount of requests or LLM tokens in a period.

    It refills all the time and holds at most the whole amount. Over any span of t seconds it grants at most
    ``amount + amount * t / period``. How much output a call will make is estimated. What calls use beyond that is a
    debt, which is paid back in full before others go; with `strict` there is none.

    Attributes:
        requests: calls.
        input_tokens: tokens sent.
        output_tokens: tokens received.
        tokens: for a quota that counts both together.
        per: ``"second"``, ``"minute"``, ``"hour"`` or ``"day"``.
        strict: each call reserves the most output that it may make, its ``max_tokens``, and is rejected without one.
            For ``output_tokens`` and ``tokens``.

    Raises:
        InvalidQuota: not exactly one amount, one that is not a whole number of at least 1, an unknown period, or a
            strict quota of another unit.
    """

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    tokens: int | None = None
    per: Period
    strict: bool = False

    def __post_init__(self) -> None:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none"
            problem = f"it needs exactly one amount and has {named}; pass a list of quotas if several hold at once"
            raise InvalidQuota(problem=problem)
        amount = getattr(self, given[0])
        if not is_whole(amount):
            problem = (
                f"{given[0]}={amount!r} is not a whole number of at least 1; to let nothing through, leave the upstream"
                " out, and for no limit leave the quota out"
            )
            raise InvalidQuota(problem=problem)
        if not isinstance(self.per, str) or self.per not in PERIODS:
            raise InvalidQuota(problem=f"per={self.per!r} is not a period; it is one of {', '.join(PERIODS)}")
        if not isinstance(self.strict, bool) or (self.strict and given[0] not in _STRICT_UNITS):
            problem = (
                f"strict={self.strict!r} for {given[0]}; it is True or False, and True is for"
                f" {' and '.join(_STRICT_UNITS)}: requests are counted exactly, and of input there is only an estimate"
            )
            raise InvalidQuota(problem=problem)

    @property
    def unit(self) -> str:
        """The unit that it counts, a field of `Charge`."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def counted(self) -> str:
        """The attribute of a `Charge` that it counts: its unit, or the most of it that a call may use."""
        return self.unit + _AT_MOST if self.strict else self.unit

    @property
    def amount(self) -> int:
        """The amount that a period grants."""
        amount: int = getattr(self, self.unit)
        return amount

    @property
    def seconds(self) -> float:
        """The length of its period in seconds."""
        return PERIODS[self.per]


def check_quotas(owner: str, name: str, quotas: object) -> None:
    """Check that `quotas` are `Quota` objects.

    Raises:
        InvalidSetting: one is not.
    """
    expected = "a list of Quota, such as [Quota(requests=500, per='minute')]"
    if not isinstance(quotas, Iterable):
        reject(owner, name, quotas, expected)
    for quota in quotas:
        if not isinstance(quota, Quota):
            reject(owner, name, quota, expected)


def unit_of(counted: str) -> str:
    """Return the unit of what a quota counts. See `Quota.counted`."""
    return counted.removesuffix(_AT_MOST)


class RateScope(NamedTuple):
    """The rate that a refusal names.

    Attributes:
        unit: the unit that it counts, a field of `Charge`; None if the refusal does not say.
        period: its seconds; None if the refusal does not say.
    """

    unit: str | None = None
    period: float | None = None
