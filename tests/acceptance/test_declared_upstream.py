"""Workers that declare the upstreams they use: the load counts from the first task on, before any call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.task_plane import approximately, flood, now, run_ready, virtual

from forebay import (
    BackpressureSupervisor,
    Budget,
    Fallback,
    Priority,
    Quota,
    Task,
    TaskStatus,
    Upstream,
    Verdict,
    clock,
)
from forebay.errors import InvalidSetting
from forebay.quota import Price
from forebay.simulation import simulate

HIGH = Priority.HIGH
WAIT_LIMIT = 20.0  # seconds, longer than anything here takes


class CallingAgent:
    """A handler whose runs first think for a while, and then call; it records when each started."""

    def __init__(self, upstream: Upstream, model: str = "", *, thinks: float = 1.0, takes: float = 1.0) -> None:
        self.upstream = upstream
        self.model = model
        self.thinks = thinks
        self.takes = takes
        self.began: list[float] = []

    async def __call__(self, _: Task) -> None:
        self.began.append(now())
        await asyncio.sleep(self.thinks)
        await self.call()

    async def call(self, **how: Any) -> None:
        async with self.upstream.call(self.model, input_tokens=1, **how):
            await asyncio.sleep(self.takes)


def supervisor_of(caller: CallingAgent, *upstreams: Any, slots: int = 50, **settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**settings)
    how: dict[str, Any] = {"task_types": ["work"], "max_concurrent": slots}
    supervisor.register_worker("worker", handler=caller, upstreams=upstreams, **how)
    return supervisor


def expected_calls(upstream: Upstream) -> list[int]:
    """Return how many calls are expected, by account."""
    return [account.expected_calls for account in upstream.statistics().accounts]


# --- the first task ---


@virtual
async def test_runs_with_a_declared_upstream_start_only_as_its_key_can_serve_them() -> None:
    key = Upstream("key", max_concurrent=3)
    caller = CallingAgent(key, thinks=100.0)
    async with supervisor_of(caller, key) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 3
        await asyncio.sleep(10.0)
        assert len(caller.began) <= 3 + 10  # one run starts in the time of a typical call, which is a guess
        assert supervisor.statistics().limited_by in ("upstream:key", "pool:work")
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_runs_without_a_declared_upstream_start_all_at_once() -> None:
    """This is why a worker should declare its upstreams."""
    key = Upstream("key", max_concurrent=3)
    caller = CallingAgent(key, thinks=100.0)
    async with supervisor_of(caller) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 40
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_a_given_quota_holds_runs_back_before_the_first_call() -> None:
    key = Upstream("key", quotas=[Quota(requests=5, per="minute")])
    caller = CallingAgent(key, thinks=10.0)
    async with supervisor_of(caller, key) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 5
        assert max(reading.load for reading in supervisor.readings() if reading.resource == "upstream:key") >= 0.8
        refused = supervisor.submit_nowait(Task("work"))
        assert (refused.verdict, refused.limited_by) == (Verdict.REJECTED, "upstream:key")
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_the_first_task_is_rejected_if_others_use_the_whole_key() -> None:
    key = Upstream("key", quotas=[Quota(requests=1, per="minute")])
    async with key.call():
        pass
    caller = CallingAgent(key)
    async with supervisor_of(caller, key) as supervisor:
        ticket = supervisor.submit_nowait(Task("work"))
        assert (ticket.verdict, ticket.limited_by) == (Verdict.REJECTED, "upstream:key")


@virtual
async def test_the_first_task_is_rejected_if_others_have_spent_the_budget() -> None:
    key = Upstream("key", budget=Budget(usd=1, per="hour"), prices={"m": Price(input=1_000_000, output=0)})
    caller = CallingAgent(key, "m", thinks=0.0)
    async with supervisor_of(caller, key) as supervisor:
        async with key.call("m", input_tokens=1):
            pass
        ticket = supervisor.submit_nowait(Task("work"))
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.retry_after is not None
        assert not caller.began


@virtual
async def test_only_the_account_of_the_declared_model_counts() -> None:
    key = Upstream("key", models={model: [Quota(requests=1, per="minute")] for model in ("large", "small")})
    async with key.call("large"):
        pass
    async with supervisor_of(CallingAgent(key, "large"), (key, "large")) as supervisor:
        assert supervisor.submit_nowait(Task("work")).verdict is Verdict.REJECTED
    async with supervisor_of(CallingAgent(key, "small"), (key, "small")) as supervisor:
        assert await supervisor.submit(Task("work"))
    async with key.call("small"), key.call("large"), supervisor_of(CallingAgent(key, "small"), key) as supervisor:
        assert supervisor.submit_nowait(Task("work")).verdict is Verdict.REJECTED


@virtual
async def test_tasks_are_admitted_if_a_fallback_has_free_slots() -> None:
    spare = Upstream("spare", max_concurrent=2)
    key = Upstream("key", quotas=[Quota(requests=1, per="minute")], fallback=Fallback(spare))
    async with key.call():
        pass
    caller = CallingAgent(key)
    async with supervisor_of(caller, key) as supervisor:
        assert await supervisor.submit(Task("work"))


# --- the first call ---


@virtual
async def test_the_account_of_the_first_call_replaces_the_declared_upstream() -> None:
    key = Upstream("key", models={"a": [Quota(requests=100, per="minute")]}, max_concurrent=2)
    caller = CallingAgent(key, "a", thinks=1.0, takes=5.0)
    async with supervisor_of(caller, (key, "a")) as supervisor:
        tickets = flood(supervisor, "work", 10)
        await asyncio.sleep(0.5)
        assert [reading.resource for reading in supervisor.readings()] == ["pool:work", "upstream:key:a", "host"]
        assert supervisor.workers["worker"].declared
        await asyncio.sleep(1.0)
        worker = supervisor.workers["worker"]
        assert not worker.declared
        assert list(worker.sources) == [key.core.accounts.account("a")]
        assert [ticket.status for ticket in tickets[:2]] == [TaskStatus.RUNNING] * 2
        for ticket in tickets:
            assert (await ticket).success
    assert expected_calls(key) == [0]
    assert [account.account.expected_calls for account in key.core.accounts._unopened.values()] == [0]


@virtual
async def test_calls_of_started_runs_are_expected_at_the_account_of_the_first_call() -> None:
    key = Upstream("key", max_concurrent=5)
    caller = CallingAgent(key, takes=100.0)
    thinks = iter([1.0, 10.0, 10.0])

    async def handler(task: Task) -> None:
        caller.thinks = next(thinks)
        await caller(task)

    async with BackpressureSupervisor() as supervisor:
        how: dict[str, Any] = {"task_types": ["work"], "max_concurrent": 3}
        supervisor.register_worker("worker", handler=handler, upstreams=[key], **how)
        tickets = flood(supervisor, "work", 3)
        await asyncio.sleep(2.0)
        assert expected_calls(key) == [2]
        tickets[1].cancel()
        await run_ready()
        assert expected_calls(key) == [1]
        await asyncio.sleep(10.0)
        assert expected_calls(key) == [0]
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_held_back_runs_start_when_the_first_call_shows_an_account_with_free_slots() -> None:
    key = Upstream("key", models={"a": [], "b": []}, max_concurrent=20)
    full = CallingAgent(key, "a", takes=10.0)
    await full.call()  # so calls are known to take long
    others = [asyncio.create_task(full.call()) for _ in range(20)]
    await run_ready()
    caller = CallingAgent(key, "b", thinks=3.0)
    async with supervisor_of(caller, key) as supervisor:
        began = now()
        tickets = flood(supervisor, "work", 10)
        await asyncio.sleep(2.9)
        assert len(caller.began) == 5, "the calls of more runs would wait for longer than a quarter of a call"
        for ticket in tickets:
            assert (await ticket).success
        assert [at - began for at in caller.began[5:]] == [approximately(3.0)] * 5
    await asyncio.gather(*others)


@virtual
async def test_several_fallback_accounts_replace_the_declared_upstream_too() -> None:
    spare = Upstream("spare")
    key = Upstream("key", fallback=Fallback(spare))
    caller = CallingAgent(key)
    async with supervisor_of(caller, key) as supervisor:
        await supervisor.run(Task("work"))
        assert [source.name for source in supervisor.workers["worker"].sources] == ["upstream:key or upstream:spare"]
    assert expected_calls(key) == expected_calls(spare) == [0]


@virtual
async def test_a_closed_supervisor_leaves_nothing_registered() -> None:
    key = Upstream("key", quotas=[Quota(requests=3, per="minute")])
    caller = CallingAgent(key, thinks=1000.0)
    async with supervisor_of(caller, key) as supervisor:
        flood(supervisor, "work", 10)
        await asyncio.sleep(1.0)
        (unopened,) = key.core.accounts._unopened.values()
        assert unopened.account.expected_calls > 0
        await supervisor.close()
    assert unopened.account.expected_calls == 0
    assert not unopened._on_relief
    assert not unopened._held_back


@virtual
async def test_two_workers_may_declare_the_same_upstream() -> None:
    key = Upstream("key", max_concurrent=1)
    caller = CallingAgent(key, thinks=0.1, takes=0.5)
    async with BackpressureSupervisor() as supervisor:
        for name in ("one", "other"):
            how: dict[str, Any] = {"task_types": ["work"], "max_concurrent": 5}
            supervisor.register_worker(name, handler=caller, upstreams=[key, key], **how)
        began = now()
        for ticket in flood(supervisor, "work", 10):
            assert (await ticket).success
        assert now() - began <= 10.0
    assert expected_calls(key) == [0]


# --- mistakes ---


@pytest.mark.parametrize(
    "upstreams", ["key", Upstream("key"), [None], ["key"], [(Upstream("key"), "")], [(Upstream("key"), 3)], {"a": 1}, 7]
)
def test_an_invalid_declaration_is_rejected(upstreams: Any) -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(
        InvalidSetting, match=r"worker 'w' was given upstreams=.*a list of the upstreams that its calls use"
    ):
        supervisor.register_worker("w", handler=print, task_types=["work"], upstreams=upstreams)
    assert not supervisor.workers


def test_a_worker_with_processes_cannot_declare_upstreams() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match="left out with engine"):
        supervisor.register_worker(
            "w", handler="json:dumps", task_types=["work"], engine="process", upstreams=[Upstream("key")]
        )


# --- expected calls ---


class DeclaredHarness:
    """A worker with a declared upstream, and accounts that are opened meanwhile."""

    def __init__(self) -> None:
        self.key = Upstream("key", models={"a": [], "b": []})
        self.declared = self.key.declared()
        self.held: dict[str, int] = {}
        self.expected = 0

    def step(self, number: int) -> None:
        holder = "one" if number % 2 else "other"
        steps: list[Callable[[], object]] = [
            lambda: self.expect(1),
            lambda: self.expect(-min(1, self.expected)),
            lambda: self.hold(holder, number % 5),
            lambda: self.hold(holder, 0),
            lambda: self.key.core.accounts.account("ab"[number % 2], f"key-{number % 3}"),
            lambda: self.declared.load(HIGH),
        ]
        steps[number // 8 % len(steps)]()

    def expect(self, runs: int) -> None:
        self.expected += runs
        self.declared.add_expected_calls(runs)

    def hold(self, holder: str, runs: int) -> None:
        self.held[holder] = runs
        self.declared.hold_back(holder, runs)


@given(st.lists(st.integers(0, 479), max_size=60))
def test_expected_calls_are_noted_once_in_each_account_and_removed_again(numbers: list[int]) -> None:
    harness = DeclaredHarness()
    for number in numbers:
        harness.step(number)
        harness.declared.load()
        expected = harness.expected + sum(harness.held.values())
        accounts = [account.account for account in harness.declared.accounts]
        assert [account.expected_calls for account in accounts] == [expected] * len(accounts)
    harness.expect(-harness.expected)
    for holder in list(harness.held):
        harness.declared.forget(holder)
    every = [*harness.key.core.accounts, *harness.key.core.accounts._unopened.values()]
    assert [account.account.expected_calls for account in every] == [0] * len(every)
    assert not any(account._held_back or account._on_relief for account in every)


@pytest.mark.parametrize("models", [("small", "large"), ("small", None)])
@virtual
async def test_an_account_that_was_declared_twice_expects_one_call_of_a_run(
    models: tuple[str | None, ...],
) -> None:
    key = Upstream("key", max_concurrent=3)  # all models share one account
    caller = CallingAgent(key, "small", takes=0.1)
    async with supervisor_of(caller, *(key if model is None else (key, model) for model in models)) as supervisor:
        tickets = flood(supervisor, "work", 3)
        for ticket in tickets:
            assert (await ticket).success
        assert expected_calls(key) == [0]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_workers_declare_and_do_no_call_stays_expected(seed: int) -> None:
    draw = clock.new_random(seed)
    models = ["small", "smaller", "large", ""]
    groups = draw.choice([None, {"small*": [Quota(requests=60, per="minute")], "large": []}])
    key, other = Upstream("key", max_concurrent=draw.choice([1, 3]), models=groups), Upstream("other", max_concurrent=2)
    upstreams = [key, other, Upstream("third", max_concurrent=2, fallback=Fallback(to=other))]

    async def calls(_: Task) -> None:
        for _call in range(draw.randrange(4)):
            await asyncio.sleep(draw.uniform(0.0, 3.0))
            async with draw.choice(upstreams).call(draw.choice(models), input_tokens=1):
                await asyncio.sleep(draw.expovariate(1.0))

    def declare() -> list[Any]:
        some = draw.choices(upstreams, k=draw.randrange(4))
        return [upstream if draw.random() < 0.4 else (upstream, draw.choice(models[:-1])) for upstream in some]

    async def main() -> None:
        async with BackpressureSupervisor() as supervisor:
            for name in ("one", "two"):
                how: dict[str, Any] = {"max_concurrent": draw.choice([1, 3, 8]), "timeout": draw.choice([5.0, 300.0])}
                supervisor.register_worker(name, handler=calls, task_types=["work"], upstreams=declare(), **how)
            for _ in range(20):
                ticket = supervisor.submit_nowait(Task("work"))
                await asyncio.sleep(draw.choice([0.0, 0.0, 1.0]))
                if draw.random() < 0.2:
                    ticket.cancel()
            await supervisor.drain(timeout=draw.choice([0.1, 1000.0]))
        accounts = [
            account for one in upstreams for account in [*one.core.accounts, *one.core.accounts._unopened.values()]
        ]
        assert [account.account.expected_calls for account in accounts] == [0] * len(accounts)
        assert not any(account._held_back or account._on_relief for account in accounts)

    simulate(main, seed=seed)


@pytest.mark.blocks
async def test_two_runs_in_threads_that_call_an_account_at_once_are_expected_no_more() -> None:
    key = Upstream("key", max_concurrent=10)
    began: list[Task] = []
    call, called, go_on = threading.Event(), threading.Barrier(3), threading.Event()

    def calls(task: Task) -> None:
        began.append(task)
        assert call.wait(WAIT_LIMIT)
        with key.call():
            pass
        called.wait(WAIT_LIMIT)
        assert go_on.wait(WAIT_LIMIT)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=calls, task_types=["work"], max_concurrent=2, upstreams=[key])
        tickets = flood(supervisor, "work", 2)
        while len(began) < 2:  # noqa: ASYNC110 - by threads
            await asyncio.sleep(0)
        call.set()
        called.wait(WAIT_LIMIT)  # the event loop is blocked meanwhile, so both have called before it learns of either
        await run_ready()
        assert expected_calls(key) == [0]
        go_on.set()
        for ticket in tickets:
            assert (await ticket).success


@virtual
async def test_relief_of_an_upstream_serves_all_workers_that_declared_it() -> None:
    key = Upstream("key", max_concurrent=1)
    async with key.call():
        await asyncio.sleep(10.0)  # so calls are known to take long
    caller = CallingAgent(key, thinks=0.0)
    async with supervisor_of(caller, key) as supervisor:
        async with key.call():
            waiting = asyncio.create_task(CallingAgent(key, takes=0.0).call(priority=Priority.CRITICAL))
            await run_ready()
            ticket = supervisor.submit_nowait(Task("work"))
            await asyncio.sleep(1.0)
            assert not caller.began
            relieved = now()
        await waiting
        await ticket
        assert caller.began == [approximately(relieved)]
