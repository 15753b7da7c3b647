"""SagaRun: one saga while it is driven, forwards by its function and backwards by its compensations."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from forebay import clock, context
from forebay._cancellation import is_being_cancelled
from forebay._hooks import call_hook, is_async, is_interrupt, raise_again_if_interrupt, raise_if_cancelled
from forebay._text import as_clause, error_text, format_duration
from forebay._validate import is_number
from forebay.errors import (
    InvalidStep,
    NotSerializable,
    Overloaded,
    PayloadTooLarge,
    SagaTaken,
    StepFailed,
    StoreUnavailable,
    WrongLoop,
)
from forebay.events import log
from forebay.interfaces import TypeMismatch
from forebay.overflow import decode_result, encode_result
from forebay.retry import Retry, RetryState
from forebay.saga import records
from forebay.saga.records import StepRecord, StepState
from forebay.saga.step import (
    Done,
    NotEncodable,
    NothingDone,
    Raised,
    Step,
    call,
    is_ambiguous,
    outcome_of,
    step_of,
)
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.context import RunningTask
    from forebay.saga.held_saga import HeldSaga

_REPLAY_WAIT = 60.0  # seconds in which the function of a saga asks for another of the steps that the log has
_ALONE_WAIT = 1.0  # the same, where nothing in its log or in progress says that it has parallel branches
_CHECK_RETRY = Retry(max_attempts=5, base_delay=0.2, max_delay=5.0)
_PAST_PIVOT = Retry(max_attempts=10, base_delay=0.5, max_delay=30.0, max_total_delay=600.0)
_UNKNOWN = Retry(max_attempts=5, base_delay=0.5, max_delay=10.0)  # of an idempotent step without an answer
# The saga and the step in whose function the caller is.
_inside: contextvars.ContextVar[tuple[SagaRun, str] | None] = contextvars.ContextVar("forebay_saga_step", default=None)
_SLOW = 60.0  # seconds after which a compensation that does not return is reported
_MAX_BUSY_WAIT = 60.0  # seconds between two attempts of a compensation whose call is rejected for load


class Definition(Protocol):
    """The `Saga` that is driven, as far as this module needs it."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def function(self) -> Callable[[Any, Any], Awaitable[Any]]:
        """Asks for its steps, and returns the result."""

    @property
    def undo_retry(self) -> Retry:
        """The policy by which a compensation that raises is tried again."""


class Driver(Protocol):
    """The supervisor, as far as a saga that it drives needs it."""

    @property
    def threads(self) -> Executor | None:
        """The executor in which plain functions run."""

    @property
    def stops(self) -> bool:
        """True once no attempt at a compensation begins any more: what is left is for the next process."""

    @property
    def leaves_waiting(self) -> bool:
        """True once a compensation that would have to wait is left to the next process."""

    def detached_task(self, saga_id: str) -> RunningTask | None:
        """Return the running task of the compensations of a saga that it drives."""

    async def take_slot_back(self, saga_id: str) -> None:
        """Wait until the run of a saga has its slot again, which it has lent to what its compensations submitted."""


class _StopSaga(BaseException):
    """Ends the function of a saga. It is no Exception, so that no ``except Exception`` of the function takes it."""


class SagaLeft(_StopSaga):
    """The saga is left as it is, to go on in the next process."""


class _Parking(_StopSaga):
    """The saga is to be parked.

    Attributes:
        why: for the person who looks at it.
        step: the step that it is about, or None.
    """

    def __init__(self, why: str, step: str | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.step = step


class SagaRun:
    """One saga while it is driven. Its function gets it, and does all its work in `step`.

    Attributes:
        saga_id: the id of the saga: the key of the task that began it, or its id.
        stopping_since: by `clock.now`, when it began to wait for steps that were cancelled; None: it does not.
    """

    def __init__(  # noqa: PLR0913 - what a run is made of
        self,
        saga: Definition,
        payload: Any,
        held: HeldSaga,
        driver: Driver,
        *,
        bound: int,
        is_cut_off: Callable[[], bool] = lambda: False,
        timeout: float | None = None,
    ) -> None:
        self.saga_id = held.saga_id
        self._payload = payload
        self._saga = saga
        self._held = held
        self._history = held.history
        self._driver = driver
        self._bound = bound  # bytes of an output
        self._is_cut_off = is_cut_off  # returns whether a cancellation ends the task, and not a part of the function
        self._timeout = timeout  # seconds in which a pivot of unknown outcome must be settled; None: no limit
        self._recorded = dict(self._history.steps)  # those that the log had when it was taken
        self._steps: dict[str, Step] = {}  # those that the function has asked for
        # By name, with their places in the log: the steps to be asked for, and the outputs to be returned, of that log.
        by_start = sorted(self._recorded.values(), key=lambda each: each.started)
        by_told = sorted(self._recorded.values(), key=lambda each: each.told)
        self._unasked = {each.name: each.started for each in by_start}
        self._outputs = {each.name: each.told for each in by_told if each.output is not None and not each.cut_off}
        self._replayed = asyncio.Event()  # set with each step that it asks for, and each output that it gets
        self._loop = asyncio.get_running_loop()
        self._stop: BaseException | None = None  # what ends the saga, whatever its function makes of it
        self._uncalled: set[str] = set()  # the steps that were begun here, and whose function was not called yet
        self._in_progress: dict[str, asyncio.Task[Any]] = {}
        self._undoing: set[asyncio.Task[None]] = set()
        self._function_ended = False
        self.stopping_since: float | None = None
        self._only_replays = False  # the saga goes back: the function is only asked what undoes its steps

    # --- for the function ---

    async def step(  # noqa: PLR0913 - every property of a step has a name
        self,
        name: str,
        function: Any,
        /,
        *args: Any,
        compensate: Callable[..., Any] | None = None,
        pivot: bool = False,
        retry: Retry | None = None,
        check: Callable[..., Any] | None = None,
        idempotent: bool = False,
    ) -> Any:
        """Do a step, and return its output; or return what it has returned before, in this process or another one.

        That it begins is written to the log before, and its output after. Steps may run side by side, by
        ``asyncio.gather``.

        Args:
            name: of the step, unique in its saga: in a loop, ``f"send {number}"``.
            function: what it does: an async function, a plain one, which runs in a thread, or an agent of a framework,
                which gets one argument. If it has a parameter `key` that neither `args` nor a ``partial`` give, it
                gets the idempotency key of the step, by which a server can tell a repeated request from a new one.
            args: its arguments.
            compensate: undoes the step if the saga fails later, or if the step itself raises: ``undo(output, *, key)``,
                with the key of the step, or ``undo(output)``. The output is None if the step raised, or nobody knows
                how it ended: then the key says what to undo. It may be called again, and must allow that.
            pivot: once it has succeeded, nothing is undone any more, and the saga goes forwards to its end.
            retry: how the step is tried again, under the same key, when it raises. None: it is not, unless it is
                `idempotent` and no answer came, or it comes after the pivot. Each process counts its own attempts.
            check: finds out whether the step has had its effect, if its process was lost or no answer came:
                ``check(key=...)`` returns ``Done(output)``, or None if it had none.
            idempotent: it may be repeated under its key, if nobody knows how it ended: its process was lost, or no
                answer came. Without this or a `check`, the saga is parked if its process was lost, or if no answer came
                to its pivot or a step after it.

        Returns:
            The output, as the log gives it back: plain data, or of the type that `function` says it returns.

        Raises:
            StepFailed: it raised. What effect it may have had is undone.
            InvalidStep: an argument is invalid, there was a step of that name, or a step asks for it.
            WrongLoop: it is asked for in another event loop than that of the supervisor.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoop(
                what=f"Saga {self.saga_id!r}", advice="ask for its steps in its function, and not in a thread"
            )
        if (inside := _inside.get()) is not None and inside[0] is self:
            why = f"it is asked for inside step {inside[1]!r}: ask for it in the function of the saga"
            raise InvalidStep(step=name, why=why)
        asked = step_of(
            name,
            function,
            args,
            compensate=compensate,
            pivot=pivot,
            retry=retry,
            check=check,
            idempotent=idempotent,
        )
        if self._function_ended:
            raise asyncio.CancelledError("the saga has ended")
        if self._stop is not None:
            raise self._stop
        if name in self._steps:
            raise InvalidStep(step=name, why="its saga has asked for a step of that name before: give each its own")
        self._steps[name] = asked
        self._unasked.pop(name, None)
        self._replayed.set()
        task = asyncio.ensure_future(self._take_or_stop(asked))
        self._in_progress[name] = task
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            if self._is_stopped():
                raise  # `_stop_steps` waits for the step
            task.cancel()  # by a timeout of the function itself, for example
            await _until_ended(task)
            self._end_step(name)
            self._note_cut_off(name)
            _look_at(task)
            raise
        self._end_step(name)
        return task.result()

    def _note_cut_off(self, name: str) -> None:
        """Note that the function has cut off a step, and goes on."""
        record = self._history.steps.get(name)  # None: it was to wait for others, and has not begun
        goes_on = not (self._stop or self._only_replays or self._is_stopped())
        if goes_on and record is not None and not record.cut_off:
            self._held.note(records.CutOffEntry(at=clock.wall_time(), step=name))

    def _end_step(self, name: str) -> None:
        self._in_progress.pop(name, None)
        if self._outputs.pop(name, None) is not None:
            self._replayed.set()

    # --- forwards ---

    async def _take_or_stop(self, step: Step) -> Any:
        """Do a step; what ends the saga is noted, because groups and timeouts of its function may hide it."""
        _inside.set((self, step.name))  # in a context of its own
        try:
            try:
                return await self._take(step)
            except asyncio.CancelledError as error:
                record = self._history.steps.get(step.name)
                settled = record is None or record.state is not StepState.STARTED
                if settled or self._only_replays or self._is_stopped():
                    raise
                return await self._failed(step, error, may_be_done=True)  # cut off while it was written or checked
        except (_StopSaga, SagaTaken, StoreUnavailable) as stop:  # what its function raises is a StepFailed by now
            self._stop = self._stop or stop
            self._replayed.set()  # for branches that wait: the function asks for nothing any more
            raise

    async def _take(self, step: Step) -> Any:
        record = self._recorded.get(step.name)
        if record is None:
            await self._wait_for_replay(step)
            if self._only_replays:
                await self._no_outcome()
            self._check_place(step)
            return await self._begin(step)
        self._check_same(step, record)
        match record.state:
            case StepState.STARTED | StepState.FAILED if self._only_replays:
                await self._no_outcome()
            case StepState.STARTED:
                await self._wait_for_replay(step)
                return await self._resume(step, record)
            case StepState.FAILED if self._is_past_pivot(record):
                await self._wait_for_replay(step)
                await self._write_start(step)
                return await self._resume(step, record)
            case StepState.NOT_DONE | StepState.UNDONE if self._is_past_pivot(record):
                await self._wait_for_replay(step)
                return await self._begin(step)  # a person lets it be tried again
            case StepState.FAILED:
                await self._undo_now(step)  # its process was lost meanwhile
        return await self._recorded_outcome(step, record)

    async def _recorded_outcome(self, step: Step, record: StepRecord) -> Any:
        """Return or raise what the function was given when the step had ended, and when it may depend on it again.

        Its branches run side by side: what it did when one of them had got an outcome depends on how far the others had
        come by then. So they come as far before.
        """
        if not record.told:
            await self._no_outcome()
        if record.cut_off:
            await self._be_cut_off(step, record)
        await self._wait_for_replay(step, record.told)
        if record.output is not None:
            return self._decode(step, record.output)
        raise StepFailed(saga_id=self.saga_id, step=step.name, error=record.error)

    async def _be_cut_off(self, step: Step, record: StepRecord) -> NoReturn:
        """Wait until the function cuts the step off, as it has done before.

        Raises:
            CancelledError: it has.
            _Parking: it does not.
        """
        if not is_being_cancelled():  # while it was undone
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(_REPLAY_WAIT)
        if is_being_cancelled():
            if not self._is_stopped():
                await self._wait_for_replay(step, record.told)
            raise asyncio.CancelledError
        raise _Parking(
            f"its function had cut off step {step.name!r}, by a timeout of its own, say, and does not within"
            f" {format_duration(_REPLAY_WAIT)} now that its code is replayed: put the time limit into the step",
            step.name,
        )

    @staticmethod
    async def _no_outcome() -> NoReturn:
        """Wait until the saga is stopped: it goes back, and its function has come to where it had got no further."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    def _is_past_pivot(self, record: StepRecord) -> bool:
        """Return whether a step has ended after the pivot had succeeded: its function has not seen it fail."""
        pivot = self._history.pivot
        return pivot is not None and pivot.state is StepState.DONE and record.ended > pivot.ended

    def _check_same(self, step: Step, record: StepRecord) -> None:
        """Park the saga if a step of the log has become another one."""
        for what, was, now in (
            ("a compensation", record.compensable, step.compensate is not None),
            ("pivot=True", record.pivot, step.pivot),
        ):
            if was != now:
                before, after = ("with", "without") if was else ("without", "with")
                raise _Parking(f"step {step.name!r} was begun {before} {what}, and is asked for {after} it{_CHANGED}")

    async def _wait_for_replay(self, step: Step, place: float = math.inf) -> None:
        """Wait until the function has asked for all steps, and got all outputs, that its log has before a place.

        Without a place: in the whole log. If it does not, it is another function than the one that began the saga, and
        an effect of this step would not belong to it.
        """
        while _first(self._unasked) < place or _first(self._outputs) < place:
            if self._stop is not None:
                raise self._stop
            self._replayed.clear()
            is_alone = len(self._in_progress) <= 1 and not self._history.overlapped
            if not await self._wait_for_request(_ALONE_WAIT if is_alone else _REPLAY_WAIT):
                missing = next(iter(self._unasked or self._outputs))
                raise _Parking(f"its function asks for step {step.name!r} where its log has step {missing!r}{_CHANGED}")

    async def _wait_for_request(self, seconds: float) -> bool:
        """Wait until the function asks for another step, or gets an output; return False if it does not for a while."""
        try:
            async with asyncio.timeout(seconds):
                await self._replayed.wait()
        except TimeoutError:
            return False
        return True

    def _check_place(self, step: Step) -> None:
        """Raise InvalidStep if a step cannot come here."""
        pivot = self._history.pivot
        if pivot is None:
            return
        if step.pivot:
            raise InvalidStep(
                step=step.name, why=f"step {pivot.name!r} is the pivot of its saga, which has one at most"
            )
        if step.compensate is not None and pivot.state in (StepState.STARTED, StepState.DONE):
            why = f"nothing is undone after the pivot, which is step {pivot.name!r}: leave out compensate="
            raise InvalidStep(step=step.name, why=why)

    async def _begin(self, step: Step) -> Any:
        """Write that a step begins, and do it. No earlier call of it has had an effect."""
        self._uncalled.add(step.name)
        await self._write_start(step)
        return await self._do(step)

    async def _write_start(self, step: Step) -> None:
        started = records.StartedEntry(
            at=clock.wall_time(),
            step=step.name,
            function=step.function_name,
            compensable=step.compensate is not None,
            pivot=step.pivot,
        )
        await self._held.write(started)

    def _is_stopped(self) -> bool:
        """Return whether a cancellation stops the saga, and not a step alone, by a timeout of the function itself."""
        return self._is_cut_off() or self._function_ended

    async def _resume(self, step: Step, record: StepRecord) -> Any:
        """Go on with a step of unknown outcome: its process was lost, no answer came, or its tries were used up."""
        if step.check is not None:
            found = await self._check(step)
            if found is not None:
                return self._note_done(step, found.output, by="check")
        elif not step.idempotent:
            raise _Parking(
                f"step {step.name!r} was begun, and its outcome is unknown."
                f" Find out by its key {record.key!r}; a step with check= or idempotent=True needs nobody for that",
                step.name,
            )
        return await self._do(step, may_be_done=True)

    async def _do(self, step: Step, *, may_be_done: bool = False) -> Any:
        """Call the function of a step until it has succeeded, or failed for good.

        Args:
            step: the step.
            may_be_done: an earlier call under its key may have had its effect.
        """
        retries, delay = RetryState(_UNKNOWN), 0.0
        last: BaseException | None = None
        while True:
            try:
                if delay:
                    await asyncio.sleep(delay)
                await self._held.check_lease()
            except asyncio.CancelledError as error:
                if self._is_stopped():
                    raise
                return await self._failed(step, last or error, may_be_done=may_be_done)
            self._uncalled.discard(step.name)
            encoded = await outcome_of(self._call(step))
            if not isinstance(encoded, Raised):
                self._held.note(records.DoneEntry(at=clock.wall_time(), step=step.name, output=encoded))
                return self._decode(step, encoded)
            last = encoded.error  # whatever it is, the step has failed
            if isinstance(last, _StopSaga) or (self._is_cancelled(last) and self._is_stopped()):
                raise last  # whoever stops the saga decides by what is known of the step
            _leave_if_interrupted(last, blocking=step.blocking)
            again = self._retry_delay(step, last, retries)
            if again is None:
                return await self._failed(step, last, may_be_done=may_be_done)
            may_be_done |= _leaves_open(last)
            delay = again

    @staticmethod
    def _is_cancelled(error: BaseException) -> bool:
        return isinstance(error, asyncio.CancelledError) and is_being_cancelled()

    async def _call(self, step: Step) -> bytes:
        """Call the function of a step, and return its output as the log stores it."""
        context.raise_priority(Priority.HIGH)  # in the context of this step alone: each has an asyncio task of its own
        return self._encode(step, await step.call(self._history.key_of(step.name), self._driver.threads))

    def _retry_delay(self, step: Step, error: BaseException, retries: RetryState) -> float | None:
        """Count a call that raised, and return the seconds until the step is tried again; None if it is not."""
        retry = step.retry
        if retry is None and step.idempotent:
            if self._history.past_pivot:
                retry = _PAST_PIVOT
            elif step.check is None and _leaves_open(error):
                retry = _UNKNOWN
        if retry is None or isinstance(error, NothingDone | NotEncodable) or self._is_cancelled(error):
            return None
        if not _covers(retry, error):
            return None
        retries.follow(retry)
        delay = retries.next_delay(uses_attempt=True, draw=clock.draw(), retry_after=_retry_after(error))
        if delay is not None:
            log.warning(
                "step %r of saga %r raised %s; it is tried again in %s",
                step.name,
                self.saga_id,
                type(error).__name__,
                format_duration(delay),
            )
        return delay

    async def _failed(self, step: Step, error: BaseException, *, may_be_done: bool) -> Any:
        """Find out whether a step that raised has had an effect, and undo that; or return its output after all.

        Raises:
            StepFailed: it has none.
        """
        clean = isinstance(error, NothingDone) or step.name in self._uncalled
        if not clean and step.check is not None:
            found = await self._check(step)
            if found is not None:
                return self._note_done(step, found.output, by="check")
            clean = True
        past_pivot = self._history.past_pivot
        is_open = not clean and (may_be_done or _leaves_open(error))
        if is_open and self._needs_outcome(step):  # it stays STARTED
            raise _Parking(self._why_open(step, error, may_be_done=may_be_done), step.name) from error
        is_open &= past_pivot  # before it, a step without compensation is one whose effect may stay
        self._note_failed(step, error, clean=clean or (step.compensate is None and not is_open))
        if is_being_cancelled():  # now: its process may be lost while it is undone
            self._note_cut_off(step.name)
        if past_pivot:
            effect = "; it may have had its effect" if is_open else ""
            raise _Parking(
                f"step {step.name!r} failed after the pivot, where nothing is undone any more: {_describe(error)}"
                f"{effect}",
                step.name,
            ) from error
        if not clean and step.compensate is not None:
            await self._undo_now(step)
        raise StepFailed(saga_id=self.saga_id, step=step.name, error=_describe(error)) from error

    def _needs_outcome(self, step: Step) -> bool:
        """Return whether the saga cannot go on, in any direction, without knowing how a step has ended."""
        return step.pivot or (self._history.past_pivot and not step.idempotent)

    def _why_open(self, step: Step, error: BaseException, *, may_be_done: bool) -> str:
        """Return why the saga is parked for a step that raised and may have had its effect."""
        which = f"the pivot, step {step.name!r}," if step.pivot else f"step {step.name!r}, after the pivot,"
        doubt = (
            "and an earlier call may have succeeded" if may_be_done else "which leaves open whether it has succeeded"
        )
        key = self._history.key_of(step.name)
        return (
            f"{which} ended with {_describe(error)}, {doubt}. Find out by its key {key!r}; a step with check= needs"
            " nobody for that"
        )

    def _note_failed(self, step: Step, error: BaseException, *, clean: bool) -> None:
        failed = records.FailedEntry(
            at=clock.wall_time(),
            step=step.name,
            error_type=type(error).__name__,
            error=_describe(error),
            clean=clean,
        )
        self._held.note(failed)

    def _note_done(self, step: Step, output: Any, *, by: str) -> Any:
        try:
            encoded = self._encode(step, output)
        except NotEncodable as error:
            raise _Parking(f"by its check it has succeeded, but {error}", step.name) from error
        self._held.note(records.DoneEntry(at=clock.wall_time(), step=step.name, output=encoded, by=by))
        return self._decode(step, encoded)

    async def _check(self, step: Step) -> Done | None:
        """Ask the check of a step whether it has had its effect.

        Raises:
            _Parking: it cannot be asked.
        """
        assert step.check is not None  # noqa: S101 - by the caller
        retries = RetryState(_CHECK_RETRY)
        while True:
            await self._held.check_lease()
            key = self._history.key_of(step.name)
            found = await outcome_of(call(step.check, key=key, threads=self._driver.threads))
            if isinstance(found, Raised):
                error = found.error
                raise_if_cancelled(error)
                _leave_if_interrupted(error, blocking=not is_async(step.check))
                delay = retries.next_delay(uses_attempt=True, draw=clock.draw())
                if delay is None:
                    why = f"the check of step {step.name!r} raised {_describe(error)}: it is unknown how the step ended"
                    raise _Parking(why, step.name) from error
                await asyncio.sleep(delay)
            elif found is None or isinstance(found, Done):
                return found
            else:
                why = f"the check of step {step.name!r} returned a {type(found).__name__}, not Done(output) or None"
                raise _Parking(why, step.name)

    def _encode(self, step: Step, output: Any) -> bytes:
        """Return an output as the log stores it.

        Raises:
            NotEncodable: it cannot.
        """
        try:
            plain = output if step.codec is None else step.codec.dump(step.codec.coerce(output))
            return encode_result(plain, task_id=step.name, bound=self._bound)
        except NotSerializable as error:
            why = f"at {error.path} it holds a {error.type}; return plain data, or annotate what the function returns"
        except PayloadTooLarge as error:
            why = f"it takes {error.size} bytes and the bound is {error.bound}: return a reference to it"
        except TypeMismatch as error:
            why = f"at result{error.path}: {error.reason}"
        except Exception as error:  # noqa: BLE001 - a codec is user code, and the step has had its effect
            why = f"its codec raised {_describe(error)}"
        raise NotEncodable(f"the output of step {step.name!r} cannot be stored: {why}")

    @staticmethod
    def _decode(step: Step, encoded: bytes) -> Any:
        """Return an output of the log as the function gets it.

        Raises:
            _Parking: its function returns another type than the one that the log has.
        """
        plain = decode_result(encoded)
        if step.codec is None:
            return plain
        try:
            return step.codec.load(plain)
        except TypeMismatch as error:
            why = f"at result{error.path}: {error.reason}"
        except Exception as error:  # noqa: BLE001 - a codec is user code
            why = f"its codec raised {_describe(error)}"
        raise _Parking(
            f"the output of step {step.name!r} in the log is not of the type that its function returns: {why}"
            f"{_CHANGED}",
            step.name,
        )

    # --- driving ---

    async def drive(self) -> Any:
        """Call the function, and return its result once the log has it.

        Whatever this raises, `conclude` decides what becomes of the saga.
        """
        try:
            value = await self._saga.function(self, self._payload)
            while self._in_progress or await self._is_asked_for_more():  # by what it has begun, and not awaited
                if self._in_progress:
                    await asyncio.wait(self._in_progress.values())
                for name, task in list(self._in_progress.items()):
                    if task.done():
                        self._end_step(name)
                        _look_at(task)
        except (Exception, BaseExceptionGroup):
            if self._stop is not None:
                raise self._stop from None
            raise
        if self._stop is not None:
            raise self._stop
        self._function_ended = True
        if self._unasked:
            missing = next(iter(self._unasked))
            raise _Parking(f"its function has returned without step {missing!r}, which its log has{_CHANGED}")
        return await self._finish(value)

    async def _finish(self, value: Any) -> Any:
        """Write the result of the saga, and return it as the log has it."""
        try:
            result = encode_result(value, task_id=self.saga_id, bound=self._bound)
        except NotSerializable as error:
            raise TypeError(
                f"the result of saga {self._saga.name!r} must be plain data: at {error.path} it holds a {error.type}"
            ) from None
        try:
            await self._held.write(records.FinishedEntry(at=clock.wall_time(), result=result))
        except (SagaTaken, StoreUnavailable) as stop:
            self._stop = stop  # the saga has not failed: it goes on elsewhere
            raise
        return decode_result(result)

    async def _is_asked_for_more(self) -> bool:
        """Return whether branches that the function has left go on, to steps that the log has."""
        self._replayed.clear()
        return bool(self._unasked) and self._stop is None and await self._wait_for_request(_ALONE_WAIT)

    async def conclude(self, error: BaseException, *, cut_off: bool) -> None:
        """Bring a saga to its end whose function has not returned. It is to be called once, and not cancelled.

        Args:
            error: what the function raised, or what it was cut off by.
            cut_off: whether it was cut off by the end of its task; then past its pivot it is left to go on.

        Raises:
            SagaTaken, StoreUnavailable: it was left as it is, to go on later, here or in another process.
        """
        self._function_ended = True
        await self._stop_steps()
        async with self._parked_if_it_fails():
            if self._stop is not None:
                raise self._stop
            if isinstance(error, _StopSaga):
                raise error
            self._note_uncalled()
            if cut_off and self._pivot_was_begun_elsewhere():
                return
            await self._settle_pivot()
            if self._history.past_pivot and not cut_off:
                self._fail_past_pivot(error)
            if not self._history.past_pivot:
                await self._compensate(error)

    @asynccontextmanager
    async def _parked_if_it_fails(self) -> AsyncIterator[None]:
        """Park the saga if what brings it to its end raises: so would the next attempt."""
        try:
            yield
        except (SagaLeft, SagaTaken, StoreUnavailable, GeneratorExit):
            raise
        except _Parking as parking:
            await self._park(parking)
        except BaseException as error:  # noqa: BLE001 - whatever it is
            raise_if_cancelled(error)
            raise_again_if_interrupt(error)
            log.error("saga %r could not be brought to its end", self.saga_id, exc_info=error)
            await self._park(_Parking(f"it could not be brought to its end: {_describe(error)}"))

    def _note_uncalled(self) -> None:
        """Note of the steps that were stopped while the log had yet to have their start: they have had no effect."""
        for name in sorted(self._uncalled):
            record = self._history.steps.get(name)
            if record is not None and record.state is StepState.STARTED:
                self._note_failed(self._steps[name], asyncio.CancelledError(), clean=True)

    def _pivot_was_begun_elsewhere(self) -> bool:
        """Return whether the log has a pivot that the function has not asked for yet, in this process."""
        pivot = self._history.pivot
        return pivot is not None and pivot.name not in self._steps

    @staticmethod
    def _fail_past_pivot(error: BaseException) -> NoReturn:
        raise _Parking(f"its function failed after the pivot: {_describe(error)}")

    async def leave(self) -> None:
        """Stop the steps in progress, and write what is known of them. The saga goes on later."""
        self._function_ended = True
        await self._stop_steps()
        await self._held.flush()

    async def _stop_steps(self) -> None:
        """Cancel the steps in progress, and wait until they have really ended."""
        for task in self._in_progress.values():
            task.cancel()
        self.stopping_since = clock.now()
        while pending := [task for task in (*self._in_progress.values(), *self._undoing) if not task.done()]:
            await asyncio.wait(pending)
        self.stopping_since = None
        for task in self._in_progress.values():
            _look_at(task)
        self._in_progress.clear()

    async def _settle_pivot(self) -> None:
        """Find out how the pivot has ended, if that is unknown, by its check or by repeating it.

        Raises:
            _Parking: neither is possible.
        """
        pivot = self._history.pivot
        if pivot is None or pivot.state is not StepState.STARTED:
            return
        step = self._steps.get(pivot.name)
        if step is None:
            raise _Parking(f"its function does not ask for its pivot, step {pivot.name!r}{_CHANGED}", pivot.name)
        if step.check is not None:
            found = await self._within_timeout(step, self._check(step), "its check")
            if found is not None:
                self._note_done(step, found.output, by="check")
            else:
                self._note_failed(step, NothingDone(), clean=True)
            return
        if not step.idempotent:
            why = f"it was cut off during the pivot, step {pivot.name!r}, and it is unknown how that ended"
            raise _Parking(f"{why}: find out by its key {pivot.key!r}", pivot.name)
        with suppress(StepFailed):
            await self._within_timeout(step, self._do(step, may_be_done=True), "its repetition")

    async def _within_timeout(self, pivot: Step, work: Coroutine[Any, Any, Any], what: str) -> Any:
        """Await what settles the pivot; park the saga if that takes longer than its task may run."""

        async def bounded() -> Any:
            async with asyncio.timeout(self._timeout):
                return await work

        try:
            return await self._detached(bounded())
        except TimeoutError:
            assert self._timeout is not None  # noqa: S101 - nothing else raises this: see `_do` and `_check`
            raise _Parking(
                f"it was cut off during the pivot, step {pivot.name!r}, and it is unknown how that ended:"
                f" {what} has not ended within {format_duration(self._timeout)}",
                pivot.name,
            ) from None

    async def _park(self, parking: _Parking) -> None:
        why = error_text(parking.why)
        await self._held.write(records.ParkedEntry(at=clock.wall_time(), why=why, step=parking.step))
        log.error("saga %r is parked: %s", self.saga_id, why)

    # --- backwards ---

    async def go_back(self) -> None:
        """Go on with the compensations of a saga that was left while they were under way.

        Raises:
            SagaTaken, StoreUnavailable, SagaLeft: as `conclude`.
        """
        self._only_replays = True
        async with self._parked_if_it_fails():
            await self._replay()
            if isinstance(self._stop, _Parking) and self._not_asked():
                raise self._stop
            await self._compensate(None)

    async def _replay(self) -> None:
        """Call the function, with the outputs of the log, as far as that goes: it says what undoes its steps."""
        function = asyncio.ensure_future(self._call_quietly())
        function.add_done_callback(lambda _: self._replayed.set())
        try:
            while self._not_asked():
                self._replayed.clear()
                # Branches may be under way though it has ended, as they were when it ended before.
                has_ended = function.done() and not self._in_progress
                if not await self._wait_for_request(_ALONE_WAIT if has_ended else _REPLAY_WAIT):
                    break
        finally:
            self._function_ended = True
            function.cancel()
            await _until_ended(function)
            await self._stop_steps()

    async def _call_quietly(self) -> None:
        """Call the function to learn its steps; how it ends means nothing."""
        try:
            await self._saga.function(self, self._payload)
        except BaseException as error:  # noqa: BLE001 - user code; its cancellation ends it too
            raise_again_if_interrupt(error)

    def _not_asked(self) -> bool:
        """Return whether there are steps to undo for which the function has not asked."""
        return any(step.name not in self._steps for step in self._history.to_undo())

    async def _compensate(self, error: BaseException | None) -> None:
        if not self._history.goes_back:
            kind, text = type(error).__name__, _describe(error)
            await self._held.write(records.CompensatingEntry(at=clock.wall_time(), error_type=kind, error=text))
            if self._not_asked():  # cut off before it had come to where it was left
                run = SagaRun(self._saga, self._payload, self._held, self._driver, bound=self._bound)
                await run.go_back()
                return
        while steps := self._history.to_undo():
            record = steps[0]
            step = self._steps.get(record.name)
            if step is None:
                raise _Parking(
                    f"step {record.name!r} is to be undone, and its function does not ask for it{_CHANGED}", record.name
                )
            self._check_same(step, record)
            if record.state is StepState.STARTED and step.check is not None and not await self._was_done(step):
                continue
            await self._undo(step)
        await self._held.write(records.CompensatedEntry(at=clock.wall_time()))

    async def _was_done(self, step: Step) -> bool:
        """Ask the check of a step that is to be undone; if it cannot say, the step is undone by its key."""
        try:
            found = await self._detached(self._check(step))
        except _Parking:
            return True
        if found is None:
            self._note_failed(step, NothingDone(), clean=True)
            return False
        self._note_done(step, found.output, by="check")
        return True

    async def _undo_now(self, step: Step) -> None:
        """Undo a step that has failed, even if its caller is cancelled meanwhile."""
        task = asyncio.ensure_future(self._undo(step))
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)
        await _until_ended(task)
        task.result()
        await self._driver.take_slot_back(self.saga_id)  # the function goes on

    async def _undo(self, step: Step) -> None:
        """Call the compensation of a step until it has succeeded.

        Raises:
            _Parking: it has failed for good.
            SagaLeft: it is left to the next process.
        """
        record, retries = self._history.steps[step.name], RetryState(self._saga.undo_retry)
        output = None if record.output is None else self._decode(step, record.output)
        # First, or the next process might not know that it has failed, and repeat it after its undo.
        await self._held.flush()
        while True:
            if self._driver.stops:
                raise SagaLeft
            await self._held.check_lease()
            slow = asyncio.get_running_loop().call_later(_SLOW, self._report_slow, step)
            try:
                raised = await self._detached(outcome_of(self._call_undo(step, output, record.key)))
            finally:
                slow.cancel()
            if not isinstance(raised, Raised):
                await self._held.write(records.UndoneEntry(at=clock.wall_time(), step=step.name))
                return
            error = raised.error  # whatever it is, the effect is not undone
            raise_if_cancelled(error)
            _leave_if_interrupted(error, blocking=not is_async(step.compensate))
            await asyncio.sleep(self._undo_delay(step, error, retries))

    def _report_slow(self, step: Step) -> None:
        log.warning(
            "the compensation of step %r of saga %r has not returned for %s: nothing cuts it off, and draining waits",
            step.name,
            self.saga_id,
            format_duration(_SLOW),
        )

    def _undo_delay(self, step: Step, error: BaseException, retries: RetryState) -> float:
        """Count a failure of a compensation, and return the seconds until it is tried again.

        Raises:
            _Parking: it has failed for good.
            SagaLeft: it is left to the next process.
        """
        retry = self._saga.undo_retry
        delay: float | None
        if isinstance(error, Overloaded):  # it was not tried, and waits as often as it takes
            delay = min(max(_retry_after(error), retry.base_delay), _MAX_BUSY_WAIT)
        else:
            self._held.note(records.UndoFailedEntry(at=clock.wall_time(), step=step.name, error=_describe(error)))
            delay = retries.next_delay(uses_attempt=True, draw=clock.draw())
            if not _covers(retry, error):
                delay = None
        if delay is None:
            times = "once" if retries.failed == 1 else f"{retries.failed} times"
            why = f"the compensation of step {step.name!r} has failed {times}, the last time with {_describe(error)}"
            raise _Parking(why, step.name) from error
        log.warning(
            "the compensation of step %r of saga %r raised %s; it is tried again in %s",
            step.name,
            self.saga_id,
            type(error).__name__,
            format_duration(delay),
        )
        if self._driver.leaves_waiting:
            raise SagaLeft from error
        return delay

    async def _call_undo(self, step: Step, output: Any, key: str) -> None:
        assert step.compensate is not None  # noqa: S101 - by `to_undo`
        await call(step.compensate, output, key=key, threads=self._driver.threads)

    async def _detached(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Await `work` in a context without deadline, whose calls and tasks are CRITICAL and never shed.

        It is not cancelled with the caller: nothing may cut off an undo.
        """
        own = contextvars.copy_context()
        own.run(context.set_running_task, self._driver.detached_task(self.saga_id))
        task = asyncio.get_running_loop().create_task(work, context=own)
        await _until_ended(task)
        return task.result()


_CHANGED = (
    ". Its code has changed since, depends on something else than its payload and the outputs of its steps, or waits"
    " for long outside of them. Let the old code finish it, or close it by hand"
)


def _first(places: Mapping[str, int]) -> float:
    """Return the first of the places in a log, which are in order."""
    return next(iter(places.values()), math.inf)


async def _until_ended(task: asyncio.Future[Any]) -> None:
    """Wait until `task` has ended, even if the caller is cancelled."""
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            continue


def _look_at(task: asyncio.Task[Any]) -> BaseException | None:
    """Return what a task has raised, so that asyncio does not report it as lost."""
    return None if task.cancelled() else task.exception()


def _leave_if_interrupted(error: BaseException, *, blocking: bool) -> None:
    """Leave the saga to the next process if a Ctrl-C ended user code, which cannot be if that ran in a thread.

    Raises:
        SagaLeft: it did.
    """
    if not blocking and is_interrupt(error):
        raise_again_if_interrupt(error)
        raise SagaLeft from error


def _leaves_open(error: BaseException) -> bool:
    """Return whether a step that raised may have had its effect.

    So it is with what is no Exception, such as the SystemExit of a signal handler, which may come at any moment, and
    with an error that cannot be looked at.
    """
    if not isinstance(error, Exception):
        return True
    return call_hook("an attribute of an error", is_ambiguous, error) is not False


def _retry_after(error: BaseException) -> float:
    """Return the seconds that an error asks to wait before the next attempt; 0.0 if it names no number."""
    asked = call_hook("retry_after of an error", lambda: getattr(error, "retry_after", None))
    return asked if is_number(asked) else 0.0


def _describe(error: BaseException | None) -> str:
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - user code
        text = "(its message cannot be shown)"
    text, name = as_clause(text), type(error).__name__
    if isinstance(error, StepFailed):
        return error_text(text)
    return error_text(f"{name}: {text}" if text else name)


def _covers(retry: Retry, error: BaseException) -> bool:
    return bool(call_hook("on of a Retry", retry.covers, error))
