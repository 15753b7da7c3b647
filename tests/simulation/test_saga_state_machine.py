"""Sagas of random shapes on supervisors that come and go, against a model of their effects, in virtual time.

Sagas are submitted, cancelled and cut off; processes drain, close, and are lost between any two things that they do;
the log is slow, away, or loses its answers; a person looks after what is parked. `World` checks each call when it
begins. In the end every saga is done, compensated or parked for a reason, and its effects are those of its state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.simulation.saga_world import Behaviour, Kind, SagaPlan, SagaProcess, StepPlan, UndoBehaviour, World

from forebay import Task
from forebay.overflow import encode_result
from forebay.retry import Retry
from forebay.saga import SagaState
from forebay.saga.records import DoneEntry, FailedEntry, LogWrite, ResolvedEntry, RetriedEntry, StepState, encode_entry
from forebay.simulation import VirtualLoop

T = TypeVar("T")

MAX_PROCESSES = 3
SECONDS = st.sampled_from([0.0, 0.001, 0.7, 3.0])
LAST: list[Behaviour] = ["returns", "returns", "returns", "returns", "raises", "is refused", "has done nothing"]
LAST += ["gets no answer"]
UNDO_FAILURES: list[UndoBehaviour] = ["raises", "raises after its effect"]
KINDS: list[Kind] = ["compensable", "compensable", "compensable", "plain"]
ANY: list[Behaviour] = [*LAST[3:], "gets no answer to its effect", "hangs", "hangs after its effect"]


@st.composite
def step_plans(draw: st.DrawFn, kind: Kind, *, may_fail: bool) -> StepPlan:
    """Draw a step; one that may not always fail returns after some calls."""
    odd = draw(st.sampled_from([False, True] if kind == "pivot" else [False, False, True]))
    early: list[Behaviour] = [*ANY]
    last: list[Behaviour] = [*LAST] if may_fail else ["returns"]
    if kind == "compensable":
        early += ["raises after its effect", "returns what cannot be stored"]
        last += ["hangs", "hangs after its effect", "raises after its effect", "returns what cannot be stored"]
    elif kind == "pivot":
        early += ["returns what cannot be stored"]
    calls = draw(st.lists(st.sampled_from(early), min_size=int(kind == "pivot"), max_size=2)) if odd else []
    idempotent = draw(st.booleans())
    failures = draw(st.sampled_from([0, 0, 0, 1, 2, 2, 3])) if kind == "compensable" else 0
    fails = st.sampled_from(UNDO_FAILURES)
    undo = draw(st.lists(fails, min_size=failures, max_size=failures))
    if failures and draw(st.booleans()):
        undo[0] = "is overloaded"
    return StepPlan(
        kind=kind,
        idempotent=idempotent,
        checks=draw(st.sampled_from([None, None, 0, 0, 1, 5])),
        retries=idempotent and draw(st.booleans()),
        optional=odd and kind in ("compensable", "plain") and draw(st.booleans()),
        together=kind != "pivot" and draw(st.booleans()),
        impatient=draw(st.sampled_from([None, None, None, 2.0])) if odd and kind == "compensable" else None,
        behaviours=[*calls, draw(st.sampled_from(last)) if odd else "returns"],
        before=draw(SECONDS),
        after=draw(SECONDS),
        undo=[*undo, "returns"],
    )


@st.composite
def saga_plans(draw: st.DrawFn) -> SagaPlan:
    """Draw a saga: steps that are compensable or plain, then perhaps a pivot, and steps after it."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    steps = [draw(step_plans(kind, may_fail=True)) for kind in kinds]
    if draw(st.sampled_from([True, True, False])):
        steps.append(draw(step_plans("pivot", may_fail=True)))
        after = [draw(step_plans("after", may_fail=True)) for _ in range(draw(st.integers(0, 2)))]
        if after:
            after[0] = _alone(after[0])
        steps += after
    return SagaPlan([_alone(steps[0]), *steps[1:]], raises=draw(st.sampled_from([False, False, False, True])))


def _alone(step: StepPlan) -> StepPlan:
    return StepPlan(**{**vars(step), "together": False})


class SagaMachine(RuleBasedStateMachine):
    """Does random things to sagas and their processes."""

    @initialize(plans=st.lists(saga_plans(), min_size=2, max_size=4))
    def build(self, plans: list[SagaPlan]) -> None:
        logging.disable(logging.CRITICAL)
        self.loop = VirtualLoop(0, jitter=0.0, executor_delay=(0.0, 0.0))
        self.world = self.run(self.make_world())
        self.processes: list[SagaProcess] = []
        self.all_processes: list[SagaProcess] = []
        self.endings: list[asyncio.Task[None]] = []
        self.started = 0
        self.start_process()
        for plan in plans:
            self.submit(plan, 0, None, 1)

    async def make_world(self) -> World:
        return World()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def advance(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    def process(self, number: int) -> SagaProcess:
        return self.processes[number % len(self.processes)]

    # --- processes ---

    @precondition(lambda self: len(self.processes) < MAX_PROCESSES)
    @rule()
    def start_process(self) -> None:
        process = SagaProcess(self.world)
        self.all_processes.append(process)
        self.processes.append(process)
        self.run(process.supervisor.start())

    @precondition(lambda self: self.processes)
    @rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        self.processes.pop(number % len(self.processes)).lose()

    @precondition(lambda self: self.processes)
    @rule(number=st.integers(0, 2), after=st.integers(0, 30))
    def lose_soon(self, number: int, after: int) -> None:
        self.process(number).fuse = after

    @precondition(lambda self: self.processes)
    @rule(number=st.integers(0, 2), limit=st.sampled_from([None, 0.0, 0.5, 4.0]), drains=st.booleans())
    def stop(self, number: int, limit: float | None, *, drains: bool) -> None:
        process = self.processes.pop(number % len(self.processes))

        async def end() -> None:
            if drains:
                await process.supervisor.drain(limit)
            await process.supervisor.close()
            process.lose()  # the program ends

        self.endings.append(self.loop.create_task(end()))
        self.advance(0.0)

    # --- the log ---

    @precondition(lambda self: self.processes)
    @rule(number=st.integers(0, 2), seconds=st.sampled_from([0.02, 1.5, 14.0]), loses_answers=st.booleans())
    def lose_the_log(self, number: int, seconds: float, *, loses_answers: bool) -> None:
        log = self.process(number).log
        log.away_until, log.loses_answers = self.loop.time() + seconds, loses_answers

    @precondition(lambda self: self.processes)
    @rule(number=st.integers(0, 2), loses_answers=st.booleans(), seconds=st.sampled_from([0.0, 0.3, 1.1, 4.3]))
    def be_overtaken(self, number: int, seconds: float, *, loses_answers: bool) -> None:
        """Have a process lose the log while it drives sagas, for so long that another one takes them."""
        self.start_process()
        self.advance(seconds)
        self.lose_the_log(number, 14.0, loses_answers=loses_answers)
        self.advance(11.9)

    @precondition(lambda self: self.processes)
    @rule(number=st.integers(0, 2), seconds=st.sampled_from([0.0, 0.01, 0.6]))
    def slow_the_log_down(self, number: int, seconds: float) -> None:
        self.process(number).log.delay = seconds

    # --- tasks ---

    @precondition(lambda self: self.processes and len(self.world.plans) < 6)
    @rule(
        plan=saga_plans(),
        number=st.integers(0, 2),
        timeout=st.sampled_from([None, None, 0.5, 5.0]),
        attempts=st.sampled_from([1, 1, 2]),
    )
    def submit(self, plan: SagaPlan, number: int, timeout: float | None, attempts: int) -> None:
        saga_id = f"s{len(self.world.plans)}"
        self.world.plans[saga_id] = plan
        self.submit_again(saga_id, number, timeout, attempts)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), number=st.integers(0, 2))
    def repeat(self, data: st.DataObject, number: int) -> None:
        self.submit_again(data.draw(st.sampled_from(sorted(self.world.plans))), number, None, 1)

    def submit_again(self, saga_id: str, number: int, timeout: float | None, attempts: int) -> None:
        process = self.process(number)
        retry = Retry(max_attempts=attempts, base_delay=0.5) if attempts > 1 else None
        payload = self.world.plans[saga_id].as_payload()

        async def submit() -> None:
            task = Task("saga", payload, key=saga_id, timeout=timeout, retry=retry)
            process.tickets.append(process.supervisor.submit_nowait(task))

        self.run(submit())

    @precondition(lambda self: any(process.tickets for process in self.processes))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        tickets = [ticket for process in self.processes for ticket in process.tickets]
        ticket = data.draw(st.sampled_from([each for each in tickets if not each.done()] or tickets))

        async def cancel() -> None:
            ticket.cancel()

        self.run(cancel())

    @rule(seconds=st.sampled_from([0.0011, 0.013, 0.3, 1.1, 3.1]))
    def wait(self, seconds: float) -> None:
        self.advance(seconds)

    @rule(seconds=st.sampled_from([4.3, 4.3, 11.9, 31.7]))
    def wait_long(self, seconds: float) -> None:
        self.advance(seconds)

    # --- a person ---

    @rule(data=st.data(), closes=st.sampled_from([False, False, False, True]))
    def look_after_parked(self, data: st.DataObject, *, closes: bool) -> None:
        parked = [saga_id for saga_id in self.world.plans if self.state(saga_id) is SagaState.PARKED]
        if parked:
            self.look_after(data.draw(st.sampled_from(parked)), closes=closes)

    def state(self, saga_id: str) -> SagaState | None:
        stored = self.world.stored(saga_id)
        return None if stored is None else stored.header.state

    def look_after(self, saga_id: str, *, closes: bool) -> None:
        """Say what has become of each step of which nobody knows, and let the saga go on."""
        history, now = self.world.history(saga_id), self.loop.wall_time()
        entries: list[DoneEntry | FailedEntry | RetriedEntry] = []
        if closes:
            self.world.closed.add((saga_id, history.round))
            write = LogWrite(history.count, [encode_entry(ResolvedEntry(at=now))], SagaState.RESOLVED)
        else:
            for step in history.steps.values():
                if step.state is not StepState.STARTED:
                    continue
                if step.key in self.world.effects:
                    output = encode_result(f"output of {step.key}", task_id=step.name, bound=1000)
                    entries.append(DoneEntry(at=now, step=step.name, output=output, by="me"))
                else:
                    entries.append(FailedEntry(at=now, step=step.name, error_type="x", error="x", clean=True))
            state = SagaState.COMPENSATING if history.goes_back else SagaState.RUNNING
            entries.append(RetriedEntry(at=now))
            write = LogWrite(history.count, [encode_entry(each) for each in entries], state)
        assert self.run(self.world.log.amend(saga_id, write, now=now))

    # --- invariants ---

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "world"):
            assert not self.world.wrong, self.world.report()

    def teardown(self) -> None:
        """Let every saga come to its end, and look at it."""
        try:
            if not hasattr(self, "world") or self.world.wrong:  # found, or given up in `build`
                return
            self.heal()
            self.advance(900.0)
            self.world.check_end()
            assert not self.world.wrong, self.world.report()
            assert all(ticket.done() for process in self.processes for ticket in process.tickets)
            assert all(ending.done() for ending in self.endings if not self.lost_while_ending())
        finally:
            if hasattr(self, "world"):
                self.end()
            logging.disable(logging.NOTSET)

    def lost_while_ending(self) -> bool:
        return any(process.lost for process in self.all_processes)

    def heal(self) -> None:
        """Let nothing go wrong any more, and have a process that lives."""
        for process in self.processes:
            process.fuse, process.log.delay, process.log.away_until = None, 0.0, 0.0
        self.processes = [process for process in self.processes if not process.lost]
        self.start_process()

    def end(self) -> None:
        """End what hangs."""
        self.run(self.close_all())
        self.loop.close()

    async def close_all(self) -> None:
        self.world.over.set()
        for process in self.all_processes:
            process.lose()
            await process.supervisor.close()
        await asyncio.sleep(100.0)


def test_sagas_agree_with_the_model() -> None:
    run_state_machine_as_test(SagaMachine, settings=settings(stateful_step_count=25))


@pytest.mark.slow
def test_many_sagas_agree_with_the_model() -> None:
    run_state_machine_as_test(SagaMachine, settings=settings(stateful_step_count=50, max_examples=150))
