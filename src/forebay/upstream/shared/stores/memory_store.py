"""Ledgers in memory: for simulations and tests, since no other process can see them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from forebay import clock
from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest


class MemoryLedgerStore:
    """A store of ledgers in the memory of this process. Several upstreams that are given the same one share them.

    Attributes:
        where: see `LedgerStore`.
        ledgers: by key.
    """

    where = "memory"

    def __init__(self) -> None:
        self.ledgers: dict[str, AccountLedger] = {}
        self._lock = threading.Lock()

    def exchange(self, requests: Sequence[ExchangeRequest]) -> Sequence[ExchangeReply]:
        """See `LedgerStore`."""
        with self._lock:
            return [self._exchange(request) for request in requests]

    def _exchange(self, request: ExchangeRequest) -> ExchangeReply:
        now = clock.wall_time()
        ledger = self.ledgers.get(request.ledger)
        if ledger is None:
            ledger = self.ledgers[request.ledger] = AccountLedger.open(now, request)
        return ledger.exchange(now, request)

    def close(self) -> None:
        """See `LedgerStore`. The ledgers stay."""

    def reset_after_fork(self) -> None:
        """See `LedgerStore`. The child has a copy of the ledgers."""
        self._lock = threading.Lock()
