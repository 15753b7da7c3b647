"""Tasks and their results: Task, with its priority, deadline and estimate; TaskResult, with its status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Never, overload

import msgspec

from forebay import clock
from forebay._json import JsonStruct, plain_field, plain_value
from forebay._renamed import renamed
from forebay._validate import is_positive, is_whole
from forebay.call_usage import NO_USAGE, CallUsage
from forebay.errors import DeadlinePassed, InvalidDeadline, InvalidEstimate, InvalidTask, InvalidTimeout
from forebay.retry import Retry

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ResultT_co = TypeVar("ResultT_co", covariant=True, default=Any)  # so that a plain Task is a Task[Any]
else:
    from typing import TypeVar

    ResultT_co = TypeVar("ResultT_co", covariant=True)

DEFAULT_TENANT = "default"


class Priority(IntEnum):
    """The importance of a task; a lower number goes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class Verdict(Enum):
    """The decision of admission control on a task."""

    ADMITTED = "admitted"
    SPILLED = "spilled"
    REJECTED = "rejected"


class TaskStatus(Enum):
    """The state of a task. The last five are final: every task that was not rejected ends in exactly one of them.

    UNKNOWN is a ticket whose task ended in another process and left no result, or of which the overflow gave no answer.
    """

    WAITING = "waiting"
    RUNNING = "running"
    SPILLED = "spilled"
    REJECTED = "rejected"
    UNKNOWN = "unknown"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        """True if a task never leaves this status."""
        return self not in _NOT_FINAL


_NOT_FINAL = frozenset({TaskStatus.WAITING, TaskStatus.RUNNING, TaskStatus.SPILLED})


class Deadline(msgspec.Struct, frozen=True, order=True, dict=True):
    """The time after which a result is worthless: absolute, in epoch seconds, so that it can be sent and stored.

    Its remaining time is measured from when this object was made, and not by the wall clock, which may be set.

    Raises:
        InvalidDeadline: `at` is not a finite number.
    """

    at: float

    def __post_init__(self) -> None:
        if not isinstance(self.at, int | float) or not math.isfinite(self.at):
            raise InvalidDeadline(value=self.at)
        # No field: it means nothing to another process. By `clock.now`, and the loop whose virtual time that is.
        self.__dict__["due"] = clock.now() + (self.at - clock.wall_time()), clock.running_virtual_loop()

    @classmethod
    def within(cls, seconds: float) -> Deadline:
        """Return the deadline `seconds` from now.

        Raises:
            InvalidDeadline: `seconds` is not a positive, finite number.
        """
        if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise InvalidDeadline(value=seconds)
        return cls(clock.wall_time() + seconds)

    def remaining(self) -> float:
        """Return the seconds until it passes; negative once it has passed."""
        due, loop = self.__dict__.get("due", (0.0, self))
        if clock.running_virtual_loop() is not loop:  # it was made in another time, or is a copy
            return self.at - clock.wall_time()
        return float(due - clock.now())

    def by_wall_clock(self) -> float:
        """Return the epoch seconds at which it passes by the clock as it is set now, for another process."""
        at = clock.wall_time() + self.remaining()
        return at if abs(at - self.at) > _CLOCK_STEP else self.at


_CLOCK_STEP = 1.0  # seconds; clocks that drift apart by less were not set


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The calls and LLM tokens that one run is expected to need: the size of a task.

    Only the proportions between tasks of a type matter, and a figure that is not known may be left out of all of them.

    Raises:
        InvalidEstimate: a figure is negative or not a whole number.
    """

    calls: int = 1
    input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if not is_whole(value, 0):
                raise InvalidEstimate(field=field, value=value)


_MAX_NAME = 1_024  # characters of each text that names the task, its type, key, tenant or conversation
_POSITIONAL = 2  # task_type and payload

# Names of arguments in an earlier Forebay and in other supervisors, and what to pass instead.
_OTHER_NAMES = {
    "thread": "thread_id",
    "timeout_seconds": "timeout",
    "deadline_seconds": "pass deadline=Deadline.within(seconds)",
    "type": "task_type",
    "id": "task_id",
    "data": "payload",
    "eta": "not_before",
    "countdown": "pass not_before=time.time() + seconds",
    "delay": "pass not_before=time.time() + seconds",
}

ENQUEUE: Final = "enqueue"
ON_BUSY = (ENQUEUE, "reject", "interrupt")

_EARLIEST = 1e9  # epoch seconds, in 2001; a smaller not_before was meant as seconds from now


_make_struct = msgspec.StructMeta.__call__


class _TaskMeta(msgspec.StructMeta):
    """The metaclass of Task: it explains arguments that Task does not have; msgspec at most names them.

    A Struct is made in C, so there is no ``__init__`` to wrap.
    """

    if not TYPE_CHECKING:  # type checkers take the signature from the fields
        # `args` begins with the class: passing it on whole is a third cheaper than `super().__call__(*args, **kwargs)`.
        def __call__(*args: Any, **kwargs: Any) -> Any:
            try:
                return _make_struct(*args, **kwargs)
            except TypeError:
                explanation = _explain(args[1:], kwargs)
                if explanation is None:
                    raise
                raise TypeError(explanation) from None


def _explain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the arguments of a Task; None if it is not one of the usual mistakes."""
    for name in kwargs:
        if name in _OTHER_NAMES:
            return renamed("Task", name, _OTHER_NAMES[name])
    if len(args) > _POSITIONAL:
        return (
            f"Task takes two positional arguments, task_type and payload, and was given {len(args)}: pass the others by"
            ' name, such as Task("research", {"topic": "rivers"}, task_id="1", priority=Priority.HIGH)'
        )
    return None


class _Options(msgspec.Struct, frozen=True, kw_only=True, metaclass=_TaskMeta):
    """The arguments of Task that are passed by name."""

    task_id: str = msgspec.field(default_factory=clock.new_id)
    priority: Priority = Priority.NORMAL
    timeout: float | None = None
    deadline: Deadline | None = None
    spill: bool = True
    durable: bool = False
    key: str | None = None
    tenant: str = DEFAULT_TENANT
    thread_id: str | None = None
    estimate: Estimate | None = None
    retry: Retry | None = None
    not_before: float | None = None
    on_busy: Literal["enqueue", "reject", "interrupt"] = ENQUEUE


class Task(_Options, Generic[ResultT_co], frozen=True):
    """One unit of agent work.

    To a type checker, ``Task[Answer]("research", question)`` is a task whose handler returns an Answer: `run` returns
    that, and its ticket's `value` too. What a handler really returns is checked by ``register_worker(result=Answer)``.

    The texts `task_type`, `task_id`, `key`, `tenant` and `thread_id` have 1 to 1,024 characters.

    Attributes:
        task_type: selects the workers that may run it.
        payload: the input of the handler; an agent of a framework gets it as its own input.
        task_id: unique among the tasks that have not ended; generated if not given. An overflow keeps the ids of dead
            letters, and for a day those of ended tasks with a `key`, and stores no other task under one of them.
        priority: a task of a better priority is served earlier and rejected later.
        timeout: seconds that one attempt may run; by default the worker's.
        deadline: the time after which its result is worthless; waiting counts.
        spill: whether it may wait in the overflow. False: it is admitted now or rejected.
        durable: whether it is recorded before it is admitted, so that it survives its process.
        key: idempotency key. Tasks with the same key are the same work until it has ended without success: in this
            process, and, for spilled or durable work, wherever the overflow is shared.
        tenant: the customer, user or team that it belongs to.
        thread_id: the conversation that it belongs to; one task of a conversation runs at a time. Also LangGraph's
            ``thread_id``.
        estimate: the calls and tokens that it is expected to need. Whether it can meet its deadline is judged by tasks
            of its size then, and not by all of its type.
        retry: how failed attempts at it are retried, instead of the worker's `retry`. With an overflow, a task that may
            wait there cannot have a policy with `on`, which cannot be stored: give that to the worker.
        not_before: epoch seconds before which it does not start, for example ``time.time() + 60``. Until then it waits
            in the overflow, where it outlives its process if the overflow does; or, without one, in the supervisor,
            where it counts towards the bound of the queue and is cancelled when the supervisor drains.
        on_busy: what is done while another task of its `thread_id` waits or runs: ``"enqueue"``: it waits behind it;
            ``"reject"``: it is rejected; ``"interrupt"``: those that are in this supervisor are cancelled, and it is
            next.

    Raises:
        InvalidTask, InvalidTimeout, DeadlinePassed: an argument is invalid.
        TypeError: an argument is unknown or missing.
    """

    task_type: str
    payload: Any = None

    def __post_init__(self) -> None:
        if self.deadline is not None:
            self._check_deadline(self.deadline)
        if self.timeout is not None and not is_positive(self.timeout):
            raise InvalidTimeout(value=self.timeout)
        if type(self.priority) is not Priority:
            self._set_priority()
        task_type, task_id, tenant = self.task_type, self.task_id, self.tenant  # each is read once: a hot path
        if (
            not task_type
            or type(task_type) is not str
            or type(task_id) is not str
            or not task_id
            or type(tenant) is not str
            or not tenant
            or len(task_type) + len(task_id) + len(tenant) > _MAX_NAME
            or self.key is not None
            or self.thread_id is not None
            or self.estimate is not None
            or self.retry is not None
            or self.not_before is not None
            or self.on_busy != ENQUEUE
        ):
            self._check_names()

    def _check_deadline(self, deadline: Deadline) -> None:
        if not isinstance(deadline, Deadline):
            raise InvalidTask(field="deadline", value=deadline, expected="a Deadline, for example Deadline.within(60)")
        if (remaining := deadline.remaining()) <= 0:
            raise DeadlinePassed(task_id=self.task_id, late=-remaining)

    def _set_priority(self) -> None:
        expected = "a Priority: CRITICAL, HIGH, NORMAL or LOW"
        if self.priority == 0:  # the default of other systems and the best priority here, so probably a mistake
            expected += "; 0 would be CRITICAL, so write Priority.CRITICAL if you mean it, or leave it out for NORMAL"
            raise InvalidTask(field="priority", value=self.priority, expected=expected)
        try:
            msgspec.structs.force_setattr(self, "priority", Priority(self.priority))
        except ValueError:
            raise InvalidTask(field="priority", value=self.priority, expected=expected) from None

    def _check_names(self) -> None:
        for field in ("task_type", "task_id", "tenant", "key", "thread_id"):
            value = getattr(self, field)
            if value is None and field in ("key", "thread_id"):
                continue
            if not isinstance(value, str) or not value:
                raise InvalidTask(field=field, value=value, expected="a non-empty string")
            if len(value) > _MAX_NAME:
                expected = f"at most {_MAX_NAME:,} characters, and not {len(value):,}: it is kept beside the payload"
                raise InvalidTask(field=field, value=f"{value[:20]}...", expected=expected)
        if self.estimate is not None and not isinstance(self.estimate, Estimate):
            raise InvalidTask(field="estimate", value=self.estimate, expected="an Estimate")
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise InvalidTask(field="retry", value=self.retry, expected="a Retry, for example Retry(max_attempts=3)")
        if self.not_before is not None:
            self._check_not_before(self.not_before)
        if self.on_busy not in ON_BUSY:
            raise InvalidTask(field="on_busy", value=self.on_busy, expected='"enqueue", "reject" or "interrupt"')
        if self.on_busy != ENQUEUE and self.thread_id is None:
            expected = "that of the conversation which may be busy: on_busy says what is done then"
            raise InvalidTask(field="thread_id", value=None, expected=expected)

    def _check_not_before(self, not_before: float) -> None:
        if not is_positive(not_before) or not_before < _EARLIEST:
            expected = "epoch seconds, for example time.time() + 60, or .timestamp() of a datetime"
            raise InvalidTask(field="not_before", value=not_before, expected=expected)
        if self.deadline is not None and not_before >= self.deadline.at:
            expected = f"before its deadline, which is {self.deadline.at!r}"
            raise InvalidTask(field="not_before", value=not_before, expected=expected)

    def starts_in(self) -> float:
        """Return the seconds until its `not_before`; 0 if that has passed, or there is none."""
        return 0.0 if self.not_before is None else max(0.0, self.not_before - clock.wall_time())

    def __repr__(self) -> str:  # never the payload
        return f"Task({self.task_type!r}, task_id={self.task_id!r}, priority={self.priority.name})"


INTERRUPTS = "__interrupt__"  # the key of a result, a dict, that has what the graph asks: LangGraph's name


class Resume(msgspec.Struct, frozen=True):
    """The payload of a task that goes on with a conversation whose graph has asked something, and waits for the answer.

    The task has the `thread_id` of the one that was interrupted, and may run in any process.

    Attributes:
        value: the answer, which ``interrupt(...)`` returns in the graph.
        interrupt_id: the id of the interrupt that it answers, if several wait; None: the one that waits.
    """

    value: Any
    interrupt_id: str | None = None


if TYPE_CHECKING:

    class _ResultField:
        """The type of `TaskResult.result`: ``T | None`` of a ``TaskResult[T]``, and Any of a plain TaskResult.

        Any fits both overloads, of which type checkers make Any: who declares no types need not tell None apart.
        """

        @overload
        def __get__(self, owner: TaskResult[Never], kind: object) -> Any: ...
        @overload
        def __get__(self, owner: TaskResult[ResultT_co], kind: object) -> ResultT_co | None: ...
        def __get__(self, owner: TaskResult, kind: object) -> Any: ...
        def __set__(self, owner: TaskResult, value: Any) -> None: ...


class TaskResult(JsonStruct, Generic[ResultT_co], frozen=True, kw_only=True):
    """The outcome of a task.

    To a type checker, the `result` of a ``TaskResult[Answer]``, which a ``Task[Answer]`` ends in, is an Answer or None.

    Attributes:
        task_id: the task's id.
        worker_id: the worker that ran it last; None if none did.
        success: whether it succeeded.
        status: its final status.
        result: the handler's value if it succeeded.
        error: if it did not succeed, what happened, as ``"ValueError: ..."``; or why its value cannot be stored.
        duration_ms: milliseconds that the last attempt ran.
        attempts: starts of the handler.
        usage: calls, tokens and dollars of what its handler called through upstreams, in all attempts; zeros if it
            called none. The calls of nested tasks are in the results of those, so that each call is in one result.
        cause: the handler's exception, where the task ran in this process, unless the ticket was looked up after the
            end; ResultUnavailable if it succeeded and its value is not available, in which case `result` is None.
    """

    task_id: str
    worker_id: str | None
    success: bool
    status: TaskStatus
    if not TYPE_CHECKING:
        result: ResultT_co | None = None
    else:
        result: _ResultField = _ResultField()
    error: str | None = None
    duration_ms: float = 0.0
    attempts: int = 0
    usage: CallUsage = NO_USAGE
    cause: BaseException | None = None

    @property
    def interrupts(self) -> tuple[Any, ...]:
        """LangGraph's ``Interrupt`` objects, each with a ``value`` and an ``id``, if the graph waits for answers.

        Answer with a task whose payload is a `Resume`.
        """
        result = self.result
        return tuple(result.get(INTERRUPTS, ())) if isinstance(result, dict) else ()

    def as_dict(self, *, values: bool = True) -> dict[str, Any]:
        """Return it as plain data for JSON, without its cause.

        Args:
            values: whether the handler's value is in it, as ``result``. If JSON cannot hold it, that is None, and
                ``result_error`` says why.
        """
        fields = {
            "task_id": self.task_id,
            "worker_id": self.worker_id,
            "success": self.success,
            "status": self.status,
            "error": self.error,
            "duration_ms": self.duration_ms,
            "attempts": self.attempts,
            "usage": self.usage,
        }
        plain = {name: plain_field(value) for name, value in fields.items()}
        return plain | plain_value("result", self.result) if values else plain
