"""Workers that say what they draw on: it is felt from the first task on, and the first call shows which account."""

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
PATIENCE = 20.0  # seconds that nothing here takes


class Caller:
    """A handler whose runs think for a while, and then call; when each began."""

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


def house(caller: Caller, *upstreams: Any, slots: int = 50, **settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**settings)
    how: dict[str, Any] = {"task_types": ["work"], "max_concurrent": slots}
    supervisor.register_worker("worker", handler=caller, upstreams=upstreams, **how)
    return supervisor


def coming(upstream: Upstream) -> list[int]:
    """Runs that are expected to call, by account."""
    return [account.expected_calls for account in upstream.statistics().accounts]


# --- from the first task on ---


@virtual
async def test_runs_with_a_declared_upstream_start_only_as_its_key_can_serve_them() -> None:
    key = Upstream("key", max_concurrent=3)
    caller = Caller(key, thinks=100.0)
    async with house(caller, key) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 3
        await asyncio.sleep(10.0)
        assert len(caller.began) <= 3 + 10  # one in the time of a typical call, which is a guess and must not lock it
        assert supervisor.statistics().limited_by in ("upstream:key", "pool:work")
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_runs_without_a_declared_upstream_start_all_at_once() -> None:
    """Why it is worth saying."""
    key = Upstream("key", max_concurrent=3)
    caller = Caller(key, thinks=100.0)
    async with house(caller) as supervisor:
        tickets = flood(supervisor, "work", 40)
        await asyncio.sleep(0.5)
        assert len(caller.began) == 40
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_a_given_quota_holds_runs_back_before_the_first_call() -> None:
    key = Upstream("key", quotas=[Quota(requests=5, per="minute")])
    caller = Caller(key, thinks=10.0)
    async with house(caller, key) as supervisor:
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
    caller = Caller(key)
    async with house(caller, key) as supervisor:
        ticket = supervisor.submit_nowait(Task("work"))
        assert (ticket.verdict, ticket.limited_by) == (Verdict.REJECTED, "upstream:key")


@virtual
async def test_the_first_task_is_rejected_if_others_have_spent_the_budget() -> None:
    key = Upstream("key", budget=Budget(usd=1, per="hour"), prices={"m": Price(input=1_000_000, output=0)})
    caller = Caller(key, "m", thinks=0.0)
    async with house(caller, key) as supervisor:
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
    async with house(Caller(key, "large"), (key, "large")) as supervisor:
        assert supervisor.submit_nowait(Task("work")).verdict is Verdict.REJECTED
    async with house(Caller(key, "small"), (key, "small")) as supervisor:
        assert await supervisor.submit(Task("work"))
    async with key.call("small"), key.call("large"), house(Caller(key, "small"), key) as supervisor:
        assert supervisor.submit_nowait(Task("work")).verdict is Verdict.REJECTED


@virtual
async def test_tasks_are_admitted_if_a_fallback_has_free_slots() -> None:
    spare = Upstream("spare", max_concurrent=2)
    key = Upstream("key", quotas=[Quota(requests=1, per="minute")], fallback=Fallback(spare))
    async with key.call():
        pass
    caller = Caller(key)
    async with house(caller, key) as supervisor:
        assert await supervisor.submit(Task("work"))


# --- what comes true ---


@virtual
async def test_the_account_of_the_first_call_replaces_the_declared_upstream() -> None:
    key = Upstream("key", models={"a": [Quota(requests=100, per="minute")]}, max_concurrent=2)
    caller = Caller(key, "a", thinks=1.0, takes=5.0)
    async with house(caller, (key, "a")) as supervisor:
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
    assert coming(key) == [0]
    assert [desk.account.expected_calls for desk in key.core.accounts._unopened.values()] == [0]


@virtual
async def test_calls_of_started_runs_are_expected_at_the_account_of_the_first_call() -> None:
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
        assert coming(key) == [2]
        tickets[1].cancel()
        await run_ready()
        assert coming(key) == [1]
        await asyncio.sleep(10.0)
        assert coming(key) == [0]
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_held_back_runs_start_when_the_first_call_shows_an_account_with_free_slots() -> None:
    key = Upstream("key", models={"a": [], "b": []}, max_concurrent=20)
    full = Caller(key, "a", takes=10.0)
    await full.call()  # it takes long, as is known then
    others = [asyncio.create_task(full.call()) for _ in range(20)]
    await run_ready()
    caller = Caller(key, "b", thinks=3.0)
    async with house(caller, key) as supervisor:
        began = now()
        tickets = flood(supervisor, "work", 10)
        await asyncio.sleep(2.9)
        assert len(caller.began) == 5, "the calls of more would wait for longer than a quarter of one, for all we know"
        for ticket in tickets:
            assert (await ticket).success
        assert [at - began for at in caller.began[5:]] == [approximately(3.0)] * 5
    await asyncio.gather(*others)


@virtual
async def test_several_fallback_accounts_replace_the_declared_upstream_too() -> None:
    spare = Upstream("spare")
    key = Upstream("key", fallback=Fallback(spare))
    caller = Caller(key)
    async with house(caller, key) as supervisor:
        await supervisor.run(Task("work"))
        assert [source.name for source in supervisor.workers["worker"].sources] == ["upstream:key or upstream:spare"]
    assert coming(key) == coming(spare) == [0]


@virtual
async def test_a_closed_supervisor_leaves_nothing_registered() -> None:
    key = Upstream("key", quotas=[Quota(requests=3, per="minute")])
    caller = Caller(key, thinks=1000.0)
    async with house(caller, key) as supervisor:
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
    assert coming(key) == [0]


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


# --- what is noted where ---


class Notes:
    """What a worker notes with what was foretold of it, and accounts that are opened meanwhile."""

    def __init__(self) -> None:
        self.key = Upstream("key", models={"a": [], "b": []})
        self.foretold = self.key.declared()
        self.held: dict[str, int] = {}
        self.came = 0

    def step(self, number: int) -> None:
        who = "one" if number % 2 else "other"
        steps: list[Callable[[], object]] = [
            lambda: self.come(1),
            lambda: self.come(-min(1, self.came)),
            lambda: self.hold(who, number % 5),
            lambda: self.hold(who, 0),
            lambda: self.key.core.accounts.account("ab"[number % 2], f"key-{number % 3}"),
            lambda: self.foretold.load(HIGH),
        ]
        steps[number // 8 % len(steps)]()

    def come(self, runs: int) -> None:
        self.came += runs
        self.foretold.add_expected_calls(runs)

    def hold(self, who: str, runs: int) -> None:
        self.held[who] = runs
        self.foretold.hold_back(who, runs)


@given(st.lists(st.integers(0, 479), max_size=60))
def test_expected_calls_are_noted_once_in_each_account_and_removed_again(numbers: list[int]) -> None:
    notes = Notes()
    for number in numbers:
        notes.step(number)
        notes.foretold.load()
        expected = notes.came + sum(notes.held.values())
        accounts = [desk.account for desk in notes.foretold.accounts]
        assert [account.expected_calls for account in accounts] == [expected] * len(accounts)
    notes.come(-notes.came)
    for who in list(notes.held):
        notes.foretold.forget(who)
    every = [*notes.key.core.accounts, *notes.key.core.accounts._unopened.values()]
    assert [desk.account.expected_calls for desk in every] == [0] * len(every)
    assert not any(desk._held_back or desk._on_relief for desk in every)


@pytest.mark.parametrize("models", [("small", "large"), ("small", None)])
@virtual
async def test_an_account_that_was_declared_twice_expects_one_call_of_a_run(
    models: tuple[str | None, ...],
) -> None:
    key = Upstream("key", max_concurrent=3)  # all models are of one account
    caller = Caller(key, "small", takes=0.1)
    async with house(caller, *(key if model is None else (key, model) for model in models)) as supervisor:
        tickets = flood(supervisor, "work", 3)
        for ticket in tickets:
            assert (await ticket).success
        assert coming(key) == [0]


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

    def said() -> list[Any]:
        some = draw.choices(upstreams, k=draw.randrange(4))
        return [upstream if draw.random() < 0.4 else (upstream, draw.choice(models[:-1])) for upstream in some]

    async def main() -> None:
        async with BackpressureSupervisor() as supervisor:
            for name in ("one", "two"):
                how: dict[str, Any] = {"max_concurrent": draw.choice([1, 3, 8]), "timeout": draw.choice([5.0, 300.0])}
                supervisor.register_worker(name, handler=calls, task_types=["work"], upstreams=said(), **how)
            for _ in range(20):
                ticket = supervisor.submit_nowait(Task("work"))
                await asyncio.sleep(draw.choice([0.0, 0.0, 1.0]))
                if draw.random() < 0.2:
                    ticket.cancel()
            await supervisor.drain(timeout=draw.choice([0.1, 1000.0]))
        desks = [desk for one in upstreams for desk in [*one.core.accounts, *one.core.accounts._unopened.values()]]
        assert [desk.account.expected_calls for desk in desks] == [0] * len(desks)
        assert not any(desk._held_back or desk._on_relief for desk in desks)

    simulate(main, seed=seed)


@pytest.mark.blocks
async def test_two_runs_in_threads_that_call_an_account_at_once_are_expected_no_more() -> None:
    key = Upstream("key", max_concurrent=10)
    began: list[Task] = []
    call, called, go_on = threading.Event(), threading.Barrier(3), threading.Event()

    def calls(task: Task) -> None:
        began.append(task)
        assert call.wait(PATIENCE)
        with key.call():
            pass
        called.wait(PATIENCE)
        assert go_on.wait(PATIENCE)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=calls, task_types=["work"], max_concurrent=2, upstreams=[key])
        tickets = flood(supervisor, "work", 2)
        while len(began) < 2:  # noqa: ASYNC110 - by threads
            await asyncio.sleep(0)
        call.set()
        called.wait(PATIENCE)  # the loop stands meanwhile, so both have met the key before it hears of either
        await run_ready()
        assert coming(key) == [0]
        go_on.set()
        for ticket in tickets:
            assert (await ticket).success


@virtual
async def test_relief_of_an_upstream_serves_all_workers_that_declared_it() -> None:
    key = Upstream("key", max_concurrent=1)
    async with key.call():
        await asyncio.sleep(10.0)  # a call takes long, as is known then
    caller = Caller(key, thinks=0.0)
    async with house(caller, key) as supervisor:
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
