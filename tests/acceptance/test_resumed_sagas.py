"""Sagas that a lost process has left: how another supervisor takes them up, and what it must not repeat."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from tests.acceptance.test_sagas import Effects, ended, left_by_a_lost_process, supervisor_of
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Retry, Task
from forebay.saga import MemorySagaLog, Saga, SagaRun, SagaState, saga
from forebay.saga.records import SagaHistory, StepState, StoredSaga, decode_entries
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
        stored = await log.get("the saga")
        assert stored is not None
        known.append(SagaHistory("the saga", decode_entries("the saga", stored.entries)).steps["a"].state)

    @saga("publish")
    async def publish(run: SagaRun, _: Any) -> Any:
        return await run.step("a", effects.does("a", raises=ValueError("no")), compensate=undo, idempotent=True)

    async with supervisor_of(log, publish) as supervisor:
        await (await supervisor.submit(Task("publish", None, key="the saga")))
    assert known == [StepState.FAILED]
