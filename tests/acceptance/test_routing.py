"""The order in which tasks are started, and on which worker."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from tests.support.task_plane import Agent, approximately, fill, flood, now, results, run_ready, statuses, virtual

from forebay import BackpressureSupervisor, Deadline, Priority, Task, WorkerState

LOW, NORMAL, HIGH, CRITICAL = Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL


# --- the queue -------------------------------------------------------------------------------------------------------


@virtual
async def test_the_queue_is_served_by_priority_then_deadline_then_order_of_submission() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        supervisor.submit_nowait(Task("work", "running"))
        for name, priority, within in (
            ("low", LOW, None),
            ("normal", NORMAL, None),
            ("normal, later", NORMAL, None),
            ("normal, in 90 s", NORMAL, 90.0),
            ("normal, in 60 s", NORMAL, 60.0),
            ("high", HIGH, None),
            ("critical", CRITICAL, None),
        ):
            deadline = None if within is None else Deadline.within(within)
            assert supervisor.submit_nowait(Task("work", name, priority=priority, deadline=deadline))
    assert agent.started == [
        "running",
        "critical",
        "high",
        "normal, in 60 s",
        "normal, in 90 s",
        "normal",
        "normal, later",
        "low",
    ]


@virtual
async def test_low_moves_under_a_flood_of_critical() -> None:
    agent = Agent()
    async with BackpressureSupervisor(max_queue_size=20) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        supervisor.submit_nowait(Task("work", "first"))
        low = supervisor.submit_nowait(Task("work", "low", priority=LOW))
        while not low.done():
            supervisor.submit_nowait(Task("work", "critical", priority=CRITICAL))
            await asyncio.sleep(0.5)
            assert now() < 60.0
    assert agent.started.index("low") >= 20


@virtual
async def test_a_type_is_not_starved_by_a_more_important_one_on_the_same_worker() -> None:
    agent = Agent()
    async with BackpressureSupervisor(max_queue_size=20) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["loud", "quiet"])
        supervisor.submit_nowait(Task("loud", "first"))
        quiet = supervisor.submit_nowait(Task("quiet", "quiet"))
        while not quiet.done():
            supervisor.submit_nowait(Task("loud", "loud", priority=CRITICAL))
            await asyncio.sleep(0.5)
            assert now() < 60.0


@virtual
async def test_two_types_of_one_worker_are_served_by_priority_and_order_of_submission() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["a", "b"])
        supervisor.submit_nowait(Task("a", "running"))
        for name, kind, priority in (
            ("1", "a", NORMAL),
            ("2", "b", NORMAL),
            ("3", "a", NORMAL),
            ("4", "b", HIGH),
            ("5", "a", CRITICAL),
        ):
            supervisor.submit_nowait(Task(kind, name, priority=priority))
    assert agent.started == ["running", "5", "4", "1", "2", "3"]


@virtual
async def test_a_critical_task_goes_to_the_head_of_the_queue_if_no_worker_is_idle() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=2)
        flood(supervisor, "work", 10)
        supervisor.submit_nowait(Task("work", "critical", priority=CRITICAL))
    assert agent.started.index("critical") == 2


@virtual
async def test_no_worker_ever_holds_more_than_its_slots() -> None:
    agents = [Agent(), Agent(0.3), Agent(2.0)]
    async with BackpressureSupervisor() as supervisor:
        for slots, agent in enumerate(agents, start=1):
            supervisor.register_worker(f"w{slots}", handler=agent, task_types=["work"], max_concurrent=slots)
        for _ in range(5):
            flood(supervisor, "work", 30, priority=CRITICAL)
            await asyncio.sleep(1.0)
    assert [agent.peak for agent in agents] == [1, 2, 3]


# --- the waterfall ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [HIGH, CRITICAL])
@virtual
async def test_high_priority_goes_to_an_idle_worker_even_if_a_busy_one_would_finish_first(
    priority: Priority,
) -> None:
    fast, slow = Agent(1.0), Agent(100.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("slow", handler=slow, task_types=["work"])
        await results(flood(supervisor, "work", 1))
        supervisor.register_worker("fast", handler=fast, task_types=["work"], max_concurrent=50)
        await results(flood(supervisor, "work", 2))
        flood(supervisor, "work", 3)
        supervisor.submit_nowait(Task("work", "important", priority=priority))
        await run_ready()
    assert slow.started == [0, "important"]


@virtual
async def test_normal_priority_goes_where_it_finishes_first_even_if_another_worker_is_idle() -> None:
    fast, slow = Agent(1.0), Agent(100.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("slow", handler=slow, task_types=["work"])
        await results(flood(supervisor, "work", 1))
        supervisor.register_worker("fast", handler=fast, task_types=["work"], max_concurrent=50)
        await results(flood(supervisor, "work", 2))
        flood(supervisor, "work", 30)
        await run_ready()
        assert slow.started == [0]
        assert supervisor.workers["slow"].state is WorkerState.IDLE


@virtual
async def test_high_priority_never_exceeds_a_limit() -> None:
    agent = Agent()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=3)
        await fill(supervisor, "work", CRITICAL)
    assert agent.peak == 3


# --- worker selection ------------------------------------------------------------------------------------------------


async def share_of_work(agents: dict[str, Agent], tasks: int, *, every: float, slots: int = 4) -> Counter[str]:
    """Return how many of `tasks` each agent got, if one is submitted every `every` seconds."""
    async with BackpressureSupervisor() as supervisor:
        for name, agent in agents.items():
            supervisor.register_worker(
                name, handler=agent, task_types=["work"], max_concurrent=slots, reset_timeout=None
            )
        for _ in range(tasks):
            supervisor.submit_nowait(Task("work"))
            await asyncio.sleep(every)
    return Counter({name: len(agent.started) for name, agent in agents.items()})


@virtual
async def test_a_worker_four_times_as_fast_gets_far_more_than_its_half() -> None:
    share = await share_of_work({"fast": Agent(1.0), "slow": Agent(4.0)}, 400, every=0.4)
    assert share["fast"] > 0.75 * 400


@virtual
async def test_under_full_load_every_worker_is_used() -> None:
    fast, slow = Agent(1.0), Agent(4.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("fast", handler=fast, task_types=["work"], max_concurrent=4)
        supervisor.register_worker("slow", handler=slow, task_types=["work"], max_concurrent=4)
        flood(supervisor, "work", 80)
    assert len(fast.started) == pytest.approx(4 * len(slow.started), rel=0.25)


@virtual
async def test_equal_workers_share_equally() -> None:
    share = await share_of_work({"a": Agent(1.0), "b": Agent(1.0)}, 400, every=0.2)
    assert 150 < share["a"] < 250


@virtual
async def test_a_worker_that_fails_in_ten_milliseconds_does_not_attract_all_tasks() -> None:
    agents = {"works": Agent(1.0), "fails": Agent(0.01, error=ValueError())}
    share = await share_of_work(agents, 200, every=0.5)
    assert share["fails"] <= 10


@virtual
async def test_a_worker_that_fails_now_and_then_is_forgiven() -> None:
    good, shaky = Agent(1.0), Agent(1.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("good", handler=good, task_types=["work"], max_concurrent=4)
        supervisor.register_worker("shaky", handler=shaky, task_types=["work"], max_concurrent=4)
        await results(flood(supervisor, "work", 8))
        shaky.error = ValueError()
        await results(flood(supervisor, "work", 4))
        shaky.error = None
        before = len(shaky.started)
        await results(flood(supervisor, "work", 2))
        assert shaky.started[before:] == []  # its score has risen
        await asyncio.sleep(60.0)
        before = len(shaky.started)
        await results(flood(supervisor, "work", 8))
        assert len(shaky.started[before:]) == 4


@virtual
async def test_a_worker_of_unknown_duration_is_assumed_to_have_the_median() -> None:
    known, fresh = Agent(1.0), Agent(1.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("known", handler=known, task_types=["work"], max_concurrent=10)
        await results(flood(supervisor, "work", 10))
        supervisor.register_worker("fresh", handler=fresh, task_types=["work"], max_concurrent=10)
        flood(supervisor, "work", 10)
        await run_ready()
    assert len(fresh.started) == 5


@virtual
async def test_a_new_worker_is_tried_even_if_the_pool_was_slow_when_it_was_added() -> None:
    old, fresh = Agent(100.0), Agent(1.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("old", handler=old, task_types=["work"], max_concurrent=20)
        await results(flood(supervisor, "work", 20))
        old.seconds = 1.0
        for _ in range(5):  # the old worker is fast again, but the pool's median is still slow
            await results(flood(supervisor, "work", 1))
        supervisor.register_worker("fresh", handler=fresh, task_types=["work"], max_concurrent=20)
        for _ in range(20):
            await results(flood(supervisor, "work", 1))
        flood(supervisor, "work", 20)
        await run_ready()
    assert len(fresh.started) >= 9


@virtual
async def test_failures_do_not_count_as_speed() -> None:
    agent = Agent(1.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        await results(flood(supervisor, "work", 1))
        agent.seconds, agent.error = 0.01, ValueError()
        await results(flood(supervisor, "work", 3))
        assert supervisor.workers["worker"].avg_duration_ms == approximately(1000.0)


@virtual
async def test_durations_are_kept_by_task_type() -> None:
    async def by_type(task: Task) -> None:
        await asyncio.sleep(1.0 if task.task_type == "quick" else 9.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=by_type, task_types=["quick", "long"], max_concurrent=8)
        await results([*flood(supervisor, "quick", 8), *flood(supervisor, "long", 8)])
        ticket = supervisor.submit_nowait(Task("quick", deadline=Deadline.within(2.0)))
        assert await statuses([ticket])
        assert ticket.result is not None
        assert ticket.result.success
