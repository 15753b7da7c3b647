"""SagaHistory: the state of a saga and of its steps that the entries of its log add up to."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.saga import SagaState
from forebay.saga.records import (
    CompensatedEntry,
    CompensatingEntry,
    DoneEntry,
    Entry,
    FailedEntry,
    FinishedEntry,
    LogDamaged,
    ParkedEntry,
    ResolvedEntry,
    RestartedEntry,
    RetriedEntry,
    SagaHistory,
    StartedEntry,
    StepState,
    UndoFailedEntry,
    UndoneEntry,
    decode_entries,
    encode_entry,
)


def started(step: str, *, compensable: bool = True, pivot: bool = False) -> StartedEntry:
    return StartedEntry(at=1.0, step=step, function="f", compensable=compensable, pivot=pivot)


def done(step: str, output: bytes = b"output") -> DoneEntry:
    return DoneEntry(at=1.0, step=step, output=output)


def failed(step: str, *, clean: bool = False) -> FailedEntry:
    return FailedEntry(at=1.0, step=step, error_type="ValueError", error="ValueError: no", clean=clean)


def undone(step: str) -> UndoneEntry:
    return UndoneEntry(at=1.0, step=step)


def undo_failed(step: str, error: str = "no") -> UndoFailedEntry:
    return UndoFailedEntry(at=1.0, step=step, error=error)


PARKED = ParkedEntry(at=1.0, why="look at it", step="a")
RETRIED = RetriedEntry(at=1.0)
GOES_BACK = CompensatingEntry(at=1.0, error_type="StepFailed", error="no")
COMPENSATED = CompensatedEntry(at=1.0)
FINISHED = FinishedEntry(at=1.0, result=b"result")
RESOLVED = ResolvedEntry(at=1.0, note="by hand")
RESTARTED = RestartedEntry(at=1.0)

ONE_OF_EACH: list[Entry] = [
    started("a"),
    done("a"),
    failed("a"),
    undone("a"),
    undo_failed("a"),
    PARKED,
    RETRIED,
    GOES_BACK,
    COMPENSATED,
    FINISHED,
    RESOLVED,
    RESTARTED,
]


def history(*entries: Entry) -> SagaHistory:
    return SagaHistory("s", entries)


def names(found: SagaHistory) -> list[str]:
    return [step.name for step in found.to_undo()]


# --- the saga --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "state"),
    [
        ([], SagaState.RUNNING),
        ([started("a"), done("a")], SagaState.RUNNING),
        ([started("a"), failed("a"), undone("a")], SagaState.RUNNING),  # its function may go on
        ([started("a"), undo_failed("a")], SagaState.RUNNING),
        ([FINISHED], SagaState.DONE),
        ([PARKED], SagaState.PARKED),
        ([PARKED, RETRIED], SagaState.RUNNING),
        ([GOES_BACK], SagaState.COMPENSATING),
        ([GOES_BACK, COMPENSATED], SagaState.COMPENSATED),
        ([GOES_BACK, PARKED], SagaState.PARKED),
        ([GOES_BACK, PARKED, RETRIED], SagaState.COMPENSATING),
        ([PARKED, RESOLVED], SagaState.RESOLVED),
        ([PARKED, RESOLVED, RESTARTED], SagaState.RUNNING),
        ([GOES_BACK, COMPENSATED, RESTARTED], SagaState.RUNNING),
        ([GOES_BACK, COMPENSATED, RESTARTED, PARKED, RETRIED], SagaState.RUNNING),
        ([GOES_BACK, COMPENSATED, RESTARTED, FINISHED], SagaState.DONE),
    ],
)
def test_the_last_entry_that_says_so_decides_the_state(entries: list[Entry], state: SagaState) -> None:
    assert history(*entries).state is state


def test_a_saga_that_is_parked_says_why_until_it_goes_on() -> None:
    found = history(GOES_BACK, PARKED)
    assert (found.why, found.error_type, found.error, found.goes_back) == ("look at it", "StepFailed", "no", True)
    found.add(RETRIED)
    assert (found.why, found.error, found.goes_back) == ("", "no", True)
    assert not history(PARKED, RETRIED).goes_back


def test_a_saga_that_has_finished_has_a_result() -> None:
    assert history().result is None
    assert history(FINISHED).result == b"result"


def test_a_restart_begins_with_nothing_but_another_round() -> None:
    found = history(started("a"), started("b"), done("a"), GOES_BACK, PARKED, RETRIED, undone("a"), COMPENSATED)
    found.add(RESTARTED)
    assert (found.round, found.count) == (2, 9)
    assert (found.steps, found.result, found.why, found.error, found.overlapped) == ({}, None, "", "", False)
    assert (found.goes_back, found.pivot, found.to_undo(), found.unknown) == (False, None, [], [])
    found.add(started("a"))
    assert found.steps["a"].key == "s/2/a"


@given(st.lists(st.sampled_from(ONE_OF_EACH)))
def test_a_history_read_from_the_log_is_that_of_the_process_that_wrote_it(entries: list[Entry]) -> None:
    live, written = SagaHistory("s"), []
    for entry in entries:
        try:
            live.add(entry)
        except LogDamaged:  # an end without a start, which no process writes
            live.count -= 1
            continue
        written.append(encode_entry(entry, writer="fence"))
    read = SagaHistory("s", decode_entries("s", written))
    assert vars(read) == vars(live)


# --- its steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "state"),
    [
        ([], StepState.STARTED),
        ([done("a")], StepState.DONE),
        ([failed("a")], StepState.FAILED),
        ([failed("a", clean=True)], StepState.NOT_DONE),
        ([failed("a"), undone("a")], StepState.UNDONE),
        ([done("a"), undone("a")], StepState.UNDONE),
        ([done("a"), undo_failed("a")], StepState.DONE),
        ([undo_failed("a")], StepState.STARTED),
        ([failed("a"), started("a")], StepState.STARTED),
        ([failed("a"), started("a"), done("a")], StepState.DONE),
    ],
)
def test_the_entries_of_a_step_decide_its_state(entries: list[Entry], state: StepState) -> None:
    found = history(started("b"), started("a"), *entries)
    assert found.steps["a"].state is state
    assert found.steps["b"].state is StepState.STARTED
    needs_undo = state in (StepState.STARTED, StepState.FAILED, StepState.DONE)
    assert found.steps["a"].needs_undo is needs_undo
    assert [step.name for step in found.unknown] == (["b", "a"] if state is StepState.STARTED else ["b"])


def test_a_step_that_cannot_be_undone_need_not_be() -> None:
    assert names(history(started("a", compensable=False), started("b", compensable=False), done("b"))) == []


def test_a_step_that_is_done_or_undone_since_has_no_error_of_before() -> None:
    assert (step := history(started("a"), failed("a"), done("a")).steps["a"]).error_type == step.error == ""
    step = history(started("a"), failed("a"), undo_failed("a"), undone("a")).steps["a"]
    assert (step.error, step.undo_error, step.undo_errors) == ("ValueError: no", "", 1)


def test_a_step_has_what_was_written_of_it() -> None:
    found = history(started("a"), failed("a"), undo_failed("a", "first"), undo_failed("a", "second")).steps["a"]
    assert (found.error_type, found.error) == ("ValueError", "ValueError: no")
    assert (found.undo_errors, found.undo_error, found.output) == (2, "second", None)
    kept = history(started("a"), done("a"), undone("a")).steps["a"]
    assert kept.output == b"output"


@pytest.mark.parametrize("entry", [done("a"), failed("a"), undone("a"), undo_failed("a")])
def test_an_end_of_a_step_without_its_start_is_damage(entry: Entry) -> None:
    with pytest.raises(LogDamaged, match="an end of step 'a', and no start"):
        history(started("b"), entry)
    with pytest.raises(LogDamaged, match="an end of step 'a', and no start"):
        history(started("a"), GOES_BACK, undone("a"), COMPENSATED, RESTARTED, entry)


@pytest.mark.parametrize("damaged", [b"", b"\x00", b"\x81", encode_entry(FINISHED)[:-3], b"\x81\xa5entry\xa5other"])
def test_what_is_no_entry_is_damage(damaged: bytes) -> None:
    with pytest.raises(LogDamaged, match="log of saga 's' cannot be read"):
        decode_entries("s", [encode_entry(FINISHED), damaged])


@pytest.mark.parametrize(
    ("entries", "order"),
    [
        ([started("a"), done("a"), started("b"), done("b")], ["b", "a"]),
        ([started("a"), started("b"), done("b"), done("a")], ["a", "b"]),  # by their ends
        ([started("a"), started("b"), done("b")], ["a", "b"]),  # what may have ended only now comes first
        ([started("a"), started("b"), started("c"), done("c")], ["b", "a", "c"]),
        ([started("a"), started("b"), done("b"), failed("a")], ["a", "b"]),
        ([started("a"), done("a"), started("b"), failed("b", clean=True)], ["a"]),
        ([started("a"), done("a"), started("b"), done("b"), GOES_BACK, undone("b")], ["a"]),
        ([started("a"), done("a"), started("b"), done("b"), GOES_BACK, undo_failed("b")], ["b", "a"]),
        ([started("a"), done("a"), started("x", compensable=False), done("x")], ["a"]),
    ],
)
def test_steps_are_undone_in_reverse_order_of_completion_and_unknown_ones_first(
    entries: list[Entry], order: list[str]
) -> None:
    assert names(history(*entries)) == order


def test_steps_that_were_in_progress_side_by_side_are_noticed() -> None:
    assert not history(started("a"), done("a"), started("b")).overlapped
    assert not history(started("a"), failed("a"), started("b")).overlapped
    assert history(started("a"), started("b"), done("a"), done("b")).overlapped


def test_the_pivot_is_passed_once_it_is_done() -> None:
    pivot: dict[str, Any] = {"compensable": False, "pivot": True}
    assert history(started("a"), done("a")).pivot is None
    for entries, past in (([], False), ([done("p")], True), ([failed("p", clean=True)], False)):
        found = history(started("a"), done("a"), started("p", **pivot), *entries)
        assert found.pivot is found.steps["p"]
        assert found.past_pivot is past


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_names_the_saga_the_round_and_the_step_and_is_never_long() -> None:
    found = history()
    assert found.key_of("a") == "s/1/a"
    long = {found.key_of("a" * 200), found.key_of("a" * 199 + "b"), SagaHistory("t").key_of("a" * 200)}
    assert {len(key) for key in long} == {64}
    assert len(long) == 3
    found.add(RESTARTED)
    assert found.key_of("a" * 200) not in long
    assert len(found.key_of("a" * 196)) == 200
