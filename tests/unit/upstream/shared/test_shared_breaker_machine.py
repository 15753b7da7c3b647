"""The breaker of several processes as a state machine: whatever replies are lost, they probe no more than one would."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Final

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.breaker import BreakerRules, BreakerState, FaultCountTrigger, consecutive_faults
from forebay.interfaces import Outcome
from forebay.upstream.shared.leases.leased_breaker import LeasedBreaker
from forebay.upstream.shared.leases.leased_stoppages import LeasedStoppages
from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.messages import LEASE, ExchangeRequest, LedgerTerms

KIND: Final = "breaker"
TERMS: Final = LedgerTerms(limit="AdaptiveLimit", breaker="BreakerRules()")
START: Final = 1_767_225_600.0
MEMBERS: Final = 3
MOST_FAULTS: Final = 5  # of each process, until none sends a call


@dataclass
class Member:
    """A process that shares the breaker.

    Attributes:
        breaker: as it has it.
        shared: what it reports of it.
        out: the epochs of its calls in flight.
        pending: its request that was not answered.
        sent_at: when its latest request that was answered was sent.
        ledger: the epoch of the ledger.
    """

    breaker: LeasedBreaker
    shared: LeasedStoppages = field(init=False)
    out: list[int] = field(default_factory=list)
    pending: ExchangeRequest | None = None
    pending_at: float = 0.0
    sent_at: float = -math.inf
    ledger: str = ""

    def __post_init__(self) -> None:
        self.shared = LeasedStoppages({KIND: self.breaker})


class SharedBreakerMachine(RuleBasedStateMachine):
    """Processes that make calls and exchanges in any order; each makes one in time to keep its lease."""

    @initialize(probes=st.integers(1, 2), successes=st.integers(1, 3), draw=st.floats(0, 1, exclude_max=True))
    def build(self, probes: int, successes: int, draw: float) -> None:
        self.breaker_rules = BreakerRules(
            triggers=(consecutive_faults(3), FaultCountTrigger(faults=5, calls=20)),
            reset_timeout=2.0,
            max_reset_timeout=8.0,
            probes=probes,
            successes=successes,
            probe_timeout=6.0,
        )
        self.now = 0.0
        self.sequence = itertools.count(1)
        self.ledger: AccountLedger | None = None
        self.members = [Member(LeasedBreaker(self.breaker_rules, draw=lambda: draw)) for _ in range(MEMBERS)]
        for number in range(MEMBERS):
            self.exchange(number, waiting=False, is_lost=False)

    @rule()
    def stop_calls(self) -> None:
        """Let the calls of all processes fail until none is sent, and the time pass until some may probe.

        Those of one process would not do: while others succeed, its own network may be broken.
        """
        for _ in range(MOST_FAULTS):
            for member in self.members:
                member.breaker.record(self.now, Outcome.FAULT, member.breaker.allow(self.now))
            self.synchronize()
        assert BreakerState.CLOSED not in {member.breaker.state(self.now) for member in self.members}
        self.wait(max(member.breaker.retry_after(self.now) or 0.0 for member in self.members))

    def is_leased(self, member: Member) -> bool:
        return self.now < member.sent_at + LEASE

    @rule(number=st.integers(0, MEMBERS - 1))
    def call(self, number: int) -> None:
        member = self.members[number]
        if self.is_leased(member) and member.breaker.ready(self.now) and not member.shared.needs_probe(self.now):
            epoch = member.breaker.allow(self.now)
            assert epoch, "a call that needs no probe of the ledger, or has one, is let through"
            member.out.append(epoch)

    @precondition(lambda self: any(member.out for member in self.members))
    @rule(data=st.data(), outcome=st.sampled_from([Outcome.SUCCESS, Outcome.FAULT, Outcome.FAULT, Outcome.IGNORED]))
    def end(self, data: st.DataObject, outcome: Outcome) -> None:
        member = data.draw(st.sampled_from([member for member in self.members if member.out]))
        member.breaker.record(self.now, outcome, member.out.pop(data.draw(st.integers(0, len(member.out) - 1))))

    @rule(number=st.integers(0, MEMBERS - 1), waiting=st.booleans(), is_lost=st.booleans())
    def exchange(self, number: int, *, waiting: bool, is_lost: bool) -> None:
        member = self.members[number]
        if member.pending is None:
            member.pending_at = self.now
            member.pending = ExchangeRequest(
                ledger="l",
                member=str(number),
                sequence=next(self.sequence),
                epoch=member.ledger,
                terms=TERMS,
                stoppages=member.shared.report(self.now, int(waiting)),
            )
        request = member.pending
        if self.ledger is None:
            self.ledger = AccountLedger.open(START + self.now, request)
        reply = self.ledger.exchange(START + self.now, request)
        if is_lost:
            return
        member.pending, member.ledger, member.sent_at = None, reply.epoch, member.pending_at
        assert request.stoppages is not None
        member.shared.receive(self.now, self.now + LEASE, request.stoppages, reply.stoppages or {})

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            for number, member in enumerate(self.members):
                if self.now >= member.sent_at + LEASE - 2.0:
                    self.exchange(number, waiting=False, is_lost=False)

    def synchronize(self) -> None:
        """Let all processes know all.

        One round sends again what was not answered, one reports what has happened since, one opens the breaker of a
        process by that, one reports this, and one tells those that were asked before.
        """
        for _ in range(5):
            for number in range(MEMBERS):
                self.exchange(number, waiting=False, is_lost=False)

    @invariant()
    def probes_of_all_are_bounded(self) -> None:
        probes = sum(member.breaker.probes(self.now) for member in getattr(self, "members", ()))
        assert not probes or probes <= self.breaker_rules.probes

    @rule()
    def they_agree_once_they_know_all(self) -> None:
        self.synchronize()
        assert len({member.breaker.state(self.now) for member in self.members}) == 1

    @rule()
    def it_can_recover(self) -> None:
        self.wait(20.0)
        for member in self.members:
            for epoch in member.out:
                member.breaker.record(self.now, Outcome.IGNORED, epoch)
            member.out.clear()
        self.synchronize()
        self.wait(10.0)
        for _ in range(2 * self.breaker_rules.successes):
            self.exchange(0, waiting=True, is_lost=False)
            if (epoch := self.members[0].breaker.allow(self.now)) != 0:
                self.members[0].breaker.record(self.now, Outcome.SUCCESS, epoch)
            self.synchronize()
        assert {member.breaker.state(self.now) for member in self.members} == {BreakerState.CLOSED}


TestSharedBreakerMachine = SharedBreakerMachine.TestCase
TestSharedBreakerMachine.settings = settings(max_examples=40, stateful_step_count=30)
