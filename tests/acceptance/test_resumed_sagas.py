"""Sagas that a lost process has left: how another supervisor takes them up, and what it must not repeat."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tests.acceptance.test_sagas import Effects, ended, history_of, left_by_a_lost_process, supervisor_of
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Retry, Task, clock
from forebay.errors import SagaTaken
from forebay.saga import MemorySagaLog, Saga, SagaRun, SagaState, saga
from forebay.saga.records import LogWrite, StartedEntry, StepState, StoredSaga, decode_entries
from forebay.testing import now


@pytest.fixture
def effects() -> Effects:
    return Effects()


def one_step(effects: Effects, *, fails: int = 0) -> Saga:
    """Return a saga whose only step raises so often at first, and is undone then."""
    errors = [ValueError("no")] * fails

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> Any:
        error = errors.pop() if errors else None
        return await run.step("a", effects.does("a", raises=error), compensate=effects.undoes("a"), idempotent=True)

    return publish


@virtual
async def test_a_saga_goes_on_as_soon_as_its_worker_is_registered(effects: Effects) -> None:
    log = MemorySagaLog()
    await left_by_a_lost_process(log, "publish")
    publish = one_step(effects)
    async with BackpressureSupervisor(saga_log=log, lag_bound=None) as supervisor:
        await asyncio.sleep(1.0)
        supervisor.register_worker("publish", handler=publish, task_types=["publish"])
        begun = now()
        assert (await ended(log, "lost")).state is SagaState.DONE
        assert now() - begun < 1.0


class SlowClaims(MemorySagaLog):
    """A log that takes a while to say which sagas it has given."""

    async def claim(
        self, names: Sequence[str], *, limit: int, fence: str, until: float, now: float
    ) -> Sequence[StoredSaga]:
        claimed = await super().claim(names, limit=limit, fence=fence, until=until, now=now)
        await asyncio.sleep(0.1)
        return claimed


@virtual
async def test_a_saga_submitted_again_while_it_is_taken_from_the_log_goes_on_in_the_only_slot(effects: Effects) -> None:
    log = SlowClaims()
    await left_by_a_lost_process(log, "publish")
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None)
    supervisor.register_worker("publish", handler=one_step(effects), task_types=["publish"], max_concurrent=1)
    async with supervisor:
        await asyncio.sleep(0.05)  # its claim is on the way
        async with asyncio.timeout(10.0):
            assert await supervisor.run(Task("publish", None, key="lost")) == "a done"
    assert effects.calls == ["a"]


@virtual
async def test_a_saga_that_goes_on_is_the_same_saga_if_its_task_is_tried_again(effects: Effects) -> None:
    log = MemorySagaLog()
    await left_by_a_lost_process(log, "publish")
    retry = Retry(max_attempts=2, base_delay=0.01)
    supervisor = BackpressureSupervisor(saga_log=log, lag_bound=None)
    supervisor.register_worker("publish", handler=one_step(effects, fails=1), task_types=["publish"], retry=retry)
    async with supervisor:
        async with asyncio.timeout(100.0):
            while len(effects.calls) < 3:  # noqa: ASYNC110 - they have no events
                await asyncio.sleep(0.1)
        history = await ended(log, "lost")
        sagas = await log.list(states=list(SagaState), limit=10)
    assert [each.saga_id for each in sagas] == ["lost"]
    assert (history.state, history.round) == (SagaState.DONE, 2)
    assert effects.calls == ["a", "undo a by key", "a"]


@virtual
async def test_the_log_knows_that_a_step_has_failed_before_it_is_undone(effects: Effects) -> None:
    """Otherwise the next process would repeat it after its undo, and the server would know its key, and do nothing."""
    log = MemorySagaLog()
    known: list[StepState] = []

    async def undo(_: Any) -> None:
        known.append((await history_of(log, "the saga")).steps["a"].state)

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> Any:
        return await run.step("a", effects.does("a", raises=ValueError("no")), compensate=undo, idempotent=True)

    async with supervisor_of(log, publish) as supervisor:
        await (await supervisor.submit(Task("publish", None, key="the saga")))
    assert known == [StepState.FAILED]


@virtual
async def test_the_log_has_the_start_of_a_step_before_it_is_called() -> None:
    log = MemorySagaLog()
    known: list[StepState] = []

    async def step() -> None:
        known.append((await history_of(log, "the saga")).steps["a"].state)

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> Any:
        return await run.step("a", step)

    async with supervisor_of(log, publish) as supervisor:
        await supervisor.run(Task("publish", None, key="the saga"))
    assert known == [StepState.STARTED]


# --- a process that was paused ---------------------------------------------------------------------------------------


class PausedProcess(MemorySagaLog):
    """A log whose process renews no lease while it is paused, and may be paused once the start of step "b" is written.

    Attributes:
        running: set unless it is paused.
        begun: set once the start of "b" is written.
        goes_on: awaited then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running = asyncio.Event()
        self.running.set()
        self.begun = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        if not self.running.is_set():
            await asyncio.Event().wait()  # nothing comes of what was under way
        return await super().renew(holders, until=until)

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        written = await super().append(saga_id, write, fence=fence, now=now)
        if any(isinstance(each, StartedEntry) and each.step == "b" for each in decode_entries(saga_id, write.entries)):
            self.begun.set()
            await self.goes_on.wait()
        return written

    async def pause_until_another_has_taken(self, saga_id: str) -> None:
        """Let the lease expire, and another process take the saga."""
        self.running.clear()
        await asyncio.sleep(31.0)
        at = clock.wall_time()
        (taken,) = await self.claim(["publish"], limit=1, fence="another", until=at + 30.0, now=at)
        assert taken.header.saga_id == saga_id
        self.running.set()


@pytest.mark.parametrize("goes_back", [False, True], ids=["forwards", "backwards"])
@virtual
async def test_a_process_paused_past_its_lease_writes_and_begins_nothing_for_a_saga_that_was_taken(
    effects: Effects, *, goes_back: bool
) -> None:
    log = PausedProcess()
    log.goes_on.set()
    called, answer = asyncio.Event(), asyncio.Event()

    async def wait(*_: Any) -> None:
        called.set()
        await answer.wait()

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("first", effects.does("first"), compensate=effects.undoes("first"))
        if goes_back:
            await run.step("a", effects.does("a"), compensate=wait)
            raise ValueError("no")
        await run.step("a", wait, compensate=effects.undoes("a"))
        await run.step("next", effects.does("next"), idempotent=True)

    async with supervisor_of(log, publish) as supervisor:
        ticket = await supervisor.submit(Task("publish", None, key="the saga"))
        await called.wait()
        await log.pause_until_another_has_taken("the saga")
        calls, before = list(effects.calls), await log.get("the saga")
        answer.set()
        assert isinstance((await ticket).cause, SagaTaken)
        assert effects.calls == calls
        assert await log.get("the saga") == before


@virtual
async def test_a_process_paused_between_the_start_of_a_step_and_its_call_does_not_call_it(effects: Effects) -> None:
    log = PausedProcess()

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("b", effects.does("b"), idempotent=True)

    async with supervisor_of(log, publish) as supervisor:
        ticket = await supervisor.submit(Task("publish", None, key="the saga"))
        await log.begun.wait()
        await log.pause_until_another_has_taken("the saga")
        log.goes_on.set()
        assert isinstance((await ticket).cause, SagaTaken)
        assert effects.calls == []


@virtual
async def test_a_process_whose_clock_is_behind_begins_no_step_of_a_saga_that_was_taken(effects: Effects) -> None:
    """It takes its lease for valid: then the log alone says that it has no saga."""
    log = MemorySagaLog()

    async def is_taken() -> None:
        later = clock.wall_time() + 31.0
        assert await log.claim(["publish"], limit=1, fence="another", until=later + 30.0, now=later)

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> None:
        await run.step("a", is_taken, compensate=effects.undoes("a"))
        await run.step("next", effects.does("next"), idempotent=True)

    async with supervisor_of(log, publish) as supervisor:
        ticket = await supervisor.submit(Task("publish", None, key="the saga"))
        assert isinstance((await ticket).cause, SagaTaken)
        assert effects.calls == []
