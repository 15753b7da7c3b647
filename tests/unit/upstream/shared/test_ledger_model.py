"""Random exchanges of members with one ledger, over a network that loses and repeats, with members that pause.

What the members use in all is compared with what the limits allow: nothing is created, and nothing is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from forebay.clock import new_random
from forebay.upstream.shared.ledger.ledger import AccountLedger, decode_ledger, encode_ledger
from forebay.upstream.shared.ledger.ledger_state import LedgerState
from forebay.upstream.shared.ledger.messages import (
    LEASE,
    BudgetRequest,
    BudgetTerms,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    QuotaRequest,
    QuotaTerms,
    SlotRequest,
)

BUDGET, LIMIT = 100.0, 5
TERMS = LedgerTerms(
    quotas=(QuotaTerms("requests", 100.0, 60.0), QuotaTerms("tokens", 10_000.0, 60.0)),
    max_concurrent=LIMIT,
    budget=BudgetTerms(BUDGET, reserved_share=0.1),
)
NAMES = ("a", "b", "c")


class Start(NamedTuple):
    """Calls that start, if what is held is enough for them."""

    requests: int
    tokens: float
    calls: int
    usd: float


class Wishes(NamedTuple):
    """The demand of a member."""

    needed: tuple[float, float]
    extra: float
    calls: int
    usd: float
    important: bool
    leaving: bool


OUTCOMES = (*["answered"] * 4, "the request is lost", "the reply is lost", "it is decided twice")
WAITS = (0.01, 0.01, 0.1, 0.1, 0.5, 0.5, 2.0, 2.0, LEASE + 1.0, 70.0)


@dataclass
class Member:
    """A member that uses what it holds within its lease, and no more. Its calls may end later."""

    name: str
    sequence: int = 0
    epoch: str = ""
    until: float = -math.inf  # when its lease ends, by its own clock
    held: list[float] = field(default_factory=lambda: [0.0, 0.0])
    used: list[float] = field(default_factory=lambda: [0.0, 0.0])  # and not reported
    returning: list[float] = field(default_factory=lambda: [0.0, 0.0])
    allowed: int = 0
    in_flight: int = 0
    usd: float = 0.0
    usd_spent: float = 0.0  # and not reported
    usd_reserved: float = 0.0
    usd_returning: float = 0.0
    period: float = -1.0
    is_late: bool = False  # its lease has ended, and it has noticed
    request: ExchangeRequest | None = None  # that was not answered
    sent_at: float = 0.0
    reply: ExchangeReply | None = None  # that is on its way


class World:
    """Members, their ledger, and the network between them."""

    def __init__(self) -> None:
        self.now = 1000.0  # of the members' clocks
        self.offset = 1_700_000_000.0  # of the store's clock
        self.ledger: AccountLedger | None = None
        self.opened_at = 0.0
        self.members = {name: Member(name) for name in NAMES}
        self.used = [0.0, 0.0]
        self.spent = 0.0
        self.reserved_late = 0.0  # dollars of calls that were in flight when a lease ended
        self.had_late_calls = False

    # --- time ---

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for member in self.members.values():
            if self.now >= member.until and not member.is_late:
                member.is_late = True
                self.reserved_late += member.usd_reserved
                self.had_late_calls |= member.in_flight > 0

    def set_the_stores_clock_back(self, seconds: float) -> None:
        self.offset -= seconds

    # --- calls ---

    def start_calls(self, name: str, start: Start) -> None:
        """Use what is held, but no more."""
        member = self.members[name]
        if member.is_late:
            return
        for number, wanted in enumerate((float(start.requests), start.tokens)):
            amount = min(wanted, member.held[number] - member.used[number] - member.returning[number])
            if amount > 0.0:
                member.used[number] += amount
                self.used[number] += amount
        member.in_flight += max(0, min(start.calls, member.allowed - member.in_flight))
        idle = member.usd - member.usd_spent - member.usd_reserved - member.usd_returning
        member.usd_reserved += max(0.0, min(start.usd, idle))

    def end_calls(self, name: str, calls: int, share: float, tokens: float) -> None:
        """End calls, also after the lease. They cost a share of what was reserved, and return some tokens."""
        member = self.members[name]
        member.in_flight = max(0, member.in_flight - calls)
        cost = share * member.usd_reserved
        member.usd_reserved = 0.0
        member.usd_spent += cost
        self.spent += cost
        returned = min(tokens, max(0.0, member.used[1]))
        member.used[1] -= returned
        self.used[1] -= returned

    # --- exchanges ---

    def exchange(self, *, name: str, wishes: Wishes, meanwhile: Start, later: Start, outcome: str) -> None:
        """Make an exchange, and start calls while it is under way."""
        if self.members[name].request is None:
            self.send(name, wishes)
        self.start_calls(name, meanwhile)
        if outcome == "the request is lost":
            return
        self.decide(name)
        self.start_calls(name, later)
        if outcome == "it is decided twice":
            self.decide(name)
        if outcome != "the reply is lost":
            self.receive(name)

    def send(self, name: str, wishes: Wishes) -> None:
        member = self.members[name]
        if member.request is not None:
            return
        leaving = wishes.leaving and not member.in_flight and not member.usd_reserved
        needed = (0.0, 0.0) if leaving else wishes.needed
        wanted_usd = 0.0 if leaving else member.usd_reserved + wishes.usd
        extra = 0.0 if leaving else wishes.extra
        calls = 0 if leaving else wishes.calls
        quotas = tuple(
            QuotaRequest(used=used, needed=need, wanted=need + extra)
            for used, need in zip(member.used, needed, strict=True)
        )
        held = [max(0.0, held - used) for held, used in zip(member.held, member.used, strict=True)]
        member.returning = [amount - quota.kept(amount) for amount, quota in zip(held, quotas, strict=True)]
        budget = BudgetRequest(
            period=member.period,
            spent=member.usd_spent,
            reserved=member.usd_reserved,
            needed=wanted_usd,
            important=wishes.important,
            wanted=wanted_usd + extra,
        )
        usd = max(0.0, member.usd - member.usd_spent)
        member.usd_returning = usd - max(min(usd, member.usd_reserved), budget.kept(usd))
        member.allowed = min(member.allowed, member.in_flight + calls)
        member.sequence += 1
        member.sent_at = self.now
        member.request = ExchangeRequest(
            ledger="l",
            member=name,
            sequence=member.sequence,
            epoch=member.epoch,
            terms=TERMS,
            quotas=quotas,
            slots=SlotRequest(
                member.in_flight,
                max(member.in_flight, 0 if member.is_late else member.allowed),
                member.in_flight + calls,
            ),
            budget=budget,
            leaving=leaving,
        )

    def decide(self, name: str) -> None:
        """Let the request reach the ledger, for the first time or again."""
        member = self.members[name]
        if member.request is None:
            return
        now = self.offset + self.now
        if self.ledger is None:
            self.ledger = AccountLedger.open(now, member.request)
            self.opened_at = self.now
        member.reply = self.ledger.exchange(now, member.request)
        self.ledger = decode_ledger(encode_ledger(self.ledger))

    def receive(self, name: str) -> None:
        member = self.members[name]
        request, reply = member.request, member.reply
        if request is None or reply is None:
            return
        assert request.budget is not None
        member.request = member.reply = None
        member.epoch = reply.epoch
        for number, quota in enumerate(request.quotas):
            member.used[number] -= quota.used
            member.held[number] = reply.quotas[number].held if reply.quotas else 0.0
        member.returning, member.usd_returning = [0.0, 0.0], 0.0
        member.usd_spent -= request.budget.spent
        member.allowed = 0 if reply.slots is None else reply.slots.allowed
        member.usd = 0.0 if reply.budget is None else reply.budget.held
        member.period = -1.0 if reply.budget is None else reply.budget.period
        member.until = -math.inf if request.leaving else member.sent_at + LEASE
        member.is_late = self.now >= member.until
        if member.is_late:
            self.reserved_late += member.usd_reserved
            self.had_late_calls |= member.in_flight > 0

    # --- what holds ---

    @property
    def state(self) -> LedgerState | None:
        return None if self.ledger is None else self.ledger.state

    def the_money_is_conserved(self) -> None:
        if self.state is None:
            return
        unreported = 0.0
        for member in self.members.values():
            unreported += member.usd_spent
            if member.request is not None and self.was_decided(member):
                assert member.request.budget is not None
                unreported -= member.request.budget.spent
        assert math.isclose(self.state.spent + unreported, self.spent, abs_tol=1e-6)

    def was_decided(self, member: Member) -> bool:
        assert self.state is not None
        known = self.state.members.get(member.name) or self.state.ended.get(member.name)
        return known is not None and known.sequence >= member.sequence

    def no_more_money_is_spent_or_in_use_than_there_is(self) -> None:
        """But what calls cost that were in flight when a lease ended: their money was free again."""
        reserved = sum(member.usd_reserved for member in self.members.values())
        assert self.spent + reserved <= BUDGET + self.reserved_late + 1e-6

    def no_more_is_used_of_a_quota_than_it_grants(self) -> None:
        if self.state is None:
            return
        for number, quota in enumerate(TERMS.quotas):
            granted = quota.amount + (self.now - self.opened_at) * quota.amount / quota.seconds
            assert self.used[number] <= granted * (1.0 + 1e-9)

    def what_is_left_and_what_is_held_are_one_amount_at_most(self) -> None:
        if self.state is not None:
            for number, quota in enumerate(TERMS.quotas):
                held = sum(member.held[number] for member in self.state.members.values())
                assert self.state.levels[number] + held <= quota.amount * (1.0 + 1e-9)

    def no_more_calls_are_in_flight_than_the_limit(self) -> None:
        """But those that were in flight when a lease ended."""
        in_flight = sum(member.in_flight for member in self.members.values())
        assert in_flight <= LIMIT or self.had_late_calls
        members = self.members.values()
        counted = sum(member.slots for member in self.state.members.values()) if self.state is not None else 0
        allowed = max(counted, sum(max(member.in_flight, member.allowed) for member in members))
        if allowed <= LIMIT and not any(member.request or (member.is_late and member.in_flight) for member in members):
            self.had_late_calls = False

    def check(self) -> None:
        self.the_money_is_conserved()
        self.no_more_money_is_spent_or_in_use_than_there_is()
        self.no_more_is_used_of_a_quota_than_it_grants()
        self.what_is_left_and_what_is_held_are_one_amount_at_most()
        self.no_more_calls_are_in_flight_than_the_limit()


def run(seed: int, steps: int) -> None:
    """Do random steps, and check after each of them what holds."""
    random = new_random(seed)
    world = World()

    def start() -> Start:
        return Start(random.randrange(6), random.uniform(0.0, 3_000.0), random.randrange(6), random.uniform(0.0, 8.0))

    def wishes() -> Wishes:
        needed = (random.uniform(0.0, 40.0), random.uniform(0.0, 6_000.0)) if random.random() < 0.7 else (0.0, 0.0)
        usd = random.choice([0.0, 0.5, 5.0, 60.0])
        return Wishes(
            needed, random.uniform(0.0, 50.0), random.randrange(6), usd, random.random() < 0.3, random.random() < 0.05
        )

    for _ in range(steps):
        name = random.choice(NAMES)
        match random.randrange(10):
            case 0 | 1:
                world.wait(random.choice(WAITS))
            case 2:
                world.start_calls(name, start())
            case 3 | 4:
                world.end_calls(
                    name, random.randrange(1, 4), random.choice([0.0, 0.02, 1.0]), random.uniform(0.0, 300.0)
                )
            case 5 if random.random() < 0.1:
                world.set_the_stores_clock_back(random.uniform(0.1, 100.0))
            case _:
                outcome = random.choice(OUTCOMES)
                world.exchange(name=name, wishes=wishes(), meanwhile=start(), later=start(), outcome=outcome)
        world.check()


@pytest.mark.parametrize("seed", range(60))
def test_random_exchanges_create_nothing_and_lose_nothing(seed: int) -> None:
    run(seed, 300)
