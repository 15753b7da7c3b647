"""The parts of the messages between a process and a ledger that are about limits observed from a provider's headers.

What a member uses of such a limit, and needs, is a `QuotaRequest` as of any other quota: see `ExchangeRequest.quotas`.
"""

from __future__ import annotations

import msgspec


class ObservedRemaining(msgspec.Struct, frozen=True):
    """The amount that the provider said to be left, in its answer to one call.

    Attributes:
        remaining: of the amount; below 0 if a refusal asked for a longer wait than that of an empty quota.
        age: seconds since the call was sent: the number was right at some moment since then.
        counted: the use that the ledger had counted by the time the call was sent, as it told the member.
        throttled: the call was refused for its rate.
    """

    remaining: float
    age: float
    counted: float
    throttled: bool = False


class ObservedRequest(msgspec.Struct, frozen=True):
    """One limit that a member has observed, or was told.

    Attributes:
        unit: what it counts.
        amount: granted in a period.
        seconds: of the period.
        epoch: of the limit, as the ledger told it last; -1 if it has not.
        ends_in: seconds until its window ends; None if it refills all the time.
        is_changed: the member has learned another amount, period or window than the ledger told it.
        under_way: what the member's calls in flight have reserved.
        seen: the latest answer that told what is left; None if none has since the last exchange that was answered.
        doubt: seconds for which its members do not wait for it, because it was disproved; 0: they wait for it again;
            None: the member has found out neither since the last exchange that was answered.
    """

    unit: str
    amount: float
    seconds: float
    epoch: int = -1
    ends_in: float | None = None
    is_changed: bool = False
    under_way: float = 0.0
    seen: ObservedRemaining | None = None
    doubt: float | None = None


class ObservedReply(msgspec.Struct, frozen=True):
    """One limit that the members of a ledger have observed.

    Attributes:
        unit: what it counts.
        amount: granted in a period.
        seconds: of the period.
        epoch: how often a member has learned something else of it.
        counted: the use that the ledger has counted.
        ends_in: seconds until its window ends; None if it refills all the time.
        doubt: seconds for which no member waits for it.
    """

    unit: str
    amount: float
    seconds: float
    epoch: int
    counted: float
    ends_in: float | None = None
    doubt: float = 0.0
