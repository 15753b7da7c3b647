"""A label with a bound on its values."""

from __future__ import annotations

import pytest

from forebay.gateway.metrics.bounded_label import OTHER, BoundedLabel


def test_values_beyond_the_bound_count_together() -> None:
    models = BoundedLabel(2)
    for model in ("a", "b", "c", "a"):
        models.admit(model)
    assert [models.label(model) for model in ("a", "b", "c", "d")] == ["a", "b", OTHER, OTHER]


def test_a_value_that_was_not_admitted_takes_no_place() -> None:
    models = BoundedLabel(1)
    assert models.label("junk") == OTHER
    models.admit("a")
    assert models.label("a") == "a"


@pytest.mark.parametrize("max_values", [0, 1])
def test_a_value_that_is_not_known_stays_empty_and_takes_no_place(max_values: int) -> None:
    tenants = BoundedLabel(max_values)
    tenants.admit("")
    tenants.admit("acme")
    assert (tenants.label(""), tenants.label("acme")) == ("", "acme" if max_values else OTHER)


@pytest.mark.parametrize("value", ["a" * 201, "a\nb", "\x00", "\udc80"], ids=["long", "line", "control", "surrogate"])
def test_a_value_that_a_page_should_not_have_is_not_admitted(value: str) -> None:
    models = BoundedLabel(10)
    models.admit(value)
    assert models.label(value) == OTHER
