"""Checks that the settings share. Values come from people, so nothing is taken for granted, not even their types."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from forebay.errors import InvalidSetting


def reject_setting(settings: object, name: str, expected: str, *, value: Any = ...) -> NoReturn:
    """Say that a setting cannot be meant.

    Args:
        settings: whose.
        name: of the setting.
        expected: what it must be.
        value: what it is, where it is not the attribute of that name or must not be shown.

    Raises:
        InvalidSetting: always.
    """
    shown = getattr(settings, name) if value is ... else value
    raise InvalidSetting(owner=type(settings).__name__, name=name, value=shown, expected=expected)


def check_positive_int(settings: object, *names: str, optional: bool = False) -> None:
    """Refuse what is not a whole number of at least 1."""
    for name in names:
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            reject_setting(settings, name, "a whole number of at least 1")


def check_positive(settings: object, *names: str, unit: str, optional: bool = False) -> None:
    """Refuse what is not a positive and finite number `of` something."""
    for name in names:
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if not is_positive(value):
            reject_setting(settings, name, f"a positive number of {unit}")


def is_positive(value: object) -> bool:
    """Whether it is a positive and finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
