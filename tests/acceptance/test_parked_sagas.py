"""Parked sagas go on in a supervisor, as a person decides who has the same log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Retry, Task, TaskStatus
from forebay.saga import MemorySagaLog, Saga, SagaAdmin, SagaRun, SagaState, saga

SCANNED = 15.0  # seconds after which a supervisor has looked for sagas that may go on: a third of its lease, and some


class World:
    """A saga of three steps, what it has called, and what fails: `act` is the pivot, `send` comes after it."""

    def __init__(self) -> None:
        self.log = MemorySagaLog()
        self.admin = SagaAdmin(self.log)
        self.called: list[str] = []
        self.fails: dict[str, Exception] = {}

    def call(self, name: str, *given: Any) -> str:
        self.called.append(" ".join(map(str, (name, *given))))
        if name in self.fails:
            raise self.fails[name]
        return f"{name} done"

    def saga(self) -> Saga:
        async def research(_: str) -> str:
            return self.call("research")

        async def forget(_: str) -> None:
            self.call("forget")

        async def act(_: str) -> Any:
            return self.call("act")

        async def send(acted: Any) -> str:
            return self.call("send", acted)

        @saga("publish", undo_retry=Retry(max_attempts=1))
        async def publish(run: SagaRun, payload: str) -> str:
            found = await run.step("research", research, payload, compensate=forget)
            acted = await run.step("act", act, found, pivot=True)
            sent: str = await run.step("send", send, acted)
            return sent

        return publish

    @asynccontextmanager
    async def parked(self, **fails: Exception) -> AsyncIterator[BackpressureSupervisor]:
        """Run a supervisor in which the saga ``s`` is parked, because these steps fail."""
        self.fails = fails
        async with BackpressureSupervisor(saga_log=self.log, lag_bound=None) as supervisor:
            supervisor.register_worker("publisher", handler=self.saga(), task_types=["publish"])
            result = await (await supervisor.submit(Task("publish", "p", task_id="s")))
            assert result.status is TaskStatus.FAILED
            assert (await self.admin.show("s")).state is SagaState.PARKED
            self.called.clear()
            self.fails = {}
            yield supervisor

    async def settled(self) -> SagaState:
        """Return the state of the saga once a supervisor has had the time to drive it."""
        await asyncio.sleep(SCANNED)
        return (await self.admin.show("s")).state


@pytest.fixture
def world() -> World:
    return World()


UNKNOWN = ConnectionError("no answer")
BROKEN = ValueError("broken")


@virtual
async def test_a_step_that_a_person_says_is_done_is_not_called_and_its_output_is_used(world: World) -> None:
    async with world.parked(act=UNKNOWN):
        await world.admin.resolve("s", "act", output={"id": 7})
        assert await world.settled() is SagaState.DONE
    assert world.called == ["send {'id': 7}"]


@virtual
async def test_a_pivot_that_a_person_says_is_not_done_takes_the_saga_back(world: World) -> None:
    async with world.parked(act=UNKNOWN):
        await world.admin.resolve("s", "act", outcome="not-done", note="not in the list")
        assert await world.settled() is SagaState.COMPENSATED
    assert world.called == ["forget"]
    assert "a person says that it was not done: not in the list" in (await world.admin.show("s")).error


@virtual
async def test_a_saga_whose_cause_is_gone_goes_back_when_it_is_retried(world: World) -> None:
    async with world.parked(act=BROKEN, forget=BROKEN):
        assert await world.admin.retry("s") is SagaState.COMPENSATING
        assert await world.settled() is SagaState.COMPENSATED
    assert world.called == ["forget"]


@virtual
async def test_a_step_that_a_person_has_undone_is_not_undone_again(world: World) -> None:
    async with world.parked(act=BROKEN, forget=BROKEN):
        await world.admin.resolve("s", "research", outcome="undone")
        assert await world.settled() is SagaState.COMPENSATED
    assert world.called == []


@virtual
async def test_a_step_past_the_pivot_is_called_again_when_the_saga_is_retried(world: World) -> None:
    async with world.parked(send=BROKEN):
        assert await world.admin.retry("s") is SagaState.RUNNING
        assert await world.settled() is SagaState.DONE
    assert world.called == ["send act done"]


@virtual
async def test_a_step_past_the_pivot_that_a_person_has_done_is_not_called(world: World) -> None:
    async with world.parked(send=BROKEN):
        await world.admin.resolve("s", "send", output="by hand")
        assert await world.settled() is SagaState.DONE
    assert world.called == []
    assert (await world.admin.show("s", outputs=True)).outputs[-1].value == "by hand"  # type: ignore[index]


@virtual
async def test_a_saga_that_is_parked_again_says_why(world: World) -> None:
    async with world.parked(act=BROKEN, forget=BROKEN):
        world.fails = {"forget": ValueError("still broken")}
        await world.admin.retry("s")
        assert await world.settled() is SagaState.PARKED
    view = await world.admin.show("s")
    assert ("still broken" in view.why, view.parked_step, view.steps[0].undo_failures) == (True, "research", 2)


@virtual
async def test_a_closed_saga_stays_closed_until_its_task_is_submitted_again(world: World) -> None:
    async with world.parked(act=UNKNOWN) as supervisor:
        await world.admin.resolve("s", note="paid by hand")
        assert (await world.settled(), world.called) == (SagaState.RESOLVED, [])
        assert await supervisor.run(Task("publish", "p", task_id="s")) == "send done"
    view = await world.admin.show("s")
    assert (view.state, [step.key for step in view.steps]) == (SagaState.DONE, ["s/2/research", "s/2/act", "s/2/send"])


@virtual
async def test_a_step_whose_own_compensation_failed_may_be_undone_while_its_saga_goes_forward(world: World) -> None:
    async with world.parked(research=UNKNOWN, forget=BROKEN):
        assert (await world.admin.show("s")).parked_step == "research"
        await world.admin.resolve("s", "research", outcome="undone")
        assert await world.settled() is SagaState.COMPENSATED
    assert world.called == []
