"""The part of this process in the rate that all processes of an account learn from refusals."""

from __future__ import annotations

import math
from typing import Final

from forebay.upstream.accounts.refusals.refusal_control import RefusalControl
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest
from forebay.upstream.shared.ledger.rate_messages import RateRequest

_MEMORY: Final = 1.0  # seconds over which the pace is measured
_SOON: Final = 1.0  # seconds in which the calls that wait would be sent


class RateLease:
    """The share of this process in a learned rate, and what it tells the others of it.

    It is guarded by the lock of its account's lease.
    """

    def __init__(self) -> None:
        self._refusals: RefusalControl | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was exchanged: this process is a new member."""
        self._version = 0  # of the rate, when that was last reported or taken over
        self._epoch = -1
        self._counted_by_all: int | None = None  # at the latest reply
        self._counted = 0  # of this process, at the latest request
        self._demand = 0.0  # at the latest request
        self._pace = 0.0
        self._measured_at = -math.inf
        self._share = 1.0

    def bind(self, refusals: RefusalControl) -> None:
        """Use the refusals of an account."""
        self._refusals = refusals
        self._counted = refusals.rate.own_count

    def has_news(self, waiting: int) -> bool:
        """Return whether others are to be told at once: something was learned, or calls wait for a share."""
        refusals = self._refusals
        if refusals is None:
            return False
        if refusals.rate.version != self._version or refusals.wanted_trial:
            return True
        return refusals.rate.known and waiting > 0 and not self._demand

    def set_share(self, *, leased: bool, members: int) -> None:
        """Use the share that the ledger told, or a fair one while its store is away."""
        if self._refusals is not None:
            self._refusals.rate.share = self._share if leased or members < 1 else 1.0 / members

    def report(self, now: float, waiting: int) -> RateRequest | None:
        """Return what to report; `waiting`: calls that wait."""
        refusals = self._refusals
        if refusals is None:
            return None
        counted = refusals.rate.own_count - self._counted
        self._counted = refusals.rate.own_count
        self._measure(now, counted)
        self._demand = self._pace + waiting / _SOON
        learned = refusals.export(now) if refusals.rate.version != self._version else None
        self._version = refusals.rate.version
        return RateRequest(
            epoch=self._epoch,
            counted=counted,
            demand=self._demand,
            learned=learned,
            trial=refusals.wanted_trial,
        )

    def receive(self, now: float, request: ExchangeRequest, reply: ExchangeReply) -> None:
        """Count the calls of others, and take over what they have learned."""
        refusals, told = self._refusals, reply.rate
        if refusals is None or told is None or request.rate is None:
            return
        if self._counted_by_all is not None and request.epoch == reply.epoch:
            refusals.rate.record_others(now, told.counted - self._counted_by_all - request.rate.counted)
        if request.rate.trial > 0.0 or not refusals.wanted_trial:
            refusals.answer_trial(now, told.trial)
        self._counted_by_all = told.counted
        self._share = told.share
        own = request.rate.learned is not None and told.learned == request.rate.learned
        if told.learned is not None and told.epoch != self._epoch and not own:
            refusals.adopt(now, told.learned, age=told.age)
            self._version = refusals.rate.version
        self._epoch = told.epoch

    def _measure(self, now: float, counted: int) -> None:
        """Measure the pace at which calls are sent, over about a second."""
        passed = now - self._measured_at
        if passed <= 0.0:
            return
        passed = min(passed, _MEMORY)  # the first time, and after a time without exchanges
        self._pace += (1.0 - math.exp(-passed / _MEMORY)) * (max(0, counted) / passed - self._pace)
        self._measured_at = now
