"""The queue of calls: who goes before whom, and the turns of tenants whose calls leave."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given
from tests.unit.upstream.accounts.test_decisions import RecordingWaiter

from forebay.task import Priority
from forebay.upstream.accounts.call_queue import CallQueue, QueuedCall
from forebay.upstream.accounts.fair_order import FairOrder
from forebay.upstream.call_request import CallRequest


class QueueHarness:
    """A queue with short names for the operations of a test."""

    def __init__(self, **weights: float) -> None:
        self.order = FairOrder(weights)
        self.queue = CallQueue(self.order)

    def join(self, tenant: str = "default", **how: Any) -> QueuedCall:
        return self.queue.enqueue(0.0, CallRequest(tenant=tenant, **how), RecordingWaiter())

    def serve(self) -> QueuedCall:
        head = self.queue.head()
        assert head is not None
        return self.queue.serve_head(0.0, head)

    def turns_before(self, call: QueuedCall) -> int:
        """Return how many calls are served before this one, if no others come."""
        return list(self.queue.in_order()).index(call)


def test_a_call_is_behind_those_that_go_before_it_and_no_others() -> None:
    harness = QueueHarness()
    first = harness.join("a", task_id="first")
    for _ in range(50):
        harness.join("a")
    assert harness.queue.ahead_of(CallRequest(tenant="a")) == 51
    assert harness.queue.ahead_of(CallRequest(tenant="b")) == 1, "tenants take turns"
    assert harness.queue.ahead_of(CallRequest(tenant="a", task_id="first")) == 1, "its run began first"
    assert harness.queue.ahead_of(CallRequest(tenant="a", retries=1)) == 0
    assert harness.queue.ahead_of(CallRequest(tenant="b", priority=Priority.LOW)) == 51
    assert harness.queue.ahead_of(CallRequest(tenant="a", priority=Priority.HIGH)) == 0
    assert harness.serve() is first


def test_asking_for_the_calls_ahead_takes_no_turn() -> None:
    harness = QueueHarness()
    for _ in range(100):
        harness.queue.ahead_of(CallRequest(tenant="b"))
    for _ in range(10):
        harness.join("a")
    assert harness.turns_before(harness.join("b")) <= 1


def test_a_tenant_whose_calls_have_all_left_goes_on_as_if_they_had_never_asked() -> None:
    harness = QueueHarness()
    for _ in range(10):
        harness.join("a")
    for call in [harness.join("b", task_id=f"{n}") for n in range(300)]:
        harness.queue.withdraw(call)
    assert harness.turns_before(harness.join("b")) <= 1
    assert harness.turns_before(harness.join("b", task_id="299")) <= 3, "its run has been given up, and begins again"


def test_a_patient_call_takes_the_turn_of_those_that_have_left_before_it() -> None:
    harness = QueueHarness()
    others = [harness.join("a") for _ in range(400)]
    impatient = [harness.join("b") for _ in range(300)]
    patient = harness.join("b", task_id="patient")
    for call in impatient:
        harness.queue.withdraw(call)
    assert harness.turns_before(patient) <= 1
    assert harness.queue.ahead_of(CallRequest(tenant="b", task_id="patient")) <= 2, "its run keeps the turn"
    assert harness.queue.length == len(others) + 1


def test_calls_that_hang_up_again_and_again_cost_their_tenant_at_most_a_quarter_of_its_turns() -> None:
    harness = QueueHarness()
    served = {"a": 0, "b": 0}
    for tenant in ("a", "b"):
        for _ in range(100):
            harness.join(tenant)
    for _ in range(100):
        for call in [harness.join("b") for _ in range(5)]:
            harness.queue.withdraw(call)
        call = harness.serve()
        served[call.request.tenant] += 1
        harness.join(call.request.tenant)
    assert served["b"] >= 37


ACTIONS = st.tuples(
    st.sampled_from(["join", "join", "leave", "serve", "overtake", "promote"]),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from([None, "x", "y", "z"]),
    st.sampled_from(list(Priority)),
    st.integers(0, 30),
)


@given(st.lists(ACTIONS, max_size=80))
def test_the_calls_ahead_are_counted_whatever_joins_leaves_and_is_served(actions: list[Any]) -> None:
    harness = QueueHarness(b=2.0, c=0.5)
    now, waiting = 0.0, list[QueuedCall]()
    for action, tenant, run, priority, place in actions:
        if action == "join":
            task_id = None if run is None else tenant + run
            waiting.append(harness.join(tenant, task_id=task_id, priority=priority))
        elif action == "promote":
            now += place
            harness.queue.promote(now, 5.0)
        elif waiting and action == "serve":
            waiting.remove(harness.serve())
        elif waiting:
            call = waiting.pop(place % len(waiting))
            (harness.queue.withdraw if action == "leave" else harness.queue.take)(call)
        assert set(harness.queue) == set(waiting)
        for tenant_asking in ("a", "b", "c"):
            for asked in Priority:
                request = CallRequest(tenant=tenant_asking, priority=asked)
                rank = harness.order.expected_rank(request)
                ahead = [call for call in waiting if (call.priority, call.rank) <= (asked, rank)]
                assert harness.queue.ahead_of(request) == len(ahead)
