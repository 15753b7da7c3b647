"""A saga whose task is submitted again, under the same key, goes on as it began."""

from __future__ import annotations

from tests.acceptance.test_sagas import (
    Effects,
    done,
    effects,
    history_of,
    left_by_a_lost_process,
    log,
    started,
    supervisor_of,
    two_steps,
)
from tests.support.task_plane import virtual

from forebay import Task, TaskStatus
from forebay.errors import InvalidSaga
from forebay.saga import MemorySagaLog, SagaRun, SagaState, saga
from forebay.saga.records import CompensatingEntry, StoredSaga

__all__ = ["effects", "log"]  # fixtures


class UnscannedLog(MemorySagaLog):
    """A log whose sagas nobody finds by a scan: they go on once their task is submitted again."""

    async def claim(self, *_: object, **__: object) -> list[StoredSaga]:
        return []


@virtual
async def test_it_has_the_payload_with_which_it_began(effects: Effects) -> None:
    seen: list[str] = []

    @saga("publish")
    async def publish(run: SagaRun, payload: str) -> str:
        seen.append(payload)
        await run.step("a", effects.does("a"), payload, compensate=effects.undoes("a"))
        return payload

    log = UnscannedLog()
    await left_by_a_lost_process(log, "publish", started("a", compensable=True), done("a"))
    async with supervisor_of(log, publish) as supervisor:
        assert await supervisor.run(Task("publish", "another payload", key="lost")) == "payload"
    assert seen == ["payload"]


@virtual
async def test_its_compensations_have_the_payload_with_which_it_began(effects: Effects) -> None:
    seen: list[str] = []

    @saga("publish")
    async def publish(run: SagaRun, payload: str) -> None:
        seen.append(payload)
        await run.step("a", effects.does("a"), payload, compensate=effects.undoes("a"))

    log = UnscannedLog()
    compensating = CompensatingEntry(at=0.0, error_type="ValueError", error="no")
    await left_by_a_lost_process(log, "publish", started("a", compensable=True), done("a"), compensating)
    async with supervisor_of(log, publish) as supervisor:
        result = await (await supervisor.submit(Task("publish", "another payload", key="lost")))
    assert result.status is TaskStatus.FAILED
    assert (await history_of(log, "lost")).state is SagaState.COMPENSATED
    assert (seen, effects.calls) == (["payload"], ["undo a"])


@virtual
async def test_the_key_of_another_saga_does_not_touch_it(effects: Effects, log: MemorySagaLog) -> None:
    @saga("bill")
    async def bill(run: SagaRun, payload: str) -> None:
        await run.step("charge", effects.does("charge"), payload)

    await left_by_a_lost_process(log, "publish", started("a", compensable=True), done("a"))
    async with supervisor_of(log, bill) as supervisor:
        result = await (await supervisor.submit(Task("bill", "payload", key="lost")))
    assert isinstance(result.cause, InvalidSaga)
    assert "give its task another key" in str(result.cause)
    async with supervisor_of(log, two_steps(effects)) as supervisor:
        assert await supervisor.run(Task("publish", "payload", key="lost")) == "b done"
    assert effects.calls == ["b"]
