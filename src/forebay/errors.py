"""One tree of errors; the docstring of each class is its message, with the facts of the error filled in.

A message says what happened, to what, and what to do next. It never quotes a payload.
"""

from __future__ import annotations

import functools
import inspect
import math
import string
from collections.abc import Callable
from typing import Any, Self, TypeVar

from forebay._renamed import renamed, renamed_arguments
from forebay._text import format_bytes, format_duration, header_value

_MAX_SHOWN = 100  # characters of a value in a message


class ForebayError(Exception):
    """Something went wrong in Forebay."""

    def __init__(self, **facts: Any) -> None:
        self.__dict__.update(facts)
        shown = {name: _shown(name, fact) for name, fact in facts.items()}
        kind: Any = type(self)  # to mypy, a class is not hashable
        super().__init__(_message_format(kind)(**shown))
        self._facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._facts)

    @classmethod
    def _from(cls, facts: dict[str, Any]) -> Self:
        return cls(**facts)


E = TypeVar("E", bound=ForebayError)


class _Formatter(string.Formatter):
    """``str.format`` with two more format specs for numbers: ``{late:duration}`` (seconds) and ``{size:bytes}``."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if format_spec == "duration":
            return format_duration(value)
        return format_bytes(value) if format_spec == "bytes" else super().format_field(value, format_spec)


_formatter = _Formatter()


@functools.cache
def _message_format(kind: type[ForebayError]) -> Callable[..., str]:
    """Return the function that fills the facts into the message of a class of errors."""
    template = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
    if ":duration}" in template or ":bytes}" in template:
        return functools.partial(_formatter.format, template)
    return template.format  # in C, and several times as fast


class _TypeName(str):
    """The name of a type, shown as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _shown(name: str, fact: object) -> object:
    """Return a fact as a message shows it: any value that may be a payload is cut, or named by its type only."""
    if fact is None or isinstance(fact, bool | int | float):
        return fact
    if isinstance(fact, str):
        return fact if name != "value" or len(fact) <= _MAX_SHOWN else fact[:_MAX_SHOWN] + "..."
    return _TypeName(f"a {type(fact).__name__}")


def fresh_copy(error: E) -> E:
    """Return an error to be raised once more: the same, without the traceback that the last raise has left on it.

    An error that is stored and raised again would hold the frames of all who caught it.
    """
    try:
        copy: E = error._from(error._facts)  # noqa: SLF001 - its own module
    except Exception:  # noqa: BLE001 - a class of the user's that takes other arguments
        return error
    return copy


def _rebuild(kind: type[ForebayError], facts: dict[str, Any]) -> ForebayError:
    return kind._from(facts)  # noqa: SLF001 - called by pickle


# --- mistakes: raised by the call that made them -------------------------------------------------------------------


class InvalidTask(ForebayError, ValueError):
    """Task {field} is {value!r}; it must be {expected}."""


class UnusableTask(InvalidTask):
    """Task {field} is {value!r}; it must be {expected}."""

    # The handler of its type cannot run it, whatever it does: the submitter's mistake, and no fault of the worker.


class DeadlinePassed(ForebayError, ValueError):
    """The deadline of task {task_id!r} passed {late:duration} ago, so its result is already worthless: give it a later
    one, for example Deadline.within(60), or do not submit it.
    """

    task_id: str
    late: float


class InvalidDeadline(ForebayError, ValueError):
    """A deadline of {value!r} is not in the future: Deadline.within(seconds) takes a positive, finite number of
    seconds, and Deadline(at) takes epoch seconds.
    """


class InvalidEstimate(ForebayError, ValueError):
    """Estimate {field} is {value!r}; it must be a whole number of at least 0."""


class InvalidTimeout(ForebayError, ValueError):
    """A timeout of {value!r} is invalid: it is how long one attempt may run, a positive number of seconds."""


class InvalidThreshold(ForebayError, ValueError):
    """A backpressure_threshold of {value!r} is outside (0, 1]: 0.8 rejects NORMAL tasks when the fullest resource is at
    80% of its limit; 1 rejects only when it is full.
    """


class InvalidSetting(ForebayError, ValueError):
    """{owner} was given {name}={value!r}; it must be {expected}."""


class InvalidQuota(ForebayError, ValueError):
    """This quota is invalid: {problem}. A quota is one amount in a period, for example
    Quota(requests=500, per="minute") or Quota(input_tokens=200_000, per="minute").
    """


class InvalidBudget(ForebayError, ValueError):
    """Budget {name} is {value!r}; it must be {expected}. For example Budget(usd=25, per="day", reserved_share=0.1)."""


class InvalidPrice(ForebayError, ValueError):
    """The price of {model!r} has {name}={value!r}; it must be {expected}. Prices are US dollars per million tokens, for
    example {{"my-model*": Price(input=0.5, output=1.5)}}.
    """


class InvalidAmount(ForebayError, ValueError):
    """An amount of {value!r} is not money: it must be a number of US dollars from 0 to 1e12."""


class ReservationClosed(ForebayError, RuntimeError):
    """This reservation was settled or released before: do one of the two, once."""


class InvalidHandler(ForebayError, TypeError):
    """{worker!r} has a handler of type {type}, which Forebay cannot run: {hint}.{wrapper}"""

    worker: str
    type: str

    def __init__(
        self,
        *,
        worker: str,
        type: str,  # noqa: A002
        frameworks: str = "",
        hint: str = "",
        wrapper: str = "",
    ) -> None:
        hint = hint or (
            "pass an async or plain callable that takes the Task, a supervisor, or an agent of a supported framework"
            f" ({frameworks})"
        )
        super().__init__(worker=worker, type=type, frameworks=frameworks, hint=hint, wrapper=wrapper)


class NotImportable(ForebayError, TypeError):
    """Worker {worker!r} is to run in processes of its own, which import what they run, and its {what} is {got}: {why}.
    Pass a function (or, for factory=, a function or class) that is defined at the top level of a module, or the import
    path of it or of an agent, "package.module:name"; engine="thread" needs no import path.
    """

    worker: str
    what: str


class DuplicateWorker(ForebayError, ValueError):
    """A worker named {name!r} is already registered: give this one another name, or a higher max_concurrent to the
    first.
    """

    name: str


class UnknownWorker(ForebayError, KeyError):
    """No worker is named {name!r} (there are: {known}): it was never registered, or is unregistered already."""

    name: str
    __str__ = Exception.__str__  # that of a KeyError would put the message in quotes


class UnregisteredInside(ForebayError, RuntimeError):
    """unregister_worker({worker!r}) was called inside task {task_id!r}, which runs on that worker, and would wait for
    that task: call it outside of the worker's tasks.
    """

    worker: str
    task_id: str


class DuplicateTask(ForebayError, ValueError):
    """A task with id {task_id!r} has not ended, or the overflow keeps it as a dead letter or for its key: leave task_id
    out to have one generated, or use key= if the same work may be submitted twice.
    """

    task_id: str


class DuplicateKey(ForebayError, ValueError):
    """The dead letter of task {task_id!r} cannot be requeued: another task has been stored under its key since, which
    has not ended or has succeeded. Drop the letter if the work is done, or requeue it once that task has failed.
    """

    task_id: str


class NestedTooDeep(ForebayError, RecursionError):
    """Task {task_id!r} would be nested in {bound} runs, each of which waits for the one below it: does a handler run
    its own task type without end? If it is meant to go so deep, let it return what comes next, and submit that from
    where its result is awaited.
    """

    task_id: str
    bound: int


class UnknownTaskType(ForebayError, LookupError):
    """No worker is registered for task type {task_type!r} (there are workers for: {known}): register one with
    register_worker(..., task_types=[{task_type!r}]), or correct the type.
    """

    task_type: str


class UnknownTask(ForebayError, LookupError):
    """No task {task_id!r} is known here: it was never submitted, or it ended so long ago that its result is no longer
    kept. If an overflow may have it, ask that too: await supervisor.find({task_id!r}).
    """

    task_id: str


class NotSerializable(ForebayError, TypeError):
    """Task {task_id!r} cannot be stored: at {path} it holds a {type}. {advice}, or submit with spill=False and
    durable=False.
    """

    task_id: str
    path: str
    type: str

    def __init__(self, *, task_id: str, path: str, type: str) -> None:  # noqa: A002 - the word for it
        advice = (
            "With an overflow, payloads are encoded at submit; use None, booleans, numbers, strings, bytes, lists,"
            " tuples and dicts with string keys, declare its type by register_worker(..., payload=TYPE)"
        )
        if path == "retry.on":
            advice = "What is stored names no code: let its worker say it, by register_worker(..., retry=Retry(on=...))"
        super().__init__(task_id=task_id, path=path, type=type, advice=advice)

    @classmethod
    def _from(cls, facts: dict[str, Any]) -> Self:
        return cls(**{name: facts[name] for name in ("task_id", "path", "type")})


class InvalidPayload(ForebayError, ValueError):
    """The payload of task {task_id!r} is not a valid {type}, the type that is declared for task type {task_type!r}: at
    {path}: {why}. Correct it; or, if an earlier release stored it, give each field that was added to the type since
    then a default.
    """

    task_id: str
    task_type: str
    path: str
    why: str


class PayloadTooLarge(ForebayError, ValueError):
    """The payload of task {task_id!r} takes {size} bytes encoded and the bound is {bound}: store it elsewhere and
    submit a reference, or raise max_payload_bytes.
    """

    size: int
    bound: int


class MessageTooLarge(PayloadTooLarge):
    """Task {task_id!r} takes {size} bytes encoded, and a message of the overflow's queue holds {bound}: store its
    payload elsewhere, in an object store for example, and submit a reference to it.
    """


class UnknownSaga(ForebayError, LookupError):
    """No saga {saga_id!r} is in this log: it never began there, or it ended so long ago that it is no longer kept. See
    which there are: forebay saga ls URL --all, or await supervisor.sagas.list().
    """

    saga_id: str


class SagaNotParked(ForebayError, ValueError):
    """Saga {saga_id!r} is {state}, and only a parked saga can be changed: {advice}."""

    saga_id: str
    state: str


class InvalidResolution(ForebayError, ValueError):
    """Saga {saga_id!r} cannot be resolved so: {why}. {advice}."""

    saga_id: str


class SagaConflict(ForebayError):
    """Saga {saga_id!r} was not changed, because it went on meanwhile: {change}. Look at it again, and decide by what it
    is now.
    """

    saga_id: str


class OverflowRequired(ForebayError, ValueError):
    """Task {task_id!r} is durable, but {why}: {advice}."""


class InvalidOverflowUrl(ForebayError, ValueError):
    """The overflow {url!r} cannot be opened: {why}. Known forms: {forms}."""

    why: str


class InvalidSagaLogUrl(ForebayError, ValueError):
    """The saga log {url!r} cannot be opened: {why}. Known forms: {forms}."""

    why: str


class InvalidSpendLogUrl(ForebayError, ValueError):
    """The spend log {url!r} cannot be opened: {why}. Known forms: {forms}."""

    why: str


class StoreUnavailable(ForebayError):
    """The store at {where} cannot be used: {why}. {advice}"""

    where: str
    why: str
    advice: str


class StoreAnswerLost(StoreUnavailable):
    """The store at {where} cannot be used: {why}. It may have done what it was asked, or do it yet. {advice}"""


class ScalingFailed(ForebayError):
    """{what} cannot be used: {why}."""

    what: str
    why: str


class StoreNotInstalled(ForebayError, ImportError):
    """{where} needs the library {library}, which is not installed: pip install 'forebay[{extra}]'."""


class InvalidShardUrl(ForebayError, ValueError):
    """The shard {url!r} cannot be opened: {why}. Known forms: {forms}."""


class ShardUnavailable(StoreUnavailable):
    """The shard {where} cannot be used: {why}. The keys of other shards are not affected. {advice}"""


class ShardAnswerLost(ShardUnavailable):
    """The shard {where} cannot be used: {why}. It may have done what it was asked, or do it yet. {advice}"""


class InvalidStateKey(ForebayError, ValueError):
    """A {what} is {why}; it must be {expected}."""

    what: str
    why: str
    expected: str


class InvalidStateValue(ForebayError, ValueError):
    """The value for key {key!r} cannot be stored: {why}. Give it {expected}."""


class Conflict(ForebayError):
    """Key {key!r} has version {found}, not {expected}: another writer has changed it (version 0: there is no such key).
    Read it again, and decide by its new value; or use update(), which does.
    """

    key: str
    expected: int
    found: int


class CheckpointDamaged(ForebayError):
    """Checkpoint {checkpoint_id!r} of thread {thread_id!r} cannot be read: shard {where} has lost its value of channel
    {channel!r}. A server that evicts keys loses such values: set its maxmemory-policy to noeviction. Go on from an
    earlier checkpoint, or delete the thread.
    """

    checkpoint_id: str
    thread_id: str
    channel: str
    where: str


class NoRunningLoop(ForebayError, RuntimeError):
    """A {what} {why}."""


class NotStarted(ForebayError, RuntimeError):
    """The supervisor has not been started: use `async with BackpressureSupervisor(...) as supervisor:`, or await
    supervisor.start() first.
    """


class AlreadyStarted(ForebayError, RuntimeError):
    """The supervisor has been started: `await supervisor.close()` before you start it again, or make another one."""


class SupervisorClosed(ForebayError, RuntimeError):
    """The supervisor is {state} and takes no more work: submit before drain() or close(), or to another one, or start
    it again once it has closed, by `async with supervisor:` or `await supervisor.start()`.
    """


class DrainInside(ForebayError, RuntimeError):
    """drain() was called inside task {task_id!r}, and would wait for that task: call it outside of the supervisor's
    tasks, or have the task set an event that the code which started the supervisor waits for.
    """

    task_id: str


class WrongLoop(ForebayError, RuntimeError):
    """{what} was used from another event loop or thread than its own: {advice}."""


class ForkedProcess(ForebayError, RuntimeError):
    """{what} belongs to process {parent}, and this is a child that was forked from it, without its threads: make a new
    one here, or start the child with the method 'spawn' or 'forkserver'.
    """

    what: str
    parent: int


class SlotMisused(ForebayError, RuntimeError):
    """A slot {why}: enter it once, by `async with supervisor.slot(...) as slot:`, and read its worker in that block."""


class NotGuardable(ForebayError, TypeError):
    """{function!r} cannot be guarded: {why}"""


class CallMisused(ForebayError, RuntimeError):
    """A call of an upstream was entered twice: make a new one for each, `async with upstream.call(...) as call:`."""


class WouldDeadlock(ForebayError, RuntimeError):
    """{what} would wait for itself: {advice}."""

    what: str
    advice: str


class LoopStopped(ForebayError, RuntimeError):
    """portal.{call}() waits for the supervisor's event loop, which has not run for {seconds:.0f} s: a supervisor works
    only while its loop runs. Keep it running, for example with asyncio.run(), or enter supervisor.portal() before the
    supervisor is started, which gives it a loop in a thread of its own.
    """


class StillSpilled(ForebayError):
    """Task {task_id!r} is kept in the overflow, and this supervisor drained or closed before it ran: it is not lost. It
    runs when a supervisor with the same overflow next starts; then `await supervisor.find({task_id!r})` has its ticket.
    """

    task_id: str


class NotBindable(ForebayError, TypeError):
    """{kind} cannot be bound: {advice}"""

    kind: str
    advice: str


class AlreadyBound(ForebayError, ValueError):
    """A client that is bound to upstream {first!r} was to be bound to {second!r}: a call goes through one upstream.
    Bind the original client.
    """

    first: str
    second: str


# --- handlers in processes: the `cause` of a task that failed ---------------------------------------------------------


class RemoteError(ForebayError):
    """{type}: {message}"""

    # The handler raised this in another process. The exception itself is not sent: that would take code on the wire.
    type: str
    message: str
    traceback: str

    def __init__(self, *, type: str, message: str, traceback: str) -> None:  # noqa: A002 - the word for it
        super().__init__(type=type, message=message, traceback=traceback)
        if traceback:
            self.add_note(f"In its process:\n{traceback.rstrip()}")


class WorkerDied(ForebayError):
    """The process {pid} of worker {worker!r} died while it ran task {task_id!r}: {how}. {advice}"""

    worker: str
    task_id: str
    pid: int
    exitcode: int | None


class WorkerNotStarted(ForebayError):
    """Worker {worker!r} did not start: {why}."""

    worker: str
    why: str


class WorkerStopped(ForebayError):
    """Worker {worker!r} was stopped while it ran task {task_id!r}: {why}."""

    worker: str
    task_id: str
    why: str


class ProcessNotStarted(ForebayError):
    """A process of worker {worker!r} could not be started: {why}. {advice}"""

    worker: str


class NotTransferable(ForebayError, TypeError):
    """The {what} of task {task_id!r} cannot be sent between processes: {why}. Use None, booleans, numbers, strings,
    bytes, lists and dicts with string keys, pass a reference to large data, or run the worker with engine="thread".
    """

    task_id: str


# --- outcomes: raised by `run` and `slot` --------------------------------------------------------------------------


class Overloaded(ForebayError):
    """Rejected: {reason}{hint}. Nothing was started."""

    # Worded so that no framework takes it for a provider's rejection and retries it: see docs/design.md, Admission.
    reason: str
    limited_by: str | None
    load: float | None
    retry_after: float | None

    @renamed_arguments(binding="limited_by")
    def __init__(
        self, reason: str, *, limited_by: str | None = None, load: float | None = None, retry_after: float | None = None
    ) -> None:
        """Make the error.

        Args:
            reason: what is overloaded, in words.
            limited_by: the resource that decided, such as ``"pool:research"``, or None.
            load: its load, where 1.0 is full; infinity if coming back cannot help; None if it is unknown.
            retry_after: seconds after which there may be room, or None: unknown.
        """
        if retry_after is not None:
            hint = f"; come back in {format_duration(retry_after)}"
        elif load == float("inf"):  # coming back cannot help: the reason says what to do
            hint = ""
        else:
            hint = "; back off before you come back: it is not known when there will be room"
        super().__init__(reason=reason, limited_by=limited_by, load=load, retry_after=retry_after, hint=hint)

    def headers(self) -> dict[str, str]:
        """Return the headers with which a response of HTTP reports it; the gateway sends the same.

        ``retry-after`` is in whole seconds, rounded up, and ``retry-after-ms``, which SDKs of LLM providers prefer, in
        milliseconds; neither is there if it is not known when there will be room. ``x-forebay-limited-by`` names the
        resource that was full.
        """
        headers = {}
        if self.retry_after is not None and math.isfinite(self.retry_after):
            headers["retry-after"] = str(math.ceil(self.retry_after))
            headers["retry-after-ms"] = str(math.ceil(1000 * self.retry_after))
        if self.limited_by:
            headers["x-forebay-limited-by"] = header_value(self.limited_by)
        return headers

    @classmethod
    def _from(cls, facts: dict[str, Any]) -> Self:
        names = ("limited_by", "load", "retry_after")
        return cls(facts["reason"], **{name: facts[name] for name in names})

    def __getattr__(self, name: str) -> Any:
        if name == "binding":
            raise AttributeError(renamed("Overloaded", name, "limited_by"))
        return super().__getattribute__(name)  # raises the usual AttributeError


class TaskFailed(ForebayError):
    """Task {task_id!r} failed{where}: {error}."""

    task_id: str
    worker_id: str | None
    error: str | None

    def __init__(self, *, task_id: str, worker_id: str | None, error: str | None) -> None:
        where = "" if worker_id is None else f" on worker {worker_id!r}"
        super().__init__(task_id=task_id, worker_id=worker_id, error=error, where=where)

    @classmethod
    def _from(cls, facts: dict[str, Any]) -> Self:
        return cls(**{name: facts[name] for name in ("task_id", "worker_id", "error")})


class InvalidSaga(ForebayError, TypeError):
    """Saga {name!r} is invalid: {why}."""

    name: str
    why: str


class InvalidStep(ForebayError, ValueError):
    """Step {step!r} of a saga is invalid: {why}."""

    step: str
    why: str


class StepFailed(ForebayError):
    """Step {step!r} of saga {saga_id!r} failed; what its compensation covers is undone: {error}"""

    # It is raised again, from the log, when the saga goes on in another process; so `error` is a text.

    saga_id: str
    step: str
    error: str


class SagaCompensated(ForebayError):
    """Saga {saga_id!r} failed, and all its effects are undone. {error}"""

    saga_id: str
    error: str


class SagaParked(ForebayError):
    """Saga {saga_id!r} is parked, and waits for a person: {why}. `forebay saga show` has its steps, and what to do."""

    saga_id: str
    why: str


class SagaTaken(ForebayError):
    """Saga {saga_id!r} goes on in another process, which has taken it because the lease of this one had expired."""

    saga_id: str


class QuorumNotReached(ForebayError):
    """A fan-out needs {quorum} successes, and {failed} of its {total} tasks have not succeeded. The others were
    cancelled. Ask for fewer, or give it retry=Retry(...).
    """

    quorum: int
    total: int
    failed: int


class InvalidResult(ForebayError, ValueError):
    """Worker {worker_id!r} returned a value that is not a valid {type}, the type that is declared for the results of
    task type {task_type!r}: at {path}: {why}.
    """

    worker_id: str
    task_type: str
    path: str
    why: str


class ResultUnavailable(ForebayError):
    """Task {task_id!r} succeeded, but its value is not available: {error}."""

    task_id: str
    error: str


class TaskCancelled(TaskFailed):
    """Task {task_id!r} was cancelled ({error})."""


class TaskTimedOut(ForebayError, TimeoutError):
    """Task {task_id!r} ran out of time on worker {worker_id!r}: {error}."""

    task_id: str
    worker_id: str | None
    error: str | None


class TaskExpired(TaskTimedOut):
    """Task {task_id!r} expired: {error}."""
