"""A row of faults, and the calls of others that contradict it."""

from __future__ import annotations

from forebay.upstream.shared.leases.fault_row import FaultRow


def failed(*times: float) -> FaultRow:
    row = FaultRow()
    for at in times:
        row.record_fault(at)
    return row


def succeeded(at: float) -> FaultRow:
    row = FaultRow()
    row.record_success(at)
    return row


def test_calls_of_others_that_succeed_since_the_row_began_contradict_it() -> None:
    assert failed(0.0, 1.0).is_contradicted_by(succeeded(0.9))


def test_a_success_that_may_be_older_than_the_row_does_not_contradict_it() -> None:
    assert not failed(0.0, 1.0).is_contradicted_by(succeeded(0.4))


def test_a_success_of_some_time_ago_does_not_contradict_a_row_that_goes_on() -> None:
    assert not failed(0.0, 10.0).is_contradicted_by(succeeded(4.0))


def test_others_that_fail_too_do_not_contradict_a_row() -> None:
    others = succeeded(0.9)
    others.record_fault(0.95)
    assert not failed(0.0, 1.0).is_contradicted_by(others)


def test_a_success_of_one_of_the_others_does_not_end_the_row_of_another_one() -> None:
    others = failed(0.0)
    others.record_success(1.0)
    assert not others.is_empty


def test_a_success_of_the_same_process_ends_its_row() -> None:
    row = failed(0.0)
    row.end(0.1)
    assert row.is_empty
