"""Ledgers as the first version wrote them, and a member that spends from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from forebay.upstream.shared.ledger.messages import (
    BudgetRequest,
    BudgetTerms,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    QuotaRequest,
    QuotaTerms,
    SlotRequest,
)
from forebay.upstream.shared.stores.store import LedgerStore

LEDGER_FIELDS: Final = (
    "epoch", "terms", "clock", "time", "levels", "members", "ended", "recovers_until", "period", "recovered",
    "reported", "previous_period", "previous_spent", "limit", "limit_epoch", "silent_until",
)  # fmt: skip
MEMBER_FIELDS: Final = (
    "sequence", "until", "until_", "seen", "held", "short", "lost", "waiting_since", "is_waiting", "priority", "slots",
    "slots_wanted", "served_at", "usd", "usd_reserved", "usd_short", "reply",
)  # fmt: skip
ENDED_FIELDS: Final = ("sequence", "at", "lost", "slots")


def as_first_layout(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ledger with the fields alone that the first version had. `until_` is that of Redis."""

    def pick(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {name: values[name] for name in names if name in values}

    members = {name: pick(each, MEMBER_FIELDS) for name, each in dict(state["members"]).items()}
    ended = {name: pick(each, ENDED_FIELDS) for name, each in dict(state["ended"]).items()}
    return {**pick(state, LEDGER_FIELDS), "members": members, "ended": ended}


def spend(store: LedgerStore, numbers: range, reply: ExchangeReply | None = None) -> ExchangeReply:
    """Make exchanges with these numbers, each of which reports a dollar but the first, and return the last reply.

    Another member leaves before the first, so that the ledger knows one that has ended.
    """
    if reply is None:
        store.exchange([_request("gone", 1, None)])
        store.exchange([_request("gone", 2, None, leaving=True)])
    for number in numbers:
        (reply,) = store.exchange([_request("a", number, reply)])
    assert reply is not None
    return reply


def _request(member: str, number: int, reply: ExchangeReply | None, *, leaving: bool = False) -> ExchangeRequest:
    known = None if reply is None else reply.budget
    return ExchangeRequest(
        ledger="l",
        member=member,
        sequence=number,
        answered=0 if reply is None else number - 1,
        epoch="" if reply is None else reply.epoch,
        members=0 if reply is None else reply.members,
        terms=LedgerTerms(quotas=(QuotaTerms("requests", 60.0, 60.0),), max_concurrent=4, budget=BudgetTerms(64.0)),
        quotas=(QuotaRequest(needed=1.0, wanted=1.0),),
        slots=SlotRequest(wanted=2),
        budget=BudgetRequest(
            period=-1.0 if known is None else known.period,
            spent=0.0 if known is None else 1.0,
            known_spent=0.0 if known is None else known.spent,
        ),
        leaving=leaving,
    )
