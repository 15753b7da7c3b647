"""What a call asks of its account, and what it may be answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from forebay.quota import Reservation
from forebay.task import Priority
from forebay.typing import Charge, Grant, Notice, Outcome


class Ask(msgspec.Struct, kw_only=True, eq=False):
    """A call before it is sent. Times are seconds of the account's clock.

    Attributes:
        charge: what it is expected to take of the quotas.
        usd: dollars that it is expected to cost at most.
        priority: its rung.
        deadline: when its answer becomes worthless; infinity for never.
        tenant: on whose behalf.
        run: the id of the task that makes it, or None: then it is unattributed.
        model: what it is for.
        free: it costs no money, whatever comes of it, so no budget is asked.
        retries: tries of it that have failed; a retried call goes to the head of its rung.
        since: when it asked first; the account notes it.
    """

    charge: Charge = Charge()
    usd: float = 0.0
    priority: Priority = Priority.NORMAL
    deadline: float = math.inf
    tenant: str = "default"
    run: str | None = None
    model: str = ""
    free: bool = False
    retries: int = 0
    since: float = math.inf


class Held(Protocol):
    """Dollars that a call holds of one budget, until they are settled."""

    def settle(self, usd: float) -> None:
        """It has cost so much."""


class Purse(Protocol):
    """A budget that a call draws on. It knows what day it is."""

    name: str

    def affords(self, usd: float, priority: Priority) -> bool:
        """Whether so much may be reserved."""

    def reserve(self, usd: float) -> Held:
        """Set so much aside."""

    def refusal(self, usd: float) -> No:
        """Why so much is not afforded, and when it may be."""


class Permit(msgspec.Struct, eq=False):
    """A call that may be sent: one slot, its charge and its dollars are held for it. Closed exactly once.

    Attributes:
        ask: whose it is.
        at: when it was given.
        grant: the slot, as the limit marked it.
        era: of the account's breaker.
        reservation: what it holds of the quotas.
        sums: what it holds of each budget that it draws on.
        accepted: whether the limit was told that the call was not refused.
        closed: whether all has been given back.
    """

    ask: Ask
    at: float
    grant: Grant
    era: int
    reservation: Reservation
    sums: Sequence[Held] = ()
    accepted: bool = False
    closed: bool = False


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended, as far as its account is concerned.

    Attributes:
        outcome: what that says about the upstream.
        used: what it took of the quotas; None: as much as was reserved.
        released: it took nothing of them: it never left, or was refused and not counted.
        rate: it was refused since a quota is used up.
        retry_after: seconds that the refusal asked for, or None.
        notices: what the headers of its answer said of the quotas, unless that was heard before.
        usd: what it cost; None: as much as was reserved.
        seconds: how long it took, if that says anything of the upstream's pace.
        made: output tokens, if that is known of a success.
        foreseen: input tokens that it was estimated to send; None: what it used says nothing of that.
        final: whether it will not be tried again: only such count for the breaker.
    """

    outcome: Outcome
    used: Charge | None = None
    released: bool = False
    rate: bool = False
    retry_after: float | None = None
    notices: tuple[Notice, ...] = ()
    usd: float | None = None
    seconds: float | None = None
    made: int = 0
    foreseen: int | None = None
    final: bool = True


class Go(NamedTuple):
    """It may be sent now."""

    permit: Permit


class Wait(NamedTuple):
    """It has to wait, about so many seconds, for what binds."""

    seconds: float
    binding: str


class No(NamedTuple):
    """It will not be sent.

    Attributes:
        reason: why, for a person.
        binding: the part of the account that refuses it.
        load: what that part holds against what it may hold.
        retry_after: seconds after which to come again, or None if that is unknown or never helps.
    """

    reason: str
    binding: str
    load: float
    retry_after: float | None


def times(charge: Charge, count: int) -> Charge:
    """What so many calls like it take together."""
    return Charge(
        requests=charge.requests * count,
        input_tokens=charge.input_tokens * count,
        output_tokens=charge.output_tokens * count,
        tokens=charge.tokens * count,
    )
