"""Supervision trees: lives that end, restarts, strategies, supervisors below supervisors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.scripted_life import ScriptedLife, settle
from tests.support.task_plane import Agent, UncancellableHandler, approximately, error_of, flood, now, statuses, virtual

from forebay import BackpressureSupervisor, Overloaded, Retry, Task, TaskFailed, TaskStatus, Verdict, WorkerState
from forebay.adapters import Handler
from forebay.errors import InvalidSetting, UnknownTaskType, WorkerNotStarted, WorkerStopped
from forebay.events import TaskFinished, TaskRetried, WorkerExited, WorkerFailed, WorkerRecovered, WorkerRestarted
from forebay.supervisor import TreeNode
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

SUCCEEDED, FAILED, CANCELLED = TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED


def register(supervisor: BackpressureSupervisor, service: ScriptedLife, handler: Any = None, **options: Any) -> Any:
    types = options.pop("task_types", ["work"])
    return supervisor.register_worker(
        service.name, handler=handler or Agent(), task_types=types, start=service.start, **options
    )


def exits(record: EventRecord) -> list[tuple[str, str]]:
    return [(event.worker_id, event.exit) for event in record.of_type(WorkerExited)]


# --- one worker ------------------------------------------------------------------------------------------------------


@virtual
async def test_a_worker_whose_life_crashed_is_started_again_and_goes_on_with_what_waits() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        worker = register(supervisor, service, Agent(10.0))
        await settle()
        running, waiting = flood(supervisor, "work", 2)
        await asyncio.sleep(1.0)
        service.crash()
        result = await running
        assert now() == approximately(1.0)
        assert result.status is FAILED
        assert result.error == "worker 'worker' has stopped: its life raised ValueError: broken"
        assert (await waiting).status is SUCCEEDED
        assert now() == approximately(11.0)
        assert worker.restarts == 1
        assert worker.state is WorkerState.IDLE
        assert exits(record) == [("worker", "abnormal")]
        assert [event.restarts for event in record.of_type(WorkerRestarted)] == [1]
        assert record.of_type(WorkerFailed) == []
    assert service.log == ["worker starts", "worker ends"] * 2


@virtual
async def test_the_exception_of_a_task_is_no_exit() -> None:
    service = ScriptedLife()

    def fails(_: Task) -> None:
        raise ValueError

    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        worker = register(supervisor, service, fails)
        await settle()
        assert await statuses(flood(supervisor, "work", 3)) == [FAILED] * 3
        assert worker.restarts == 0
        assert exits(record) == []


@virtual
async def test_one_restart_too_many_makes_a_worker_failed_until_it_is_revived() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor(max_restarts=2, within=10.0) as supervisor:
        record = EventRecord(supervisor)
        worker = register(supervisor, service, Agent(100.0))
        await settle()
        for _ in range(2):
            service.crash()
            await asyncio.sleep(1.0)
        assert worker.restarts == 2
        running, waiting = flood(supervisor, "work", 2)
        service.crash()
        with pytest.raises(TaskFailed, match="'worker' has stopped: its life raised ValueError: broken"):
            await running.value()
        with pytest.raises(
            TaskFailed, match=r"no worker takes it before supervisor.workers\['worker'\]\.revive\(\): its life"
        ):
            await waiting.value()
        assert str(worker) == "WorkerAgent('worker', FAILED, 0/1)"
        assert [event.retry_in for event in record.of_type(WorkerFailed)] == [None]
        await asyncio.sleep(1000.0)
        assert str(worker) == "WorkerAgent('worker', FAILED, 0/1)"
        with pytest.raises(
            Overloaded, match=r"FAILED until it is revived, by supervisor.workers\['worker'\]\.revive\(\)"
        ):
            await supervisor.run(Task("work"))
        worker.revive()
        assert worker.state is WorkerState.IDLE
        assert await supervisor.run(Task("work", 5)) == 5
        assert len(record.of_type(WorkerRecovered)) == 1
        assert len(service.lives) == 4


@virtual
async def test_nobody_waits_for_room_at_workers_that_are_given_up() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor(max_restarts=0, max_queue_size=1) as supervisor:
        worker = register(supervisor, service, Agent(100.0))
        await settle()
        inside = flood(supervisor, "work", 2)
        in_line = [asyncio.ensure_future(supervisor.submit(Task("work"), wait=math.inf)) for _ in range(3)]
        mapping = asyncio.ensure_future(error_of(supervisor.map("work", range(3))))
        await settle()
        fan_out = asyncio.ensure_future(collect(supervisor.fan_out([Task("work")] * 3)))
        await settle()
        service.crash()
        assert {(await ticket).status for ticket in inside} == {FAILED}
        async with asyncio.timeout(2.0):
            first, *others = [await each for each in in_line]
            assert (await first).status is FAILED  # the room of the task that ran was its own until the worker stopped
            assert {ticket.verdict for ticket in others} == {Verdict.REJECTED}
            assert all("FAILED until it is revived" in str(ticket.reason) for ticket in others)
            assert isinstance(await mapping, Overloaded)
            assert [result.status for result in await fan_out] == [TaskStatus.REJECTED] * 3
        later = await supervisor.submit(Task("work"), wait=math.inf)
        assert later.verdict is Verdict.REJECTED
        worker.revive()
        await settle()
        assert (await supervisor.submit(Task("work"), wait=math.inf)).verdict is Verdict.ADMITTED


async def collect(results: Any) -> list[Any]:
    return [result async for result in results]


@virtual
async def test_an_async_start_that_only_connects_is_told_what_a_life_is() -> None:
    async def connect() -> None:
        await asyncio.sleep(0)

    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], start=connect)
        await settle()
        (event,) = record.of_type(WorkerFailed)
        assert event.reason.startswith("its life ended by returning; it would be one restart too many")
        assert "await asyncio.Event().wait()" in event.reason
        assert "a plain function that returns nothing" in event.reason


@virtual
async def test_restarts_that_are_far_apart_are_not_too_many() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor(max_restarts=1, within=5.0) as supervisor:
        worker = register(supervisor, service)
        await settle()
        for _ in range(10):
            service.crash()
            await asyncio.sleep(5.5)
        assert worker.restarts == 10
        assert worker.state is WorkerState.IDLE


@virtual
async def test_a_start_that_fails_at_a_restart_is_tried_again_and_counts_as_one() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor(max_restarts=3) as supervisor:
        worker = register(supervisor, service)
        await settle()
        service.start_errors = ["first", "second"]
        service.crash()
        await settle()
        assert await supervisor.run(Task("work", 1)) == 1
        assert worker.restarts == 1
        service.start_errors = ["third"]
        service.crash()
        await settle()
        assert worker.state is WorkerState.FAILED
        assert service.log.count("worker fails to start") == 2


@virtual
async def test_a_worker_that_does_not_start_again_keeps_no_other_from_it() -> None:
    hangs = False

    async def live(started: Callable[[], None]) -> None:
        if hangs:
            await asyncio.sleep(60.0)
        started()
        await lost

    lost, service = asyncio.get_running_loop().create_future(), ScriptedLife()
    async with BackpressureSupervisor(max_restarts=3, within=5.0) as supervisor:
        stuck = supervisor.register_worker("stuck", handler=Agent(), task_types=["else"], start=live, start_timeout=2.0)
        worker = register(supervisor, service)
        await settle()
        hangs = True
        lost.set_exception(ValueError("lost"))
        await settle()
        service.crash()
        await asyncio.sleep(100.0)
        assert (stuck.restarts, worker.restarts) == (0, 1)
        assert await supervisor.run(Task("work", 1)) == 1


@virtual
@pytest.mark.parametrize("durable", [False, True])
async def test_what_runs_on_a_worker_ends_with_its_life_although_another_one_is_being_restarted(
    tmp_path: Path, *, durable: bool
) -> None:
    hangs = False

    async def live(started: Callable[[], None]) -> None:
        if hangs:
            await asyncio.sleep(60.0)
        started()
        await lost

    lost, service, agent = asyncio.get_running_loop().create_future(), ScriptedLife(), Agent(10.0)
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        supervisor.register_worker("slow", handler=Agent(), task_types=["else"], start=live)
        register(supervisor, service, agent)
        record = EventRecord(supervisor)
        ticket = await supervisor.submit(Task("work", durable=durable))
        await asyncio.sleep(1.0)
        hangs = True
        lost.set_exception(ValueError("lost"))
        await settle()
        service.crash()
        await settle()
        assert agent.running == 0
        (ended,) = record.of_type(TaskRetried if durable else TaskFinished)
        assert ended.at < 1.1
        assert (await ticket).status is (SUCCEEDED if durable else FAILED)
        assert now() < 1.1 if not durable else 71.0 < now() < 71.1


@pytest.mark.parametrize(
    ("restart", "end", "lives"),
    [
        ("permanent", ScriptedLife.returns, 2),
        ("permanent", ScriptedLife.is_cancelled, 2),
        ("permanent", ScriptedLife.crash, 2),
        ("transient", ScriptedLife.returns, 1),
        ("transient", ScriptedLife.is_cancelled, 1),
        ("transient", ScriptedLife.crash, 2),
        ("temporary", ScriptedLife.returns, 1),
        ("temporary", ScriptedLife.is_cancelled, 1),
        ("temporary", ScriptedLife.crash, 1),
    ],
)
@virtual
async def test_a_restart_depends_on_the_type_of_the_worker_and_the_end_of_its_life(
    restart: str, end: Callable[[ScriptedLife], None], lives: int
) -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor() as supervisor:
        worker = register(supervisor, service, restart=restart)
        await settle()
        end(service)
        await settle()
        assert len(service.lives) == lives
        if lives == 2:
            assert await supervisor.run(Task("work", 1)) == 1
        elif restart == "transient":
            assert worker.state is WorkerState.FAILED
            worker.revive()
            assert await supervisor.run(Task("work", 1)) == 1
        else:
            assert supervisor.workers == {}
            with pytest.raises(UnknownTaskType):
                supervisor.submit_nowait(Task("work"))


@virtual
async def test_a_temporary_worker_that_has_ended_leaves_its_name_and_what_waits_to_others() -> None:
    service = ScriptedLife("one")
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, service, Agent(10.0), restart="temporary")
        await settle()
        running, waiting = flood(supervisor, "work", 2)
        supervisor.register_worker("other", handler=Agent(1.0), task_types=["work"])
        service.crash()
        assert (await running).status is FAILED
        assert (await waiting).worker_id == "other"
        register(supervisor, service)
        await settle()
        assert list(supervisor.workers) == ["other", "one"]


@virtual
async def test_stored_tasks_of_restarted_workers_run_again_and_an_attempt_counts_where_a_life_ended(
    tmp_path: Path,
) -> None:
    services = [ScriptedLife(name) for name in "ab"]
    overflow = f"sqlite:///{tmp_path}/spill.db"
    async with BackpressureSupervisor(strategy="one_for_all", overflow=overflow) as supervisor:
        for service in services:
            register(supervisor, service, Agent(10.0), task_types=[service.name])
        record = EventRecord(supervisor)
        tickets = [await supervisor.submit(Task(service.name, durable=True)) for service in services]
        await asyncio.sleep(1.0)
        services[0].crash()
        results = [await ticket for ticket in tickets]
        assert [(result.status, result.attempts) for result in results] == [(SUCCEEDED, 2), (SUCCEEDED, 1)]
        assert [(event.worker_id, event.attempt) for event in record.of_type(TaskRetried)] == [("a", 1)]
        assert 11.0 <= now() < 11.1


@virtual
async def test_a_stored_task_that_ends_the_life_of_its_worker_each_time_becomes_a_dead_letter(tmp_path: Path) -> None:
    service = ScriptedLife()

    async def kills(_: Task) -> None:
        service.crash()
        await asyncio.sleep(10.0)

    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db", max_restarts=10) as supervisor:
        register(supervisor, service, kills)
        ticket = await supervisor.submit(Task("work", durable=True))
        result = await ticket
        assert (result.status, result.attempts) == (FAILED, 3)
        assert [letter.task_id async for letter in supervisor.dead_letters] == [ticket.task_id]


@virtual
async def test_a_life_is_asked_to_stop_then_cancelled_and_then_left() -> None:
    log: list[str] = []
    asked = asyncio.Event()

    async def polite() -> None:
        await asked.wait()
        await asyncio.sleep(2.0)
        log.append("ended by itself")

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000.0)
        await asyncio.sleep(1000.0)

    supervisor = BackpressureSupervisor()
    await supervisor.start()
    supervisor.register_worker(
        "polite", handler=Agent(), task_types=["a"], start=polite, stop=asked.set, stop_timeout=3.0
    )
    await settle()
    await supervisor.unregister_worker("polite")
    assert log == ["ended by itself"]
    assert now() == approximately(2.0)
    supervisor.register_worker("stubborn", handler=Agent(), task_types=["a"], start=stubborn, stop_timeout=3.0)
    await settle()
    await supervisor.unregister_worker("stubborn")
    assert now() == approximately(5.0)
    await supervisor.close()
    assert now() == approximately(5.0)


@virtual
async def test_workers_start_in_order_and_stop_in_reverse() -> None:
    log: list[str] = []
    supervisor = BackpressureSupervisor()
    for name in "abc":
        register(supervisor, ScriptedLife(name, log))
    async with supervisor:
        assert log == ["a starts", "b starts", "c starts"]
        await settle()
        log.clear()
    assert log == ["c ends", "b ends", "a ends"]


@virtual
async def test_a_start_that_fails_undoes_the_start_of_the_supervisor() -> None:
    log: list[str] = []
    supervisor = BackpressureSupervisor()
    register(supervisor, ScriptedLife("a", log))
    register(supervisor, ScriptedLife("b", log))
    register(supervisor, ScriptedLife("c", log, start_error="no"))
    assert isinstance(await error_of(supervisor.start()), OSError)
    assert log[:3] == ["a starts", "b starts", "c fails to start"]
    await settle()


@virtual
async def test_a_close_while_a_failed_start_is_undone_leaves_no_life_behind() -> None:
    async def live_on() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            await asyncio.sleep(3.0)
            raise

    first, broken = ScriptedLife("first"), ScriptedLife("broken", start_error="no")
    supervisor = BackpressureSupervisor()
    register(supervisor, first)
    supervisor.register_worker("slow", handler=Agent(), task_types=["else"], start=live_on)
    supervisor.register_worker("fails", handler=Agent(), task_types=["else"], start=later(broken.start))
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(2.0)  # the start has failed, and the slow one is being stopped
    await supervisor.close()
    await error_of(starting)
    await asyncio.sleep(5.0)
    assert not first.alive


def later(start: Callable[[], Any]) -> Callable[[Callable[[], None]], Any]:
    """Return a life that takes a second until it starts, or fails to."""

    async def live(started: Callable[[], None]) -> None:
        await asyncio.sleep(1.0)
        life = start()
        started()
        await life

    return live


@virtual
async def test_a_life_that_ends_while_others_start_is_restarted_once_all_have_started() -> None:
    log: list[str] = []
    first, last = ScriptedLife("first", log), ScriptedLife("last", log)

    class Slow:
        def __forebay_handler__(self) -> Handler:
            return Handler(call=lambda task: task.payload, start=self.start)

        async def start(self) -> None:
            first.crash()
            await asyncio.sleep(1.0)

    supervisor = BackpressureSupervisor()
    worker = register(supervisor, first)
    supervisor.register_worker("slow", handler=Slow(), task_types=["slow"])
    register(supervisor, last)
    async with supervisor:
        await settle()
        assert worker.restarts == 1
        assert log == ["first starts", "first ends", "last starts", "first starts"]


@virtual
async def test_supervision_settings_are_checked() -> None:
    supervisor = BackpressureSupervisor()
    for options in (
        {"restart": "always"},
        {"start": 3},
        {"stop": 3},
        {"stop_timeout": 0},
        {"start_timeout": 0},
        {"start": lambda a, b: (a, b)},
    ):
        with pytest.raises(InvalidSetting, match=next(iter(options))):
            supervisor.register_worker("w", handler=Agent(), task_types=["work"], **options)
    for settings in ({"strategy": "all"}, {"max_restarts": -1}, {"max_restarts": 1.5}, {"within": 0}):
        with pytest.raises(InvalidSetting, match=next(iter(settings))):
            BackpressureSupervisor(**settings)
    with pytest.raises(InvalidSetting, match="left out where the handler is a supervisor"):
        supervisor.register_worker(
            "w", handler=BackpressureSupervisor(), task_types=["work"], start=ScriptedLife().start
        )
    assert supervisor.workers == {}


# --- strategies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("one_for_one", ["b ends", "b starts"]),
        ("rest_for_one", ["b ends", "c ends", "b starts", "c starts"]),
        ("one_for_all", ["b ends", "c ends", "a ends", "a starts", "b starts", "c starts"]),
    ],
)
@virtual
async def test_a_strategy_stops_in_reverse_and_starts_in_order(strategy: str, expected: list[str]) -> None:
    log: list[str] = []
    services = [ScriptedLife(name, log) for name in "abc"]
    async with BackpressureSupervisor(strategy=strategy) as supervisor:
        workers = [register(supervisor, service, Agent(10.0), task_types=[service.name]) for service in services]
        await settle()
        tickets = [supervisor.submit_nowait(Task(service.name)) for service in services]
        log.clear()
        services[1].crash()
        assert await statuses(tickets) == [FAILED if f"{name} starts" in expected else SUCCEEDED for name in "abc"]
        await settle()
        assert log == expected
        assert [worker.restarts for worker in workers] == [f"{name} starts" in expected for name in "abc"]


@virtual
async def test_a_temporary_worker_that_is_stopped_with_another_one_does_not_come_back() -> None:
    log: list[str] = []
    first, second = ScriptedLife("first", log), ScriptedLife("second", log)
    async with BackpressureSupervisor(strategy="one_for_all") as supervisor:
        register(supervisor, first)
        register(supervisor, second, restart="temporary", task_types=["else"])
        await settle()
        first.crash()
        await settle()
        assert log == ["first starts", "second starts", "first ends", "second ends", "first starts"]
        assert list(supervisor.workers) == ["first"]


@virtual
async def test_a_temporary_worker_that_ends_restarts_no_other() -> None:
    first, second = ScriptedLife("first"), ScriptedLife("second")
    async with BackpressureSupervisor(strategy="one_for_all") as supervisor:
        worker = register(supervisor, first)
        register(supervisor, second, restart="temporary")
        await settle()
        second.crash()
        await settle()
        assert list(supervisor.workers) == ["first"]
        assert worker.restarts == 0


@virtual
async def test_workers_without_a_life_are_restarted_with_others_too() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor(strategy="one_for_all") as supervisor:
        plain = supervisor.register_worker("plain", handler=Agent(10.0), task_types=["plain"])
        register(supervisor, service)
        await settle()
        running, waiting = flood(supervisor, "plain", 2)
        service.crash()
        assert await statuses([running, waiting]) == [FAILED, SUCCEEDED]
        assert plain.restarts == 1


@virtual
async def test_workers_that_are_failed_together_are_revived_together_in_order() -> None:
    log: list[str] = []
    services = [ScriptedLife(name, log) for name in "abc"]
    async with BackpressureSupervisor(strategy="rest_for_one", max_restarts=0) as supervisor:
        record = EventRecord(supervisor)
        a, b, c = (register(supervisor, service, task_types=[service.name]) for service in services)
        await settle()
        log.clear()
        services[1].crash()
        await settle()
        assert log == ["b ends", "c ends"]
        assert [worker.failed for worker in (a, b, c)] == [False, True, True]
        reasons = [event.reason for event in record.of_type(WorkerFailed)]
        assert reasons == [
            "its life raised ValueError: broken; it would be one restart too many: at most 0 within 5 s",
            "it is restarted with worker 'b', which is FAILED",
        ]
        c.revive()
        await settle()
        assert log == ["b ends", "c ends", "b starts", "c starts"]
        assert [worker.failed for worker in (a, b, c)] == [False, False, False]


@virtual
async def test_lives_that_end_at_once_are_handled_one_after_the_other_and_once_each() -> None:
    log: list[str] = []
    services = [ScriptedLife(name, log) for name in "abc"]
    async with BackpressureSupervisor(strategy="one_for_all") as supervisor:
        workers = [register(supervisor, service) for service in services]
        await settle()
        for service in services:
            service.crash()
        await settle()
        assert [worker.restarts for worker in workers] == [1, 1, 1]
        assert log.count("a starts") == 2


@virtual
async def test_a_worker_that_is_failed_for_its_tasks_stays_so_when_its_life_is_restarted() -> None:
    service = ScriptedLife()

    def fails(_: Task) -> None:
        raise ValueError

    async with BackpressureSupervisor() as supervisor:
        worker = register(supervisor, service, fails, reset_timeout=100.0)
        await settle()
        await statuses(flood(supervisor, "work", 5))
        assert worker.failed
        service.crash()
        await settle()
        assert worker.restarts == 1
        assert worker.failed
        await asyncio.sleep(100.0)
        assert not worker.failed


# --- supervisors below supervisors -----------------------------------------------------------------------------------


class Tree:
    """A supervisor with a nested one, of two workers."""

    def __init__(self, *, restart: str = "permanent", max_restarts: int = 1, **options: Any) -> None:
        self.log: list[str] = []
        self.services = [ScriptedLife(name, self.log) for name in "ab"]
        self.inner = BackpressureSupervisor(**options)
        for service in self.services:
            register(self.inner, service, Agent(10.0), max_concurrent=2)
        self.outer = BackpressureSupervisor(max_restarts=max_restarts, within=100.0)
        self.worker = self.outer.register_worker(
            "inner", handler=self.inner, task_types=["work"], max_concurrent=10, restart=restart
        )

    async def exceed(self) -> None:
        """Crash the first worker of the nested supervisor once more than it allows: it gives up."""
        for _ in range(4):
            if not self.services[0].lives[-1].done():
                self.services[0].crash()
                await settle()


@virtual
async def test_a_nested_supervisor_that_gives_up_is_restarted_as_a_whole() -> None:
    tree = Tree()
    async with tree.outer as outer:
        record, inside = EventRecord(outer), EventRecord(tree.inner)
        await settle()
        tickets = flood(outer, "work", 6)
        await settle()
        direct = flood(tree.inner, "work", 20)[-1]
        tree.log.clear()
        await tree.exceed()
        assert tree.log == ["a ends", "a starts"] * 3 + ["a ends", "b ends", "a starts", "b starts"]
        assert exits(record) == [("inner", "shutdown")]
        assert tree.worker.restarts == 1
        assert tree.worker.state is WorkerState.IDLE
        errors = {(await ticket).error for ticket in tickets}
        assert "worker 'inner' has stopped: its life was cancelled" in errors
        assert (await direct).status is SUCCEEDED  # it waited inside
        assert [event.worker_id for event in inside.of_type(WorkerFailed)] == ["a"]
        assert await outer.run(Task("work", 5)) == 5


@virtual
async def test_a_transient_nested_supervisor_that_gives_up_is_failed_until_it_is_revived() -> None:
    tree = Tree(restart="transient")
    async with tree.outer as outer:
        await settle()
        direct = [tree.inner.submit_nowait(Task("work")) for _ in range(5)]
        await tree.exceed()
        assert tree.log[-2:] == ["a ends", "b ends"]
        assert tree.worker.failed
        assert await statuses(direct) == [FAILED] * 5
        assert tree.inner.system_load() == 1.0
        tree.inner.workers["a"].revive()  # it starts again with its supervisor
        await settle()
        assert tree.log[-2:] == ["a ends", "b ends"]
        tree.worker.revive()
        await settle()
        assert await outer.run(Task("work", 5)) == 5
        assert tree.log[-2:] == ["a starts", "b starts"]
        assert not tree.inner.workers["a"].failed


@virtual
async def test_failures_climb_to_the_top() -> None:
    tree = Tree(max_restarts=1)
    top = BackpressureSupervisor(max_restarts=0)
    highest = top.register_worker("outer", handler=tree.outer, task_types=["work"], max_concurrent=10)
    async with top:
        await settle()
        await tree.exceed()
        assert (tree.worker.restarts, highest.restarts) == (1, 0)
        await tree.exceed()
        assert tree.log[-2:] == ["a ends", "b ends"]
        assert highest.failed
        assert top.system_load() == 1.0
        with pytest.raises(Overloaded):
            await top.run(Task("work"))
        highest.revive()
        await settle()
        assert await top.run(Task("work", 7)) == 7
        assert (tree.worker.restarts, highest.restarts) == (2, 1)


@virtual
async def test_a_nested_supervisor_whose_workers_do_not_start_again_is_tried_again() -> None:
    tree = Tree(max_restarts=2)
    async with tree.outer as outer:
        await settle()
        for _ in range(3):
            tree.services[0].crash()
            await settle()
        tree.log.clear()
        tree.services[1].start_errors = ["not yet"]
        tree.services[0].crash()
        await settle()
        started, stopped = ["a starts", "b starts"], ["a ends", "b ends"]
        assert tree.log == [*stopped, "a starts", "b fails to start", "a ends", *started]
        assert tree.worker.restarts == 1
        assert await outer.run(Task("work", 5)) == 5


@virtual
async def test_a_nested_supervisor_whose_start_is_cancelled_is_not_left_half_started() -> None:
    log: list[str] = []
    first, second = ScriptedLife("first", log), ScriptedLife("second", log)
    slow = False

    async def live(started: Callable[[], None]) -> None:
        if slow:
            await asyncio.sleep(10.0)
        started()
        await second.start()

    team, fleet = BackpressureSupervisor(max_restarts=0), BackpressureSupervisor(max_restarts=10)
    register(team, first)
    team.register_worker("second", handler=Agent(), task_types=["else"], start=live)
    async with fleet:
        fleet.register_worker("team", handler=team, task_types=["work", "else"], reset_timeout=5.0)
        await settle()
        slow = True
        first.crash()
        await asyncio.sleep(1.0)  # the team is restarted, and its second worker takes its time
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        slow = False
        await asyncio.sleep(10.0)
        assert (first.alive, second.alive) == (True, True)
        assert await fleet.run(Task("else", 1)) == 1
        first.crash()  # and what ends from now on is handled
        await settle()
        assert (first.alive, second.alive) == (True, True)


@virtual
async def test_a_nested_supervisor_is_stopped_and_started_with_others() -> None:
    tree = Tree()
    tree.outer = BackpressureSupervisor(strategy="one_for_all")
    first = ScriptedLife("first", tree.log)
    register(tree.outer, first, task_types=["else"])
    tree.outer.register_worker("inner", handler=tree.inner, task_types=["work"])
    async with tree.outer as outer:
        await settle()
        tree.log.clear()
        first.crash()
        await settle()
        assert tree.log == ["first ends", "b ends", "a ends", "first starts", "a starts", "b starts"]
        assert await outer.run(Task("work", 5)) == 5


# --- the tree --------------------------------------------------------------------------------------------------------


@virtual
async def test_the_tree_shows_states_loads_restarts_and_failures_of_all_levels() -> None:
    tree = Tree(restart="transient", strategy="rest_for_one")
    assert tree.outer.tree().state == "new"
    async with tree.outer as outer:
        supervised = register(outer, ScriptedLife("own"), task_types=["own"], max_concurrent=2)
        await settle()
        outer.submit_nowait(Task("own"))
        for _ in range(2):
            tree.services[0].crash()
            await settle()
        flood(tree.inner, "work", 1)
        below = (
            TreeNode(name="a", state="busy", load=0.5, restart="permanent", restarts=2),
            TreeNode(name="b", state="idle", load=0.0, restart="permanent", restarts=2),
        )
        running, inside = outer.tree(), tree.inner.system_load()
        assert inside > 0
        assert running.children[0] == TreeNode(
            name="inner", state="idle", load=inside, restart="transient", strategy="rest_for_one", children=below
        )
        assert running.children[1] == TreeNode(
            name="own", state="busy", load=0.5, restart="permanent", restarts=supervised.restarts
        )
        assert (running.name, running.state, running.strategy) == ("supervisor", "running", "one_for_one")
        await tree.exceed()
        failed = outer.tree()
        assert [(child.state, child.load, child.failed) for child in failed.children] == [
            ("failed", 1.0, 3),
            ("busy", 0.5, 0),
        ]
        assert (failed.load, failed.failed) == (1.0, 3)
        assert json.loads(json.dumps(failed.as_dict()))["children"][0]["children"][1]["name"] == "b"
        assert [worker.restarts for worker in tree.inner.statistics().workers] == [3, 3]
    assert outer.tree().state == "closed"


@virtual
async def test_the_tree_shows_workers_that_start_and_that_leave() -> None:
    class Slow:
        def __forebay_handler__(self) -> Handler:
            return Handler(call=Agent(10.0), start=self.start)

        async def start(self) -> None:
            await asyncio.sleep(1.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("slow", handler=Slow(), task_types=["work"])
        flood(supervisor, "work", 1)
        await settle()
        assert [child.state for child in supervisor.tree().children] == ["starting"]
        await asyncio.sleep(1.0)
        leaving = asyncio.create_task(supervisor.unregister_worker("slow"))
        await settle()
        assert [child.state for child in supervisor.tree().children] == ["leaving"]
        await leaving


# --- while something else changes ------------------------------------------------------------------------------------


@virtual
async def test_the_runs_of_a_leaving_worker_end_with_its_life_which_is_not_restarted() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, service, Agent(10.0))
        await settle()
        (running,) = flood(supervisor, "work", 1)
        leaving = asyncio.create_task(supervisor.unregister_worker("worker"))
        await settle()
        service.crash()
        result = await running
        assert (result.status, result.error) == (
            FAILED,
            "the life of its worker, which is being unregistered, has ended",
        )
        await leaving
        assert now() < 1.0
    assert service.log == ["worker starts", "worker ends"]


@virtual
async def test_a_worker_may_be_unregistered_while_it_is_restarted() -> None:
    class Slow:
        stops = 0

        def __forebay_handler__(self) -> Handler:
            return Handler(call=Agent(), start=self.start, stop=self.stop)

        async def start(self) -> None:
            pass

        async def stop(self) -> None:
            self.stops += 1
            await asyncio.sleep(1.0)

    service, slow = ScriptedLife(), Slow()
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, service, slow)
        supervisor.register_worker("other", handler=Agent(), task_types=["work"])
        await settle()
        service.crash()
        await settle()
        await supervisor.unregister_worker("worker")
        assert list(supervisor.workers) == ["other"]
        await asyncio.sleep(2.0)
        assert (len(service.lives), slow.stops) == (1, 1)


@virtual
async def test_closing_ends_a_restart_in_progress() -> None:
    log: list[str] = []
    service, other = ScriptedLife("one", log), ScriptedLife("two", log)
    supervisor = BackpressureSupervisor(strategy="one_for_all")
    await supervisor.start()
    register(supervisor, service, UncancellableHandler(100.0))
    register(supervisor, other)
    await settle()
    flood(supervisor, "work", 1)
    await settle()
    service.crash()
    await asyncio.sleep(1.0)
    await supervisor.close()
    assert log == ["one starts", "two starts", "one ends", "two ends"]


@virtual
async def test_draining_waits_for_a_restart_and_for_no_worker_that_is_failed_for_good() -> None:
    service = ScriptedLife()
    supervisor = BackpressureSupervisor(max_restarts=1)
    await supervisor.start()
    register(supervisor, service, Agent(10.0))
    await settle()
    tickets = flood(supervisor, "work", 2)
    service.crash()
    report = await supervisor.drain()
    assert await statuses(tickets) == [FAILED, SUCCEEDED]
    assert report.finished == 2
    await supervisor.close()


@virtual
async def test_a_program_that_cancels_every_asyncio_task_leaves_no_worker_behind() -> None:
    class Slow:
        def __forebay_handler__(self) -> Handler:
            return Handler(call=Agent(), start=self.start)

        async def start(self) -> None:
            await asyncio.sleep(1.0)

    service = ScriptedLife()
    async with BackpressureSupervisor() as supervisor:
        worker = register(supervisor, service, Slow(), reset_timeout=10.0)
        await asyncio.sleep(2.0)
        service.crash()
        await settle()
        assert worker.starting
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await settle()
        assert worker.failed
        await asyncio.sleep(15.0)
        assert await supervisor.run(Task("work", 1)) == 1


@virtual
async def test_a_close_that_a_program_has_cancelled_may_be_called_again() -> None:
    supervisor = BackpressureSupervisor(zombie_grace=5.0)
    supervisor.register_worker("worker", handler=UncancellableHandler(20.0), task_types=["work"])
    await supervisor.start()
    (ticket,) = flood(supervisor, "work", 1)
    closing = asyncio.create_task(supervisor.close())
    await asyncio.sleep(1.0)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    assert isinstance(await error_of(closing), asyncio.CancelledError)
    await supervisor.close()
    assert ticket.done()
    await asyncio.sleep(30.0)  # until the handler has ended


@virtual
async def test_a_restart_that_is_cancelled_while_it_waits_for_handlers_is_not_forgotten() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor(zombie_grace=5.0) as supervisor:
        worker = register(supervisor, service, UncancellableHandler(20.0))
        await settle()
        flood(supervisor, "work", 1)
        await settle()
        service.crash()
        await asyncio.sleep(1.0)
        assert worker.starting
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(30.0)
        assert worker.state is WorkerState.IDLE
        assert (service.alive, worker.restarts) == (True, 1)


@virtual
async def test_zombies_do_not_delay_a_restart_for_longer_than_the_grace() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor(zombie_grace=2.0) as supervisor:
        worker = register(supervisor, service, UncancellableHandler(100.0), max_concurrent=2)
        await settle()
        (running,) = flood(supervisor, "work", 1)
        await settle()
        service.crash()
        await asyncio.sleep(2.5)
        assert worker.restarts == 1
        assert worker.current_tasks == 1
        assert (await running).status is FAILED


@virtual
async def test_nothing_is_kept_of_workers_that_came_and_went() -> None:
    async with BackpressureSupervisor() as supervisor:
        ends = []
        for number in range(100):
            service = ScriptedLife(str(number))
            worker = register(supervisor, service, restart="temporary")
            await settle()
            await supervisor.run(Task("work"))
            service.crash()
            await settle()
            ends.append(weakref.ref(worker))
            del worker, service
        assert supervisor.workers == {}
        gc.collect()
        assert [end() for end in ends[:-1]] == [None] * 99


@virtual
async def test_a_task_that_failed_because_its_worker_was_restarted_has_that_as_its_cause_at_every_level() -> None:
    tree = Tree(max_restarts=0)
    async with tree.outer as outer:
        await settle()
        for _ in range(6):
            tickets = flood(outer, "work", 4)
            await asyncio.sleep(5.1)
            for service in tree.services:
                service.crash()
            errors = [await error_of(ticket.value()) for ticket in tickets]
            assert [type(error) for error in errors] == [TaskFailed] * 4
            below = [error.__cause__ for error in errors if error.__cause__ is not None]
            assert [type(error.__cause__) for error in below] == [WorkerStopped] * 4
            await settle()
        assert tree.worker.restarts == 0
        assert not tree.worker.failed  # no fault of the nested supervisor


# --- starts that take time -------------------------------------------------------------------------------------------


@virtual
async def test_a_worker_takes_no_task_and_the_next_is_not_started_before_its_life_says_that_it_has_started() -> None:
    log: list[str] = []

    async def serve(started: Callable[[], None]) -> None:
        await asyncio.sleep(2.0)
        log.append("connected")
        started()
        await asyncio.sleep(10.0)
        raise ConnectionError

    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("first", handler=Agent(), task_types=["work"], start=serve)
    register(supervisor, ScriptedLife("second", log), task_types=["else"])
    async with supervisor:
        assert now() == approximately(2.0)
        assert log == ["connected", "second starts"]
        await asyncio.sleep(10.5)
        assert worker.starting
        assert await supervisor.run(Task("work", 1)) == 1
        assert now() == approximately(15.0)
        assert worker.restarts == 1


@pytest.mark.parametrize("how", ["returns", "raises", "is late"])
@virtual
async def test_a_life_that_does_not_say_that_it_has_started_has_failed_to_start(how: str) -> None:
    ends = []

    async def serve(_: Callable[[], None]) -> None:
        try:
            if how == "raises":
                raise OSError("no route")
            if how == "is late":
                await asyncio.sleep(100.0)
        finally:
            ends.append(now())

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("first", handler=Agent(), task_types=["work"], start=serve, start_timeout=3.0)
    error = await error_of(supervisor.start())
    expected = "took longer than its start_timeout of 3 s" if how == "is late" else "ended before it called `started`"
    assert isinstance(error, WorkerNotStarted)
    assert str(error) in (
        f"Worker 'first' did not start: it {expected}.",
        f"Worker 'first' did not start: its life {expected}.",
    )
    assert ends == [approximately(3.0 if how == "is late" else 0.0)]
    assert isinstance(error.__cause__, OSError) == (how == "raises")


@virtual
async def test_a_start_that_hangs_at_a_restart_is_cut_off_and_tried_again() -> None:
    service = ScriptedLife()
    starts = []

    class Slow:
        def __forebay_handler__(self) -> Handler:
            return Handler(call=Agent(), start=self.start)

        async def start(self) -> None:
            starts.append(now())
            await asyncio.sleep(100.0 if len(starts) == 2 else 0.0)

    async with BackpressureSupervisor() as supervisor:
        register(supervisor, service, Slow(), start_timeout=3.0)
        await settle()
        service.crash()
        await settle()
        assert await supervisor.run(Task("work", 1)) == 1
        assert now() == approximately(4.0)
        assert len(starts) == 3


@virtual
async def test_a_life_that_is_cancelled_before_its_first_step_has_ended_by_a_shutdown() -> None:
    lives: list[asyncio.Future[None]] = []
    test = asyncio.current_task()

    def start() -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        lives.append(loop.create_future())
        if len(lives) == 1:
            loop.call_soon(lambda: [task.cancel() for task in asyncio.all_tasks() if task is not test])
        return lives[-1]

    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"], start=start)
        await asyncio.sleep(1.0)
        assert exits(record) == [("worker", "shutdown")]
        assert [life.cancelled() for life in lives] == [True, False]
        assert await supervisor.run(Task("work", 1)) == 1


# --- changes in the middle of a restart ------------------------------------------------------------------------------


class SlowHandler:
    """A handler whose starts and stops take a second each, and are logged."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def __forebay_handler__(self) -> Handler:
        return Handler(call=Agent(), start=self.start, stop=self.stop)

    async def start(self) -> None:
        await asyncio.sleep(1.0)
        self.log.append(f"{self.name}'s handler starts")

    async def stop(self) -> None:
        await asyncio.sleep(1.0)
        self.log.append(f"{self.name}'s handler stops")


@virtual
async def test_lives_that_end_at_once_beyond_the_intensity_are_failed_together() -> None:
    services = [ScriptedLife(name) for name in "abc"]
    async with BackpressureSupervisor(strategy="rest_for_one", max_restarts=0) as supervisor:
        record = EventRecord(supervisor)
        a, b, c = (register(supervisor, service) for service in services)
        await settle()
        services[0].crash()
        services[1].crash()
        await settle()
        assert sorted(event.worker_id for event in record.of_type(WorkerFailed)) == ["a", "b", "c"]
        b.revive()
        await settle()
        assert [service.alive for service in services] == [True] * 3
        assert [worker.failed for worker in (a, b, c)] == [False] * 3


@virtual
async def test_a_worker_that_is_unregistered_while_it_is_stopped_keeps_no_other_from_starting() -> None:
    log: list[str] = []
    first, second = ScriptedLife("first", log), ScriptedLife("second", log)
    async with BackpressureSupervisor(strategy="one_for_all", max_restarts=0) as supervisor:
        register(supervisor, first, SlowHandler("first", log), task_types=["first"])
        register(supervisor, second, task_types=["second"])
        await asyncio.sleep(2.0)
        supervisor.register_worker("third", handler=Agent(), task_types=["first"])
        log.clear()
        first.crash()
        await settle()  # its handler is being stopped
        await supervisor.unregister_worker("first")
        await asyncio.sleep(2.0)
        assert list(supervisor.workers) == ["second", "third"]
        assert log == ["first ends", "second ends", "first's handler stops"]
        assert [worker.failed for worker in supervisor.workers.values()] == [True, True]


@virtual
async def test_a_worker_that_is_unregistered_while_it_starts_again_is_stopped_and_the_others_go_on() -> None:
    log: list[str] = []
    first, second = ScriptedLife("first", log), ScriptedLife("second", log)
    async with BackpressureSupervisor(strategy="one_for_all") as supervisor:
        register(supervisor, first, SlowHandler("first", log), task_types=["first"])
        register(supervisor, second, task_types=["second"])
        await asyncio.sleep(2.0)
        log.clear()
        second.crash()
        await asyncio.sleep(1.5)  # the handler of the first one is being started
        removing = asyncio.create_task(supervisor.unregister_worker("first"))
        await asyncio.sleep(5.0)
        await removing
        assert not first.alive
        assert second.alive
        assert log.count("first's handler starts") == log.count("first's handler stops") - 1 == 1
        assert await supervisor.run(Task("second", 2)) == 2


@virtual
async def test_a_stop_in_progress_is_not_cut_off_when_the_supervisor_closes() -> None:
    log: list[str] = []
    service = ScriptedLife(log=log)
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, service, SlowHandler("worker", log))
        await asyncio.sleep(2.0)
        log.clear()
        service.crash()
        await asyncio.sleep(0.5)
        await supervisor.close()
        assert log == ["worker ends", "worker's handler stops"]
        assert now() == approximately(3.0)


# --- retries ---------------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_with_a_policy_is_retried_after_its_worker_was_restarted() -> None:
    service = ScriptedLife()
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, service, Agent(10.0), retry=Retry(max_attempts=2))
        await settle()
        (ticket,) = flood(supervisor, "work", 1)
        await asyncio.sleep(1.0)
        service.crash()
        result = await ticket
        assert (result.status, result.attempts) == (SUCCEEDED, 2)


@virtual
async def test_a_task_that_waits_for_its_next_attempt_ends_with_its_last_worker() -> None:
    def fails(_: Task) -> None:
        raise ValueError("no")

    service = ScriptedLife()
    async with BackpressureSupervisor(max_restarts=0) as supervisor:
        register(supervisor, service, fails, retry=Retry(base_delay=1000.0, max_delay=1000.0))
        await settle()
        first, parked = (supervisor.submit_nowait(Task("work", thread_id="chat")) for _ in range(2))
        await settle()
        service.crash()
        assert await statuses([first, parked]) == [FAILED, FAILED]
        assert now() < 1.0


# --- a supervisor that starts again ----------------------------------------------------------------------------------


@virtual
async def test_a_supervisor_that_is_started_again_starts_its_lives_again_and_knows_no_restarts_of_before() -> None:
    tree = Tree(restart="transient", max_restarts=0)
    async with tree.outer:
        await settle()
        await tree.exceed()
        assert tree.worker.failed
    tree.log.clear()
    async with tree.outer as outer:
        assert tree.log == ["a starts", "b starts"]
        assert not tree.worker.failed
        assert [worker.restarts for worker in (tree.worker, *tree.inner.workers.values())] == [0, 0, 0]
        tree.services[1].crash()
        await settle()
        assert tree.log[2:] == ["b ends", "b starts"]
        assert await outer.run(Task("work", 5)) == 5
    assert tree.log[-2:] == ["b ends", "a ends"]


@virtual
async def test_a_nested_supervisor_that_its_program_has_closed_starts_again_with_the_others() -> None:
    tree = Tree()
    tree.outer = BackpressureSupervisor(strategy="one_for_all")
    first = ScriptedLife("first", tree.log)
    register(tree.outer, first, task_types=["else"])
    tree.outer.register_worker("inner", handler=tree.inner, task_types=["work"])
    async with tree.outer as outer:
        await settle()
        await tree.inner.close()
        tree.log.clear()
        first.crash()
        await settle()
        assert tree.log == ["first ends", "first starts", "a starts", "b starts"]
        assert await outer.run(Task("work", 5)) == 5


def test_no_worker_is_restarted_in_a_loop_that_ends_without_a_close() -> None:
    inner, outer = BackpressureSupervisor(), BackpressureSupervisor()
    service = ScriptedLife()
    register(inner, service)
    outer.register_worker("inner", handler=inner, task_types=["work"])

    async def main() -> None:
        await outer.start()
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()  # asyncio would report tasks that were destroyed pending
    assert len(service.lives) == 1
    assert service.lives[0].cancelled()
