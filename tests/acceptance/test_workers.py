"""Registering workers, their four states, and the circuit breaker that makes them FAILED."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

import pytest
from tests.support.task_plane import (
    Agent,
    UncancellableHandler,
    approximately,
    flood,
    now,
    rejected,
    results,
    run_ready,
    statuses,
    virtual,
)

from forebay import BackpressureSupervisor, Overloaded, Task, TaskStatus, Verdict, WorkerAgent, WorkerState
from forebay.breaker import BreakerRules, FaultWindow, consecutive_faults
from forebay.errors import InvalidSetting, RemoteError, UnusableTask
from forebay.events import WorkerFailed, WorkerRecovered


async def fail(supervisor: BackpressureSupervisor, agent: Agent, times: int) -> None:
    """Have `agent` fail `times` times, one after the other."""
    agent.error = ValueError("broken")
    for _ in range(times):
        await supervisor.submit_nowait(Task("work"))
    agent.error = None


# --- registering -----------------------------------------------------------------------------------------------------


@virtual
async def test_a_worker_may_be_registered_before_the_start_and_after_it() -> None:
    supervisor = BackpressureSupervisor()
    before = supervisor.register_worker("before", handler=Agent(), task_types=["early"])
    async with supervisor:
        after = supervisor.register_worker("after", handler=Agent(), task_types=["late"])
        assert await supervisor.run(Task("early", 1)) == 1
        assert await supervisor.run(Task("late", 2)) == 2
        assert dict(supervisor.workers) == {"before": before, "after": after}


@virtual
async def test_a_worker_registered_later_takes_from_the_queue_at_once() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("first", handler=Agent(10.0), task_types=["work"])
        _, waiting = flood(supervisor, "work", 2)
        supervisor.register_worker("second", handler=Agent(1.0), task_types=["work"])
        assert (await waiting).worker_id == "second"
        assert now() == approximately(1.0)


@virtual
async def test_the_decorator_registers_and_returns_the_callable() -> None:
    supervisor = BackpressureSupervisor()

    @supervisor.worker("research", "summarize", max_concurrent=2, timeout=5.0)
    async def researcher(task: Task) -> str:
        return f"about {task.payload}"

    @supervisor.worker("write", name="scribe")
    def write(task: Task) -> str:
        return f"on {task.payload}"

    async with supervisor:
        assert await supervisor.run(Task("summarize", "rivers")) == "about rivers"
        assert await supervisor.run(Task("write", "lakes")) == "on lakes"
    assert await researcher(Task("research", "x")) == "about x"
    assert write(Task("write", "y")) == "on y"
    assert list(supervisor.workers) == ["researcher", "scribe"]
    assert supervisor.workers["researcher"].max_concurrent == 2
    assert supervisor.workers["researcher"].task_types == ("research", "summarize")


class Robot:
    async def __call__(self, task: Task) -> Any:
        return task.payload

    async def act(self, task: Task) -> Any:
        return task.payload

    def act_slowly(self, task: Task) -> Any:
        return task.payload


async def with_extra(extra: int, task: Task) -> Any:
    return task.payload + extra - extra


def returns_an_awaitable(task: Task) -> Any:
    async def later() -> Any:
        return task.payload

    return later()


@pytest.mark.parametrize(
    "handler",
    [
        Robot(),
        Robot().act,
        Robot().act_slowly,
        functools.partial(with_extra, 3),
        lambda task: task.payload,
        returns_an_awaitable,
    ],
    ids=["object", "async method", "method", "partial", "lambda", "returns an awaitable"],
)
@virtual
async def test_whatever_can_be_called_with_the_task_is_a_handler(handler: Any) -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        assert await supervisor.run(Task("work", 7)) == 7


@virtual
async def test_a_factory_makes_a_fresh_agent_for_each_task() -> None:
    class Stateful:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        async def __call__(self, task: Task) -> list[Any]:
            self.seen.append(task.payload)
            return self.seen

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", factory=Stateful, task_types=["work"])
        assert [await supervisor.run(Task("work", n)) for n in range(3)] == [[0], [1], [2]]


@virtual
async def test_a_factory_that_fails_for_one_task_ends_that_task_and_returns_its_slot() -> None:
    made = 0

    def make() -> Agent:
        nonlocal made
        made += 1
        if made == 3:  # the first is made for inspection
            raise ValueError
        return Agent()

    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", factory=make, task_types=["work"])
        endings = [result.status for result in await results(flood(supervisor, "work", 3))]
        assert worker.current_tasks == 0
    assert endings == [TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.SUCCEEDED]


# --- states ----------------------------------------------------------------------------------------------------------


@virtual
async def test_a_worker_is_idle_busy_or_overloaded_by_its_slots() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=2)
        seen = []
        for _ in range(3):
            seen.append((worker.state, worker.load_factor, worker.current_tasks, worker.can_accept()))
            flood(supervisor, "work", 1)
        assert seen == [
            (WorkerState.IDLE, 0.0, 0, True),
            (WorkerState.BUSY, 0.5, 1, True),
            (WorkerState.OVERLOADED, 1.0, 2, False),
        ]
        await asyncio.sleep(5.0)
        assert worker.state is WorkerState.IDLE


@virtual
async def test_the_average_duration_is_in_milliseconds() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(1.5), task_types=["work"])
        assert worker.avg_duration_ms == 0.0
        await supervisor.run(Task("work"))
        assert worker.avg_duration_ms == approximately(1500.0)


# --- FAILED ----------------------------------------------------------------------------------------------------------


@virtual
async def test_five_failures_in_a_row_make_a_worker_failed_and_four_do_not() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"])
        for _ in range(2):
            await fail(supervisor, agent, 4)
            assert worker.can_accept()
            await supervisor.run(Task("work"))
        await fail(supervisor, agent, 5)
        assert worker.state is WorkerState.FAILED
        assert not worker.can_accept()


@virtual
async def test_timeouts_count_as_failures_and_cancellations_do_not() -> None:
    async with BackpressureSupervisor() as supervisor:
        slow = supervisor.register_worker("slow", handler=Agent(9.0), task_types=["slow"])
        wanted = supervisor.register_worker("unwanted", handler=Agent(9.0), task_types=["unwanted"])
        for _ in range(6):
            ticket = supervisor.submit_nowait(Task("unwanted"))
            await asyncio.sleep(0.1)
            ticket.cancel()
            await run_ready()
        for _ in range(5):
            await supervisor.submit_nowait(Task("slow", timeout=0.1))
            await run_ready()
        assert wanted.state is WorkerState.IDLE
        assert slow.state is WorkerState.FAILED


@virtual
async def test_an_overloaded_raised_inside_a_handler_does_not_count_against_its_worker() -> None:
    async with BackpressureSupervisor() as supervisor:
        agent = Agent(0.1, error=Overloaded("the well is dry"))
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"])
        await results(flood(supervisor, "work", 20))
        assert worker.state is WorkerState.IDLE


@pytest.mark.parametrize(
    "error",
    [
        UnusableTask(field="payload", value="str", expected="a dict"),
        RemoteError(type="UnusableTask", message="raised in another process", traceback=""),
    ],
)
@virtual
async def test_a_task_that_its_handler_cannot_run_does_not_count_against_the_worker(error: Exception) -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(error=error), task_types=["work"])
        assert await statuses(flood(supervisor, "work", 20)) == [TaskStatus.FAILED] * 20
        assert worker.state is WorkerState.IDLE


@virtual
async def test_a_failed_worker_gets_no_tasks_and_the_others_do() -> None:
    bad, good = Agent(0.1), Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        failed = supervisor.register_worker("bad", handler=bad, task_types=["work"], reset_timeout=None)
        await fail(supervisor, bad, 5)
        supervisor.register_worker("good", handler=good, task_types=["work"])
        await results(flood(supervisor, "work", 20))
        assert failed.state is WorkerState.FAILED
    assert len(bad.started) == 5
    assert len(good.started) == 20


@virtual
async def test_a_failed_worker_takes_its_slots_away_from_the_pool() -> None:
    bad = Agent(0.1)
    async with BackpressureSupervisor(max_queue_size=10) as supervisor:
        supervisor.register_worker("bad", handler=bad, task_types=["work"], max_concurrent=10, reset_timeout=None)
        await fail(supervisor, bad, 5)
        supervisor.register_worker("good", handler=Agent(10.0), task_types=["work"], max_concurrent=2)
        flood(supervisor, "work", 3)
        assert supervisor.system_load() == 3 / 12
        assert supervisor.utilization() == 1.0


@virtual
async def test_a_pool_without_slots_reads_full_and_says_why_it_rejects() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=None)
        await fail(supervisor, agent, 5)
        assert supervisor.system_load() == 1.0
        assert supervisor.utilization() == 0.0
        ticket = supervisor.submit_nowait(Task("work"))
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.reason == (
            "every worker for 'work' is FAILED until it is revived,"
            " by supervisor.workers['worker'].revive(); the log says why"
        )
        assert ticket.retry_after is None  # only revive() can help


@virtual
async def test_a_rejection_by_a_failed_pool_says_when_its_worker_is_tried_again() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=10.0)
        await fail(supervisor, agent, 5)
        ticket = supervisor.submit_nowait(Task("work"))
        assert ticket.retry_after is not None
        await asyncio.sleep(ticket.retry_after + 0.01)
        assert supervisor.submit_nowait(Task("work"))


@virtual
async def test_after_its_reset_timeout_a_worker_is_tried_with_one_task_at_a_time_and_recovers() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=agent, task_types=["work"], max_concurrent=5, reset_timeout=10.0
        )
        await fail(supervisor, agent, 5)
        await asyncio.sleep(10.01)
        agent.seconds, agent.peak = 1.0, 0
        tickets = flood(supervisor, "work", 7)
        await run_ready()
        assert agent.running == 1
        await asyncio.sleep(2.01)
        assert agent.running == 5
        assert all(result.success for result in await results(tickets))
        assert worker.state is WorkerState.IDLE


@virtual
async def test_a_probe_that_fails_keeps_the_worker_failed_for_longer() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=10.0)
        await fail(supervisor, agent, 5)
        sleeps = []
        for _ in range(3):
            sleep = supervisor.submit_nowait(Task("work")).retry_after
            assert sleep is not None
            sleeps.append(sleep)
            await asyncio.sleep(sleep + 0.01)
            await fail(supervisor, agent, 1)
            assert worker.state is WorkerState.FAILED
    assert sleeps[0] <= 10.0
    assert sleeps[2] > sleeps[0]


@virtual
async def test_a_cancelled_probe_is_replaced_by_the_next_task() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=10.0, max_concurrent=3)
        await fail(supervisor, agent, 5)
        await asyncio.sleep(10.01)
        for _ in range(5):
            probe, follower = flood(supervisor, "work", 2)
            probe.cancel()
            assert (await follower).success


@virtual
async def test_a_cancelled_probe_is_replaced_even_if_its_handler_does_not_stop() -> None:
    async with BackpressureSupervisor(zombie_grace=100.0) as supervisor:
        agent, stubborn = Agent(), UncancellableHandler(50.0)

        async def handler(task: Task) -> Any:
            return await (stubborn if task.payload == "stubborn" else agent)(task)

        worker = supervisor.register_worker(
            "w", handler=handler, task_types=["work"], max_concurrent=2, reset_timeout=1.0
        )
        await fail(supervisor, agent, 5)
        await asyncio.sleep(1.1)
        probe = supervisor.submit_nowait(Task("work", "stubborn"))
        following = supervisor.submit_nowait(Task("work", "following"))
        await run_ready()
        probe.cancel()
        assert (await following).success
        assert worker.zombies == 1


@virtual
async def test_a_probe_that_awaits_a_task_of_its_own_worker_does_not_deadlock() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:

        async def handler(task: Task) -> Any:
            await agent(task)
            return await supervisor.run(Task("work", "child")) if task.payload == "parent" else task.payload

        worker = supervisor.register_worker(
            "worker", handler=handler, task_types=["work"], reset_timeout=10.0, max_concurrent=3
        )
        await fail(supervisor, agent, 5)
        await asyncio.sleep(10.01)
        started, agent.peak = now(), 0
        assert await supervisor.run(Task("work", "parent")) == "child"
        assert now() - started == approximately(0.2)
        assert agent.peak == 1
        assert worker.current_tasks == 0


@virtual
async def test_without_a_reset_timeout_a_worker_stays_failed_until_it_is_revived() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=None)
        await fail(supervisor, agent, 5)
        await asyncio.sleep(86_000.0)
        assert worker.state is WorkerState.FAILED
        worker.revive()
        assert worker.state.value == "idle"
        assert await supervisor.run(Task("work", 7)) == 7


@virtual
async def test_a_worker_may_have_a_breaker_with_rules_of_its_own() -> None:
    agent = Agent(0.1)
    rules = BreakerRules(triggers=(consecutive_faults(2),), reset_timeout=1.0, successes=1)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], breaker=rules)
        await fail(supervisor, agent, 2)
        assert worker.failed
        await asyncio.sleep(1.01)
        assert not worker.failed
        assert await supervisor.run(Task("work", 7)) == 7
        await fail(supervisor, agent, 1)
        assert not worker.failed  # closed, no longer half-open


@virtual
async def test_a_worker_without_triggers_is_not_made_failed_by_its_tasks() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=agent, task_types=["work"], breaker=BreakerRules(triggers=())
        )
        await fail(supervisor, agent, 1_100)
        assert not worker.failed
        assert await supervisor.run(Task("work", 7)) == 7


@virtual
async def test_zombies_in_every_slot_make_a_worker_without_triggers_failed() -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        worker = supervisor.register_worker(
            "worker",
            handler=UncancellableHandler(10.0),
            task_types=["work"],
            timeout=1.0,
            breaker=BreakerRules(triggers=()),
        )
        await supervisor.submit_nowait(Task("work"))
        await asyncio.sleep(2.0)
        assert worker.failed
        await asyncio.sleep(10.0)
        assert not worker.failed


@virtual
async def test_as_many_probes_run_at_a_time_as_the_rules_allow() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        rules = BreakerRules(triggers=(consecutive_faults(5),), probes=3, successes=4)
        worker = supervisor.register_worker(
            "worker", handler=agent, task_types=["work"], max_concurrent=5, breaker=rules
        )
        await fail(supervisor, agent, 5)
        await asyncio.sleep(10.01)
        agent.seconds, agent.peak = 1.0, 0
        tickets = flood(supervisor, "work", 10)
        await asyncio.sleep(1.5)
        assert agent.peak == 3  # three have succeeded, and one more is needed
        await asyncio.sleep(1.0)
        assert agent.running == 4  # all that are left
        assert all(result.success for result in await results(tickets))
        assert worker.current_tasks == 0


@virtual
async def test_a_probe_of_a_worker_with_rules_of_its_own_has_time_for_a_whole_run() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        rules = BreakerRules(triggers=(consecutive_faults(5),), successes=1, probe_timeout=1.0)
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], timeout=300.0, breaker=rules)
        await fail(supervisor, agent, 5)
        await asyncio.sleep(10.01)
        agent.seconds = 200.0
        probe = supervisor.submit_nowait(Task("work"))
        await asyncio.sleep(100.0)
        assert worker.state is WorkerState.OVERLOADED  # not FAILED, because its probe is late
        assert (await probe).success


@virtual
async def test_a_trigger_that_raises_costs_no_slot(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        seconds, calls = 0, 10

        def should_open(self, _: FaultWindow) -> bool:
            raise KeyError

    agent = Agent(0.1)
    async with BackpressureSupervisor() as supervisor:
        rules = BreakerRules(triggers=(Broken(), consecutive_faults(2)))
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], breaker=rules)
        await fail(supervisor, agent, 1)
        assert (worker.current_tasks, worker.state) == (0, WorkerState.IDLE)
        await fail(supervisor, agent, 1)
        assert (worker.current_tasks, worker.state) == (0, WorkerState.FAILED)
    assert "a trigger of a circuit breaker raised KeyError" in caplog.text


def test_the_reset_timeout_of_rules_is_not_said_twice() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match=r"reset_timeout=1\.0; it must be left out where breaker= is given"):
        supervisor.register_worker(
            "worker", handler=Agent(), task_types=["work"], breaker=BreakerRules(), reset_timeout=1.0
        )


@virtual
async def test_a_worker_failed_by_timeouts_stays_failed_when_its_last_zombie_stops() -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        agent, stubborn = Agent(), UncancellableHandler(10.0)

        async def handler(task: Task) -> Any:
            return await (stubborn if task.payload == "stubborn" else agent)(task)

        worker = supervisor.register_worker("w", handler=handler, task_types=["work"], reset_timeout=60.0, timeout=5.0)
        await fail(supervisor, agent, 4)
        assert (await supervisor.submit_nowait(Task("work", "stubborn"))).status is TaskStatus.TIMED_OUT
        await asyncio.sleep(6.0)
        assert worker.zombies == 0
        assert worker.state is WorkerState.FAILED


@virtual
async def test_failures_after_a_revival_still_count_when_an_older_zombie_ends() -> None:
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        agent = Agent(0.1)
        stubborn = {10.0: UncancellableHandler(10.0), 20.0: UncancellableHandler(20.0)}

        async def handler(task: Task) -> Any:
            return await stubborn.get(task.payload, agent)(task)

        worker = supervisor.register_worker(
            "w", handler=handler, task_types=["work"], max_concurrent=2, reset_timeout=None, timeout=5.0
        )
        await results([supervisor.submit_nowait(Task("work", seconds)) for seconds in stubborn])
        await asyncio.sleep(6.0)
        assert worker.state is WorkerState.FAILED
        worker.revive()
        await fail(supervisor, agent, 4)
        await asyncio.sleep(10.0)
        assert worker.zombies == 0
        await fail(supervisor, agent, 1)
        assert worker.state is WorkerState.FAILED


@virtual
async def test_a_revived_worker_takes_waiting_tasks() -> None:
    agent = Agent(0.1)
    async with BackpressureSupervisor(backpressure_threshold=1) as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=None)
        agent.error = ValueError()
        tickets = flood(supervisor, "work", 8)
        await results(tickets[:5])
        assert worker.state is WorkerState.FAILED
        assert [ticket.status for ticket in tickets[5:]] == [TaskStatus.WAITING] * 3
        agent.error = None
        worker.revive()
        assert all(result.success for result in await results(tickets[5:]))


@virtual
async def test_reviving_a_worker_that_is_not_failed_changes_nothing() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=2)
        tickets = flood(supervisor, "work", 5)
        worker.revive()
        assert worker.current_tasks == 2
        assert all(result.success for result in await results(tickets))
    BackpressureSupervisor().register_worker("w", handler=Agent(), task_types=["work"]).revive()


@virtual
async def test_what_still_runs_on_a_failed_worker_finishes_and_counts() -> None:
    agent, long = Agent(0.1), Agent(60.0)
    async with BackpressureSupervisor() as supervisor:

        async def handler(task: Task) -> Any:
            return await (long if task.payload == "long" else agent)(task)

        worker = supervisor.register_worker(
            "worker", handler=handler, task_types=["work"], max_concurrent=2, reset_timeout=None
        )
        ticket = supervisor.submit_nowait(Task("work", "long"))
        await fail(supervisor, agent, 5)
        assert worker.state is WorkerState.FAILED
        supervisor.register_worker("other", handler=agent, task_types=["other"], max_concurrent=2)
        flood(supervisor, "other", 1)
        assert supervisor.utilization() == 1 / 2
        assert (await ticket).success
        assert worker.current_tasks == 0
        worker.revive()
        assert supervisor.utilization() == 0.0
        assert supervisor.system_load() == 0.0


@virtual
async def test_a_worker_that_fails_and_recovers_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "forebay")
    events: list[Any] = []
    agent = Agent(0.1)
    async with BackpressureSupervisor(on_event=events.append) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=10.0)
        await fail(supervisor, agent, 5)
        await asyncio.sleep(10.01)
        await supervisor.run(Task("work"))
        await supervisor.run(Task("work"))
    (failed,) = (event for event in events if isinstance(event, WorkerFailed))
    assert failed.worker_id == "worker"
    assert failed.retry_in is not None
    assert failed.retry_in <= 10.0
    assert [event.worker_id for event in events if isinstance(event, WorkerRecovered)][:1] == ["worker"]
    assert "worker 'worker' is FAILED for" in caplog.text
    assert "worker 'worker' accepts tasks again" in caplog.text


@virtual
async def test_the_slots_of_a_worker_are_set_at_registration() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=3)
        with pytest.raises(AttributeError, match="max_concurrent"):
            worker.max_concurrent = 5  # type: ignore[misc]
        assert worker.max_concurrent == 3


@virtual
async def test_a_failed_worker_rejects_no_task_that_another_can_run() -> None:
    agent = Agent(0.01)
    async with BackpressureSupervisor(max_queue_size=5) as supervisor:
        supervisor.register_worker("bad", handler=agent, task_types=["work"], reset_timeout=None)
        supervisor.register_worker("good", handler=Agent(0.01), task_types=["work"])
        agent.error = ValueError()
        rejections = 0
        for _ in range(200):
            rejections += len(rejected(flood(supervisor, "work", 1)))
            await asyncio.sleep(0.05)
    assert rejections == 0


@virtual
async def test_a_zombie_of_a_failed_worker_that_ends_after_its_revival_is_counted_once() -> None:
    async with BackpressureSupervisor(zombie_grace=0.5) as supervisor:
        worker: WorkerAgent = supervisor.register_worker(
            "worker", handler=UncancellableHandler(20.0), task_types=["work"], reset_timeout=None
        )
        await supervisor.submit_nowait(Task("work", timeout=1.0))
        await asyncio.sleep(1.0)
        assert worker.state is WorkerState.FAILED
        worker.revive()
        assert worker.state.value == "overloaded"
        assert supervisor.system_load() == 1 / 101
        await asyncio.sleep(20.0)
        assert worker.state.value == "idle"
        assert supervisor.system_load() == 0.0
