"""The promises of an upstream's account, wherever it is kept: in one process, or shared by several through a store.

Time is virtual, on the real stores too. A test that takes `accounts` opens one upstream; one that takes `processes`
opens the same account in one process or in two, and its promises hold for both together.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, Literal

import pytest
from tests.support.account_backends import AccountProcesses, OpenAccounts
from tests.support.call_driver import CallDriver, excess
from tests.support.task_plane import now, run_ready, virtual

from forebay import Deadline, Overloaded, Priority, Upstream
from forebay.errors import CallMisused
from forebay.events import BudgetAlert, Event
from forebay.quota import Budget, Price, Quota

EXCHANGES = 0.25  # seconds of virtual time that a few exchanges with a store may take
HEARTBEAT = 1.0  # seconds after which what one process has returned is known to another
PRICES = {"m": Price(input=0, output=1_000)}  # a tenth of a cent for each token


def left(*upstreams: Upstream) -> tuple[int, int]:
    """Return the number of calls in flight and in the queue."""
    accounts = [account.account for upstream in upstreams for account in upstream.core.accounts]
    return sum(account.in_flight for account in accounts), sum(len(account.queue) for account in accounts)


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def rejection_of(calls: CallDriver, **how: Any) -> Overloaded:
    """Make a call, and return how it is rejected."""
    with pytest.raises(Overloaded) as rejection:
        await calls.call(**how)
    return rejection.value


# --- slots and the queue ---


@virtual
async def test_no_more_calls_are_in_flight_than_max_concurrent(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(max_concurrent=3))
    began = now()
    ends = await asyncio.gather(*(calls.start() for _ in range(9)))
    assert calls.peak == 3
    assert max(ends) - began == pytest.approx(3.0, abs=EXCHANGES)
    calls.check()


@virtual
async def test_a_call_waits_and_is_sent_once_a_slot_is_free(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(max_concurrent=1))
    holder = await calls.hold()
    waiting = calls.start()
    ended = await holder
    assert await waiting - ended == pytest.approx(1.0, abs=EXCHANGES)
    calls.check()


@virtual
async def test_calls_are_served_by_priority_then_in_the_order_of_arrival(accounts: OpenAccounts) -> None:
    calls = CallDriver(accounts.open(max_concurrent=1))
    holder = await calls.hold()
    priorities = [Priority.LOW, Priority.NORMAL, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL]
    await asyncio.gather(holder, *(calls.start(number, priority=each) for number, each in enumerate(priorities)))
    assert calls.admitted[1:] == [4, 3, 1, 2, 0]


@virtual
async def test_tenants_take_turns_by_their_weights(accounts: OpenAccounts) -> None:
    calls = CallDriver(accounts.open(max_concurrent=1, weights={"acme": 3.0}))
    holder = await calls.hold()
    names = ["acme", "other"] * 12
    await asyncio.gather(holder, *(calls.start(name, tenant=name) for name in names))
    assert calls.admitted[1:13].count("acme") == pytest.approx(9, abs=1)


@virtual
async def test_a_call_that_would_wait_too_long_is_rejected_until_its_retry_after(accounts: OpenAccounts) -> None:
    calls = CallDriver(accounts.open(max_concurrent=1, max_wait=3.5))
    await calls.call()  # the account learns that a call takes a second
    others = [calls.start() for _ in range(4)]
    await asyncio.sleep(EXCHANGES)
    error = await rejection_of(calls)
    assert error.limited_by == "upstream:llm:concurrency"
    assert error.retry_after is not None
    await asyncio.sleep(error.retry_after)
    await calls.call()
    await asyncio.gather(*others)
    calls.check()


@virtual
async def test_no_call_waits_for_longer_than_half_as_long_again_as_max_wait(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(max_concurrent=1, max_wait=4.0))
    began = now()

    async def call() -> float:
        try:
            return await calls.call() - 1.0
        except Overloaded as error:
            return now() if error.retry_after is not None else math.inf

    ends = await asyncio.gather(*(call() for _ in range(20)))
    assert max(ends) - began <= 6.0 + EXCHANGES
    assert len(calls.admitted) >= 4
    calls.check()


@virtual
async def test_a_call_whose_deadline_comes_before_its_turn_is_rejected_at_once(accounts: OpenAccounts) -> None:
    calls = CallDriver(accounts.open(max_concurrent=1), seconds=10.0)
    await calls.call()
    holder = await calls.hold()
    began = now()
    error = await rejection_of(calls, deadline=Deadline.within(5.0))
    assert "deadline" in str(error)
    assert now() - began < EXCHANGES
    await holder
    calls.check()


@virtual
async def test_a_call_whose_deadline_passes_while_it_waits_is_rejected_then(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(max_concurrent=1), seconds=10.0)
    holder = await calls.hold()
    began = now()
    error = await rejection_of(calls, deadline=Deadline.within(5.0))
    assert "deadline passed" in str(error)
    assert now() - began == pytest.approx(5.0, abs=EXCHANGES)
    await holder
    calls.check()


@virtual
async def test_a_call_cancelled_at_any_step_leaves_nothing_behind(accounts: OpenAccounts) -> None:
    for moment in range(12):
        calls = CallDriver(accounts.open(f"tool-{moment}", max_concurrent=1), seconds=0.0)
        holder, waiting, after = [calls.start() for _ in range(3)]
        await run_ready(moment)
        await cancel(waiting)
        await asyncio.gather(holder, after)
        calls.check()


@virtual
async def test_a_call_cancelled_while_it_waits_or_runs_leaves_its_slot_to_another(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(max_concurrent=1), seconds=10.0)
    running = await calls.hold()
    waiting, after = calls.start("waiting"), calls.start("after")
    await asyncio.sleep(1.0)
    await cancel(waiting)
    await cancel(running)
    began = now()
    assert await after - began == pytest.approx(10.0, abs=HEARTBEAT)
    assert calls.admitted == [None, "after"]
    calls.check()


@virtual
async def test_a_call_is_entered_once(accounts: OpenAccounts) -> None:
    call = accounts.open().call()
    async with call:
        pass
    with pytest.raises(CallMisused):
        async with call:
            pass


# --- quotas ---


@virtual
async def test_a_whole_amount_of_requests_is_sent_at_once_and_then_the_refill(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(quotas=[Quota(requests=10, per="second")]), seconds=0.0)
    began = now()
    await asyncio.gather(*(calls.start() for _ in range(30)))
    assert excess(calls.times, 10, 1.0) <= 1e-6
    assert calls.times[9] - began < EXCHANGES
    assert calls.times[-1] - began == pytest.approx(2.0, abs=EXCHANGES)
    calls.check()


@pytest.mark.parametrize(
    "quota",
    [Quota(tokens=1_000, per="second"), Quota(output_tokens=1_000, per="second")],
    ids=["tokens", "output tokens"],
)
@virtual
async def test_tokens_never_pass_their_quota(processes: AccountProcesses, quota: Quota) -> None:
    calls = CallDriver(*processes.open(quotas=[quota]), seconds=0.0)
    began = now()
    await asyncio.gather(*(calls.start(output_tokens=100) for _ in range(30)))
    assert excess(calls.times, 10, 1.0) <= 1e-6
    assert calls.times[9] - began < EXCHANGES
    assert calls.times[-1] - began == pytest.approx(2.0, abs=EXCHANGES)
    calls.check()


@virtual
async def test_all_quotas_of_an_account_hold(processes: AccountProcesses) -> None:
    quotas = [Quota(requests=20, per="second"), Quota(tokens=1_000, per="second"), Quota(requests=35, per="minute")]
    calls = CallDriver(*processes.open(quotas=quotas), seconds=0.0)
    await asyncio.gather(*(calls.start(output_tokens=100) for _ in range(20)))
    await asyncio.gather(*(calls.start(output_tokens=1) for _ in range(20)))
    assert excess(calls.times[:20], 10, 1.0) <= 1e-6
    assert excess(calls.times, 20, 1.0) <= 1e-6
    assert excess(calls.times, 35, 60.0) <= 1e-6
    calls.check()


@virtual
async def test_a_call_that_would_wait_too_long_for_a_quota_is_rejected_until_its_retry_after(
    processes: AccountProcesses,
) -> None:
    calls = CallDriver(*processes.open(quotas=[Quota(requests=2, per="minute")], max_wait=10.0), seconds=0.0)
    await calls.call()
    await calls.call()
    error = await rejection_of(calls)
    assert error.limited_by == "upstream:llm:requests per minute"
    assert error.retry_after is not None
    assert error.retry_after >= 20.0 - HEARTBEAT
    await asyncio.sleep(error.retry_after)
    await calls.call()
    assert excess(calls.times, 2, 60.0) <= 1e-6
    calls.check()


@virtual
async def test_a_call_that_no_quota_will_let_through_in_time_is_rejected_soon(processes: AccountProcesses) -> None:
    upstreams = processes.open(quotas=[Quota(requests=3, per="day")])
    first, last = CallDriver(upstreams[0], seconds=0.0), CallDriver(upstreams[-1], seconds=0.0)
    await asyncio.gather(*(first.start() for _ in range(3)))
    began = now()
    for seconds in (1e6, 30.0):
        error = await rejection_of(last, deadline=Deadline.within(seconds))
        assert error.limited_by == "upstream:llm:requests per day"
        assert error.retry_after is not None
        assert error.retry_after > 3_600.0
    assert now() - began <= 5.0
    last.check()


@virtual
async def test_a_call_larger_than_its_quota_is_rejected_without_a_retry_after(accounts: OpenAccounts) -> None:
    calls = CallDriver(accounts.open(quotas=[Quota(tokens=1_000, per="minute")]))
    error = await rejection_of(calls, input_tokens=900, output_tokens=200)
    assert "larger" in str(error)
    assert error.limited_by == "upstream:llm:tokens per minute"
    assert error.retry_after is None
    calls.check()


@virtual
async def test_reserved_tokens_that_were_not_used_come_back(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(quotas=[Quota(output_tokens=1_000, per="day")]), seconds=0.0)
    for _ in range(5):
        await calls.call(output_tokens=800, used=50)
        await asyncio.sleep(4 * HEARTBEAT)
    assert len(calls.admitted) == 5
    calls.check()


@virtual
async def test_a_call_that_uses_more_than_it_reserved_is_paid_back_before_others_go(
    processes: AccountProcesses,
) -> None:
    calls = CallDriver(*processes.open(quotas=[Quota(output_tokens=600, per="minute")]), seconds=0.0)
    await calls.call(output_tokens=100, used=900)
    await asyncio.sleep(EXCHANGES)
    began = now()
    await calls.call(output_tokens=100)
    assert now() - began == pytest.approx(40.0, abs=HEARTBEAT)  # 300 of a debt, and 100
    calls.check()


@virtual
async def test_a_strict_quota_is_passed_by_no_tokens_that_may_be_made(processes: AccountProcesses) -> None:
    quota = Quota(output_tokens=1_000, per="hour", strict=True)
    calls = CallDriver(*processes.open(quotas=[quota], max_wait=3_600.0), seconds=5.0)
    first = await calls.hold(output_tokens=600, used=100)
    second = calls.start(output_tokens=600, used=600)
    await asyncio.sleep(4.0)
    assert len(calls.admitted) == 1
    assert await second - await first == pytest.approx(5.0, abs=2 * HEARTBEAT)
    calls.check()


@virtual
async def test_calls_of_a_better_priority_go_first_whichever_process_has_them(processes: AccountProcesses) -> None:
    upstreams = processes.open(quotas=[Quota(requests=2, per="second")])
    low, high = CallDriver(upstreams[0], seconds=0.0), CallDriver(upstreams[-1], seconds=0.0)
    await asyncio.gather(*(low.start() for _ in range(2)))
    waiting = [low.start(priority=Priority.LOW) for _ in range(12)]
    await asyncio.sleep(1.1)
    await asyncio.gather(*(high.start(priority=Priority.HIGH) for _ in range(4)))
    assert sum(time < high.times[-1] for time in low.times) <= 2 + 2 + 1
    await asyncio.gather(*waiting)


@virtual
async def test_calls_that_leave_the_queue_use_no_quota(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(quotas=[Quota(requests=6, per="minute")], max_wait=600.0), seconds=0.0)
    await asyncio.gather(*(calls.start() for _ in range(6)))
    waiting = [calls.start() for _ in range(6)]
    await asyncio.sleep(1.0)
    for task in waiting:
        await cancel(task)
    began = now()
    await calls.call()
    assert now() - began <= 9.0 + HEARTBEAT
    assert excess(calls.times, 6, 60.0) <= 1e-6
    calls.check()


@virtual
async def test_models_have_the_quotas_of_their_pattern(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(models={"gpt-*": [Quota(requests=2, per="minute")]}), seconds=0.0)
    began = now()
    for model in ("gpt-4o", "gpt-4o-mini", "other", "another"):
        await calls.call(model=model)
    assert now() - began < EXCHANGES
    await calls.call(model="gpt-4")
    assert now() - began == pytest.approx(30.0, abs=EXCHANGES)
    names = {account.name for upstream in calls.upstreams for account in upstream.statistics().accounts}
    assert names == {"upstream:llm:gpt-*", "upstream:llm:other", "upstream:llm:another"}


# --- money ---


def afford(upstream: Upstream, usd: float) -> int:
    """Return the tokens of a call that costs what is left of a budget of `usd`."""
    spent = upstream.statistics().spent_usd
    assert spent is not None
    return round((usd - spent) * 1_000)


@virtual
async def test_a_budget_is_spent_to_the_last_call_that_it_can_pay_and_passed_by_none(
    processes: AccountProcesses,
) -> None:
    upstreams = processes.open(budget=Budget(usd=1.0), prices=PRICES)
    spent = 0

    async def spend(upstream: Upstream) -> None:
        nonlocal spent
        while True:
            async with upstream.call("m", output_tokens=40) as call:
                await asyncio.sleep(0.3)
                call.settle(input_tokens=0, output_tokens=25)
                spent += 25

    spenders = [asyncio.create_task(spend(upstream)) for upstream in upstreams for _ in range(5)]
    outcomes = await asyncio.gather(*spenders, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {Overloaded}
    assert 1_000 - 5 * processes.count * 40 <= spent <= 1_000
    await asyncio.sleep(4 * HEARTBEAT)
    assert [upstream.statistics().spent_usd for upstream in upstreams] == pytest.approx(
        [spent / 1_000] * processes.count
    )
    CallDriver(*upstreams).check()


class Failure(Exception):
    """A failure of a call."""


@pytest.mark.parametrize("end", ["settled", "left", "failed", "ignored", "cancelled"])
@virtual
async def test_reserved_money_is_settled_or_returned_however_a_call_ends(processes: AccountProcesses, end: str) -> None:
    upstreams = processes.open(budget=Budget(usd=1.0), prices=PRICES)
    calls = CallDriver(*upstreams)

    async def call() -> None:
        async with upstreams[0].call("m", output_tokens=900) as entered:
            await asyncio.sleep(1.0)
            if end == "settled":
                entered.settle(input_tokens=0, output_tokens=100)
            if end == "ignored":
                entered.ignored()
            if end in ("failed", "ignored"):
                raise Failure
            if end == "cancelled":
                await asyncio.Event().wait()

    for upstream in upstreams:  # each process knows what is spent as soon as it has made a call
        await CallDriver(upstream, seconds=0.0).call(model="m")
    task = asyncio.create_task(call())
    await asyncio.sleep(2.0)
    if end == "cancelled":
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(2 * HEARTBEAT)
    calls.check()
    tokens = afford(upstreams[-1], 1.0)
    assert tokens == (900 if end == "settled" else 100)
    await CallDriver(upstreams[-1], seconds=0.0).call(model="m", output_tokens=tokens)
    error = await rejection_of(CallDriver(upstreams[0]), model="m", output_tokens=10)
    assert error.limited_by == "upstream:llm:m:budget"


@virtual
async def test_a_call_that_leaves_the_queue_keeps_no_money(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(max_concurrent=1, budget=Budget(usd=1.0), prices=PRICES), seconds=5.0)
    holder = await calls.hold(model="m", output_tokens=0)
    waiting = [calls.start(model="m", output_tokens=1_000) for _ in range(4)]
    await asyncio.sleep(1.0)
    for task in waiting:
        await cancel(task)
    await holder
    await calls.call(model="m", output_tokens=1_000)
    calls.check()


@virtual(seed=4)  # with which the retry comes in the last moment before all know that it has renewed
async def test_a_spent_budget_rejects_calls_until_it_renews(processes: AccountProcesses) -> None:
    upstreams = processes.open(budget=Budget(usd=1.0, per="hour"), prices=PRICES)
    calls = CallDriver(*upstreams, seconds=0.0)
    for _ in range(4):
        await calls.call(model="m", output_tokens=250)
        await asyncio.sleep(HEARTBEAT)
    assert upstreams[-1].statistics().spent_usd == pytest.approx(1.0)
    error = await rejection_of(calls, model="m", output_tokens=250)
    assert error.limited_by == "upstream:llm:m:budget"
    assert error.retry_after == pytest.approx(3_600.0 - now(), abs=HEARTBEAT)
    assert error.retry_after is not None
    await asyncio.sleep(error.retry_after)
    await calls.call(model="m", output_tokens=1_000)
    calls.check()


@virtual
async def test_a_rejection_for_a_budget_says_its_state_and_the_cost_of_the_call(accounts: OpenAccounts) -> None:
    budget = Budget(usd=1.0, per="day", reserved_share=0.1)
    calls = CallDriver(accounts.open(budget=budget, prices=PRICES), seconds=0.0)
    await calls.call(model="m", output_tokens=800)
    await asyncio.sleep(HEARTBEAT)
    error = await rejection_of(calls, model="m", output_tokens=200)
    assert error.reason == (
        "llm: the budget of llm would be overspent: it has 1 USD a day, 0.1 of it for HIGH and CRITICAL alone, of which"
        " 0.8 are spent or reserved, and this may cost 0.2"
    )
    assert error.retry_after is not None
    await calls.call(model="m", output_tokens=200, priority=Priority.HIGH)
    calls.check()


@pytest.mark.parametrize(("per", "tokens"), [("hour", 2_000), (None, 600)])
@virtual
async def test_a_call_that_no_budget_will_ever_afford_has_no_retry_after(
    processes: AccountProcesses, per: Literal["hour"] | None, tokens: int
) -> None:
    calls = CallDriver(*processes.open(budget=Budget(usd=1.0, per=per), prices=PRICES), seconds=0.0)
    await calls.call(model="m", output_tokens=500)
    await asyncio.sleep(HEARTBEAT)
    error = await rejection_of(calls, model="m", output_tokens=tokens)
    assert ": ask for less, or raise that budget. Nothing was started" in str(error)
    assert error.retry_after is None
    calls.check()


@virtual
async def test_each_tenant_has_its_budget(processes: AccountProcesses) -> None:
    calls = CallDriver(*processes.open(tenant_budget=Budget(usd=1.0), prices=PRICES), seconds=0.0)
    for _ in range(2):
        for tenant in ("acme", "other"):
            await calls.call(tenant, model="m", output_tokens=400, tenant=tenant)
            await asyncio.sleep(HEARTBEAT)
    for tenant in ("acme", "other"):
        error = await rejection_of(calls, model="m", output_tokens=400, tenant=tenant)
        assert str(error.limited_by).endswith("budget")
        await calls.call(model="m", output_tokens=200, tenant=tenant)
    calls.check()


@virtual
async def test_one_process_is_told_once_that_a_share_of_the_budget_is_spent(processes: AccountProcesses) -> None:
    events: list[Event] = []
    upstreams = processes.open(budget=Budget(usd=1.0, alert=0.5), prices=PRICES, on_event=events.append)
    calls = CallDriver(*upstreams, seconds=0.0)
    for _ in range(10):
        await calls.call(model="m", output_tokens=100)
        await asyncio.sleep(HEARTBEAT)
    alerts = [event.share for event in events if isinstance(event, BudgetAlert)]
    assert alerts == [0.5, 1.0]


# --- what it says about itself ---


@virtual
async def test_statistics_tell_what_is_under_way_what_waits_and_what_is_left(accounts: OpenAccounts) -> None:
    quota = Quota(output_tokens=1_000, per="day")
    upstream = accounts.open(max_concurrent=2, quotas=[quota], budget=Budget(usd=10), prices=PRICES)
    calls = CallDriver(upstream, seconds=5.0)
    holders = [await calls.hold(model="m", output_tokens=100, used=50) for _ in range(2)]
    waiting = calls.start(model="m", output_tokens=100, used=50)
    await asyncio.sleep(EXCHANGES)
    (account,) = upstream.statistics().accounts
    assert (account.in_flight, account.queued, account.limit, account.sent) == (2, 1, 2, 2)
    (level,) = account.quotas
    assert (level.name, level.amount, level.learned) == ("output tokens per day", 1_000, False)
    assert level.remaining == pytest.approx(800, abs=1.0)
    await asyncio.gather(*holders, waiting)
    await asyncio.sleep(2 * HEARTBEAT)
    statistics = upstream.statistics()
    (account,) = statistics.accounts
    assert (account.in_flight, account.queued, account.succeeded, account.output_tokens) == (0, 0, 3, 150)
    assert account.quotas[0].remaining == pytest.approx(850, abs=1.0)
    assert statistics.spent_usd == pytest.approx(0.15)
    assert statistics.used.usd == pytest.approx(0.15)


@virtual
async def test_the_load_is_the_expected_wait_over_the_longest_allowed(accounts: OpenAccounts) -> None:
    upstream = accounts.open(quotas=[Quota(requests=10, per="second")], max_wait=10.0)
    calls = CallDriver(upstream, seconds=0.0)
    assert [reading.load for reading in upstream.readings()] == []
    await calls.call()
    (reading,) = upstream.readings()
    assert reading.resource == "upstream:llm"
    assert reading.load == pytest.approx(0.0, abs=0.01)
    waiting = [calls.start() for _ in range(60)]
    await asyncio.sleep(EXCHANGES)
    (reading,) = upstream.readings()
    assert reading.load == pytest.approx(0.5, abs=0.05)
    for task in waiting:
        await cancel(task)
    calls.check()
