"""Checks of arguments, in one place, so that every rejected argument gives the same kind of message.

A message says whose argument it is, its value (or only its type, where it could be content), what is allowed, and
often what to do. A check does nothing if its argument is valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NoReturn, TypeGuard

from forebay._text import is_unicode
from forebay.errors import InvalidSetting

_MAX_TOKENS: Final = 10**9  # of one call


def reject(owner: str, name: str, value: object, expected: str) -> NoReturn:
    """Reject an argument.

    Args:
        owner: the class or function that was given the argument, or its name in the user's words: "worker 'writer'".
        name: of the argument.
        value: of the argument; the error shows a plain value, and only the type of any other.
        expected: what the argument must be, after "it must be".

    Raises:
        InvalidSetting: always.
    """
    raise InvalidSetting(owner=owner, name=name, value=value, expected=expected)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a number: an int or a float, but not a bool and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # noqa: PLR0124 - not NaN


def is_positive(value: object) -> TypeGuard[float]:
    """Return whether `value` is a positive, finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_whole(value: object, minimum: int = 1) -> TypeGuard[int]:
    """Return whether `value` is a whole number of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_positive(owner: str, name: str, value: object, *, unit: str, none: str | None = None) -> None:
    """Check that `value` is a positive, finite number.

    Args:
        owner: as for `reject`.
        name: as for `reject`.
        value: as for `reject`.
        unit: of the number, in the plural: "seconds".
        none: what None means, such as "for no limit"; without it, None is rejected too.

    Raises:
        InvalidSetting: it is not.
    """
    if not is_positive(value) and not (value is None and none is not None):
        reject(owner, name, value, f"a positive number of {unit}{_or_none(none)}")


def check_not_negative(  # noqa: PLR0913 - each a word of the message
    owner: str, name: str, value: object, *, unit: str, none: str | None = None, infinite: bool = False
) -> None:
    """Check that `value` is a number of at least 0, and finite unless `infinite`; for the rest see `check_positive`.

    Raises:
        InvalidSetting: it is not.
    """
    valid = is_number(value) and value >= 0 and (infinite or value < math.inf)
    if not valid and not (value is None and none is not None):
        reject(owner, name, value, f"a number of {unit}, at least 0{_or_none(none)}")


def check_whole(  # noqa: PLR0913 - each a word of the message
    owner: str, name: str, value: object, *, minimum: int = 1, maximum: int | None = None, none: str | None = None
) -> None:
    """Check that `value` is a whole number from `minimum` to `maximum`.

    Args:
        owner: as for `reject`.
        name: as for `reject`.
        value: as for `reject`.
        minimum: the least that is allowed.
        maximum: the most that is allowed, or None.
        none: what None means, such as "for no limit"; without it, None is rejected too.

    Raises:
        InvalidSetting: it is not.
    """
    if value is None and none is not None:
        return
    if not is_whole(value, minimum) or (maximum is not None and value > maximum):
        allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        reject(owner, name, value, f"a whole number {allowed}{_or_none(none)}")


def check_tokens(owner: str, sent: object, received: object) -> tuple[int, int]:
    """Return the tokens of a call, input and output; a part of a token counts as a whole one.

    Raises:
        InvalidSetting: one is not a number from 0 to a billion.
    """
    return _whole_tokens(owner, "input_tokens", sent), _whole_tokens(owner, "output_tokens", received)


def _whole_tokens(owner: str, name: str, value: object) -> int:
    if not (is_number(value) and 0 <= value <= _MAX_TOKENS):
        reject(owner, name, value, f"a number of tokens from 0 to {_MAX_TOKENS:,}")
    return math.ceil(value)


def check_between(owner: str, name: str, value: object, low: float, high: float) -> None:
    """Check that `value` is a number above `low` and below `high`.

    Raises:
        InvalidSetting: it is not.
    """
    if not (is_number(value) and low < value < high):
        below = "" if math.isinf(high) else f" and below {high:g}"
        reject(owner, name, value, f"a number above {low:g}{below}")


def check_share(owner: str, name: str, value: object, *, example: float) -> None:
    """Check that `value` is a share, from 0 up to but not including 1.

    Raises:
        InvalidSetting: it is not.
    """
    if not (is_number(value) and 0 <= value < 1):
        reject(owner, name, value, f"a share from 0 up to but not including 1, such as {example:g}")


def check_name(owner: str, name: str, value: object) -> None:
    """Check that `value` is a non-empty string, and valid Unicode.

    Raises:
        InvalidSetting: it is not.
    """
    if not isinstance(value, str) or not value or not is_unicode(value):
        reject(owner, name, value, "a non-empty string of valid Unicode")


def check_choice(owner: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """Check that `value` is one of the strings that are `allowed`.

    Raises:
        InvalidSetting: it is not.
    """
    if not (isinstance(value, str) and value in allowed):
        *first, last = (f'"{choice}"' for choice in allowed)
        reject(owner, name, value, f"{', '.join(first)} or {last}")


def check_instance(  # noqa: PLR0913 - each a word of the message
    owner: str, name: str, value: object, kind: type, *, example: str, optional: bool = False
) -> None:
    """Check that `value` is an instance of `kind`, or None if it is `optional`.

    Raises:
        InvalidSetting: it is not; the message shows the `example`.
    """
    if not isinstance(value, kind) and not (optional and value is None):
        reject(owner, name, value, f"a {kind.__name__}, such as {example}")


def _or_none(meaning: str | None) -> str:
    return "" if meaning is None else f", or None {meaning}"
