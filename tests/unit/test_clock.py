"""The clock: the time for which the machine was suspended."""

from __future__ import annotations

import time

import pytest

from forebay import clock


def test_a_suspension_is_what_one_clock_counts_and_the_other_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_suspension_clocks", (7, 1))
    monkeypatch.setattr(time, "clock_gettime", {7: 500.0, 1: 380.0}.__getitem__)
    assert clock.suspension() == 120.0


def test_where_no_clock_counts_suspensions_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_suspension_clocks", None)
    assert clock.suspension() == 0.0


def test_ids_sort_in_the_order_in_which_they_were_made() -> None:
    ids = [clock.new_id() for _ in range(300)]
    assert sorted(ids) == ids
    assert len(set(ids)) == 300
