"""Slot loans and claims: a run that awaits a task lends its slot, and gets it back before new tasks start."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from tests.support.task_plane import run_ready, virtual
from tests.unit.supervisor.test_pool import worker
from tests.unit.supervisor.test_ticket import new_ticket

from forebay.supervisor.runs.run import ActiveRuns, Run, RunOwner, SlotClaims
from forebay.supervisor.runs.slot_loans import SlotLoan, active_runs
from forebay.supervisor.tenants import Tenants
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Priority, Task


class Core:
    """As much of a supervisor's core as runs need."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.tenants = Tenants({})


class Owner:
    """As much of a dispatcher as loans and claims need."""

    def __init__(self) -> None:
        self.core = Core()
        self.slot_claims = SlotClaims()
        self.dispatched: list[WorkerAgent] = []

    def is_above(self, other: object) -> bool:  # noqa: ARG002 - see RunOwner
        return False

    def take_slot(self, run: Run) -> None:
        run.take_slot()
        run.worker.take_slot(0.0, probe=run.is_probe)

    def lend_slot(self, run: Run) -> None:
        run.give_slot()
        self.return_slot(run)

    def return_slot(self, run: Run) -> None:
        run.worker.return_slot(0.0, probe=run.is_probe)
        self.slot_claims.grant(run.worker)

    def dispatch(self, worker: WorkerAgent) -> None:
        self.dispatched.append(worker)


def start(owner: Owner, agent: WorkerAgent, parent: Run | None = None) -> Run:
    """Start a run on `agent`, below `parent` if that is given."""
    ticket = new_ticket()
    if parent is not None:
        ticket = Ticket(ticket._dispatcher, Task("a"), None, parent)
    run = Run(cast("RunOwner", owner), ticket, ticket.task, None, agent, 0, agent.breaker_phase, 0.0)
    ticket.start(run)
    agent.take_slot(0.0, probe=False)
    return run


def lend(owner: Owner, awaiting: Run, awaited: Ticket | None = None) -> SlotLoan:
    """Lend the slot of `awaiting` while it awaits a task of its own, which is queued, or another that is given."""
    return SlotLoan(cast("RunOwner", owner), awaiting, child_of(awaiting) if awaited is None else awaited)


def child_of(run: Run) -> Ticket:
    """Return the ticket of a nested task that is queued."""
    ticket = Ticket(new_ticket()._dispatcher, Task("a"), None, run)
    ticket.nest(order_time=None)
    ticket.enqueue([(0, 0.0), 0, ticket, 2])
    return ticket


@virtual
async def test_an_awaiting_run_lends_its_slot_and_gets_it_back() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = lend(owner, run)
    assert (agent.current_tasks, run.holds_slot, run.lends_slot) == (0, False, True)
    await loan.reclaim()
    assert (agent.current_tasks, run.holds_slot, run.lends_slot) == (1, True, False)


@virtual
async def test_two_awaits_lend_one_slot() -> None:
    owner, agent = Owner(), worker(slots=2)
    run, other = start(owner, agent), start(owner, agent)
    loans = [lend(owner, run) for _ in range(2)]
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
    loan = lend(stranger, run)
    assert agent.current_tasks == 1
    await loan.reclaim()
    assert run.holds_slot


@virtual
async def test_a_claim_waits_until_a_slot_is_free() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    loan = lend(owner, run)
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
    loan = lend(owner, run)
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
    loan = lend(owner, run)
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
    loan = lend(owner, run)
    start(owner, agent)
    run.mark_abandoned(1.0)
    await loan.reclaim()
    assert not run.holds_slot
    assert agent.pending_claims == 1, "it may not stop: then it is at work, and the next free slot is its own"


@virtual
async def test_the_ancestors_of_a_run_lend_their_slots_too() -> None:
    owner, agent = Owner(), worker(slots=2)
    parent = start(owner, agent)
    child = start(owner, agent, parent)
    outer = lend(owner, parent)
    inner = lend(owner, child)
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
    assert list(runs) == [first]
    unknown: Any = worker("unknown")
    assert runs.on(unknown) == []


# --- which suspended runs keep new ones from beginning ---------------------------------------------------------------


@virtual
async def test_a_worker_begins_no_new_run_while_too_many_of_its_runs_wait_for_their_own_tasks() -> None:
    owner, agent = Owner(), worker(slots=2)
    runs = [start(owner, agent) for _ in range(2)]
    loans = [lend(owner, run) for run in runs]
    assert not agent.bars_new_runs(Priority.NORMAL)
    runs += [start(owner, agent) for _ in range(2)]
    assert (agent.current_tasks, agent.suspended, agent.bars_new_runs(Priority.NORMAL)) == (2, 2, True)
    owner.lend_slot(runs[2])
    assert (agent.current_tasks, agent.suspended, agent.bars_new_runs(Priority.NORMAL)) == (1, 3, True)
    await loans[0].reclaim()
    assert (agent.current_tasks, agent.suspended, agent.bars_new_runs(Priority.NORMAL)) == (2, 2, True)
    runs[1].end()
    assert (agent.suspended, agent.suspended_open) == (1, [0, 0, 1, 0])
    assert not agent.bars_new_runs(Priority.NORMAL)


@virtual
async def test_a_run_that_waits_for_what_must_begin_first_does_not_count_nor_do_those_above_it() -> None:
    owner, agent = Owner(), worker(slots=2)
    parent = start(owner, agent)
    outer = lend(owner, parent)
    child = start(owner, agent, parent)
    assert (agent.suspended, sum(agent.suspended_open)) == (1, 1)
    parked = child_of(child)
    parked.leave_queue()
    inner = lend(owner, child, parked)
    assert (agent.suspended, sum(agent.suspended_open)) == (2, 0)
    assert owner.dispatched == [agent]
    await inner.reclaim()
    assert (agent.suspended, sum(agent.suspended_open)) == (1, 1)
    await outer.reclaim()
    assert (agent.suspended, sum(agent.suspended_open)) == (0, 0)


@virtual
async def test_a_run_does_not_count_while_it_waits_for_any_task_that_is_not_its_own() -> None:
    owner, agent = Owner(), worker(slots=1)
    run = start(owner, agent)
    own, other = lend(owner, run), lend(owner, run, new_ticket())
    assert (agent.suspended, sum(agent.suspended_open)) == (1, 0)
    await other.reclaim()
    assert (agent.suspended, sum(agent.suspended_open)) == (1, 1)
    run.end()
    await own.reclaim()
    assert (agent.suspended, sum(agent.suspended_open)) == (0, 0)


@virtual
async def test_suspended_runs_of_lower_priorities_keep_no_better_one_from_beginning() -> None:
    owner, agent = Owner(), worker(slots=1)
    for _ in range(2):
        lend(owner, start(owner, agent))
    assert [agent.bars_new_runs(priority) for priority in Priority] == [False, False, True, True]
