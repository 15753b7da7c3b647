"""An account under random calls that arrive, wait, leave and end: no limit is exceeded, and nothing is kept."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.breaker import UPSTREAM_RULES, Breaker
from forebay.errors import ReservationClosed
from forebay.interfaces import Charge, Outcome
from forebay.limit import FixedLimit
from forebay.quota import Quota, RateLimiter
from forebay.task import Priority
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.call_queue import QueuedCall
from forebay.upstream.call_request import Admitted, CallOutcome, CallRequest, Permit, Queued, Rejected

SLOTS = 3
TOKENS = 1_000  # a minute


class DecisionWaiter:
    """A waiter that records its decision."""

    def __init__(self) -> None:
        self.decision: Admitted | Rejected | None = None
        self.gone = False

    def resolve(self, decision: Admitted | Rejected) -> bool:
        self.decision = decision
        return not self.gone

    def wake_at(self, when: float) -> bool:
        self.when = when
        return not self.gone


class EndlessReservation:
    """Dollars held of an `EndlessBudget`."""

    def __init__(self, budget: EndlessBudget, usd: float) -> None:
        self.budget = budget
        self.held = [usd]

    def settle(self, usd: float) -> None:
        assert self.held, "settled twice"
        self.budget.held -= self.held.pop()
        self.budget.spent += usd

    def revise(self, usd: float) -> None:
        assert not self.held, "not settled yet"
        self.budget.spent += usd


class EndlessBudget:
    """An unlimited budget that counts what is reserved and spent."""

    name = "the budget"

    def __init__(self) -> None:
        self.held = 0.0
        self.spent = 0.0

    def can_afford(self, usd: float, priority: Priority) -> bool:
        return usd >= 0 and priority in Priority

    def try_reserve(self, usd: float, priority: Priority) -> EndlessReservation | None:
        if not self.can_afford(usd, priority):
            return None
        self.held += usd
        return EndlessReservation(self, usd)

    def rejection(self, usd: float, priority: Priority) -> Rejected:
        del priority
        return Rejected(f"{usd} is too much", "budget", 0.0, None)


class AccountMachine(RuleBasedStateMachine):
    @initialize()
    def build(self) -> None:
        self.now = 0.0
        self.budget = EndlessBudget()
        self.account = Account(
            "upstream:test",
            limit=FixedLimit(SLOTS),
            quotas=RateLimiter([Quota(tokens=TOKENS, per="minute")]),
            breaker=Breaker(UPSTREAM_RULES, draw=lambda: 0.5),
            budgets=lambda _: (self.budget,),
            max_wait=1_000.0,
            draw=lambda: 0.5,
        )
        self.permits: list[Permit] = []
        self.waiting: list[tuple[QueuedCall, DecisionWaiter]] = []
        self.granted = 0.0  # tokens

    @rule(
        tokens=st.integers(0, TOKENS + 1),
        priority=st.sampled_from(Priority),
        run=st.sampled_from([None, "a", "b"]),
        patience=st.sampled_from([1.0, 50.0, math.inf]),
    )
    def request(self, tokens: int, priority: Priority, run: str | None, patience: float) -> None:
        request = CallRequest(
            charge=Charge(tokens=tokens), usd=1.0, priority=priority, task_id=run, deadline=self.now + patience
        )
        answer = self.account.try_acquire(self.now, request)
        if isinstance(answer, Admitted):
            self.permits.append(answer.permit)
            self.granted += tokens
        elif isinstance(answer, Queued):
            waiter = DecisionWaiter()
            self.waiting.append((self.account.queue.enqueue(self.now, request, waiter), waiter))
            self.serve_queue()
        elif tokens > TOKENS:
            assert answer.retry_after is None

    def serve_queue(self) -> None:
        self.account.serve_queue(self.now)
        for waiting, waiter in [*self.waiting]:
            if waiter.decision is not None:
                self.waiting.remove((waiting, waiter))
                if isinstance(waiter.decision, Admitted) and not waiter.gone:
                    self.permits.append(waiter.decision.permit)
                    self.granted += waiting.request.charge.tokens

    @rule(seconds=st.floats(0.01, 90.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.serve_queue()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), withdraws=st.booleans())
    def leave(self, data: st.DataObject, *, withdraws: bool) -> None:
        waiting, waiter = data.draw(st.sampled_from(self.waiting))
        if withdraws:
            self.account.queue.withdraw(waiting)
            self.waiting.remove((waiting, waiter))
        else:
            waiter.gone = True  # its loop has closed
        self.serve_queue()

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), how=st.sampled_from(["used", "more", "released", "rate"]))
    def end(self, data: st.DataObject, outcome: Outcome, how: str) -> None:
        permit = data.draw(st.sampled_from(self.permits))
        self.permits.remove(permit)
        ended = CallOutcome(
            kind=outcome,
            used=Charge(tokens=permit.request.charge.tokens + 10) if how == "more" else None,
            released=how == "released",
            rate_limited=how == "rate",
            usd=0.0 if how == "released" else None,
            latency=1.0,
        )
        if how in ("released", "rate"):  # the quota did not count it
            self.granted -= permit.request.charge.tokens
        self.account.settle(self.now, permit, ended)
        with pytest.raises(ReservationClosed):
            self.account.quotas.release(self.now, permit.reservation)
        self.serve_queue()

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        if hasattr(self, "account"):
            assert self.account.in_flight == len(self.permits) <= SLOTS
            assert self.granted <= TOKENS + TOKENS * self.now / 60 + 1e-6

    @invariant()
    def only_calls_in_flight_hold_dollars(self) -> None:
        if hasattr(self, "account"):
            assert self.budget.held == len(self.permits)
            alive = sum(not waiter.gone for _, waiter in self.waiting)
            assert alive <= len(self.account.queue)

    @invariant()
    def the_head_of_the_queue_knows_when_to_wake(self) -> None:
        """Check it while nothing is in flight: then no settled call serves the queue."""
        if hasattr(self, "account") and self.account.queue and not self.permits:
            head = self.account.queue.head()
            assert head is not None
            assert getattr(head[2].waiter, "when", None) is not None

    def teardown(self) -> None:
        if hasattr(self, "account"):
            for permit in self.permits:
                self.account.release_unsent(self.now, permit)
            for waiting, _ in self.waiting:
                self.account.queue.withdraw(waiting)
            assert not self.account.in_flight
            assert not self.account.queue
            assert self.budget.held == 0


TestAccount = AccountMachine.TestCase
TestAccount.settings = settings(max_examples=60, stateful_step_count=40)
