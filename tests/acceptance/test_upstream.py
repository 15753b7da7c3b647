"""Calls of an upstream: slots, quotas, faults, budgets, and tasks that make calls."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest
from tests.support.task_plane import approximately, now, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task
from forebay.breaker import BreakerRules
from forebay.errors import CallMisused, InvalidSetting
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry
from forebay.upstream import Upstream
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount


def shared_account(upstream: Upstream) -> ThreadSafeAccount:
    return upstream.core.accounts.account("")


def left(upstream: Upstream) -> tuple[int, int]:
    """Return the number of calls in flight and in the queue."""
    return shared_account(upstream).account.in_flight, len(shared_account(upstream).account.queue)


class CallRecorder:
    """Makes calls of one upstream.

    Attributes:
        admitted: names of the calls, in the order in which they were admitted.
        peak: most calls in flight at once.
    """

    def __init__(self, upstream: Upstream, *, seconds: float = 1.0) -> None:
        self.upstream = upstream
        self.seconds = seconds
        self.admitted: list[Any] = []
        self.peak = 0

    async def call(self, name: Any = None, **how: Any) -> float:
        """Make a call; return when it ended, in loop time."""
        async with self.upstream.call(**how):
            self.admitted.append(name)
            self.peak = max(self.peak, left(self.upstream)[0])
            await asyncio.sleep(self.seconds)
        return now()

    async def together(self, *hows: dict[str, Any]) -> list[float]:
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(self.call(number, **how)) for number, how in enumerate(hows)]
        return [task.result() for task in made]


# --- slots ---


@virtual
async def test_no_more_calls_are_in_flight_than_max_concurrent() -> None:
    recorder = CallRecorder(Upstream("tool", max_concurrent=3))
    began = now()
    ends = await recorder.together(*[{}] * 9)
    assert recorder.peak == 3
    assert max(ends) - began == approximately(3.0)
    assert left(recorder.upstream) == (0, 0)


@virtual
async def test_calls_are_served_by_priority_then_in_the_order_of_arrival() -> None:
    recorder = CallRecorder(Upstream("tool", max_concurrent=1))
    priorities = [Priority.NORMAL, Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL]
    await recorder.together(*[{"priority": priority} for priority in priorities])
    assert recorder.admitted == [0, 4, 3, 2, 1]


@virtual
async def test_a_call_that_would_wait_too_long_is_rejected_with_a_retry_after() -> None:
    upstream = Upstream("tool", max_concurrent=1, max_wait=3.5)
    recorder = CallRecorder(upstream)
    await recorder.call()  # the account learns that a call takes a second
    calls = [asyncio.create_task(recorder.call()) for _ in range(4)]
    await run_ready()
    with pytest.raises(Overloaded) as rejection:
        await recorder.call()
    assert rejection.value.limited_by == "upstream:tool:concurrency"
    assert rejection.value.retry_after is not None
    await asyncio.gather(*calls)


@virtual
async def test_a_call_whose_deadline_comes_before_its_turn_is_rejected_at_once() -> None:
    recorder = CallRecorder(Upstream("tool", max_concurrent=1), seconds=10.0)
    await recorder.call()
    first = asyncio.create_task(recorder.call())
    await run_ready()
    began = now()
    with pytest.raises(Overloaded, match="deadline"):
        await recorder.call(deadline=Deadline.within(5.0))
    assert now() == approximately(began)
    await first


@virtual
async def test_a_call_whose_deadline_passes_while_it_waits_is_rejected_then() -> None:
    recorder = CallRecorder(Upstream("tool", max_concurrent=1), seconds=10.0)
    first = asyncio.create_task(recorder.call())
    await run_ready()
    began = now()
    with pytest.raises(Overloaded, match="deadline passed"):
        await recorder.call(deadline=Deadline.within(5.0))
    assert now() - began == approximately(5.0)
    await first
    assert left(recorder.upstream) == (0, 0)


@virtual
async def test_a_call_cancelled_at_any_step_leaves_nothing_behind() -> None:
    for moment in range(12):
        upstream = Upstream("tool", max_concurrent=1)
        recorder = CallRecorder(upstream, seconds=0.0)
        holder = asyncio.create_task(recorder.call())
        waiting = asyncio.create_task(recorder.call())
        after = asyncio.create_task(recorder.call())
        await run_ready(moment)
        waiting.cancel()
        await asyncio.gather(holder, after)
        await asyncio.wait([waiting])
        assert left(upstream) == (0, 0)


@pytest.mark.parametrize("kept", [True, False])
def test_a_call_granted_to_a_task_of_a_closed_loop_comes_back(*, kept: bool) -> None:
    upstream = Upstream("tool", max_concurrent=1, max_wait=5.0)
    holder = upstream.call()
    holder.__enter__()
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(CallRecorder(upstream).call())]
    loop.run_until_complete(run_ready(5))
    assert left(upstream) == (1, 1)
    holder.__exit__(None, None, None)
    assert left(upstream) == (1, 0)
    loop.close()
    if not kept:
        tasks.clear()
        gc.collect()
    with upstream.call():
        assert left(upstream) == (1, 0)
    assert left(upstream) == (0, 0)


async def test_a_coroutine_that_is_closed_while_it_waits_for_a_call_leaves_nothing_behind() -> None:
    for granted in (True, False):
        upstream = Upstream("tool", max_concurrent=1, max_wait=5.0)
        holder = upstream.call()
        await holder.__aenter__()
        waiting = CallRecorder(upstream).call()
        waiting.send(None)
        if granted:
            await holder.__aexit__(None, None, None)
        waiting.close()
        if not granted:
            await holder.__aexit__(None, None, None)
        async with upstream.call():
            assert left(upstream) == (1, 0)
        assert left(upstream) == (0, 0)


# --- quotas ---


@virtual
async def test_calls_are_paced_by_a_configured_quota() -> None:
    recorder = CallRecorder(Upstream("tool", quotas=[Quota(requests=10, per="second")]), seconds=0.0)
    began = now()
    ends = await recorder.together(*[{}] * 30)
    assert sum(end - began < 0.05 for end in ends) == 10  # a whole bucket is admitted at once
    assert max(ends) - began == pytest.approx(2.0, abs=0.05)


@virtual
async def test_a_call_larger_than_its_bucket_is_rejected_without_a_retry_after() -> None:
    upstream = Upstream("llm", quotas=[Quota(tokens=1000, per="minute")])
    with pytest.raises(Overloaded, match="larger") as rejection:
        async with upstream.call(input_tokens=900, output_tokens=200):
            pass
    assert rejection.value.retry_after is None
    assert left(upstream) == (0, 0)


@virtual
async def test_reserved_tokens_that_were_not_used_come_back() -> None:
    upstream = Upstream("llm", quotas=[Quota(tokens=1000, per="minute")])
    began = now()
    for _ in range(5):
        async with upstream.call(input_tokens=100, output_tokens=800) as call:
            call.settle(input_tokens=100, output_tokens=50)
    assert now() - began < 40.0  # 750 used; the last needs 900 free


@virtual
async def test_each_group_of_models_has_an_account_of_its_own() -> None:
    upstream = Upstream("llm", models={"gpt-*": [Quota(requests=1, per="minute")]})
    began = now()
    async with upstream.call("gpt-4o"), upstream.call("other"), upstream.call("another"):
        pass
    assert now() == approximately(began)
    async with upstream.call("gpt-4o-mini"):
        assert now() - began == pytest.approx(60.0, abs=0.1)
    names = {account.name for account in upstream.statistics().accounts}
    assert names == {"upstream:llm:gpt-*", "upstream:llm:other", "upstream:llm:another"}


# --- faults ---


@virtual
async def test_an_open_breaker_rejects_queued_calls_at_once_too() -> None:
    upstream = Upstream("tool", max_concurrent=1, breaker=BreakerRules(reset_timeout=10.0))

    async def fails() -> None:
        async with upstream.call():
            await asyncio.sleep(1.0)
            raise ConnectionError

    results = await asyncio.gather(*(fails() for _ in range(9)), return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds == [ConnectionError] * 5 + [Overloaded] * 4
    assert isinstance(results[-1], Overloaded)
    assert results[-1].limited_by == "upstream:tool:breaker"
    assert results[-1].retry_after is not None
    assert upstream.statistics().accounts[0].breaker == "open"
    assert left(upstream) == (0, 0)


async def call_ignored(upstream: Upstream) -> None:
    async with upstream.call() as call:
        call.ignored()
        raise ValueError("ours")


@virtual
async def test_ignored_failures_do_not_open_the_breaker() -> None:
    upstream = Upstream("tool")
    for _ in range(20):
        with pytest.raises(ValueError, match="ours"):
            await call_ignored(upstream)
    assert upstream.statistics().accounts[0].breaker == "closed"


@virtual
async def test_a_guarded_function_is_retried_with_backoff() -> None:
    search = Upstream("search", retry=Retry(max_attempts=4, base_delay=1.0))
    tries: list[float] = []

    @search.guard
    async def look_up(what: str) -> str:
        tries.append(now())
        if len(tries) < 3:
            raise ConnectionError
        return what

    assert await look_up("rivers") == "rivers"
    assert len(tries) == 3
    assert left(search) == (0, 0)


@virtual
async def test_a_guarded_function_that_keeps_failing_raises_its_own_exception() -> None:
    search = Upstream("search", retry=Retry(max_attempts=3, base_delay=0.1))
    tries = 0

    @search.guard
    async def look_up() -> None:
        nonlocal tries
        tries += 1
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        await look_up()
    assert tries == 3


class SdkError(Exception):
    """An exception with an answer, as SDKs raise it."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__("no")
        self.status_code = status
        self.headers = headers


@virtual
async def test_a_guarded_function_reports_throttling_by_its_exception() -> None:
    search = Upstream("search", retry=Retry(max_attempts=1))
    tries: list[float] = []

    @search.guard
    async def look_up() -> str:
        tries.append(now())
        if len(tries) <= 3:
            raise RuntimeError("the tool failed") from SdkError(429, **{"retry-after": "1"})
        return "found"

    assert await look_up() == "found"  # throttled attempts use up none
    account = search.statistics().accounts[0]
    assert (account.throttled, account.failed, account.breaker) == (3, 0, "closed")
    assert tries[1] - tries[0] >= 1.0
    assert left(search) == (0, 0)


@virtual
async def test_a_wrong_request_of_a_guarded_function_is_neither_retried_nor_a_fault() -> None:
    search = Upstream("search")
    tries = 0

    @search.guard
    async def look_up() -> None:
        nonlocal tries
        tries += 1
        raise SdkError(400)

    for _ in range(20):
        with pytest.raises(SdkError):
            await look_up()
    assert tries == 20
    assert search.statistics().accounts[0].breaker == "closed"


@virtual
async def test_a_permit_taken_by_hand_reports_throttling_by_the_exception_that_leaves_its_block() -> None:
    llm = Upstream("llm")
    for _ in range(20):
        with pytest.raises(SdkError):
            async with llm.call("", input_tokens=10):
                raise SdkError(503)
    account = llm.statistics().accounts[0]
    assert (account.throttled, account.failed, account.breaker) == (20, 0, "closed")


def test_a_plain_function_is_guarded_in_plain_threads() -> None:
    search = Upstream("search", max_concurrent=2, retry=Retry(max_attempts=3, base_delay=0.001))
    at_once, peak, failures = 0, 0, {3: 2, 7: 1}
    lock = threading.Lock()
    meet = threading.Barrier(2)

    @search.guard
    def look_up(number: int) -> int:
        nonlocal at_once, peak
        with lock:
            at_once += 1
            peak = max(peak, at_once)
            fails = failures.get(number, 0) > 0
            if fails:
                failures[number] -= 1
        if number in (0, 1):
            meet.wait(10.0)
        with lock:
            at_once -= 1
        if fails:
            raise ConnectionError
        return number

    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(look_up(n))) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert sorted(results) == list(range(10))
    assert peak == 2
    assert left(search) == (0, 0)


def test_several_loops_and_threads_share_one_upstream() -> None:
    upstream = Upstream("tool", max_concurrent=3)
    peak: list[int] = []

    async def calls() -> None:
        async def one() -> None:
            async with upstream.call():
                peak.append(left(upstream)[0])
                await asyncio.sleep(0)

        await asyncio.gather(*(one() for _ in range(200)))

    def blocking_calls() -> None:
        for _ in range(200):
            with upstream.call():
                peak.append(left(upstream)[0])

    threads = [threading.Thread(target=lambda: asyncio.run(calls())) for _ in range(3)]
    threads += [threading.Thread(target=blocking_calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert len(peak) == 1000
    assert max(peak) <= 3
    assert left(upstream) == (0, 0)


# --- budgets ---


@virtual
async def test_a_spent_budget_rejects_calls_until_it_renews() -> None:
    upstream = Upstream("llm", budget=Budget(usd=1.0, per="day"))
    for _ in range(4):
        async with upstream.call("gpt") as call:
            call.settle(input_tokens=10, output_tokens=10, usd=0.25)
    assert upstream.statistics().spent_usd == pytest.approx(1.0)
    with pytest.raises(Overloaded, match="budget") as rejection:
        async with upstream.call("gpt"):
            pass
    assert rejection.value.retry_after is not None


@virtual
async def test_a_rejection_for_a_budget_says_its_state_and_the_cost_of_the_call() -> None:
    budget = Budget(usd=1.0, per="day", reserved_share=0.1)
    upstream = Upstream("llm", budget=budget, prices={"gpt": Price(input=1.0, output=1.0)})
    async with upstream.call("gpt", input_tokens=800_000):
        pass
    with pytest.raises(Overloaded) as rejection:
        await upstream.call("gpt", input_tokens=200_000).__aenter__()
    assert rejection.value.reason == (
        "llm: the budget of llm would be overspent: it has 1 USD a day, 0.1 of it for HIGH and CRITICAL alone, of which"
        " 0.8 are spent or reserved, and this may cost 0.2"
    )
    assert rejection.value.retry_after is not None


@virtual
async def test_a_call_that_no_budget_will_ever_afford_has_no_retry_after() -> None:
    prices = {"gpt": Price(input=1.0, output=1.0)}
    for upstream, tokens in (
        (Upstream("llm", budget=Budget(usd=1.0, per="hour"), prices=prices), 2_000_000),
        (Upstream("llm", budget=Budget(usd=1.0), prices=prices), 600_000),
    ):
        async with upstream.call("gpt", input_tokens=500_000):
            pass
        with pytest.raises(
            Overloaded, match=r": ask for less, or raise that budget\. Nothing was started"
        ) as rejection:
            await upstream.call("gpt", input_tokens=tokens).__aenter__()
        assert rejection.value.retry_after is None


# --- with a supervisor ---


@virtual
async def test_calls_have_the_priority_of_their_task() -> None:
    upstream = Upstream("llm", max_concurrent=1)
    admitted: list[str] = []

    async def agent(task: Task) -> None:
        async with upstream.call():
            admitted.append(task.payload)
            await asyncio.sleep(1.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=9)
        await asyncio.gather(
            supervisor.run(Task("work", "first")),
            supervisor.run(Task("work", "low", priority=Priority.LOW)),
            supervisor.run(Task("work", "high", priority=Priority.HIGH)),
        )
    assert admitted == ["first", "high", "low"]


@virtual
async def test_calls_of_an_earlier_run_go_before_those_of_later_runs() -> None:
    upstream = Upstream("llm", max_concurrent=1, max_start_wait=1e9)
    ended: list[int] = []

    async def agent(task: Task) -> None:
        for _ in range(4):
            async with upstream.call():
                await asyncio.sleep(1.0)
        ended.append(task.payload)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=4)
        began = now()
        tickets = [supervisor.submit_nowait(Task("work", number)) for number in range(4)]
        times = [(await ticket, now() - began)[1] for ticket in tickets]
    assert ended == [0, 1, 2, 3]
    assert times[0] < 8.0  # 13 if all took turns


@virtual
async def test_no_run_starts_while_its_first_call_would_wait_too_long() -> None:
    upstream = Upstream("llm", quotas=[Quota(requests=20, per="second")], max_concurrent=100)
    recorder = CallRecorder(upstream)
    await recorder.call()
    calls = [asyncio.create_task(recorder.call(priority=Priority.LOW)) for _ in range(50)]
    await run_ready(3)
    assert left(upstream) == (20, 30)  # one more LOW call waits 1.5 s; a run starts below 0.25 s
    assert [priority for priority in Priority if shared_account(upstream).may_start(priority)] == list(Priority)[:-1]
    for call in calls[23:]:
        call.cancel()
    await run_ready(3)
    assert [priority for priority in Priority if shared_account(upstream).may_start(priority)] == list(Priority)
    await asyncio.wait(calls)


@virtual
async def test_a_full_account_rejects_new_tasks() -> None:
    upstream = Upstream("llm", quotas=[Quota(requests=6, per="minute")], max_wait=60.0)

    async def agent(_: Task) -> None:
        async with upstream.call():
            await asyncio.sleep(0.1)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=20)
        await supervisor.run(Task("work"))
        tickets = [supervisor.submit_nowait(Task("work")) for _ in range(40)]
        rejected = [ticket for ticket in tickets if not ticket]
        assert rejected
        assert {ticket.limited_by for ticket in rejected} == {"upstream:llm"}
        assert supervisor.system_load() >= 0.8
        assert "upstream:llm" in {reading.resource for reading in supervisor.readings()}
        for ticket in tickets:
            if ticket:
                assert (await ticket).success


# --- bad input ---


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrent": 0},
        {"max_concurrent": True},
        {"max_wait": 0.0},
        {"max_wait": float("inf")},
        {"quotas": [5]},
        {"models": {"gpt": [None]}},
        {"weights": {"acme": 0.0}},
        {"weights": {"acme": "3"}},
        {"weights": ["acme"]},
        {"max_concurrent": "8"},
        {"max_wait": "60"},
        {"max_start_wait": "1"},
        {"max_start_wait": -1},
        {"quotas": Quota(requests=5, per="minute")},
        {"models": {"gpt": Quota(requests=5, per="minute")}},
        {"models": ["gpt"]},
        {"budget": 25},
        {"tenant_budget": {"usd": 25}},
        {"task_budget": "25"},
        {"retry": 3},
        {"breaker": 5},
        {"fallback": "gpt-4o-mini"},
        {"fallback": 5},
    ],
)
def test_an_invalid_setting_is_rejected_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(InvalidSetting, match=rf"Upstream 'llm' was given {name}(\[.*\])?=.*; it must be "):
        Upstream("llm", **settings)


def test_the_error_for_a_fallback_that_is_a_string_shows_the_string() -> None:
    with pytest.raises(InvalidSetting, match=r"fallback='gpt-4o-mini'"):
        Upstream("llm", fallback="gpt-4o-mini")  # type: ignore[arg-type]


def test_max_start_wait_may_be_0() -> None:
    assert Upstream("llm", max_start_wait=0).core.settings.max_start_wait == 0


def test_an_upstream_needs_a_name() -> None:
    with pytest.raises(InvalidSetting):
        Upstream("")


@virtual
async def test_a_call_is_entered_once() -> None:
    call = Upstream("tool").call()
    async with call:
        pass
    with pytest.raises(CallMisused):
        async with call:
            pass
