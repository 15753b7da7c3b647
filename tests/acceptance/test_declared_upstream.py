"""Declared upstreams of workers: they count from the first task on, until the first call shows the account."""

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
TIMEOUT = 20.0  # seconds; nothing here takes as long


class Caller:
    """A handler whose runs think for a while and then make a call.

    Attributes:
        began: when each run began.
    """

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


def new_supervisor(caller: Caller, *upstreams: Any, slots: int = 50, **settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**settings)
    how: dict[str, Any] = {"task_types": ["work"], "max_concurrent": slots}
    supervisor.register_worker("worker", handler=caller, upstreams=upstreams, **how)
    return supervisor


def expected_calls(upstream: Upstream) -> list[int]:
    """Return the number of expected calls of each account."""
    return [account.expected_calls for account in upstream.statistics().accounts]


# --- before the first call ---


@virtual
async def test_no_more_runs_start_before_their_first_call_than_the_account_can_serve() -> None:
    key = Upstream("key", max_concurrent=3)
    caller = Caller(key, thinks=100.0)
    async with new_supervisor(caller, key) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 3
        await asyncio.sleep(10.0)
        assert len(caller.began) <= 3 + 10  # one more per typical call: the estimate may be wrong
        assert supervisor.statistics().limited_by in ("upstream:key", "pool:work")
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_without_a_declared_upstream_all_runs_start_at_once() -> None:
    key = Upstream("key", max_concurrent=3)
    caller = Caller(key, thinks=100.0)
    async with new_supervisor(caller) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 40
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_a_configured_quota_holds_runs_back_before_the_first_call() -> None:
    key = Upstream("key", quotas=[Quota(requests=5, per="minute")])
    caller = Caller(key, thinks=10.0)
    async with new_supervisor(caller, key) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 5
        assert max(reading.load for reading in supervisor.readings() if reading.resource == "upstream:key") >= 0.8
        rejected = supervisor.submit_nowait(Task("work"))
        assert (rejected.verdict, rejected.limited_by) == (Verdict.REJECTED, "upstream:key")
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_a_quota_that_others_used_up_rejects_the_first_task() -> None:
    key = Upstream("key", quotas=[Quota(requests=1, per="minute")])
    async with key.call():
        pass
    caller = Caller(key)
    async with new_supervisor(caller, key) as supervisor:
        ticket = supervisor.submit_nowait(Task("work"))
        assert (ticket.verdict, ticket.limited_by) == (Verdict.REJECTED, "upstream:key")


@virtual
async def test_a_budget_that_others_spent_rejects_the_first_task() -> None:
    key = Upstream("key", budget=Budget(usd=1, per="hour"), prices={"m": Price(input=1_000_000, output=0)})
    caller = Caller(key, "m", thinks=0.0)
    async with new_supervisor(caller, key) as supervisor:
        async with key.call("m", input_tokens=1):
            pass
        ticket = supervisor.submit_nowait(Task("work"))
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.retry_after is not None
        assert not caller.began


@virtual
async def test_only_the_declared_model_counts() -> None:
    key = Upstream("key", models={model: [Quota(requests=1, per="minute")] for model in ("large", "small")})
    async with key.call("large"):
        pass
    async with new_supervisor(Caller(key, "large"), (key, "large")) as supervisor:
        assert supervisor.submit_nowait(Task("work")).verdict is Verdict.REJECTED
    async with new_supervisor(Caller(key, "small"), (key, "small")) as supervisor:
        assert await supervisor.submit(Task("work"))
    async with key.call("small"), key.call("large"), new_supervisor(Caller(key, "small"), key) as supervisor:
        assert supervisor.submit_nowait(Task("work")).verdict is Verdict.REJECTED


@virtual
async def test_a_fallback_with_capacity_keeps_tasks_admitted() -> None:
    spare = Upstream("spare", max_concurrent=2)
    key = Upstream("key", quotas=[Quota(requests=1, per="minute")], fallback=Fallback(spare))
    async with key.call():
        pass
    caller = Caller(key)
    async with new_supervisor(caller, key) as supervisor:
        assert await supervisor.submit(Task("work"))


# --- after the first call ---


@virtual
async def test_the_account_of_the_first_call_replaces_the_declared_upstream() -> None:
    key = Upstream("key", models={"a": [Quota(requests=100, per="minute")]}, max_concurrent=2)
    caller = Caller(key, "a", thinks=1.0, takes=5.0)
    async with new_supervisor(caller, (key, "a")) as supervisor:
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
    assert [shared.account.expected_calls for shared in key.core.accounts._unopened.values()] == [0]


@virtual
async def test_running_tasks_are_expected_at_the_account_of_the_first_call() -> None:
    key = Upstream("key", max_concurrent=5)
    caller = Caller(key, takes=100.0)
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
async def test_held_back_runs_start_when_the_first_call_shows_an_account_with_capacity() -> None:
    key = Upstream("key", models={"a": [], "b": []}, max_concurrent=20)
    full = Caller(key, "a", takes=10.0)
    await full.call()  # the account learns that calls take long
    others = [asyncio.create_task(full.call()) for _ in range(20)]
    await run_ready()
    caller = Caller(key, "b", thinks=3.0)
    async with new_supervisor(caller, key) as supervisor:
        began = now()
        tickets = flood(supervisor, "work", 10)
        await asyncio.sleep(2.9)
        assert len(caller.began) == 5, "the calls of more runs would wait longer than a quarter of a call"
        for ticket in tickets:
            assert (await ticket).success
        assert [at - began for at in caller.began[5:]] == [approximately(3.0)] * 5
    await asyncio.gather(*others)


@virtual
async def test_a_choice_of_accounts_replaces_the_declared_upstream_too() -> None:
    spare = Upstream("spare")
    key = Upstream("key", fallback=Fallback(spare))
    caller = Caller(key)
    async with new_supervisor(caller, key) as supervisor:
        await supervisor.run(Task("work"))
        assert [source.name for source in supervisor.workers["worker"].sources] == ["upstream:key or upstream:spare"]
    assert expected_calls(key) == expected_calls(spare) == [0]


@virtual
async def test_a_closed_supervisor_leaves_no_expected_calls() -> None:
    key = Upstream("key", quotas=[Quota(requests=3, per="minute")])
    caller = Caller(key, thinks=1000.0)
    async with new_supervisor(caller, key) as supervisor:
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
    caller = Caller(key, thinks=0.1, takes=0.5)
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


def test_a_worker_in_a_process_cannot_declare_upstreams() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match="left out with engine"):
        supervisor.register_worker(
            "w", handler="json:dumps", task_types=["work"], engine="process", upstreams=[Upstream("key")]
        )


# --- expected calls by account ---


class Declaration:
    """The expected calls that supervisors note at a declared upstream, while accounts are opened."""

    def __init__(self) -> None:
        self.key = Upstream("key", models={"a": [], "b": []})
        self.declared = self.key.declared()
        self.held_back: dict[str, int] = {}
        self.started = 0

    def step(self, number: int) -> None:
        holder = "one" if number % 2 else "other"
        steps: list[Callable[[], object]] = [
            lambda: self.start(1),
            lambda: self.start(-min(1, self.started)),
            lambda: self.hold_back(holder, number % 5),
            lambda: self.hold_back(holder, 0),
            lambda: self.key.core.accounts.account("ab"[number % 2], f"key-{number % 3}"),
            lambda: self.declared.load(HIGH),
        ]
        steps[number // 8 % len(steps)]()

    def start(self, runs: int) -> None:
        self.started += runs
        self.declared.add_expected_calls(runs)

    def hold_back(self, holder: str, runs: int) -> None:
        self.held_back[holder] = runs
        self.declared.hold_back(holder, runs)


@given(st.lists(st.integers(0, 479), max_size=60))
def test_each_account_of_a_declared_upstream_counts_expected_calls_once_and_forgets_them(numbers: list[int]) -> None:
    declaration = Declaration()
    for number in numbers:
        declaration.step(number)
        declaration.declared.load()
        expected = declaration.started + sum(declaration.held_back.values())
        accounts = [shared.account for shared in declaration.declared.accounts]
        assert [account.expected_calls for account in accounts] == [expected] * len(accounts)
    declaration.start(-declaration.started)
    for holder in list(declaration.held_back):
        declaration.declared.forget(holder)
    every = [*declaration.key.core.accounts, *declaration.key.core.accounts._unopened.values()]
    assert [shared.account.expected_calls for shared in every] == [0] * len(every)
    assert not any(shared._held_back or shared._on_relief for shared in every)


@pytest.mark.parametrize("models", [("small", "large"), ("small", None)])
@virtual
async def test_an_account_declared_twice_expects_one_call_of_a_run(
    models: tuple[str | None, ...],
) -> None:
    key = Upstream("key", max_concurrent=3)  # all models share one account
    caller = Caller(key, "small", takes=0.1)
    async with new_supervisor(caller, *(key if model is None else (key, model) for model in models)) as supervisor:
        tickets = flood(supervisor, "work", 3)
        for ticket in tickets:
            assert (await ticket).success
        assert expected_calls(key) == [0]


@pytest.mark.parametrize("seed", range(40))
def test_after_random_declarations_and_calls_no_call_stays_expected(seed: int) -> None:
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

    def declared() -> list[Any]:
        some = draw.choices(upstreams, k=draw.randrange(4))
        return [upstream if draw.random() < 0.4 else (upstream, draw.choice(models[:-1])) for upstream in some]

    async def main() -> None:
        async with BackpressureSupervisor() as supervisor:
            for name in ("one", "two"):
                how: dict[str, Any] = {"max_concurrent": draw.choice([1, 3, 8]), "timeout": draw.choice([5.0, 300.0])}
                supervisor.register_worker(name, handler=calls, task_types=["work"], upstreams=declared(), **how)
            for _ in range(20):
                ticket = supervisor.submit_nowait(Task("work"))
                await asyncio.sleep(draw.choice([0.0, 0.0, 1.0]))
                if draw.random() < 0.2:
                    ticket.cancel()
            await supervisor.drain(timeout=draw.choice([0.1, 1000.0]))
        accounts = [
            shared for one in upstreams for shared in [*one.core.accounts, *one.core.accounts._unopened.values()]
        ]
        assert [shared.account.expected_calls for shared in accounts] == [0] * len(accounts)
        assert not any(shared._held_back or shared._on_relief for shared in accounts)

    simulate(main, seed=seed)


@pytest.mark.blocks
async def test_two_threads_that_call_an_account_at_once_are_both_no_longer_expected() -> None:
    key = Upstream("key", max_concurrent=10)
    began: list[Task] = []
    call, called, go_on = threading.Event(), threading.Barrier(3), threading.Event()

    def calls(task: Task) -> None:
        began.append(task)
        assert call.wait(TIMEOUT)
        with key.call():
            pass
        called.wait(TIMEOUT)
        assert go_on.wait(TIMEOUT)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=calls, task_types=["work"], max_concurrent=2, upstreams=[key])
        tickets = flood(supervisor, "work", 2)
        while len(began) < 2:  # noqa: ASYNC110 - by threads
            await asyncio.sleep(0)
        call.set()
        called.wait(TIMEOUT)  # this blocks the loop, so both have made a call before it notes either
        await run_ready()
        assert expected_calls(key) == [0]
        go_on.set()
        for ticket in tickets:
            assert (await ticket).success


@virtual
async def test_a_relieved_account_starts_the_runs_of_workers_that_declared_it() -> None:
    key = Upstream("key", max_concurrent=1)
    async with key.call():
        await asyncio.sleep(10.0)  # the account learns that calls take long
    caller = Caller(key, thinks=0.0)
    async with new_supervisor(caller, key) as supervisor:
        async with key.call():
            waiting = asyncio.create_task(Caller(key, takes=0.0).call(priority=Priority.CRITICAL))
            await run_ready()
            ticket = supervisor.submit_nowait(Task("work"))
            await asyncio.sleep(1.0)
            assert not caller.began
            relieved = now()
        await waiting
        await ticket
        assert caller.began == [approximately(relieved)]
