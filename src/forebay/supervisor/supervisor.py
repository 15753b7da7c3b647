"""BackpressureSupervisor: the task plane's public face."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, TypeVar

from forebay import clock, context
from forebay.adapters import Handler
from forebay.adapters.detect import Config
from forebay.engine import DaemonThreadExecutor, Engine
from forebay.errors import (
    AlreadyStarted,
    DrainInside,
    DuplicateWorker,
    InvalidHandler,
    NotStarted,
    SupervisorClosed,
    WrongLoop,
)
from forebay.events import EventBus, Sink, Subscription
from forebay.interfaces import Reading, TaskStore
from forebay.overflow import open_task_store
from forebay.supervisor.admission_controller import AdmissionController
from forebay.supervisor.codecs import TaskCodecs
from forebay.supervisor.dispatcher import Dispatcher
from forebay.supervisor.drain import Drain, DrainReport, check_drain_timeout
from forebay.supervisor.lifecycle import add_running_worker, shut_down, start_up
from forebay.supervisor.loop_monitor import LoopMonitor, monitor_loop
from forebay.supervisor.nested_supervisor import as_handler, contains, load_of_nested
from forebay.supervisor.portal import Portal
from forebay.supervisor.registration import check_decorator_arguments, make_worker
from forebay.supervisor.runs.nested import active_runs
from forebay.supervisor.settings import SupervisorSettings, event_sinks
from forebay.supervisor.slot import Slot
from forebay.supervisor.spill.dead_letters import DeadLetters
from forebay.supervisor.statistics import Statistics, snapshot, utilization
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Deadline, Priority, Task
from forebay.upstream import Upstream

F = TypeVar("F", bound=Callable[..., Any])


class BackpressureSupervisor:
    """Stands between tasks and workers: admits, spills or rejects; gives each task to the least loaded worker.

    An async context manager: leaving it drains; leaving it by an error or a cancellation stops the handlers. Either way
    every ticket ends.

    Args:
        backpressure_threshold: the load from which NORMAL tasks are refused, in (0, 1]. LOW is refused from 0.75 of it,
            HIGH from half way between it and 1, CRITICAL at 1.
        max_queue_size: tasks of each type that may wait inside; by default 100, or as many as the type has slots.
        overflow: where refused tasks wait: ``sqlite:///spill.db``, ``memory://``, a Ledger, or None for nowhere.
        lease: seconds that a right to stored work lasts unless renewed.
        max_payload_bytes: bound of an encoded payload or result.
        max_attempts: starts of a stored task's handler, over lost leases, after which it is dead.
        keep_results: ended tickets that `ticket` still finds.
        zombie_grace: seconds that a handler has to stop before it is called a zombie.
        lag_bound: event-loop lag in seconds that reads 1.0; longer is reported as a stall. None: do not watch.
        on_event: sinks that are called with each event, in the loop.

    Raises:
        InvalidThreshold, InvalidSetting, InvalidOverflowUrl: a setting cannot be meant.
    """

    def __init__(  # noqa: PLR0913 - every bound is set where a user can see it
        self,
        *,
        backpressure_threshold: float = 0.8,
        max_queue_size: int | None = None,
        overflow: str | TaskStore | None = None,
        lease: float = 30.0,
        max_payload_bytes: int = 1_000_000,
        max_attempts: int = 3,
        keep_results: int = 1000,
        zombie_grace: float = 5.0,
        lag_bound: float | None = 1.0,
        on_event: Sink | Sequence[Sink] = (),
    ) -> None:
        self._settings = SupervisorSettings(
            backpressure_threshold=backpressure_threshold,
            max_queue_size=max_queue_size,
            lease=lease,
            max_payload_bytes=max_payload_bytes,
            max_attempts=max_attempts,
            keep_results=keep_results,
            zombie_grace=zombie_grace,
            lag_bound=lag_bound,
        )
        self._store = None if overflow is None else open_task_store(overflow)
        self._bus = EventBus(event_sinks(on_event))
        self._draw: Callable[[], float] = clock.new_random().random
        self._workers: dict[str, WorkerAgent] = {}
        self._codecs = TaskCodecs()
        self._dispatcher: Dispatcher | None = None
        self._admission: AdmissionController | None = None
        self._threads = DaemonThreadExecutor()
        self._loop_monitor: LoopMonitor | None = None
        self._closing: asyncio.Task[None] | None = None
        self._drained = False

    # --- workers ---

    def register_worker(  # noqa: PLR0913 - one word each for what a worker is
        self,
        name: str,
        *,
        handler: Any = None,
        factory: Callable[[], Any] | str | None = None,
        task_types: Sequence[str],
        max_concurrent: int = 1,
        timeout: float = 300.0,
        payload: Any = None,
        result: Any = None,
        config: Config | None = None,
        engine: str | Engine | None = None,
        on_cancel: Callable[[Task], object] | None = None,
        reset_timeout: float | None = 10.0,
        upstreams: Iterable[Upstream | tuple[Upstream, str]] = (),
    ) -> WorkerAgent:
        """Register a worker, before the start or after it.

        Args:
            name: unique among the workers.
            handler: a callable, an agent of a known framework, a supervisor, or the path of one, ``"module:name"``.
            factory: instead of a handler: makes a fresh agent for each task.
            task_types: the types that it takes.
            max_concurrent: tasks at a time.
            timeout: seconds that an attempt may run, where the task does not say.
            payload: the type of its payloads, checked at `submit`. The workers of a task type agree on it.
            result: the type of what it returns. What is not of it ends the task FAILED.
            config: a framework's own configuration for its agent, or a callable of the Task that makes one.
            engine: ``"loop"``, ``"thread"``, ``"process"`` or an Engine; by default what is plain has a thread.
            on_cancel: called with the task when its run is to stop, for handlers that a cancellation does not stop.
            cool_off: seconds for which it first stays FAILED after five failures in a row (or 5 % of a thousand tasks)
                before it is tried again; the next times it is longer. None: until ``revive()``.
            upstreams: what its calls draw on, with the model if it is known, so that this is felt before the first.

        Raises:
            DuplicateWorker, InvalidHandler, InvalidSetting, InvalidTimeout, NotImportable: as each says.
        """
        if self._closing is not None:
            raise SupervisorClosed(state="closed")
        if isinstance(handler, BackpressureSupervisor) and contains(handler, self):
            raise InvalidHandler(worker=name, type=type(self).__name__, hint="it would hold itself")
        worker = make_worker(
            name,
            handler=handler,
            factory=factory,
            task_types=task_types,
            max_concurrent=max_concurrent,
            timeout=timeout,
            config=config,
            engine=engine,
            on_cancel=on_cancel,
            reset_timeout=reset_timeout,
            upstreams=upstreams,
            draw=lambda: self._draw(),  # noqa: PLW0108 - the start replaces it
            on_revive=self._revive,
        )
        if name in self._workers:
            raise DuplicateWorker(name=name)
        self._codecs.declare(worker, payload=payload, result=result)
        self._workers[name] = worker
        if self._dispatcher is not None:
            add_running_worker(self._dispatcher, worker)
        return worker

    def worker(self, *task_types: str, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        """Register the decorated callable as a worker, named after it unless `name` is given.

        Takes the settings of `register_worker`, and gives the callable back as it was.
        """
        check_decorator_arguments(task_types)

        def register(handler: F) -> F:
            title = name or str(getattr(handler, "__name__", "worker"))
            self.register_worker(title, handler=handler, task_types=task_types, **settings)
            return handler

        return register

    @property
    def workers(self) -> Mapping[str, WorkerAgent]:
        """The workers by name."""
        return MappingProxyType(self._workers)

    def _revive(self, worker: WorkerAgent) -> None:
        if self._dispatcher is not None:
            self._dispatcher.completion.revive(worker)

    # --- work ---

    async def submit(self, task: Task) -> Ticket:
        """Offer a task to the gate.

        Returns:
            A ticket: ADMITTED, SPILLED or REJECTED. Overload is never an exception here.

        Raises:
            UnknownTaskType, DuplicateTask, DeadlinePassed, InvalidPayload, NotPortable, PayloadTooLarge,
                OverflowRequired: the mistake that each describes.
            NotStarted, SupervisorClosed, WrongLoop: it is not the time or the place.
        """
        return await self._admission_here().submit(task)

    def submit_nowait(self, task: Task) -> Ticket:
        """Offer a task to the gate without waiting for anything: it can be ADMITTED or REJECTED, not spilled.

        Raises:
            OverflowRequired: the task is durable, and a record takes time: use `submit`.
            Others: as `submit`.
        """
        return self._admission_here().submit_nowait(task)

    async def run(self, task: Task) -> Any:
        """Submit a task and return its value; a spilled one is waited for, to its deadline.

        Cancelling this cancels the task, unless others wait for the same work by its key.

        Raises:
            Overloaded: it was rejected; ``retry_after`` says when to come back.
            TaskFailed, TaskTimedOut: it ended so (TaskCancelled and TaskExpired are their subclasses).
            Others: as `submit`.
        """
        return await self._admission_here().run(task)

    def slot(  # noqa: PLR0913 - a task's fields
        self,
        task_type: str,
        *,
        priority: Priority = Priority.NORMAL,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        tenant: str = "default",
        thread_id: str | None = None,
    ) -> Slot:
        """A slot of a worker of `task_type` for the caller's own code: ``async with supervisor.slot("write"): ...``.

        Raises:
            UnknownTaskType, InvalidTask, DeadlinePassed, NotStarted, SupervisorClosed: at once.
            Overloaded: on entering, if the gate refuses.
        """
        task = Task(
            task_type,
            priority=priority,
            timeout=timeout,
            deadline=deadline,
            tenant=tenant,
            thread_id=thread_id,
            spill=False,
        )
        return self._admission_here().slot(task)

    def ticket(self, task_id: str) -> Ticket:
        """The ticket of a task that is under way, ended lately, or is stored in the overflow.

        Whether the overflow knows it is found out when the ticket is awaited: it raises UnknownTask if not.

        Raises:
            UnknownTask: there is no such task, and no overflow to ask.
        """
        return self._running().ticket(task_id)

    @property
    def dead_letters(self) -> DeadLetters:
        """Stored tasks that nobody will try again by itself, for a person to look at."""
        return DeadLetters(lambda: self._admission_here().dispatcher)

    def portal(self) -> Portal:
        """Blocking access for threads and programs without an event loop: ``with supervisor.portal() as portal:``."""
        return Portal(self)

    # --- what can be read ---

    def system_load(self) -> float:
        """The highest reading: what the fullest resource holds against what it may hold, waiting room included."""
        return max(reading.load for reading in self.readings())

    def readings(self) -> tuple[Reading, ...]:
        """What each resource holds against what it may hold."""
        return (Reading("host", 0.0),) if self._dispatcher is None else self._dispatcher.load.readings()

    def utilization(self) -> float:
        """Slots taken over slots, of all workers that are not FAILED; 0.0 if there are none."""
        return utilization(self._workers)

    def statistics(self) -> Statistics:
        """A snapshot of what was counted and of what is."""
        return snapshot(self._dispatcher, self._workers, self.readings())

    def events(self, *, bound: int = 1000) -> Subscription:
        """Everything that happens from now on, as an async iterator; the newest `bound` are kept until read."""
        return self._bus.subscribe(bound=bound)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it runs on, while it runs."""
        return self._dispatcher.loop if self._dispatcher is not None and self._closing is None else None

    # --- its life ---

    async def start(self) -> None:
        """Start here, on the running event loop.

        Raises:
            AlreadyStarted: it has been started before.
            LedgerUnusable: the overflow cannot be opened.
        """
        if self._dispatcher is not None:
            raise AlreadyStarted
        loop = asyncio.get_running_loop()
        self._draw = clock.draw_function(loop)
        house = Dispatcher(loop, self._settings, threads=self._threads, bus=self._bus, draw=self._draw)
        house.codecs, self._dispatcher, self._admission = self._codecs, house, AdmissionController(house)
        try:
            await start_up(house, self._workers, self._store, self._settings)
        except BaseException:
            self._dispatcher = self._admission = None
            raise
        self._loop_monitor = monitor_loop(house, bound=self._settings.lag_bound)

    async def drain(self, timeout: float | None = None) -> DrainReport:  # noqa: ASYNC109 - it cuts off, not raises
        """Stop admitting and let what is inside finish, for at most `timeout` seconds; the rest is cancelled.

        With an overflow that survives its process, waiting tasks go out to it, and so do stored ones that are cut off.
        What runs inside may still submit tasks of its own. Draining twice is the same as once.

        Raises:
            InvalidSetting: `timeout` is neither None nor a number of seconds.
        """
        check_drain_timeout(timeout)
        house = self._running()
        for run in active_runs(context.running_task(), house):
            raise DrainInside(task_id=run.task.task_id)
        self._admission_here().stop_admitting()
        try:
            return await Drain(house, grace=self._settings.zombie_grace).run(timeout)
        finally:
            self._drained = True

    async def close(self) -> None:
        """Stop now: cancel what runs, end every ticket, let the overflow go. Idempotent.

        Cancelling this leaves nothing half closed: it goes on in the background.
        """
        if self._dispatcher is None:
            return
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close(self._dispatcher))
        await asyncio.shield(self._closing)

    async def _close(self, dispatcher: Dispatcher) -> None:
        try:
            self._admission_here().close()
            grace = 0.0 if self._drained else self._settings.zombie_grace  # what had it once does not get it twice
            await shut_down(dispatcher, self._workers, grace=grace)
        finally:
            if self._loop_monitor is not None:
                self._loop_monitor.stop()
            self._threads.shutdown()
            self._bus.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._closing is None:
                await self.drain()
        finally:
            await self.close()

    def __forebay_handler__(self) -> Handler:
        """This supervisor as a worker of another, which starts it, feels its load and closes it."""
        return as_handler(self)

    @property
    def started(self) -> bool:
        """Whether it has been started; it may have closed since."""
        return self._dispatcher is not None

    def load_of(self, task_type: str) -> float:
        """The load on the path of a task of `task_type`, as its gate reads it; 1.0 if nobody here serves it."""
        return load_of_nested(self, self._dispatcher, task_type)

    # --- inside ---

    def _running(self) -> Dispatcher:
        if self._dispatcher is None:
            raise NotStarted
        return self._dispatcher

    def _admission_here(self) -> AdmissionController:
        if (door := self._admission) is None:
            raise NotStarted
        if asyncio._get_running_loop() is not door.loop:  # noqa: SLF001 - documented; None in a thread
            raise WrongLoop(what="The supervisor")
        return door
