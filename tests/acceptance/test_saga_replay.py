"""Sagas whose process is lost after any entry of their log: in a replay their branches come to where they were."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Task, clock
from forebay.errors import StepFailed, TaskFailed, WrongLoop
from forebay.overflow import encode_result, encode_task
from forebay.saga import MemorySagaLog, Saga, SagaRun, SagaState, saga
from forebay.saga.records import (
    UNFINISHED,
    CompensatingEntry,
    CutOffEntry,
    DoneEntry,
    Entry,
    FailedEntry,
    LogWrite,
    SagaHeader,
    SagaHistory,
    StartedEntry,
    StepState,
    decode_entries,
    encode_entry,
)

Function = Callable[[SagaRun, "Effects"], Coroutine[Any, Any, Any]]


class Effects:
    """The effects of steps, by key, as a server has them that honours keys; and what was called, in order."""

    def __init__(self) -> None:
        self.there: dict[str, str] = {}
        self.calls: list[str] = []

    async def step(self, run: SagaRun, name: str, seconds: float = 0.1, **options: Any) -> str:
        """Ask for a step that has the effect `name`, and takes some time."""
        step = options.pop("step", None) or self.does(name, seconds)
        output: str = await run.step(name, step, compensate=self.undoes(name), idempotent=True, **options)
        return output

    def does(self, name: str, seconds: float, raises: Exception | None = None) -> Callable[..., Any]:
        async def step(*, key: str) -> str:
            self.calls.append(name)
            self.there[key] = name
            await asyncio.sleep(seconds)
            if raises is not None:
                raise raises
            return name

        return step

    def does_though_cut_off(self, name: str, seconds: float) -> Callable[..., Any]:
        """Return a step that ends by itself, as one in a thread does."""
        step = self.does(name, seconds)

        async def shielded(*, key: str) -> str:
            task: asyncio.Task[str] = asyncio.ensure_future(step(key=key))
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((task,))
            return task.result()

        return shielded

    def undoes(self, name: str) -> Callable[..., Any]:
        async def undo(_: object, *, key: str) -> None:
            self.calls.append(f"undo {name}")
            await asyncio.sleep(0.1)
            self.there.pop(key, None)

        return undo


def saga_of(function: Function, effects: Effects) -> Saga:
    @saga("s")
    async def called(run: SagaRun, _: object) -> Any:
        return await function(run, effects)

    return called


def supervisor_of(log: MemorySagaLog, function: Function, effects: Effects) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None)
    supervisor.register_worker("s", handler=saga_of(function, effects), task_types=["s"])
    return supervisor


async def left_after(entries: Sequence[Entry]) -> MemorySagaLog:
    """Return a log as a process leaves it that is lost after these entries."""
    log, now = MemorySagaLog(), clock.wall_time()
    envelope = encode_task(Task("s", None, task_id="s"), None, bound=1_000)
    header = SagaHeader(saga_id="s", name="s", version="", envelope=envelope, submission=now)
    await log.begin(header, b"", fence="lost", until=now, now=now)
    history = SagaHistory("s", entries)
    if entries:
        write = LogWrite(0, [encode_entry(each) for each in entries], history.state, history.why)
        assert await log.append("s", write, fence="lost", now=now)
    return log


async def entries_of(log: MemorySagaLog) -> Sequence[Entry]:
    stored = await log.get("s")
    assert stored is not None
    return decode_entries("s", stored.entries)


async def ended(log: MemorySagaLog) -> SagaHistory:
    """Return the history of the saga once nobody drives it any more."""
    async with asyncio.timeout(600.0):
        while True:
            stored = await log.get("s")
            if stored is not None and stored.header.state not in UNFINISHED:
                return SagaHistory("s", decode_entries("s", stored.entries))
            await asyncio.sleep(0.1)


async def resumed(function: Function, *entries: Entry) -> tuple[SagaHistory, Effects]:
    """Return what becomes of a saga whose process was lost after these entries."""
    log, effects = await left_after(entries), Effects()
    async with supervisor_of(log, function, effects):
        return await ended(log), effects


def started(step: str, *, compensable: bool = True) -> Entry:
    return StartedEntry(at=0.0, step=step, function="f", compensable=compensable)


def done(step: str) -> Entry:
    return DoneEntry(at=0.0, step=step, output=encode_result(step, task_id=step, bound=1_000))


# --- functions whose branches depend on each other -------------------------------------------------------------------


async def fails(run: SagaRun, effects: Effects) -> None:
    await effects.step(run, "bad", step=effects.does("bad", 0.35, raises=ValueError("no")))


async def goes_far(run: SagaRun, effects: Effects) -> None:
    for number in range(4):
        await effects.step(run, f"r{number}")
    await effects.step(run, "long", 2.0)


async def gathers(run: SagaRun, effects: Effects) -> None:
    await asyncio.gather(fails(run, effects), goes_far(run, effects))


async def gathers_and_goes_on(run: SagaRun, effects: Effects) -> None:
    with contextlib.suppress(StepFailed):
        await gathers(run, effects)
    await effects.step(run, "plan b")


async def groups(run: SagaRun, effects: Effects) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fails(run, effects))
        group.create_task(goes_far(run, effects))


async def groups_and_goes_on(run: SagaRun, effects: Effects) -> None:
    with contextlib.suppress(ExceptionGroup):
        await groups(run, effects)
    await effects.step(run, "plan b")


async def times_out(run: SagaRun, effects: Effects) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.25):
            await effects.step(run, "slow", 9.0)
        return
    await effects.step(run, "plan b")


async def times_out_beside_others(run: SagaRun, effects: Effects) -> None:
    async def impatient() -> None:
        async with asyncio.timeout(0.25):
            await effects.step(run, "slow", 9.0)

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(impatient())
            group.create_task(goes_far(run, effects))
    await effects.step(run, "plan b")
    raise ValueError("no")


async def times_out_though_the_step_ends(run: SagaRun, effects: Effects) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.25):
            await effects.step(run, "slow", step=effects.does_though_cut_off("slow", 0.5))
        return
    await effects.step(run, "plan b")


async def takes_the_first(run: SagaRun, effects: Effects) -> str:
    slow, fast = effects.step(run, "slow", 0.5), effects.step(run, "fast", 0.2)
    asked = [asyncio.ensure_future(slow), asyncio.ensure_future(fast)]
    first, others = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    for each in others:
        each.cancel()
    await asyncio.wait(asked)
    return await effects.step(run, f"use {first.pop().result()}")


async def takes_one_after_the_other(run: SagaRun, effects: Effects) -> None:
    asked = [effects.step(run, f"d{number}", 0.3 - 0.1 * number) for number in range(3)]
    for each in asyncio.as_completed(asked):
        await effects.step(run, f"use {await each}")


async def leaves_a_branch(run: SagaRun, effects: Effects) -> None:
    task = asyncio.ensure_future(goes_far(run, effects))
    await effects.step(run, "a", 0.35)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    raise ValueError("no")


FUNCTIONS = [
    gathers,
    gathers_and_goes_on,
    groups,
    groups_and_goes_on,
    times_out,
    times_out_beside_others,
    times_out_though_the_step_ends,
    takes_the_first,
    takes_one_after_the_other,
    leaves_a_branch,
]


@virtual
@pytest.mark.parametrize("function", FUNCTIONS)
async def test_a_saga_ends_as_it_would_have_after_whatever_entry_its_process_is_lost(function: Function) -> None:
    log = MemorySagaLog()
    async with supervisor_of(log, function, Effects()) as supervisor:
        with contextlib.suppress(TaskFailed):
            await supervisor.run(Task("s", None, key="s"))
        state = (await ended(log)).state
    entries = await entries_of(log)
    assert len(entries) > 4
    for number in range(len(entries)):
        if isinstance(entries[number], CutOffEntry):
            continue  # the function had not gone on yet: it may get another outcome now
        left = SagaHistory("s", entries[:number])
        history, effects = await resumed(function, *entries[:number])
        assert (history.why, history.state) == ("", state), number
        repeated = [call for call in effects.calls if (step := left.steps.get(call)) and step.output is not None]
        assert repeated == [], number
        if state is SagaState.COMPENSATED:
            assert effects.there == {}
            assert all(step.state in {StepState.UNDONE, StepState.NOT_DONE} for step in history.steps.values())


# --- code that has changed -------------------------------------------------------------------------------------------


@virtual
async def test_steps_of_unknown_outcome_are_not_repeated_by_code_that_does_not_ask_for_the_steps_before() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        await effects.step(run, "b")

    history, effects = await resumed(function, started("a"), done("a"), started("b"))
    assert history.state is SagaState.PARKED
    assert "its function asks for step 'b' where its log has step 'a'. Its code has changed since" in history.why
    assert effects.calls == []


@virtual
async def test_steps_in_another_order_park_the_saga() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        await effects.step(run, "b")
        await effects.step(run, "a")

    begin = clock.now()
    history, effects = await resumed(function, started("a"), done("a"), started("b"), done("b"))
    assert "its function asks for step 'b' where its log has step 'a'. Its code has changed since" in history.why
    assert effects.calls == []
    assert clock.now() - begin < 30.0  # nothing says that another branch may ask for it


@virtual
async def test_a_saga_that_goes_back_with_steps_in_another_order_says_so() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        await effects.step(run, "b")
        await effects.step(run, "a")

    goes_back = CompensatingEntry(at=0.0, error_type="ValueError", error="no")
    history, effects = await resumed(function, started("a"), done("a"), started("b"), done("b"), goes_back)
    assert "its function asks for step 'b' where its log has step 'a'. Its code has changed since" in history.why
    assert effects.calls == []


@virtual
async def test_a_step_that_is_no_longer_cut_off_parks_the_saga() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        with contextlib.suppress(StepFailed):
            await effects.step(run, "slow")
        await effects.step(run, "plan b")

    failed = FailedEntry(at=0.0, step="slow", error_type="CancelledError", error="CancelledError", clean=True)
    history, effects = await resumed(function, started("slow"), failed, CutOffEntry(at=0.0, step="slow"))
    assert history.state is SagaState.PARKED
    assert "had cut off step 'slow', by a timeout of its own, say, and does not within 60 s" in history.why
    assert "put the time limit into the step" in history.why
    assert effects.calls == []


# --- waits outside of steps ------------------------------------------------------------------------------------------


@virtual
async def test_a_function_that_waits_between_its_steps_is_replayed_backwards() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        await effects.step(run, "a")
        await asyncio.sleep(50.0)
        await effects.step(run, "b")

    goes_back = CompensatingEntry(at=0.0, error_type="ValueError", error="no")
    history, effects = await resumed(function, started("a"), done("a"), started("b"), done("b"), goes_back)
    assert history.state is SagaState.COMPENSATED
    assert effects.calls == ["undo b", "undo a"]


@virtual
async def test_a_function_that_waits_for_too_long_between_its_steps_is_parked_with_that_as_a_reason() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        await effects.step(run, "a")
        await asyncio.sleep(70.0)
        await effects.step(run, "b")

    goes_back = CompensatingEntry(at=0.0, error_type="ValueError", error="no")
    history, effects = await resumed(function, started("a"), done("a"), started("b"), done("b"), goes_back)
    assert "or waits for long outside of them" in history.why
    assert effects.calls == []


@virtual
async def test_a_branch_that_waits_a_moment_is_waited_for() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        async def waits() -> None:
            await asyncio.sleep(0.5)
            await effects.step(run, "a")

        async def asks() -> None:
            await effects.step(run, "b")
            await effects.step(run, "c")

        await asyncio.gather(waits(), asks())

    written = (started("b"), done("b"), started("a"), done("a"), started("c"), done("c"))
    history, effects = await resumed(function, *written)
    assert history.state is SagaState.DONE
    assert effects.calls == []


@virtual
async def test_a_branch_that_is_behind_when_its_function_returns_is_waited_for() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        async def branch() -> None:
            await effects.step(run, "b")
            await asyncio.sleep(0.5)
            await effects.step(run, "c")

        task = asyncio.ensure_future(branch())
        await effects.step(run, "a")
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    written = (started("a"), started("b"), done("b"), done("a"), started("c"))
    history, effects = await resumed(function, *written)
    assert (history.why, history.state) == ("", SagaState.DONE)
    assert effects.calls == ["c"]


# --- where steps are asked for ---------------------------------------------------------------------------------------


@virtual
async def test_a_step_inside_a_step_is_invalid() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        async def outer() -> None:
            await asyncio.ensure_future(effects.step(run, "inner"))

        await run.step("outer", outer)

    log, effects = MemorySagaLog(), Effects()
    async with supervisor_of(log, function, effects) as supervisor:
        with pytest.raises(TaskFailed, match=r"'inner' of a saga is invalid: it is asked for inside step 'outer'"):
            await supervisor.run(Task("s", None, key="s"))
    assert effects.calls == []


@virtual
@pytest.mark.blocks  # a plain step that runs an event loop
async def test_a_step_in_another_event_loop_is_an_error() -> None:
    async def function(run: SagaRun, effects: Effects) -> None:
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                asyncio.run(effects.step(run, "a"))
            except WrongLoop as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        raise errors[0]

    log, effects = MemorySagaLog(), Effects()
    async with supervisor_of(log, function, effects) as supervisor:
        with pytest.raises(TaskFailed, match=r"Saga 's' was used from another event loop or thread than its own"):
            await supervisor.run(Task("s", None, key="s"))
    assert effects.calls == []
