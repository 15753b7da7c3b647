"""What is handed in and what comes back: Task, its deadline and estimate, TaskResult."""

from __future__ import annotations

import math
from enum import Enum, IntEnum
from typing import Any

import msgspec

from forebay import clock
from forebay.errors import DeadlinePassed, InvalidDeadline, InvalidEstimate, InvalidTask, InvalidTimeout


class Priority(IntEnum):
    """How much a task matters; a lower number goes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class Verdict(Enum):
    """The decision at the door."""

    ADMITTED = "admitted"
    SPILLED = "spilled"
    REJECTED = "rejected"


class TaskStatus(Enum):
    """Where a task is. The last five are final: every task that was not rejected ends in exactly one of them."""

    WAITING = "waiting"
    RUNNING = "running"
    SPILLED = "spilled"
    REJECTED = "rejected"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        """Whether it stays so."""
        return self not in _UNDER_WAY


_UNDER_WAY = frozenset({TaskStatus.WAITING, TaskStatus.RUNNING, TaskStatus.SPILLED})


class Deadline(msgspec.Struct, frozen=True, order=True):
    """When a result becomes worthless: absolute, in epoch seconds, so that it can travel and be stored.

    Raises:
        InvalidDeadline: `at` is not a finite number.
    """

    at: float

    def __post_init__(self) -> None:
        if not isinstance(self.at, int | float) or not math.isfinite(self.at):
            raise InvalidDeadline(value=self.at)

    @classmethod
    def within(cls, seconds: float) -> Deadline:
        """The deadline `seconds` from now.

        Raises:
            InvalidDeadline: `seconds` is not a positive, finite number.
        """
        if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise InvalidDeadline(value=seconds)
        return cls(clock.wall_time() + seconds)

    def remaining(self) -> float:
        """Seconds until it passes; negative once it has."""
        return self.at - clock.wall_time()


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What one run is expected to ask of its upstreams. Where absent, it is learned per task type.

    Raises:
        InvalidEstimate: a figure is negative or not a whole number.
    """

    calls: int = 1
    input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InvalidEstimate(field=field, value=value)


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a task may be given by name."""

    task_id: str = msgspec.field(default_factory=clock.new_id)
    priority: Priority = Priority.NORMAL
    timeout: float | None = None
    deadline: Deadline | None = None
    spill: bool = True
    durable: bool = False
    key: str | None = None
    tenant: str = "default"
    thread_id: str | None = None
    estimate: Estimate | None = None


class Task(_Options, frozen=True):
    """One unit of agent work.

    Attributes:
        task_type: which workers may run it.
        payload: what the handler works on; an agent of a framework gets it as its own input.
        task_id: unique; made if not given.
        priority: who goes first, and who is refused last.
        timeout: seconds that one attempt may run; by default the worker's.
        deadline: when its result becomes worthless; covers waiting.
        spill: whether it may wait outside, in the overflow. False means now or never.
        durable: recorded before it is admitted, so that it survives its process.
        key: idempotency key: the same key is the same work, in this process; and wherever the overflow is shared, for
            work that is spilled or durable.
        tenant: on whose behalf.
        thread: one run at a time per thread (a conversation); also LangGraph's ``thread_id``.
        estimate: what it will ask of its upstreams.

    Raises:
        InvalidTask, InvalidTimeout, DeadlinePassed: a field cannot be meant.
    """

    task_type: str
    payload: Any = None

    def __post_init__(self) -> None:
        if self.deadline is not None:
            self._check_deadline(self.deadline)
        if self.timeout is not None and not _is_positive(self.timeout):
            raise InvalidTimeout(value=self.timeout)
        if type(self.priority) is not Priority:
            self._set_priority()
        if (
            not self.task_type
            or type(self.task_type) is not str
            or type(self.task_id) is not str
            or not self.task_id
            or type(self.tenant) is not str
            or not self.tenant
            or self.key is not None
            or self.thread_id is not None
            or self.estimate is not None
        ):
            self._check_names()

    def _check_deadline(self, deadline: Deadline) -> None:
        if not isinstance(deadline, Deadline):
            raise InvalidTask(field="deadline", value=deadline, expected="a Deadline, for example Deadline.within(60)")
        if (remaining := deadline.remaining()) <= 0:
            raise DeadlinePassed(task_id=self.task_id, late=-remaining)

    def _set_priority(self) -> None:
        try:
            msgspec.structs.force_setattr(self, "priority", Priority(self.priority))
        except ValueError:
            expected = "a Priority: CRITICAL, HIGH, NORMAL or LOW"
            raise InvalidTask(field="priority", value=self.priority, expected=expected) from None

    def _check_names(self) -> None:
        for field in ("task_type", "task_id", "tenant", "key", "thread_id"):
            value = getattr(self, field)
            if value is None and field in ("key", "thread_id"):
                continue
            if not isinstance(value, str) or not value:
                raise InvalidTask(field=field, value=value, expected="a non-empty string")
        if self.estimate is not None and not isinstance(self.estimate, Estimate):
            raise InvalidTask(field="estimate", value=self.estimate, expected="an Estimate")

    def __repr__(self) -> str:  # never the payload
        return f"Task({self.task_type!r}, task_id={self.task_id!r}, priority={self.priority.name})"


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended.

    Attributes:
        task_id: whose result this is.
        worker_id: the worker that ran it last; None if none did.
        success: whether it succeeded.
        status: how it ended.
        result: the handler's value if it succeeded.
        error: if it did not succeed, what happened, as ``"ValueError: ..."``; or why its value cannot be stored.
        duration_ms: milliseconds that the last attempt ran.
        attempts: starts of the handler.
        cause: the handler's exception, where the task ran in this process; ResultNotKept if it succeeded and its value
            cannot be had, `result` being None then.
    """

    task_id: str
    worker_id: str | None
    success: bool
    status: TaskStatus
    result: Any = None
    error: str | None = None
    duration_ms: float = 0.0
    attempts: int = 0
    cause: BaseException | None = None


def _is_positive(seconds: object) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf
