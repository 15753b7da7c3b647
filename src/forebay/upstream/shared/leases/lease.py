"""The lease of one process on one ledger: its exchanges, and how long it may use what it holds."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from typing import Final, Protocol

from forebay import clock
from forebay._text import format_duration
from forebay.events import log
from forebay.upstream.call_request import Rejected
from forebay.upstream.shared.ledger.messages import (
    LEASE,
    LEASE_MARGIN,
    BudgetRequest,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    LimitRequest,
    QuotaRequest,
    SlotRequest,
)
from forebay.upstream.shared.ledger.observed_messages import ObservedRequest
from forebay.upstream.shared.ledger.rate_messages import RateRequest
from forebay.upstream.shared.ledger.stoppage_messages import StoppageRequest

SHARED_ACCOUNT: Final = "shared account"
"""The part of an account that a call waits for while its process asks the ledger, or cannot ask it."""

_HEARTBEAT: Final = 0.5  # seconds between exchanges of a process that has calls, or holds something
_SLOW_HEARTBEAT: Final = 1.5  # ... of one that has none
_CONFLICT_RETRY: Final = 1.0  # seconds
_SETTLING_RETRY: Final = 0.1  # ... of a process whose settings have just been changed
_SUSPENDED: Final = 0.001  # seconds, above the resolution of clocks
SETTLING: Final = 10.0
"""Seconds after a change of settings in which calls wait for processes that have the old ones yet."""


class ExchangeLink(Protocol):
    """The part of a `LedgerLink` that a lease uses.

    Attributes:
        member: the id of this process in all its ledgers.
        where: names the store in messages.
        exchange_time: seconds that an exchange takes.
        settling_until: until then other processes may have other settings, since they are being changed.
    """

    member: str
    where: str
    exchange_time: float
    settling_until: float

    def is_failing(self) -> bool:
        """Return whether the latest exchange has failed."""

    def failing_since(self) -> float:
        """Return when the first of the latest exchanges failed; infinity if the latest one has not."""

    def describe_failure(self) -> str:
        """Return why the store cannot be used."""

    def next_sequence(self) -> int:
        """Return the number of the next request: larger than those of all before, of whatever lease."""

    def schedule(self, lease: LedgerLease) -> None:
        """Make the exchange of a lease when it is due. Called whenever that is earlier than before."""


class LedgerLease(ABC):
    """The lease of one process on one ledger. One exchange is under way at a time; it is repeated until it is answered.

    It is guarded by a lock of its user's, which is held where no method says otherwise.

    Args:
        link: of this process to the store.
        key: of the ledger.
        terms: the settings of the ledger.
        patience: seconds without anything to do after which the process leaves the ledger.

    Attributes:
        due: when the next exchange is to be made.
        until: when the lease ends. See `is_leased`.
        members: live processes, by the latest reply; 0 if this is none of them.
        rank: how many of them come before this one.
    """

    def __init__(self, link: ExchangeLink, key: str, terms: LedgerTerms, *, patience: float) -> None:
        self.link = link
        self.key = key
        self.terms = terms
        self.lock: threading.RLock | threading.Lock = threading.RLock()
        self._patience = patience
        self._closing = False
        self.reset()

    def reset(self) -> None:
        """Forget the exchanges, and what is held: this process is a new member."""
        self.due = math.inf
        self.until = -math.inf
        self.members = self.rank = 0
        self.conflict: LedgerTerms | None = None
        self._settling_until = -math.inf
        self._sequence = self._answered = 0
        self._epoch = ""
        self._pending: ExchangeRequest | None = None
        self._sent_at = -math.inf
        self._suspension = clock.suspension()  # which `until` and `_sent_at` count
        self._busy_at = -math.inf  # when it had something to do last

    # --- the state ---

    def is_leased(self, now: float) -> bool:
        """Return whether the lease lasts, so that what is held may be used."""
        return now < self.until

    def count_suspension(self) -> None:
        """Let the lease end earlier by the time for which the machine was suspended: `now` does not count it.

        Called before what is held is used: other processes may have got it meanwhile.
        """
        passed = clock.suspension() - self._suspension
        if passed > _SUSPENDED:
            self._suspension += passed
            self._sent_at -= passed
            self.until -= passed

    def is_away(self, now: float) -> bool:
        """Return whether the lease has ended because the store is away: then this process has its fair share.

        It has none if it was paused: then others have got what it held.
        """
        return now >= self.until and self.members > 0 and self.link.failing_since() < self.until

    @property
    def is_asking(self) -> bool:
        """True while a request is not answered."""
        return self._pending is not None

    def unusable(self, now: float) -> Rejected | None:
        """Return a rejection if the ledger cannot be used, and waiting is not expected to help; else None."""
        if self.conflict is not None and not self._is_settling(now):
            return Rejected(self._conflict_text(self.conflict), SHARED_ACCOUNT, 1.0, LEASE)
        if self.is_leased(now):
            return None
        failed = now - self.link.failing_since()
        if failed < LEASE or self.is_away(now):
            return None
        reason = (
            f"the store of the shared account has failed for {format_duration(failed)}, and this process has no share"
            f" of the account, because it has not used it lately: {self.link.describe_failure()}"
        )
        return Rejected(reason, SHARED_ACCOUNT, 1.0, LEASE)

    def _conflict_text(self, conflict: LedgerTerms) -> str:
        return (
            f"its settings differ from those of other processes that share it in {self.link.where}: {self.terms}"
            f" here, {conflict} there. Give all the same; the new ones hold once no process has the old ones"
        )

    def _is_settling(self, now: float) -> bool:
        """Return whether other processes may have other settings yet, because they are being changed."""
        return now < max(self._settling_until, self.link.settling_until)

    def change_terms(self, now: float, terms: LedgerTerms) -> None:
        """Have other settings. They hold once all processes have them; until then calls wait, for some seconds."""
        if terms != self.terms:
            self.terms = terms
            self._settling_until = now + SETTLING
            if self.members > 0:
                self.ask_at(now)

    # --- exchanges ---

    def ask_at(self, when: float) -> None:
        """Make an exchange at `when`, or earlier if one was to be made before; after a conflict not before `due`."""
        if when < self.due and (self.conflict is None or self.due == math.inf):
            self.due = when
            self.link.schedule(self)

    def prepare(self, now: float) -> ExchangeRequest:
        """Return the request to send: one that was not answered as it is, or a new one. It takes the lock."""
        with self.lock:
            self.count_suspension()
            if self._pending is None:
                if self.is_busy(now) or self._busy_at == -math.inf:
                    self._busy_at = now
                leaving = self._closing or now - self._busy_at >= self._patience
                self._sequence = self.link.next_sequence()
                self._sent_at = now
                self._pending = self.make_request(now, leaving=leaving)
            return self._pending

    def new_request(  # noqa: PLR0913 - the parts of a request
        self,
        *,
        leaving: bool,
        priority: int = 0,
        quotas: tuple[QuotaRequest, ...] = (),
        slots: SlotRequest | None = None,
        budget: BudgetRequest | None = None,
        limit: LimitRequest | None = None,
        stoppages: dict[str, StoppageRequest] | None = None,
        observed: tuple[ObservedRequest, ...] = (),
        rate: RateRequest | None = None,
    ) -> ExchangeRequest:
        """Return the next request."""
        return ExchangeRequest(
            ledger=self.key,
            member=self.link.member,
            sequence=self._sequence,
            answered=self._answered,
            epoch=self._epoch,
            members=self.members,
            terms=self.terms,
            priority=priority,
            quotas=quotas,
            slots=slots,
            budget=budget,
            leaving=leaving,
            limit=limit,
            stoppages=stoppages,
            observed=observed,
            rate=rate,
        )

    def apply(self, now: float, request: ExchangeRequest, reply: ExchangeReply) -> None:
        """Use the reply to a request. It takes the lock."""
        with self.lock:
            if request is not self._pending:  # a fork, meanwhile
                return
            self.count_suspension()
            self._pending = None
            conflict, self.conflict = self.conflict, reply.conflict
            if reply.conflict is not None:
                if conflict != reply.conflict and not self._is_settling(now):
                    log.error("a shared account cannot be used: %s", self._conflict_text(reply.conflict))
                self.until, self.members = -math.inf, 0
                self.due = now + (_SETTLING_RETRY if self._is_settling(now) else _CONFLICT_RETRY)
                self.keep_unreported()
                return
            self._epoch, self._answered = reply.epoch, request.sequence
            self.members, self.rank = (0, 0) if request.leaving else (reply.members, reply.rank)
            self.until = -math.inf if request.leaving else self._sent_at + LEASE - LEASE_MARGIN
            self.due = now + (_HEARTBEAT if self.is_busy(now) else _SLOW_HEARTBEAT)
            self.receive(now, request, reply)
            if request.leaving:
                self.due, self._closing = math.inf, False
            self.update(now)

    def is_forgettable(self) -> bool:
        """Return whether nothing is lost if it is dropped: it has left the ledger, and asks for nothing."""
        return self.members == 0 and self._pending is None and self.due == math.inf

    def close(self) -> bool:
        """Leave the ledger with the next request; return False if there is nothing to leave. It takes the lock."""
        with self.lock:
            self._closing = True
            return self.members > 0 or self._pending is not None

    # --- of each kind of ledger ---

    @abstractmethod
    def is_busy(self, now: float) -> bool:
        """Return whether it has calls, holds something, or has something to report."""

    @abstractmethod
    def make_request(self, now: float, *, leaving: bool) -> ExchangeRequest:
        """Return a new request. What it gives back is not used any more."""

    @abstractmethod
    def receive(self, now: float, request: ExchangeRequest, reply: ExchangeReply) -> None:
        """Take over what was granted. What the request reported is not reported again."""

    @abstractmethod
    def keep_unreported(self) -> None:
        """Note that the latest request was not counted."""

    @abstractmethod
    def update(self, now: float) -> None:
        """Ask for an exchange if one is needed."""

    @abstractmethod
    def wake(self) -> None:
        """Wake those who wait for a reply. It takes their locks."""
