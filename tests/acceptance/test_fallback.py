"""Fallbacks: another model or upstream serves the calls that their own account cannot serve, and no others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.task_plane import approximately, flood, now, run_ready, virtual

from forebay import BackpressureSupervisor, Budget, Deadline, Fallback, Overloaded, Price, Quota, Retry, Task, Upstream
from forebay.breaker import BreakerRules
from forebay.errors import InvalidSetting
from forebay.interfaces import Outcome
from forebay.upstream.call_request import CallOutcome, CallRequest

EACH = {"gpt-4o": (), "gpt-4o-mini": ()}
ONE_A_DAY = [Quota(requests=1, per="day")]


def in_flight(*upstreams: Upstream) -> int:
    return sum(
        shared.account.in_flight + len(shared.account.queue)
        for upstream in upstreams
        for shared in upstream.core.accounts
    )


async def served_by(upstream: Upstream, model: str = "gpt-4o", **how: Any) -> tuple[str, str]:
    """Make a call; return the upstream and the model that serve it."""
    async with upstream.call(model, **how) as call:
        return call.upstream.name, call.model


async def open_breaker(upstream: Upstream, model: str = "gpt-4o") -> None:
    """Open the breaker of an account."""
    shared = upstream.core.accounts.account(model)
    while shared.account.breaker.ready(now()):
        permit = await shared.acquire(CallRequest())
        shared.settle(permit, CallOutcome(kind=Outcome.FAULT))


# --- calls with a context manager ---


@virtual
async def test_a_rejected_call_falls_back_to_the_other_model() -> None:
    llm = Upstream("llm", models={**EACH, "gpt-4o": ONE_A_DAY}, fallback=Fallback(to="gpt-4o-mini", models="gpt-4o"))
    assert [await served_by(llm) for _ in range(3)] == [("llm", "gpt-4o"), *[("llm", "gpt-4o-mini")] * 2]
    assert {account.name: account.served_by_fallback for account in llm.statistics().accounts} == {
        "upstream:llm:gpt-4o": 2,
        "upstream:llm:gpt-4o-mini": 0,
    }
    assert in_flight(llm) == 0


def test_in_a_plain_thread_a_rejected_call_falls_back_too() -> None:
    llm = Upstream("llm", models={**EACH, "gpt-4o": ONE_A_DAY}, fallback=Fallback(to="gpt-4o-mini"))

    def two() -> list[str]:
        models = []
        for _ in range(2):
            with llm.call("gpt-4o") as call:
                models.append(call.model)
        return models

    assert two() == ["gpt-4o", "gpt-4o-mini"]


@virtual
async def test_calls_fall_back_from_an_open_breaker_queued_ones_too() -> None:
    spare = Upstream("spare")
    llm = Upstream(
        "llm", max_concurrent=1, breaker=BreakerRules(reset_timeout=10.0), fallback=Fallback(to=spare, model="llama")
    )

    async def fails() -> str:
        async with llm.call("gpt-4o") as call:
            await asyncio.sleep(1.0)
            if call.upstream is llm:
                raise ConnectionError
            return call.model

    ends = await asyncio.gather(*(fails() for _ in range(9)), return_exceptions=True)
    assert [type(result) for result in ends[:5]] == [ConnectionError] * 5
    assert ends[5:] == ["llama"] * 4
    assert in_flight(llm, spare) == 0


@virtual
async def test_a_call_too_expensive_for_the_budget_falls_back_to_a_cheaper_model() -> None:
    prices = {"gpt-4o": Price(input=1e6, output=0), "gpt-4o-mini": Price(input=1e5, output=0)}
    llm = Upstream(
        "llm", models=EACH, budget=Budget(usd=25, per="day"), prices=prices, fallback=Fallback(to="gpt-4o-mini")
    )
    for expected in ["gpt-4o", "gpt-4o", "gpt-4o-mini"]:
        async with llm.call("gpt-4o", input_tokens=10) as call:
            assert call.model == expected
    assert llm.statistics().spent_usd == 21.0


@virtual
async def test_from_the_load_threshold_on_calls_go_to_the_less_loaded_upstream() -> None:
    spare = Upstream("spare", max_concurrent=1)
    llm = Upstream("llm", max_concurrent=1, max_wait=10.0, fallback=Fallback(to=spare, load_threshold=0.25))

    async def one() -> str:
        async with llm.call("gpt-4o") as call:
            await asyncio.sleep(2.0)
            return call.upstream.name

    assert await one() == "llm"  # a call takes two seconds, so each queued one adds a load of 0.2
    assert await asyncio.gather(*(one() for _ in range(5))) == ["llm", "llm", "spare", "spare", "spare"]
    began = now()
    assert await served_by(llm) == ("llm", "gpt-4o")
    assert now() == approximately(began)


@virtual
async def test_a_call_stays_if_the_fallback_is_more_loaded() -> None:
    spare = Upstream("spare", max_concurrent=1, max_wait=4.0)
    llm = Upstream("llm", max_concurrent=1, max_wait=10.0, fallback=Fallback(to=spare, load_threshold=0.1))

    async def take(upstream: Upstream) -> str:
        async with upstream.call("gpt-4o") as call:
            await asyncio.sleep(2.0)
            return call.upstream.name

    await asyncio.gather(take(llm), take(spare))
    served = await asyncio.gather(take(spare), take(llm), take(spare), take(llm))
    assert [*served] == ["spare", "llm", "spare", "llm"]


@virtual
async def test_a_rejection_by_both_is_that_of_the_first_with_the_reason_of_the_other() -> None:
    spare = Upstream("spare", quotas=ONE_A_DAY)
    llm = Upstream("llm", breaker=BreakerRules(reset_timeout=10.0), fallback=Fallback(to=spare))
    await open_breaker(llm)
    await served_by(llm)
    with pytest.raises(Overloaded) as rejection:
        await served_by(llm)
    error = rejection.value
    assert error.limited_by == "upstream:llm:gpt-4o:breaker"
    assert error.reason.startswith("llm: its breaker is open; spare: a call would wait about ")
    assert error.retry_after is not None
    assert error.retry_after <= 10.0
    assert error.__cause__ is None


@virtual
async def test_several_fallbacks_are_tried_in_order_then_their_own() -> None:
    last = Upstream("last", quotas=ONE_A_DAY)
    second = Upstream("second", quotas=ONE_A_DAY, fallback=Fallback(to=last))
    third = Upstream("third", quotas=ONE_A_DAY)
    llm = Upstream("llm", quotas=ONE_A_DAY, fallback=[Fallback(to=second), Fallback(to=third)])
    assert [(await served_by(llm))[0] for _ in range(4)] == ["llm", "second", "third", "last"]
    with pytest.raises(Overloaded, match=r"llm: .*; second: .*; third: .*; last: "):
        await served_by(llm)


@virtual
async def test_a_call_past_its_deadline_does_not_fall_back() -> None:
    spare = Upstream("spare")
    llm = Upstream("llm", max_concurrent=1, fallback=Fallback(to=spare))
    async with llm.call("gpt-4o"):
        began = now()
        with pytest.raises(Overloaded, match="deadline passed while it waited"):  # in a task: it is no nested call
            await asyncio.create_task(served_by(llm, deadline=Deadline.within(3.0)))
        assert now() - began == approximately(3.0)
    assert [*spare.core.accounts] == [] or in_flight(spare) == 0
    assert sum(account.served_by_fallback for account in llm.statistics().accounts) == 0


@virtual
async def test_a_call_cancelled_at_any_step_leaves_nothing_behind() -> None:
    for moment in range(14):
        spare = Upstream("spare", max_concurrent=1)
        llm = Upstream("llm", max_concurrent=1, max_wait=5.0, fallback=Fallback(to=spare, load_threshold=0.1))
        await served_by(llm)
        llm.core.accounts.account("gpt-4o").account.durations.held = 1.0

        async def one(upstream: Upstream) -> None:
            async with upstream.call("gpt-4o"):
                await run_ready(3)

        tasks = [asyncio.create_task(one(upstream)) for upstream in (llm, spare, llm, llm)]
        await run_ready(moment)
        tasks[2].cancel()
        await asyncio.wait(tasks)
        assert in_flight(llm, spare) == 0


# --- guarded functions ---


@virtual
async def test_a_guarded_function_is_called_with_the_upstream_that_serves_it() -> None:
    spare = Upstream("spare")
    search = Upstream("search", quotas=ONE_A_DAY, fallback=Fallback(to=spare))

    @search.guard
    async def look_up(what: str, *, upstream: Upstream = search) -> str:
        return f"{what} by {upstream.name}"

    assert [await look_up("rivers") for _ in range(3)] == ["rivers by search", *["rivers by spare"] * 2]


@virtual
async def test_a_guarded_function_that_keeps_failing_falls_back_and_raises_its_first_error() -> None:
    spare = Upstream("spare", retry=Retry(max_attempts=2, base_delay=0.1))
    search = Upstream("search", retry=Retry(max_attempts=3, base_delay=0.1), fallback=Fallback(to=spare))
    tries: list[str] = []

    @search.guard
    async def look_up(working: str, *, upstream: Upstream) -> str:
        tries.append(upstream.name)
        if upstream.name != working:
            raise ConnectionError(upstream.name)
        return upstream.name

    assert await look_up("spare") == "spare"  # type: ignore[call-arg]
    assert tries == ["search"] * 3 + ["spare"]
    with pytest.raises(ConnectionError, match="search"):
        await look_up("none")  # type: ignore[call-arg]
    assert in_flight(search, spare) == 0


def test_a_guarded_function_without_an_upstream_parameter_does_not_fall_back() -> None:
    search = Upstream("search", quotas=ONE_A_DAY, fallback=Fallback(to=Upstream("spare")))

    @search.guard
    def look_up() -> str:
        return "found"

    assert look_up() == "found"
    with pytest.raises(Overloaded):
        look_up()


def test_a_guarded_plain_function_falls_back_too() -> None:
    spare = Upstream("spare")
    search = Upstream("search", quotas=ONE_A_DAY, fallback=Fallback(to=spare))

    @search.guard
    def look_up(*, upstream: Upstream = search) -> str:
        return upstream.name

    assert [look_up() for _ in range(2)] == ["search", "spare"]


# --- tasks ---


def new_supervisor(agent: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("agent", handler=agent, task_types=["ask"], max_concurrent=4)
    return supervisor


@virtual
async def test_a_full_upstream_with_a_fallback_rejects_no_task() -> None:
    spare = Upstream("spare")
    llm = Upstream("llm", breaker=BreakerRules(reset_timeout=60.0), fallback=Fallback(to=spare))

    async def agent(_: Task) -> str:
        return (await served_by(llm))[0]

    async with new_supervisor(agent) as supervisor:
        assert await supervisor.run(Task("ask")) == "llm"
        await open_breaker(llm)
        assert {reading.resource: reading.load for reading in supervisor.readings()} == {
            "pool:ask": 0.0,
            "upstream:llm:gpt-4o": 1.0,
            "upstream:spare:gpt-4o": 0.0,
            "host": pytest.approx(0.0, abs=0.5),
        }
        tickets = flood(supervisor, "ask", 8)
        assert [await ticket.value() for ticket in tickets] == ["spare"] * 8
        await open_breaker(spare)
        ticket = supervisor.submit_nowait(Task("ask"))
        assert not ticket
        assert ticket.limited_by == "upstream:llm:gpt-4o or upstream:spare:gpt-4o"


@virtual
async def test_a_full_account_without_a_fallback_rejects_tasks() -> None:
    spare = Upstream("spare")
    models = {"gpt-4o": (), "o3": ()}
    llm = Upstream(
        "llm", models=models, breaker=BreakerRules(reset_timeout=60.0), fallback=Fallback(to=spare, models="gpt-4o")
    )

    async def agent(_: Task) -> None:
        await served_by(llm, "gpt-4o")
        await served_by(llm, "o3")

    async with new_supervisor(agent) as supervisor:
        await supervisor.run(Task("ask"))
        await open_breaker(llm, "gpt-4o")
        assert supervisor.submit_nowait(Task("ask"))
        await open_breaker(llm, "o3")
        assert supervisor.submit_nowait(Task("ask")).limited_by == "upstream:llm:o3"


@virtual
async def test_a_call_served_by_the_fallback_does_not_end_its_run_as_overloaded() -> None:
    llm = Upstream("llm", quotas=ONE_A_DAY, fallback=Fallback(to=Upstream("spare")))

    async def agent(_: Task) -> None:
        await served_by(llm)
        await served_by(llm)
        raise ValueError("ours")

    async with new_supervisor(agent) as supervisor:
        result = await (await supervisor.submit(Task("ask")))
        assert "ours" in (result.error or "")


@virtual
async def test_a_call_that_all_reject_ends_its_run_as_overloaded_and_later_calls_fail_at_once() -> None:
    spare = Upstream("spare", quotas=ONE_A_DAY)
    llm = Upstream("llm", quotas=ONE_A_DAY, fallback=Fallback(to=spare))
    reasons: list[str] = []

    async def agent(_: Task) -> None:
        for _attempt in range(4):
            try:
                await served_by(llm)
            except Overloaded as error:
                reasons.append(error.reason)
        raise ValueError("an error of its framework")

    async with new_supervisor(agent) as supervisor:
        with pytest.raises(Overloaded, match=r"llm: .*; spare: "):
            await supervisor.run(Task("ask"))
    assert len(reasons) == 2
    assert len(set(reasons)) == 1


@virtual
async def test_runs_are_held_back_only_while_all_accounts_that_could_serve_them_are_full() -> None:
    spare = Upstream("spare", max_concurrent=2)
    llm = Upstream("llm", max_concurrent=2, fallback=Fallback(to=spare, load_threshold=0.01))
    served: list[str] = []
    running = peak = 0

    async def agent(_: Task) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        async with llm.call("gpt-4o") as call:
            served.append(call.upstream.name)
            await asyncio.sleep(1.0)
        running -= 1

    async with BackpressureSupervisor(max_queue_size=100) as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], max_concurrent=50)
        await supervisor.run(Task("ask"))
        async with spare.call("gpt-4o"):
            await asyncio.sleep(1.0)
        peak = 0
        for ticket in flood(supervisor, "ask", 40):
            await ticket
    assert 0.3 < served.count("spare") / len(served) < 0.7
    assert peak <= 6
    for upstream in (llm, spare):
        (account,) = upstream.statistics().accounts
        assert account.expected_calls == 0


# --- mistakes ---


@pytest.mark.parametrize(
    "how",
    [
        {"to": ""},
        {"to": "gpt-4o-mini", "load_threshold": 0.0},
        {"to": "gpt-4o-mini", "load_threshold": 1.5},
        {"to": "gpt-4o-mini", "models": ""},
        {"to": "gpt-4o-mini", "base_url": "https://a.test"},
        {"to": Upstream("a"), "base_url": "ftp://a.test"},
        {"to": Upstream("a"), "base_url": "https://me:sk-secret@a.test"},
        {"to": Upstream("a"), "api_key": "sk-secret\r\nx: y"},
    ],
)
def test_an_invalid_fallback_is_rejected_without_showing_a_secret(how: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting) as rejection:
        Fallback(**how)
    assert "secret" not in str(rejection.value)


def test_a_key_is_never_shown() -> None:
    fallback = Fallback(to=Upstream("azure", provider="azure"), api_key="sk-secret", base_url="https://a.test")
    llm = Upstream("llm", provider="openai", fallback=fallback)
    (route,) = llm.runner.resolver.routes("gpt-4o")
    assert "secret" not in repr(fallback) + repr(llm) + repr(route)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Upstream("llm", provider="openai", fallback=Fallback(to=Upstream("claude", provider="anthropic"))),
        lambda: Upstream("llm", max_concurrent=8, fallback=Fallback(to="gpt-4o-mini")),
        lambda: Upstream("llm", models={"gpt-4o*": ()}, fallback=Fallback(to="gpt-4o-mini", models="gpt-4o")),
        lambda: Upstream("llm", fallback="gpt-4o-mini"),  # type: ignore[arg-type]
        lambda: Upstream("llm", fallback=Fallback(to=3)),  # type: ignore[arg-type]
    ],
    ids=["protocol", "one account", "one group", "a name", "a number"],
)
def test_a_fallback_that_can_serve_no_call_is_rejected_where_it_is_given(made: Any) -> None:
    with pytest.raises(InvalidSetting, match="fallback"):
        made()
