"""BackpressureSupervisor: the public interface of the task plane."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Never, NoReturn, Self, TypeVar, Unpack, overload

from forebay import clock, context
from forebay._renamed import renamed_arguments
from forebay._threads import DaemonThreadExecutor
from forebay._validate import check_not_negative, reject
from forebay.adapters import Config, Handler
from forebay.breaker import BreakerRules
from forebay.engine import Engine
from forebay.errors import (
    AlreadyStarted,
    DrainInside,
    DuplicateWorker,
    ForebayError,
    ForkedProcess,
    InvalidHandler,
    NotStarted,
    SupervisorClosed,
    UnknownWorker,
    UnregisteredInside,
    WrongLoop,
)
from forebay.events import Event, EventBus, Sink, Subscription, TaskTypePaused, TaskTypeResumed, WorkerResized, log
from forebay.interfaces import Demand, Reading, TaskStore
from forebay.overflow import open_task_store
from forebay.retry import Retry, RetryBudget
from forebay.saga import Saga, SagaAdmin, SagaLog, open_saga_log
from forebay.supervisor.admission_controller import AdmissionController
from forebay.supervisor.codecs import TaskCodecs
from forebay.supervisor.core import RESUME_DELAY, Core
from forebay.supervisor.demand import measure_demand
from forebay.supervisor.dispatcher import Dispatcher
from forebay.supervisor.drain import Drain, DrainReport
from forebay.supervisor.fan_out import FanOut, FanOutOptions, Hedge, MapOptions, OnProgress, TaskOptions
from forebay.supervisor.lifecycle import add_running_worker, shut_down, start_up, wait_until_done
from forebay.supervisor.loop_monitor import LoopMonitor
from forebay.supervisor.nested_supervisor import as_handler, contains
from forebay.supervisor.portal import Portal
from forebay.supervisor.registration import check_decorator_arguments, make_worker
from forebay.supervisor.runs.slot_loans import active_runs
from forebay.supervisor.saga_driver import SagaDriver
from forebay.supervisor.settings import SupervisorSettings, event_sinks
from forebay.supervisor.slot import Slot
from forebay.supervisor.spill.dead_letters import DeadLetters
from forebay.supervisor.statistics import Statistics, snapshot, utilization, worker_statistics
from forebay.supervisor.tenants import Tenant, Tenants, tenant_settings
from forebay.supervisor.ticket import Ticket, value_of
from forebay.supervisor.tree.tree_node import TreeNode, supervisor_node
from forebay.supervisor.tree.worker_life import MIN_STOP_TIME
from forebay.supervisor.worker import WorkerAgent
from forebay.supervisor.worker_removal import WorkerRemoval
from forebay.task import DEFAULT_TENANT, Deadline, Priority, Task
from forebay.upstream import Upstream

ResultT = TypeVar("ResultT")
F = TypeVar("F", bound=Callable[..., Any])
_MAX_NAMES = 20  # of workers, in a message


class _Workers(dict[str, WorkerAgent]):
    """The workers of a supervisor, by name."""

    def __missing__(self, name: object) -> NoReturn:
        raise UnknownWorker(name=name, known=self.known)

    @property
    def known(self) -> str:
        """The names, for a message."""
        names = ", ".join(sorted(self)[:_MAX_NAMES]) or "none"
        return names if len(self) <= _MAX_NAMES else f"{names} and {len(self) - _MAX_NAMES} more"


class BackpressureSupervisor:
    """Admits, spills or rejects agent tasks by priority, and gives each to the worker that would finish it first.

    Where the costs of workers differ, that is the cheapest one that makes the deadline.

    An async context manager: leaving it drains; leaving it by an error or a cancellation stops the handlers. Either way
    every ticket ends. It may be entered again, in any event loop, with its workers and settings and nothing else of its
    earlier run.

    Args:
        backpressure_threshold: the load from which NORMAL tasks are rejected, in (0, 1]. LOW is rejected from 0.75 of
            it, HIGH from half way between it and 1, CRITICAL at 1.
        max_queue_size: tasks of each type that may wait inside; by default 100, or the slots of the type if these are
            more.
        overflow: where tasks that are not admitted wait: ``sqlite:///spill.db``, ``redis://host:6379/0``, ``sqs://queue``,
            ``memory://`` or a TaskStore. None: they are rejected.
        lease: seconds that a lease on a stored task lasts unless renewed; at most 600.
        max_payload_bytes: the bound of an encoded payload or result, in bytes.
        max_attempts: starts of a stored task's handler that may lose their lease before it becomes a dead letter.
        result_retention: seconds for which an overflow that survives the process keeps the results of tasks, and with
            them the keys of those that succeeded.
        retry_budget: bounds the retries of all tasks together: ``forebay.retry.RetryBudget``. None: one retry for every
            five first attempts of the last minute, and ten more.
        keep_results: how many ended tickets `ticket` still finds, without the exceptions that were their causes.
        keep_results_bytes: estimated bytes of payloads and results that these tickets may take together.
        zombie_grace: seconds that a handler has to stop before it is called a zombie.
        lag_bound: event-loop lag in seconds at which the host's load is 1.0; longer is reported as a stall. None: not
            measured.
        max_cost_wait: seconds that a task with a deadline may wait for a cheaper worker though a dearer one is free, as
            long as that makes its deadline; ``math.inf`` for no other bound. 0: a free slot is used at once.
        tenants: the weight of a tenant, or a `Tenant` with its bounds, by name. Tenants with work waiting take turns by
            their weights; one that is not named has a weight of 1.
        strategy: which workers are started again when the life of one has ended: ``"one_for_one"``, it alone;
            ``"one_for_all"``, all; ``"rest_for_one"``, it and those that were registered after it.
        max_restarts: how many restarts within `within` seconds there may be. One more, and a supervisor that is a
            worker of another one is restarted by that; otherwise the worker is FAILED until it is revived.
        within: the period of `max_restarts`, in seconds.
        saga_log: where the steps of sagas are written ahead: ``sqlite:///saga.db``, ``redis://host:6379/0`` or
            ``memory://``. Needed by workers whose handler is a saga; those that are unfinished in it go on.
        on_event: one sink or several: plain functions, called with each event soon after it, in the loop.

    Raises:
        InvalidThreshold, InvalidSetting, InvalidOverflowUrl, InvalidSagaLogUrl: a setting is invalid.
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
        result_retention: float = 86_400.0,
        retry_budget: RetryBudget | None = None,
        keep_results: int = 1000,
        keep_results_bytes: int = 50_000_000,
        zombie_grace: float = 5.0,
        lag_bound: float | None = 1.0,
        max_cost_wait: float = 0.0,
        tenants: Mapping[str, float | Tenant] | None = None,
        strategy: str = "one_for_one",
        max_restarts: int = 3,
        within: float = 5.0,
        saga_log: str | SagaLog | None = None,
        on_event: Sink | Sequence[Sink] = (),
    ) -> None:
        self._settings = SupervisorSettings(
            backpressure_threshold=backpressure_threshold,
            max_queue_size=max_queue_size,
            lease=lease,
            max_payload_bytes=max_payload_bytes,
            max_attempts=max_attempts,
            result_retention=result_retention,
            retry_budget=RetryBudget() if retry_budget is None else retry_budget,
            keep_results=keep_results,
            keep_results_bytes=keep_results_bytes,
            zombie_grace=zombie_grace,
            lag_bound=lag_bound,
            max_cost_wait=max_cost_wait,
            tenants=tenant_settings(tenants),
            strategy=strategy,
            max_restarts=max_restarts,
            within=within,
        )
        self._overflow = overflow
        self._store = None if overflow is None else open_task_store(overflow)
        self._given_saga_log = saga_log
        self._saga_log = None if saga_log is None else open_saga_log(saga_log)
        self._sagas: dict[str, Saga] = {}
        self._bus = EventBus(event_sinks(on_event))
        self._draw: Callable[[], float] = clock.new_random().random
        self._make_worker = partial(  # once, because ten thousand workers then share what it passes
            make_worker,
            draw=lambda: self._draw(),  # noqa: PLW0108 - the start replaces it
            on_revive=self._revive,
            on_resize=self._resized,
        )
        self._workers = _Workers()
        self._codecs = TaskCodecs()
        self._dispatcher: Dispatcher | None = None
        self._admission: AdmissionController | None = None
        self._threads: DaemonThreadExecutor | None = None
        self._loop_monitor: LoopMonitor | None = None
        self._process: int | None = None  # in which it was started
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._drained = False
        self._removals: dict[WorkerAgent, asyncio.Future[None]] = {}  # in progress

    # --- workers ---

    @renamed_arguments(cool_off="reset_timeout")
    def register_worker(  # noqa: PLR0913 - every property of a worker has a name
        self,
        name: str,
        *,
        handler: Any = None,
        factory: Callable[[], Any] | str | None = None,
        task_types: Sequence[str],
        max_concurrent: int = 1,
        max_open: int | None = None,
        reserve: int = 0,
        timeout: float = 300.0,
        retry: Retry | None = None,
        cost: float | Mapping[str, float] | None = None,
        payload: Any = None,
        result: Any = None,
        config: Config | None = None,
        engine: str | Engine | None = None,
        on_cancel: Callable[[Task], object] | None = None,
        reset_timeout: float | None = 10.0,
        breaker: BreakerRules | None = None,
        upstreams: Iterable[Upstream | tuple[Upstream, str]] = (),
        restart: str = "permanent",
        start: Callable[..., Any] | None = None,
        start_timeout: float | None = None,
        stop: Callable[[], Any] | None = None,
        stop_timeout: float = 5.0,
    ) -> WorkerAgent:
        """Register a worker, before the start or after it, or after the close for the next start.

        Args:
            name: unique among the workers.
            handler: a callable, an agent of a supported framework, a supervisor, or the import path of any of these,
                ``"module:name"``.
            factory: instead of a handler: makes a fresh agent for each task.
            task_types: the task types that it accepts.
            max_concurrent: how many tasks it runs at a time.
            max_open: how many tasks may have begun before it begins another one, those that wait for nested tasks of
                theirs included; by default twice `max_concurrent`. Nested tasks begin in any case.
            reserve: how many of its slots, the last ones free, are kept for CRITICAL and HIGH tasks. If it is all of
                them, the worker takes no others.
            timeout: seconds that an attempt may run, unless the task has a timeout of its own.
            retry: how tasks whose attempts fail, or run out of time, are tried again, unless the task has a policy of
                its own. None: they are not. Between two attempts a task holds no slot.
            cost: US dollars that a task costs on it, or a mapping of them by task type. None: learned from what the
                calls of its runs are charged by upstreams with budgets. Where the costs of the workers of a type
                differ, NORMAL and LOW tasks go to the cheapest one that makes their deadline.
            payload: the type of its payloads, checked at `submit`. All workers of a task type must declare the same.
            result: the type of its results. A task whose handler returns anything else ends FAILED.
            config: a framework's own configuration for its agent, or a callable of the Task that makes one.
            engine: ``"loop"``, ``"thread"``, ``"process"`` or an Engine; by default a plain function runs in a thread.
            on_cancel: called with the task when its run is to stop, for handlers that a cancellation does not stop.
            reset_timeout: seconds for which it stays FAILED after five failures in a row (or 5 % of a thousand tasks)
                before it is tried again; longer each time that it fails again. None: until ``revive()``.
            breaker: the rules by which it becomes FAILED and is tried again, instead of these; with ``triggers=()`` no
                failed task makes it FAILED. Their `probe_timeout` is at least twice `timeout`.
            upstreams: the upstreams that its calls use, so that their load counts before the first call; each an
                Upstream, or a pair of an Upstream and a model.
            restart: ``"permanent"``: it is started again whenever its life has ended; ``"transient"``: only if that was
                abnormal, otherwise it is FAILED until it is revived; ``"temporary"``: never, and it is unregistered.
            start: called in the event loop when the supervisor starts, and at each restart. If it returns an awaitable,
                such as a coroutine, that is the worker's life: its return is a normal end, its cancellation a shutdown,
                another exception an abnormal end. The worker takes tasks as soon as `start` has returned; if it takes
                an argument, a function, once its life has called that. A coroutine that returns once it has connected
                is a life that has ended.
            start_timeout: seconds that a start may take, that of its handler included. None: no limit.
            stop: called before the life is cancelled, so that it can end by itself. It may be async. It is not called
                for a life that has ended by itself.
            stop_timeout: seconds that `stop` and the life have for that, and the life once it is cancelled.

        Raises:
            DuplicateWorker, InvalidHandler, InvalidSetting, InvalidTimeout, NotImportable: an argument is invalid.
        """
        if self._closing is not None and not self._closing.done():
            raise SupervisorClosed(state="closing")
        if isinstance(handler, BackpressureSupervisor) and contains(handler, self):
            raise InvalidHandler(worker=name, type=type(self).__name__, hint="it would contain itself")
        worker = self._make_worker(
            name,
            handler=handler,
            factory=factory,
            task_types=task_types,
            max_concurrent=max_concurrent,
            max_open=max_open,
            reserve=reserve,
            timeout=timeout,
            retry=retry,
            cost=cost,
            config=config,
            engine=engine,
            on_cancel=on_cancel,
            reset_timeout=reset_timeout,
            breaker=breaker,
            upstreams=upstreams,
            restart=restart,
            start=start,
            start_timeout=start_timeout,
            stop=stop,
            stop_timeout=stop_timeout,
        )
        if name in self._workers:
            raise DuplicateWorker(name=name)
        self._add_saga(worker)
        self._codecs.declare(worker, payload=payload, result=result)
        self._workers[name] = worker
        if self._dispatcher is not None and self.running and not self._is_starting:  # otherwise to `start_up`
            add_running_worker(self._dispatcher, worker)
        return worker

    def _add_saga(self, worker: WorkerAgent) -> None:
        """Have the saga that is the handler of a worker driven here.

        Raises:
            InvalidHandler: there is no log for it, or another one has its name.
        """
        saga = worker.handler.saga
        if not isinstance(saga, Saga):
            return
        hint = None
        if self._saga_log is None:
            hint = 'it needs a log: BackpressureSupervisor(saga_log="sqlite:///saga.db")'
        elif self._sagas.get(saga.name, saga) is not saga:
            hint = f"another saga is named {saga.name!r}, too, and their log could not tell them apart: rename one"
        if hint is not None:
            raise InvalidHandler(worker=worker.name, type="Saga", hint=hint)
        self._sagas[saga.name] = saga
        worker.replace_call(partial(self._run_saga, saga))

    async def _run_saga(self, saga: Saga, task: Task) -> Any:
        sagas = self._running().sagas
        assert sagas is not None  # noqa: S101 - see `_add_saga`
        return await sagas.run(saga, task)

    def worker(self, *task_types: str, name: str | None = None, **settings: Any) -> Callable[[F], F]:
        """Register the decorated callable as a worker, named after it unless `name` is given.

        It takes the settings of `register_worker`, and returns the callable unchanged.
        """
        check_decorator_arguments(task_types)

        def register(handler: F) -> F:
            title = name or str(getattr(handler, "__name__", "worker"))
            self.register_worker(title, handler=handler, task_types=task_types, **settings)
            return handler

        return register

    async def unregister_worker(self, name: str | WorkerAgent, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - it cuts off, not raises
        """Remove a worker: it begins nothing new, what runs there may finish, then its handler is stopped.

        While a run there waits for a nested task of a type of this worker, that may still begin there. A task that
        waits runs on the other workers of its type. If there are none by the end, it ends FAILED, or is left in an
        overflow that survives the process, and its type is not known any more; unless the type is paused: then it waits
        for the next worker.

        If this is cancelled, the removal goes on in the background.

        Args:
            name: of the worker, or what `register_worker` returned.
            timeout: seconds that what runs there may take. Then it ends CANCELLED, or goes back to its store; its
                handler has `zombie_grace` seconds to stop. None: no limit.

        Raises:
            InvalidSetting: `timeout` is neither None nor a number of seconds.
            UnknownWorker: there is no such worker.
            UnregisteredInside: it was called by a task that runs on the worker.
            SupervisorClosed: the supervisor is being closed, or was before the worker had gone.
            WrongLoop: it runs on another event loop.
        """
        check_not_negative("unregister_worker", "timeout", timeout, unit="seconds", none="for no limit")
        await self.wait_until_started()
        self._end_if_cut_off()
        worker = self._workers[name.name if isinstance(name, WorkerAgent) else name]
        if isinstance(name, WorkerAgent) and name is not worker:
            raise UnknownWorker(name=f"{name.name} (it is another worker)", known=self._workers.known)
        if self._closing is not None and not self._closing.done():
            raise SupervisorClosed(state="closing")
        if self._dispatcher is None or self._closing is not None:  # between two runs
            self._unlist(worker)
            served = {task_type for other in self._workers.values() for task_type in other.task_types}
            self._codecs.remove_worker(worker, set(worker.task_types) - served)
            return
        dispatcher = self._dispatcher_here()
        for run in active_runs(context.running_task(), dispatcher):
            if run.worker is worker:
                raise UnregisteredInside(worker=worker.name, task_id=run.task.task_id)
        self._begin_removal(worker, timeout)
        gone = self._removals[worker]
        await asyncio.wait((gone,))
        if gone.cancelled():
            raise SupervisorClosed(state="closed")
        gone.result()

    def _begin_removal(self, worker: WorkerAgent, timeout: float | None = 0.0) -> None:
        if worker not in self._removals:
            core = self._running().core
            removal = WorkerRemoval(core, self._running(), grace=self._settings.zombie_grace)
            removal.begin(worker)
            self._removals[worker] = core.loop.create_future()
            self._go_on_with_removal(core, removal, worker, timeout)

    def _go_on_with_removal(
        self, core: Core, removal: WorkerRemoval, worker: WorkerAgent, timeout: float | None
    ) -> None:
        def ended(removing: asyncio.Future[None]) -> None:
            if removing.cancelled():
                if not core.closed:  # as by a program that cancels every task of asyncio
                    again = partial(self._go_on_with_removal, core, removal, worker, timeout)
                    core.timers.at(core.loop.time() + RESUME_DELAY, again)
            elif (gone := self._removals.pop(worker, None)) is not None:
                if (error := removing.exception()) is not None:
                    gone.set_exception(error)
                else:
                    gone.set_result(None)

        core.run_to_completion(self._remove(removal, worker, timeout)).add_done_callback(ended)

    async def _remove(self, removal: WorkerRemoval, worker: WorkerAgent, timeout: float | None) -> None:  # noqa: ASYNC109 - as above
        gone, types = await removal.finish(worker, timeout)
        self._unlist(worker)
        if gone:
            self._codecs.remove_worker(worker, types)
        else:
            self._forget_in_background(removal, worker)

    def _forget_in_background(self, removal: WorkerRemoval, worker: WorkerAgent) -> None:
        again = partial(self._forget_in_background, removal, worker)
        self._running().core.run_in_background(self._forget(removal, worker), if_cancelled=again)

    async def _forget(self, removal: WorkerRemoval, worker: WorkerAgent) -> None:
        self._codecs.remove_worker(worker, await removal.forget(worker))

    def _unlist(self, worker: WorkerAgent) -> None:
        del self._workers[worker.name]
        saga = worker.handler.saga
        if isinstance(saga, Saga) and not any(other.handler.saga is saga for other in self._workers.values()):
            self._sagas.pop(saga.name, None)

    def pause(self, task_type: str) -> None:
        """Begin no task of a type any more, until `resume`; what runs goes on.

        What waits keeps waiting: until its deadline, or in the overflow. New tasks join it while there is room in the
        queue, since a free slot is no room now. Nested tasks wait too, and so do the runs that wait for them. Draining
        does not wait for what is paused.

        Raises:
            UnknownTaskType: no worker is registered for it.
            NotStarted, SupervisorClosed: the supervisor is not running.
            WrongLoop: it runs on another event loop.
        """
        pool = self._admission_here().pool_of(task_type)
        if not pool.paused:
            pool.begin_pause()
            core = self._running().core
            core.bus.emit(TaskTypePaused(at=core.loop.time(), task_type=task_type))
            core.registry.notify_progress()

    def resume(self, task_type: str) -> None:
        """Let tasks of a paused type begin again, those that wait longest first; nothing changes for any other type.

        If it has no worker any more, what waits ends as `unregister_worker` describes.

        Raises:
            UnknownTaskType, NotStarted, SupervisorClosed, WrongLoop: as `pause`.
        """
        pool = self._admission_here().pool_of(task_type)
        if pool.paused:
            dispatcher = self._running()
            pool.end_pause()
            dispatcher.core.bus.emit(TaskTypeResumed(at=dispatcher.core.loop.time(), task_type=task_type))
            if WorkerRemoval(dispatcher.core, dispatcher, grace=self._settings.zombie_grace).resume(pool):
                self._codecs.remove_types([task_type])
            else:
                dispatcher.dispatch_to_all(pool)
            dispatcher.core.registry.notify_progress()  # there may be room

    @property
    def sagas(self) -> SagaAdmin:
        """The sagas in its log: which there are, what they have done, and what is to become of the parked ones.

        Raises:
            NotStarted: it is not running.
            InvalidSetting: it has no saga log.
        """
        dispatcher = self._dispatcher_here()
        if dispatcher.sagas is None:
            reject("BackpressureSupervisor", "saga_log", None, 'the log of its sagas, such as "sqlite:///saga.db"')
        return dispatcher.sagas.admin

    @property
    def workers(self) -> Mapping[str, WorkerAgent]:
        """The workers by name. One that there is not is an `UnknownWorker`, which is a KeyError."""
        return MappingProxyType(self._workers)

    def _revive(self, worker: WorkerAgent) -> None:
        dispatcher = self._dispatcher
        if dispatcher is not None and self.running and dispatcher.workers.get(worker.name) is worker:
            dispatcher.supervision.revive(worker)  # otherwise it was unregistered, or begins its next run with nothing

    def _resized(self, worker: WorkerAgent, before: int) -> None:
        dispatcher = self._dispatcher
        if dispatcher is None or dispatcher.workers.get(worker.name) is not worker:
            return  # not started, or unregistered
        dispatcher.completion.slots_changed(worker)
        resized = WorkerResized(
            at=dispatcher.loop.time(), worker_id=worker.name, before=before, max_concurrent=worker.max_concurrent
        )
        dispatcher.core.bus.emit(resized)

    # --- work ---

    async def submit(self, task: Task[ResultT], *, wait: float | None = None, **misplaced: Never) -> Ticket[ResultT]:
        """Submit a task to admission control.

        Args:
            task: the task.
            wait: seconds to wait for room while the task would be rejected, so that a producer is slowed down instead;
                ``math.inf`` for as long as it takes, at most to the deadline. Those that wait are admitted by priority,
                then in the order in which they came. None: it is rejected at once.
            misplaced: nothing; fields of the task, such as `priority`, are arguments of `Task`.

        Returns:
            A ticket: ADMITTED, SPILLED or REJECTED. Overload raises nothing here.

        Raises:
            InvalidSetting: `wait` is not a number of seconds.
            UnknownTaskType, DuplicateTask, DeadlinePassed: the task is invalid.
            InvalidPayload, NotSerializable, PayloadTooLarge: its payload is invalid.
            OverflowRequired: it is durable, and there is no overflow that survives the process.
            NotStarted, SupervisorClosed: the supervisor is not running.
            WrongLoop: it runs on another event loop.
        """
        if misplaced:
            _reject_misplaced("submit", misplaced)
        if wait is not None:
            _check_wait(wait)
        return await self._admission_here().submit(task, wait=wait)

    def submit_nowait(self, task: Task[ResultT], **misplaced: Never) -> Ticket[ResultT]:
        """Submit a task without waiting for anything: it can be ADMITTED or REJECTED, not spilled.

        Raises:
            OverflowRequired: the task is durable, and a record takes time: use `submit`.
            Others: as `submit`.
        """
        if misplaced:
            _reject_misplaced("submit_nowait", misplaced)
        return self._admission_here().submit_nowait(task)

    async def run(self, task: Task[ResultT], *, wait: float | None = None, **misplaced: Never) -> ResultT:
        """Submit a task and return its value; wait for a spilled one until its deadline.

        Cancelling this cancels the task, unless others wait for the same work by its key. `wait` is as in `submit`.

        Raises:
            Overloaded: it was rejected; ``retry_after`` says when to try again.
            TaskFailed, TaskTimedOut: it ended that way (TaskCancelled and TaskExpired are their subclasses).
            Others: as `submit`.
        """
        if misplaced:
            _reject_misplaced("run", misplaced)
        if wait is not None:
            _check_wait(wait)
        value: ResultT = await self._admission_here().run(task, wait=wait)
        return value

    def fan_out(  # noqa: PLR0913 - each has a name
        self,
        tasks: Iterable[Task[ResultT]],
        *,
        retry: Retry | None = None,
        limit: int | None = None,
        quorum: int | None = None,
        hedge: Hedge | None = None,
        ordered: bool = False,
        progress: OnProgress | None = None,
    ) -> FanOut[ResultT]:
        """Return an async iterator that submits many tasks, as room appears, and yields their results as they finish.

        ``async for result in supervisor.fan_out(tasks): ...``. Leaving the loop cancels what has not ended; so does
        leaving ``async with supervisor.fan_out(tasks) as results``, at once and in any case.

        Args:
            tasks: any number of tasks; a generator is read as room appears.
            retry: the policy for failed tasks that have none of their own.
            limit: how many tasks may be outstanding, results that were not read included; by default as many as can be
                inside for their type.
            quorum: as soon as so many tasks have succeeded, the others are cancelled, however slowly the results are
                read, and the iteration ends with them. The results of tasks that had failed before are among them.
            hedge: seconds that a task may run before a second attempt at it is started on another worker, if one is
                free and the retry budget allows it; the first success counts. ``"p95"``: longer than 95 % of the latest
                tasks of its type ran. Tasks with a `key`, with a `thread_id` and durable ones are not hedged.
            ordered: yield the results in the order of the tasks.
            progress: a plain function, called with a `FanOutProgress` after each change, such as
                ``forebay.progress_bar()``. What it raises is logged.

        Raises:
            InvalidSetting, NotStarted: at once.
            QuorumNotReached: from the iteration: too many tasks have failed.
            Others: from the iteration, as `submit`; the tasks that have not ended are cancelled.
        """
        admission = self._admission_here()
        timers = self._running().core.timers
        return FanOut(
            admission,
            timers,
            tasks,
            retry=retry,
            limit=limit,
            quorum=quorum,
            hedge=hedge,
            ordered=ordered,
            progress=progress,
        )

    @overload
    async def map(
        self,
        tasks: Iterable[Task[ResultT]],
        /,
        *,
        return_exceptions: Literal[False] = False,
        **options: Unpack[FanOutOptions],
    ) -> list[ResultT]: ...
    @overload
    async def map(
        self, tasks: Iterable[Task[ResultT]], /, *, return_exceptions: bool, **options: Unpack[FanOutOptions]
    ) -> list[ResultT | ForebayError]: ...
    @overload
    async def map(
        self,
        task_type: str,
        payloads: Iterable[Any],
        *,
        return_exceptions: bool = False,
        **options: Unpack[MapOptions],
    ) -> list[Any]: ...
    async def map(  # noqa: PLR0913 - each has a name
        self,
        task_type: str | Iterable[Task],
        payloads: Iterable[Any] | None = None,
        *,
        retry: Retry | None = None,
        limit: int | None = None,
        hedge: Hedge | None = None,
        progress: OnProgress | None = None,
        return_exceptions: bool = False,
        **options: Unpack[TaskOptions],
    ) -> list[Any]:
        """Run a task for each payload, as room appears, and return their values in the order of the payloads.

        ``map(tasks)``, without payloads, runs these tasks; their values have the types that the tasks declare.
        The first task that fails cancels the others, and its error is raised, as by `run`; with `return_exceptions` the
        errors are in the list instead. Cancelling this cancels the tasks.

        Args:
            task_type: of all tasks; or, instead of it and the payloads, the tasks themselves, as in `fan_out`.
            payloads: any number; a generator is read as room appears.
            retry: as in `fan_out`.
            limit: as in `fan_out`.
            hedge: as in `fan_out`.
            progress: as in `fan_out`.
            return_exceptions: whether failed tasks have their error in the list.
            options: fields of all tasks, such as ``priority=Priority.LOW``. Tasks that were passed have their own.

        Raises:
            TypeError: there are neither payloads nor tasks, or there are tasks and fields for them.
            Others: as `run` and `fan_out`.
        """
        tasks = _tasks_to_map(task_type, payloads, options)
        values: dict[int, Any] = {}
        total = len(payloads) if isinstance(payloads, Sized) else None
        async with self.fan_out(tasks, retry=retry, limit=limit, hedge=hedge, progress=progress) as results:
            results.expect(total)
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    index, result = await results.read()
                    try:
                        values[index] = value_of(result)
                    except ForebayError as error:
                        if not return_exceptions:
                            raise
                        values[index] = error
        return [values[index] for index in range(len(values))]

    @renamed_arguments(thread="thread_id")
    def slot(  # noqa: PLR0913 - a task's fields
        self,
        task_type: str,
        *,
        priority: Priority = Priority.NORMAL,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        tenant: str = DEFAULT_TENANT,
        thread_id: str | None = None,
    ) -> Slot:
        """Return a slot of a worker for the caller's own code: ``async with supervisor.slot("write"): ...``.

        Raises:
            UnknownTaskType, InvalidTask, DeadlinePassed, NotStarted, SupervisorClosed: at once.
            Overloaded: on entering, if it is not admitted.
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

    async def find(self, task_id: str | None = None, *, key: str | None = None) -> Ticket | None:
        """Return the ticket of a task by its id or its idempotency key, or None if there is no such task.

        It finds a task that is inside or has ended lately, and asks the overflow, once, for any other.

        Raises:
            InvalidSetting: neither an id nor a key was given, or both, or no string.
            StoreUnavailable: the overflow cannot be asked.
            SupervisorClosed: it is not known here, and the supervisor has closed.
            NotStarted, WrongLoop: as `submit`.
        """
        expected = 'a string, and the only one: find("the id"), or find(key="the key")'
        if key is not None and (task_id is not None or not isinstance(key, str)):
            reject("find", "key", key, expected)
        if key is None and not isinstance(task_id, str):
            reject("find", "task_id", task_id, expected)
        return await self._dispatcher_here().find(task_id, key)

    def ticket(self, task_id: str) -> Ticket:
        """Return the ticket of a task that this process knows: it is inside, or has ended lately.

        This asks no overflow: use `find` for a task that may only be stored there.

        Raises:
            UnknownTask: this process knows no such task.
            NotStarted: the supervisor has not been started.
        """
        return self._running().ticket(task_id)

    @property
    def dead_letters(self) -> DeadLetters:
        """The stored tasks that will not be tried again until a person requeues them."""
        return DeadLetters(lambda: self._dispatcher_here().spill)

    def portal(self) -> Portal:
        """Return blocking access for threads and programs without an event loop: ``with supervisor.portal(): ...``."""
        return Portal(self)

    # --- load, statistics and events ---

    def system_load(self) -> float:
        """Return the load of the fullest resource, the room in its queue included."""
        return max(reading.load for reading in self.readings())

    def readings(self) -> tuple[Reading, ...]:
        """Return the load of each resource."""
        return (Reading("host", 0.0),) if self._dispatcher is None else self._dispatcher.load.readings()

    def utilization(self) -> float:
        """Return the slots taken over the slots, of all workers that are not FAILED; 0.0 if there are none."""
        return utilization(self._workers)

    def statistics(self) -> Statistics:
        """Return a snapshot of the counters since the start, and of what is inside now."""
        if self._dispatcher is None or self._admission is None:
            return Statistics(**worker_statistics(self._workers, 0.0))
        return snapshot(self._dispatcher, self._admission, self._loop_monitor, self._workers)

    async def demand(self, task_types: Sequence[str], *, ask_overflow: bool = True) -> Demand:
        """Return the slots that the tasks of some types ask for now, for whoever adds and removes workers.

        Args:
            task_types: the types.
            ask_overflow: ask the overflow, if there is one, what waits there and what other processes run.

        Raises:
            UnknownTaskType: no worker is registered for one of them.
            StoreUnavailable: the overflow cannot be asked.
            NotStarted, SupervisorClosed: the supervisor is not running.
            WrongLoop: it runs on another event loop.
        """
        admission = self._admission_here()
        pools = [admission.pool_of(task_type) for task_type in dict.fromkeys(task_types)]
        return await measure_demand(self._running(), admission, pools, ask_overflow=ask_overflow)

    def emit(self, event: Event) -> None:
        """Deliver an event to the sinks and to the iterators of `events`."""
        if self._bus.active:
            self._bus.emit(event)

    def tree(self) -> TreeNode:
        """Return a snapshot of the supervision tree: the workers, and those of the supervisors below."""
        state = "new" if self._dispatcher is None else "running" if self._closing is None else "closed"
        return supervisor_node(state, self.system_load(), self._settings.strategy, self._workers.values())

    def events(self, *, bound: int = 1000) -> Subscription:
        """Return an async iterator over the events from now on, which keeps the newest `bound` unread ones."""
        return self._bus.subscribe(bound=bound)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it runs on, while it runs."""
        return self._dispatcher.loop if self._dispatcher is not None and self.running else None

    # --- start and end ---

    async def start(self) -> None:
        """Start on the running event loop. After `close` it may be started again, also on another loop.

        If it is being closed, this waits for the end of that. If its loop ended before it was closed, that run is over.

        Raises:
            AlreadyStarted: it has been started, and not closed.
            StoreUnavailable: the overflow cannot be opened.
            SupervisorClosed: it was closed meanwhile.
        """
        while (closing := self._closing) is not None:
            await wait_until_done(closing)
            if self._closing is closing:  # otherwise somebody else has started it meanwhile
                self._forget_run()
        self._end_if_cut_off()
        if self._dispatcher is not None:
            raise AlreadyStarted
        dispatcher = self._begin_run(asyncio.get_running_loop())
        await self._start_up(dispatcher)
        if self._settings.lag_bound is not None and not clock.is_virtual(dispatcher.loop):
            self._loop_monitor = LoopMonitor(
                dispatcher.loop,
                bound=self._settings.lag_bound,
                runs=dispatcher.runs,
                load=dispatcher.load,
                bus=self._bus,
            )
            self._loop_monitor.start()

    def _begin_run(self, loop: asyncio.AbstractEventLoop) -> Dispatcher:
        self._process = os.getpid()
        self._draw = clock.draw_function(loop)
        settings = self._settings
        threads = self._threads = DaemonThreadExecutor()
        core = Core(
            loop,
            threads=threads,
            bus=self._bus,
            codecs=self._codecs,
            max_queue_size=settings.max_queue_size,
            tenants=Tenants(settings.tenants),
            keep_results=settings.keep_results,
            keep_results_bytes=settings.keep_results_bytes,
        )
        dispatcher = self._dispatcher = Dispatcher(
            core, settings, store=self._store, draw=self._draw, remove_worker=self._begin_removal
        )
        self._admission = AdmissionController(
            core, dispatcher, threshold=settings.backpressure_threshold, draw=self._draw
        )
        if self._saga_log is not None:
            sagas = SagaDriver(core, self._admission, self._saga_log, self._sagas, settings=settings, threads=threads)
            dispatcher.drive_sagas(sagas)
        return dispatcher

    async def _start_up(self, dispatcher: Dispatcher) -> None:
        """Open the overflow and start the handlers, unless the supervisor is closed meanwhile."""
        starting = self._starting = asyncio.ensure_future(start_up(dispatcher, self._workers))
        try:
            await starting
        except BaseException:
            if self._dispatcher is dispatcher:  # otherwise it was closed, and started again
                if not starting.done() or starting.cancelled() or starting.exception() is not None:
                    self._dispatcher = self._admission = None
                elif self._closing is None:  # cancelled in the turn of the loop in which it had started
                    await self.close()
                    raise
            if self._is_over(dispatcher):
                raise SupervisorClosed(state="closed") from None
            raise
        if self._is_over(dispatcher):
            raise SupervisorClosed(state="closed")

    def _is_over(self, dispatcher: Dispatcher) -> bool:
        """Return whether a start has come to nothing: the supervisor was closed meanwhile."""
        return self._closing is not None or self._dispatcher not in (dispatcher, None)

    def _forget_run(self) -> None:
        """Forget the run that was closed, so that the next one begins with the workers and the settings alone."""
        self._dispatcher = self._admission = self._loop_monitor = None
        self._starting = self._closing = None
        self._drained = False
        if isinstance(self._overflow, str):  # what was in memory is gone
            self._store = open_task_store(self._overflow)
        if isinstance(self._given_saga_log, str):
            self._saga_log = open_saga_log(self._given_saga_log)
        for worker in self._workers.values():
            worker.begin_run()

    async def wait_until_started(self) -> None:
        """Wait for a start that somebody else has begun; return at once if there is none."""
        if self._starting is not None:
            await wait_until_done(self._starting)

    async def drain(self, timeout: float | None = None) -> DrainReport:  # noqa: ASYNC109 - it cuts off, not raises
        """Stop admitting, let what is inside finish for at most `timeout` seconds, and cancel the rest.

        If the overflow survives the process, waiting tasks go out to it within that time, and so do stored tasks that
        still run when it is up. Handlers that are cancelled, and the last write, have `zombie_grace` seconds more.
        Without a limit, it waits for what runs, but not for an overflow that answers nothing for 10 seconds.
        Tasks inside may still submit tasks. Draining twice is the same as draining once.

        Raises:
            InvalidSetting: `timeout` is neither None nor a number of seconds.
            DrainInside: it was called by a task that runs inside.
        """
        check_not_negative("drain", "timeout", timeout, unit="seconds", none="for no limit")
        dispatcher = self._running()
        for run in active_runs(context.running_task(), dispatcher):
            raise DrainInside(task_id=run.task.task_id)
        self._admission_here().stop_admitting()
        report = await Drain(dispatcher.core, dispatcher, grace=self._settings.zombie_grace).run(timeout)
        self._drained = True
        return report

    async def close(self) -> None:
        """Stop now: cancel what runs, end every ticket, close the overflow. Idempotent. A start in progress is undone.

        If this is cancelled, closing goes on in the background. Handlers that did not stop in time count no more, and
        do not keep a slot if it is started again.

        Raises:
            WrongLoop: it runs on another event loop.
        """
        self._end_if_cut_off()
        if self._dispatcher is None:
            return
        if self._closing is None:
            if asyncio.get_running_loop() is not self._dispatcher.loop:
                raise WrongLoop(what="The supervisor", advice="use supervisor.portal() there")
            self._closing = asyncio.ensure_future(self._close(self._dispatcher))
        if self._closing.get_loop() is asyncio.get_running_loop():
            closing = self._closing
            await asyncio.wait((closing,))  # its own cancellation is none of the caller
            if not closing.cancelled():
                closing.result()
        else:
            await wait_until_done(self._closing)

    def _end_if_cut_off(self) -> None:
        """Forget a run whose event loop ended before it was closed: nothing of it can go on."""
        if self._dispatcher is not None and self._closing is None and self._dispatcher.loop.is_closed():
            self._release_run()
            self._forget_run()

    async def _close(self, dispatcher: Dispatcher) -> None:
        try:
            if self._starting is not None and not self._starting.done():
                self._starting.cancel()
                await asyncio.wait((self._starting,), timeout=max(self._settings.zombie_grace, MIN_STOP_TIME))
                if not self._starting.done():
                    log.error("the start of a handler does not end, and is not waited for any longer")
                return
            self._admission_here().close()
            grace = 0.0 if self._drained else self._settings.zombie_grace  # draining has waited for it already
            await shut_down(dispatcher, self._workers, grace=grace)
        finally:
            self._release_run()

    def _release_run(self) -> None:
        if self._loop_monitor is not None:
            self._loop_monitor.stop()
        if self._threads is not None:
            self._threads.shutdown()
        removals, self._removals = self._removals, {}
        for gone in removals.values():
            if not gone.get_loop().is_closed():
                gone.cancel()
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

    # --- as a worker of another supervisor ---

    def __forebay_handler__(self) -> Handler:
        """Return the handler with which another supervisor starts this one, reads its load and closes it."""
        return as_handler(self)

    @property
    def running(self) -> bool:
        """True from the call of `start` to that of `close`, or to the end of its event loop."""
        return self._dispatcher is not None and self._closing is None and not self._dispatcher.loop.is_closed()

    @property
    def started(self) -> bool:
        """True once it has been started; it may have closed since."""
        return self._dispatcher is not None

    @property
    def forked_from(self) -> int | None:
        """The process in which it was started, if this is another one: a child that was forked from it."""
        return self._process if self._process not in (None, os.getpid()) else None

    def watch(self) -> asyncio.Future[None]:
        """Return a future that is cancelled when it gives up: see `Supervision`."""
        return self._running().supervision.watch()

    async def start_workers(self) -> None:
        """Start its workers again, if they were halted."""
        await self._running().supervision.start_workers()

    async def halt(self) -> None:
        """Stop its workers, in reverse order, to be started again; tasks that wait keep waiting."""
        if self._dispatcher is not None:  # otherwise its start has failed
            await self._dispatcher.supervision.halt()

    def when_stopped(self, task_id: str) -> asyncio.Future[None] | None:
        """Return a future that is done once the handler of a task that has ended has stopped; None if it has."""
        return None if self._dispatcher is None else self._dispatcher.runs.when_stopped(task_id)

    def fail_workers(self, reason: str) -> None:
        """Make its workers, which are halted, FAILED."""
        if self._dispatcher is not None:
            self._dispatcher.supervision.fail_workers(reason)

    def uses(self, dispatcher: object) -> bool:
        """Return whether `dispatcher` is its own, or that of a supervisor below it."""
        own = self._dispatcher
        return own is not None and (own is dispatcher or own.is_above(dispatcher))

    def load_of(self, task_type: str) -> float:
        """Return the load on the path of a task of `task_type`; 1.0 if no worker here accepts it."""
        if not any(task_type in worker.task_types for worker in self._workers.values()):
            return 1.0
        dispatcher = self._dispatcher
        pool = None if dispatcher is None else dispatcher.core.pools.by_type.get(task_type)
        return 0.0 if dispatcher is None or pool is None else dispatcher.load.on_path(pool)[0]  # None: about to start

    # --- inside ---

    @property
    def _is_starting(self) -> bool:
        return self._starting is not None and not self._starting.done()

    def _running(self) -> Dispatcher:
        if self._dispatcher is None:
            raise NotStarted
        return self._dispatcher

    def _admission_here(self) -> AdmissionController:
        if (admission := self._admission) is None or (self._starting is not None and not self._starting.done()):
            raise NotStarted
        if asyncio._get_running_loop() is not admission.loop:  # noqa: SLF001 - documented; None in a thread
            if (parent := self.forked_from) is not None:
                raise ForkedProcess(what="The supervisor", parent=parent)
            if self._closing is not None:
                raise SupervisorClosed(state="closed")
            raise WrongLoop(what="The supervisor", advice="use supervisor.portal() there")
        return admission

    def _dispatcher_here(self) -> Dispatcher:
        self._admission_here()
        return self._running()


def _tasks_to_map(task_type: Any, payloads: Iterable[Any] | None, options: TaskOptions) -> Iterable[Task]:
    """Return the tasks of a `map`: one for each payload, or those that it was given instead."""
    if payloads is not None:
        return (Task(task_type, payload, **options) for payload in payloads)
    if isinstance(task_type, str):
        raise TypeError(
            "supervisor.map() takes a task type and its payloads, or tasks, and was given no payloads:"
            f" map({task_type!r}, [...]), or map([Task({task_type!r}, ...), ...])"
        )
    if options:
        _reject_misplaced("map", options, passed="[Task(..., {name}=...), ...]")
    tasks: Iterable[Task] = task_type
    return tasks


def _reject_misplaced(call: str, arguments: Iterable[str], *, passed: str = "Task(..., {name}=...)") -> NoReturn:
    """Raise a TypeError that says where the fields of a task belong: to what is `passed`."""
    name = next(iter(arguments))
    is_field = name in Task.__struct_fields__
    advice = f"; it is a field of the task: {call}({passed.format(name=name)})" if is_field else ""
    raise TypeError(f"supervisor.{call}() takes no argument {name!r}{advice}")


def _check_wait(wait: float) -> None:
    check_not_negative("submit", "wait", wait, unit="seconds", infinite=True)
