"""Quotas as users write them, and the errors for invalid ones."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from forebay.errors import InvalidQuota, InvalidSetting
from forebay.quota import Quota, RateLimiter


def test_a_quota_knows_its_unit_amount_and_period() -> None:
    quota = Quota(input_tokens=200_000, per="minute")
    assert (quota.unit, quota.amount, quota.seconds) == ("input_tokens", 200_000, 60.0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "exactly one amount and has none"),
        ({"requests": 1, "tokens": 2}, "has requests and tokens"),
        ({"requests": 0}, "whole number of at least 1; to let nothing through"),
        ({"tokens": -5}, "tokens=-5"),
        ({"tokens": 1.5}, "whole number"),
        ({"requests": True}, "whole number"),
        ({"requests": "500"}, "whole number"),
        ({"requests": 5, "per": "fortnight"}, "one of second, minute, hour, day"),
        ({"requests": 5, "per": ["minute"]}, "not a period"),
        ({"requests": 5, "per": 60}, "not a period"),
    ],
)
def test_an_invalid_quota_says_what_to_do(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidQuota) as caught:
        Quota(**({"per": "minute"} | given))
    assert says in str(caught.value)
    assert 'Quota(requests=500, per="minute")' in str(caught.value)


def test_a_quota_is_immutable_and_can_be_encoded() -> None:
    with pytest.raises(AttributeError):
        Quota(requests=1, per="second").requests = 5  # type: ignore[misc]
    assert msgspec.json.decode(msgspec.json.encode(Quota(tokens=9, per="day")), type=Quota).tokens == 9


@pytest.mark.parametrize("given", [{"requests": 1}, {"input_tokens": 1}], ids=str)
def test_only_quotas_of_output_are_strict(given: dict[str, int]) -> None:
    with pytest.raises(InvalidQuota, match="True is for output_tokens and tokens: requests are counted exactly"):
        Quota(**given, per="minute", strict=True)


def test_strict_is_true_or_false() -> None:
    with pytest.raises(InvalidQuota, match="strict='max'"):
        Quota(tokens=1, per="minute", strict="max")  # type: ignore[arg-type]


def test_a_rate_limiter_takes_only_quotas() -> None:
    with pytest.raises(InvalidSetting, match="made of Quota objects"):
        RateLimiter([500])  # type: ignore[list-item]
