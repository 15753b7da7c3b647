"""Random exchanges, deaths, repeats and pauses of members with one ledger: nothing is created, and nothing is lost."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from forebay.upstream.shared.ledger import AccountLedger, decode_ledger, encode_ledger
from forebay.upstream.shared.messages import (
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

TERMS = LedgerTerms(
    quotas=(QuotaTerms("requests", 100.0, 60.0), QuotaTerms("tokens", 10_000.0, 60.0)),
    max_concurrent=5,
    budget=BudgetTerms(100.0, reserved_share=0.1),
)
MEMBERS = ("a", "b", "c")


class Member:
    """A member that uses what it holds, and no more; only its calls in flight may end after its lease."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sequence = 0
        self.epoch = ""
        self.lease_until = -math.inf
        self.held = [0.0, 0.0]
        self.used = [0.0, 0.0]
        self.allowed = 0
        self.in_flight = 0
        self.usd_held = 0.0
        self.usd_spent = 0.0
        self.usd_reserved = 0.0
        self.period = -1.0
        self.pending: ExchangeRequest | None = None  # its reply was lost


class LedgerMachine(RuleBasedStateMachine):
    """Members that behave, on a network that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.ledger: AccountLedger | None = None
        self.members = {name: Member(name) for name in MEMBERS}
        self.spent = 0.0  # dollars, whether they were reported or not
        self.used = [0.0, 0.0]
        self.started = self.now

    def run(self, request: ExchangeRequest) -> ExchangeReply:
        if self.ledger is None:
            self.ledger = AccountLedger.open(self.now, request)
        reply = self.ledger.exchange(self.now, request)
        self.ledger = decode_ledger(encode_ledger(self.ledger))
        return reply

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.5, 2.0, LEASE + 1.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.floats(0.1, 100.0))
    def the_clock_goes_back(self, seconds: float) -> None:
        """Set it back: it is the store's, so leases of members end later by it, and they hold on to nothing more."""
        for member in self.members.values():
            member.lease_until -= seconds
        self.now -= seconds
        self.started -= seconds

    @rule(
        name=st.sampled_from(MEMBERS),
        requests=st.integers(0, 3),
        tokens=st.floats(0.0, 400.0),
        starts=st.integers(0, 2),
        usd=st.floats(0.0, 2.0),
    )
    def use(self, name: str, requests: int, tokens: float, starts: int, usd: float) -> None:
        """Use some of what is held, within the lease. A request that is on its way returns what it does not want."""
        member = self.members[name]
        if self.now >= member.lease_until or member.pending is not None:
            return
        for number, wanted in enumerate((float(requests), tokens)):
            amount = min(wanted, member.held[number] - member.used[number])
            if amount > 0.0:
                member.used[number] += amount
                self.used[number] += amount
        member.in_flight += max(0, min(starts, member.allowed - member.in_flight))
        idle = member.usd_held - member.usd_spent - member.usd_reserved
        member.usd_reserved += max(0.0, min(usd, idle))

    @rule(
        name=st.sampled_from(MEMBERS), count=st.integers(1, 3), share=st.floats(0.0, 1.0), refund=st.floats(0.0, 50.0)
    )
    def end_calls(self, name: str, count: int, share: float, refund: float) -> None:
        """End calls, also after the lease: they cost a share of what was reserved for them."""
        member = self.members[name]
        member.in_flight = max(0, member.in_flight - count)
        cost = share * member.usd_reserved
        member.usd_reserved = 0.0
        member.usd_spent += cost
        self.spent += cost
        refund = min(refund, self.used[1])
        member.used[1] -= refund
        self.used[1] -= refund

    @rule(
        name=st.sampled_from(MEMBERS),
        needed=st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 3_000.0)),
        extra=st.floats(0.0, 10.0),
        slots=st.integers(0, 6),
        usd=st.floats(0.0, 50.0),
        important=st.booleans(),
        lost=st.sampled_from(["no", "no", "request", "reply"]),
        leaving=st.sampled_from([False, False, False, True]),
    )
    def exchange(self, name: str, lost: str, **wishes: Any) -> None:
        member = self.members[name]
        request = member.pending or self.new_request(member, **wishes)
        member.pending = request
        if lost == "request":
            return
        reply = self.run(request)
        again = self.run(request)
        assert again.quotas == reply.quotas or request.leaving
        if lost == "reply":
            return
        self.apply(member, request, reply)

    def new_request(
        self,
        member: Member,
        *,
        needed: tuple[float, float],
        extra: float,
        slots: int,
        usd: float,
        important: bool,
        leaving: bool,
    ) -> ExchangeRequest:
        member.sequence += 1
        leaving = leaving and not member.in_flight and not member.usd_reserved
        wanted = 0.0 if leaving else member.usd_reserved + usd
        return ExchangeRequest(
            ledger="l",
            member=member.name,
            sequence=member.sequence,
            epoch=member.epoch,
            terms=TERMS,
            quotas=tuple(
                QuotaRequest(used, 0.0 if leaving else need, 0.0 if leaving else need + extra)
                for used, need in zip(member.used, needed, strict=True)
            ),
            slots=SlotRequest(member.in_flight, member.in_flight + slots),
            budget=BudgetRequest(
                period=member.period,
                spent=member.usd_spent,
                reserved=member.usd_reserved,
                needed=wanted,
                important=important,
                wanted=wanted + extra,
            ),
            leaving=leaving,
        )

    def apply(self, member: Member, request: ExchangeRequest, reply: ExchangeReply) -> None:
        member.pending = None
        member.epoch = reply.epoch
        assert request.slots is not None
        assert request.budget is not None
        for number, quota in enumerate(request.quotas):
            member.used[number] -= quota.used
            member.held[number] = reply.quotas[number].held if reply.quotas else 0.0
        member.usd_spent -= request.budget.spent
        member.allowed = reply.slots.allowed if reply.slots else 0
        member.usd_held = reply.budget.held if reply.budget else 0.0
        member.period = reply.budget.period if reply.budget else -1.0
        state = self.state
        assert state is not None
        # The lease counts from when the request was sent; here it may have been decided long before its reply came.
        known = state.members.get(member.name)
        member.lease_until = -math.inf if known is None else self.now + (known.until - state.time)

    @property
    def state(self) -> Any:
        return None if self.ledger is None else self.ledger.state

    @invariant()
    def the_money_is_conserved(self) -> None:
        if self.state is None:
            return
        unreported = sum(member.usd_spent for member in self.members.values())
        counted_unheard = sum(
            member.pending.budget.spent
            for member in self.members.values()
            if member.pending is not None and member.pending.budget is not None and self.was_decided(member)
        )
        assert self.state.spent + unreported - counted_unheard == self.approximately(self.spent)

    def was_decided(self, member: Member) -> bool:
        assert member.pending is not None
        known = self.state.members.get(member.name) or self.state.ended.get(member.name)
        return known is not None and known.sequence >= member.pending.sequence

    @staticmethod
    def approximately(value: float) -> Any:
        class Close(float):
            def __eq__(self, other: object) -> bool:
                return isinstance(other, float) and math.isclose(self, other, rel_tol=1e-9, abs_tol=1e-6)

            __hash__ = float.__hash__

        return Close(value)

    @invariant()
    def no_more_money_is_held_than_is_left(self) -> None:
        if self.state is None:
            return
        late = sum(member.usd_reserved for member in self.members.values() if self.now >= member.lease_until)
        held = sum(member.usd for member in self.state.members.values())
        spent_late = max(0.0, self.state.spent - 100.0)
        assert self.state.spent + held <= 100.0 + late + spent_late + held * (spent_late > 0.0) + 1e-6

    @invariant()
    def a_level_and_what_is_held_of_it_are_one_amount_at_most(self) -> None:
        if self.state is None:
            return
        for number, quota in enumerate(TERMS.quotas):
            held = sum(member.held[number] for member in self.state.members.values())
            assert self.state.levels[number] + held <= quota.amount * (1 + 1e-9)

    @invariant()
    def slots_that_live_members_hold_are_within_the_limit(self) -> None:
        alive = [member for member in self.members.values() if self.now < member.lease_until]
        zombies = sum(member.in_flight for member in self.members.values() if self.now >= member.lease_until)
        if zombies == 0:
            assert sum(member.in_flight for member in alive) <= 5 or self.state is None


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
