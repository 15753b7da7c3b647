"""Fan-out and map: results as they finish, wider than the queue, quorums, hedges; leaving cancels the rest."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import gc
import io
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import rich.console
from tests.support.task_plane import Agent, approximately, now, run_ready, virtual

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Priority,
    Retry,
    Task,
    TaskFailed,
    TaskResult,
    TaskStatus,
    progress_bar,
)
from forebay.context import running_task
from forebay.errors import (
    InvalidSetting,
    InvalidTask,
    QuorumNotReached,
    StillSpilled,
    SupervisorClosed,
    UnknownTaskType,
)
from forebay.retry import RetryBudget
from forebay.supervisor.fan_out import FanOut, FanOutProgress


def supervisor_of(handler: Any, *, max_concurrent: int = 10, **settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**settings)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=max_concurrent)
    return supervisor


def tasks(count: int, **options: Any) -> list[Task]:
    return [Task("work", number, task_id=f"t{number}", **options) for number in range(count)]


async def sleep_for_payload(task: Task) -> Any:
    await asyncio.sleep(task.payload)
    return task.payload


async def collected(fan_out: FanOut) -> list[TaskResult]:
    return [result async for result in fan_out]


# --- results ---


@virtual
async def test_results_come_as_the_tasks_finish() -> None:
    async with supervisor_of(sleep_for_payload) as supervisor:
        work = [Task("work", seconds) for seconds in (3.0, 1.0, 2.0)]
        assert [result.result async for result in supervisor.fan_out(work)] == [1.0, 2.0, 3.0]
        assert [result.result async for result in supervisor.fan_out(work_again(work), ordered=True)] == [3.0, 1.0, 2.0]


def work_again(work: list[Task]) -> list[Task]:
    return [Task("work", task.payload) for task in work]


@virtual
async def test_a_fan_out_far_wider_than_the_queue_feeds_itself() -> None:
    agent = Agent(1.0)
    async with supervisor_of(agent, max_queue_size=5) as supervisor:
        done = [result async for result in supervisor.fan_out(tasks(1000))]
        assert Counter(result.status for result in done) == {TaskStatus.SUCCEEDED: 1000}
        assert now() == approximately(100.0)
        assert supervisor.statistics().rejected == 0
    assert agent.started == list(range(1000))


@virtual
async def test_tasks_of_a_generator_are_made_as_room_appears() -> None:
    made = 0

    def generate() -> Iterator[Task]:
        nonlocal made
        for number in range(500):
            made += 1
            yield Task("work", number)

    async with supervisor_of(Agent(1.0), max_queue_size=10) as supervisor:
        results = supervisor.fan_out(generate())
        await anext(results)
        assert made <= 32
        assert len([result async for result in results]) == 499


@virtual
async def test_a_failed_task_is_a_result_like_any_other() -> None:
    async def handler(task: Task) -> int:
        if task.payload % 2:
            raise ValueError(task.payload)
        return int(task.payload)

    async with supervisor_of(handler) as supervisor:
        done = {result.task_id: result async for result in supervisor.fan_out(tasks(4))}
    assert [done[f"t{number}"].success for number in range(4)] == [True, False, True, False]
    assert done["t3"].error == "ValueError: 3"


@virtual
async def test_a_task_that_cannot_meet_its_deadline_is_a_result_with_the_status_rejected_or_expired() -> None:
    async with supervisor_of(Agent(1.0), max_concurrent=1) as supervisor:
        await supervisor.map("work", range(20))
        done = [result async for result in supervisor.fan_out(tasks(10, deadline=Deadline.within(3.0)))]
        statuses = Counter(result.status for result in done)
        assert statuses[TaskStatus.SUCCEEDED] >= 2
        assert set(statuses) <= {TaskStatus.SUCCEEDED, TaskStatus.REJECTED, TaskStatus.EXPIRED}
        assert len(done) == 10


@virtual
async def test_a_task_whose_deadline_passes_before_its_turn_is_expired_with_a_policy_too() -> None:
    async with supervisor_of(Agent(1.0), max_concurrent=1, max_queue_size=1) as supervisor:
        work = [*tasks(5), Task("work", deadline=Deadline.within(2.5))]
        done = await collected(supervisor.fan_out(work, retry=Retry(max_attempts=2), ordered=True))
    assert [result.status for result in done[5:]] == [TaskStatus.EXPIRED]


@virtual
async def test_the_limit_bounds_what_is_outstanding() -> None:
    agent = Agent(1.0)
    async with supervisor_of(agent) as supervisor:
        async for _ in supervisor.fan_out(tasks(20), limit=3):
            assert supervisor.statistics().running + supervisor.statistics().waiting <= 3
    assert now() == approximately(7.0)


@virtual
async def test_two_fan_outs_share_the_room() -> None:
    agent = Agent(1.0)
    async with supervisor_of(agent, max_concurrent=1, max_queue_size=1) as supervisor:

        async def collect(name: str) -> float:
            async for _ in supervisor.fan_out(Task("work", name) for _ in range(20)):
                pass
            return now()

        ends = await asyncio.gather(collect("a"), collect("b"))
    assert abs(ends[0] - ends[1]) <= 4.0


# --- failures ---


@virtual
async def test_failed_tasks_are_retried_while_the_healthy_ones_are_not_delayed() -> None:
    failures: Counter[int] = Counter()

    async def flaky(task: Task) -> int:
        await asyncio.sleep(1.0)
        if task.payload % 10 == 0 and failures[task.payload] < 2:
            failures[task.payload] += 1
            raise RuntimeError
        return int(task.payload)

    budget = RetryBudget(share=1.0, extra=100)
    async with supervisor_of(flaky, max_concurrent=20, retry_budget=budget) as supervisor:
        healthy_at, done = 0.0, 0
        async for result in supervisor.fan_out(tasks(200), retry=Retry(max_attempts=4)):
            assert result.success
            done += 1
            if result.result % 10:
                healthy_at = now()
        assert done == 200
        assert healthy_at <= 1.1 * 10.0 + 0.01  # they take ten seconds if none fails


@virtual
async def test_an_invalid_task_ends_the_iteration_and_cancels_the_others() -> None:
    async with supervisor_of(Agent(100.0)) as supervisor:
        with pytest.raises(UnknownTaskType):
            async for _ in supervisor.fan_out([*tasks(3), Task("nothing")]):
                pass
        with pytest.raises(InvalidTask, match="it must be a Task"):
            async for _ in supervisor.fan_out([*tasks(3), "work"]):  # type: ignore[arg-type]
                pass
        await run_ready()
        assert supervisor.statistics().running == 0


# --- quorum ---


@virtual
async def test_after_a_quorum_the_rest_is_cancelled() -> None:
    async with supervisor_of(sleep_for_payload, max_concurrent=3) as supervisor:
        work = [Task("work", float(seconds)) for seconds in (3, 1, 2, 50, 60, 70)]
        done = [result.result async for result in supervisor.fan_out(work, quorum=3)]
        assert done == [1.0, 2.0, 3.0]
        await run_ready()
        statistics = supervisor.statistics()
        assert (statistics.running, statistics.waiting, statistics.cancelled) == (0, 0, 3)
    assert now() == approximately(3.0)


@virtual
async def test_a_quorum_in_order_yields_what_there_is_in_order() -> None:
    async with supervisor_of(sleep_for_payload) as supervisor:
        work = [Task("work", float(seconds)) for seconds in (30, 2, 1, 40)]
        assert [result.result async for result in supervisor.fan_out(work, quorum=2, ordered=True)] == [2.0, 1.0]


@virtual
async def test_a_quorum_that_cannot_be_reached_is_an_error_after_the_results() -> None:
    async def handler(task: Task) -> None:
        await asyncio.sleep(task.payload)
        if task.payload < 3:
            raise ValueError

    async with supervisor_of(handler) as supervisor:
        results = supervisor.fan_out([Task("work", seconds) for seconds in (1, 2, 30)], quorum=2)
        assert [(await anext(results)).success for _ in range(2)] == [False, False]
        with pytest.raises(QuorumNotReached, match="needs 2 successes, and 2 of its 3 tasks have not succeeded"):
            await anext(results)
        await run_ready()
        assert supervisor.statistics().running == 0


@virtual
async def test_a_quorum_cancels_the_rest_however_slowly_the_results_are_read() -> None:
    agent = Agent(1.0)
    async with supervisor_of(agent, max_concurrent=2) as supervisor:
        read = []
        async for result in supervisor.fan_out(tasks(40), quorum=3):
            read.append(result.success)
            await asyncio.sleep(10.0)
    assert read == [True] * 3
    assert len(agent.started) == 3 + 2  # when the third one ends, two slots are taken


@virtual
async def test_successes_at_the_same_moment_are_no_more_than_the_quorum() -> None:
    async with supervisor_of(Agent(1.0), max_concurrent=10) as supervisor:
        assert len(await collected(supervisor.fan_out(tasks(10), quorum=3))) == 3


@virtual
async def test_a_quorum_of_work_that_has_been_done_already_begins_no_more() -> None:
    agent = Agent(1.0)
    async with supervisor_of(agent) as supervisor:
        for key in "ab":
            await supervisor.run(Task("work", key=key))
        work = [Task("work", key=key) for key in "abcdefgh"]
        assert len(await collected(supervisor.fan_out(work, quorum=2))) == 2
    assert len(agent.started) == 2


@virtual
async def test_a_quorum_that_is_out_of_reach_cancels_the_rest_however_slowly_the_results_are_read() -> None:
    agent = Agent(1.0, error=ValueError())
    async with supervisor_of(agent, max_concurrent=2) as supervisor:
        results = supervisor.fan_out(tasks(40), quorum=38)
        read = [await anext(results)]
        await asyncio.sleep(100.0)
        assert len(agent.started) == 3 + 2  # the third failure decides, while two slots are taken
        read += [await anext(results) for _ in range(2)]
        with pytest.raises(QuorumNotReached, match="needs 38 successes, and 3 of its 40 tasks have not succeeded"):
            await anext(results)
    assert [result.status for result in read] == [TaskStatus.FAILED] * 3


@pytest.mark.parametrize("limit", [None, 1])
@virtual
async def test_a_quorum_is_missed_by_tasks_whose_number_is_known_only_at_their_end(limit: int | None) -> None:
    agent = Agent(1.0, error=ValueError())
    async with supervisor_of(agent) as supervisor:
        with pytest.raises(QuorumNotReached, match=r"needs 2 successes, and . of its 3 tasks have not succeeded"):
            await collected(supervisor.fan_out(iter(tasks(3)), quorum=2, limit=limit))
        with pytest.raises(QuorumNotReached, match="needs 2 successes, and 0 of its 0 tasks have not succeeded"):
            await collected(supervisor.fan_out(iter(()), quorum=2))


@pytest.mark.blocks  # in virtual time the thread of SQLite is the loop's own
@pytest.mark.parametrize("quorum", [None, 1, 3])
@virtual
async def test_tasks_that_are_left_in_the_overflow_end_the_iteration_unless_a_quorum_was_made(
    quorum: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overflow = f"sqlite:///{tmp_path}/spill.db?fsync=no"
    async with supervisor_of(Agent(5.0), max_concurrent=1, overflow=overflow, max_queue_size=1) as supervisor:
        results = supervisor.fan_out(tasks(6), quorum=quorum, limit=6)
        assert (await anext(results)).success
        await supervisor.drain(7.0)  # one more ends within it
        if quorum == 1:
            assert await collected(results) == []
        else:
            with pytest.raises(StillSpilled):
                await collected(results)
    assert "callback" not in caplog.text


# --- leaving ---


@virtual
async def test_leaving_the_loop_cancels_what_is_outstanding() -> None:
    agent = Agent(5.0)
    async with supervisor_of(agent, max_concurrent=2) as supervisor:
        async for _ in supervisor.fan_out(tasks(10)):
            break
        await run_ready()
        statistics = supervisor.statistics()
        assert (statistics.running, statistics.waiting) == (0, 0)
        assert statistics.cancelled == 9


@virtual
async def test_leaving_the_block_cancels_what_is_outstanding_at_once() -> None:
    async with supervisor_of(Agent(5.0), max_concurrent=2) as supervisor:
        async with supervisor.fan_out(tasks(10)) as results:
            await anext(results)
        await run_ready()
        assert supervisor.statistics().cancelled == 9
        assert [result async for result in results] == []


@virtual
async def test_a_cancelled_reader_cancels_what_is_outstanding() -> None:
    async with supervisor_of(Agent(5.0), max_concurrent=2) as supervisor:

        async def read() -> None:
            async for _ in supervisor.fan_out(tasks(10)):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(1.0)
        reading.cancel()
        await asyncio.wait([reading])
        del reading
        gc.collect()
        await run_ready()
        assert supervisor.statistics().cancelled == 10


@virtual
async def test_a_timeout_around_one_result_leaves_the_others() -> None:
    async with supervisor_of(sleep_for_payload) as supervisor:
        results = supervisor.fan_out([Task("work", 5.0), Task("work", 6.0)])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await anext(results)
        assert [result.result async for result in results] == [5.0, 6.0]


@virtual
async def test_work_that_others_have_submitted_under_the_same_key_goes_on() -> None:
    async with supervisor_of(Agent(5.0)) as supervisor:
        mine = await supervisor.submit(Task("work", 1, key="shared"))
        async with supervisor.fan_out([Task("work", 1, key="shared"), Task("work", 0, key="own")]) as results:
            reading = asyncio.create_task(results.read())
            await asyncio.sleep(1.0)
            reading.cancel()
        assert (await mine).success
        assert supervisor.statistics().cancelled == 1


@dataclasses.dataclass
class Page:
    number: int


@virtual
async def test_leaving_cancels_tasks_whose_payload_was_made_of_the_declared_type() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=Agent(5.0), task_types=["work"], max_concurrent=2, payload=Page)
    async with supervisor:
        async with supervisor.fan_out([Task("work", {"number": number}) for number in range(10)]) as results:
            await anext(results)
        await run_ready()
        assert supervisor.statistics().cancelled == 9


@pytest.mark.blocks  # in virtual time the thread of SQLite is the loop's own
@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("options", [{"durable": True}, {"thread_id": "one"}], ids=str)
@virtual
async def test_a_reader_that_is_cancelled_while_the_overflow_answers_can_go_on(
    options: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    agent = Agent(1.0)
    async with supervisor_of(agent, overflow=f"sqlite:///{tmp_path}/spill.db", max_queue_size=1) as supervisor:
        results = supervisor.fan_out(tasks(8, **options))
        for _ in range(3):
            reading = asyncio.create_task(results.read())
            for _ in range(steps):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
        assert sorted([result.result async for result in results]) == list(range(8))
    assert sorted(agent.started) == list(range(8))


@pytest.mark.blocks  # as above
@virtual
async def test_leaving_cancels_a_task_on_which_the_overflow_has_not_answered(tmp_path: Path) -> None:
    agent = Agent(1.0)
    async with supervisor_of(agent, overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        async with supervisor.fan_out(tasks(2, durable=True)) as results:
            reading = asyncio.create_task(results.read())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await run_ready()
        with pytest.raises(StopAsyncIteration):
            await reading
        await asyncio.sleep(5.0)
        assert supervisor.statistics().cancelled == 1
    assert agent.started == []


@virtual
async def test_the_reader_of_a_fan_out_that_is_left_meanwhile_ends() -> None:
    async with supervisor_of(Agent(5.0)) as supervisor:
        results = supervisor.fan_out(tasks(3))
        reading = asyncio.create_task(results.read())
        await asyncio.sleep(1.0)
        await results.aclose()
        with pytest.raises(StopAsyncIteration):
            async with asyncio.timeout(1.0):
                await reading


@virtual
async def test_a_fan_out_that_nobody_has_any_more_leaves_the_line_for_room() -> None:
    async with supervisor_of(Agent(5.0), max_concurrent=1, max_queue_size=1) as supervisor:
        for number in range(2):
            await supervisor.submit(Task("work", number))

        async def read() -> None:
            async for _ in supervisor.fan_out(tasks(10)):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(1.0)
        reading.cancel()
        await asyncio.wait([reading])
        del reading
        gc.collect()
        assert await supervisor.run(Task("work", "other"), wait=60.0) == "other"
        assert now() == approximately(15.0)  # it was the next


@virtual
async def test_a_fan_out_that_nobody_reads_lets_others_pass_in_the_line_for_room() -> None:
    async with supervisor_of(Agent(1.0), max_concurrent=1, max_queue_size=1) as supervisor:
        for number in range(2):
            await supervisor.submit(Task("work", number))
        results = supervisor.fan_out(tasks(10))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await results.read()
        for number in range(5):
            assert await supervisor.run(Task("work", number), wait=60.0) == number
        assert now() == approximately(7.0)  # each was the next
        assert [result.result async for result in results] == list(range(10))


@virtual
async def test_submitting_many_tasks_gives_the_loop_its_turns() -> None:
    turns, submitted_in = 0, set[int]()

    async def count_turns() -> None:
        nonlocal turns
        while turns < 50:
            turns += 1
            await asyncio.sleep(0)

    def many() -> Iterator[Task]:
        for number in range(1000):
            submitted_in.add(turns)
            yield Task("work", number)

    async with supervisor_of(Agent(1.0), max_queue_size=10_000) as supervisor:
        counting = asyncio.create_task(count_turns())
        assert len([result async for result in supervisor.fan_out(many())]) == 1000
        await counting
    assert len(submitted_in) == 10


@virtual
async def test_draining_ends_a_fan_out_that_is_not_nested() -> None:
    async with supervisor_of(Agent(5.0), max_concurrent=1, max_queue_size=1) as supervisor:

        async def read() -> int:
            return len([result async for result in supervisor.fan_out(tasks(10))])

        reading = asyncio.create_task(read())
        await asyncio.sleep(1.0)
        await supervisor.drain()
        with pytest.raises(SupervisorClosed):
            await reading


# --- nested ---


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("max_queue_size", [0, 1, 100])
@virtual
async def test_nested_fan_outs_never_deadlock(max_queue_size: int, slots: int) -> None:
    supervisor = BackpressureSupervisor(max_queue_size=max_queue_size)

    async def agent(task: Task) -> int:
        depth = task.payload
        if not depth:
            return 1
        children = (Task("work", depth - 1) for _ in range(6))
        return sum([result.result async for result in supervisor.fan_out(children)])

    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    async with supervisor, asyncio.timeout(1000.0):
        assert await supervisor.run(Task("work", 4)) == 6**4


@pytest.mark.parametrize("slots", [1, 4])
@virtual
async def test_runs_that_look_for_room_do_not_take_it_themselves(slots: int) -> None:
    """Without a queue the slots of the runs that read are the only room, and all of them look at a time."""

    async def agent(task: Task) -> int:
        if not task.payload:
            await asyncio.sleep(0.1)
            return 1
        children = [Task("work", 0, tenant=task.tenant) for _ in range(task.payload)]
        return sum([result.result async for result in supervisor.fan_out(children)])

    async with supervisor_of(agent, max_concurrent=slots, max_queue_size=0) as supervisor, asyncio.timeout(100.0):
        runs = [supervisor.submit_nowait(Task("work", 5, tenant=f"tenant {number}")) for number in range(slots)]
        assert [await run.value() for run in runs] == [5] * slots
        assert now() == approximately(0.5)


@virtual
async def test_two_hundred_agents_that_map_at_once_all_finish() -> None:
    supervisor = BackpressureSupervisor()

    async def search(task: Task) -> int:
        await asyncio.sleep(0.1)
        return int(task.payload)

    async def agent(task: Task) -> int:
        return sum(await supervisor.map("search", range(task.payload)))

    supervisor.register_worker("search", handler=search, task_types=["search"], max_concurrent=10)
    supervisor.register_worker("agents", handler=agent, task_types=["agent"], max_concurrent=5)
    async with supervisor:
        assert await supervisor.map("agent", [20] * 200) == [190] * 200
        assert now() <= 1.1 * 200 * 20 * 0.1 / 10


# --- hedges ---


class Straggler:
    """A handler whose first attempt at each tenth task takes a hundred seconds."""

    def __init__(self) -> None:
        self.attempts: Counter[Any] = Counter()

    async def __call__(self, task: Task) -> str:
        self.attempts[task.payload] += 1
        slow = task.payload % 10 == 0 and self.attempts[task.payload] == 1
        await asyncio.sleep(100.0 if slow else 1.0)
        return f"attempt {self.attempts[task.payload]}"


def two_workers(handler: Any, **settings: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**settings)
    for name in "ab":
        supervisor.register_worker(name, handler=handler, task_types=["work"], max_concurrent=20)
    return supervisor


@virtual
async def test_a_second_attempt_gets_its_payload_as_the_first_one_did() -> None:
    received: list[Any] = []

    async def slow(task: Task) -> None:
        received.append(task.payload)
        await asyncio.sleep(10.0)

    supervisor = BackpressureSupervisor()
    for name in "ab":
        supervisor.register_worker(name, handler=slow, task_types=["work"], payload=dt.date)
    async with supervisor:
        await supervisor.map("work", ["2026-11-30"], hedge=1.0)
    assert received == [dt.date(2026, 11, 30)] * 2


@virtual
async def test_a_second_attempt_is_nested_in_the_run_that_reads_the_fan_out() -> None:
    user = ContextVar("user", default="nobody")
    seen: list[tuple[str, Deadline | None]] = []
    supervisor = BackpressureSupervisor()

    async def slow(_: Task) -> None:
        running = running_task()
        assert running is not None
        seen.append((user.get(), running.deadline))
        user.set("another one")
        await asyncio.sleep(10.0)

    async def agent(_: Task) -> None:
        user.set("somebody")
        await collected(supervisor.fan_out([Task("work")], hedge=1.0))

    for name in "ab":
        supervisor.register_worker(name, handler=slow, task_types=["work"])
    supervisor.register_worker("agent", handler=agent, task_types=["agent"])
    async with supervisor:
        deadline = Deadline.within(60.0)
        await supervisor.run(Task("agent", deadline=deadline))
    assert seen == [("somebody", deadline)] * 2


@virtual
async def test_a_supervisor_that_drains_begins_no_second_attempts() -> None:
    handler = Straggler()
    async with two_workers(handler) as supervisor:
        reading = asyncio.create_task(collected(supervisor.fan_out([Task("work", 10)], hedge=3.0)))
        await asyncio.sleep(1.0)
        report = await supervisor.drain(10.0)
        assert report.cancelled == 1
        assert [result.status for result in await reading] == [TaskStatus.CANCELLED]
    assert handler.attempts[10] == 1


@virtual
async def test_the_limit_counts_tasks_of_all_types() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("both", handler=Agent(1.0), task_types=["a", "b"], max_concurrent=10)
    async with supervisor:
        await collected(supervisor.fan_out([Task("ab"[number % 2]) for number in range(8)], limit=2))
        assert now() == approximately(4.0)


@pytest.mark.parametrize("hedge", [3.0, "p95"])
@virtual
async def test_a_straggler_gets_a_second_attempt_elsewhere(hedge: Any) -> None:
    handler = Straggler()
    async with two_workers(handler) as supervisor:
        await supervisor.map("work", range(1, 10))
        work = [Task("work", number) for number in range(100, 130)]
        done = {result.task_id: result async for result in supervisor.fan_out(work, hedge=hedge)}
        assert all(done[task.task_id].success for task in work)
        assert now() <= 10.0
        await run_ready()
        assert supervisor.statistics().running == 0
        assert sum(count == 2 for count in handler.attempts.values()) == 3


@virtual
async def test_hedges_stay_within_the_retry_budget() -> None:
    handler = Straggler()
    async with two_workers(handler, retry_budget=RetryBudget(share=0.0, extra=4)) as supervisor:
        work = [Task("work", 10 * number) for number in range(20)]
        async with supervisor.fan_out(work, hedge=2.0) as results:
            for _ in range(3):  # a quarter of the budget is kept for first retries
                await anext(results)
            assert now() <= 10.0
            await anext(results)
            assert now() >= 60.0  # the window of the budget


@virtual
async def test_a_hedge_never_queues_and_never_overloads() -> None:
    handler = Straggler()
    async with supervisor_of(handler, max_concurrent=2) as supervisor:
        work = [Task("work", 10 * number) for number in range(4)]
        done = [result async for result in supervisor.fan_out(work, hedge=1.0)]
        assert [result.result for result in done] == ["attempt 1"] * 4
    assert max(handler.attempts.values()) == 1


@virtual
async def test_tasks_with_a_key_or_a_conversation_are_not_hedged() -> None:
    handler = Straggler()
    async with two_workers(handler) as supervisor:
        work = [Task("work", 10, key="k"), Task("work", 20, thread_id="t")]
        assert len([result async for result in supervisor.fan_out(work, hedge=1.0)]) == 2
    assert max(handler.attempts.values()) == 1


# --- map ---


@virtual
async def test_map_returns_the_values_in_order() -> None:
    async with supervisor_of(sleep_for_payload) as supervisor:
        assert await supervisor.map("work", [3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
        assert await supervisor.map("work", (number / 10 for number in range(500))) == [n / 10 for n in range(500)]
        assert await supervisor.map("work", []) == []


@virtual
async def test_the_first_failure_of_a_map_cancels_the_others() -> None:
    async def handler(task: Task) -> None:
        await asyncio.sleep(task.payload)
        if task.payload == 2:
            raise ValueError("no")

    async with supervisor_of(handler) as supervisor:
        with pytest.raises(TaskFailed, match="ValueError: no") as failure:
            await supervisor.map("work", [100, 2, 100])
        assert isinstance(failure.value.__cause__, ValueError)
        assert now() == approximately(2.0)
        await run_ready()
        assert supervisor.statistics().cancelled == 2
        values = await supervisor.map("work", [1, 2], return_exceptions=True)
        assert values[0] is None
        assert isinstance(values[1], TaskFailed)


@virtual
async def test_options_of_a_map_are_those_of_its_tasks() -> None:
    async def handler(task: Task) -> tuple[str, Priority]:
        return task.tenant, task.priority

    async with supervisor_of(handler) as supervisor:
        got = await supervisor.map("work", range(2), tenant="acme", priority=Priority.HIGH)
        assert got == [("acme", Priority.HIGH)] * 2


@virtual
async def test_a_map_of_tasks_returns_their_values_in_order() -> None:
    async def handler(task: Task) -> tuple[Any, str]:
        await asyncio.sleep(task.payload)
        if task.payload == 2.0:
            raise ValueError("no")
        return task.payload, task.tenant

    async with supervisor_of(handler, max_queue_size=1) as supervisor:
        work = (Task("work", seconds, tenant=f"t{seconds:.0f}") for seconds in (3.0, 1.0))
        assert await supervisor.map(work) == [(3.0, "t3"), (1.0, "t1")]
        assert await supervisor.map([]) == []
        with pytest.raises(TaskFailed, match="ValueError: no"):
            await supervisor.map([Task("work", 100.0), Task("work", 2.0)])
        await run_ready()
        assert supervisor.statistics().cancelled == 1
        values = await supervisor.map([Task("work", 2.0), Task("work", 1.0)], return_exceptions=True)
        assert isinstance(values[0], TaskFailed)
        assert values[1] == (1.0, "default")
        assert len(await supervisor.map([Task("work", 0.0) for _ in range(50)], limit=2)) == 50


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("work",), {}, TypeError, r"given no payloads: map\('work', \[\.\.\.\]\), or map\(\[Task\('work', \.\.\.\)"),
        (([Task("work")],), {"tenant": "a"}, TypeError, r"field of the task: map\(\[Task\(\.\.\., tenant=\.\.\.\)"),
        (([Task("work")],), {"prio": 1}, TypeError, r"map\(\) takes no argument 'prio'$"),
        (([Task("work")], [1]), {}, InvalidTask, "task_type"),
        ((["work"],), {}, InvalidTask, "a Task, such as"),
        ((Task("work"),), {}, InvalidSetting, "an iterable of Tasks"),
    ],
)
@virtual
async def test_a_map_of_anything_else_is_an_error(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with supervisor_of(sleep_for_payload) as supervisor:
        with pytest.raises(error, match=message):
            await supervisor.map(*arguments, **options)
        assert supervisor.statistics().submitted == 0


# --- progress ---


@virtual
async def test_progress_is_reported_after_each_change() -> None:
    seen: list[FanOutProgress] = []

    async def handler(task: Task) -> None:
        if task.payload == 1:
            raise ValueError

    async with supervisor_of(handler) as supervisor:
        await supervisor.map("work", range(3), progress=seen.append, return_exceptions=True)
    assert [(state.submitted, state.succeeded, state.failed) for state in seen][:3] == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert seen[-1] == FanOutProgress(total=3, submitted=3, succeeded=2, failed=1)


@virtual
async def test_the_progress_bar_shows_what_has_failed() -> None:
    terminal = io.StringIO()

    async def handler(task: Task) -> None:
        if task.payload == 1:
            raise ValueError

    console = rich.console.Console(file=terminal, force_terminal=True, width=100)
    async with supervisor_of(handler) as supervisor:
        bar = progress_bar("researching", console=console, auto_refresh=False)
        await supervisor.map("work", range(30), progress=bar, return_exceptions=True)
    assert "researching" in terminal.getvalue()
    assert "30/30" in terminal.getvalue()
    assert "1 failed" in terminal.getvalue()


# --- invalid arguments ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": 3}, "tasks=3; it must be an iterable of Tasks"),
        ({"limit": 0}, "limit=0; it must be a whole number of at least 1"),
        ({"quorum": 5}, "quorum=5; it must be at most the number of tasks, 2"),
        ({"hedge": "p99"}, "hedge='p99'; it must be a positive number of seconds, \"p95\""),
        ({"retry": 3}, r"retry=3; it must be a Retry"),
        ({"progress": 3}, r"progress=3; it must be a plain function that takes a FanOutProgress"),
        ({"progress": sleep_for_payload}, r"progress='an async function'; it must be a plain function: it is called"),
    ],
)
@virtual
async def test_an_invalid_argument_is_an_error_at_once(arguments: dict[str, Any], message: str) -> None:
    async with supervisor_of(Agent()) as supervisor:
        with pytest.raises(InvalidSetting, match=f"fan_out was given {message}"):
            supervisor.fan_out(**{"tasks": tasks(2), **arguments})
