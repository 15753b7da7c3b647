"""Rules for tasks with deadlines that wait: the supervisor's own, and others put in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from unittest.mock import Mock, patch

from bench.queue.codel import CoDel
from forebay.admission import StandingQueue
from forebay.supervisor.admission_controller import AdmissionController
from forebay.supervisor.dispatcher import Dispatcher
from forebay.supervisor.pool import Pool
from forebay.supervisor.ticket import Ticket
from forebay.task import Priority, TaskStatus

_misses_deadline: Final = AdmissionController._misses_deadline  # noqa: SLF001 - what is compared is inside
_may_still_start: Final = Dispatcher._may_still_start  # noqa: SLF001
_arm_expiry: Final = Dispatcher.arm_expiry

Patch = contextlib.AbstractContextManager[object]


def _expiry_only() -> Patch:
    """Learn no times: a task is admitted while there is room, and ends at its deadline."""
    nothing = {"return_value": False}
    return patch.multiple(Pool, cannot_meet_deadline=Mock(**nothing), would_wait_too_long=Mock(**nothing))


def _strict() -> Patch:
    """Judge every queue as if it stood, whatever the waits were."""
    return patch.object(StandingQueue, "stands", lambda *_: True)


def _no_time_left(self: Dispatcher, ticket: Ticket) -> None:
    """End a task that waits and can hardly end in time any more."""
    pool, deadline = self._pools[ticket.task.task_type], ticket.deadline
    assert deadline is not None
    if pool.estimate_bypass.should_reject(
        self.loop.time(), needed=pool.service_times.optimistic(), remaining=deadline.remaining()
    ):
        self._end_waiting(ticket, TaskStatus.EXPIRED, "it can no longer end before its deadline")
    else:
        ticket.set_expiry(self._timers.at(self.loop.time() + deadline.remaining(), self._expire, ticket))


def _arm_early(self: Dispatcher, ticket: Ticket) -> None:
    if ticket.deadline is not None and ticket.expiry_timer is None:
        needed = self._pools[ticket.task.task_type].service_times.optimistic()
        due = self.loop.time() + max(0.0, ticket.deadline.remaining() - needed)
        ticket.set_expiry(self._timers.at(due, _no_time_left, self, ticket))


def _early() -> Patch:
    """End a waiting task as soon as what is left is less than the fastest quarter took."""
    return patch.object(Dispatcher, "arm_expiry", _arm_early)


class _Controlled:
    """CoDel by priority, in the dispatcher and the admission of one supervisor."""

    def __init__(self, *, rejects: bool) -> None:
        self._rejects = rejects
        self._by_priority: Mapping[Priority, CoDel] = {priority: CoDel() for priority in Priority}

    def may_still_start(self, dispatcher: Dispatcher, ticket: Ticket, pool: Pool) -> bool:
        """Observe the wait of a task whose turn has come, and perhaps drop it."""
        if ticket.deadline is not None and ticket.submitted_at is not None:
            codel, now = self._by_priority[ticket.task.priority], dispatcher.loop.time()
            time = ticket.deadline.at - ticket.submitted_at
            codel.observe(now, 1.0 - ticket.deadline.remaining() / time)
            if not self._rejects and codel.drops_head(now):
                dispatcher._end_waiting(ticket, TaskStatus.EXPIRED, "its queue stands")  # noqa: SLF001
                return False
        return _may_still_start(dispatcher, ticket, pool)

    def misses_deadline(
        self, admission: AdmissionController, ticket: Ticket, pool: Pool, worker: object, remaining: float
    ) -> bool:
        """Reject a task that would wait while its queue stands."""
        if self._rejects and worker is None and self._by_priority[ticket.task.priority].stands:
            return True
        return _misses_deadline(admission, ticket, pool, worker, remaining)  # type: ignore[arg-type]


@contextlib.contextmanager
def _codel(*, rejects: bool) -> Iterator[None]:
    control = _Controlled(rejects=rejects)

    def may_still_start(dispatcher: Dispatcher, ticket: Ticket, pool: Pool) -> bool:
        return control.may_still_start(dispatcher, ticket, pool)

    def misses_deadline(admission: AdmissionController, *arguments: Any) -> bool:
        return control.misses_deadline(admission, *arguments)

    with (
        patch.object(Dispatcher, "_may_still_start", may_still_start),
        patch.object(AdmissionController, "_misses_deadline", misses_deadline),
    ):
        yield


@contextlib.contextmanager
def _both(*parts: Callable[[], Patch]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part())
        yield


def _drops() -> Patch:
    return _codel(rejects=False)


def _rejects() -> Patch:
    return _codel(rejects=True)


OURS: Final = "expected wait, bursts"
POLICIES: Final[dict[str, Callable[[], Any]]] = {
    "expiry alone": _expiry_only,
    "CoDel drops": lambda: _both(_expiry_only, _drops),
    "CoDel rejects": lambda: _both(_expiry_only, _rejects),
    "expected wait": _strict,
    "expected wait, early": lambda: _both(_strict, _early),
    "expected wait, CoDel drops": lambda: _both(_strict, _drops),
    "expected wait, CoDel rejects": lambda: _both(_strict, _rejects),
    OURS: contextlib.nullcontext,
}
