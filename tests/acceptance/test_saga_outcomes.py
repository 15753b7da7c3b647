"""Steps whose outcome is in doubt after several calls, and steps that are stopped before their first one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Retry, Task, TaskStatus, clock
from forebay.errors import StepFailed, StoreUnavailable
from forebay.overflow import encode_task
from forebay.saga import Done, MemorySagaLog, NothingDone, Saga, SagaRun, SagaState, saga
from forebay.saga.records import (
    UNFINISHED,
    CompensatingEntry,
    Entry,
    LogWrite,
    SagaHeader,
    SagaHistory,
    StartedEntry,
    StepState,
    decode_entries,
    encode_entry,
)

TWICE = Retry(max_attempts=2, base_delay=0.1)


class Step:
    """A step that raises one error after the other, None being a call that hangs, and then returns."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = list(errors)
        self.calls = 0
        self.undone = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            error = self.errors.pop(0)
            if error is None:
                await asyncio.get_running_loop().create_future()
            else:
                raise error
        return "done"

    async def undo(self, _: object) -> None:
        self.undone += 1


def pay(step: Step, before: Step, **options: Any) -> Saga:
    """Return a saga of a step and a pivot."""

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        await run.step("reserve", before, compensate=before.undo)
        await run.step("pay", step, pivot=True, **options)

    return function


def supervisor_of(log: MemorySagaLog, *sagas: Saga) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None)
    for each in sagas:
        supervisor.register_worker(each.name, handler=each, task_types=[each.name])
    return supervisor


async def ended(log: MemorySagaLog, saga_id: str) -> SagaHistory:
    """Return the history of a saga once nobody drives it any more."""
    async with asyncio.timeout(600.0):
        while True:
            stored = await log.get(saga_id)
            if stored is not None and stored.header.state not in UNFINISHED:
                return SagaHistory(saga_id, decode_entries(saga_id, stored.entries))
            await asyncio.sleep(0.1)


@virtual
@pytest.mark.parametrize("last", [ConnectionRefusedError(), ValueError("no such account"), TimeoutError()])
async def test_a_pivot_of_which_an_early_call_may_have_succeeded_is_parked(last: Exception) -> None:
    log, before = MemorySagaLog(), Step()
    async with supervisor_of(log, pay(Step(ConnectionResetError(), last), before, retry=TWICE)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
    assert history.state is SagaState.PARKED
    assert history.why.startswith("the pivot, step 'pay', ended with ")
    assert "and an earlier call may have succeeded. Find out by its key 's/1/pay'" in history.why
    assert before.undone == 0


@virtual
async def test_a_pivot_of_which_no_call_may_have_succeeded_leads_back() -> None:
    log, before = MemorySagaLog(), Step()
    step = Step(ConnectionRefusedError(), ValueError("no such account"))
    async with supervisor_of(log, pay(step, before, retry=TWICE)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        assert (await ended(log, "s")).state is SagaState.COMPENSATED
    assert before.undone == 1


@virtual
@pytest.mark.parametrize(("error", "state"), [(ValueError(), SagaState.PARKED), (NothingDone(), SagaState.COMPENSATED)])
async def test_a_pivot_that_fails_when_a_cut_off_call_is_repeated_is_parked_unless_it_knows(
    error: Exception, state: SagaState
) -> None:
    log, step, before = MemorySagaLog(), Step(None, error), Step()
    async with supervisor_of(log, pay(step, before, idempotent=True)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s", timeout=1.0))
        assert (await ended(log, "s")).state is state
    assert step.calls == 2


@virtual
@pytest.mark.parametrize("checks", [True, False])
async def test_a_pivot_that_hangs_whenever_it_is_asked_after_is_parked(checks: bool) -> None:  # noqa: FBT001
    log, step, before = MemorySagaLog(), Step(None, None, None), Step()
    options: dict[str, Any] = {"check": Step(None)} if checks else {"idempotent": True}
    async with supervisor_of(log, pay(step, before, **options)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s", timeout=20.0))
        history = await ended(log, "s")
    assert history.state is SagaState.PARKED
    what = "its check" if checks else "its repetition"
    assert history.why == (
        "it was cut off during the pivot, step 'pay', and it is unknown how that ended: "
        f"{what} has not ended within 5 min"
    )
    assert (step.calls, before.undone) == (1 if checks else 2, 0)


async def left_by_a_lost_process(log: MemorySagaLog, *written: Entry, name: str = "pay") -> None:
    """Put a saga into the log as a process leaves it that is lost after `written`."""
    now = clock.wall_time()
    envelope = encode_task(Task(name, None, task_id="s"), None, bound=1_000)
    header = SagaHeader(saga_id="s", name=name, version="", envelope=envelope, submission=now)
    await log.begin(header, b"", fence="lost", until=now, now=now)
    state = SagaHistory("s", written).state
    assert await log.append("s", LogWrite(0, [encode_entry(each) for each in written], state), fence="lost", now=now)


# --- after the pivot -------------------------------------------------------------------------------------------------


def tell(step: Any, **options: Any) -> Saga:
    """Return a saga of a pivot and a step after it."""

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        await run.step("pay", Step(), pivot=True)
        await run.step("tell", step, **options)

    return function


@virtual
@pytest.mark.parametrize(
    ("errors", "options", "doubt"),
    [
        ([TimeoutError()], {}, "TimeoutError, which leaves open whether it has succeeded"),
        (
            [TimeoutError(), ValueError("no")],
            {"retry": TWICE},
            "ValueError: no, and an earlier call may have succeeded",
        ),
    ],
    ids=["once", "twice"],
)
async def test_a_step_after_the_pivot_without_an_answer_is_not_called_again_when_its_saga_is_retried(
    errors: list[BaseException], options: dict[str, Any], doubt: str
) -> None:
    log, step = MemorySagaLog(), Step(*errors)
    async with supervisor_of(log, tell(step, **options)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
        assert (history.state, history.steps["tell"].state) == (SagaState.PARKED, StepState.STARTED)
        assert history.why.startswith(f"step 'tell', after the pivot, ended with {doubt}. Find out by its key")
        await supervisor.sagas.retry("s")
        history = await ended(log, "s")
        assert history.why.startswith(
            "step 'tell' was begun, and its outcome is unknown. Find out by its key 's/1/tell'"
        )
        assert (history.state, history.steps["tell"].state) == (SagaState.PARKED, StepState.STARTED)
        assert step.calls == len(errors)
        await supervisor.sagas.resolve("s", "tell", outcome="not-done")
        assert (await ended(log, "s")).state is SagaState.DONE
    assert step.calls == len(errors) + 1


@virtual
async def test_a_step_after_the_pivot_whose_output_cannot_be_stored_is_not_called_again() -> None:
    log, calls = MemorySagaLog(), 0

    async def function() -> object:
        nonlocal calls
        calls += 1
        return object()

    async with supervisor_of(log, tell(function)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        assert (await ended(log, "s")).steps["tell"].state is StepState.STARTED
        await supervisor.sagas.retry("s")
        assert (await ended(log, "s")).state is SagaState.PARKED
    assert calls == 1


@virtual
@pytest.mark.parametrize(
    "options",
    [{}, {"retry": TWICE}, {"idempotent": True, "retry": TWICE}],
    ids=["once", "twice", "idempotent"],
)
async def test_a_step_after_the_pivot_that_certainly_had_no_effect_is_called_again_when_its_saga_is_retried(
    options: dict[str, Any],
) -> None:
    log, step = MemorySagaLog(), Step(*[ValueError("no")] * (2 if options else 1))
    async with supervisor_of(log, tell(step, **options)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
        assert (history.state, history.steps["tell"].state) == (SagaState.PARKED, StepState.NOT_DONE)
        assert history.why.endswith("where nothing is undone any more: ValueError: no")
        await supervisor.sagas.retry("s")
        assert (await ended(log, "s")).state is SagaState.DONE


@virtual
@pytest.mark.parametrize("last", [TimeoutError(), ValueError("no")])
async def test_an_idempotent_step_after_the_pivot_that_may_have_had_its_effect_is_repeated_when_its_saga_is_retried(
    last: Exception,
) -> None:
    log, step = MemorySagaLog(), Step(TimeoutError(), last, ValueError("no"), ValueError("no"))
    async with supervisor_of(log, tell(step, idempotent=True, retry=TWICE)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        for calls in (2, 4):  # the second time, because its first calls may have had it
            history = await ended(log, "s")
            assert (history.state, history.steps["tell"].state) == (SagaState.PARKED, StepState.FAILED)
            assert history.why.endswith("; it may have had its effect")
            assert step.calls == calls
            await supervisor.sagas.retry("s")
        assert (await ended(log, "s")).state is SagaState.DONE


@virtual
async def test_a_step_after_the_pivot_that_is_not_idempotent_any_more_is_not_repeated() -> None:
    log, step = MemorySagaLog(), Step(TimeoutError())
    async with supervisor_of(log, tell(step, idempotent=True, retry=Retry(max_attempts=1))) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        assert (await ended(log, "s")).steps["tell"].state is StepState.FAILED
    async with supervisor_of(log, tell(step)) as supervisor:
        await supervisor.sagas.retry("s")
        history = await ended(log, "s")
    assert (history.state, history.steps["tell"].state) == (SagaState.PARKED, StepState.STARTED)
    assert step.calls == 1


@virtual
@pytest.mark.parametrize("found", [Done(), None])
async def test_a_step_after_the_pivot_without_an_answer_is_what_its_check_says(found: Done | None) -> None:
    log, step = MemorySagaLog(), Step(TimeoutError())
    async with supervisor_of(log, tell(step, check=lambda: found)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
        assert history.steps["tell"].state is (StepState.DONE if found else StepState.NOT_DONE)
        if found is None:
            await supervisor.sagas.retry("s")
        assert (await ended(log, "s")).state is SagaState.DONE
    assert step.calls == (1 if found else 2)


@virtual
@pytest.mark.parametrize("outcome", [None, "not-done", "undone"])
async def test_a_step_that_fails_beside_a_pivot_that_succeeds_is_called_again_when_its_saga_goes_on(
    outcome: Any,
) -> None:
    log, step = MemorySagaLog(), Step(TimeoutError() if outcome else ValueError("no"))

    async def tell_later() -> str:
        await asyncio.sleep(1.0)
        return await step()

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        await asyncio.gather(run.step("tell", tell_later), run.step("pay", Step(), pivot=True))

    async with supervisor_of(log, function) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        assert (await ended(log, "s")).why.startswith("step 'tell'")
        if outcome is None:
            await supervisor.sagas.retry("s")
        else:
            await supervisor.sagas.resolve("s", "tell", outcome=outcome)
        assert (await ended(log, "s")).state is SagaState.DONE
    assert step.calls == 2


@virtual
async def test_a_step_that_has_failed_before_the_pivot_is_not_called_again_after_it() -> None:
    log, step, later = MemorySagaLog(), Step(ValueError("no")), Step(ValueError("no"))

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        with contextlib.suppress(StepFailed):
            await run.step("try", step)
        await run.step("pay", Step(), pivot=True)
        await run.step("tell", later)

    async with supervisor_of(log, function) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        assert (await ended(log, "s")).state is SagaState.PARKED
        await supervisor.sagas.retry("s")
        assert (await ended(log, "s")).state is SagaState.DONE
    assert (step.calls, later.calls) == (1, 2)


# --- how often, and how long, it is tried again ----------------------------------------------------------------------

FOR_30_SECONDS = Retry(max_attempts=1_000, base_delay=10.0, max_delay=10.0, max_total_delay=30.0)


@virtual
@pytest.mark.parametrize("when", ["step", "compensation"])
async def test_the_waits_between_the_attempts_are_bounded_all_together(when: str) -> None:
    log, times = MemorySagaLog(), []

    async def fail(*_: object) -> None:
        times.append(clock.now())
        raise ValueError("no")

    @saga("pay", undo_retry=FOR_30_SECONDS)
    async def function(run: SagaRun, _: object) -> None:
        if when == "compensation":
            await run.step("a", Step(), compensate=fail)
            raise ValueError("the function fails")
        await run.step("a", fail, retry=FOR_30_SECONDS)

    async with supervisor_of(log, function) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
    assert history.state is (SagaState.PARKED if when == "compensation" else SagaState.COMPENSATED)
    assert 20.0 < times[-1] - times[0] <= 30.1
    assert history.steps["a"].undo_errors == (len(times) if when == "compensation" else 0)


def raises_itself(_: BaseException) -> bool:
    raise RuntimeError("the filter fails")


@virtual
@pytest.mark.parametrize(
    "on", [OSError, raises_itself, lambda error: "again" in str(error)], ids=["type", "raises", "function"]
)
@pytest.mark.parametrize("when", ["step", "compensation"])
async def test_what_a_retry_does_not_cover_is_not_tried_again(when: str, on: Any) -> None:
    log, calls = MemorySagaLog(), 0

    async def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise ValueError("no")

    @saga("pay", undo_retry=Retry(max_attempts=5, on=on))
    async def function(run: SagaRun, _: object) -> None:
        if when == "compensation":
            await run.step("a", Step(), compensate=fail)
            raise ValueError("the function fails")
        await run.step("a", fail, retry=Retry(max_attempts=5, on=on))

    async with supervisor_of(log, function) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
    assert calls == 1
    if when == "compensation":
        assert history.why == "the compensation of step 'a' has failed once, the last time with ValueError: no"


@virtual
async def test_each_retry_of_a_step_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = MemorySagaLog()
    step = Step(ValueError("secret"), ConnectionResetError())
    async with supervisor_of(log, tell(step, retry=Retry(max_attempts=3))) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        await ended(log, "s")
    logged = [record.getMessage() for record in caplog.records if "it is tried again in" in record.getMessage()]
    assert [text.partition(";")[0] for text in logged] == [
        "step 'tell' of saga 's' raised ValueError",
        "step 'tell' of saga 's' raised ConnectionResetError",
    ]


# --- what its error says ----------------------------------------------------------------------------------------------


@virtual
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("422 for url 'http://x'\nFor more information: http://y", "ValueError: 422 for url 'http://x'"),
        ("\r\n first\u2028second", "ValueError: first"),
        ("It is closed.", "ValueError: It is closed"),
        ("and so on...", "ValueError: and so on..."),
        ("\n", "ValueError"),
    ],
    ids=["lines", "empty lines", "full stop", "dots", "empty"],
)
async def test_of_an_error_its_first_line_is_told_without_a_full_stop(text: str, told: str) -> None:
    log = MemorySagaLog()
    async with supervisor_of(log, tell(Step(ValueError(text)))) as supervisor:
        result = await (await supervisor.submit(Task("pay", None, key="s")))
        history = await ended(log, "s")
    assert history.steps["tell"].error == told
    assert history.why.endswith(f"any more: {told}")
    assert f"any more: {told}. `forebay saga show`" in str(result.cause)


@virtual
async def test_an_invalid_step_is_told_without_two_full_stops() -> None:
    log = MemorySagaLog()
    async with supervisor_of(log, tell(Step(), compensate=print)) as supervisor:
        result = await (await supervisor.submit(Task("pay", None, key="s")))
    assert "leave out compensate=. `forebay saga show`" in str(result.cause)


# --- with nothing before it ------------------------------------------------------------------------------------------


@virtual
async def test_a_saga_whose_only_step_is_of_unknown_outcome_goes_back_at_once() -> None:
    log, step = MemorySagaLog(), Step()
    begun = StartedEntry(at=0.0, step="a", function="f", compensable=True)
    await left_by_a_lost_process(log, begun, CompensatingEntry(at=0.0, error_type="x", error="x"))

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        await run.step("a", step, compensate=step.undo)

    before = clock.now()
    async with supervisor_of(log, function):
        assert (await ended(log, "s")).state is SagaState.COMPENSATED
    assert clock.now() - before < 1.0
    assert (step.calls, step.undone) == (0, 1)


@virtual
async def test_a_pivot_that_fails_when_it_is_repeated_after_its_process_was_lost_is_parked() -> None:
    log = MemorySagaLog()
    await left_by_a_lost_process(log, StartedEntry(at=0.0, step="pay", function="f", pivot=True))

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        await run.step("pay", Step(ValueError("no such account")), pivot=True, idempotent=True)

    async with supervisor_of(log, function):
        assert (await ended(log, "s")).state is SagaState.PARKED


class LogThatGoesAway(MemorySagaLog):
    """A log that cannot be written from some entry on, until it is back.

    Attributes:
        bound: of the entries that are written, while it is away.
    """

    bound: int | None = None

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        if self.bound is not None and write.number >= self.bound:
            raise StoreUnavailable(where="the log", why="it is away", advice="")
        return await super().append(saga_id, write, fence=fence, now=now)


@virtual
@pytest.mark.parametrize(
    "options", [{"idempotent": True}, {"check": lambda: None}, {}], ids=["idempotent", "check", "neither"]
)
async def test_a_pivot_that_is_cut_off_before_the_log_has_its_start_is_not_called(options: dict[str, Any]) -> None:
    log, step, before = LogThatGoesAway(), Step(), Step()
    async with supervisor_of(log, pay(step, before, **options)) as supervisor:
        log.bound = 1
        ticket = await supervisor.submit(Task("pay", None, key="s", timeout=1.0))
        assert (await ticket).status is TaskStatus.TIMED_OUT
        await asyncio.sleep(1.0)
        log.bound = None
        assert (await ended(log, "s")).state is SagaState.COMPENSATED
    assert (step.calls, before.undone) == (0, 1)


@virtual
@pytest.mark.parametrize("undo", [True, False])
async def test_a_step_that_the_function_cuts_off_between_two_attempts_has_failed(undo: bool) -> None:  # noqa: FBT001
    log, step = MemorySagaLog(), Step(TimeoutError(), TimeoutError())
    compensate: Callable[..., Any] | None = step.undo if undo else None

    @saga("pay")
    async def function(run: SagaRun, _: object) -> str:
        try:
            async with asyncio.timeout(0.001):
                await run.step(
                    "a", step, compensate=compensate, retry=Retry(max_attempts=2, base_delay=1e3, max_delay=1e3)
                )
        except TimeoutError:
            return "gone on"
        return "not cut off"

    async with supervisor_of(log, function) as supervisor:
        assert await supervisor.run(Task("pay", None, key="s")) == "gone on"
    history = await ended(log, "s")
    assert history.state is SagaState.DONE
    assert history.unknown == []
    assert (step.calls, step.undone) == (1, int(undo))


@virtual
@pytest.mark.parametrize("found", [Done("found"), None])
@pytest.mark.parametrize("resumed", [True, False])
async def test_a_step_that_the_function_cuts_off_while_it_is_checked_is_settled(
    resumed: bool,  # noqa: FBT001
    found: Done | None,
) -> None:
    log, step = MemorySagaLog(), Step(TimeoutError())
    if resumed:
        await left_by_a_lost_process(log, StartedEntry(at=0.0, step="a", function="f", compensable=True))

    async def check() -> Done | None:
        await asyncio.sleep(3.0)
        return found

    @saga("pay")
    async def function(run: SagaRun, _: object) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await run.step("a", step, compensate=step.undo, check=check)
        return "gone on"

    async with supervisor_of(log, function) as supervisor:
        if not resumed:
            await supervisor.submit(Task("pay", None, task_id="s"))
        history = await ended(log, "s")
    assert history.state is SagaState.DONE
    assert history.steps["a"].state is (StepState.DONE if found else StepState.NOT_DONE)


async def asked_within_a_timeout(run: SagaRun, *steps: Any) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await asyncio.gather(*(run.step(name, step, **options) for name, step, options in steps))


async def asked_in_a_group(run: SagaRun, *steps: Any) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for name, step, options in steps:
                group.create_task(run.step(name, step, **options))
    except BaseExceptionGroup as errors:
        raise ValueError("one of them has failed") from errors


async def asked_in_a_group_whose_error_is_raised(run: SagaRun, *steps: Any) -> None:
    async with asyncio.TaskGroup() as group:
        for name, step, options in steps:
            group.create_task(run.step(name, step, **options))


async def asked_and_collected(run: SagaRun, *steps: Any) -> None:
    await asyncio.gather(*(run.step(name, step, **options) for name, step, options in steps), return_exceptions=True)


WAYS = [
    asked_within_a_timeout,
    asked_in_a_group,
    asked_in_a_group_whose_error_is_raised,
    asked_and_collected,
]


@virtual
@pytest.mark.parametrize("ask", WAYS, ids=lambda way: way.__name__)
async def test_a_step_whose_check_cannot_be_asked_parks_the_saga_whatever_the_function_makes_of_it(
    ask: Callable[..., Any],
) -> None:
    log, step, other, later = MemorySagaLog(), Step(TimeoutError()), Step(), Step()
    if ask is asked_within_a_timeout:
        step.errors = [None]

    def check() -> None:
        raise OSError("away")

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        await ask(run, ("a", step, {"compensate": step.undo, "check": check}), ("b", other, {"compensate": other.undo}))
        await run.step("later", later)

    async with supervisor_of(log, function) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
    assert history.state is SagaState.PARKED
    assert "the check of step 'a' raised OSError" in history.why
    assert (step.calls, step.undone, other.undone, later.calls) == (1, 0, 0, 0)


class Receipt(msgspec.Struct):
    """What a step says that it returns."""

    number: int


async def returns_an_object() -> object:
    return object()


async def returns_too_much() -> bytes:
    return bytes(2_000_000)


async def returns_another_type() -> Receipt:
    return cast("Receipt", "receipt 7")


UNSTORABLE = [
    (returns_an_object, "holds a object; return plain data"),
    (returns_too_much, "the bound is 1000000: return a reference to it"),
    (returns_another_type, "at result: "),
]


@virtual
@pytest.mark.parametrize(("function", "why"), UNSTORABLE)
async def test_a_step_whose_output_cannot_be_stored_has_failed_and_is_undone(
    function: Callable[..., Any], why: str
) -> None:
    log = MemorySagaLog()
    undone: list[object] = []

    @saga("pay")
    async def pay_once(run: SagaRun, _: object) -> None:
        await run.step("a", function, compensate=undone.append, retry=TWICE)

    async with supervisor_of(log, pay_once) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
    assert history.state is SagaState.COMPENSATED
    assert "the output of step 'a' cannot be stored: " in history.error
    assert why in history.error
    assert undone == [None]


@virtual
@pytest.mark.parametrize(("function", "why"), UNSTORABLE)
async def test_a_pivot_whose_output_cannot_be_stored_parks_the_saga(function: Callable[..., Any], why: str) -> None:
    log = MemorySagaLog()

    @saga("pay")
    async def pay_once(run: SagaRun, _: object) -> None:
        await run.step("a", function, pivot=True)

    async with supervisor_of(log, pay_once) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        history = await ended(log, "s")
    assert history.state is SagaState.PARKED
    assert why in history.why


@virtual
async def test_an_output_is_of_its_type_again_when_the_saga_goes_on_elsewhere() -> None:
    log, found = MemorySagaLog(), []
    log.durable = True  # another process may go on with it

    async def receive() -> Receipt:
        return Receipt(7)

    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    def with_last(last: Callable[..., Any]) -> Saga:
        @saga("pay")
        async def function(run: SagaRun, _: object) -> None:
            found.append(await run.step("a", receive))
            await run.step("b", last, idempotent=True)

        return function

    async with supervisor_of(log, with_last(hang)) as supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        await asyncio.sleep(1.0)
        await supervisor.close()
    async with supervisor_of(log, with_last(Step())):
        history = await ended(log, "s")
    assert (history.state, history.error) == (SagaState.DONE, "")
    assert found == [Receipt(7), Receipt(7)]


class LogThatRenewsNothing(MemorySagaLog):
    """A log whose leases expire, though they are renewed, while it is away."""

    away = True

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        if self.away:
            return ()
        return await super().renew(holders, until=until)


@virtual
async def test_a_saga_whose_lease_has_lapsed_is_not_driven_twice_in_its_own_process() -> None:
    log, running, most, calls = LogThatRenewsNothing(), 0, 0, 0

    async def work() -> None:
        nonlocal running, most, calls
        running, calls = running + 1, calls + 1
        most = max(most, running)
        try:
            await asyncio.sleep(10.0)
        finally:
            running -= 1

    @saga("pay")
    async def function(run: SagaRun, _: object) -> None:
        await run.step("a", work, idempotent=True)

    supervisor = BackpressureSupervisor(saga_log=log, lease=1.0)
    supervisor.register_worker("pay", handler=function, task_types=["pay"], max_concurrent=4)
    async with supervisor:
        await supervisor.submit(Task("pay", None, key="s"))
        await asyncio.sleep(5.0)
        log.away = False
        assert (await ended(log, "s")).state is SagaState.DONE
    assert (most, calls) == (1, 2)
