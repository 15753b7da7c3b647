"""The link of one upstream in one process to the store of its ledgers: which exchanges are made, and when."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakValueDictionary

from forebay import clock
from forebay._fork import reset_in_child
from forebay.events import log
from forebay.upstream.shared.leases.exchange_loop import ExchangeLoop, open_exchange_loop
from forebay.upstream.shared.leases.lease import LedgerLease
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest
from forebay.upstream.shared.stores.store import LedgerStore

_BATCH: Final = 100  # exchanges that are made together
_GAIN: Final = 0.1  # weight of the newest exchange in the mean of their times
_FIRST_TIME: Final = 0.01  # seconds that an exchange is taken to last before the first
_REPORT_AFTER: Final = 1.0  # seconds of failures after which one is logged
_RETRY: Final = (0.05, 1.0)  # seconds until a failed exchange is repeated: at first, and at most

Batch = Sequence[tuple[LedgerLease, ExchangeRequest]]


class LedgerLink:
    """The link of one upstream in this process to its ledgers. Safe to use from any thread, and from any event loop.

    Exchanges are made by an `ExchangeLoop`, which has a thread of its own, or timers of the event loop if that keeps
    virtual time. One is under way at a time; what becomes due meanwhile goes together with the next one.

    Args:
        store: that keeps the ledgers.
        name: of the upstream, for messages.

    Attributes:
        member: the id of this process in all ledgers of the upstream.
        where: names the store in messages.
        exchange_time: seconds that an exchange takes, as a moving mean.
        settling_until: until then other processes may have other settings, since they are being changed.
    """

    def __init__(self, store: LedgerStore, name: str) -> None:
        self.store = store
        self.where = store.where
        self._name = name
        self.settling_until = -math.inf
        self._leases: WeakValueDictionary[str, LedgerLease] = WeakValueDictionary()
        self._reset()
        reset_in_child(self)

    def _reset(self) -> None:
        self.member = clock.new_id()
        self.next_sequence = itertools.count(1).__next__
        self.exchange_time = _FIRST_TIME
        self._lock = threading.Lock()
        self._scheduled: dict[str, LedgerLease] = {}  # those that have something to exchange, some day
        self._waiters: dict[Callable[[], None], None] = {}
        self._loop: ExchangeLoop | None = None
        self._planned = math.inf  # when the loop looks next
        self._failed_at = math.inf  # when the first of the latest exchanges failed
        self._suspension_then = 0.0  # see `clock.suspension`
        self._retry_at = -math.inf
        self._retry_delay = _RETRY[0]
        self._error: BaseException | None = None
        self._is_reported = False
        self._closing = False

    def reset_after_fork(self) -> None:
        """See `ForkAware`. The child is a new member, which holds nothing."""
        self.store.reset_after_fork()
        self._reset()
        for lease in list(self._leases.values()):
            lease.lock = threading.RLock()
            lease.reset()

    # --- leases ---

    def lease(self, key: str, make: Callable[[], LedgerLease]) -> LedgerLease:
        """Return the lease on a ledger, made if there is none. There is never more than one."""
        with self._lock:
            if (lease := self._leases.get(key)) is None:
                lease = self._leases[key] = make()
            return lease

    def schedule(self, lease: LedgerLease) -> None:
        """See `ExchangeLink`."""
        with self._lock:
            self._scheduled[lease.key] = lease
            if lease.due >= self._planned or self._closing:
                return
            self._planned = lease.due
            if self._loop is None or not self._loop.is_alive():
                self._loop = open_exchange_loop(self)
            loop = self._loop
        loop.wake()

    def add_waiter(self, look: Callable[[], None]) -> None:
        """Call `look` once after the next exchange."""
        self._waiters[look] = None

    def wait_until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Block until a condition holds after an exchange, or one fails; for some seconds at most.

        No lock may be held, and no event loop may run in this thread.
        """
        give_up = clock.monotonic() + seconds
        while (left := give_up - clock.monotonic()) > 0.0:
            exchanged = threading.Event()
            self.add_waiter(exchanged.set)
            if holds() or self.is_failing():
                return
            exchanged.wait(left)

    def is_failing(self) -> bool:
        """See `ExchangeLink`."""
        return self._error is not None

    def failing_since(self) -> float:
        """See `ExchangeLink`. As a lease does, it counts the time for which the machine was suspended since."""
        if self._failed_at == math.inf:
            return math.inf
        return self._failed_at - (clock.suspension() - self._suspension_then)

    def describe_failure(self) -> str:
        """See `ExchangeLink`."""
        return str(self._error)

    # --- exchanges: one thread at a time ---

    def next_due(self) -> float:
        """Return when the next exchange is to be made; infinity if none is."""
        with self._lock:
            due = min((lease.due for lease in self._scheduled.values()), default=math.inf)
            self._planned = max(due, self._retry_at) if due < math.inf else due
            return self._planned

    def collect(self, now: float) -> Batch:
        """Return the exchanges that are due."""
        with self._lock:
            due = [lease for lease in self._scheduled.values() if lease.due <= now][:_BATCH]
        return [(lease, lease.prepare(now)) for lease in due]

    def deliver(self, started: float, batch: Batch, replies: Sequence[ExchangeReply]) -> None:
        """Use the replies to a batch that was sent at `started`."""
        now = clock.now()
        if self._is_reported:
            log.warning("the store of %r at %s is back, after %.1f s", self._name, self.where, now - self._failed_at)
            self._is_reported = False
        self._error, self._failed_at, self._retry_at, self._retry_delay = None, math.inf, -math.inf, _RETRY[0]
        self.exchange_time += _GAIN * (now - started - self.exchange_time)
        for (lease, request), reply in zip(batch, replies, strict=True):
            lease.apply(now, request, reply)
        self._forget()
        self._wake(batch)

    def fail(self, batch: Batch, error: BaseException) -> None:
        """Repeat a batch that was not answered, after a while."""
        now = clock.now()
        if self._error is None:
            self._failed_at, self._suspension_then = now, clock.suspension()
        if now - self._failed_at >= _REPORT_AFTER and not self._is_reported:
            self._is_reported = True
            log.warning(
                "the store of %r fails: %s. Processes that have used it keep their fair share of the account meanwhile",
                self._name,
                str(error).rstrip("."),
            )
        self._error = error
        self._retry_at = now + self._retry_delay * (0.5 + 0.5 * clock.draw())
        self._retry_delay = min(_RETRY[1], 2 * self._retry_delay)
        self._wake(batch)

    def _wake(self, batch: Batch) -> None:
        """Let the calls that wait look at what has changed."""
        waiters, self._waiters = self._waiters, {}
        for lease, _ in batch:
            lease.wake()
        for look in waiters:
            look()

    def _forget(self) -> None:
        """Drop the leases that have nothing to exchange any more."""
        with self._lock:
            for key in [key for key, lease in self._scheduled.items() if lease.is_forgettable()]:
                del self._scheduled[key]

    # --- the end ---

    def begin_close(self) -> ExchangeLoop | None:
        """Let the loop leave all ledgers, and end; return it. No lease is exchanged after that."""
        self._closing = True
        if (loop := self._loop) is not None:
            loop.close()
        return loop

    def leave(self) -> None:
        """Leave all ledgers: what is held is free for others at once. In the thread of the loop."""
        for _ in range(2):  # a request that was not answered goes first
            now = clock.now()
            leases = [lease for lease in list(self._scheduled.values()) if lease.close()]
            batch = [(lease, lease.prepare(now)) for lease in leases]
            for start in range(0, len(batch), _BATCH):
                part = batch[start : start + _BATCH]
                replies = self.store.exchange([request for _, request in part])
                for (lease, request), reply in zip(part, replies, strict=True):
                    lease.apply(now, request, reply)
        self.store.close()
