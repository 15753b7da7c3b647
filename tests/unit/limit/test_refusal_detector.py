"""The refusal detector tells an overload from stray refusals."""

from __future__ import annotations

import itertools

import pytest

from forebay.limit.adaptive.refusal_detector import RefusalDetector


def detector_used_to(one_in: int | None, answers: int = 2000) -> RefusalDetector:
    detector = RefusalDetector()
    for n in range(1, answers + 1):
        if one_in is not None and n % one_in == 0:
            detector.record_refusal()
        else:
            detector.record_accepted()
    return detector


def refusals_until_overload(detector: RefusalDetector, *, expected: bool = False) -> int:
    for n in itertools.count(1):
        detector.record_refusal()
        if detector.is_overload(expected=expected):
            return n
    raise AssertionError


@pytest.mark.parametrize(("one_in", "refusals"), [(None, 3), (100, 4), (33, 6)])
def test_more_stray_refusals_need_more_evidence(one_in: int | None, refusals: int) -> None:
    assert abs(refusals_until_overload(detector_used_to(one_in)) - refusals) <= 1


def test_one_expected_refusal_is_enough_on_a_quiet_background() -> None:
    assert refusals_until_overload(detector_used_to(None), expected=True) == 1
    assert refusals_until_overload(detector_used_to(33), expected=True) > 1


@pytest.mark.parametrize("one_in", [20, 33, 100])
def test_regular_stray_refusals_become_the_background(one_in: int) -> None:
    detector = detector_used_to(one_in, 1000)
    for n in range(1, 5000):
        if n % one_in == 0:
            detector.record_refusal()
        else:
            detector.record_accepted()
        assert not detector.is_overload(expected=False)
    assert detector.background == pytest.approx(1 / one_in, rel=0.5)


def test_refusals_of_an_overload_do_not_count_as_background() -> None:
    detector = detector_used_to(None)
    before = detector.background
    refusals_until_overload(detector)
    detector.reset()
    assert detector.background == before
