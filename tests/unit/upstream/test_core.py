"""The state of an upstream in a child that was forked from its process."""

from __future__ import annotations

from forebay import Budget, Price, Upstream
from forebay.interfaces import Charge, Outcome
from forebay.upstream.call_request import CallOutcome, Permit
from forebay.upstream.core import UpstreamCore


def acquire(core: UpstreamCore) -> Permit:
    request = core.request("m", Charge(input_tokens=4))
    return core.accounts.account("m").acquire_blocking(request)


def test_after_a_fork_the_calls_of_the_parent_hold_nothing_and_are_not_taken_back() -> None:
    llm = Upstream("llm", max_concurrent=1, budget=Budget(usd=5), prices={"m": Price(input=1e6, output=0)})
    core, account = llm.core, llm.core.accounts.account("m")
    inherited = acquire(core)
    core.reset_after_fork()
    assert core.accounts.account("m") is account
    assert (account.account.in_flight, llm.statistics().spent_usd) == (0, 0)
    permit = acquire(core)
    account.settle(inherited, CallOutcome(kind=Outcome.SUCCESS))
    assert inherited.closed
    assert account.account.in_flight == 1
    account.settle(permit, CallOutcome(kind=Outcome.SUCCESS))
    assert (account.account.in_flight, llm.statistics().spent_usd) == (0, 4)
