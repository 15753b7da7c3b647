"""The spend log of a process: it adds up what calls cost, and a thread writes that to a file in groups."""

from __future__ import annotations

import asyncio
import atexit
import sqlite3
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from forebay import clock
from forebay._fork import close_at_fork, reset_in_child
from forebay._threads import DaemonThreadExecutor
from forebay.errors import ForebayError, InvalidOverflowUrl, InvalidSpendLogUrl, StoreUnavailable
from forebay.events import log
from forebay.spend_log.spend_file import SpendFile
from forebay.spend_log.spend_record import AlertPlace, GivenAlert, SpendAmounts, SpendLabels
from forebay.spend_log.spent_totals import SpentTotals, places_of
from forebay.spend_log.unwritten_spend import UnwrittenSpend
from forebay.storage import Fsync, parse_url
from forebay.storage.shown_url import shown_url

_GROUP_WAIT: Final = 0.05  # seconds that what was spent waits for more, to be written together
_FIRST_RETRY: Final = 1.0  # seconds after a write that failed; it doubles
_MAX_RETRY: Final = 30.0  # seconds
_TIDY_INTERVAL: Final = 86_400.0  # seconds
_FORMS: Final = "sqlite:///spend.db, sqlite:////absolute/spend.db (?fsync=yes, checkpoint or no)"
_BUDGETS: Final = ("budget", "tenant_budget", "task_budget")
_FORK_PATIENCE: Final = 10.0  # seconds that a fork waits for a write to end: longer than one takes

_inherited: list[SpendFile] = []  # of the parent of a forked process, which may not even close them


class SpendLogUrl(NamedTuple):
    """The file of a spend log, as a user named it."""

    path: Path
    fsync: Fsync


def parse_spend_log(url: str) -> SpendLogUrl:
    """Return the file that the URL of a spend log names.

    Raises:
        InvalidSpendLogUrl: it is not ``sqlite:///relative.db`` or ``sqlite:////absolute.db``, or an option is unknown.
    """
    if not isinstance(url, str):
        raise InvalidSpendLogUrl(url=type(url).__name__, why="it is not a text", forms=_FORMS)
    try:
        store = parse_url(url)
    except InvalidOverflowUrl as error:
        raise InvalidSpendLogUrl(url=shown_url(url), why=error.why, forms=_FORMS) from None
    if store.path is None:
        why = f"a spend log is a SQLite file, and this names a store of kind {store.scheme!r}"
        raise InvalidSpendLogUrl(url=f"{store.scheme}://", why=why, forms=_FORMS)
    if "bound" in dict(parse_qsl(urlsplit(url).query, keep_blank_values=True)):
        raise InvalidSpendLogUrl(url=shown_url(url), why="bound is an option of an overflow", forms=_FORMS)
    return SpendLogUrl(store.path, store.fsync)


class SpendLog:
    """A record of what calls cost, in a SQLite file, from which budgets go on after a restart.

    What calls cost is added up by hour (UTC), upstream, tenant, model and key, and written behind them by a thread, in
    groups of 50 ms. A process that is killed loses what its last group did not have. A file that cannot be written
    costs no call: that is logged, and what is spent is kept in memory, added up, and written once that is possible.

    Several upstreams, and several processes of one machine, may write to one file: it has their sum. Each process
    begins with the sum, and counts its own calls from then on. Safe to use from any thread.

    Args:
        url: ``"sqlite:///relative.db"`` or ``"sqlite:////absolute.db"``, with ``?fsync=yes|checkpoint|no``.

    Raises:
        InvalidSpendLogUrl: the URL is invalid.
    """

    def __init__(self, url: str) -> None:
        self._url = parse_spend_log(url)
        self._lock = threading.Lock()  # over what is in memory; held for moments
        self._file_lock = threading.Lock()  # over the file; held while it is written
        self._file: SpendFile | None = None
        self._unwritten = UnwrittenSpend()
        self._totals = SpentTotals()
        self._alerts: dict[AlertPlace, GivenAlert] = {}
        self._executor = DaemonThreadExecutor("forebay-spend-log", max_threads=1)
        self._hurry = threading.Event()  # set: the thread waits for nothing any more
        self._scheduled = False  # a write will come
        self._scheduled_in: asyncio.AbstractEventLoop | None = None  # the virtual loop that will make it
        self._failed = False  # the last write
        self._tidied_at = 0.0  # epoch seconds
        self._opened = False
        self._closed = False
        reset_in_child(self)
        close_at_fork(self)

    def __repr__(self) -> str:
        return f"SpendLog({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The file."""
        return self._url.path

    def open(self) -> None:
        """Open the file, and read what is spent in the present periods. It blocks, for milliseconds. Idempotent.

        Raises:
            StoreUnavailable: the file cannot be opened or read; the message says why and what to do.
        """
        if self._opened:  # without the lock, which is held while the file is written
            return
        with self._file_lock:
            now = clock.wall_time()
            self._file = SpendFile(*self._url)
            try:
                self._tidy(self._file, now)
                totals, alerts = self._file.load(now)
            except BaseException:
                self._close_file()
                raise
            with self._lock:
                self._totals, self._alerts = totals, alerts
                self._opened, self._closed = True, False
                self._hurry.clear()
        atexit.register(_close_at_exit, weakref.ref(self))

    def close(self) -> None:
        """Write what is not written, and close the file. It blocks. Idempotent.

        If the file cannot be written, that is logged, and what it lacks is lost.
        """
        if not self._opened:
            return
        self._closed = True
        self._hurry.set()
        if not self.flush():
            log.error("the spend log %s is closed without what could not be written to it", self.path)
        with self._file_lock:
            self._close_file()
            self._opened = False
            self._executor.shutdown(wait=False)
            self._executor = DaemonThreadExecutor("forebay-spend-log", max_threads=1)

    def flush(self) -> bool:
        """Write what is not written, and return whether that succeeded. It blocks, for up to 5 seconds.

        For tests, and for programs that end in a way that runs no ``atexit`` function.
        """
        return self._write()

    def record(self, labels: SpendLabels, amounts: SpendAmounts, task_id: str | None = None) -> None:
        """Record what a call has cost, or by negative amounts that it cost less than was recorded. It does not block.

        Args:
            labels: of the call.
            amounts: of the call.
            task_id: the task whose budget it was spent from, if it has one.
        """
        upstream, hour, usd = labels.upstream, labels.hour, amounts.usd
        with self._lock:
            self._unwritten.add(labels, amounts, task_id)
            for place in places_of(upstream, labels.tenant, labels.key):
                self._totals.add(place, hour, usd)
            if task_id is not None:
                self._totals.add((upstream, "task_budget", task_id), hour, usd)
            self._schedule()

    def record_alert(self, place: AlertPlace, given: GivenAlert) -> None:
        """Record that an alert was given, so that it is not given again after a restart. It does not block."""
        with self._lock:
            self._alerts[place] = given
            self._unwritten.add_alert(place, given)
            self._schedule()

    def spent(self, place: AlertPlace, per: str | None, now: float) -> float:
        """Return the dollars spent from a budget in its present period, by the file and by this process since.

        Args:
            place: of the budget.
            per: the period of the budget.
            now: epoch seconds.
        """
        with self._lock:
            return self._totals.spent((place.upstream, place.budget, place.subject), per, now)

    def alerted(self, place: AlertPlace, period: float) -> float:
        """Return the highest share of a budget that an alert was given for in a period; 0.0 for none."""
        with self._lock:
            given = self._alerts.get(place)
        return given.share if given is not None and given.period == period else 0.0

    def reset_after_fork(self) -> None:
        """See `ForkAware`. What the parent has not written, it writes; the child opens the file for itself."""
        self._lock, self._file_lock = threading.Lock(), threading.Lock()
        self._hurry = threading.Event()
        self._executor = DaemonThreadExecutor("forebay-spend-log", max_threads=1)
        self._unwritten = UnwrittenSpend()
        self._scheduled, self._scheduled_in = False, None
        if self._file is not None:  # a write did not end in time
            _inherited.append(self._file)
            self._file = None

    def close_before_fork(self) -> bool:
        """See `HoldsFile`."""
        if not self._file_lock.acquire(timeout=_FORK_PATIENCE):
            return False
        with suppress(sqlite3.Error):
            self._close_file()
        return True

    def go_on_after_fork(self) -> None:
        """See `HoldsFile`."""
        self._file_lock.release()

    # --- writing ---

    def _schedule(self) -> None:
        """Let what is unwritten be written soon. Called under the lock."""
        if self._scheduled and (self._scheduled_in is None or not self._scheduled_in.is_closed()):
            return
        loop = clock.running_virtual_loop()
        self._scheduled, self._scheduled_in = True, loop
        if loop is not None:  # it has no threads: what blocks is done at once
            loop.call_later(_GROUP_WAIT, self._write_in, loop)
            return
        try:
            self._executor.submit(self._write_groups)
        except RuntimeError:  # the interpreter is shutting down: what is unwritten is written at its exit
            self._scheduled = False

    def _write_in(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._scheduled, self._scheduled_in = False, None
        loop.run_in_executor(self._executor, self._write)

    def _write_groups(self) -> None:
        """Write until nothing is left. It runs in the thread of the log."""
        wait = _GROUP_WAIT
        while True:
            self._hurry.wait(wait)
            wait = _GROUP_WAIT if self._write() else min(_MAX_RETRY, max(_FIRST_RETRY, 2 * wait))
            with self._lock:
                if not self._unwritten or self._closed:
                    self._scheduled = False
                    return

    def _write(self) -> bool:
        """Write what is unwritten, and return whether that succeeded."""
        with self._file_lock:
            with self._lock:
                if not self._unwritten:
                    return True
                batch = self._unwritten.take()
            try:
                self._open_file().write(batch)
            except BaseException as error:
                with self._lock:
                    self._unwritten.return_batch(batch)
                if not isinstance(error, Exception):
                    raise
                self._report_failure(error)
                return False
            if self._failed:
                self._failed = False
                log.warning("the spend log %s can be written again, and has all that was spent meanwhile", self.path)
            self._tidy_if_due()
        return True

    def _open_file(self) -> SpendFile:
        """Return the open file; it is opened again if it was removed, or if this process was forked.

        Raises:
            StoreUnavailable: it cannot be opened.
        """
        if self._file is not None and (change := self._file.find_change()) is not None:
            log.error("the spend log %s begins again without what it had: %s", self.path, change)
            self._close_file()
        if self._file is None:
            self._file = SpendFile(*self._url)
        return self._file

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _report_failure(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            log.error(
                "the spend log cannot be written; calls go on, and what they cost is kept in memory until it can: %s",
                error,
                exc_info=None if isinstance(error, ForebayError) else error,
            )

    def _tidy_if_due(self) -> None:
        now = clock.wall_time()
        if self._file is None or now < self._tidied_at + _TIDY_INTERVAL:
            return
        try:
            self._tidy(self._file, now)
        except StoreUnavailable as error:
            log.warning("the spend log %s was not tidied: %s", self.path, error)

    def _tidy(self, file: SpendFile, now: float) -> None:
        self._tidied_at = now
        file.tidy(now)


def _close_at_exit(reference: weakref.ref[SpendLog]) -> None:
    spend_log = reference()
    if spend_log is not None:
        spend_log.close()
