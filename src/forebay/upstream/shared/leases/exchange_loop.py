"""The loops that make the exchanges of a link: a thread of its own, or, in virtual time, timers of the event loop."""

from __future__ import annotations

import asyncio
import atexit
import math
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Protocol
from weakref import ReferenceType, WeakSet, ref

from forebay import clock
from forebay.upstream.shared.leases.lease import LedgerLease
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest
from forebay.upstream.shared.stores.store import LedgerStore

_LONGEST_WAIT: Final = 60.0  # seconds
_END_PATIENCE: Final = 2.0  # seconds that the end of the process waits for the last exchange

Batch = Sequence[tuple[LedgerLease, ExchangeRequest]]


class ExchangeSchedule(Protocol):
    """The part of a `LedgerLink` that an exchange loop uses. See there."""

    store: LedgerStore

    def next_due(self) -> float:
        """Return when the next exchange is to be made; infinity if none is."""

    def collect(self, now: float) -> Batch:
        """Return the exchanges that are due."""

    def deliver(self, started: float, batch: Batch, replies: Sequence[ExchangeReply]) -> None:
        """Use the replies."""

    def fail(self, batch: Batch, error: BaseException) -> None:
        """Note that a batch was not answered."""

    def leave(self) -> None:
        """Leave all ledgers."""


class ExchangeLoop(Protocol):
    """Makes the exchanges of one link, one after the other, when they are due."""

    def is_alive(self) -> bool:
        """Return whether it still makes exchanges."""

    def wake(self) -> None:
        """Look again: an exchange is due earlier. From any thread."""

    def close(self) -> None:
        """Leave all ledgers, and end. From any thread, also while it collects garbage."""


def open_exchange_loop(link: ExchangeSchedule) -> ExchangeLoop:
    """Return what makes the exchanges of a link from now on."""
    loop = clock.running_virtual_loop()
    return ExchangeThread(link) if loop is None else ExchangeTimers(link, loop)


class ExchangeThread:
    """A daemon thread that makes the exchanges. It keeps neither its link nor the process alive."""

    def __init__(self, link: ExchangeSchedule) -> None:
        self._link = ref(link)
        self._closing: ExchangeSchedule | None = None  # the link, so that it can leave although nobody uses it any more
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()  # `put` may be called while garbage is collected
        self._thread = threading.Thread(target=self._run, name="forebay-shared-account", daemon=True)
        self._thread.start()
        _threads.add(self)

    def is_alive(self) -> bool:
        """See `ExchangeLoop`."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """See `ExchangeLoop`."""
        self._woken.put(None)

    def close(self) -> None:
        """See `ExchangeLoop`."""
        self._closing = self._link()
        self._woken.put(None)

    def join(self) -> None:
        """Wait for its end, but not for long."""
        self._thread.join(_END_PATIENCE)

    def _run(self) -> None:
        while self._closing is None and (seconds := _make_due_exchanges(self._link)) is not None:
            with suppress(queue.Empty):
                self._woken.get(timeout=min(seconds, _LONGEST_WAIT))
            while not self._woken.empty():
                self._woken.get()
        link, self._closing = self._closing, None
        if link is not None:
            with suppress(Exception):  # what is held comes back when its lease ends
                link.leave()


def _make_due_exchanges(reference: ReferenceType[ExchangeSchedule]) -> float | None:
    """Make the exchanges that are due; return the seconds until the next one, or None if the link is gone."""
    link = reference()
    if link is None:
        return None
    while (seconds := link.next_due() - clock.now()) <= 0.0:
        started = clock.now()
        batch = link.collect(started)
        try:
            replies = link.store.exchange([request for _, request in batch])
        except Exception as error:  # noqa: BLE001 - a store may fail in any way: it is tried again
            link.fail(batch, error)
        else:
            link.deliver(started, batch, replies)
    return seconds


_threads: Final[WeakSet[ExchangeThread]] = WeakSet()


def _close_all() -> None:
    """Leave all ledgers at the end of the process, so that what it holds is free at once."""
    threads = [thread for thread in list(_threads) if thread.is_alive()]
    for thread in threads:
        thread.close()
    for thread in threads:
        thread.join()


atexit.register(_close_all)


class ExchangeTimers:
    """The timers of an event loop in virtual time, which makes the exchanges."""

    def __init__(self, link: ExchangeSchedule, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._when = math.inf
        self._is_busy = False
        self._is_open = True

    def is_alive(self) -> bool:
        """See `ExchangeLoop`."""
        return self._is_open and not self._loop.is_closed()

    def wake(self) -> None:
        """See `ExchangeLoop`."""
        if not self._is_busy and self._is_open:
            when = self._link.next_due()
            if when < self._when:
                self._set_timer(when)

    def close(self) -> None:
        """See `ExchangeLoop`. A process that ends in virtual time is one that is killed."""
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._when = when
        if when < math.inf:
            self._timer = self._loop.call_at(when, self._begin)

    def _begin(self) -> None:
        self._timer, self._when = None, math.inf
        started = self._loop.time()
        if not self._is_open or self._link.next_due() > started:
            self.wake()
            return
        batch = self._link.collect(started)
        self._is_busy = True
        job = self._loop.run_in_executor(None, self._link.store.exchange, [request for _, request in batch])
        job.add_done_callback(partial(self._end, started, batch))

    def _end(self, started: float, batch: Batch, job: asyncio.Future[Sequence[ExchangeReply]]) -> None:
        self._is_busy = False
        if job.cancelled() or not self._is_open:
            return
        if (error := job.exception()) is not None:
            self._link.fail(batch, error)
        else:
            self._link.deliver(started, batch, job.result())
        self.wake()
