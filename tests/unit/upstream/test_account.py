"""An account under whatever calls come, wait, leave and end: nothing is granted at a limit, nothing kept for ever."""

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
from forebay.upstream.account import Account
from forebay.upstream.call_queue import QueuedCall
from forebay.upstream.call_request import Admitted, CallOutcome, CallRequest, Permit, Queued, Rejected

SLOTS = 3
TOKENS = 1_000  # a minute


class ListeningWaiter:
    """A waiter that only remembers."""

    def __init__(self) -> None:
        self.decision: Admitted | Rejected | None = None
        self.gone = False

    def resolve(self, decision: Admitted | Rejected) -> bool:
        self.decision = decision
        return not self.gone

    def wake_at(self, when: float) -> bool:
        self.when = when
        return not self.gone


class EndlessBudget:
    """A purse without end that counts what it holds."""

    name = "the budget"

    def __init__(self) -> None:
        self.held = 0.0
        self.spent = 0.0

    def can_afford(self, usd: float, priority: Priority) -> bool:
        return usd >= 0 and priority in Priority

    def reserve(self, usd: float) -> EndlessReservation:
        self.held += usd
        return EndlessReservation(self, usd)

    def rejection(self, usd: float) -> Rejected:
        return Rejected(f"{usd} is too much", "budget", 0.0, None)


class EndlessReservation:
    def __init__(self, money: EndlessBudget, usd: float) -> None:
        self.money = money
        self.usd: float | None = usd

    def settle(self, usd: float) -> None:
        assert self.usd is not None, "settled twice"
        self.money.held -= self.usd
        self.money.spent += usd
        self.usd = None


class AccountMachine(RuleBasedStateMachine):
    @initialize()
    def build(self) -> None:
        self.now = 0.0
        self.money = EndlessBudget()
        self.account = Account(
            "upstream:test",
            limit=FixedLimit(SLOTS),
            quotas=RateLimiter([Quota(tokens=TOKENS, per="minute")]),
            breaker=Breaker(UPSTREAM_RULES, draw=lambda: 0.5),
            budgets=lambda _: (self.money,),
            max_wait=1_000.0,
            draw=lambda: 0.5,
        )
        self.permits: list[Permit] = []
        self.waiting: list[tuple[QueuedCall, ListeningWaiter]] = []
        self.given = 0.0  # tokens

    @rule(
        tokens=st.integers(0, TOKENS + 1),
        rung=st.sampled_from(Priority),
        run=st.sampled_from([None, "a", "b"]),
        patience=st.sampled_from([1.0, 50.0, math.inf]),
    )
    def come(self, tokens: int, rung: Priority, run: str | None, patience: float) -> None:
        ask = CallRequest(
            charge=Charge(tokens=tokens), usd=1.0, priority=rung, task_id=run, deadline=self.now + patience
        )
        answer = self.account.try_acquire(self.now, ask)
        if isinstance(answer, Admitted):
            self.permits.append(answer.permit)
            self.given += tokens
        elif isinstance(answer, Queued):
            listener = ListeningWaiter()
            self.waiting.append((self.account.enqueue(self.now, ask, listener), listener))
            self.pump()
        elif tokens > TOKENS:
            assert answer.retry_after is None

    def pump(self) -> None:
        self.account.serve_queue(self.now)
        for waiting, listener in [*self.waiting]:
            if listener.decision is not None:
                self.waiting.remove((waiting, listener))
                if isinstance(listener.decision, Admitted) and not listener.gone:
                    self.permits.append(listener.decision.permit)
                    self.given += waiting.request.charge.tokens

    @rule(seconds=st.floats(0.01, 90.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.pump()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), tells=st.booleans())
    def leave(self, data: st.DataObject, *, tells: bool) -> None:
        waiting, listener = data.draw(st.sampled_from(self.waiting))
        if tells:
            self.account.withdraw(waiting)
            self.waiting.remove((waiting, listener))
        else:
            listener.gone = True  # its loop has closed
        self.pump()

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
        if how in ("released", "rate"):  # it was not counted
            self.given -= permit.request.charge.tokens
        self.account.settle(self.now, permit, ended)
        with pytest.raises(ReservationClosed):
            self.account.quotas.release(self.now, permit.reservation)
        self.pump()

    @invariant()
    def nothing_is_granted_at_a_limit(self) -> None:
        if hasattr(self, "account"):
            assert self.account.in_flight == len(self.permits) <= SLOTS
            assert self.given <= TOKENS + TOKENS * self.now / 60 + 1e-6

    @invariant()
    def what_is_reserved_belongs_to_a_call(self) -> None:
        if hasattr(self, "account"):
            assert self.money.held == len(self.permits)
            alive = sum(not listener.gone for _, listener in self.waiting)
            assert alive <= len(self.account.queue)

    @invariant()
    def who_heads_the_line_knows_when_to_look(self) -> None:
        """Else it would wait for ever: nothing is in flight whose end could move the line."""
        if hasattr(self, "account") and self.account.queue and not self.permits:
            place = self.account.queue.head()
            assert place is not None
            assert getattr(place[2].waiter, "when", None) is not None

    def teardown(self) -> None:
        if hasattr(self, "account"):
            for permit in self.permits:
                self.account.release_unsent(self.now, permit)
            for waiting, _ in self.waiting:
                self.account.withdraw(waiting)
            assert not self.account.in_flight
            assert not self.account.queue
            assert self.money.held == 0


TestAccount = AccountMachine.TestCase
TestAccount.settings = settings(max_examples=60, stateful_step_count=40)
