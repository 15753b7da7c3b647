"""Argument checks that the limits share."""

from __future__ import annotations

import math

from forebay.errors import InvalidSetting


def check_bounds(owner: str, initial_limit: int, max_limit: int) -> None:
    """Raise unless both are whole numbers with 1 <= initial_limit <= max_limit.

    Raises:
        InvalidSetting: they are not.
    """
    check_count(owner, "max_limit", max_limit)
    check_count(owner, "initial_limit", initial_limit)
    if initial_limit > max_limit:
        expected = f"at most max_limit, which is {max_limit}"
        raise InvalidSetting(owner=owner, name="initial_limit", value=initial_limit, expected=expected)


def check_count(owner: str, name: str, value: object) -> None:
    """Raise unless `value` is a whole number of at least 1.

    Raises:
        InvalidSetting: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidSetting(owner=owner, name=name, value=value, expected="a whole number of at least 1")


def check_between(owner: str, name: str, value: float, low: float, high: float) -> None:
    """Raise unless `value` is above `low` and below `high`.

    Raises:
        InvalidSetting: it is not.
    """
    if not low < value < high:
        bound = "" if math.isinf(high) else f" and below {high:g}"
        raise InvalidSetting(owner=owner, name=name, value=value, expected=f"a number above {low:g}{bound}")
