"""Sagas on a supervisor: all effects, none, or parked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Priority, Retry, Task, TaskStatus, clock
from forebay.context import call_priority, running_task
from forebay.errors import (
    InvalidHandler,
    InvalidSaga,
    InvalidSetting,
    Overloaded,
    SagaCompensated,
    SagaParked,
    StepFailed,
    StoreUnavailable,
    TaskFailed,
)
from forebay.events import Event, SagaChanged
from forebay.overflow import encode_result, encode_task
from forebay.saga import Done, MemorySagaLog, NothingDone, Saga, SagaRun, SagaState, saga
from forebay.saga import records as entries
from forebay.saga.records import UNFINISHED, Entry, LogWrite, SagaHeader, SagaHistory, decode_entries, encode_entry


class Effects:
    """The effects of steps, by key, as a server has them that honours keys; and what was called, in order."""

    def __init__(self) -> None:
        self.there: dict[str, Any] = {}
        self.calls: list[str] = []

    def does(self, name: str, *, raises: BaseException | None = None, seconds: float = 0.0) -> Callable[..., Any]:
        """Return a step that has the effect `name`, and raises after that."""

        async def step(*_: Any, key: str) -> str:
            self.calls.append(name)
            self.there[key] = name
            await asyncio.sleep(seconds)
            if raises is not None:
                raise raises
            return f"{name} done"

        return step

    def undoes(self, name: str, *, raises: list[BaseException] | None = None) -> Callable[..., Any]:
        """Return the compensation of a step."""

        async def undo(output: Any, *, key: str) -> None:
            self.calls.append(f"undo {name}" if output is not None else f"undo {name} by key")
            if raises:
                raise raises.pop(0)
            self.there.pop(key, None)

        return undo

    @property
    def left(self) -> list[str]:
        """The effects that are there."""
        return sorted(self.there.values())


@pytest.fixture
def effects() -> Effects:
    return Effects()


@pytest.fixture
def log() -> MemorySagaLog:
    return MemorySagaLog()


def supervisor_of(log: MemorySagaLog | str, *sagas: Saga, **settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None, **settings)
    for each in sagas:
        supervisor.register_worker(each.name, handler=each, task_types=[each.name], max_concurrent=2)
    return supervisor


async def history_of(log: MemorySagaLog, saga_id: str) -> SagaHistory:
    stored = await log.get(saga_id)
    assert stored is not None
    return SagaHistory(saga_id, decode_entries(saga_id, stored.entries))


async def left_by_a_lost_process(log: MemorySagaLog, name: str, *written: Entry, version: str = "") -> str:
    """Put a saga into the log as a process leaves it that is lost after `written`."""
    task = Task(name, "payload", task_id="lost")
    header = SagaHeader(
        saga_id="lost",
        name=name,
        version=version,
        envelope=encode_task(task, task.payload, bound=1_000),
        submission=clock.wall_time(),
    )
    now = clock.wall_time()
    await log.begin(header, b"", fence="lost", until=now, now=now)
    history = SagaHistory("lost", written)
    write = LogWrite(0, [encode_entry(each) for each in written], history.state, history.why)
    assert await log.append("lost", write, fence="lost", now=now)
    return "lost"


def started(step: str, *, compensable: bool = False, pivot: bool = False) -> Entry:
    return entries.StartedEntry(at=0.0, step=step, function="f", compensable=compensable, pivot=pivot)


def done(step: str) -> Entry:
    return entries.DoneEntry(at=0.0, step=step, output=encode_result(f"{step} done", task_id=step, bound=1_000))


def two_steps(effects: Effects, last: Callable[..., Any] | None = None, **options: Any) -> Saga:
    """Return a saga of a step that can be undone and another one."""

    @saga("publish")
    async def publish(run: SagaRun, payload: str) -> str:
        first = await run.step("a", effects.does("a"), payload, compensate=effects.undoes("a"))
        second: str = await run.step("b", last or effects.does("b"), first, **options)
        return second

    return publish


# --- forwards --------------------------------------------------------------------------------------------------------


@virtual
async def test_a_saga_returns_what_its_function_returns_and_each_step_has_a_key(
    effects: Effects, log: MemorySagaLog
) -> None:
    async with supervisor_of(log, two_steps(effects)) as supervisor:
        assert await supervisor.run(Task("publish", "p", task_id="t")) == "b done"
    assert effects.there == {"t/1/a": "a", "t/1/b": "b"}
    assert (await history_of(log, "t")).state is SagaState.DONE


@virtual
async def test_a_finished_saga_submitted_again_under_its_key_does_nothing(effects: Effects, log: MemorySagaLog) -> None:
    for _ in range(2):
        async with supervisor_of(log, two_steps(effects)) as supervisor:
            assert await supervisor.run(Task("publish", "p", key="order 1")) == "b done"
    assert effects.calls == ["a", "b"]


@virtual
async def test_a_plain_function_and_one_without_key_can_be_steps(log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, payload: int) -> int:
        value: int = await run.step("plus", lambda number: number + 1, payload)
        return await run.step("list", sum, [value, 1])  # type: ignore[no-any-return]

    async with supervisor_of(log, function) as supervisor:
        assert await supervisor.run(Task("s", 1)) == 3


@virtual
async def test_steps_run_side_by_side(effects: Effects, log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> list[str]:
        return list(await asyncio.gather(*(run.step(f"s{n}", effects.does(f"s{n}", seconds=1.0)) for n in range(5))))

    async with supervisor_of(log, function) as supervisor:
        begin = clock.now()
        assert await supervisor.run(Task("s", None)) == [f"s{n} done" for n in range(5)]
        assert clock.now() - begin < 2.0


@virtual
async def test_a_step_is_tried_again_under_its_key(log: MemorySagaLog) -> None:
    keys = []

    async def flaky(*, key: str) -> str:
        keys.append(key)
        if len(keys) < 3:
            raise ConnectionError
        return "ok"

    @saga("s")
    async def function(run: SagaRun, _: Any) -> Any:
        return await run.step("flaky", flaky, retry=Retry(max_attempts=3))

    async with supervisor_of(log, function) as supervisor:
        assert await supervisor.run(Task("s", None, task_id="t")) == "ok"
    assert keys == ["t/1/flaky"] * 3


# --- backwards -------------------------------------------------------------------------------------------------------


@virtual
async def test_a_saga_whose_step_fails_is_undone_in_reverse_order(effects: Effects, log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        for name in "abc":
            await run.step(name, effects.does(name), compensate=effects.undoes(name))
        await run.step("d", effects.does("d", raises=ValueError("no")), compensate=effects.undoes("d"))

    async with supervisor_of(log, function) as supervisor:
        with pytest.raises(TaskFailed, match=r"SagaCompensated.*ValueError: no") as caught:
            await supervisor.run(Task("s", None, task_id="t"))
    assert isinstance(caught.value.__cause__, SagaCompensated)
    assert effects.left == []
    assert effects.calls == ["a", "b", "c", "d", "undo d by key", "undo c", "undo b", "undo a"]
    assert (await history_of(log, "t")).state is SagaState.COMPENSATED


@virtual
async def test_a_step_that_says_that_nothing_was_done_is_not_undone(effects: Effects, log: MemorySagaLog) -> None:
    last = effects.does("b", raises=NothingDone("declined"))
    async with supervisor_of(log, two_steps(effects, last, compensate=effects.undoes("b"))) as supervisor:
        with pytest.raises(TaskFailed, match="declined"):
            await supervisor.run(Task("publish", "p"))
    assert effects.calls == ["a", "b", "undo a"]


@virtual
async def test_the_function_may_go_on_after_a_failed_step_which_is_undone_by_then(
    effects: Effects, log: MemorySagaLog
) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> Any:
        try:
            await run.step("a", effects.does("a", raises=ValueError()), compensate=effects.undoes("a"))
        except StepFailed:
            assert effects.left == []
        return await run.step("b", effects.does("b"))

    async with supervisor_of(log, function) as supervisor:
        assert await supervisor.run(Task("s", None)) == "b done"


@virtual
async def test_a_timeout_of_the_function_itself_undoes_the_step(effects: Effects, log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> Any:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await run.step("slow", effects.does("slow", seconds=9.0), compensate=effects.undoes("slow"))
        assert effects.left == []
        return await run.step("b", effects.does("b"))

    async with supervisor_of(log, function) as supervisor:
        assert await supervisor.run(Task("s", None)) == "b done"


@virtual
async def test_when_one_of_several_steps_fails_the_others_are_stopped_and_undone(
    effects: Effects, log: MemorySagaLog
) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await asyncio.gather(
            run.step("quick", effects.does("quick"), compensate=effects.undoes("quick")),
            run.step("slow", effects.does("slow", seconds=99.0), compensate=effects.undoes("slow")),
            run.step("bad", effects.does("bad", seconds=1.0, raises=ValueError())),
        )

    async with supervisor_of(log, function) as supervisor:
        begin = clock.now()
        with pytest.raises(TaskFailed, match="SagaCompensated"):
            await supervisor.run(Task("s", None))
        assert clock.now() - begin < 2.0
    assert effects.left == ["bad"]  # which has nothing that undoes it
    assert effects.calls[3:] == ["undo slow by key", "undo quick"]


@virtual
@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_a_saga_that_is_cut_off_is_undone_though_its_task_has_ended(
    effects: Effects, log: MemorySagaLog, how: str
) -> None:
    slow = effects.does("b", seconds=100.0)
    async with supervisor_of(log, two_steps(effects, slow, compensate=effects.undoes("b"))) as supervisor:
        ticket = await supervisor.submit(Task("publish", "p", task_id="t", timeout=5.0))
        if how == "cancel":
            await asyncio.sleep(1.0)
            ticket.cancel()
        result = await ticket
        assert result.status is {"timeout": TaskStatus.TIMED_OUT, "cancel": TaskStatus.CANCELLED}[how]
    assert effects.left == []
    assert effects.calls == ["a", "b", "undo b by key", "undo a"]
    assert (await history_of(log, "t")).state is SagaState.COMPENSATED


@virtual
async def test_no_timeout_cuts_off_a_compensation(effects: Effects, log: MemorySagaLog) -> None:
    async def undo(_: Any) -> None:
        await asyncio.sleep(60.0)
        effects.calls.append("undone")

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=undo)
        raise ValueError

    async with supervisor_of(log, function) as supervisor:
        ticket = await supervisor.submit(Task("s", None, timeout=5.0))
        assert (await ticket).status is TaskStatus.TIMED_OUT
        await asyncio.sleep(0.1)
        assert supervisor.workers["s"].current_tasks == 0
    assert effects.calls == ["a", "undone"]


@virtual
async def test_a_compensation_that_fails_is_tried_again_then_the_saga_is_parked(
    effects: Effects, log: MemorySagaLog
) -> None:
    failures: list[BaseException] = [ValueError("not now")] * 12

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a", raises=failures))
        raise RuntimeError("bad")

    async with supervisor_of(log, function) as supervisor:
        with pytest.raises(TaskFailed, match=r"SagaParked.*step 'a' has failed 10 times.*not now") as caught:
            await supervisor.run(Task("s", None, task_id="t", timeout=3_000.0))
    assert isinstance(caught.value.__cause__, SagaParked)
    assert effects.left == ["a"]
    assert (await history_of(log, "t")).state is SagaState.PARKED


@virtual
async def test_a_saga_that_was_undone_may_be_submitted_again_with_new_keys(
    effects: Effects, log: MemorySagaLog
) -> None:
    failing = [ValueError()]

    async def last(_: str, *, key: str) -> str:
        effects.calls.append(key)
        if failing:
            raise failing.pop()
        return "ok"

    async with supervisor_of(log, two_steps(effects, last)) as supervisor:
        with pytest.raises(TaskFailed):
            await supervisor.run(Task("publish", "p", key="k"))
        assert await supervisor.run(Task("publish", "p", key="k")) == "ok"
    assert effects.calls == ["a", "k/1/b", "undo a", "a", "k/2/b"]
    assert effects.there == {"k/2/a": "a"}


# --- the pivot -------------------------------------------------------------------------------------------------------


@virtual
async def test_a_pivot_that_fails_leads_back(effects: Effects, log: MemorySagaLog) -> None:
    last = effects.does("b", raises=ValueError("declined"))
    async with supervisor_of(log, two_steps(effects, last, pivot=True)) as supervisor:
        with pytest.raises(TaskFailed, match="SagaCompensated"):
            await supervisor.run(Task("publish", "p"))
    assert effects.calls == ["a", "b", "undo a"]


@virtual
async def test_a_pivot_without_an_answer_is_parked(effects: Effects, log: MemorySagaLog) -> None:
    last = effects.does("b", raises=ConnectionResetError())
    async with supervisor_of(log, two_steps(effects, last, pivot=True)) as supervisor:
        with pytest.raises(TaskFailed, match=r"SagaParked.*step 'b'.*leaves open"):
            await supervisor.run(Task("publish", "p"))
    assert effects.calls == ["a", "b"]


@virtual
@pytest.mark.parametrize("pivot", [True, False])
async def test_an_idempotent_step_without_an_answer_is_repeated(
    effects: Effects, log: MemorySagaLog, *, pivot: bool
) -> None:
    failures = [TimeoutError(), ConnectionResetError()]

    async def last(_: str) -> str:
        if failures:
            raise failures.pop()
        return "ok"

    async with supervisor_of(log, two_steps(effects, last, pivot=pivot, idempotent=True)) as supervisor:
        assert await supervisor.run(Task("publish", "p")) == "ok"


@virtual
async def test_what_a_check_has_found_and_the_log_cannot_hold_parks_the_saga(
    effects: Effects, log: MemorySagaLog
) -> None:
    last = effects.does("b", raises=TimeoutError())
    async with supervisor_of(log, two_steps(effects, last, pivot=True, check=lambda: Done(object()))) as supervisor:
        with pytest.raises(TaskFailed, match=r"SagaParked.*cannot be stored"):
            await supervisor.run(Task("publish", "p"))


@virtual
@pytest.mark.parametrize("found", [Done("found"), None])
async def test_a_check_says_how_a_pivot_without_an_answer_has_ended(
    effects: Effects, log: MemorySagaLog, found: Done | None
) -> None:
    async def check(*, key: str) -> Done | None:
        assert key.endswith("/b")
        return found

    last = effects.does("b", raises=TimeoutError())
    async with supervisor_of(log, two_steps(effects, last, pivot=True, check=check)) as supervisor:
        if found is not None:
            assert await supervisor.run(Task("publish", "p")) == "found"
            assert effects.left == ["a", "b"]
        else:
            with pytest.raises(TaskFailed, match="SagaCompensated"):
                await supervisor.run(Task("publish", "p"))
            assert effects.left == ["b"]  # which the check denies


def cut_off_after_its_pivot(effects: Effects, seconds: float) -> Saga:
    """Return a saga whose last step, after the pivot, takes so long."""

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a"))
        await run.step("p", effects.does("p"), pivot=True)
        await run.step("after", effects.does("after", seconds=seconds), idempotent=True)

    return function


@virtual
async def test_a_saga_cut_off_after_its_pivot_gets_more_time_to_end(effects: Effects, log: MemorySagaLog) -> None:
    async with supervisor_of(log, cut_off_after_its_pivot(effects, 12.0)) as supervisor:
        result = await (await supervisor.submit(Task("s", None, task_id="t", timeout=5.0)))
        assert result.status is TaskStatus.TIMED_OUT
        assert (await ended(log, "t")).state is SagaState.DONE
    assert effects.calls == ["a", "p", "after", "after", "after"]


@virtual
async def test_a_saga_that_hangs_after_its_pivot_is_parked(effects: Effects, log: MemorySagaLog) -> None:
    async with supervisor_of(log, cut_off_after_its_pivot(effects, 9e9)) as supervisor:
        await (await supervisor.submit(Task("s", None, task_id="t", timeout=5.0)))
        history = await ended(log, "t")
    assert history.state is SagaState.PARKED
    assert history.why == "after its pivot it ran out of time 4 times in a row, the last time after 40 s"
    assert effects.left == ["a", "after", "p"]


@virtual
async def test_a_step_after_the_pivot_is_tried_again_until_it_succeeds(effects: Effects, log: MemorySagaLog) -> None:
    failures = [ValueError()] * 4

    async def after() -> str:
        if failures:
            raise failures.pop()
        return "ok"

    @saga("s")
    async def function(run: SagaRun, _: Any) -> Any:
        await run.step("p", effects.does("p"), pivot=True)
        return await run.step("after", after, idempotent=True)

    async with supervisor_of(log, function) as supervisor:
        assert await supervisor.run(Task("s", None)) == "ok"


@virtual
async def test_a_step_that_fails_for_good_after_the_pivot_parks_the_saga(effects: Effects, log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a"))
        await run.step("p", effects.does("p"), pivot=True)
        await run.step("after", effects.does("after", raises=ValueError("no")))

    async with supervisor_of(log, function) as supervisor:
        with pytest.raises(TaskFailed, match=r"SagaParked.*'after' failed after the pivot"):
            await supervisor.run(Task("s", None))
    assert effects.left == ["a", "after", "p"]


# --- what a lost process has left ------------------------------------------------------------------------------------


async def ended(log: MemorySagaLog, saga_id: str) -> SagaHistory:
    """Return the history of a saga once nobody drives it any more."""
    async with asyncio.timeout(600.0):
        while (history := await history_of(log, saga_id)).state in UNFINISHED:  # noqa: ASYNC110 - a log has no events
            await asyncio.sleep(0.1)
    return history


@virtual
async def test_a_saga_that_was_left_goes_on_and_its_finished_steps_are_not_called_again(
    effects: Effects, log: MemorySagaLog
) -> None:
    await left_by_a_lost_process(log, "publish", started("a", compensable=True), done("a"))
    async with supervisor_of(log, two_steps(effects)):
        assert (await ended(log, "lost")).state is SagaState.DONE
    assert effects.calls == ["b"]


@virtual
async def test_a_step_whose_outcome_is_unknown_parks_the_saga(effects: Effects, log: MemorySagaLog) -> None:
    await left_by_a_lost_process(log, "publish", started("a", compensable=True), done("a"), started("b"))
    async with supervisor_of(log, two_steps(effects)):
        history = await ended(log, "lost")
    assert history.state is SagaState.PARKED
    assert "step 'b' was begun, and its outcome is unknown. Find out by its key 'lost/1/b'" in history.why
    assert effects.calls == []


@virtual
async def test_a_step_whose_outcome_is_unknown_is_repeated_if_it_may_be(effects: Effects, log: MemorySagaLog) -> None:
    await left_by_a_lost_process(log, "publish", started("a", compensable=True), done("a"), started("b"))
    async with supervisor_of(log, two_steps(effects, idempotent=True)):
        assert (await ended(log, "lost")).state is SagaState.DONE
    assert effects.calls == ["b"]


@virtual
@pytest.mark.parametrize("found", [Done("found"), None])
async def test_a_step_whose_outcome_is_unknown_is_looked_up_by_its_check(
    effects: Effects, log: MemorySagaLog, found: Done | None
) -> None:
    await left_by_a_lost_process(log, "publish", started("a", compensable=True), done("a"), started("b"))
    async with supervisor_of(log, two_steps(effects, check=lambda: found)):
        assert (await ended(log, "lost")).state is SagaState.DONE
    assert effects.calls == ([] if found else ["b"])


@virtual
async def test_compensations_that_were_left_go_on(effects: Effects, log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        for name in "abc":
            await run.step(name, effects.does(name), compensate=effects.undoes(name))
        await run.step("d", effects.does("d"))

    await left_by_a_lost_process(
        log,
        "s",
        *(entry for name in "abc" for entry in (started(name, compensable=True), done(name))),
        started("d"),
        entries.FailedEntry(at=0.0, step="d", error_type="ValueError", error="ValueError", clean=True),
        entries.CompensatingEntry(at=0.0, error_type="StepFailed", error="d failed"),
        entries.UndoneEntry(at=0.0, step="c"),
    )
    async with supervisor_of(log, function):
        assert (await ended(log, "lost")).state is SagaState.COMPENSATED
    assert effects.calls == ["undo b", "undo a"]


@virtual
async def test_a_saga_whose_code_has_changed_is_parked(effects: Effects, log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("other", effects.does("other"))

    await left_by_a_lost_process(log, "s", started("a", compensable=True), done("a"))
    async with supervisor_of(log, function):
        history = await ended(log, "lost")
    assert history.state is SagaState.PARKED
    assert "asks for step 'other' where its log has step 'a'. Its code has changed" in history.why
    assert effects.calls == []


@virtual
@pytest.mark.parametrize(
    ("written", "why"),
    [
        ([started("a"), done("a")], "without a compensation, and is asked for with it"),
        (
            [started("a", compensable=True), done("a"), started("b"), done("b"), started("c"), done("c")],
            "without step 'c'",
        ),
        ([started("a", compensable=True), done("a"), started("b", pivot=True)], "with pivot=True"),
    ],
)
async def test_a_replay_that_differs_from_the_log_says_so(
    effects: Effects, log: MemorySagaLog, written: list[Entry], why: str
) -> None:
    await left_by_a_lost_process(log, "publish", *written)
    async with supervisor_of(log, two_steps(effects)):
        history = await ended(log, "lost")
    assert history.state is SagaState.PARKED
    assert why in history.why


@virtual
async def test_a_saga_of_another_version_is_parked(effects: Effects, log: MemorySagaLog) -> None:
    await left_by_a_lost_process(log, "publish", version="1")
    async with supervisor_of(log, two_steps(effects)):
        history = await ended(log, "lost")
    assert "it began under version '1' of its code, and this is version ''" in history.why


@virtual
async def test_a_saga_that_loses_its_process_again_and_again_is_parked(effects: Effects, log: MemorySagaLog) -> None:
    await left_by_a_lost_process(log, "publish", started("a", compensable=True))
    for number in range(4):
        now = clock.wall_time()
        assert await log.claim(["publish"], limit=1, fence=f"lost {number}", until=now, now=now)
    async with supervisor_of(log, two_steps(effects)):
        history = await ended(log, "lost")
    assert "its process was lost 5 times in a row, during step 'a'" in history.why


@virtual
async def test_parallel_branches_of_different_speed_are_replayed(effects: Effects, log: MemorySagaLog) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> Any:
        async def branch(name: str, seconds: float) -> Any:
            await run.step(f"{name}1", effects.does(f"{name}1"))
            await asyncio.sleep(seconds)
            return await run.step(f"{name}2", effects.does(f"{name}2"))

        return list(await asyncio.gather(branch("slow", 2.0), branch("quick", 0.0)))

    written = (started("slow1"), started("quick1"), done("slow1"), done("quick1"), started("slow2"), done("slow2"))
    await left_by_a_lost_process(log, "s", *written)
    async with supervisor_of(log, function):
        assert (await ended(log, "lost")).state is SagaState.DONE
    assert effects.calls == ["quick2"]


# --- a supervisor that stops -----------------------------------------------------------------------------------------


@virtual
async def test_a_saga_that_is_running_when_its_supervisor_closes_goes_on_in_the_next(
    effects: Effects, log: MemorySagaLog
) -> None:
    slow = effects.does("b", seconds=50.0)
    supervisor = supervisor_of(log, two_steps(effects, slow, idempotent=True))
    await supervisor.start()
    await supervisor.submit(Task("publish", "p", task_id="t"))
    await asyncio.sleep(1.0)
    await supervisor.drain(timeout=2.0)
    await supervisor.close()
    assert (await history_of(log, "t")).state is SagaState.RUNNING
    begin = clock.now()
    async with supervisor_of(log, two_steps(effects, slow, idempotent=True)):
        assert (await ended(log, "t")).state is SagaState.DONE
        assert clock.now() - begin < 60.0  # it was released: nobody waited for its lease to expire
    assert effects.calls == ["a", "b", "b"]


@virtual
async def test_draining_does_not_wait_for_a_step_that_does_not_end(effects: Effects, log: MemorySagaLog) -> None:
    forever = asyncio.Event()

    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await forever.wait()
                return

    async with supervisor_of(log, two_steps(effects, lambda _: stubborn())) as supervisor:
        await (await supervisor.submit(Task("publish", "p", task_id="t", timeout=5.0)))
        begin = clock.now()
    assert clock.now() - begin < 30.0
    assert (await history_of(log, "t")).state is SagaState.RUNNING
    forever.set()
    await asyncio.sleep(1.0)


@virtual
async def test_the_sagas_of_a_worker_that_was_unregistered_are_left_to_others(
    effects: Effects, log: MemorySagaLog
) -> None:
    async with supervisor_of(log, two_steps(effects)) as supervisor:
        await supervisor.unregister_worker("publish")
        await left_by_a_lost_process(log, "publish")
        await asyncio.sleep(100.0)
        stored = await log.get("lost")
        assert stored is not None
        assert (stored.holder, stored.header.claims) == ("lost", 0)
        supervisor.register_worker("late", handler=two_steps(effects), task_types=["publish"])
        assert (await ended(log, "lost")).state is SagaState.DONE


# --- what compensations may rely on ----------------------------------------------------------------------------------


@virtual
async def test_a_compensation_passes_a_full_supervisor_and_a_drain(effects: Effects, log: MemorySagaLog) -> None:
    supervisor = supervisor_of(log, max_queue_size=1)
    seen: list[tuple[Priority, object]] = []

    @supervisor.worker("other")
    async def other(task: Task) -> str:
        seen.append((task.priority, running_task().deadline))  # type: ignore[union-attr]
        await asyncio.sleep(20.0)
        return "ok"

    async def undo(_: Any) -> None:
        running = running_task()
        assert running is not None
        assert (call_priority(running), running.deadline) == (Priority.CRITICAL, None)
        assert await supervisor.run(Task("other", "from undo")) == "ok"
        effects.calls.append("undone")

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=undo)
        await asyncio.sleep(1.0)
        raise ValueError

    supervisor.register_worker("s", handler=function, task_types=["s"])
    async with supervisor:
        ticket = await supervisor.submit(Task("s", None, timeout=10.0))
        blockers = [await supervisor.submit(Task("other", n)) for n in range(5)]
        assert not blockers[-1]
        await ticket
        await supervisor.drain()
    assert effects.calls == ["a", "undone"]
    assert seen[1] == (Priority.CRITICAL, None)


@virtual
async def test_calls_of_a_saga_that_has_begun_are_at_least_high(log: MemorySagaLog) -> None:
    seen = []

    async def step() -> None:
        seen.append(call_priority(running_task()))

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", step)

    async with supervisor_of(log, function) as supervisor:
        for priority in (Priority.LOW, Priority.CRITICAL):
            await supervisor.run(Task("s", None, priority=priority))
    assert seen == [Priority.HIGH, Priority.CRITICAL]


@virtual
async def test_a_compensation_that_is_rejected_for_load_waits_as_often_as_it_takes(
    effects: Effects, log: MemorySagaLog
) -> None:
    rejected: list[BaseException] = [Overloaded("its breaker is open", limited_by="breaker", load=1.0, retry_after=9.0)]

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a", raises=30 * rejected))
        raise ValueError

    async with supervisor_of(log, function) as supervisor:
        with pytest.raises(TaskFailed, match="SagaCompensated"):
            await supervisor.run(Task("s", None, timeout=1_000.0))
        assert clock.now() == pytest.approx(270.0, abs=5.0)
    assert effects.left == []


@virtual
async def test_what_becomes_of_sagas_is_an_event(effects: Effects, log: MemorySagaLog) -> None:
    seen: list[tuple[str, str, str]] = []

    def sink(event: Event) -> None:
        if isinstance(event, SagaChanged):
            seen.append((event.saga_id, event.state, event.why))

    async def last(_: str) -> None:
        raise {"bad": ValueError, "open": TimeoutError}[current]("x")

    current = "bad"
    async with supervisor_of(log, two_steps(effects, last, pivot=True), on_event=sink) as supervisor:
        for current in ("bad", "open"):
            with pytest.raises(TaskFailed):
                await supervisor.run(Task("publish", "p", task_id=current))
    assert [each[:2] for each in seen] == [("bad", "compensating"), ("bad", "compensated"), ("open", "parked")]
    assert all(why for *_, why in seen)


# --- the log --------------------------------------------------------------------------------------------------------


class SwitchedLog(MemorySagaLog):
    """A log that is away while `away` is set."""

    away = False

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        if self.away:
            raise StoreUnavailable(where="the log", why="it is away", advice="Start it.")
        return await super().append(saga_id, write, fence=fence, now=now)

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        if self.away:
            raise StoreUnavailable(where="the log", why="it is away", advice="Start it.")
        return await super().renew(holders, until=until)


@virtual
async def test_no_step_begins_before_the_log_has_it(effects: Effects) -> None:
    log = SwitchedLog()
    async with supervisor_of(log, two_steps(effects)) as supervisor:
        log.away = True
        ticket = await supervisor.submit(Task("publish", "p"))
        await asyncio.sleep(10.0)
        assert effects.calls == []
        log.away = False
        assert (await ticket).result == "b done"


@virtual
async def test_a_saga_whose_log_is_away_for_long_goes_on_later(effects: Effects) -> None:
    log = SwitchedLog()
    async with supervisor_of(log, two_steps(effects), lease=10.0) as supervisor:
        log.away = True
        with pytest.raises(TaskFailed, match="StoreUnavailable: The store at the log cannot be used"):
            await supervisor.run(Task("publish", "p", task_id="t"))
        log.away = False
        assert (await ended(log, "t")).state is SagaState.DONE
    assert effects.calls == ["a", "b"]


@virtual
async def test_a_saga_that_another_process_has_taken_is_not_driven_here(effects: Effects, log: MemorySagaLog) -> None:
    async def taken(_: str) -> None:
        far = clock.wall_time() + 1_000.0
        assert await log.claim(["publish"], limit=1, fence="other", until=far + 1_000.0, now=far)

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a"))
        await run.step("pause", taken, "")
        await run.step("b", effects.does("b"))

    async with supervisor_of(log, publish) as supervisor:
        with pytest.raises(TaskFailed, match="SagaTaken"):
            await supervisor.run(Task("publish", "p", task_id="t"))
    assert effects.calls == ["a"]
    stored = await log.get("t")
    assert stored is not None
    assert stored.holder == "other"


@virtual
async def test_two_tasks_of_one_key_are_one_saga(effects: Effects, log: MemorySagaLog) -> None:
    slow = effects.does("b", seconds=5.0)
    async with supervisor_of(log, two_steps(effects, slow)) as one, supervisor_of(log, two_steps(effects, slow)) as two:
        values = await asyncio.gather(*(each.run(Task("publish", "p", key="k")) for each in (one, two)))
    assert values == ["b done", "b done"]
    assert effects.calls == ["a", "b"]


@virtual
async def test_a_task_that_waits_for_the_process_that_drives_its_saga_says_so_once(
    effects: Effects, log: MemorySagaLog, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "forebay")
    await left_by_a_lost_process(log, "publish", started("a", compensable=True))
    (taken,) = await log.claim(
        ["publish"], limit=1, fence="other", until=clock.wall_time() + 20.0, now=clock.wall_time()
    )
    assert taken.holder == "other"
    async with supervisor_of(log, two_steps(effects, idempotent=True)) as supervisor:
        ticket = await supervisor.submit(Task("publish", "p", task_id="t", key="lost"))
        await asyncio.sleep(8.0)
        assert await log.renew({"lost": "other"}, until=clock.wall_time() + 20.0) == []
        await ticket
    assert [record.getMessage() for record in caplog.records if "waits" in record.getMessage()] == [
        "task 't' waits: another process drives its saga 'lost', under a lease that ends in 20 s unless it is renewed"
    ]


@virtual
@pytest.mark.blocks
async def test_a_durable_task_goes_on_with_its_own_saga(effects: Effects, log: MemorySagaLog, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    slow = effects.does("b", seconds=50.0)
    for timeout in (5.0, None):
        supervisor = supervisor_of(log, two_steps(effects, slow, idempotent=True), overflow=url)
        await supervisor.start()
        if timeout is not None:
            await supervisor.submit(Task("publish", "p", task_id="t", durable=True))
            await asyncio.sleep(1.0)
        else:
            ticket = await supervisor.find("t")
            assert ticket is not None
            assert (await ticket).result == "b done"
        await supervisor.drain(timeout)
        await supervisor.close()
    assert effects.calls == ["a", "b", "b"]


@virtual
@pytest.mark.blocks
async def test_a_compensation_that_waits_is_left_when_its_supervisor_drains(effects: Effects, tmp_path: Path) -> None:
    failures: list[BaseException] = [ValueError()]
    url = f"sqlite:///{tmp_path}/saga.db"

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a", raises=failures))
        await asyncio.sleep(1.0)
        raise ValueError

    async with supervisor_of(url, function) as supervisor:
        ticket = await supervisor.submit(Task("s", None))
    assert (await ticket).status is TaskStatus.FAILED
    assert effects.left == ["a"]
    async with supervisor_of(url, function):
        await asyncio.sleep(5.0)
    assert effects.left == []


@virtual
async def test_who_joins_a_saga_that_is_undone_meanwhile_begins_no_new_round(
    effects: Effects, log: MemorySagaLog
) -> None:
    last = effects.does("b", seconds=5.0, raises=ValueError("no"))
    async with supervisor_of(log, two_steps(effects, last)) as one, supervisor_of(log, two_steps(effects, last)) as two:
        tickets = []
        for each in (one, two):
            tickets.append(await each.submit(Task("publish", "p", key="k")))
            await asyncio.sleep(0.1)
        errors = [(await ticket).error or "" for ticket in tickets]
    assert all("SagaCompensated" in error for error in errors)
    assert effects.calls == ["a", "b", "undo a"]


# --- people ---------------------------------------------------------------------------------------------------------


@virtual
async def test_a_parked_saga_that_is_retried_goes_on_at_once(effects: Effects, log: MemorySagaLog) -> None:
    failures: list[BaseException] = [ValueError()] * 10

    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a", raises=failures))
        raise ValueError

    async with supervisor_of(log, function) as supervisor:
        with pytest.raises(TaskFailed, match="SagaParked"):
            await supervisor.run(Task("s", None, task_id="t", timeout=3_000.0))
        [header] = await supervisor.sagas.list(SagaState.PARKED)
        await supervisor.sagas.retry(header.saga_id)
        await asyncio.sleep(1.0)
        assert (await history_of(log, "t")).state is SagaState.COMPENSATED
    assert effects.left == []


@virtual
async def test_a_supervisor_without_a_saga_log_says_so() -> None:
    async with BackpressureSupervisor() as supervisor:
        with pytest.raises(InvalidSetting, match="saga_log"):
            _ = supervisor.sagas


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_saga_needs_a_log() -> None:
    with pytest.raises(InvalidHandler, match="saga_log="):
        BackpressureSupervisor().register_worker("w", handler=two_steps(Effects()), task_types=["publish"])


def test_two_sagas_cannot_have_one_name(log: MemorySagaLog) -> None:
    supervisor = supervisor_of(log, two_steps(Effects()))
    with pytest.raises(InvalidHandler, match="another saga is named 'publish'"):
        supervisor.register_worker("w", handler=two_steps(Effects()), task_types=["other"])


def test_what_cannot_be_a_saga_says_what_is_needed() -> None:
    def plain(run: SagaRun, payload: Any) -> None: ...

    async def one(run: SagaRun) -> None: ...

    for function, why in ((plain, "must be an async function"), (one, r"called with \(run, payload\)")):
        with pytest.raises(InvalidSaga, match=why):
            saga("s")(function)  # type: ignore[arg-type]
    with pytest.raises(InvalidSaga, match="with a name"):
        saga(plain)  # type: ignore[arg-type]


@virtual
@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda run: run.step("", print), "its name must be"),
        (lambda run: run.step("a", None), "needs a function or an agent"),
        (lambda run: run.step("a", asyncio.sleep(0)), "a call that has begun"),
        (lambda run: run.step("a", print, compensate=3), "compensate= must be a function"),
        (lambda run: run.step("a", print, pivot=True, compensate=print), "the pivot, which is not undone"),
        (lambda run: run.step("a", print, retry=3), "retry= must be a Retry"),
    ],
)
async def test_an_invalid_step_fails_its_saga(
    log: MemorySagaLog, call: Callable[[SagaRun], Awaitable[Any]], why: str
) -> None:
    @saga("s")
    async def function(run: SagaRun, _: Any) -> None:
        await call(run)

    async with supervisor_of(log, function) as supervisor:
        with pytest.raises(TaskFailed, match=why):
            await supervisor.run(Task("s", None))


@virtual
async def test_the_names_of_steps_are_unique_and_there_is_one_pivot(log: MemorySagaLog, effects: Effects) -> None:
    @saga("twice")
    async def twice(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"))
        await run.step("a", effects.does("a"))

    @saga("pivots")
    async def pivots(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), pivot=True)
        await run.step("b", effects.does("b"), pivot=True)

    @saga("late")
    async def late(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), pivot=True)
        await run.step("b", effects.does("b"), compensate=effects.undoes("b"))

    async with supervisor_of(log, twice, pivots, late) as supervisor:
        for name, why in (
            ("twice", "give each its own"),
            ("pivots", "one at most"),
            ("late", "nothing is undone after"),
        ):
            with pytest.raises(TaskFailed, match=why):
                await supervisor.run(Task(name, None))
