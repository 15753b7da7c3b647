"""The call flow, step by step and without I/O: what it asks for next, given what came before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from forebay import Overloaded, Upstream, clock
from forebay.interfaces import Outcome
from forebay.retry import Retry
from forebay.upstream.call_flow import Acquire, Flow, Release, Send, Sleep, Step, call_flow
from forebay.upstream.call_request import AttemptResult, CallOutcome, CallRequest, Permit
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

SUCCESS = AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS), value="done")
FAULT = AttemptResult(outcome=CallOutcome(kind=Outcome.FAULT), retryable=True)
THROTTLED = AttemptResult(
    outcome=CallOutcome(kind=Outcome.OVERLOAD, released=True), retryable=True, uses_attempt=False, retry_after=2.0
)
WRONG = AttemptResult(outcome=CallOutcome(kind=Outcome.IGNORED))
STREAM = AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS), streaming=True)


class FlowHarness:
    """A flow, and an account that gives its permits."""

    def __init__(self, *, retried: bool = True, deadline: float = math.inf, **settings: Any) -> None:
        self.upstream = Upstream("llm", **settings)
        self.account = self.upstream.core.accounts.account("")
        route = PlainRoute(self.upstream, self.account, CallRequest(deadline=deadline))
        self.flow: Flow = call_flow(route, self.upstream.runner.resolver, retried=retried)
        self.released: list[CallOutcome] = []
        self.result: AttemptResult | None = None

    def start(self) -> str:
        return self._until_wait(lambda: next(self.flow))

    def send(self, result: AttemptResult) -> str:
        return self._until_wait(lambda: self.flow.send(result))

    def resume(self) -> str:
        return self._until_wait(lambda: self.flow.send(None))

    def throw(self, error: BaseException) -> str:
        return self._until_wait(lambda: self.flow.throw(error))

    def _until_wait(self, advance: Callable[[], Step]) -> str:
        """Give permits and take them back; return the name of the first step that waits for something else."""
        try:
            step = advance()
            while True:
                if isinstance(step, Acquire):
                    step = self.flow.send(self.account.acquire_blocking(step.request))
                elif isinstance(step, Release):
                    self.released.append(step.outcome)
                    self.account.settle(step.permit, step.outcome)
                    step = self.flow.send(None)
                else:
                    assert isinstance(step, Send | Sleep)
                    return type(step).__name__
        except StopIteration as end:
            self.result = end.value
            return "end"

    @property
    def in_flight(self) -> int:
        return self.account.account.in_flight


@pytest.mark.parametrize("result", [SUCCESS, WRONG])
def test_a_result_that_no_retry_would_better_ends_the_flow(result: AttemptResult) -> None:
    flow = FlowHarness()
    assert (flow.start(), flow.send(result)) == ("Send", "end")
    assert flow.result is result
    assert flow.released == [result.outcome]
    assert flow.in_flight == 0


def test_a_fault_is_retried_after_a_wait_and_only_the_last_attempt_is_final() -> None:
    flow = FlowHarness()
    assert [flow.start(), flow.send(FAULT), flow.resume(), flow.send(SUCCESS)] == ["Send", "Sleep", "Send", "end"]
    assert [outcome.final for outcome in flow.released] == [False, True]


def test_attempts_that_fail_are_bounded() -> None:
    flow = FlowHarness(retry=Retry(max_attempts=2))
    assert [flow.start(), flow.send(FAULT), flow.resume(), flow.send(FAULT)] == ["Send", "Sleep", "Send", "end"]
    assert flow.result is FAULT


def test_throttled_attempts_use_up_none() -> None:
    flow = FlowHarness(retry=Retry(max_attempts=1))
    flow.start()
    for _ in range(3):
        assert flow.send(THROTTLED) == "Sleep"
        assert flow.resume() == "Send"
    assert flow.send(SUCCESS) == "end"


def test_without_retries_a_fault_ends_the_flow() -> None:
    flow = FlowHarness(retried=False)
    assert (flow.start(), flow.send(FAULT)) == ("Send", "end")
    assert flow.released == [FAULT.outcome]


def test_the_permit_of_a_streaming_answer_is_left_to_its_reader() -> None:
    flow = FlowHarness()
    assert (flow.start(), flow.send(STREAM)) == ("Send", "end")
    assert flow.released == []
    assert flow.in_flight == 1


def test_a_cancelled_attempt_releases_its_permit() -> None:
    flow = FlowHarness()
    flow.start()
    with pytest.raises(KeyboardInterrupt):
        flow.throw(KeyboardInterrupt())
    assert [outcome.kind for outcome in flow.released] == [Outcome.IGNORED]
    assert flow.in_flight == 0


@pytest.mark.parametrize("result", [FAULT, THROTTLED])
def test_a_retry_that_is_cancelled_while_it_waits_goes_back_to_the_budget(result: AttemptResult) -> None:
    flow = FlowHarness()
    budgets = flow.account.retries._budgets
    flow.start()
    before = budgets.faults._retries, budgets.throttles._retries
    assert flow.send(result) == "Sleep"
    with pytest.raises(KeyboardInterrupt):
        flow.throw(KeyboardInterrupt())
    assert (budgets.faults._retries, budgets.throttles._retries) == before
    assert flow.in_flight == 0


def test_a_rejected_retry_ends_the_flow_with_the_rejection() -> None:
    flow = FlowHarness()
    flow.start()
    flow.send(FAULT)
    step = flow.flow.send(None)
    assert isinstance(step, Acquire)
    with pytest.raises(Overloaded, match="full"):
        flow.flow.throw(Overloaded("full"))


@pytest.mark.parametrize("result", [FAULT, THROTTLED])
def test_a_retry_for_which_no_time_is_left_ends_the_flow_with_the_last_result(result: AttemptResult) -> None:
    flow = FlowHarness()
    flow.start()
    flow.send(result)
    step = flow.flow.send(None)
    assert isinstance(step, Acquire)
    assert flow.throw(Overloaded("late", limited_by="upstream:llm:deadline", retry_after=1.0)) == "end"
    assert flow.result is result
    assert flow.in_flight == 0


def test_a_retry_whose_deadline_passes_in_the_queue_ends_the_flow_with_the_last_result() -> None:
    flow = FlowHarness(deadline=clock.now() + 1000.0)
    flow.start()
    flow.send(FAULT)
    step = flow.flow.send(None)
    assert isinstance(step, Acquire)
    step.request.deadline = clock.now()
    assert flow.throw(Overloaded("late", limited_by="upstream:llm:queue", retry_after=1.0)) == "end"
    assert flow.result is FAULT


def test_a_call_that_is_rejected_earns_no_retries_and_one_that_is_sent_does() -> None:
    flow = FlowHarness(deadline=-math.inf)
    budgets = flow.account.retries._budgets
    with pytest.raises(Overloaded, match="deadline"):
        flow.start()
    assert (budgets.faults._first, budgets.throttles._first) == (0, 0)
    sent = FlowHarness()
    assert (sent.start(), sent.send(SUCCESS)) == ("Send", "end")
    budgets = sent.account.retries._budgets
    assert (budgets.faults._first, budgets.throttles._first) == (1, 1)


def test_a_permit_that_is_closed_is_not_released_again() -> None:
    flow = FlowHarness()
    step = next(flow.flow)
    assert isinstance(step, Acquire)
    permit: Permit = flow.account.acquire_blocking(step.request)
    flow.flow.send(permit)
    flow.account.settle(permit, CallOutcome(kind=Outcome.IGNORED))
    with pytest.raises(KeyboardInterrupt):
        flow.throw(KeyboardInterrupt())
    assert flow.released == []


def test_a_call_that_is_refused_again_and_again_waits_for_no_quota_but_for_its_permission(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow = FlowHarness()
    monkeypatch.setattr(flow.account, "quota_wait", lambda _: 5.0)
    flow.start()
    assert flow.send(THROTTLED) == "Send"  # it has waited in the queue
    assert flow.send(THROTTLED) == "Sleep"
    assert (flow.resume(), flow.send(SUCCESS)) == ("Send", "end")
