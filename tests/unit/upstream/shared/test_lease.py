"""The lease of a process: how long it uses what it holds, and what it reports."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest

from forebay import clock
from forebay.interfaces import Outcome
from forebay.limit import AimdLimit, Limit
from forebay.quota import Budget
from forebay.task import Priority
from forebay.upstream.accounts.refusals import RefusalControl
from forebay.upstream.call_request import CallRequest
from forebay.upstream.shared.leases.account_lease import AccountLease
from forebay.upstream.shared.leases.lease import LedgerLease
from forebay.upstream.shared.leases.leased_budget import LeasedBudget
from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.messages import (
    LEASE,
    LEASE_MARGIN,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    QuotaTerms,
    SlotRequest,
)

TERMS = LedgerTerms(quotas=(QuotaTerms("requests", 600.0, 60.0),), max_concurrent=8)
START = 1_767_225_600.0


class FakeLink:
    """A link whose exchanges the test makes itself."""

    member = "a"
    where = "the store"
    exchange_time = 0.01
    settling_until = -math.inf

    def __init__(self) -> None:
        self.next_sequence = itertools.count(1).__next__
        self.failed_at = math.inf

    def is_failing(self) -> bool:
        return self.failed_at < math.inf

    def failing_since(self) -> float:
        return self.failed_at

    def describe_failure(self) -> str:
        return "it is away"

    def schedule(self, lease: LedgerLease) -> None:
        pass


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


def exchange(lease: AccountLease, ledger: AccountLedger | None, now: float) -> AccountLedger:
    """Make one exchange with a ledger, which is opened if there is none."""
    request = lease.prepare(now)
    ledger = ledger or AccountLedger.open(START + now, request)
    lease.apply(now, request, ledger.exchange(START + now, request))
    return ledger


def grant(lease: AccountLease, held: float, now: float) -> ExchangeRequest:
    """Make an exchange whose reply grants an amount of the quota."""
    request = lease.prepare(now)
    ledger = AccountLedger.open(START + now, request)
    reply = ledger.exchange(START + now, request)
    (quota,) = reply.quotas
    values = {name: getattr(reply, name) for name in ExchangeReply.__struct_fields__}
    granted = type(quota)(held=held, level=quota.level)
    lease.apply(now, request, ExchangeReply(**{**values, "quotas": (granted,)}))
    return request


def use_slots(lease: AccountLease, ledger: AccountLedger, now: float, calls: int) -> SimpleNamespace:
    """Let calls wait for slots, get them by an exchange, and be in flight; return the demand of their account."""
    queue = SimpleNamespace(length=calls, in_order=lambda: [WAITING] * calls, head=lambda: (0, 0, WAITING))
    demand = SimpleNamespace(
        in_flight=0, queue=queue, is_paused=lambda _: False, stoppages={}, refusals=RefusalControl()
    )
    lease.bind(demand, lease.lock, lambda: None)  # type: ignore[arg-type]
    exchange(lease, ledger, now)
    queue.length, demand.in_flight = 0, calls
    lease.update(now)
    return demand


WAITING = SimpleNamespace(request=CallRequest(), priority=CallRequest().priority)


def test_a_slot_is_not_returned_between_two_short_calls(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    ledger = exchange(lease, None, now=0.0)
    demand = use_slots(lease, ledger, 0.1, calls=3)
    demand.in_flight = 0  # for a moment, in which the next exchange is made
    exchange(lease, ledger, now=0.2)
    assert lease.slots(0.2) == 3


def test_a_slot_that_no_call_has_used_since_the_request_before_is_returned(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    ledger = exchange(lease, None, now=0.0)
    demand = use_slots(lease, ledger, 0.1, calls=3)
    demand.in_flight = 1
    lease.update(0.15)
    exchange(lease, ledger, now=0.2)
    assert lease.due < 0.3  # soon, and not at the next heartbeat
    exchange(lease, ledger, now=lease.due)
    assert lease.slots(0.3) == 1


def test_nothing_of_a_lease_is_used_when_it_has_ended(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    grant(lease, 10.0, now=0.0)
    (bucket,) = lease.buckets
    assert bucket.usable(LEASE - 1.0) == 10.0
    assert bucket.usable(LEASE) == 0.0
    assert lease.slots(LEASE) == 0


def test_a_lease_counts_from_when_its_request_was_sent(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    request = lease.prepare(0.0)
    assert lease.prepare(4.0) is request  # it is repeated as it is
    ledger = AccountLedger.open(START, request)
    lease.apply(4.5, request, ledger.exchange(START + 4.5, request))
    assert lease.is_leased(4.6)
    assert not lease.is_leased(LEASE)


def test_what_a_request_returns_is_not_used_any_more(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    grant(lease, 10.0, now=0.0)
    (bucket,) = lease.buckets
    lease.prepare(2.0)  # nobody has called for two seconds: all is returned
    assert bucket.usable(2.0) == 0.0


def test_what_is_used_while_a_request_is_under_way_is_reported_with_the_next_one(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    grant(lease, 10.0, now=0.0)
    (bucket,) = lease.buckets
    bucket.reserve(0.1, 4.0)
    request = lease.prepare(0.1)
    bucket.end(0.2, 0.0, 3.0)  # a call has used more than it had reserved
    ledger = AccountLedger.open(START, request)
    lease.apply(0.3, request, ledger.exchange(START, request))
    assert request.quotas[0].used == 4.0
    assert lease.prepare(0.4).quotas[0].used == 3.0


def test_a_process_that_was_paused_has_no_share_of_its_own(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    grant(lease, 10.0, now=0.0)
    link.failed_at = LEASE + 10.0  # its first attempt after the pause fails
    assert lease.slots(LEASE + 11.0) == 0
    assert lease.buckets[0].usable(LEASE + 20.0) == 0.0


def test_a_lease_ends_earlier_by_the_time_for_which_the_machine_was_suspended(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = AccountLease(link, "l", TERMS)
    grant(lease, 10.0, now=0.0)
    monkeypatch.setattr(clock, "suspension", lambda: 1.0)
    lease.count_suspension()
    assert lease.until == pytest.approx(LEASE - LEASE_MARGIN - 1.0)
    lease.count_suspension()  # it is counted once
    assert lease.until == pytest.approx(LEASE - LEASE_MARGIN - 1.0)


def test_a_lease_counts_a_suspension_while_its_request_was_under_way(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = AccountLease(link, "l", TERMS)
    request = lease.prepare(0.0)
    reply = AccountLedger.open(START, request).exchange(START, request)
    monkeypatch.setattr(clock, "suspension", lambda: 60.0)
    lease.apply(0.1, request, reply)
    assert not lease.is_leased(0.1)


def test_dollars_that_a_suspended_process_has_leased_are_not_spent(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "now", lambda: 1.0)
    budget = LeasedBudget(link, "l", "the budget", Budget(usd=10.0))
    budget.wait(5.0, Priority.NORMAL)
    request = budget.prepare(1.0)
    budget.apply(1.0, request, AccountLedger.open(START, request).exchange(START, request))
    assert budget.wait(1.0, Priority.NORMAL) == 0.0
    monkeypatch.setattr(clock, "suspension", lambda: 60.0)
    assert budget.try_reserve(1.0, Priority.NORMAL) is None


def test_a_process_keeps_its_fair_share_while_the_store_is_away(link: FakeLink) -> None:
    lease = AccountLease(link, "l", TERMS)
    ledger = exchange(lease, None, 0.0)
    other = FakeLink()
    other.member = "b"
    exchange(AccountLease(other, "l", TERMS), ledger, 0.1)
    exchange(lease, ledger, 0.2)
    link.failed_at = 1.0
    assert lease.slots(LEASE + 1.0) == 4
    (bucket,) = lease.buckets
    assert bucket.usable(LEASE + 1.0) == 0.0  # it begins with nothing
    assert bucket.usable(LEASE + 3.0) == pytest.approx(2 * 10.0 / 2)


def test_a_process_that_cuts_the_limit_starts_no_call_in_the_slots_that_others_have(link: FakeLink) -> None:
    terms = LedgerTerms(limit="aimd")
    lease, other_link = AccountLease(link, "l", terms), FakeLink()
    limit, demand, ledger = use_last_slot_of_two(lease, AccountLease(other_link, "l", terms))
    limit.observe(0.3, limit.grant(0.2, 1), Outcome.OVERLOAD)  # the limit is 1 now, and the other process has that
    demand.in_flight = 0
    assert lease.slots(0.3) == 0
    request = lease.prepare(0.3)
    assert request.slots == SlotRequest(in_use=0, held=0, wanted=0)
    assert lease.slots(0.3) == 0  # nor while it is told
    lease.apply(0.4, request, ledger.exchange(START + 0.4, request))
    assert lease.slots(0.4) == 0


def use_last_slot_of_two(lease: AccountLease, other: AccountLease) -> tuple[Limit, SimpleNamespace, AccountLedger]:
    """Let two processes have a call in flight each, by a limit of 2; return the limit, the demand and the ledger."""
    other.link.member = "b"
    limit, _ = lease.bind_limit(AimdLimit(initial_limit=2)), other.bind_limit(AimdLimit(initial_limit=2))
    ledger = exchange(lease, None, now=0.0)
    use_slots(other, ledger, 0.1, calls=1)
    return limit, use_slots(lease, ledger, 0.2, calls=1), ledger


def test_a_budget_is_said_to_renew_as_late_as_the_reply_may_have_been_made(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "now", lambda: 5.0)
    budget = LeasedBudget(link, "l", "the budget", Budget(usd=1.0, per="hour"))
    request = budget.prepare(1.0)
    reply = AccountLedger.open(START, request).exchange(START, request)  # START begins an hour
    budget.apply(5.0, request, reply)
    assert budget.resets_in() == 3_600.0  # the ledger may have made it just now
