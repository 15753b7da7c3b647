"""The dispatcher: decides at the door, lines up, starts, ends; everything inside one loop, without an await."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from forebay.admission import RANK_LAST, PriorityThresholds
from forebay.context import RunningTask
from forebay.errors import UnknownTask
from forebay.events import Event, EventBus, TaskFinished, TaskStarted, log
from forebay.supervisor.codecs import TaskCodecs
from forebay.supervisor.load import SystemLoad
from forebay.supervisor.pool import Pool, next_pool
from forebay.supervisor.runs.completion import RunCompletion
from forebay.supervisor.runs.nested import SlotLoan, grant_claims
from forebay.supervisor.runs.run import Run
from forebay.supervisor.runs.runner import RunnerPool
from forebay.supervisor.runs.timers import Timers
from forebay.supervisor.start_gate import StartGate
from forebay.supervisor.statistics import Counters
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Priority, TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.engine import DaemonThreadExecutor
    from forebay.interfaces import LoadSource
    from forebay.supervisor.settings import SupervisorSettings
    from forebay.supervisor.spill.spill import Spill

T = TypeVar("T")

_SUCCEEDED, _RUNNING = TaskStatus.SUCCEEDED, TaskStatus.RUNNING  # an enum's attribute is dear on the hot path


class Dispatcher:
    """The task plane's state and its every decision. It belongs to one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: SupervisorSettings,
        *,
        threads: DaemonThreadExecutor,
        bus: EventBus,
        draw: Callable[[], float],
    ) -> None:
        self.loop = loop
        self.thresholds = PriorityThresholds(settings.backpressure_threshold)
        self.max_queue_size = settings.max_queue_size
        self.threads = threads
        self.bus = bus
        self.draw = draw
        self.timers = Timers(loop)
        self.completion = RunCompletion(self, zombie_grace=settings.zombie_grace)
        self.counts = Counters()
        self.pools: dict[str, Pool] = {}
        self.workers: dict[str, WorkerAgent] = {}
        self.tickets: dict[str, Ticket] = {}  # all that have not ended
        self.ended_tickets: OrderedDict[str, Ticket] = OrderedDict()  # the latest that have
        self.keep_results = settings.keep_results
        self.spill: Spill | None = None
        self.codecs = TaskCodecs()
        self.progress_listeners: list[Callable[[], None]] = []  # called whenever something has ended
        self.conversations: dict[
            str, deque[Ticket]
        ] = {}  # threads (conversations) with a task inside, and who waits behind it
        self.load = SystemLoad(self.pools, self.workers)
        self.start_gate = StartGate(self)
        self.runner_pool = RunnerPool(self)
        self._background_tasks: set[asyncio.Future[Any]] = set()
        self._sequence_number = 0

    # --- the workers ---

    def add_worker(self, worker: WorkerAgent) -> None:
        """Bring a worker in; it takes work at once."""
        self.workers[worker.name] = worker
        for source in worker.sources:
            self.start_gate.watch(worker, source)
        for task_type in worker.task_types:
            pool = self.pools.get(task_type)
            if pool is None:
                pool = self.pools[task_type] = Pool(task_type, self.max_queue_size)
                if self.spill is not None:
                    self.spill.add_pool(pool)
            pool.workers.append(worker)
            worker.pools.append(pool)
            pool.update_source_paths()
            if worker.handler.load is not None:
                pool.nested_supervisors.append(worker)
        self.update_slots(worker)

    def update_slots(self, worker: WorkerAgent) -> None:
        """Tell the pools how many slots `worker` has now, and serve it."""
        gained = worker.slots - worker.counted_slots
        failing = not worker.slots
        for pool in worker.pools:
            pool.slots += gained
            if failing and worker.counted_slots:
                pool.running -= worker.current_tasks
            elif not failing and not worker.counted_slots:
                pool.running += worker.current_tasks
        worker.counted_slots = worker.slots
        self.dispatch(worker)

    def take_slot(self, run: Run) -> None:
        """Take a slot of the run's worker."""
        worker = run.worker
        worker.current_tasks += 1
        run.holds_slot = True
        for pool in worker.pools:
            if worker.counted_slots:
                pool.running += 1
            if worker.current_tasks == 1:  # else it was not idle
                pool.selector.mark_busy(worker)

    def return_slot(self, run: Run, now: float | None = None) -> None:
        """Give the run's slot back, and to whoever comes next."""
        worker = run.worker
        worker.current_tasks -= 1
        run.holds_slot = False
        if worker.counted_slots:
            for pool in worker.pools:
                pool.running -= 1
        self.dispatch(worker, now)

    def lend_slots(self, running: RunningTask | None) -> SlotLoan | None:
        """Lend the slot of `running`, which is about to await a task here, and of those above it, where need be."""
        return SlotLoan(self, running) if isinstance(running, Run) else None

    # --- the door ---

    def start_or_queue(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None) -> None:
        """Put an admitted task behind its thread, onto `worker`, or into the line."""
        self.tickets[ticket.task.task_id] = ticket
        thread = ticket.task.thread_id
        if thread is not None:
            behind = self.conversations.get(thread)
            if behind is not None:
                ticket.status = TaskStatus.WAITING
                behind.append(ticket)
                pool.parked += 1
                self._arm_expiry(ticket)
                return
            self.conversations[thread] = deque((ticket,))
        if worker is not None:
            self.start(ticket, worker)
        else:
            self._enqueue(ticket, pool)

    def _enqueue(self, ticket: Ticket, pool: Pool) -> None:
        ticket.status = TaskStatus.WAITING
        rank = RANK_LAST
        if ticket.deadline is not None or ticket.parent is not None:
            rank = (ticket.parent is None, RANK_LAST[1] if ticket.deadline is None else ticket.deadline.at)
        self._sequence_number += 1
        ticket.queue_entry = pool.queue.push(ticket, ticket.task.priority, rank, self._sequence_number)
        if ticket.deadline is not None:
            self._arm_expiry(ticket)
        if pool.source_paths:
            self.start_gate.queue_grew(pool)

    def _arm_expiry(self, ticket: Ticket) -> None:
        if ticket.deadline is not None and ticket.expiry_timer is None:
            due = self.loop.time() + ticket.deadline.remaining()
            ticket.expiry_timer = self.timers.at(due, self._expire, ticket)

    def _expire(self, ticket: Ticket) -> None:
        self.completion.expire(ticket, "its deadline passed while it waited")

    def source_used(self, run: Run, source: LoadSource) -> None:
        """`run` draws on `source`, so others of its worker will: it presses on the gate and on their start."""
        worker = run.worker
        if source not in worker.sources:
            worker.sources[source] = None
            self.start_gate.source_used(run, source)
            for pool in worker.pools:
                pool.update_source_paths()
        else:  # met by another run meanwhile, and then expected of this one
            run.first_call_made(source)

    # --- from the line to a worker ---

    def dispatch(self, worker: WorkerAgent, now: float | None = None) -> None:
        """Give `worker` what it has room for: first the slots that it owes, then the heads of its lines."""
        if worker.slot_claims:
            grant_claims(worker)
        while worker.can_accept():
            pool = next_pool(worker)
            if worker.sources and not self.start_gate.may_start_head(worker, pool):
                pool = None
            if pool is None:
                for pool in worker.pools:
                    pool.selector.update(worker)
                break
            ticket = pool.queue.pop()
            ticket.queue_entry = None
            if self._may_still_start(ticket, pool):
                self.start(ticket, worker, now)
        if self.spill is not None:
            for pool in worker.pools:
                self.spill.refill(pool)

    def _may_still_start(self, ticket: Ticket, pool: Pool) -> bool:
        """Whether a task whose turn has come may still start; if not, it has ended or was let go."""
        if self.spill is not None and not self.spill.lease_is_valid(ticket):
            self.spill.lease_lapsed(ticket)
            return False
        if (error := self.expiry_reason(ticket, pool)) is not None:
            self.completion.expire(ticket, error)
        return error is None

    def expiry_reason(self, ticket: Ticket, pool: Pool) -> str | None:
        """Why a task whose turn has come may not start any more; None if it may."""
        if (deadline := ticket.deadline) is None:
            return None
        remaining = deadline.remaining()
        time = deadline.at - ticket.submitted_at if ticket.submitted_at is not None and pool.has_waiting else None
        if remaining > 0 and not pool.cannot_meet_deadline(self.loop.time(), 0.0, remaining, time=time):
            return None
        return f"its turn came {remaining:.3g} s before its deadline, which is too late to finish"

    def start(self, ticket: Ticket, worker: WorkerAgent, now: float | None = None) -> None:
        """Start a task on a worker that can accept. `now` spares asking the clock again."""
        if now is None:
            now = self.loop.time()
        era = worker.breaker.allow(now)
        if worker.probing:
            self.completion.arm_breaker_timer(worker)
        if ticket.expiry_timer is not None:
            self.timers.cancel(ticket.expiry_timer)
            ticket.expiry_timer = None
        run = Run(self, ticket, ticket.task, ticket.deadline, worker, era, worker.breaker_phase, now)
        ticket.run = run
        ticket.status = _RUNNING
        ticket.attempts += 1
        worker.runs[run] = None
        self.take_slot(run)
        if worker.sources:  # now, or the next would be let in as if this one did not come
            self.start_gate.run_started(run)
        self.counts.started += 1
        if self.bus.active or ticket.has_listeners:
            worker_id, attempt = worker.name, ticket.attempts
            self.emit(ticket, TaskStarted(at=now, task_id=ticket.task_id, worker_id=worker_id, attempt=attempt))
        if run.abandoned_at is not None:  # cancelled by a sink, at the news of its start
            self.handler_ended(run, None, asyncio.CancelledError())
        elif ticket.slot is not None:
            ticket.slot.grant(run)
        elif ticket.lease is not None and self.spill is not None:
            self.spill.record_start(run)
        else:
            self.start_handler(run)

    def start_handler(self, run: Run) -> None:
        """Let the handler of a run begin."""
        if run.worker.timeout_timer is None or run.deadline is not None or run.task.timeout is not None:
            self.completion.arm_timeout(run)
        self.runner_pool.start(run)

    def ends_at(self, run: Run) -> float:
        """Loop time at which a run is ended: its timeout, or its deadline if that comes first."""
        timeout = run.started_at + (run.task.timeout or run.worker.timeout)
        return timeout if run.deadline is None else min(timeout, run.started_at + run.deadline.remaining())

    # --- endings ---

    def handler_ended(self, run: Run, value: Any, cause: BaseException | None) -> None:
        """A handler has really ended: with a value, or with an exception of any kind."""
        self.completion.handler_ended(run, value, cause)

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """End a ticket that has not ended."""
        if ticket.pending_store_calls:
            ticket.cancel_reason = reason
        elif ticket.run is not None:
            self.completion.end_early(ticket.run, TaskStatus.CANCELLED, reason)
        elif ticket.status is TaskStatus.SPILLED and self.spill is not None:
            self.spill.cancel(ticket, reason)
        else:
            self.completion.end_waiting(ticket, TaskStatus.CANCELLED, reason)

    def finish(self, ticket: Ticket, result: TaskResult) -> None:
        """Give a ticket its result; if it is stored, once the store has it."""
        if ticket.stored and self.spill is not None:
            self.spill.complete(ticket, result)
        else:
            self.settle(ticket, result)

    def settle(self, ticket: Ticket, result: TaskResult) -> None:
        """Resolve a ticket and keep it for a while among those that ended."""
        if result.status is _SUCCEEDED:
            self.counts.succeeded += 1
        else:
            ending = result.status.value
            setattr(self.counts, ending, getattr(self.counts, ending) + 1)
        task_id = ticket.task.task_id
        self.tickets.pop(task_id, None)
        self.ended_tickets[task_id] = ticket
        if len(self.ended_tickets) > self.keep_results:
            self.ended_tickets.popitem(last=False)
        ticket.resolve(result)
        if self.bus.active:
            self.bus.emit(TaskFinished(at=self.loop.time(), task_id=ticket.task_id, result=result))
        if self.progress_listeners:
            self.notify_progress()

    def notify_progress(self) -> None:
        """Tell those who wait for the house to fall quiet that something has ended."""
        for watcher in self.progress_listeners:
            watcher()

    def dequeue(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the line, or from behind its thread."""
        pool = self.pools[ticket.task.task_type]
        if ticket.expiry_timer is not None:
            self.timers.cancel(ticket.expiry_timer)
            ticket.expiry_timer = None
        talk = self.conversations.get(ticket.task.thread_id) if ticket.task.thread_id is not None else None
        if talk is not None and talk[0] is not ticket and ticket in talk:
            talk.remove(ticket)
            pool.parked -= 1
            return
        if ticket.queue_entry is not None:
            pool.queue.remove(ticket.queue_entry)
            ticket.queue_entry = None
        self.next_in_conversation(ticket)

    def next_in_conversation(self, ticket: Ticket) -> None:
        """Let the next task of the thread have its turn: `ticket` is really over."""
        thread = ticket.task.thread_id
        talk = None if thread is None else self.conversations.get(thread)
        if thread is None or talk is None or talk[0] is not ticket:
            return
        talk.popleft()
        if not talk:
            del self.conversations[thread]
            return
        following = talk[0]
        pool = self.pools[following.task.task_type]
        pool.parked -= 1
        worker = None if pool.queue else self.start_gate.pick(pool, following.task.priority)
        if worker is None:
            self._enqueue(following, pool)
        elif self._may_still_start(following, pool):
            self.start(following, worker)

    # --- odds and ends ---

    def ticket(self, task_id: str) -> Ticket:
        """The ticket of a task that is under way, ended lately, or may be stored.

        Raises:
            UnknownTask: there is none, and no overflow to ask.
        """
        if ticket := self.tickets.get(task_id) or self.ended_tickets.get(task_id):
            return ticket
        if self.spill is None:
            raise UnknownTask(task_id=task_id)
        return self.spill.lookup.by_id(task_id)

    def retry_after(self, pool: Pool, priority: Priority) -> float | None:
        """Book a seat for someone who is refused: seconds after which to come back, or None if unknown."""
        if not pool.slots:
            now = self.loop.time()
            sleeps = [sleep for worker in pool.workers if (sleep := worker.breaker.retry_after(now)) is not None]
            return min(sleeps, default=None)
        return pool.next_retry_slot(
            self.loop.time(),
            self.draw(),
            source_wait=self.load.time_until_below(pool, priority, self.thresholds.threshold_for(priority)),
        )

    def emit(self, ticket: Ticket, event: Event) -> None:
        """Tell an event to everyone who listens to the house or to the ticket."""
        ticket.emit(event)
        if self.bus.active:
            self.bus.emit(event)

    def run_in_background(self, work: Awaitable[Any]) -> None:
        """Run a chore, and log it if it fails."""
        self.run_to_completion(work).add_done_callback(_log_failure)

    def run_to_completion(self, work: Awaitable[T]) -> asyncio.Future[T]:
        """Run a chore to its end, whether or not whoever waits for it stays; the end of the house waits for it."""
        chore = asyncio.ensure_future(work)
        self._background_tasks.add(chore)
        chore.add_done_callback(self._background_task_done)
        return chore

    def _background_task_done(self, chore: asyncio.Future[Any]) -> None:
        self._background_tasks.discard(chore)
        self.notify_progress()

    @property
    def background_tasks(self) -> frozenset[asyncio.Future[Any]]:
        """What runs in the background."""
        return frozenset(self._background_tasks)


def _log_failure(chore: asyncio.Future[Any]) -> None:
    if not chore.cancelled() and chore.exception() is not None:
        log.error("a background chore of the supervisor failed", exc_info=chore.exception())
