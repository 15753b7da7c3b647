"""The retries of an account: first ones and later ones share a budget of which a quarter is for first ones alone."""

from __future__ import annotations

from forebay import Upstream
from forebay.interfaces import Outcome
from forebay.retry import Retry, RetryState
from forebay.upstream.accounts.account_retries import AccountRetries
from forebay.upstream.call_request import AttemptResult, CallOutcome

FAULT = AttemptResult(outcome=CallOutcome(kind=Outcome.FAULT), retryable=True)


def retry(retries: AccountRetries, state: RetryState) -> bool:
    return retries.next_delay(state, FAULT, now=0.0, deadline=100.0) is not None


def test_calls_that_fail_again_and_again_leave_retries_for_the_first_failures_of_others() -> None:
    retries = AccountRetries(Retry(max_attempts=1000), draw=lambda: 0.0)
    hopeless = RetryState(retries.retry)
    while retry(retries, hopeless):
        pass
    assert hopeless.failed == 8  # three quarters of the ten retries that need no first attempt; the next one got none
    assert [retry(retries, RetryState(retries.retry)) for _ in range(4)] == [True] * 3 + [False]


def test_a_single_call_has_all_of_its_attempts() -> None:
    retries = AccountRetries(Retry(), draw=lambda: 0.0)
    state = RetryState(retries.retry)
    assert [retry(retries, state) for _ in range(6)] == [True] * 5 + [False]


def test_each_model_has_retries_of_its_own() -> None:
    accounts = Upstream("llm", provider="openai").core.accounts
    assert accounts.account("gpt-4o").retries is not accounts.account("gpt-4o-mini").retries
