"""Telling refusals that are ours from those that are not."""

from __future__ import annotations

import itertools

import pytest

from forebay.limit.adaptive.refusal_detector import RefusalDetector


def used_to(one_in: int | None, answers: int = 2000) -> RefusalDetector:
    noise = RefusalDetector()
    for n in range(1, answers + 1):
        if one_in is not None and n % one_in == 0:
            noise.record_refusal()
        else:
            noise.record_accepted()
    return noise


def until_convinced(noise: RefusalDetector, *, suspect: bool = False) -> int:
    for n in itertools.count(1):
        noise.record_refusal()
        if noise.is_overload(expected=suspect):
            return n
    raise AssertionError


@pytest.mark.parametrize(("one_in", "refusals"), [(None, 3), (100, 4), (33, 6)])
def test_the_more_strays_there_are_the_more_it_takes(one_in: int | None, refusals: int) -> None:
    assert abs(until_convinced(used_to(one_in)) - refusals) <= 1


def test_above_a_level_that_was_refused_one_refusal_is_enough_where_it_is_quiet() -> None:
    assert until_convinced(used_to(None), suspect=True) == 1
    assert until_convinced(used_to(33), suspect=True) > 1


@pytest.mark.parametrize("one_in", [20, 33, 100])
def test_regular_strays_never_convince_and_become_the_background(one_in: int) -> None:
    noise = used_to(one_in, 1000)
    for n in range(1, 5000):
        if n % one_in == 0:
            noise.record_refusal()
        else:
            noise.record_accepted()
        assert not noise.is_overload(expected=False)
    assert noise.background == pytest.approx(1 / one_in, rel=0.5)


def test_what_convinced_is_no_background() -> None:
    noise = used_to(None)
    before = noise.background
    until_convinced(noise)
    noise.reset()
    assert noise.background == before
