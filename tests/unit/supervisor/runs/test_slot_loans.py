"""Slot loans and claims: a run that awaits a task lends its slot, and gets it back before new tasks start."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from tests.support.task_plane import run_ready, virtual
from tests.unit.supervisor.test_pool import worker
from tests.unit.supervisor.test_ticket import new_ticket

from forebay.supervisor.runs.run import ActiveRuns, Run, RunOwner, SlotClaims
from forebay.supervisor.runs.slot_loans import SlotLoan, active_runs
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Task


class Core:
    """As much of a supervisor's core as runs need."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()


class Owner:
    """As much of a dispatcher as loans and claims need."""

    def __init__(self) -> None:
        self.core = Core()
        self.slot_claims = SlotClaims()

    def take_slot(self, run: Run) -> None:
        run.take_slot()
        run.worker.take_slot(probe=run.is_probe)

    def return_slot(self, run: Run) -> None:
        run.worker.return_slot(probe=run.is_probe)
        self.slot_claims.grant(run.worker)


def start(owner: Owner, agent: WorkerAgent, parent: Run | None = None) -> Run:
    """Start a run on `agent`, below `parent` if that is given."""
    ticket = new_ticket()
    if parent is not None:
        ticket = Ticket(ticket._dispatcher, Task("a"), None, parent)
    run = Run(cast("RunOwner", owner), ticket, ticket.task, None, agent, 0, agent.breaker_phase, 0.0)
    ticket.start(run)
    agent.take_slot(probe=False)
    return run


@virtual
async def test_an_awaiting_run_lends_its_slot_and_gets_it_back() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = SlotLoan(cast("RunOwner", owner), run)
    assert (agent.current_tasks, run.holds_slot, run.lends_slot) == (0, False, True)
    await loan.reclaim()
    assert (agent.current_tasks, run.holds_slot, run.lends_slot) == (1, True, False)


@virtual
async def test_two_awaits_lend_one_slot() -> None:
    owner, agent = Owner(), worker(slots=2)
    run, other = start(owner, agent), start(owner, agent)
    loans = [SlotLoan(cast("RunOwner", owner), run) for _ in range(2)]
    assert agent.current_tasks == 1
    await loans[0].reclaim()
    assert agent.current_tasks == 1  # it still awaits the second task
    await loans[1].reclaim()
    assert agent.current_tasks == 2
    assert other.holds_slot


@virtual
async def test_an_await_of_another_supervisor_lends_nothing() -> None:
    owner, stranger, agent = Owner(), Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = SlotLoan(cast("RunOwner", stranger), run)
    assert agent.current_tasks == 1
    await loan.reclaim()
    assert run.holds_slot


@virtual
async def test_a_claim_waits_until_a_slot_is_free() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = SlotLoan(cast("RunOwner", owner), run)
    other = start(owner, agent)
    reclaiming = asyncio.ensure_future(loan.reclaim())
    await asyncio.sleep(0)
    assert agent.pending_claims == 1
    assert not agent.can_accept()
    other.end()
    owner.return_slot(other)
    await reclaiming
    assert run.holds_slot
    assert (agent.current_tasks, agent.pending_claims) == (1, 0)


@virtual
async def test_the_cancelled_claim_of_an_abandoned_run_is_withdrawn() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = SlotLoan(cast("RunOwner", owner), run)
    start(owner, agent)
    reclaiming = asyncio.ensure_future(loan.reclaim())
    await asyncio.sleep(0)
    run.mark_abandoned(1.0)
    reclaiming.cancel()
    await asyncio.wait([reclaiming])
    assert reclaiming.cancelled()
    assert agent.pending_claims == 0


@virtual
async def test_a_cancelled_claim_of_a_run_that_goes_on_waits_for_its_slot() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = SlotLoan(cast("RunOwner", owner), run)
    other = start(owner, agent)
    reclaiming = asyncio.ensure_future(loan.reclaim())
    for _ in range(3):
        await asyncio.sleep(0)
        reclaiming.cancel()
    await run_ready()
    assert not reclaiming.done()
    other.end()
    owner.return_slot(other)
    await asyncio.wait([reclaiming])
    assert reclaiming.cancelled()
    assert run.holds_slot
    assert (agent.current_tasks, agent.pending_claims) == (1, 0)


@virtual
async def test_an_abandoned_run_does_not_wait_for_a_slot() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = SlotLoan(cast("RunOwner", owner), run)
    start(owner, agent)
    run.mark_abandoned(1.0)
    await loan.reclaim()
    assert not run.holds_slot
    assert agent.pending_claims == 0


@virtual
async def test_the_ancestors_of_a_run_lend_their_slots_too() -> None:
    owner, agent = Owner(), worker(slots=2)
    parent = start(owner, agent)
    child = start(owner, agent, parent)
    outer = SlotLoan(cast("RunOwner", owner), parent)
    inner = SlotLoan(cast("RunOwner", owner), child)
    assert list(active_runs(child, owner)) == [child, parent]
    assert agent.current_tasks == 0
    await inner.reclaim()
    await outer.reclaim()
    assert agent.current_tasks == 2


@virtual
async def test_runs_are_kept_by_worker_in_the_order_of_their_starts() -> None:
    owner, agent, runs = Owner(), worker(slots=3), ActiveRuns()
    runs.add_worker(agent)
    first, second = start(owner, agent), start(owner, agent)
    for run in (first, second):
        runs.add(run)
    runs.move_to_end(first)
    assert runs.on(agent) == [second, first]
    runs.remove(second)
    runs.remove(second)
    assert runs.all() == [first]
    unknown: Any = worker("unknown")
    assert runs.on(unknown) == []
