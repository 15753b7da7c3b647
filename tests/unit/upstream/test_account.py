"""An account under whatever calls come, wait, leave and end: nothing is granted at a limit, nothing kept for ever."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.breaker import UPSTREAM_RULES, Breaker
from forebay.errors import ReservationClosed
from forebay.limit import FixedLimit
from forebay.quota import Quota, Quotas
from forebay.task import Priority
from forebay.typing import Charge, Outcome
from forebay.upstream.account import Account
from forebay.upstream.ask import Ask, Ended, Go, No, Permit, Wait
from forebay.upstream.waiting import Waiting

SLOTS = 3
TOKENS = 1_000  # a minute


class Listener:
    """A waiter that only remembers."""

    def __init__(self) -> None:
        self.given: Go | No | None = None
        self.gone = False

    def answer(self, answer: Go | No) -> bool:
        self.given = answer
        return not self.gone

    def look_at(self, when: float) -> bool:
        self.when = when
        return not self.gone


class Money:
    """A purse without end that counts what it holds."""

    name = "the budget"

    def __init__(self) -> None:
        self.held = 0.0
        self.spent = 0.0

    def affords(self, usd: float, priority: Priority) -> bool:
        return usd >= 0 and priority in Priority

    def reserve(self, usd: float) -> Sum:
        self.held += usd
        return Sum(self, usd)

    def refusal(self, usd: float) -> No:
        return No(f"{usd} is too much", "budget", 0.0, None)


class Sum:
    def __init__(self, money: Money, usd: float) -> None:
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
        self.money = Money()
        self.account = Account(
            "upstream:test",
            limit=FixedLimit(SLOTS),
            quotas=Quotas([Quota(tokens=TOKENS, per="minute")]),
            breaker=Breaker(UPSTREAM_RULES, draw=lambda: 0.5),
            purses=lambda _: (self.money,),
            longest_wait=1_000.0,
            draw=lambda: 0.5,
        )
        self.permits: list[Permit] = []
        self.waiting: list[tuple[Waiting, Listener]] = []
        self.given = 0.0  # tokens

    @rule(
        tokens=st.integers(0, TOKENS + 1),
        rung=st.sampled_from(Priority),
        run=st.sampled_from([None, "a", "b"]),
        patience=st.sampled_from([1.0, 50.0, math.inf]),
    )
    def come(self, tokens: int, rung: Priority, run: str | None, patience: float) -> None:
        ask = Ask(charge=Charge(tokens=tokens), usd=1.0, priority=rung, run=run, deadline=self.now + patience)
        answer = self.account.admit(self.now, ask)
        if isinstance(answer, Go):
            self.permits.append(answer.permit)
            self.given += tokens
        elif isinstance(answer, Wait):
            listener = Listener()
            self.waiting.append((self.account.join(self.now, ask, listener), listener))
            self.pump()
        elif tokens > TOKENS:
            assert answer.retry_after is None

    def pump(self) -> None:
        self.account.pump(self.now)
        for waiting, listener in [*self.waiting]:
            if listener.given is not None:
                self.waiting.remove((waiting, listener))
                if isinstance(listener.given, Go) and not listener.gone:
                    self.permits.append(listener.given.permit)
                    self.given += waiting.ask.charge.tokens

    @rule(seconds=st.floats(0.01, 90.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.pump()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), tells=st.booleans())
    def leave(self, data: st.DataObject, *, tells: bool) -> None:
        waiting, listener = data.draw(st.sampled_from(self.waiting))
        if tells:
            self.account.leave(waiting)
            self.waiting.remove((waiting, listener))
        else:
            listener.gone = True  # its loop has closed
        self.pump()

    @precondition(lambda self: self.permits)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), how=st.sampled_from(["used", "more", "released", "rate"]))
    def end(self, data: st.DataObject, outcome: Outcome, how: str) -> None:
        permit = data.draw(st.sampled_from(self.permits))
        self.permits.remove(permit)
        ended = Ended(
            outcome=outcome,
            used=Charge(tokens=permit.ask.charge.tokens + 10) if how == "more" else None,
            released=how == "released",
            rate=how == "rate",
            usd=0.0 if how == "released" else None,
            seconds=1.0,
        )
        if how in ("released", "rate"):  # it was not counted
            self.given -= permit.ask.charge.tokens
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
            assert alive <= len(self.account.line)

    @invariant()
    def who_heads_the_line_knows_when_to_look(self) -> None:
        """Else it would wait for ever: nothing is in flight whose end could move the line."""
        if hasattr(self, "account") and self.account.line and not self.permits:
            place = self.account.line.head()
            assert place is not None
            assert getattr(place[2].waiter, "when", None) is not None

    def teardown(self) -> None:
        if hasattr(self, "account"):
            for permit in self.permits:
                self.account.never_sent(self.now, permit)
            for waiting, _ in self.waiting:
                self.account.leave(waiting)
            assert not self.account.in_flight
            assert not self.account.line
            assert self.money.held == 0


TestAccount = AccountMachine.TestCase
TestAccount.settings = settings(max_examples=60, stateful_step_count=40)
