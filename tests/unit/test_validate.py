"""Checks of arguments: they accept what is valid, and say what is allowed for the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from forebay import _validate
from forebay.errors import InvalidSetting


def rejection(check: Any, value: object, **options: Any) -> str:
    with pytest.raises(InvalidSetting) as caught:
        check("Thing", "size", value, **options)
    return str(caught.value)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "3", None, object()])
def test_a_positive_number_is_required(value: object) -> None:
    assert "it must be a positive number of seconds." in rejection(_validate.check_positive, value, unit="seconds")


def test_a_positive_number_is_accepted() -> None:
    _validate.check_positive("Thing", "size", 0.1, unit="seconds")
    _validate.check_positive("Thing", "size", None, unit="seconds", none="for no limit")
    message = rejection(_validate.check_positive, 0, unit="seconds", none="for no limit")
    assert message == "Thing was given size=0; it must be a positive number of seconds, or None for no limit."


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, False, "3", None])
def test_a_number_of_at_least_0_is_required(value: object) -> None:
    assert "a number of seconds, at least 0." in rejection(_validate.check_not_negative, value, unit="seconds")


def test_a_number_of_at_least_0_is_accepted() -> None:
    _validate.check_not_negative("Thing", "size", 0, unit="seconds")
    _validate.check_not_negative("Thing", "size", math.inf, unit="seconds", infinite=True)
    _validate.check_not_negative("Thing", "size", None, unit="seconds", none="for no limit")


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_a_whole_number_is_required(value: object) -> None:
    assert "it must be a whole number of at least 1." in rejection(_validate.check_whole, value)


def test_a_whole_number_is_held_between_its_bounds() -> None:
    for value in (2, 3):
        _validate.check_whole("Thing", "size", value, minimum=2, maximum=3)
    _validate.check_whole("Thing", "size", None, none="for no limit")
    assert "a whole number from 2 to 3." in rejection(_validate.check_whole, 4, minimum=2, maximum=3)
    assert "a whole number of at least 1, or None for no limit." in rejection(
        _validate.check_whole, 0, none="for no limit"
    )


def test_a_number_between_two_others_is_required() -> None:
    _validate.check_between("Thing", "size", 1.5, 1, 2)
    assert "a number above 1 and below 2." in rejection(_validate.check_between, 1, low=1, high=2)
    assert "a number above 1." in rejection(_validate.check_between, math.nan, low=1, high=math.inf)
    assert "a number above 1." in rejection(_validate.check_between, "2", low=1, high=math.inf)


def test_a_share_is_required() -> None:
    _validate.check_share("Thing", "size", 0, example=0.1)
    _validate.check_share("Thing", "size", 0.99, example=0.1)
    for invalid in (1, -0.1, "0.5", True):
        message = rejection(_validate.check_share, invalid, example=0.1)
        assert "a share from 0 up to but not including 1, such as 0.1." in message


def test_a_name_is_required() -> None:
    _validate.check_name("Thing", "size", "x")
    for value in ("", None, 3):
        assert "a non-empty string of valid Unicode." in rejection(_validate.check_name, value)


def test_an_instance_is_required() -> None:
    _validate.check_instance("Thing", "size", 3, int, example="3")
    _validate.check_instance("Thing", "size", None, int, example="3", optional=True)
    assert "size='x'; it must be a int, such as 3." in rejection(_validate.check_instance, "x", kind=int, example="3")


def test_a_message_shows_no_content() -> None:
    message = rejection(_validate.check_whole, {"key": "sk-secret"})
    assert "size=a dict;" in message
    assert "sk-secret" not in message
