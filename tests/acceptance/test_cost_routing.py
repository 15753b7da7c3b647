"""Routing by cost: a task goes to the cheapest worker that makes its deadline, and may wait for that one."""

from __future__ import annotations

import asyncio
import math
import random  # noqa: TID251 - the type of a generator
from typing import Any, Self

import pytest
from tests.support.task_plane import Agent, approximately, flood, now, results, run_ready, virtual

from forebay import (
    BackpressureSupervisor,
    Budget,
    Deadline,
    Estimate,
    Price,
    Priority,
    Quota,
    Retry,
    Task,
    TaskStatus,
    Ticket,
    Upstream,
    clock,
)
from forebay.errors import InvalidSetting
from forebay.simulation import simulate
from forebay.supervisor.start_gate import StartGate
from forebay.supervisor.worker import WorkerAgent

LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH
HEAVY, LIGHT = 2.0, 10.0  # seconds that a run takes


class Costs:
    """A supervisor with a heavy worker, fast and dear, and a light one; both have run often enough to be known."""

    def __init__(self, *, heavy_slots: int = 2, light_slots: int = 1, **settings: Any) -> None:
        self.heavy, self.light = Agent(HEAVY), Agent(LIGHT)
        self.supervisor = BackpressureSupervisor(**settings)
        self._add("heavy", self.heavy, cost=0.02, max_concurrent=heavy_slots)
        self._add("light", self.light, cost=0.002, max_concurrent=light_slots)

    def _add(self, name: str, agent: Agent, **options: Any) -> None:
        self.supervisor.register_worker(name, handler=agent, task_types=["work"], **options)

    async def __aenter__(self) -> Self:
        await self.supervisor.__aenter__()
        for _ in range(12):
            urgent = await self.submit("heavy", priority=HIGH)  # `light` is idle, too, and slower
            cheap = await self.submit("light")
            await results([urgent, cheap])
        for agent in (self.heavy, self.light):
            agent.calls.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.supervisor.__aexit__(None, None, None)

    async def submit(self, payload: object = None, *, within: float | None = None, **fields: Any) -> Ticket:
        deadline = None if within is None else Deadline.within(within)
        ticket = await self.supervisor.submit(Task("work", payload, deadline=deadline, **fields))
        await run_ready()
        return ticket

    @property
    def held(self) -> int:
        return self.supervisor.statistics().held


# --- among workers that are free --------------------------------------------------------------------------------------


@virtual
async def test_a_task_goes_to_the_cheapest_worker_that_makes_its_deadline() -> None:
    async with Costs() as costs:
        tickets = [await costs.submit("in a hurry", within=8.0), await costs.submit("in time", within=30.0)]
        assert costs.heavy.started == ["in a hurry"]
        assert costs.light.started == ["in time"]
        assert all(result.success for result in await results(tickets))


@virtual
async def test_without_a_deadline_a_task_goes_to_the_cheapest_worker() -> None:
    async with Costs(light_slots=2) as costs:
        await costs.submit("first")
        await costs.submit("second")
        await costs.submit("third")
        assert costs.light.started == ["first", "second"]
        assert costs.heavy.started == ["third"]


@virtual
async def test_an_urgent_task_goes_to_the_worker_that_finishes_it_first() -> None:
    async with Costs() as costs:
        await costs.submit("urgent", priority=HIGH, within=300.0)
        assert costs.heavy.started == ["urgent"]


@virtual
async def test_a_worker_that_never_makes_the_deadline_does_not_get_every_task() -> None:
    heavy, light = Agent(HEAVY), Agent(LIGHT)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("heavy", handler=heavy, task_types=["work"], cost=0.02)
        supervisor.register_worker("light", handler=light, task_types=["work"], cost=0.002)
        late = 0
        for _ in range(60):  # nothing is known of either, and none of `light` ever succeeds
            result = await (await supervisor.submit(Task("work", deadline=Deadline.within(8.0))))
            late += not result.success
        assert 1 <= late <= 5


@virtual
async def test_the_slowness_of_a_cheap_worker_rejects_no_task_that_a_free_one_makes() -> None:
    async with Costs() as costs:
        for _ in range(30):
            await (await costs.submit("cheap"))  # most of the latest times are those of `light`
        for _ in range(4):  # one task in ten seconds passes any estimate
            ticket = await costs.submit("in a hurry", within=4.0)
            assert ticket
            assert (await ticket).worker_id == "heavy"


@virtual
async def test_a_cheap_worker_whose_upstream_is_short_keeps_no_task_from_another_worker() -> None:
    key = Upstream("key", quotas=[Quota(requests=1, per="hour")])
    async with key.call("m"):
        pass
    heavy, light = Agent(HEAVY), Agent(LIGHT)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("heavy", handler=heavy, task_types=["work"], cost=0.02)
        supervisor.register_worker(
            "light", handler=light, task_types=["work"], cost=0.002, upstreams=[key], max_concurrent=2
        )
        for name in ("tried", "task"):  # one run of each priority may start whatever the pressure
            assert await supervisor.submit(Task("work", name))
        await run_ready()
        assert (light.started, heavy.started) == (["tried"], ["task"])


@virtual
@pytest.mark.parametrize("cost", [0.002, None])
async def test_a_worker_whose_upstream_is_short_keeps_no_task_from_another_one_of_its_cost(cost: float | None) -> None:
    key = Upstream("key", quotas=[Quota(requests=1, per="hour")])
    async with key.call("m"):
        pass
    short, other = Agent(1.0), Agent(5.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("heavy", handler=Agent(), task_types=["other", "work"], cost=cost and 10 * cost)
        supervisor.register_worker(
            "short", handler=short, task_types=["work"], cost=cost, upstreams=[key], max_concurrent=9
        )
        supervisor.register_worker("other", handler=other, task_types=["work"], cost=cost, max_concurrent=2)
        await supervisor.submit(Task("other"))  # `heavy` is busy
        for name in ("tried", "task", "another"):
            assert await supervisor.submit(Task("work", name))
        await run_ready()
        assert sorted(short.started + other.started) == ["another", "task", "tried"]
        assert len(short.started) == 1


@virtual
async def test_a_retried_task_returns_to_its_worker_if_the_upstream_of_the_other_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def may_start(_: StartGate, worker: WorkerAgent, *_facts: object, **_more: object) -> bool:
        return worker.name != "heavy"

    monkeypatch.setattr(StartGate, "may_start", may_start)
    heavy, light = Agent(HEAVY), Agent(LIGHT, error=ValueError("no"))
    async with BackpressureSupervisor() as supervisor:
        for name, agent, cost in (("heavy", heavy, 0.02), ("light", light, 0.002)):
            key = Upstream(f"key of {name}")
            supervisor.register_worker(name, handler=agent, cost=cost, task_types=["work"], upstreams=[key])
        result = await (await supervisor.submit(Task("work", retry=Retry(max_attempts=3))))
        assert (result.attempts, result.worker_id, heavy.started) == (3, "light", [])


@virtual
async def test_a_retried_task_goes_to_another_worker_even_if_that_is_dearer() -> None:
    heavy, light = Agent(HEAVY), Agent(LIGHT, error=ValueError("no"))
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("heavy", handler=heavy, task_types=["work"], cost=0.02)
        supervisor.register_worker("light", handler=light, task_types=["work"], cost=0.002)
        result = await (await supervisor.submit(Task("work", "task", retry=Retry(max_attempts=2))))
        assert result.worker_id == "heavy"
        assert light.started == ["task"]


@virtual
async def test_a_big_task_goes_to_a_fast_worker_if_estimates_predict_times() -> None:
    def sized(seconds: float) -> Any:
        async def handler(task: Task) -> None:
            started.append((seconds, task.payload))
            await asyncio.sleep(seconds * task.payload)

        return handler

    started: list[tuple[float, int]] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("heavy", handler=sized(1.0), task_types=["work"], cost=0.02)
        supervisor.register_worker("light", handler=sized(1.5), task_types=["work"], cost=0.002)

        async def run(size: int) -> None:
            deadline = Deadline.within(40.0)
            await (await supervisor.submit(Task("work", size, deadline=deadline, estimate=Estimate(calls=size))))

        for number in range(30):
            await run(1 + number % 5)
        started.clear()
        await run(2)
        await run(25)
        assert started == [(1.5, 2), (1.0, 25)]


# --- learned costs ----------------------------------------------------------------------------------------------------


class Caller:
    """A handler that makes calls for which an upstream charges `usd` dollars each."""

    def __init__(self, upstream: Upstream, usd: float, seconds: float, *, calls: int = 1) -> None:
        self.upstream, self.usd, self.seconds, self.calls = upstream, usd, seconds, calls
        self.started: list[object] = []

    async def __call__(self, task: Task) -> None:
        self.started.append(task.payload)
        for _ in range(self.calls):
            async with self.upstream.call("m") as call:
                await asyncio.sleep(self.seconds / self.calls)
                call.settle(input_tokens=1, output_tokens=1, usd=self.usd)


def charging() -> Upstream:
    return Upstream("key", budget=Budget(usd=1e6), prices={"m": Price(input=1.0, output=1.0)})


@virtual
async def test_what_a_task_costs_is_learned_from_what_its_calls_are_charged() -> None:
    key = charging()
    heavy, light = Caller(key, 0.01, HEAVY, calls=2), Caller(key, 0.002, LIGHT)
    async with BackpressureSupervisor() as supervisor:
        workers = [
            supervisor.register_worker(name, handler=handler, task_types=["work"], max_concurrent=3)
            for name, handler in (("heavy", heavy), ("light", light))
        ]
        for _ in range(4):
            await (await supervisor.submit(Task("work")))
        assert [worker.cost("work") for worker in workers] == pytest.approx([0.02, 0.002])
        assert [worker.costs for worker in supervisor.statistics().workers] == [
            {"work": pytest.approx(0.02)},
            {"work": pytest.approx(0.002)},
        ]
        assert len(heavy.started) <= 2
        flood(supervisor, "work", 3)
        await run_ready()
        assert light.started[-3:] == [0, 1, 2]


@virtual
async def test_calls_of_nested_tasks_are_charged_to_their_own_runs() -> None:
    key = charging()
    supervisor = BackpressureSupervisor()

    async def parent(task: Task) -> None:
        await Caller(key, 1.0, 1.0)(task)
        await supervisor.run(Task("child"))
        await Caller(key, 1.0, 1.0)(task)

    async with supervisor:
        outer = supervisor.register_worker("outer", handler=parent, task_types=["parent"])
        inner = supervisor.register_worker("inner", handler=Caller(key, 5.0, 1.0), task_types=["child"])
        await supervisor.run(Task("parent"))
        assert [outer.cost("parent"), inner.cost("child")] == pytest.approx([2.0, 5.0])
        assert outer.cost("child") is None


@virtual
async def test_failed_runs_tell_nothing_of_the_cost() -> None:
    caller = Caller(charging(), 1.0, 1.0)

    async def fails(task: Task) -> None:
        await caller(task)
        raise ValueError

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=fails, task_types=["work"])
        await (await supervisor.submit(Task("work")))
        assert worker.cost("work") is None


def test_calls_of_threads_are_charged_to_their_run() -> None:
    key = charging()

    def handler(_: Task) -> None:
        for _number in range(3):
            with key.call("m") as call:
                call.settle(input_tokens=1, output_tokens=1, usd=0.5)

    async def main() -> None:
        async with BackpressureSupervisor() as supervisor:
            worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
            await supervisor.run(Task("work"))
            assert worker.cost("work") == pytest.approx(1.5)

    asyncio.run(main())


@virtual
async def test_a_given_cost_is_not_changed_by_what_calls_are_charged() -> None:
    async with BackpressureSupervisor() as supervisor:
        handler = Caller(charging(), 1.0, 1.0)
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work", "more"], cost={"work": 0.5})
        await supervisor.run(Task("work"))
        await supervisor.run(Task("more"))
        assert [worker.cost("work"), worker.cost("more")] == pytest.approx([0.5, 1.0])


@virtual
async def test_learned_costs_are_forgotten_when_the_supervisor_starts_again() -> None:
    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("worker", handler=Caller(charging(), 1.0, 1.0), task_types=["work"])
    async with supervisor:
        await supervisor.run(Task("work"))
    async with supervisor:
        assert worker.cost("work") is None


# --- waiting for a cheaper worker -------------------------------------------------------------------------------------


@virtual
async def test_no_slot_idles_while_a_task_waits_unless_it_may_wait_for_a_cheaper_worker() -> None:
    async with Costs() as costs:
        await costs.submit("first", within=60.0)
        await costs.submit("second", within=60.0)
        assert costs.heavy.started == ["second"]


@virtual
async def test_a_task_waits_for_a_cheaper_worker_while_that_makes_its_deadline() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        tickets = [await costs.submit(number, within=60.0) for number in range(3)]
        assert costs.held == 2
        assert costs.supervisor.statistics().waiting == 2
        assert [result.worker_id for result in await results(tickets)] == ["light"] * 3
        assert costs.light.started == [0, 1, 2]
        assert costs.held == 0


@virtual
async def test_only_as_many_wait_as_the_cheaper_worker_can_serve_in_time() -> None:
    async with Costs(max_cost_wait=math.inf, heavy_slots=10) as costs:
        tickets = [await costs.submit(number, within=45.0) for number in range(8)]
        assert 1 <= costs.held <= 3
        assert len(costs.heavy.started) == 7 - costs.held
        assert all(result.success for result in await results(tickets))


@virtual
async def test_a_task_that_waited_in_vain_starts_on_the_dearer_worker_in_time() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        costs.light.seconds = 200.0
        stuck = await costs.submit("stuck")
        ticket = await costs.submit("waits", within=60.0)
        assert costs.held == 1
        started = now()
        result = await ticket
        assert (result.worker_id, result.status) == ("heavy", TaskStatus.SUCCEEDED)
        assert 30.0 < now() - started < 60.0
        stuck.cancel()


@virtual
async def test_a_task_waits_for_max_cost_wait_at_most() -> None:
    async with Costs(max_cost_wait=15.0) as costs:
        costs.light.seconds = 200.0
        stuck = await costs.submit("stuck")
        ticket = await costs.submit("waits", within=600.0)
        started = now()
        assert (await ticket).worker_id == "heavy"
        assert now() - started == approximately(15.0 + HEAVY)
        stuck.cancel()


@virtual
async def test_a_task_without_a_deadline_does_not_wait_and_passes_those_that_do() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        await costs.submit("first", within=60.0)
        await costs.submit("held", within=60.0)
        for name, fields in (("no deadline", {}), ("urgent", {"priority": HIGH, "within": 60.0})):
            await costs.submit(name, **fields)
        assert costs.held == 1
        assert costs.heavy.started == ["no deadline", "urgent"]


@virtual
async def test_nested_tasks_do_not_wait_for_a_cheaper_worker() -> None:
    costs = Costs(max_cost_wait=math.inf)

    async def parent(_: Task) -> None:
        await costs.supervisor.run(Task("work", "nested", deadline=Deadline.within(60.0)))

    costs.supervisor.register_worker("parent", handler=parent, task_types=["parent"])
    async with costs:
        await costs.submit("first", within=60.0)
        await costs.supervisor.run(Task("parent"))
        assert costs.heavy.started == ["nested"]


@virtual
async def test_held_tasks_are_served_by_priority_and_deadline() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        tickets = [
            await costs.submit("first", within=200.0),
            await costs.submit("low", within=100.0, priority=LOW),
            await costs.submit("later", within=120.0),
            await costs.submit("sooner", within=110.0),
        ]
        await results(tickets)
        assert costs.light.started == ["first", "sooner", "later", "low"]


@virtual
async def test_held_tasks_go_to_another_worker_once_the_cheaper_one_is_gone() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        first, held = await costs.submit("first", within=60.0), await costs.submit("held", within=60.0)
        leaving = asyncio.create_task(costs.supervisor.unregister_worker("light"))
        await run_ready()
        assert costs.heavy.started == ["held"]
        assert all(result.success for result in await results([first, held]))
        await leaving


@virtual
async def test_a_held_task_can_be_cancelled() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        await costs.submit("first", within=60.0)
        held = await costs.submit("held", within=60.0)
        assert held.cancel()
        assert (await held).status is TaskStatus.CANCELLED
        assert costs.held == costs.supervisor.statistics().waiting == 0


@virtual
async def test_draining_does_not_wait_for_a_cheaper_worker() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        costs.light.seconds = 50.0
        await costs.submit("first")
        held = await costs.submit("held", within=100.0)
        assert costs.held == 1
        draining = asyncio.create_task(costs.supervisor.drain())
        await run_ready()
        assert costs.heavy.started == ["held"]
        await draining
        assert (await held).success


@virtual
async def test_held_tasks_leave_half_of_the_queue_to_others() -> None:
    async with Costs(max_cost_wait=math.inf, max_queue_size=6, heavy_slots=50) as costs:
        for number in range(10):
            await costs.submit(number, within=10_000.0)
        assert costs.held == 3
        assert len(costs.heavy.started) == 6


@virtual
async def test_a_new_worker_serves_held_tasks() -> None:
    async with Costs(max_cost_wait=math.inf) as costs:
        await costs.submit("first", within=60.0)
        await costs.submit("held", within=60.0)
        other = Agent(LIGHT)
        costs.supervisor.register_worker("other", handler=other, task_types=["work"], cost=0.002)
        await run_ready()
        assert other.started == ["held"]
        assert not costs.heavy.started


@virtual
async def test_with_work_in_the_overflow_no_task_is_held() -> None:
    async with Costs(max_cost_wait=math.inf, max_queue_size=4, overflow="memory://") as costs:
        tickets = [await costs.submit(number, within=1_000.0) for number in range(30)]
        done = await results(tickets)
        assert all(result.success for result in done)
        assert costs.held == costs.supervisor.statistics().waiting == 0


async def disturb(supervisor: BackpressureSupervisor, tickets: list[Ticket], rng: random.Random) -> None:
    """Cancel a task, resize a worker, pause the type for a while, or do nothing, at random."""
    chance = rng.random()
    if chance < 0.05:
        rng.choice(tickets).cancel()
    elif chance < 0.08:
        supervisor.workers[rng.choice(("heavy", "light", "middle"))].resize(rng.randint(1, 3))
    elif chance < 0.1:
        supervisor.pause("a")
        await asyncio.sleep(2.0)
        supervisor.resume("a")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_every_task_ends_and_nothing_is_held_then(seed: int) -> None:
    rng = clock.new_random(seed)

    async def main() -> None:
        heavy, light, middle = Agent(1.0), Agent(5.0), Agent(3.0)
        settings: dict[str, Any] = {"max_cost_wait": rng.choice((3.0, math.inf)), "max_queue_size": 20}
        if rng.random() < 0.3:
            settings["overflow"] = "memory://"
        async with BackpressureSupervisor(**settings) as supervisor:
            for name, agent, cost, kinds in (
                ("heavy", heavy, 0.02, ["a", "b"]),
                ("light", light, 0.002, ["a"]),
                ("middle", middle, 0.005, ["a", "b"]),
            ):
                supervisor.register_worker(name, handler=agent, task_types=kinds, cost=cost, max_concurrent=2)
            tickets: list[Ticket] = []
            for number in range(300):
                await asyncio.sleep(rng.expovariate(1.5))
                agent = rng.choice((heavy, light, middle))
                agent.error = ValueError("no") if rng.random() < 0.1 else None
                agent.seconds = rng.uniform(0.5, 8.0)
                deadline = Deadline.within(rng.uniform(1.0, 60.0)) if rng.random() < 0.8 else None
                tenant = rng.choice(("one", "one", "one", "two"))
                thread_id = rng.choice((None, None, "thread"))
                task = Task(
                    rng.choice("aab"), number, priority=rng.choice([*Priority]), deadline=deadline, tenant=tenant,
                    thread_id=thread_id,
                )  # fmt: skip
                tickets.append(supervisor.submit_nowait(task))
                await disturb(supervisor, tickets, rng)
                held = supervisor.statistics().held
                assert held <= supervisor.statistics().waiting
            for ticket in tickets:
                if ticket:
                    await ticket
            await asyncio.sleep(10.0)  # the handlers of cancelled runs have stopped
            statistics = supervisor.statistics()
            assert (statistics.held, statistics.waiting, statistics.running) == (0, 0, 0)
            assert supervisor._dispatcher is not None
            for pool in supervisor._dispatcher.core.pools.by_type.values():
                assert (pool.held, pool.reserved) == (0, 0)

    simulate(main, seed=seed)


# --- the settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [-0.1, math.inf, math.nan, True, "1", 10**400, {"other": 1.0}, {"work": -1}, [0.1]])
def test_a_cost_is_dollars_of_at_least_0(cost: Any) -> None:
    with pytest.raises(InvalidSetting, match="cost"):
        BackpressureSupervisor().register_worker("w", handler=Agent(), task_types=["work"], cost=cost)


@pytest.mark.parametrize("wait", [-1.0, math.nan, None, True])
def test_max_cost_wait_is_seconds_of_at_least_0(wait: Any) -> None:
    with pytest.raises(InvalidSetting, match="max_cost_wait"):
        BackpressureSupervisor(max_cost_wait=wait)
