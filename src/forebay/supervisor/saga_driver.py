"""The sagas that this supervisor drives: those that its tasks begin, and those that are left in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from forebay import clock, context
from forebay._text import as_clause, format_duration
from forebay.carried_context import capture_context, restore_context
from forebay.context import DetachedTask
from forebay.errors import (
    ForebayError,
    InvalidPayload,
    InvalidSaga,
    SagaCompensated,
    SagaParked,
    SagaTaken,
    StoreUnavailable,
    SupervisorClosed,
    UnknownTaskType,
)
from forebay.events import SagaChanged, log
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_envelope, decode_result, encode_task
from forebay.saga import SagaAdmin, records
from forebay.saga.held_saga import HeldSaga
from forebay.saga.records import LogDamaged, LogWrite, SagaHeader, SagaState, StoredSaga
from forebay.saga.run import SagaLeft, SagaRun
from forebay.supervisor.runs.run import Run
from forebay.supervisor.runs.slot_loans import take_slot_back
from forebay.task import Priority, Task, TaskStatus

if TYPE_CHECKING:
    from contextvars import Context

    from forebay.context import RunningTask
    from forebay.saga import Saga, SagaLog
    from forebay.supervisor.core import Core
    from forebay.supervisor.settings import SupervisorSettings
    from forebay.supervisor.ticket import Reclaim, Ticket

_MAX_RESUMED = 100  # sagas taken from the log that have not ended: more would wait for slots with a lease
_FORGET_BATCH = 1_000
_UNREADABLE = (LogDamaged, EnvelopeDamaged, EnvelopeTooNew, InvalidPayload)
_GIVEN_UP = (TaskStatus.TIMED_OUT, TaskStatus.EXPIRED, TaskStatus.FAILED)
_FIRST_POLL, _POLL = 0.05, 1.0  # seconds between two looks at a saga that another process drives: at first, at most


class _CutOff(NamedTuple):
    """A saga that ran out of time after its pivot.

    Attributes:
        times: how often in a row, without another entry.
        entries: how many entries it had.
        seconds: the time that it had.
    """

    times: int
    entries: int
    seconds: float


class _Taken(NamedTuple):
    """A saga that is to be driven here.

    Attributes:
        held: the saga.
        task: the task that began it, with its payload; it may have been submitted again since, with another one.
    """

    held: HeldSaga
    task: Task


class _Driven(NamedTuple):
    """A saga that is driven here.

    Attributes:
        held: the saga, under its lease.
        task: the task that began it.
        tenant_weight: of its tenant.
        run: the run that awaits it, and lends its slot to what its compensations submit; None if it goes back alone.
        end: done once it is not driven here any more.
    """

    held: HeldSaga
    task: Task
    tenant_weight: float
    run: Run | None
    end: asyncio.Future[None]


class SagaAdmission(Protocol):
    """The admission of the supervisor, as far as sagas need it."""

    def resume(self, task: Task, *, submitted_at: float, own: Context | None) -> Ticket:
        """Start or queue a task that goes on with what was admitted before."""

    def lend_slots(self, running: RunningTask | None, awaited: Ticket | None) -> Reclaim | None:
        """Lend the slot of `running` while it waits."""


class SagaDriver:
    """Drives sagas, keeps their leases, and takes those that are left in the log.

    Args:
        core: the objects that the parts of the supervisor share.
        admission: where sagas of the log are queued.
        log: where they are written.
        sagas: those that its workers run, by name; workers may be registered later.
        settings: of the supervisor.
        threads: where their plain functions run.

    Attributes:
        stops: True once no attempt at a compensation begins any more.
        leaves_waiting: True once a compensation that would have to wait is left to the next process.
        admin: the sagas of the log, for people.
    """

    def __init__(  # noqa: PLR0913 - the parts of the supervisor that it uses
        self,
        core: Core,
        admission: SagaAdmission,
        saga_log: SagaLog,
        sagas: Mapping[str, Saga],
        *,
        settings: SupervisorSettings,
        threads: Executor,
    ) -> None:
        self.threads: Executor | None = threads
        self.stops = self.leaves_waiting = False
        self.admin = SagaAdmin(saga_log, on_released=self.scan_soon)
        self._core = core
        self._admission = admission
        self._log = saga_log
        self._sagas = sagas
        self._settings = settings
        self._driven: dict[str, _Driven] = {}  # by saga id
        self._cut_off: dict[str, _CutOff] = {}  # those that were cut off after their pivot, and go on
        self._resumed: dict[str, tuple[HeldSaga, Ticket]] = {}  # taken from the log, and waiting; by saga id
        self._originals: dict[str, Task] = {}  # that began the sagas which others go on with, by the ids of these
        self._background: dict[asyncio.Future[Any], SagaRun] = {}  # with the saga that it brings to its end
        self._loops: list[asyncio.Future[None]] = []
        self._scan_now = asyncio.Event()

    # --- start and end ---

    async def open(self) -> None:
        """Open the log, and begin to look for sagas that were left in it.

        Raises:
            StoreUnavailable: it cannot be opened.
        """
        await self._log.open()

    def begin(self) -> None:
        """Begin to look for sagas that were left in the log, and to renew leases."""
        self._loops = [asyncio.ensure_future(self._keep_leases()), asyncio.ensure_future(self._keep_scanning())]

    def begin_drain(self) -> None:
        """Take no saga from the log any more."""
        self.leaves_waiting = self._log.durable

    def stop(self) -> None:
        """Begin nothing any more: neither a step nor an attempt at a compensation. What is left goes on elsewhere."""
        self.leaves_waiting = self.stops = True

    @property
    def is_compensating(self) -> bool:
        """True while sagas are compensated or brought to their end here, whether or not their task has ended.

        A saga does not count whose step does not end, though it was cancelled: a zombie.
        """
        oldest = clock.now() - self._settings.zombie_grace
        stopping = (run.stopping_since for run in self._background.values())
        return any(since is None or since > oldest for since in stopping)

    async def close(self) -> None:
        """Give back what is held and not driven, and close the log. What a compensation is doing is not cut off."""
        self.stop()
        for loop in self._loops:
            loop.cancel()
        for held, _ in self._resumed.values():
            await self._release(held)
        self._resumed.clear()
        await self._log.close()

    # --- a task ---

    async def run(self, saga: Saga, task: Task) -> Any:
        """Run a task whose handler is a saga: begin it, or go on with it, and return its result.

        Raises:
            SagaCompensated: it has failed, and was undone.
            SagaParked: it waits for a person.
            SagaTaken, StoreUnavailable: it goes on later.
        """
        run = context.running_task()
        assert isinstance(run, Run)  # noqa: S101 - only a supervisor calls this
        taken = await self._take(saga, task, run)
        if not isinstance(taken, _Taken):
            return taken[0]
        held, task = taken
        run.continue_submission(held.stored.header.submission)
        saga_id = held.saga_id
        saga_run = SagaRun(
            saga,
            task.payload,
            held,
            self,
            bound=self._settings.max_payload_bytes,
            is_cut_off=lambda: run.abandoned_at is not None,
            timeout=max(run.task.timeout or 0.0, run.worker.timeout),
        )
        self._hold(held, task, run.tenant_weight, run)
        try:
            result = await saga_run.drive()
        except BaseException as error:
            cut_off = run.abandoned_at is not None
            is_left = isinstance(error, KeyboardInterrupt | SagaLeft) or self._goes_on(run)
            ending = saga_run.leave() if is_left else saga_run.conclude(error, cut_off=cut_off)
            seconds = run.task.timeout or run.worker.timeout if cut_off and not is_left else None
            end = self._in_background(self._end(held, ending, seconds), saga_run)
            if cut_off or isinstance(error, KeyboardInterrupt):
                raise
            await asyncio.wait((end,))
            self._raise_outcome(held, end, error)
        self._drop(held)
        self._cut_off.pop(saga_id, None)
        return result

    def _goes_on(self, run: Run) -> bool:
        """Return whether the task of a run that was stopped is to run again, here or in the next process."""
        if run.abandoned_at is None:
            return False
        ticket = run.ticket
        if ticket.status is TaskStatus.CANCELLED:
            return self.stops  # its submitter has not given it up
        return not (ticket.status in _GIVEN_UP or ticket.awaits_retry)

    async def _end(self, held: HeldSaga, ending: Coroutine[Any, Any, None], cut_off_after: float | None = None) -> None:
        """Bring a saga to its end, and let others have it if it has none.

        Args:
            held: the saga.
            ending: brings it there.
            cut_off_after: seconds after which its time was up, if that is why it ends.
        """
        try:
            await ending
            if cut_off_after is not None and not held.ended:
                await self._count_cut_off(held, cut_off_after)
            else:
                self._cut_off.pop(held.saga_id, None)
        except (SagaLeft, SagaTaken, StoreUnavailable):
            raise
        except Exception:
            held.lose()  # it is taken again when its lease expires, and counted: released, it would be at once
            raise
        finally:
            self._drop(held)
            if not held.ended:
                await self._release(held)
                self._scan_now.set()

    async def _count_cut_off(self, held: HeldSaga, seconds: float) -> None:
        """Count that a saga ran out of time after its pivot; park it if it does so again and again without a step."""
        count = held.history.count
        before = self._cut_off.get(held.saga_id)
        times = 1 if before is None or before.entries != count else before.times + 1
        self._cut_off[held.saga_id] = _CutOff(times, count, seconds)
        if times > self._settings.max_attempts:
            after = format_duration(seconds)
            why = f"after its pivot it ran out of time {times} times in a row, the last time after {after}"
            await self._park(held, why)
            del self._cut_off[held.saga_id]

    def _raise_outcome(self, held: HeldSaga, end: asyncio.Future[None], error: BaseException) -> None:
        """Raise what became of a saga whose function raised `error`."""
        history = held.history
        if not end.cancelled() and isinstance(end.exception(), SagaTaken | StoreUnavailable):
            raise end.exception() or error
        if history.state is SagaState.COMPENSATED:
            raise SagaCompensated(saga_id=held.saga_id, error=history.error) from error
        if history.state is SagaState.PARKED:
            raise SagaParked(saga_id=held.saga_id, why=history.why) from error
        raise error

    async def _take(self, saga: Saga, task: Task, run: Run) -> _Taken | tuple[Any]:
        """Return the saga of a task, to be driven; or, in a tuple, the result that it has already.

        Raises:
            InvalidSaga: the log has another saga under that id.
            SagaCompensated, SagaParked: that is its outcome.
        """
        task = self._originals.get(task.task_id, task)
        saga_id = task.key or task.task_id
        header = SagaHeader(
            saga_id=saga_id,
            name=saga.name,
            version=saga.version,
            envelope=self._encode(task),
            submission=run.submission,
        )
        poll, waited, holder = _FIRST_POLL, False, ""  # the fence of another process that has the saga
        was_lost = run.attempt > 1 and run.ticket.retries is None  # the attempt before has not failed
        while True:
            if waited or was_lost:
                await self._check_undone_meanwhile(header, by_others=waited, by_own=was_lost)
            if (taken := self._take_resumed(saga, saga_id, run)) is not None:  # before this began, or while it waited
                return taken
            if (driven := self._driven.get(saga_id)) is not None:
                await self._wait_without_slot(run, driven.end)
                waited = True
                continue
            now = clock.wall_time()
            stored, is_held = await self._begin(saga, header, now)
            if not is_held:
                if (outcome := self._outcome(stored)) is not None:
                    return outcome
                _log_wait(task, stored, now, known=holder)
                holder, waited = stored.holder, True
                await asyncio.sleep(min(max(stored.until - now, _FIRST_POLL), poll))
                poll = min(2 * poll, _POLL)
                continue
            held = self._hold_stored(stored)
            if stored.header.envelope != header.envelope:  # begun by another submission, which may differ
                task = await self._load_or_park(stored)
            if stored.header.state is not SagaState.COMPENSATING:
                if await self._check(saga, held):
                    return _Taken(held, task)
                raise SagaParked(saga_id=saga_id, why=held.history.why)
            await self._go_back(saga, held, task, run)
            raise SagaCompensated(saga_id=saga_id, error=held.history.error)

    async def _wait_without_slot(self, run: Run, end: asyncio.Future[None]) -> None:
        """Wait until a saga has ended that is driven here, whose compensations may need the slot of `run`."""
        reclaim = self._admission.lend_slots(run, None)
        try:
            await asyncio.wait((end,))
        finally:
            if reclaim is not None:
                await reclaim()

    async def _check_undone_meanwhile(self, header: SagaHeader, *, by_others: bool, by_own: bool) -> None:
        """Raise SagaCompensated if this submission does not begin a new round of a saga that was undone.

        Args:
            header: of the saga, with this submission.
            by_others: whether it has waited for the saga, and joined the submission that had begun it.
            by_own: whether it has begun it itself, and its process was lost before it could have the outcome.
        """
        stored = await self._log.get(header.saga_id)
        if stored is None or stored.header.state is not SagaState.COMPENSATED:
            return
        if by_own if stored.header.submission == header.submission else by_others:
            raise SagaCompensated(saga_id=header.saga_id, error=stored.header.why)

    def _take_resumed(self, saga: Saga, saga_id: str, run: Run) -> _Taken | None:
        """Return a saga that was taken from the log, and waits for its turn."""
        if (resumed := self._resumed.get(saga_id)) is None:
            return None
        held, ticket = resumed
        _check_name(saga, held.stored)
        del self._resumed[saga_id]
        taken = _Taken(held, self._originals[ticket.task_id])
        if ticket is not run.ticket:
            ticket.cancel("its saga goes on under its own task")
        return taken

    async def _begin(self, saga: Saga, header: SagaHeader, now: float) -> tuple[StoredSaga, bool]:
        """Begin a saga, or take it; return it, and whether it is held here now."""
        restart = records.encode_entry(records.RestartedEntry(at=now))
        fence, until = clock.new_id(), now + self._settings.lease
        stored = await self._log.begin(header, restart, fence=fence, until=until, now=now)
        is_held = stored.holder == fence
        try:
            _check_name(saga, stored)
        except InvalidSaga:
            if is_held:
                await self._log.release(header.saga_id, fence=fence)
            raise
        return stored, is_held

    def _outcome(self, stored: StoredSaga) -> tuple[Any] | None:
        """Return the result of a saga that is DONE, in a tuple; None if another process drives it.

        Raises:
            SagaParked: it waits for a person.
        """
        saga_id, state = stored.header.saga_id, stored.header.state
        if state is SagaState.PARKED:
            raise SagaParked(saga_id=saga_id, why=stored.header.why)
        if state is not SagaState.DONE:
            return None
        result = records.SagaHistory(saga_id, records.decode_entries(saga_id, stored.entries)).result
        return (None if result is None else decode_result(result),)

    def _encode(self, task: Task) -> bytes:
        payload = self._core.codecs.dump_payload(task)
        if task.retry is not None:
            task = msgspec.structs.replace(task, retry=None)  # each submission has its own
        return encode_task(task, payload, bound=self._settings.max_payload_bytes, context=capture_context())

    async def _check(self, saga: Saga, held: HeldSaga) -> bool:
        """Park a saga that is not to be driven by this code, or that loses its process again and again."""
        header = held.stored.header
        if header.claims > self._settings.max_attempts:
            unknown = [step.name for step in held.history.unknown]
            during = f", during step {unknown[0]!r}" if unknown else ""
            why = f"its process was lost {header.claims} times in a row{during}"
        elif header.version != saga.version:
            why = (
                f"it began under version {header.version!r} of its code, and this is version {saga.version!r}:"
                " let the old code finish it, or close it by hand"
            )
        else:
            return True
        await self._park(held, why)
        return False

    @staticmethod
    async def _park(held: HeldSaga, why: str) -> None:
        await held.write(records.ParkedEntry(at=clock.wall_time(), why=why))
        log.error("saga %r is parked: %s", held.saga_id, why)

    # --- what is left in the log ---

    def scan_soon(self) -> None:
        """Look for sagas that were left in the log, or that a person lets go on."""
        self._scan_now.set()

    async def _keep_scanning(self) -> None:
        interval = self._settings.lease / 3
        while not self.leaves_waiting:
            self._scan_now.clear()
            try:
                await self._scan()
            except Exception as error:  # noqa: BLE001 - what fails once must not end the scans
                self._core.failures.report("unfinished sagas could not be read from the log", error=error)
            try:
                async with asyncio.timeout(interval * (0.9 + 0.2 * clock.draw())):
                    await self._scan_now.wait()
            except TimeoutError:
                continue

    async def _scan(self) -> None:
        # The loop may have stood still for longer than a lease. What is held here is renewed first, so that it has not
        # expired at this time, however long that takes.
        now = clock.wall_time()
        await self._renew_held()
        room = _MAX_RESUMED - len(self._resumed) - len(self._background)
        names = list(self._sagas)
        if room > 0 and names:
            claimed = await self._log.claim(
                names, limit=room, fence=clock.new_id(), until=clock.wall_time() + self._settings.lease, now=now
            )
            for stored in claimed:
                try:
                    if stored.header.saga_id in self._driven:
                        await self._give_up_lapsed(stored)
                    else:
                        await self._resume(stored)
                except Exception as error:  # noqa: BLE001 - its lease expires, and the others go on
                    self._core.failures.report(
                        "saga %r could not be taken from the log", stored.header.saga_id, error=error
                    )
        await self._log.forget(before=now - self._settings.result_retention, limit=_FORGET_BATCH)

    async def _give_up_lapsed(self, stored: StoredSaga) -> None:
        """Give a saga back that is still driven here, under a lease that has lapsed: there is one driver at a time."""
        saga_id = stored.header.saga_id
        if (driven := self._driven.get(saga_id)) is not None:
            driven.held.lose()
        await self._log.release(saga_id, fence=stored.holder)

    async def _resume(self, stored: StoredSaga) -> None:
        """Go on with a saga that was left in the log."""
        header = stored.header
        saga = self._sagas.get(header.name)
        if saga is None:  # its worker was unregistered meanwhile
            await self._log.release(header.saga_id, fence=stored.holder)
            return
        try:
            held = self._hold_stored(stored)
            task, carried = self._load(stored)
        except _UNREADABLE as error:
            await self._park_unreadable(stored, error)
            return
        if not await self._check(saga, held):
            return
        if self.leaves_waiting:
            await self._release(held)
        elif held.history.goes_back:
            self._core.run_in_background(self._go_back_alone(saga, held, task))
        else:
            own = None
            if carried is not None:
                own = self._core.base_context.copy()
                own.run(restore_context, carried)
            await self._queue(held, task, own)

    def _load(self, stored: StoredSaga) -> tuple[Task, Mapping[str, Any] | None]:
        """Return the task that began a saga, and the context that its submitter had."""
        task, carried = decode_envelope(stored.header.envelope)
        return self._core.codecs.load_payload(task), carried

    async def _load_or_park(self, stored: StoredSaga) -> Task:
        """Return the task that began a saga.

        Raises:
            SagaParked: it cannot be read.
        """
        try:
            return self._load(stored)[0]
        except _UNREADABLE as error:
            why = await self._park_unreadable(stored, error)
            raise SagaParked(saga_id=stored.header.saga_id, why=why) from error

    async def _park_unreadable(self, stored: StoredSaga, error: ForebayError) -> str:
        why = f"it cannot be read: {as_clause(str(error))}"
        parked = records.encode_entry(records.ParkedEntry(at=clock.wall_time(), why=why))
        write = LogWrite(len(stored.entries), [parked], SagaState.PARKED, why)
        if await self._log.append(stored.header.saga_id, write, fence=stored.holder, now=clock.wall_time()):
            log.error("saga %r is parked: %s", stored.header.saga_id, why)
        return why

    async def _queue(self, held: HeldSaga, task: Task, own: Context | None) -> None:
        """Queue the task of a saga, ahead of what has not begun."""
        cut_off = self._cut_off.get(held.saga_id)
        again = msgspec.structs.replace(
            task,
            timeout=task.timeout if cut_off is None else 2 * cut_off.seconds,
            task_id=f"{task.task_id}/resumed-{clock.new_id()}",
            priority=min(task.priority, Priority.HIGH),
            key=None,
            deadline=None,
            durable=False,
            spill=False,
            not_before=None,
        )
        try:
            ticket = self._admission.resume(again, submitted_at=held.stored.header.submission, own=own)
        except (SupervisorClosed, UnknownTaskType):
            await self._release(held)
            return
        log.info("saga %r goes on", held.saga_id)
        self._resumed[held.saga_id] = (held, ticket)
        self._originals[again.task_id] = task
        self._core.run_in_background(self._watch(held, ticket))

    async def _watch(self, held: HeldSaga, ticket: Ticket) -> None:
        """Give a saga back whose task has ended before it had begun."""
        await ticket
        del self._originals[ticket.task_id]
        if self._resumed.get(held.saga_id, (None, None))[1] is ticket:
            del self._resumed[held.saga_id]
            await self._release(held)

    async def _go_back_alone(self, saga: Saga, held: HeldSaga, task: Task) -> None:
        """Go on with the compensations of a saga of the log; its log has what becomes of it."""
        with suppress(SagaParked, SagaTaken, StoreUnavailable):
            await self._go_back(saga, held, task)

    async def _go_back(self, saga: Saga, held: HeldSaga, task: Task, awaiting: Run | None = None) -> None:
        """Go on with the compensations of a saga, which the run `awaiting` awaits."""
        self._hold(held, task, self._core.tenants.weight(task.tenant), awaiting)
        run = SagaRun(saga, task.payload, held, self, bound=self._settings.max_payload_bytes)
        end = self._in_background(self._end(held, run.go_back()), run)
        await asyncio.wait((end,))
        self._raise_unless_compensated(held, end)

    def _raise_unless_compensated(self, held: HeldSaga, end: asyncio.Future[None]) -> None:
        if end.cancelled() or end.exception() is not None or held.history.state is not SagaState.COMPENSATED:
            left = StoreUnavailable(
                where=f"saga {held.saga_id!r}", why="its supervisor stops", advice="The next process goes on with it."
            )
            self._raise_outcome(held, end, left)

    async def _release(self, held: HeldSaga) -> None:
        try:
            await held.release()
        except (SagaTaken, StoreUnavailable) as error:
            log.debug("saga %r is released when its lease expires: %s", held.saga_id, error)

    # --- what is driven ---

    def _hold_stored(self, stored: StoredSaga) -> HeldSaga:
        """Return a saga that was taken from the log.

        Raises:
            LogDamaged: it cannot be read.
        """
        return HeldSaga(self._log, stored, lease=self._settings.lease, on_state=self._report)

    def _report(self, held: HeldSaga) -> None:
        """Report a state of a saga that the log has now."""
        bus, history = self._core.bus, held.history
        if bus.active:
            changed = SagaChanged(
                at=self._core.loop.time(),
                saga_id=held.saga_id,
                saga=held.stored.header.name,
                state=history.state.value,
                why=history.why or history.error,
            )
            bus.emit(changed)

    def _hold(self, held: HeldSaga, task: Task, weight: float, run: Run | None) -> None:
        saga_id, end = held.saga_id, None
        if (resumed := self._resumed.get(saga_id)) is not None and resumed[0] is not held:
            resumed[0].lose()
        if (earlier := self._driven.get(saga_id)) is not None:  # both were taken while neither was driven yet
            end = earlier.end
            if earlier.held is not held:
                earlier.held.lose()
        self._driven[saga_id] = _Driven(held, task, weight, run, end or self._core.loop.create_future())

    def _drop(self, held: HeldSaga) -> None:
        driven = self._driven.get(held.saga_id)
        if driven is None or driven.held is not held:
            return  # it was taken again since
        del self._driven[held.saga_id]
        driven.end.set_result(None)

    def detached_task(self, saga_id: str) -> RunningTask | None:
        """Return the running task of the compensations of a saga that it drives."""
        driven = self._driven[saga_id]
        return DetachedTask(
            driven.task,
            submission=driven.held.stored.header.submission,
            tenant_weight=driven.tenant_weight,
            awaited_by=driven.run,
        )

    async def take_slot_back(self, saga_id: str) -> None:
        """Wait until the run of a saga has its slot again, which it has lent to what its compensations submitted."""
        driven = self._driven.get(saga_id)
        if driven is not None and driven.run is not None:
            await take_slot_back(driven.run)

    async def _keep_leases(self) -> None:
        interval = self._settings.lease / 3
        while True:
            await asyncio.sleep(interval)
            try:
                await self._renew_held()
            except Exception as error:  # noqa: BLE001 - what fails once must not end the renewals
                self._core.failures.report("leases on sagas could not be renewed", error=error)

    async def _renew_held(self) -> None:
        """Renew the leases on the sagas that are held here."""
        waiting = {saga_id: held for saga_id, (held, _) in self._resumed.items()}
        every = waiting | {saga_id: driven.held for saga_id, driven in self._driven.items()}
        held = {saga_id: each for saga_id, each in every.items() if not each.ended}
        until = clock.now() + self._settings.lease
        lost = set(await self._renew(held.values()))
        for saga_id, each in held.items():
            if saga_id not in lost:
                each.extended(until)
            elif not each.ended:
                log.warning("saga %r was taken by another process", saga_id)
                each.lose()

    async def _renew(self, held: Iterable[HeldSaga]) -> Iterable[str]:
        fences = {each.saga_id: each.fence for each in held}
        if not fences:
            return ()
        return await self._log.renew(fences, until=clock.wall_time() + self._settings.lease)

    def _in_background(self, work: Coroutine[Any, Any, None], run: SagaRun) -> asyncio.Future[None]:
        """Await `work`, which brings a saga to its end, whatever becomes of the caller; draining waits for it."""
        future = asyncio.ensure_future(work)
        self._background[future] = run
        future.add_done_callback(self._background_ended)
        notify = self._core.registry.notify_progress  # once it may have become a zombie
        self._core.loop.call_later(self._settings.zombie_grace + 0.1, notify)
        return future

    def _background_ended(self, future: asyncio.Future[None]) -> None:
        del self._background[future]
        self._core.registry.notify_progress()
        if not future.cancelled() and (error := future.exception()) is not None:
            if isinstance(error, SagaTaken | SagaLeft | StoreUnavailable):
                log.debug("a saga is left as it is: %s", error)
            else:
                self._core.failures.report("a saga could not be brought to its end", error=error)


def _log_wait(task: Task, stored: StoredSaga, now: float, *, known: str) -> None:
    """Log that a task waits for the holder of its saga, once for each: `known` is the one that was logged before."""
    if stored.holder == known:
        return
    log.info(
        "task %r waits: another process drives its saga %r, under a lease that ends in %s unless it is renewed",
        task.task_id,
        stored.header.saga_id,
        format_duration(max(0.0, stored.until - now)),
    )


def _check_name(saga: Saga, stored: StoredSaga) -> None:
    """Check that a saga of the log is one of `saga`: to drive another one would call the wrong function.

    Raises:
        InvalidSaga: it is not.
    """
    header = stored.header
    if header.name != saga.name:
        why = f"its log has {header.saga_id!r} as a saga of the name {header.name!r}: give its task another key"
        raise InvalidSaga(name=saga.name, why=why)
