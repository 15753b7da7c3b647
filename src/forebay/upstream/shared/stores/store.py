"""The interface of a store of ledgers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest


class LedgerStore(Protocol):
    """A store that keeps ledgers for several processes. Its methods block, and one thread at a time calls them.

    It has the only clock that counts: it passes its own time, in epoch seconds, to each decision.

    Attributes:
        where: names it in messages, without a password.
    """

    where: str

    def exchange(self, requests: Sequence[ExchangeRequest]) -> Sequence[ExchangeReply]:
        """Decide over exchanges with different ledgers, each as one step, and return the replies in their order.

        A ledger that does not exist is opened. The replies are as durable as the store's URL says when this returns.

        Raises:
            StoreUnavailable: it cannot be asked, or gave no answer in time. Some or all of the exchanges may have been
                decided, or be decided yet: the caller repeats them as they are.
        """

    def close(self) -> None:
        """Disconnect. It connects again when it is used again. Idempotent."""

    def reset_after_fork(self) -> None:
        """Forget the connection, which is the parent's, without closing it: this is a child that was forked."""
