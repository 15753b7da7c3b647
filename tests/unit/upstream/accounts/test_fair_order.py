"""The order of calls: earlier runs first, tenants by weighted turns, retries at the head."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import given

from forebay.upstream.accounts.fair_order import FairOrder
from forebay.upstream.call_request import CallRequest


def test_calls_of_earlier_runs_go_first_however_late_they_arrive() -> None:
    order = FairOrder()
    first = order.rank(CallRequest(task_id="first"))
    second = order.rank(CallRequest(task_id="second"))
    order.record_served(first)
    order.record_served(second)
    third, again = order.rank(CallRequest(task_id="third")), order.rank(CallRequest(task_id="second"))
    assert order.rank(CallRequest(task_id="first")) < again < third


def test_a_retry_goes_to_the_head() -> None:
    order = FairOrder()
    assert order.rank(CallRequest(task_id="old")) > order.rank(CallRequest(task_id="young", retries=1))


def test_of_two_retries_the_one_that_asked_first_goes_first() -> None:
    order = FairOrder()
    later = order.rank(CallRequest(asked_at=2.0, retries=1, deadline=60.0))
    assert order.rank(CallRequest(asked_at=1.0, retries=3)) < later


def test_within_a_run_the_earlier_deadline_goes_first() -> None:
    order = FairOrder()
    assert (
        order.rank(CallRequest(task_id="a", deadline=5.0))
        < order.rank(CallRequest(task_id="a", deadline=9.0))
        < order.rank(CallRequest(task_id="a"))
    )


CALLS = st.builds(
    CallRequest,
    tenant=st.sampled_from("ab"),
    task_id=st.sampled_from([None, "x", "y"]),
    retries=st.sampled_from([0, 0, 1]),
    weight=st.sampled_from([0.5, 2.0]),
)


@given(st.lists(st.tuples(CALLS, st.booleans()), max_size=12))
def test_a_call_that_is_sent_as_it_arrives_takes_the_turn_of_one_that_is_queued_and_served(
    calls: list[tuple[CallRequest, bool]],
) -> None:
    at_once, queued = FairOrder(), FairOrder()
    for call, waits in calls:
        if waits:  # and is not served yet
            assert at_once.rank(call) == queued.rank(call)
        else:
            at_once.serve(call)
            queued.record_served(queued.rank(call))
    for tenant in "ab":
        call = CallRequest(tenant=tenant)
        assert at_once.expected_rank(call) == queued.expected_rank(call)


def test_a_tenant_with_many_runs_does_not_delay_one_with_few() -> None:
    order = FairOrder()
    many = [order.rank(CallRequest(task_id=f"many-{n}", tenant="many")) for n in range(100)]
    for rank in many[:10]:
        order.record_served(rank)
    few = order.rank(CallRequest(task_id="few", tenant="few"))
    assert sum(rank < few for rank in many[10:]) <= 1


def test_an_idle_tenant_earns_no_credit() -> None:
    order = FairOrder()
    for n in range(100):
        order.record_served(order.rank(CallRequest(task_id=f"here-{n}", tenant="here")))
    back = [order.rank(CallRequest(task_id=f"back-{n}", tenant="back")) for n in range(3)]
    here = [order.rank(CallRequest(task_id=f"more-{n}", tenant="here")) for n in range(3)]
    assert [sum(rank < other for rank in here) for other in back] == [0, 1, 2]


@given(st.lists(st.sampled_from(["light", "heavy"]), min_size=20, max_size=60))
def test_turns_follow_the_weights(arrivals: list[str]) -> None:
    order = FairOrder({"heavy": 2.0})
    ranks = sorted(
        (order.rank(CallRequest(task_id=f"{n}", tenant=tenant)), tenant) for n, tenant in enumerate(arrivals)
    )
    served = {"light": 0, "heavy": 0}
    total = {tenant: arrivals.count(tenant) for tenant in served}
    for _, tenant in ranks:
        served[tenant] += 1
        if all(served[name] < total[name] for name in served):  # both still wait
            assert abs(served["heavy"] - 2 * served["light"]) <= 2


def test_a_call_without_a_task_is_a_run_of_its_own() -> None:
    order = FairOrder()
    assert order.rank(CallRequest()) < order.rank(CallRequest())
    assert order.rank(CallRequest())[1] == math.inf
