"""The order of calls: runs begun earlier first, tenants in turns, retries at the head."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import given

from forebay.upstream.ask import Ask
from forebay.upstream.order import Order


def test_calls_of_runs_begun_earlier_go_first_however_late_they_come() -> None:
    order = Order()
    first = order.rank(Ask(run="first"))
    second = order.rank(Ask(run="second"))
    order.served(first)
    order.served(second)
    third, again = order.rank(Ask(run="third")), order.rank(Ask(run="second"))
    assert order.rank(Ask(run="first")) < again < third


def test_a_retry_goes_to_the_head() -> None:
    order = Order()
    assert order.rank(Ask(run="old")) > order.rank(Ask(run="young", retries=1))


def test_within_a_run_the_earlier_deadline_goes_first() -> None:
    order = Order()
    assert order.rank(Ask(run="a", deadline=5.0)) < order.rank(Ask(run="a", deadline=9.0)) < order.rank(Ask(run="a"))


def test_a_tenant_with_many_runs_leaves_the_next_turn_to_one_with_few() -> None:
    order = Order()
    many = [order.rank(Ask(run=f"many-{n}", tenant="many")) for n in range(100)]
    for rank in many[:10]:
        order.served(rank)
    few = order.rank(Ask(run="few", tenant="few"))
    assert sum(rank < few for rank in many[10:]) <= 1


def test_a_tenant_that_was_away_gets_no_credit_for_it() -> None:
    order = Order()
    for n in range(100):
        order.served(order.rank(Ask(run=f"here-{n}", tenant="here")))
    back = [order.rank(Ask(run=f"back-{n}", tenant="back")) for n in range(3)]
    here = [order.rank(Ask(run=f"more-{n}", tenant="here")) for n in range(3)]
    assert [sum(rank < other for rank in here) for other in back] == [0, 1, 2]


@given(st.lists(st.sampled_from(["light", "heavy"]), min_size=20, max_size=60))
def test_turns_follow_the_weights(arrivals: list[str]) -> None:
    order = Order()
    order.weights = {"heavy": 2.0}
    ranks = sorted((order.rank(Ask(run=f"{n}", tenant=tenant)), tenant) for n, tenant in enumerate(arrivals))
    served = {"light": 0, "heavy": 0}
    total = {tenant: arrivals.count(tenant) for tenant in served}
    for _, tenant in ranks:
        served[tenant] += 1
        if all(served[who] < total[who] for who in served):  # both still wait
            assert abs(served["heavy"] - 2 * served["light"]) <= 2


def test_what_belongs_to_no_run_is_a_run_of_its_own() -> None:
    order = Order()
    assert order.rank(Ask()) < order.rank(Ask())
    assert order.rank(Ask())[1] == math.inf
