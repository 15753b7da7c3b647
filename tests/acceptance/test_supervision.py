"""Supervision trees: lives that end, restarts, strategies, supervisors below supervisors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, error_of, flood, now, run_ready, statuses, virtual

from forebay import BackpressureSupervisor, Overloaded, Task, TaskFailed, TaskStatus, WorkerState
from forebay.adapters import Handler
from forebay.errors import InvalidSetting, UnknownTaskType
from forebay.events import WorkerExited, WorkerFailed, WorkerRecovered, WorkerRestarted
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

SUCCEEDED, FAILED, CANCELLED = TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED


class Service:
    """The life of a worker, which a test ends; its starts and ends are logged."""

    def __init__(self, name: str = "worker", log: list[str] | None = None, *, start_error: str = "") -> None:
        self.name = name
        self.log = [] if log is None else log
        self.lives: list[asyncio.Future[None]] = []
        self.start_errors: list[str] = [start_error] if start_error else []
        self.end: str | None = None  # of each life, at once

    def start(self) -> Any:
        if self.start_errors:
            self.log.append(f"{self.name} fails to start")
            raise OSError(self.start_errors.pop(0))
        self.log.append(f"{self.name} starts")
        self.lives.append(asyncio.get_running_loop().create_future())
        return self._live(self.lives[-1])

    async def _live(self, life: asyncio.Future[None]) -> None:
        try:
            await life
        finally:
            self.log.append(f"{self.name} ends")

    def crash(self, error: BaseException | None = None) -> None:
        self.lives[-1].set_exception(ValueError("broken") if error is None else error)

    def returns(self) -> None:
        self.lives[-1].set_result(None)

    def is_cancelled(self) -> None:
        self.lives[-1].cancel()


def register(
    supervisor: BackpressureSupervisor, service: Service, handler: Callable[..., Any] | None = None, **options: Any
) -> Any:
    types = options.pop("task_types", ["work"])
    return supervisor.register_worker(
        service.name, handler=handler or Agent(), task_types=types, start=service.start, **options
    )


def exits(record: EventRecord) -> list[tuple[str, str]]:
    return [(event.worker_id, event.exit) for event in record.of_type(WorkerExited)]


# --- one worker ------------------------------------------------------------------------------------------------------


@virtual
async def test_a_worker_whose_life_crashed_is_started_again_and_goes_on_with_what_waits() -> None:
    service = Service()
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        worker = register(supervisor, service, Agent(10.0))
        await run_ready()
        running, waiting = flood(supervisor, "work", 2)
        await asyncio.sleep(1.0)
        service.crash()
        result = await running
        assert now() == approximately(1.0)
        assert result.status is FAILED
        assert result.error == "worker 'worker' was restarted: its life raised ValueError: broken"
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
    service = Service()

    def fails(_: Task) -> None:
        raise ValueError

    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        worker = register(supervisor, service, fails)
        await run_ready()
        assert await statuses(flood(supervisor, "work", 3)) == [FAILED] * 3
        assert worker.restarts == 0
        assert exits(record) == []


@virtual
async def test_one_restart_too_many_makes_a_worker_failed_until_it_is_revived() -> None:
    service = Service()
    async with BackpressureSupervisor(max_restarts=2, within=10.0) as supervisor:
        record = EventRecord(supervisor)
        worker = register(supervisor, service, Agent(100.0))
        await run_ready()
        for _ in range(2):
            service.crash()
            await asyncio.sleep(1.0)
        assert worker.restarts == 2
        running, waiting = flood(supervisor, "work", 2)
        service.crash()
        with pytest.raises(TaskFailed, match="'worker' is not restarted any more: its life raised ValueError: broken"):
            await running.value()
        with pytest.raises(TaskFailed, match="at most 2 within 10 s"):
            await waiting.value()
        assert str(worker) == "WorkerAgent('worker', FAILED, 0/1)"
        assert [event.retry_in for event in record.of_type(WorkerFailed)] == [None]
        await asyncio.sleep(1000.0)
        assert str(worker) == "WorkerAgent('worker', FAILED, 0/1)"
        with pytest.raises(Overloaded):
            await supervisor.run(Task("work"))
        worker.revive()
        assert worker.state is WorkerState.IDLE
        assert await supervisor.run(Task("work", 5)) == 5
        assert len(record.of_type(WorkerRecovered)) == 1
        assert len(service.lives) == 4


@virtual
async def test_restarts_that_are_far_apart_are_not_too_many() -> None:
    service = Service()
    async with BackpressureSupervisor(max_restarts=1, within=5.0) as supervisor:
        worker = register(supervisor, service)
        await run_ready()
        for _ in range(10):
            service.crash()
            await asyncio.sleep(5.5)
        assert worker.restarts == 10
        assert worker.state is WorkerState.IDLE


@virtual
async def test_a_start_that_fails_at_a_restart_is_tried_again_and_counts_as_one() -> None:
    service = Service()
    async with BackpressureSupervisor(max_restarts=3) as supervisor:
        worker = register(supervisor, service)
        await run_ready()
        service.start_errors = ["first", "second"]
        service.crash()
        await run_ready()
        assert await supervisor.run(Task("work", 1)) == 1
        assert worker.restarts == 1
        service.start_errors = ["third"]
        service.crash()
        await run_ready()
        assert worker.state is WorkerState.FAILED
        assert service.log.count("worker fails to start") == 2


@pytest.mark.parametrize(
    ("restart", "end", "lives"),
    [
        ("permanent", Service.returns, 2),
        ("permanent", Service.is_cancelled, 2),
        ("permanent", Service.crash, 2),
        ("transient", Service.returns, 1),
        ("transient", Service.is_cancelled, 1),
        ("transient", Service.crash, 2),
        ("temporary", Service.returns, 1),
        ("temporary", Service.is_cancelled, 1),
        ("temporary", Service.crash, 1),
    ],
)
@virtual
async def test_a_restart_depends_on_the_type_of_the_worker_and_the_end_of_its_life(
    restart: str, end: Callable[[Service], None], lives: int
) -> None:
    service = Service()
    async with BackpressureSupervisor() as supervisor:
        worker = register(supervisor, service, restart=restart)
        await run_ready()
        end(service)
        await run_ready()
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
    service = Service("one")
    async with BackpressureSupervisor() as supervisor:
        register(supervisor, service, Agent(10.0), restart="temporary")
        await run_ready()
        running, waiting = flood(supervisor, "work", 2)
        supervisor.register_worker("other", handler=Agent(1.0), task_types=["work"])
        service.crash()
        assert (await running).status is FAILED
        assert (await waiting).worker_id == "other"
        register(supervisor, service)
        await run_ready()
        assert list(supervisor.workers) == ["other", "one"]


@virtual
async def test_a_stored_task_of_a_restarted_worker_runs_again(tmp_path: Path) -> None:
    service = Service()
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        register(supervisor, service, Agent(10.0))
        ticket = await supervisor.submit(Task("work", 7, durable=True))
        await asyncio.sleep(1.0)
        service.crash()
        result = await ticket
        assert (result.status, result.attempts) == (SUCCEEDED, 1)  # the restart is not counted as an attempt
        assert 11.0 <= now() < 11.1


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
    await run_ready()
    await supervisor.unregister_worker("polite")
    assert log == ["ended by itself"]
    assert now() == approximately(2.0)
    supervisor.register_worker("stubborn", handler=Agent(), task_types=["a"], start=stubborn, stop_timeout=3.0)
    await run_ready()
    await supervisor.unregister_worker("stubborn")
    assert now() == approximately(5.0)
    await supervisor.close()
    assert now() == approximately(5.0)


@virtual
async def test_workers_start_in_order_and_stop_in_reverse() -> None:
    log: list[str] = []
    supervisor = BackpressureSupervisor()
    for name in "abc":
        register(supervisor, Service(name, log))
    async with supervisor:
        assert log == ["a starts", "b starts", "c starts"]
        await run_ready()
        log.clear()
    assert log == ["c ends", "b ends", "a ends"]


@virtual
async def test_a_start_that_fails_undoes_the_start_of_the_supervisor() -> None:
    log: list[str] = []
    supervisor = BackpressureSupervisor()
    register(supervisor, Service("a", log))
    register(supervisor, Service("b", log))
    register(supervisor, Service("c", log, start_error="no"))
    assert isinstance(await error_of(supervisor.start()), OSError)
    assert log[:3] == ["a starts", "b starts", "c fails to start"]
    await run_ready()


@virtual
async def test_a_life_that_ends_while_others_start_is_restarted_once_all_have_started() -> None:
    log: list[str] = []
    first, last = Service("first", log), Service("last", log)

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
        await run_ready()
        assert worker.restarts == 1
        assert log == ["first starts", "first ends", "last starts", "first starts"]


@virtual
async def test_supervision_settings_are_checked() -> None:
    supervisor = BackpressureSupervisor()
    for options in ({"restart": "always"}, {"start": 3}, {"stop": 3}, {"stop_timeout": 0}):
        with pytest.raises(InvalidSetting, match=next(iter(options))):
            supervisor.register_worker("w", handler=Agent(), task_types=["work"], **options)
    for settings in ({"strategy": "all"}, {"max_restarts": -1}, {"max_restarts": 1.5}, {"within": 0}):
        with pytest.raises(InvalidSetting, match=next(iter(settings))):
            BackpressureSupervisor(**settings)
    with pytest.raises(InvalidSetting, match="left out where the handler is a supervisor"):
        supervisor.register_worker("w", handler=BackpressureSupervisor(), task_types=["work"], start=Service().start)
    assert supervisor.workers == {}
