"""The dispatcher: queues tasks, gives each to a worker, and starts it; all within one event loop, without an await."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from forebay._text import format_duration
from forebay.admission import RANK_LAST
from forebay.context import RunningTask
from forebay.errors import SupervisorClosed, UnknownTask
from forebay.events import TaskStarted
from forebay.supervisor.conversations import Conversations
from forebay.supervisor.held_tasks import HeldTasks
from forebay.supervisor.load import SystemLoad
from forebay.supervisor.pool import NESTED, NESTED_ELSEWHERE, NOT_NESTED, Pool
from forebay.supervisor.pools import ServedPools, urgency_among
from forebay.supervisor.runs.completion import RunCompletion
from forebay.supervisor.runs.retries import TaskRetries
from forebay.supervisor.runs.run import ActiveRuns, Run, SlotClaims
from forebay.supervisor.runs.runner import RunnerPool
from forebay.supervisor.runs.scheduled_tasks import ScheduledTasks
from forebay.supervisor.runs.slot_loans import lend_slots
from forebay.supervisor.spill.spill import Spill
from forebay.supervisor.start_gate import OtherWorkers, StartGate
from forebay.supervisor.ticket import Reclaim, Ticket, unsuccessful_result
from forebay.supervisor.tree.restart_intensity import RestartIntensity
from forebay.supervisor.tree.supervision import Supervision
from forebay.supervisor.worker import URGENT, WorkerAgent
from forebay.supervisor.worker_starts import WorkerStarts
from forebay.task import Priority, Task, TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.admission import QueueEntry
    from forebay.interfaces import LoadSource, TaskRecord, TaskStore
    from forebay.supervisor.core import Core
    from forebay.supervisor.nested_supervisor import NestedSupervisor
    from forebay.supervisor.saga_driver import SagaDriver
    from forebay.supervisor.settings import SupervisorSettings
    from forebay.supervisor.slot_counts import SlotCounts


class Dispatcher:
    """The tasks inside a supervisor, waiting and running. It belongs to one event loop.

    Attributes:
        started: how many handlers have been started.
        retries: the tasks that wait for their next attempt.
        sagas: the sagas that are driven here, if there is a log.
        scheduled: the tasks that wait here for their `not_before`.
        held: the tasks that wait for a cheaper worker though a slot is free.
        wait_listeners: called whenever a task begins to wait, or a run to await one.
    """

    def __init__(
        self,
        core: Core,
        settings: SupervisorSettings,
        *,
        store: TaskStore | None,
        draw: Callable[[], float],
        remove_worker: Callable[[WorkerAgent], None],
    ) -> None:
        self.core = core
        self.loop = core.loop
        self.workers: dict[str, WorkerAgent] = {}
        self.runs = ActiveRuns()
        self.slot_claims = SlotClaims()
        self.wait_listeners: list[Callable[[], None]] = []
        self.started = 0
        self.conversations = Conversations()
        self.load = SystemLoad(core.pools.by_type, self.workers)
        self.start_gate = StartGate(core, dispatch=self._dispatch_if_known, runs=self.runs)
        self.retries = TaskRetries(core, self, budget=settings.retry_budget, draw=draw)
        self.scheduled = ScheduledTasks(core, self)
        self.held = HeldTasks(core, self, max_wait=settings.max_cost_wait)
        self.completion = RunCompletion(
            core,
            self,
            runs=self.runs,
            retries=self.retries,
            on_run_end=self.start_gate.run_ended,
            zombie_grace=settings.zombie_grace,
        )
        self.runner_pool = RunnerPool(core.loop, self.completion.handler_ended, core.base_context)
        self.spill = None if store is None else Spill(core, self, store, runs=self.runs, settings=settings)
        if self.spill is not None:
            self.load.add_overflow(self.spill.stored.load)
        self.sagas: SagaDriver | None = None
        self.starts = WorkerStarts(core, self)
        self.supervision = Supervision(
            core,
            self,
            strategy=settings.restart_strategy,
            intensity=RestartIntensity(settings.max_restarts, settings.within),
            grace=settings.zombie_grace,
            max_attempts=settings.max_attempts,
            remove=remove_worker,
        )
        self._registry = core.registry
        self._timers = core.timers
        self.tenants = core.tenants
        self._bus = core.bus
        self._pools: Mapping[str, Pool] = core.pools.by_type
        self._served_by: Mapping[WorkerAgent, ServedPools] = core.pools.by_worker
        self._counts_of: Mapping[WorkerAgent, Sequence[SlotCounts]] = core.pools.counts_of
        self._nested: dict[WorkerAgent, NestedSupervisor] = {}
        self._sequence_number = 0

    def drive_sagas(self, sagas: SagaDriver) -> None:
        """Set the driver of the sagas; it needs the admission, which is made after this."""
        self.sagas = sagas

    # --- workers and their slots ---

    def add_worker(self, worker: WorkerAgent) -> None:
        """Add a worker; it takes tasks at once."""
        self.workers[worker.name] = worker
        if worker.reserve or self.tenants.bounded:
            worker.count_tasks()
        if worker.handler.nested_supervisor is not None:
            self._nested[worker] = cast("NestedSupervisor", worker.handler.nested_supervisor)
        self.runs.add_worker(worker)
        for source in worker.sources:
            self.start_gate.watch(worker, source)
        for pool in self.core.pools.add_worker(worker):
            if self.spill is not None:
                self.spill.refiller.add_pool(pool)
        self.update_slots(worker)

    def unlist_worker(self, worker: WorkerAgent) -> None:
        """Let another worker have the name of `worker`, which is leaving."""
        del self.workers[worker.name]

    def forget_worker(self, worker: WorkerAgent) -> list[Pool]:
        """Forget a worker that is leaving, and on which nothing runs any more. Return the pools that are gone with it.

        The tasks that wait for it alone have ended.
        """
        served = self._served_by[worker].pools
        self._nested.pop(worker, None)
        self.start_gate.forget(worker)
        self.completion.forget(worker)
        self.supervision.forget(worker)
        self.slot_claims.forget(worker)
        self.runs.remove_worker(worker)
        self.core.pools.remove_worker(worker)
        return [pool for pool in served if self.remove_pool_if_unused(pool)]

    def remove_pool_if_unused(self, pool: Pool) -> bool:
        """Remove a pool that has no workers and is not paused, and in which nothing waits. Return whether."""
        gone = self.core.pools.remove_if_unused(pool)
        if gone and self.spill is not None:
            self.spill.refiller.remove_pool(pool)
        return gone

    def is_above(self, other: object) -> bool:
        """Return whether the dispatcher `other` is that of a supervisor below this one."""
        return any(nested.uses(other) for nested in self._nested.values())

    def start_worker(self, worker: WorkerAgent) -> None:
        """Start the handler of a worker, unless it has started or is being started."""
        self.starts.begin(worker)

    def update_slots(self, worker: WorkerAgent) -> None:
        """Count the slots that `worker` has now, and dispatch to it."""
        before = worker.count_slots()
        for counts in self._counts_of[worker]:
            counts.count_slots(worker, before)
        self.held.slots_changed(worker)
        self.dispatch(worker)

    def take_slot(self, run: Run) -> None:
        """Take a slot for a run that has lent its own."""
        worker = run.worker
        run.take_slot()
        worker.take_slot(self.loop.time(), probe=run.is_probe)
        for counts in self._counts_of[worker]:
            counts.slot_taken(worker)
            counts.resume()
        if worker.counts_tasks:
            self._count_slot(worker, run.task, 1)

    def lend_slot(self, run: Run) -> None:
        """Lend the slot of a run that awaits a task, and start what comes next."""
        run.give_slot()
        for counts in self._counts_of[run.worker]:
            counts.suspend()
        self.return_slot(run)
        self._tell_drains()
        if self._registry.listeners and run.worker.can_accept():  # producers may wait for room
            self._registry.notify_progress()

    def suspended_run_ended(self, run: Run) -> None:
        """Forget a run that has ended without having its slot back; a new one may begin in its place."""
        self.forget_suspended(run)
        self.dispatch(run.worker)

    def forget_suspended(self, run: Run) -> None:
        """Stop counting a run that has lent its slot."""
        for counts in self._counts_of[run.worker]:
            counts.resume()

    def return_slot(self, run: Run, now: float | None = None) -> None:
        """Return the slot that a run held, and start what comes next. `now` saves asking the clock again."""
        worker = run.worker
        worker.return_slot(self.loop.time() if now is None else now, probe=worker.probing and run.is_probe)
        for counts in self._counts_of[worker]:
            counts.slot_returned(worker)
        if worker.counts_tasks:
            self._count_slot(worker, run.task, -1)
        self.dispatch(worker, now)

    def _count_slot(self, worker: WorkerAgent, task: Task, by: int) -> None:
        """Count `by` more slots as held by a task like `task`, for the reserve of `worker` and the bound of a tenant.

        A tenant whose bound is reached is served no more, and again once it is not.
        """
        if worker.reserve:
            for counts in self._counts_of[worker]:
                counts.count_reserve(worker)
        if task.priority <= URGENT:
            worker.count_urgent(by)
        if self.tenants.count_running(task.tenant, by):
            self._tenant_changed(task.tenant)
        elif by < 0 and self.tenants.has_claims(task.tenant):
            self.loop.call_soon(self._serve_tenant, task.tenant)

    def count_claims(self, tenant: str, by: int) -> None:
        """Count `by` more runs that have begun and that only the bound of `tenant` keeps from a slot.

        New tasks of the tenant do not take the slots that these may have next, on whatever worker.
        """
        if self.tenants.count_claims(tenant, by):
            self._tenant_changed(tenant)

    def _tenant_changed(self, tenant: str) -> None:
        """Serve a tenant no more because its bound is reached, or again."""
        blocked = tenant in self.tenants.blocked
        for task_type in self.tenants.waiting_types(tenant):
            self._pools[task_type].tenant_blocked(tenant, blocked=blocked)
        if not blocked:
            self.loop.call_soon(self._serve_tenant, tenant)  # not now: its run is still ending

    def _serve_tenant(self, tenant: str) -> None:
        """Give slots to runs of a tenant that claim them, and start what waits of it, where a slot is free."""
        for worker in self.slot_claims.waiting():
            self.dispatch(worker)
        pools = [self._pools[task_type] for task_type in self.tenants.waiting_types(tenant)]
        heads = [(pool, pool.queue.head()) for pool in pools]
        for pool, _ in sorted(((pool, head) for pool, head in heads if head is not None), key=urgency_among):
            self.serve(pool)
        if self.spill is not None:
            for pool in self._pools.values():
                self.spill.refiller.refill(pool)

    def serve(self, pool: Pool) -> None:
        """Start what waits in the queue of `pool`, on workers that have a free slot."""
        others: OtherWorkers | None = None  # those that have not been asked to take the head
        while pool.queue.length and not pool.paused and (head := pool.queue.head()) is not None:
            nested = head[0][0] == NESTED
            if pool.by_cost is not None and head[3] > URGENT:
                able = self.start_gate.cheapest(pool.by_cost, pool, head[2], others)
            elif others is None:
                able = pool.selector.pick(head[3], nested=nested)
            else:
                able = pool.selector.pick_among(others.count, head[3], nested=nested)
            if able is None:
                break
            self.dispatch(able)
            if pool.queue.head() is not head:
                others = None
            elif able.can_accept():  # its upstream is short; else it was the turn of another of its pools
                others = others or OtherWorkers(pool)
                others.skip(able)
                if not others:
                    break

    def lend_slots(self, running: RunningTask | None, awaited: Ticket | None) -> Reclaim | None:
        """Lend the slot of `running`, which awaits a task here or room for one, and those above it where needed."""
        return lend_slots(self, running, awaited)

    # --- into the queue, and out of it ---

    def start_or_queue(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None, *, is_due: bool = False) -> None:
        """Hold an admitted task for its time, park it behind its conversation, start it on `worker`, or queue it.

        With `is_due`, its time has come, whatever the wall clock says.
        """
        task = ticket.task
        self._registry.add(ticket)
        if task.not_before is not None and not is_due and self.scheduled.hold(ticket):
            self._tell_drains()
        elif task.thread_id is not None and not self.conversations.enter(ticket):
            ticket.wait()
            pool.park(ticket)
            self.arm_expiry(ticket)
            self._tell_drains()
        elif ticket.retries is not None and not self.retries.allow(ticket):
            pass  # it waits for the retry budget, or has ended
        elif worker is not None and not (self.tenants.bounded and task.tenant in self.tenants.blocked):
            if worker.reserve:
                self._overtake(ticket, worker)
            if pool.by_cost is None or not self.held.hold(ticket, pool, worker):
                self.start(ticket, worker)
        else:
            self.enqueue(ticket, pool)

    def _overtake(self, ticket: Ticket, worker: WorkerAgent) -> None:
        """Count those that wait as passed over, if `ticket` starts on `worker` because it may take a reserved slot."""
        if ticket.task.priority <= URGENT:
            self._served_by[worker].pass_over(ticket.task.priority)

    def recount_conversations(self) -> None:
        """Ask the overflow, in the background, which conversations have tasks in it."""
        if self.spill is not None:
            self.spill.refiller.recount_conversations_soon()

    def join_queue(self, ticket: Ticket) -> None:
        """Start or queue a task whose time has come, behind its conversation."""
        pool = self._pools[ticket.task.task_type]
        self.start_or_queue(ticket, pool, self.pick_worker(pool, ticket), is_due=True)

    def enqueue(self, ticket: Ticket, pool: Pool) -> None:
        """Put a ticket into the queue, by its priority and its rank there."""
        rank, deadline = RANK_LAST, ticket.deadline
        if deadline is not None or ticket.parent is not None or ticket.nested:  # its parent may have ended
            whose = NESTED if ticket.nested else NOT_NESTED if ticket.parent is None else NESTED_ELSEWHERE
            rank = (whose, RANK_LAST[1] if deadline is None else deadline.at)
        self._sequence_number += 1
        ticket.enqueue(pool.enqueue(ticket, rank, self._sequence_number))
        if deadline is not None:
            self.arm_expiry(ticket)
        if self.wait_listeners:
            self._tell_drains()
        if pool.source_paths:
            self.start_gate.queue_grew(pool)
        if pool.takes_turns and pool.spilled and self.spill is not None:  # the next turn may be that of a record
            self.spill.refiller.refill(pool)
        if ticket.nested and pool.queue.length > pool.nested:  # of those ahead, some workers may begin none
            for worker in pool.workers:
                if worker.suspended and worker.can_accept() and worker.bars_new_runs(Priority.LOW):
                    # Not now: a dispatch may be what queues this task, and they would pile up on the stack.
                    self.loop.call_soon(self._dispatch_if_known, worker)
                    break

    def _tell_drains(self) -> None:
        """Wake the drains: a task waits that may be unable to start, or a run awaits one."""
        for listener in self.wait_listeners:
            listener()

    def arm_expiry(self, ticket: Ticket) -> None:
        """Set the timer that ends a waiting task at its deadline."""
        if ticket.deadline is not None and ticket.expiry_timer is None:
            due = self.loop.time() + ticket.deadline.remaining()
            ticket.set_expiry(self._timers.at(due, Dispatcher._expire, self, ticket))

    def _expire(self, ticket: Ticket) -> None:
        self._end_waiting(ticket, TaskStatus.EXPIRED, "its deadline passed while it waited")

    def is_waiting(self, ticket: Ticket) -> bool:
        """Return whether a task waits in the queue, behind another one of its conversation, or for a time."""
        if ticket.queue_entry is not None or self.conversations.is_parked(ticket):
            return True
        if ticket.retries is not None and ticket.retries.waits_here:
            return True
        if self.held.count and self.held.is_waiting(ticket):
            return True
        return ticket.task.not_before is not None and self.scheduled.is_waiting(ticket)

    def dequeue(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the queue or of its conversation, whose next task may then start."""
        self._leave(ticket)
        if not ticket.is_stopping:  # else when its handler has ended
            self.next_in_conversation(ticket)

    def _leave(self, ticket: Ticket) -> None:
        # One on its way to the store waits nowhere here, and its pool may be gone.
        self._timers.cancel(ticket.clear_expiry())
        self.retries.leave(ticket)
        if self.held.count:
            self.held.leave(ticket)
        if ticket.task.not_before is not None:
            self.scheduled.leave(ticket)
        if self.conversations.is_parked(ticket):
            self.conversations.remove_parked(ticket)
            self._pools[ticket.task.task_type].unpark(ticket)
        elif (entry := ticket.leave_queue()) is not None:
            self._pools[ticket.task.task_type].remove(ticket, entry)

    def next_in_conversation(self, ticket: Ticket) -> None:
        """Start or queue the next task of the conversation, because `ticket` has really ended.

        Those that come too late end here, one after the other: a call for each would exhaust the stack.
        """
        while (following := self.conversations.end_first(ticket)) is not None:
            pool = self._pools[following.task.task_type]
            pool.unpark(following)
            if not self.retries.allow(following) or self._start_or_enqueue(following, pool):
                return
            ticket = following

    def _start_or_enqueue(self, ticket: Ticket, pool: Pool) -> bool:
        """Start a task that waits for nothing but a worker, or queue it; return False if it came too late."""
        worker = self.pick_worker(pool, ticket)
        if worker is None:
            self.enqueue(ticket, pool)
        elif self._may_still_start(ticket, pool):
            if worker.reserve:
                self._overtake(ticket, worker)
            self.start(ticket, worker)
        else:
            return False
        return True

    def proceed(self, ticket: Ticket) -> None:
        """Start or queue a task that has waited for its next attempt."""
        if not self._start_or_enqueue(ticket, self._pools[ticket.task.task_type]):
            self.next_in_conversation(ticket)

    # --- from the queue to a worker ---

    def pick_worker(self, pool: Pool, ticket: Ticket) -> WorkerAgent | None:
        """Return the worker on which a task may start now, unless other tasks wait for it.

        It is not the one on which the task failed last, if another one may start it.
        """
        if pool.has_ahead(ticket.task.priority) or ticket.task.tenant in self.tenants.blocked:
            return None
        priority, nested = ticket.task.priority, ticket.nested
        failed_on = None if ticket.retries is None else ticket.retries.failed_on
        if failed_on is not None:
            other = self.start_gate.pick(pool, priority, nested=nested, avoid=failed_on, ticket=ticket)
            if other is not None:
                return other
        return self.start_gate.pick(pool, priority, nested=nested, ticket=ticket)

    def dispatch(self, worker: WorkerAgent, now: float | None = None) -> None:  # noqa: C901 - no calls on a hot path
        """Fill the free slots of `worker`: first with runs that lent theirs, then from the heads of its queues."""
        if worker.pending_claims:
            self.slot_claims.grant(worker)
        served = self._served_by[worker]
        while worker.can_accept():
            if self.held.count and self._start_held(worker, served, now):
                continue
            entry: QueueEntry | None = None
            if (worker.suspended or worker.reserve) and not worker.may_begin(Priority.LOW):
                pool, entry = served.first_for(worker)
            else:
                pool = served.next_pool()
            if worker.sources and not self.start_gate.may_start_next(worker, pool, entry):
                pool = None
            if pool is None:
                for counts in self._counts_of[worker]:
                    counts.score_fell(worker)
                break
            ticket = pool.pop() if entry is None else pool.serve(entry)
            if (ticket.deadline is None and ticket.lease is None) or self._may_still_start(ticket, pool):
                if pool.by_cost is None or not self.held.hold(ticket, pool, worker):
                    self.start(ticket, worker, now)
            else:
                self.next_in_conversation(ticket)
        if self.spill is not None:
            self.spill.slot_freed(worker, served.with_spilled())

    def _start_held(self, worker: WorkerAgent, served: ServedPools, now: float | None) -> bool:
        """Start a held task on `worker`, if one may start there before what is queued; return whether one was taken."""
        if (ticket := self.held.next_for(worker)) is None:
            return False
        task, pool = ticket.task, self._pools[ticket.task.task_type]
        first = served.most_urgent()
        if first is not None and ticket.deadline is not None:
            queued = first[3], first[0]
            if queued < (task.priority, (NOT_NESTED, ticket.deadline.at)):
                return False  # the start gate or a reserve that stops it stops the held one, too
        if worker.sources and not self.start_gate.may_start(worker, task.priority, waiting=1):
            return False
        self.held.leave(ticket)
        if first is not None:
            served.pass_over(task.priority)
        if self._may_still_start(ticket, pool):
            self.start(ticket, worker, now)
        else:
            self.next_in_conversation(ticket)
        return True

    def refill(self, pool: Pool) -> None:
        """Take tasks of `pool` back from the overflow, if there is room for them."""
        if self.spill is not None:
            self.spill.refiller.refill(pool)

    def _dispatch_if_known(self, worker: WorkerAgent) -> None:
        """Dispatch to a worker that the start gate has stopped, and may have been unregistered since.

        Once it is full, to those that were skipped with it, because they use the same sources: nothing else remembers
        them. If it has a free slot still, the gate is shut for them, too, or nothing waits.
        """
        if worker not in self._served_by:
            return
        self.dispatch(worker)
        if worker.can_accept():
            return
        for task_type in worker.task_types:
            pool = self._pools[task_type]
            if pool.queue.length and len(pool.workers) > 1:
                self.serve(pool)

    def dispatch_to_all(self, pool: Pool) -> None:
        """Fill the free slots of all workers of a pool, and refill it."""
        workers = list(pool.workers)
        if pool.by_cost is not None:
            workers.sort(key=pool.by_cost.compared_cost_of)
        for worker in workers:
            self._dispatch_if_known(worker)
        self.refill(pool)

    def _may_still_start(self, ticket: Ticket, pool: Pool) -> bool:
        """Return whether a task whose turn has come may start; if not, it has ended or is left to another process.

        It is still the first of its conversation then: the caller goes on to the next.
        """
        if self.spill is not None and not self.spill.stored.lease_is_valid(ticket):
            self.spill.stored.lease_lapsed(ticket)
            return False
        if ticket.deadline is not None:
            pool.turn_came(self.loop.time(), ticket, ticket.deadline.remaining())
        if (reason := self.expiry_reason(ticket, pool)) is not None:
            self._end(ticket, self._result(ticket, TaskStatus.EXPIRED, reason))
        return reason is None

    def expiry_reason(self, ticket: Ticket, pool: Pool) -> str | None:
        """Return why it is too late for a task to start, or None if it is not."""
        if (deadline := ticket.deadline) is None:
            return None
        remaining = deadline.remaining()
        time = None  # for a held task, as if it had just come
        if ticket.submitted_at is not None and pool.has_waiting and not ticket.held:
            time = deadline.at - ticket.submitted_at
        now, estimate = self.loop.time(), ticket.task.estimate
        crowded = time is not None and pool.is_crowded(now, ticket)
        if remaining > 0 and not pool.cannot_meet_deadline(
            now, remaining, time=time, estimate=estimate, crowded=crowded
        ):
            return None
        if remaining <= 0:
            return f"its turn came {format_duration(-remaining)} after its deadline"
        return f"its turn came {format_duration(remaining)} before its deadline, which is too late to finish"

    def start(self, ticket: Ticket, worker: WorkerAgent, now: float | None = None) -> None:
        """Start a task on a worker that can accept it. `now` saves asking the clock again."""
        now = self.loop.time() if now is None else now
        epoch = worker.breaker.allow(now)
        if worker.probing:
            self.completion.arm_breaker_timer(worker)
        if ticket.expiry_timer is not None:
            self._timers.cancel(ticket.clear_expiry())
        run = Run(self, ticket, ticket.task, ticket.deadline, worker, epoch, worker.breaker_phase, now)
        ticket.start(run)
        if ticket.retries is not None or worker.retry is not None or ticket.task.retry is not None:
            self.retries.attempt_begins(ticket, now)
        self.runs.add(run)
        worker.start_run(now)
        for counts in self._counts_of[worker]:
            counts.slot_taken(worker)
        if worker.counts_tasks:
            self._count_slot(worker, ticket.task, 1)
        if worker.sources:  # now, or the next task would be started as if this one made no calls
            run.expect_calls(worker.sources)
        self.started += 1
        self._registry.types.of(ticket.task.task_type).started += 1
        if self._bus.active or ticket.listeners is not None:
            started = TaskStarted(at=now, task_id=ticket.task_id, worker_id=worker.name, attempt=ticket.attempts)
            self._registry.emit(ticket, started)
        if ticket.slot is not None:
            ticket.slot.grant(run)
        elif ticket.lease is not None and self.spill is not None:
            self.spill.stored.record_start(run)
        else:
            self.start_handler(run)

    def start_handler(self, run: Run) -> None:
        """Start the handler of a run."""
        # `arm_timeout` checks this too; here it saves a call for nearly every run.
        if run.worker not in self.completion.timed_workers or run.deadline is not None or run.task.timeout is not None:
            self.completion.arm_timeout(run)
        self.runner_pool.start(run)

    # --- what its runs call ---

    def source_used(self, run: Run, source: LoadSource) -> None:
        """Record that a run calls `source`, and that the other runs of its worker will."""
        worker = run.worker
        if run.ended:  # an orphan
            return
        if source not in worker.sources:
            worker.add_source(source)
            self.start_gate.source_used(run, source)
            for pool in self._served_by[worker].pools:
                pool.update_source_paths()
        else:  # another run has called it meanwhile, so a call of this run was expected
            run.first_call_made(source)

    # --- ends ---

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """End a ticket that has not ended."""
        if ticket.pending_store_calls:
            ticket.cancel_later(reason)
        elif ticket.run is not None:
            ticket.run.end_early(TaskStatus.CANCELLED, reason)
        elif ticket.status is TaskStatus.SPILLED and self.spill is not None:
            self.spill.stored.cancel(ticket, reason)
        else:
            self._end_waiting(ticket, TaskStatus.CANCELLED, reason)

    def _end_waiting(self, ticket: Ticket, status: TaskStatus, error: str) -> None:
        """End a ticket that waits inside, with an error."""
        self.end_waiting(ticket, self._result(ticket, status, error))

    def end_waiting(self, ticket: Ticket, result: TaskResult) -> None:
        """End a ticket that waits inside, and free its place in the queue and in its conversation."""
        self._end(ticket, result)
        if not ticket.is_stopping:  # else when its handler has ended
            self.next_in_conversation(ticket)

    def _end(self, ticket: Ticket, result: TaskResult) -> None:
        self._leave(ticket)
        if ticket.retries is not None:
            ticket.retries.end()
        if not ticket.is_stopping:
            ticket.forget_parent()
        self.finish(ticket, result)

    @staticmethod
    def _result(ticket: Ticket, status: TaskStatus, error: str) -> TaskResult:
        """Return the result of a task that ends while it waits, with the error of its last attempt, if any."""
        last = None if ticket.retries is None else ticket.retries.result
        if last is not None:
            error = f"{error}; its last attempt ended with {last.error}"
        return unsuccessful_result(ticket, status, error)

    def finish(self, ticket: Ticket, result: TaskResult) -> None:
        """Give a ticket its result; if the task is stored, only once the store has the result."""
        if ticket.stored and self.spill is not None:
            self.spill.stored.complete(ticket, result)
        else:
            self._registry.settle(ticket, result)

    def can_requeue(self, ticket: Ticket) -> bool:
        """Return whether a task is stored where the next process finds it."""
        return ticket.lease is not None and self.spill is not None and self.spill.stored.durable

    def requeue(self, ticket: Ticket) -> None:
        """Stop a stored task, so that the next process runs it again."""
        assert self.spill is not None  # noqa: S101 - see can_requeue
        self.spill.stored.requeue(ticket)

    def fail_waiting(
        self, ticket: Ticket, error: str, *, worker_id: str | None = None, cause: BaseException | None = None
    ) -> None:
        """End a task that waits for a worker that will not come, or leave it to its store if that survives."""
        if self.spill is not None and self.can_requeue(ticket):
            self._leave(ticket)
            self.spill.return_to_store(ticket)
            self.next_in_conversation(ticket)
        else:
            failed = unsuccessful_result(ticket, TaskStatus.FAILED, error, worker_id=worker_id, cause=cause)
            self.end_waiting(ticket, failed)

    def fail_queued(
        self, pool: Pool, error: str, *, worker_id: str | None = None, cause: BaseException | None = None
    ) -> None:
        """End every task in the queue of a pool whose workers will not come, as `fail_waiting` does.

        Those of tenants that run as much as they may are among them. Each end may queue the next of a conversation.
        """
        while pool.queue.length:
            for ticket in [*pool.queue.in_order()]:
                if ticket.queue_entry is not None:
                    self.fail_waiting(ticket, error, worker_id=worker_id, cause=cause)

    def fail_all_waiting(self, pool: Pool, error: str, *, worker_id: str | None = None) -> None:
        """End every task that waits in a pool whose workers will not come, as `fail_waiting` does."""
        self.fail_queued(pool, error, worker_id=worker_id)
        if pool.parked or pool.delayed or pool.held:
            for ticket in [*self._registry.live.values()]:
                if ticket.task.task_type == pool.task_type and self.is_waiting(ticket):
                    self.fail_waiting(ticket, error, worker_id=worker_id)

    def count_failure(self, ticket: Ticket, seconds: float, *, error: str) -> None:
        """Count an attempt at a stored task that has failed; the next one is `seconds` from now."""
        if self.spill is not None and ticket.lease is not None:
            self.spill.stored.count_failure(ticket, seconds, error=error)

    def record_failures(self, ticket: Ticket) -> None:
        """Store the failures of a stored task that waits here for its next attempt."""
        if self.spill is not None and ticket.lease is not None:
            self.spill.stored.record_failures(ticket)

    def delay_in_store(self, ticket: Ticket, seconds: float) -> bool:
        """Have a stored task wait for its next attempt in its store; return False if it is to wait here."""
        if self.spill is None or not self.spill.stored.can_delay(ticket):
            return False
        self.spill.stored.delay(ticket, seconds)
        return True

    def resume_retries(self, ticket: Ticket, record: TaskRecord) -> None:
        """Go on with the attempts at a task that comes back from its store."""
        self.retries.resume(ticket, record)

    # --- tickets ---

    def ticket(self, task_id: str) -> Ticket:
        """Return the ticket of a task that this process knows.

        Raises:
            UnknownTask: it knows no such task.
        """
        if (ticket := self._registry.find(task_id)) is None:
            raise UnknownTask(task_id=task_id)
        return ticket

    async def find(self, task_id: str | None, key: str | None) -> Ticket | None:
        """Return the ticket of a task that this process or the store knows by its id or its key, or None.

        Raises:
            SupervisorClosed: this process does not know it, and the supervisor has closed.
            StoreUnavailable: the store cannot be asked.
        """
        registry = self._registry
        known = registry.find(task_id) if task_id is not None else registry.by_key.get(key or "")
        if known is not None:
            return known
        if self.core.closed:
            raise SupervisorClosed(state="closed")
        if self.spill is None:
            return None
        lookup = self.spill.lookup
        return await (lookup.by_id(task_id) if task_id is not None else lookup.by_key(key or ""))

    def hold_strongly(self, task_id: str) -> Ticket | None:
        """Hold the ticket of a spilled task, because it is awaited."""
        ticket = self._registry.hold_strongly(task_id)
        if self.spill is not None and (known := ticket or self._registry.live.get(task_id)) is not None:
            self.spill.results.watch(known)
        return ticket
