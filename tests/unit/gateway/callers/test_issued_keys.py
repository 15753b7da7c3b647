"""Issued keys: their text, and what each may do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from forebay import Budget, Priority, Quota
from forebay.errors import InvalidSetting
from forebay.gateway.callers.issued_keys import IssuedKey, contains_key, is_well_formed, key_digest, key_hint, new_key


def test_a_new_key_is_recognised_by_its_prefix_and_checksum() -> None:
    text = new_key()
    assert re.fullmatch(r"fb-[0-9A-Za-z]{39}", text)
    assert is_well_formed(text)
    assert contains_key(f"?key={text}&b=2")
    assert len({new_key() for _ in range(100)}) == 100


@pytest.mark.parametrize("place", [0, 5, 20, 41])
def test_a_mistyped_key_is_not_well_formed(place: int) -> None:
    text = new_key()
    other = "a" if text[place] != "a" else "b"
    assert not is_well_formed(text[:place] + other + text[place + 1 :])
    assert not is_well_formed(text[:-1])
    assert not is_well_formed(text + "0")
    assert not is_well_formed("fb-" + "ü" * 39)


def test_the_hash_and_the_hint_do_not_tell_the_key() -> None:
    text = new_key()
    assert len(key_digest(text)) == 32
    assert key_hint(text) == text[:7]


def test_a_hash_takes_any_text() -> None:
    assert key_digest("fb-\udcff\x00") != key_digest("fb-")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": ""}, "name"),
        ({"name": "two words"}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": "x" * 64}, "name"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a\nb"}, "tenant"),
        ({"priority": "urgent"}, "priority"),
        ({"max_priority": "urgent"}, "max_priority"),
        ({"priority": "high", "max_priority": "normal"}, "max_priority"),
        ({"rpm": 0}, "rpm"),
        ({"tpm": 1.5}, "tpm"),
        ({"max_concurrent": True}, "max_concurrent"),
        ({"budget_usd": -1}, "budget_usd"),
        ({"budget_usd": float("nan")}, "budget_usd"),
        ({"budget_per": "week"}, "budget_per"),
        ({"models": ("",)}, "models"),
        ({"targets": (3,)}, "targets"),
        ({"expires_at": "tomorrow"}, "expires_at"),
    ],
)
def test_an_invalid_field_is_named(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"key was given {problem}"):
        IssuedKey(**{"name": "k", **fields})


def test_a_key_that_is_given_as_a_name_is_not_shown() -> None:
    text = new_key()
    with pytest.raises(InvalidSetting) as caught:
        IssuedKey(name=text)
    assert text not in str(caught.value)


def test_a_key_without_fields_may_call_everything_as_its_own_tenant() -> None:
    key = IssuedKey(name="writer")
    assert (key.tenant_name, key.default_priority, key.best_priority) == ("writer", Priority.NORMAL, Priority.NORMAL)
    assert key.allows_model("any")
    assert key.allows_target("any")
    assert (key.quotas(), key.budget()) == ((), None)


def test_models_are_patterns_and_targets_are_names() -> None:
    key = IssuedKey(name="k", models=("gpt-4o*", "o3"), targets=("openai",))
    assert [key.allows_model(name) for name in ("gpt-4o-mini", "o3", "o3-pro", "GPT-4o", "")] == [1, 1, 0, 0, 0]
    assert [key.allows_target(name) for name in ("openai", "anthropic")] == [1, 0]


def test_the_limits_are_those_of_an_account() -> None:
    key = IssuedKey(name="k", rpm=60, tpm=1000, budget_usd=5)
    assert key.quotas() == (Quota(requests=60, per="minute"), Quota(tokens=1000, per="minute"))
    assert key.budget() == Budget(usd=5, per="day")
    assert IssuedKey(name="k", budget_usd=5, budget_per="total").budget() == Budget(usd=5)


def test_a_key_is_refused_when_it_has_expired_was_disabled_or_revoked() -> None:
    assert IssuedKey(name="k", expires_at=10.0).state(9.9) == "active"
    assert IssuedKey(name="k", expires_at=10.0).state(10.0) == "expired"
    assert IssuedKey(name="k", enabled=False).state(0.0) == "disabled"
    assert IssuedKey(name="k", enabled=False, revoked_at=1.0).state(0.0) == "revoked"
