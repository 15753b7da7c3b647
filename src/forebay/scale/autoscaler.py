"""The loop of an autoscaler: it reads, decides, and asks its target."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, Self, TypeVar

import msgspec

from forebay import clock
from forebay._cancellation import is_being_cancelled
from forebay._json import JsonStruct
from forebay._validate import check_positive, reject
from forebay.errors import ScalingFailed
from forebay.events import Event, Scaled, log
from forebay.interfaces import Demand
from forebay.retry import Retry
from forebay.scale.decision import ScaleDecider, ScaleDecision, ScalePolicy, slots_asked
from forebay.scale.target import Replicas, Target
from forebay.scale.unserved import UnservedTasks
from forebay.scale.worker_target import WorkerTarget

T = TypeVar("T")

_OWNER: Final = "Autoscaler"
_CALL_TIMEOUT: Final = 30.0  # seconds that one call of a target, or one reading, may take
_BACKOFF: Final = Retry(base_delay=1.0, max_delay=60.0)


class ScalableSupervisor(Protocol):
    """The supervisor, as far as an autoscaler needs it; for a `WorkerTarget`, with its `workers` by name."""

    async def demand(self, task_types: Sequence[str]) -> Demand:
        """Return the slots that the tasks of some types ask for now."""

    def emit(self, event: Event) -> None:
        """Deliver an event to whoever receives those of the supervisor."""


class Leader(Protocol):
    """A lease that one process holds at a time, such as `forebay.scale.LeaderLease`."""

    @property
    def leads_until(self) -> float:
        """Loop time until which this process leads; in the past if it does not."""

    async def open(self) -> None:
        """Begin to compete for the lease."""

    async def close(self) -> None:
        """Give it back."""


class AutoscalerStatistics(JsonStruct, frozen=True, kw_only=True):
    """An autoscaler at one moment.

    Attributes:
        current: replicas that its target has been asked for, as the target says.
        desired: replicas that it decided for.
        ready: those of them that take tasks.
        wanted: replicas that the slots asked for need, whatever is short.
        asked: slots that the tasks ask for, averaged.
        load: these over the slots of the replicas; infinity without a replica, unless nothing is asked for.
        panic: whether the short window counts.
        limited_by: what is short instead of workers; None if nothing is.
        leads: whether it acts; False while another autoscaler of the target does, and then the rest is older.
        scaled_up, scaled_down: how often.
        reversals: how often one followed the other.
        failures: readings and calls of the target that failed.
        replica_seconds: replicas that were asked for, times the seconds for which they were.
        unbought_seconds: the same of those that were wanted, and not asked for because something else was short.
    """

    current: int = 0
    desired: int = 0
    ready: int = 0
    wanted: int = 0
    asked: float = 0.0
    load: float = 0.0
    panic: bool = False
    limited_by: str | None = None
    leads: bool = True
    scaled_up: int = 0
    scaled_down: int = 0
    reversals: int = 0
    failures: int = 0
    replica_seconds: float = 0.0
    unbought_seconds: float = 0.0


class Autoscaler:
    """Adds replicas of workers while workers are the bottleneck, and removes them again. An async context manager.

    It goes by the slots that tasks ask for, not by CPU: an agent that waits for a model uses none. See
    `forebay.scale.slots_asked` and `forebay.scale.ScaleDecider`. Enter it after the supervisor. Leaving it closes the
    target.

    Args:
        supervisor: a `BackpressureSupervisor` that runs: it knows what waits, in its queue and in the overflow.
        target: what is made larger and smaller.
        task_types: the types whose tasks the replicas take.
        seats: slots of one replica.
        load: share of the slots that should be taken.
        minimum: the least replicas; 0 to have none while nothing is to be done. A worker has at least one slot more
            than it reserves.
        maximum: the most.
        interval: seconds between two readings.
        window: seconds over which the slots asked for are averaged.
        panic_window: the same while twice as many replicas are wanted as are ready.
        stabilization: seconds for which fewer replicas must have been enough before any is removed.
        drain: seconds within which tasks that wait should have begun; None for half of the window.
        tolerance: share by which the load may differ from `load` without a change.
        service: seconds for which a task holds a slot, until that is measured; None if it is not known.
        leader: of several autoscalers of one target, the one whose lease this is acts; None if there is no other.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    def __init__(  # noqa: PLR0913 - every property has a name
        self,
        supervisor: ScalableSupervisor,
        target: Target,
        *,
        task_types: Sequence[str],
        seats: int = 1,
        load: float = 0.7,
        minimum: int = 1,
        maximum: int,
        interval: float = 2.0,
        window: float = 60.0,
        panic_window: float = 6.0,
        stabilization: float = 300.0,
        drain: float | None = None,
        tolerance: float = 0.1,
        service: float | None = None,
        leader: Leader | None = None,
    ) -> None:
        self._policy = ScalePolicy(
            seats=seats,
            load=load,
            minimum=minimum,
            maximum=maximum,
            window=window,
            panic_window=panic_window,
            stabilization=stabilization,
            drain=drain,
            tolerance=tolerance,
        )
        check_positive(_OWNER, "interval", interval, unit="seconds")
        check_positive(_OWNER, "service", service, unit="seconds", none="if it is not known")
        if isinstance(task_types, str) or not task_types or not all(isinstance(each, str) for each in task_types):
            reject(_OWNER, "task_types", task_types, 'a list of task types, such as ["write"]')
        _check_target(target)
        if isinstance(target, WorkerTarget):
            if maximum < target.least:
                reject(_OWNER, "maximum", maximum, f"at least one more than {target.name} reserves, {target.least}")
            self._policy = replace(self._policy, minimum=max(minimum, target.least))
        if not target.outside and seats != 1:
            reject(_OWNER, "seats", seats, f"1, because a replica of {target.name} is one slot")
        if not target.outside and minimum < 1:
            reject(_OWNER, "minimum", minimum, f"at least 1, because {target.name} keeps one slot")
        self._supervisor = supervisor
        self._target = target
        self._task_types = tuple(dict.fromkeys(task_types))  # one that is named twice counts once
        self._interval = interval
        self._service = service
        self._leader = leader
        self._decider = ScaleDecider(self._policy)
        self._unserved = UnservedTasks(self._policy.window)
        self._running: asyncio.Task[None] | None = None
        self._statistics = AutoscalerStatistics()
        self._measured: float | None = None  # seconds of a task, as the replicas told last: there may be none by now
        self._check_worker()
        self._refused: tuple[float, int] | None = None  # loop time of a reading, and what it counted
        self._read_at: float | None = None
        self._asked: tuple[int, int] | None = None  # replicas that there were, and that were asked for, last
        self._direction = 0
        self._failed_readings = 0  # in a row
        self._failed_calls = 0  # of `scale`, in a row
        self._failed_at: tuple[int, float] | None = None  # replicas it failed at, and when they are asked for again

    async def __aenter__(self) -> Self:
        """Open the target, take a first reading, and begin.

        Raises:
            InvalidSetting: the replicas take tasks from an overflow, and the supervisor has none; or the worker whose
                slots they are has left it.
            ScalingFailed: the target does not open, or the supervisor does not answer, within 30 seconds.
            Others: what the target raises when it is opened, and what the supervisor raises.
        """
        if self._running is not None:
            raise RuntimeError("an Autoscaler can be entered once at a time")
        self._check_worker()
        await self._within("the demand of its tasks", self._read)
        try:
            await self._within("open()", self._target.open)
            if self._leader is not None:
                await self._leader.open()
        except BaseException:
            await self._close_target()
            raise
        self._begin()
        self._running = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        running, self._running = self._running, None
        try:
            if running is not None:
                running.cancel()
                await asyncio.wait((running,))
            if self._leader is not None:
                await self._leader.close()  # the next one need not wait for the target
        finally:
            await self._close_target()

    async def _close_target(self) -> None:
        """Close the target. What it raises is logged: an error of the caller is not to be hidden by it."""
        try:
            await self._target.close()
        except Exception as error:  # noqa: BLE001 - of the target
            log.warning("%s could not be closed (%s: %s)", self._target.name, type(error).__name__, error)

    def statistics(self) -> AutoscalerStatistics:
        """Return a snapshot of the last reading and of the counters since the start."""
        return self._statistics

    # --- the loop ---

    async def _run(self) -> None:
        delay = 0.0
        while not is_being_cancelled():  # a call may have swallowed it
            await asyncio.sleep(delay)
            delay = await self._step()

    def _begin(self) -> None:
        """Forget what was read: the first reading begins the windows."""
        self._decider = ScaleDecider(self._policy)
        self._refused = self._read_at = self._asked = self._failed_at = None
        self._unserved = UnservedTasks(self._policy.window)

    def _was_away(self, now: float) -> bool:
        """Return whether nothing was read for so long that the windows tell nothing of what is asked for."""
        return self._read_at is not None and now - self._read_at > max(self._policy.window, 2 * self._interval)

    @property
    def _leads_until(self) -> float:
        return math.inf if self._leader is None else self._leader.leads_until

    def _leads(self, now: float) -> bool:
        return now < self._leads_until

    async def _step(self) -> float:
        """Read, decide and scale; return the seconds until the next time. A failure is logged, and tried again."""
        now = asyncio.get_running_loop().time()
        if not self._leads(now):
            return self._follow()
        try:
            self._check_worker()
            replicas = await self._within("replicas()", self._target.replicas)
            demand = await self._within("the demand of its tasks", self._read)
            now = asyncio.get_running_loop().time()
            if not self._leads(now):
                return self._follow()
            if self._was_away(now):
                self._decider = ScaleDecider(self._policy)  # as a new leader, which removes nothing by its first look
            decision = self._decide(now, demand, replicas)
            self._count_time(now, replicas, decision)
        except Exception as error:  # noqa: BLE001 - of the target or the store: the next time it may succeed
            self._failed_readings += 1
            return self._failure(error, self._failed_readings)
        self._failed_readings = 0
        await self._scale(now, replicas, decision)
        return self._interval

    def _follow(self) -> float:
        """Do nothing, since another one leads; return the seconds until the next look."""
        self._begin()
        self._update(leads=False)
        return self._interval

    async def _scale(self, now: float, replicas: Replicas, decision: ScaleDecision) -> None:
        """Ask the target for other replicas. After a failure it reads on, and asks again later, or at once for more."""
        before, after = replicas.current, decision.replicas
        if after == before:
            self._asked = self._failed_at = None
            self._failed_calls = 0
            return
        if self._failed_at is not None:
            number, again_at = self._failed_at
            if now < again_at and after <= max(before, number):
                return
        try:
            await self._within(f"scale({after})", self._target.scale, after, leading=True)
        except Exception as error:  # noqa: BLE001 - of the target
            self._failed_calls += 1
            self._failed_at = after, now + self._failure(error, self._failed_calls)
            return
        self._failed_at, self._failed_calls = None, 0
        if self._asked != (before, after):  # else it does not follow
            self._scaled(now, replicas, decision)
        self._asked = before, after

    async def _within(
        self, what: str, call: Callable[..., Awaitable[T]], *arguments: object, leading: bool = False
    ) -> T:
        """Return the answer of a call, which is cancelled when it takes too long.

        Args:
            what: it does, in errors.
            call: it.
            arguments: of it.
            leading: it is cancelled at the end of the lease, too, unless that is renewed meanwhile.

        Raises:
            ScalingFailed: it was cancelled, by this or by itself; or the lease is over.
            Others: what it raises.
        """
        loop, what = asyncio.get_running_loop(), f"{self._target.name}: {what}"
        if leading and not self._leads(loop.time()):
            raise ScalingFailed(what=what, why="the lease has ended")
        try:
            async with asyncio.timeout(_CALL_TIMEOUT) as limit:
                with self._ended_with_lease(limit) if leading else contextlib.nullcontext():
                    return await call(*arguments)
        except TimeoutError as error:
            if not limit.expired():
                raise
            late = leading and not self._leads(loop.time())
            when = "by the end of the lease" if late else f"within {_CALL_TIMEOUT:g} s"
            raise ScalingFailed(what=what, why=f"it did not answer {when}") from error
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                raise
            raise ScalingFailed(what=what, why="it was cancelled by itself") from error

    @contextlib.contextmanager
    def _ended_with_lease(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Let a time limit be over when the lease ends, as it has been renewed by then."""
        loop = asyncio.get_running_loop()
        watching: asyncio.TimerHandle | None = None

        def watch() -> None:
            nonlocal watching
            if self._leads(loop.time()):
                watching = loop.call_at(self._leads_until, watch)
            elif (end := limit.when()) is not None and end > loop.time():
                limit.reschedule(loop.time())

        if self._leader is not None:
            watching = loop.call_at(self._leads_until, watch)
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()

    async def _read(self) -> Demand:
        demand = await self._supervisor.demand(self._task_types)
        if self._target.outside and demand.elsewhere is None:
            where = f"the replicas of {self._target.name} take tasks from there"
            expected = f"one with an overflow that other processes can use: {where}"
            reject(_OWNER, "supervisor", "a supervisor without one", expected)
        return demand

    def _decide(self, now: float, demand: Demand, replicas: Replicas) -> ScaleDecision:
        refused, outside = self._refused_per_second(now, demand.refused), self._target.outside
        if replicas.service is not None:
            self._measured = replicas.service
        known = (self._measured, demand.service) if outside else (demand.service, self._measured)
        service = next((seconds for seconds in known if seconds is not None), self._service)
        asked = slots_asked(
            demand,
            refused_per_second=refused,
            service=service,
            drain=self._policy.drain_target,
            outside=outside,
        )
        if not outside:  # the other workers of these types have slots of their own
            asked = max(0.0, asked - self._policy.load * max(0, demand.slots - replicas.ready))
        elif self._unserved.observe(now, demand, replicas):
            log.warning(
                "%s: %d replicas are ready, and have taken none of the %d tasks that wait in the overflow for %g s: do "
                "they use this overflow, and have workers for %s?",
                self._target.name, replicas.ready, demand.spilled, self._policy.window, ", ".join(self._task_types),
            )  # fmt: skip
        return self._decider.decide(
            now,
            asked=asked,
            current=replicas.current,
            ready=replicas.ready,
            limited_by=self._bottleneck(demand, replicas),
            double=service is None,
        )

    def _bottleneck(self, demand: Demand, replicas: Replicas) -> str | None:
        """Return what the replicas are short of. Those outside have their own workers and accounts, so they tell."""
        if self._target.outside and replicas.ready:
            return replicas.limited_by
        limited_by = replicas.limited_by or demand.limited_by
        if limited_by is None and not self._target.outside and demand.host >= 1.0:
            limited_by = "host"  # more slots on a loop that does not keep up would slow down all of them
        return limited_by

    def _check_worker(self) -> None:
        if isinstance(self._target, WorkerTarget):
            self._target.check(getattr(self._supervisor, "workers", {}), self._task_types)

    def _refused_per_second(self, now: float, refused: int) -> float:
        before, self._refused = self._refused, (now, refused)
        if before is None or now <= before[0]:
            return 0.0
        return max(0, refused - before[1]) / (now - before[0])

    # --- counting ---

    def _count_time(self, now: float, replicas: Replicas, decision: ScaleDecision) -> None:
        counted = self._statistics
        seconds = 0.0 if self._read_at is None else now - self._read_at
        self._read_at = now
        slots = replicas.current * self._policy.seats
        self._update(
            current=replicas.current,
            desired=decision.replicas,
            ready=replicas.ready,
            wanted=decision.wanted,
            asked=decision.asked,
            load=decision.asked / slots if slots else math.inf if decision.asked else 0.0,
            panic=decision.panic,
            limited_by=decision.limited_by,
            leads=True,
            replica_seconds=counted.replica_seconds + seconds * replicas.current,  # which it has since the last reading
            unbought_seconds=counted.unbought_seconds
            + (seconds * max(0, counted.wanted - replicas.current) if counted.limited_by is not None else 0.0),
        )

    def _scaled(self, now: float, before: Replicas, decision: ScaleDecision) -> None:
        """Count and report what the target was asked for."""
        counted, up = self._statistics, decision.replicas > before.current
        direction = 1 if up else -1
        self._update(
            current=decision.replicas,
            scaled_up=counted.scaled_up + up,
            scaled_down=counted.scaled_down + (not up),
            reversals=counted.reversals + (self._direction == -direction),
        )
        self._direction = direction
        event = Scaled(
            at=now,
            target=self._target.name,
            before=before.current,
            after=decision.replicas,
            asked=decision.asked,
            panic=decision.panic,
            limited_by=decision.limited_by,
        )
        self._supervisor.emit(event)

    def _failure(self, error: Exception, in_a_row: int) -> float:
        """Log a failure; return the seconds until the next attempt."""
        self._update(failures=self._statistics.failures + 1)
        delay = max(self._interval, _BACKOFF.delay(in_a_row, draw=clock.draw()) or 0.0)
        log.warning(
            "scaling %s failed (%s: %s): the number of replicas stays as it is; tried again in %.1f s",
            self._target.name, type(error).__name__, error, delay,
            exc_info=error if in_a_row == 1 else None,
        )  # fmt: skip
        return delay

    def _update(self, **changes: Any) -> None:
        self._statistics = msgspec.structs.replace(self._statistics, **changes)


def _check_target(target: object) -> None:
    methods = ("open", "close", "replicas", "scale")
    if isinstance(target, type) or not all(callable(getattr(target, method, None)) for method in methods):
        reject(_OWNER, "target", target, "a target, such as WorkerTarget(worker)")
    if not isinstance(getattr(target, "name", None), str) or not isinstance(getattr(target, "outside", None), bool):
        reject(_OWNER, "target", target, "a target with a `name`, and with `outside` True or False")
