"""The dispatcher: decides at the door, lines up, starts, ends; everything inside one loop, without an await."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from forebay.admission import LAST, Ladder
from forebay.context import RunningTask
from forebay.errors import UnknownTask
from forebay.events import Bus, Event, Finished, Started, log
from forebay.supervisor.codecs import Codecs
from forebay.supervisor.endings import Endings
from forebay.supervisor.lend import Loan, repay
from forebay.supervisor.pool import Pool, next_pool
from forebay.supervisor.pressure import Pressure
from forebay.supervisor.run import Run
from forebay.supervisor.runner import Crew
from forebay.supervisor.start_gate import StartGate
from forebay.supervisor.statistics import Counts
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.timers import Timers
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Priority, TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.engine import Threads
    from forebay.supervisor.refill import Overflow
    from forebay.supervisor.settings import Settings
    from forebay.typing import Source

T = TypeVar("T")

_SUCCEEDED, _RUNNING = TaskStatus.SUCCEEDED, TaskStatus.RUNNING  # an enum's attribute is dear on the hot path


class Dispatcher:
    """The task plane's state and its every decision. It belongs to one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        *,
        threads: Threads,
        bus: Bus,
        draw: Callable[[], float],
    ) -> None:
        self.loop = loop
        self.ladder = Ladder(settings.backpressure_threshold)
        self.max_queue_size = settings.max_queue_size
        self.threads = threads
        self.bus = bus
        self.draw = draw
        self.timers = Timers(loop)
        self.endings = Endings(self, zombie_grace=settings.zombie_grace)
        self.counts = Counts()
        self.pools: dict[str, Pool] = {}
        self.workers: dict[str, WorkerAgent] = {}
        self.tickets: dict[str, Ticket] = {}  # all that have not ended
        self.kept: OrderedDict[str, Ticket] = OrderedDict()  # the latest that have
        self.keep = settings.keep_results
        self.overflow: Overflow | None = None
        self.codecs = Codecs()
        self.watchers: list[Callable[[], None]] = []  # called whenever something has ended
        self.talks: dict[str, deque[Ticket]] = {}  # threads (conversations) with a task inside, and who waits behind it
        self.pressure = Pressure(self.pools, self.workers)
        self.start_gate = StartGate(self)
        self.crew = Crew(self)
        self._chores: set[asyncio.Future[Any]] = set()
        self._turn = 0

    # --- the workers ---

    def add(self, worker: WorkerAgent) -> None:
        """Bring a worker in; it takes work at once."""
        self.workers[worker.name] = worker
        for source in worker.sources:
            self.start_gate.watch(worker, source)
        for task_type in worker.task_types:
            pool = self.pools.get(task_type)
            if pool is None:
                pool = self.pools[task_type] = Pool(task_type, self.max_queue_size)
                if self.overflow is not None:
                    self.overflow.know(pool)
            pool.workers.append(worker)
            worker.pools.append(pool)
            pool.reckon()
            if worker.handler.load is not None:
                pool.nested.append(worker)
        self.refit(worker)

    def refit(self, worker: WorkerAgent) -> None:
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
        self.serve(worker)

    def take(self, run: Run) -> None:
        """Take a slot of the run's worker."""
        worker = run.worker
        worker.current_tasks += 1
        run.holds = True
        for pool in worker.pools:
            if worker.counted_slots:
                pool.running += 1
            if worker.current_tasks == 1:  # else it was not idle
                pool.router.taken(worker)

    def give(self, run: Run, now: float | None = None) -> None:
        """Give the run's slot back, and to whoever comes next."""
        worker = run.worker
        worker.current_tasks -= 1
        run.holds = False
        if worker.counted_slots:
            for pool in worker.pools:
                pool.running -= 1
        self.serve(worker, now)

    def lend(self, running: RunningTask | None) -> Loan | None:
        """Lend the slot of `running`, which is about to await a task here, and of those above it, where need be."""
        return Loan(self, running) if isinstance(running, Run) else None

    # --- the door ---

    def enter(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None) -> None:
        """Put an admitted task behind its thread, onto `worker`, or into the line."""
        self.tickets[ticket.task.task_id] = ticket
        thread = ticket.task.thread
        if thread is not None:
            behind = self.talks.get(thread)
            if behind is not None:
                ticket.status = TaskStatus.WAITING
                behind.append(ticket)
                pool.parked += 1
                self._watch_deadline(ticket)
                return
            self.talks[thread] = deque((ticket,))
        if worker is not None:
            self.start(ticket, worker)
        else:
            self._join(ticket, pool)

    def _join(self, ticket: Ticket, pool: Pool) -> None:
        ticket.status = TaskStatus.WAITING
        rank = LAST
        if ticket.deadline is not None or ticket.parent is not None:
            rank = (ticket.parent is None, LAST[1] if ticket.deadline is None else ticket.deadline.at)
        self._turn += 1
        ticket.place = pool.line.join(ticket, ticket.task.priority, rank, self._turn)
        if ticket.deadline is not None:
            self._watch_deadline(ticket)
        if pool.paths:
            self.start_gate.longer(pool)

    def _watch_deadline(self, ticket: Ticket) -> None:
        if ticket.deadline is not None and ticket.expiry is None:
            due = self.loop.time() + ticket.deadline.remaining()
            ticket.expiry = self.timers.at(due, self._too_long, ticket)

    def _too_long(self, ticket: Ticket) -> None:
        self.endings.expire(ticket, "its deadline passed while it waited")

    def link(self, run: Run, source: Source) -> None:
        """`run` draws on `source`, so others of its worker will: it presses on the gate and on their start."""
        worker = run.worker
        if source not in worker.sources:
            worker.sources[source] = None
            self.start_gate.met(run, source)
            for pool in worker.pools:
                pool.reckon()
        else:  # met by another run meanwhile, and then expected of this one
            run.called(source)

    # --- from the line to a worker ---

    def serve(self, worker: WorkerAgent, now: float | None = None) -> None:
        """Give `worker` what it has room for: first the slots that it owes, then the heads of its lines."""
        if worker.returning:
            repay(worker)
        while worker.can_accept():
            pool = next_pool(worker)
            if worker.sources and not self.start_gate.opens(worker, pool):
                pool = None
            if pool is None:
                for pool in worker.pools:
                    pool.router.lowered(worker)
                break
            ticket = pool.line.pop()
            ticket.place = None
            if self._is_due(ticket, pool):
                self.start(ticket, worker, now)
        if self.overflow is not None:
            for pool in worker.pools:
                self.overflow.pull(pool)

    def _is_due(self, ticket: Ticket, pool: Pool) -> bool:
        """Whether a task whose turn has come may still start; if not, it has ended or was let go."""
        if self.overflow is not None and not self.overflow.may_start(ticket):
            self.overflow.let_go(ticket)
            return False
        if (error := self.too_late(ticket, pool)) is not None:
            self.endings.expire(ticket, error)
        return error is None

    def too_late(self, ticket: Ticket, pool: Pool) -> str | None:
        """Why a task whose turn has come may not start any more; None if it may."""
        if (deadline := ticket.deadline) is None:
            return None
        remaining = deadline.remaining()
        time = deadline.at - ticket.came_at if ticket.came_at is not None and pool.contested else None
        if remaining > 0 and not pool.hopeless(self.loop.time(), 0.0, remaining, time=time):
            return None
        return f"its turn came {remaining:.3g} s before its deadline, which is too late to finish"

    def start(self, ticket: Ticket, worker: WorkerAgent, now: float | None = None) -> None:
        """Start a task on a worker that can accept. `now` spares asking the clock again."""
        if now is None:
            now = self.loop.time()
        era = worker.breaker.allow(now)
        if worker.probing:
            self.endings.watch_breaker(worker)
        if ticket.expiry is not None:
            self.timers.cancel(ticket.expiry)
            ticket.expiry = None
        run = Run(self, ticket, ticket.task, ticket.deadline, worker, era, worker.phase, now)
        ticket.run = run
        ticket.status = _RUNNING
        ticket.attempts += 1
        worker.runs[run] = None
        self.take(run)
        if worker.sources:  # now, or the next would be let in as if this one did not come
            self.start_gate.started(run)
        self.counts.started += 1
        if self.bus.active or ticket.listened:
            worker_id, attempt = worker.name, ticket.attempts
            self.tell(ticket, Started(at=now, task_id=ticket.task_id, worker_id=worker_id, attempt=attempt))
        if run.abandoned_at is not None:  # cancelled by a sink, at the news of its start
            self.ended(run, None, asyncio.CancelledError())
        elif ticket.occupant is not None:
            ticket.occupant.granted(run)
        elif ticket.lease is not None and self.overflow is not None:
            self.overflow.begin(run)
        else:
            self.begin(run)

    def begin(self, run: Run) -> None:
        """Let the handler of a run begin."""
        if run.worker.clock is None or run.deadline is not None or run.task.timeout is not None:
            self.endings.watch_time(run)
        self.crew.begin(run)

    def ends_at(self, run: Run) -> float:
        """Loop time at which a run is ended: its timeout, or its deadline if that comes first."""
        timeout = run.began_at + (run.task.timeout or run.worker.timeout)
        return timeout if run.deadline is None else min(timeout, run.began_at + run.deadline.remaining())

    # --- endings ---

    def ended(self, run: Run, value: Any, cause: BaseException | None) -> None:
        """A handler has really ended: with a value, or with an exception of any kind."""
        self.endings.ended(run, value, cause)

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """End a ticket that has not ended."""
        if ticket.undecided:
            ticket.unwanted = reason
        elif ticket.run is not None:
            self.endings.abandon(ticket.run, TaskStatus.CANCELLED, reason)
        elif ticket.status is TaskStatus.SPILLED and self.overflow is not None:
            self.overflow.give_up(ticket, reason)
        else:
            self.endings.withdraw(ticket, TaskStatus.CANCELLED, reason)

    def finish(self, ticket: Ticket, result: TaskResult) -> None:
        """Give a ticket its result; if it is stored, once the store has it."""
        if ticket.stored and self.overflow is not None:
            self.overflow.complete(ticket, result)
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
        self.kept[task_id] = ticket
        if len(self.kept) > self.keep:
            self.kept.popitem(last=False)
        ticket.resolve(result)
        if self.bus.active:
            self.bus.emit(Finished(at=self.loop.time(), task_id=ticket.task_id, result=result))
        if self.watchers:
            self.stirred()

    def stirred(self) -> None:
        """Tell those who wait for the house to fall quiet that something has ended."""
        for watcher in self.watchers:
            watcher()

    def leave_line(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the line, or from behind its thread."""
        pool = self.pools[ticket.task.task_type]
        if ticket.expiry is not None:
            self.timers.cancel(ticket.expiry)
            ticket.expiry = None
        talk = self.talks.get(ticket.task.thread) if ticket.task.thread is not None else None
        if talk is not None and talk[0] is not ticket and ticket in talk:
            talk.remove(ticket)
            pool.parked -= 1
            return
        if ticket.place is not None:
            pool.line.leave(ticket.place)
            ticket.place = None
        self.next_of_thread(ticket)

    def next_of_thread(self, ticket: Ticket) -> None:
        """Let the next task of the thread have its turn: `ticket` is really over."""
        thread = ticket.task.thread
        talk = None if thread is None else self.talks.get(thread)
        if thread is None or talk is None or talk[0] is not ticket:
            return
        talk.popleft()
        if not talk:
            del self.talks[thread]
            return
        following = talk[0]
        pool = self.pools[following.task.task_type]
        pool.parked -= 1
        worker = None if pool.line else self.start_gate.pick(pool, following.task.priority)
        if worker is None:
            self._join(following, pool)
        elif self._is_due(following, pool):
            self.start(following, worker)

    # --- odds and ends ---

    def ticket(self, task_id: str) -> Ticket:
        """The ticket of a task that is under way, ended lately, or may be stored.

        Raises:
            UnknownTask: there is none, and no overflow to ask.
        """
        if ticket := self.tickets.get(task_id) or self.kept.get(task_id):
            return ticket
        if self.overflow is None:
            raise UnknownTask(task_id=task_id)
        return self.overflow.inquiry.by_id(task_id)

    def retry_after(self, pool: Pool, rung: Priority) -> float | None:
        """Book a seat for someone who is refused: seconds after which to come back, or None if unknown."""
        if not pool.slots:
            now = self.loop.time()
            sleeps = [sleep for worker in pool.workers if (sleep := worker.breaker.remaining(now)) is not None]
            return min(sleeps, default=None)
        return pool.book_seat(self.loop.time(), self.draw(), room=self.pressure.room(pool, rung, self.ladder.of(rung)))

    def tell(self, ticket: Ticket, event: Event) -> None:
        """Tell an event to everyone who listens to the house or to the ticket."""
        ticket.hear(event)
        if self.bus.active:
            self.bus.emit(event)

    def background(self, work: Awaitable[Any]) -> None:
        """Run a chore, and log it if it fails."""
        self.finish_anyway(work).add_done_callback(_log_failure)

    def finish_anyway(self, work: Awaitable[T]) -> asyncio.Future[T]:
        """Run a chore to its end, whether or not whoever waits for it stays; the end of the house waits for it."""
        chore = asyncio.ensure_future(work)
        self._chores.add(chore)
        chore.add_done_callback(self._chore_done)
        return chore

    def _chore_done(self, chore: asyncio.Future[Any]) -> None:
        self._chores.discard(chore)
        self.stirred()

    @property
    def chores(self) -> frozenset[asyncio.Future[Any]]:
        """What runs in the background."""
        return frozenset(self._chores)


def _log_failure(chore: asyncio.Future[Any]) -> None:
    if not chore.cancelled() and chore.exception() is not None:
        log.error("a background chore of the supervisor failed", exc_info=chore.exception())
