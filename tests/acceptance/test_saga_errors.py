"""User code of sagas that raises anything at all, at every place: the event loop goes on, and so do other sagas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tests.acceptance.test_sagas import Effects, done, history_of, left_by_a_lost_process, started, supervisor_of
from tests.support.task_plane import virtual

from forebay import Retry, Task, TaskStatus
from forebay.errors import StepFailed
from forebay.overflow import encode_result
from forebay.saga import MemorySagaLog, Saga, SagaAdmin, SagaRun, SagaState, saga
from forebay.saga import records as entries
from forebay.saga.records import LogWrite, SagaHistory, StepState

LONG = 300.0  # seconds in which a supervisor looks for unfinished sagas many times
THRICE = Retry(max_attempts=3, base_delay=0.1, on=BaseException)
GOES_BACK = entries.CompensatingEntry(at=0.0, error_type="ValueError", error="ValueError: no")


class OwnExit(BaseException):
    """An exception that no ``except Exception`` takes."""


ANYTHING = [SystemExit, GeneratorExit, asyncio.CancelledError, OwnExit, KeyError]


@pytest.fixture
def effects() -> Effects:
    return Effects()


@pytest.fixture
def log() -> MemorySagaLog:
    return MemorySagaLog()


async def outcome(log: MemorySagaLog, definition: Saga, key: str = "s") -> SagaHistory:
    """Run a saga, and return its history a long time later."""
    async with supervisor_of(log, definition) as supervisor:
        result = await (await supervisor.submit(Task(definition.name, "payload", key=key)))
        assert result.status in (TaskStatus.FAILED, TaskStatus.SUCCEEDED)
        await asyncio.sleep(LONG)
    return await history_of(log, key)


async def resumed(log: MemorySagaLog, definition: Saga, *written: entries.Entry) -> SagaHistory:
    """Have a supervisor take a saga from the log, and return its history a long time later."""
    await left_by_a_lost_process(log, definition.name, *written)
    async with supervisor_of(log, definition):
        await asyncio.sleep(LONG)
    return await history_of(log, "lost")


def asynchronous(kind: type[BaseException]) -> Callable[..., Any]:
    async def raises(*_: Any) -> None:
        raise kind

    return raises


def in_a_thread(kind: type[BaseException]) -> Callable[..., Any]:
    def raises(*_: Any) -> None:
        raise kind

    return raises


@virtual
@pytest.mark.parametrize("kind", ANYTHING)
@pytest.mark.parametrize("raising", [asynchronous, in_a_thread])
async def test_a_step_that_raises_anything_has_failed(
    raising: Callable[..., Any], kind: type[BaseException], effects: Effects, log: MemorySagaLog
) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a"))
        await run.step("b", raising(kind), compensate=effects.undoes("b"))

    assert (await outcome(log, publish)).state is SagaState.COMPENSATED
    assert effects.calls == ["a", "undo b by key", "undo a"]


@virtual
@pytest.mark.parametrize("kind", ANYTHING)
async def test_a_function_that_catches_what_its_step_raised_leaves_no_step_of_unknown_outcome(
    kind: type[BaseException], effects: Effects, log: MemorySagaLog
) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        with pytest.raises(StepFailed):
            await run.step("a", effects.does("a", raises=kind()), compensate=effects.undoes("a"))
        await run.step("b", effects.does("b"))

    history = await outcome(log, publish)
    assert history.state is SagaState.DONE
    assert history.steps["a"].state is StepState.UNDONE
    assert effects.left == ["b"]


@virtual
@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, OwnExit])
async def test_a_pivot_that_ends_with_no_exception_is_parked(
    kind: type[BaseException], effects: Effects, log: MemorySagaLog
) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("pay", effects.does("pay", raises=kind()), pivot=True)

    history = await outcome(log, publish)
    assert history.state is SagaState.PARKED
    assert "leaves open whether it has succeeded" in history.why


@virtual
@pytest.mark.parametrize("kind", ANYTHING)
@pytest.mark.parametrize("raising", [asynchronous, in_a_thread])
async def test_a_compensation_that_raises_anything_is_tried_again_and_parked(
    raising: Callable[..., Any], kind: type[BaseException], effects: Effects, log: MemorySagaLog
) -> None:
    @saga("publish", undo_retry=THRICE)
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=raising(kind))
        raise ValueError("no")

    history = await outcome(log, publish)
    assert history.state is SagaState.PARKED
    assert history.why.startswith(
        f"the compensation of step 'a' has failed 3 times, the last time with {kind.__name__}"
    )


@virtual
@pytest.mark.parametrize("kind", ANYTHING)
async def test_whatever_a_compensation_raises_it_is_tried_again_by_default(
    kind: type[BaseException], effects: Effects, log: MemorySagaLog
) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a", raises=[kind()]))
        raise ValueError("no")

    assert (await outcome(log, publish)).state is SagaState.COMPENSATED
    assert effects.left == []


@virtual
@pytest.mark.parametrize("kind", ANYTHING)
@pytest.mark.parametrize("raising", [asynchronous, in_a_thread])
async def test_a_check_that_raises_anything_is_asked_again_and_parked(
    raising: Callable[..., Any], kind: type[BaseException], effects: Effects, log: MemorySagaLog
) -> None:
    asked = 0

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        nonlocal asked
        asked += 1
        await run.step("a", effects.does("a", raises=ValueError()), check=raising(kind))

    history = await outcome(log, publish)
    assert history.state is SagaState.PARKED
    assert history.why.startswith(f"the check of step 'a' raised {kind.__name__}")
    assert asked == 1


@virtual
@pytest.mark.parametrize("kind", ANYTHING)
async def test_a_function_that_raises_anything_is_called_once_and_its_steps_are_undone(
    kind: type[BaseException], effects: Effects, log: MemorySagaLog
) -> None:
    called = 0

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        nonlocal called
        called += 1
        await run.step("a", effects.does("a"), compensate=effects.undoes("a"))
        raise kind

    assert (await outcome(log, publish)).state is SagaState.COMPENSATED
    assert called == 1
    assert effects.left == []


@virtual
@pytest.mark.parametrize("kind", ANYTHING)
async def test_a_function_that_raises_anything_when_it_is_asked_what_to_undo_is_parked(
    kind: type[BaseException], log: MemorySagaLog
) -> None:
    called = 0

    @saga("publish")
    async def publish(_: SagaRun, __: Any) -> None:
        nonlocal called
        called += 1
        raise kind

    history = await resumed(log, publish, started("a", compensable=True), done("a"), GOES_BACK)
    assert history.state is SagaState.PARKED
    assert called == 1


def interrupted_while_it_runs(log: MemorySagaLog, step: Callable[..., Any], effects: Effects) -> None:
    """Run a saga in an event loop of its own, until its step has ended."""

    @saga("publish", undo_retry=THRICE)
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", step, compensate=effects.undoes("a"))

    async def main() -> None:
        async with supervisor_of(log, publish) as supervisor:
            await (await supervisor.submit(Task("publish", None, key="s")))

    asyncio.run(main())


def test_an_interrupt_in_a_step_ends_the_loop_and_leaves_the_saga(effects: Effects, log: MemorySagaLog) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_while_it_runs(log, asynchronous(KeyboardInterrupt), effects)
    history = asyncio.run(history_of(log, "s"))
    assert history.state is SagaState.RUNNING
    assert history.steps["a"].state is StepState.STARTED
    assert effects.calls == []


def test_an_interrupt_that_a_step_raises_in_a_thread_is_an_error_like_any(effects: Effects, log: MemorySagaLog) -> None:
    interrupted_while_it_runs(log, in_a_thread(KeyboardInterrupt), effects)
    assert asyncio.run(history_of(log, "s")).state is SagaState.COMPENSATED
    assert effects.calls == ["undo a by key"]


class Unreadable(dict[str, Any]):
    """A response that cannot be read."""

    def get(self, *_: Any) -> Any:
        raise RuntimeError("closed")


class Odd(Exception):
    """An error whose attributes cannot be used."""

    retry_after = "3"
    response = Unreadable()


def broken_filter(_: BaseException) -> bool:
    raise TypeError("broken")


@virtual
async def test_an_error_with_unusable_attributes_is_what_a_step_fails_with(
    effects: Effects, log: MemorySagaLog
) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a", raises=Odd("odd")), compensate=effects.undoes("a"), retry=THRICE)

    history = await outcome(log, publish)
    assert history.state is SagaState.COMPENSATED
    assert history.steps["a"].error == "Odd: odd"
    assert effects.calls == ["a", "a", "a", "undo a by key"]


@virtual
async def test_a_pivot_whose_error_cannot_be_looked_at_is_parked(effects: Effects, log: MemorySagaLog) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("pay", effects.does("pay", raises=Odd("odd")), pivot=True)

    history = await outcome(log, publish)
    assert history.state is SagaState.PARKED
    assert "ended with Odd: odd, which leaves open whether it has succeeded" in history.why


@virtual
async def test_a_filter_of_errors_that_raises_lets_nothing_be_tried_again(effects: Effects, log: MemorySagaLog) -> None:
    retry = Retry(max_attempts=3, base_delay=0.1, on=broken_filter)

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a", raises=ValueError("no")), compensate=effects.undoes("a"), retry=retry)

    history = await outcome(log, publish)
    assert history.steps["a"].error == "ValueError: no"
    assert effects.calls == ["a", "undo a by key"]


# --- outputs that are of another type now ---


@dataclass
class Old:
    number: int


@dataclass
class New:
    number: int
    name: str


def typed(kind: type[Any], effects: Effects) -> Saga:
    async def fetch() -> Any:
        return kind(1)

    fetch.__annotations__["return"] = kind

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> int:
        fetched = await run.step("a", fetch, compensate=effects.undoes("a"))
        number: int = fetched.number
        return number

    return publish


def old_output() -> tuple[entries.Entry, ...]:
    output = encode_result({"number": 1}, task_id="a", bound=1_000)
    return started("a", compensable=True), entries.DoneEntry(at=0.0, step="a", output=output)


@virtual
@pytest.mark.parametrize("then", [(), (GOES_BACK,)], ids=["forwards", "backwards"])
async def test_a_saga_whose_output_is_of_another_type_now_is_parked(
    then: tuple[entries.Entry, ...], effects: Effects, log: MemorySagaLog
) -> None:
    history = await resumed(log, typed(New, effects), *old_output(), *then)
    assert history.state is SagaState.PARKED
    assert history.why.startswith(
        "the output of step 'a' in the log is not of the type that its function returns: "
        "at result: Object missing required field `name`"
    )
    assert effects.calls == []


@virtual
async def test_a_saga_whose_step_a_person_gave_an_output_of_another_type_is_parked(
    effects: Effects, log: MemorySagaLog
) -> None:
    definition = typed(Old, effects)
    await left_by_a_lost_process(log, "publish", started("a", compensable=True))
    async with supervisor_of(log, definition) as supervisor:
        await asyncio.sleep(LONG)
        await supervisor.sagas.resolve("lost", "a", output=None)
        await asyncio.sleep(LONG)
    assert (await history_of(log, "lost")).why.startswith("the output of step 'a' in the log is not of the type")


# --- code that has changed ---


@virtual
async def test_a_saga_that_goes_back_is_parked_if_a_compensation_is_gone(effects: Effects, log: MemorySagaLog) -> None:
    @saga("publish", undo_retry=THRICE)
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"))

    history = await resumed(log, publish, started("a", compensable=True), done("a"), GOES_BACK)
    assert history.state is SagaState.PARKED
    assert history.why.startswith("step 'a' was begun with a compensation, and is asked for without it. Its code has")
    assert history.steps["a"].undo_errors == 0


@virtual
async def test_a_saga_that_goes_back_says_which_step_has_changed_if_it_did_not_come_to_those_to_undo(
    effects: Effects, log: MemorySagaLog
) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), pivot=True)
        await run.step("b", effects.does("b"), compensate=effects.undoes("b"))

    left = (started("a"), done("a"), started("b", compensable=True), done("b"), GOES_BACK)
    history = await resumed(log, publish, *left)
    assert history.why.startswith("step 'a' was begun without pivot=True, and is asked for with it")


# --- what no log can store, and logs that raise ---


@virtual
async def test_a_step_whose_name_is_not_valid_unicode_is_rejected(effects: Effects, log: MemorySagaLog) -> None:
    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a"))
        await run.step("send \ud800", effects.does("send"))

    history = await outcome(log, publish)
    assert history.state is SagaState.COMPENSATED
    assert "its name is not valid Unicode" in history.error
    assert effects.calls == ["a", "undo a"]


@virtual
async def test_the_name_of_a_function_that_is_not_valid_unicode_is_stored_as_an_escape(
    effects: Effects, log: MemorySagaLog
) -> None:
    step = effects.does("a")
    step.__qualname__ = "call \ud800"

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", step)

    history = await outcome(log, publish)
    assert history.state is SagaState.DONE
    assert history.steps["a"].function == "call \\ud800"


class BrokenLog(MemorySagaLog):
    """A log that raises something unexpected at each write, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:  # noqa: ARG002
        self.writes += 1
        if self.writes > LONG:
            await asyncio.Event().wait()  # so that the test fails, and does not hang
        raise ArithmeticError


@virtual
async def test_a_log_that_raises_is_not_written_without_end(effects: Effects) -> None:
    log = BrokenLog()

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"))

    async with supervisor_of(log, publish) as supervisor:
        result = await (await supervisor.submit(Task("publish", None, key="s")))
        assert "it raised ArithmeticError" in str(result.error)
        await asyncio.sleep(LONG)
    assert log.writes < LONG / 10  # once for each lease that has expired
    assert effects.calls == []


@virtual
async def test_a_saga_that_cannot_even_be_parked_is_tried_once_a_lease_and_counted(
    effects: Effects, log: MemorySagaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    async def fails(*_: Any) -> None:
        nonlocal tried
        tried += 1
        raise ArithmeticError

    monkeypatch.setattr(SagaRun, "_compensate", fails)
    monkeypatch.setattr(SagaRun, "_park", fails)

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", effects.does("a"), compensate=effects.undoes("a"))
        raise ValueError("no")

    async with supervisor_of(log, publish) as supervisor:
        await (await supervisor.submit(Task("publish", None, key="s")))
        await asyncio.sleep(LONG)
        assert (await SagaAdmin(log).show("s")).state is SagaState.PARKED
    assert tried < 20
