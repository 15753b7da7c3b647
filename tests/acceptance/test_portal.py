"""The portal's tickets, slots, events and drain, in real threads."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from forebay import BackpressureSupervisor, Overloaded, Priority, Task, TaskStatus, clock, progress
from forebay.errors import (
    DrainInside,
    InvalidSetting,
    SlotMisused,
    SupervisorClosed,
    TaskCancelled,
    TaskFailed,
    TaskTimedOut,
    UnknownTask,
    UnknownTaskType,
    WouldDeadlock,
)
from forebay.supervisor import Portal
from forebay.supervisor.fan_out import FanOutProgress

PATIENCE = 20.0  # seconds; nothing here takes as long


class Latch:
    """A handler that returns its payload once it is opened."""

    def __init__(self) -> None:
        self.started, self.open = threading.Event(), threading.Event()

    def __call__(self, task: Task) -> Any:
        self.started.set()
        assert self.open.wait(PATIENCE)
        return task.payload


@pytest.fixture
def latch() -> Iterator[Latch]:
    latch = Latch()
    yield latch
    latch.open.set()


@pytest.fixture
def portal(latch: Latch) -> Iterator[Portal]:
    supervisor = BackpressureSupervisor(zombie_grace=0.1)
    supervisor.register_worker("echo", handler=lambda task: task.payload, task_types=["echo"])
    supervisor.register_worker("latch", handler=latch, task_types=["latch"])
    supervisor.register_worker("slots", handler=lambda _: None, task_types=["slots"], timeout=PATIENCE)
    with supervisor.portal() as portal:
        yield portal
        latch.open.set()


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - it is looked at
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, outcome


# --- tickets ---------------------------------------------------------------------------------------------------------


def test_many_tasks_are_mapped_from_a_thread(portal: Portal) -> None:
    states: list[FanOutProgress] = []
    values = portal.map("echo", (number for number in range(300)), progress=states.append, priority=Priority.LOW)
    assert values == list(range(300))
    assert states[-1].succeeded == 300
    assert portal.map(Task[int]("echo", number) for number in range(3)) == [0, 1, 2]
    with pytest.raises(UnknownTaskType):
        portal.map("unknown", [1])


def test_a_map_from_a_thread_that_takes_too_long_cancels_its_tasks(latch: Latch) -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("latch", handler=latch, task_types=["latch"])
    with supervisor.portal() as portal:
        with pytest.raises(TimeoutError, match="the tasks have not all ended within 2 s; the others were cancelled"):
            portal.map("latch", range(3), wait_timeout=2.0)
        assert latch.started.is_set()
        latch.open.set()
        portal.drain(PATIENCE)
        assert supervisor.statistics().cancelled == 3
        with pytest.raises(InvalidSetting, match="map was given wait_timeout='soon'"):
            portal.map("latch", range(3), wait_timeout="soon")  # type: ignore[call-overload]


def test_a_ticket_is_found_by_its_id_and_by_its_key(portal: Portal) -> None:
    submitted = portal.submit(Task("echo", 7, task_id="a", key="k"))
    assert submitted.value(timeout=PATIENCE) == 7
    for found in (portal.ticket("a"), portal.find("a"), portal.find(key="k")):
        assert found is not None
        assert found.task_id == "a"
        assert found.value() == 7
        assert found.result().success
        assert json.dumps(found.as_dict())
    assert portal.find("typo") is None
    with pytest.raises(UnknownTask):
        portal.ticket("typo")


def test_what_waits_is_bounded_by_its_timeout(portal: Portal, latch: Latch) -> None:
    ticket = portal.submit(Task("latch", 1))
    assert latch.started.wait(PATIENCE)
    for wait in (ticket.result, ticket.value):
        with pytest.raises(TimeoutError, match=rf"task '{ticket.task_id}' has not ended within 10 ms; it is RUNNING"):
            wait(0.01)
    assert not ticket.done()
    with pytest.raises(TimeoutError, match="it was cancelled"):
        portal.run(Task("latch", 2, task_id="late"), timeout=0.5)
    assert portal.ticket("late").result(PATIENCE).status is TaskStatus.CANCELLED
    with pytest.raises(TimeoutError, match="no slot became free within"), portal.slot("latch", wait_timeout=0.01):
        pytest.fail("it was entered")
    with pytest.raises(TimeoutError, match="no event came within"):
        list(portal.events(timeout=0.01))
    with pytest.raises(TimeoutError, match="no event came within"):
        list(ticket.events(timeout=0.01))
    latch.open.set()
    assert ticket.value(PATIENCE) == 1
    assert ticket.done()
    assert portal.run(Task("latch", 3)) == 3  # the slot that was given up came back


@pytest.mark.parametrize("timeout", [-1.0, "soon", float("nan")])
def test_a_timeout_is_a_number_of_seconds(portal: Portal, timeout: Any) -> None:
    ticket = portal.submit(Task("echo"))
    ticket.result(PATIENCE)
    for wait in (
        lambda: portal.run(Task("echo"), timeout=timeout),
        lambda: portal.submit(Task("echo"), timeout=timeout),
        lambda: portal.find("a", timeout=timeout),
        lambda: portal.slot("slots", wait_timeout=timeout),
        lambda: portal.events(timeout=timeout),
        lambda: ticket.value(timeout),
        lambda: ticket.events(timeout),
        lambda: portal.drain(timeout),
    ):
        with pytest.raises(InvalidSetting, match="seconds"):
            wait()


def test_cancelling_gives_the_reason(portal: Portal, latch: Latch) -> None:
    ticket = portal.submit(Task("latch"))
    assert latch.started.wait(PATIENCE)
    assert ticket.cancel("the user has gone")
    assert "the user has gone" in str(ticket.result(PATIENCE).error)
    assert not ticket.cancel()


# --- events ----------------------------------------------------------------------------------------------------------


def test_the_events_of_a_ticket_come_to_its_thread(portal: Portal) -> None:
    def talk(_: Task) -> None:
        for number in range(50):
            progress(number)

    portal._supervisor.register_worker(  # type: ignore[attr-defined]
        "talker", handler=talk, task_types=["talk"]
    )
    ticket = portal.submit(Task("talk"))
    events = list(ticket.events(timeout=PATIENCE))
    assert events[-1].kind == "finished"
    assert [event.kind for event in ticket.events()] == ["finished"]


def test_the_events_of_the_supervisor_end_with_it() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("echo", handler=lambda task: task.payload, task_types=["echo"])
    with supervisor.portal() as portal:
        events, few = portal.events(timeout=PATIENCE), portal.events(bound=2)
        thread, outcome = in_thread(lambda: [event.kind for event in events])
        portal.run(Task("echo"))
    thread.join(PATIENCE)
    assert outcome == [["submitted", "started", "finished"]]
    assert [event.kind for event in few] == ["started", "finished"]
    assert few.dropped == 1


def test_events_that_are_closed_end(portal: Portal) -> None:
    with portal.events() as events:
        portal.run(Task("echo"))
        assert next(events).kind == "submitted"
    assert list(events) == []


def test_an_event_is_not_lost_by_a_wait_that_was_given_up(portal: Portal) -> None:
    events = portal.events(timeout=0.0)
    kinds: list[str] = []
    ticket = portal.submit(Task("echo"))
    until = clock.monotonic() + PATIENCE
    while clock.monotonic() < until:
        try:
            kinds.append(next(events).kind)
        except TimeoutError:
            continue
        if kinds[-1] == "finished":
            break
    assert ticket.result(PATIENCE).success
    assert kinds == ["submitted", "started", "finished"]


async def test_a_thread_that_waits_for_an_event_lends_its_slot_and_no_other_does() -> None:
    async with BackpressureSupervisor() as supervisor:
        portal = supervisor.portal()
        seen: list[Any] = []

        def handler(task: Task) -> Any:
            if task.payload == "inner":
                return worker.current_tasks
            ticket = portal.submit(Task("work", "inner"))
            events = ticket.events(PATIENCE)
            seen.append((ticket.status, worker.current_tasks))
            return [event.kind for event in events]

        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
        async with asyncio.timeout(PATIENCE):
            kinds = await supervisor.run(Task("work", "outer"))
        assert kinds[-1] == "finished"
        assert seen == [(TaskStatus.WAITING, 1)]


# --- slots -----------------------------------------------------------------------------------------------------------


def test_a_slot_is_held_while_the_block_runs(portal: Portal) -> None:
    with portal.slot("slots", priority=Priority.HIGH) as slot:
        assert slot.worker.name == "slots"
        assert slot.worker.current_tasks == 1
        with pytest.raises(SlotMisused), slot:
            pytest.fail("it was entered twice")
        worker = slot.worker
    assert worker.current_tasks == 0
    assert portal.ticket(slot.task_id).result().status is TaskStatus.SUCCEEDED


def test_a_slot_is_asked_for_its_worker_in_its_block(portal: Portal) -> None:
    with pytest.raises(SlotMisused):
        _ = portal.slot("slots").worker


def test_a_thread_waits_for_a_slot(portal: Portal) -> None:
    order: list[str] = []

    def use(name: str) -> None:
        with portal.slot("slots", wait_timeout=PATIENCE) as slot:
            order.append(name)
            assert slot.worker.current_tasks == 1

    with portal.slot("slots"):
        thread, outcome = in_thread(lambda: use("second"))
        order.append("first")
    thread.join(PATIENCE)
    assert outcome == [None]
    assert order == ["first", "second"]


def test_a_slot_that_is_not_admitted_says_so(portal: Portal) -> None:
    with pytest.raises(UnknownTaskType), portal.slot("slosts"):
        pytest.fail("it was entered")
    supervisor = BackpressureSupervisor(max_queue_size=0)
    supervisor.register_worker("slots", handler=lambda _: None, task_types=["slots"])
    with supervisor.portal() as small, small.slot("slots"), pytest.raises(Overloaded), small.slot("slots"):
        pytest.fail("it was entered")


def test_an_error_of_the_block_is_its_own_and_counts_against_the_worker(portal: Portal) -> None:
    with pytest.raises(ZeroDivisionError), portal.slot("slots") as slot:
        raise ZeroDivisionError
    assert portal.ticket(slot.task_id).result().error == "ZeroDivisionError"
    with pytest.raises(StopIteration), portal.slot("slots") as slot:
        raise StopIteration
    with pytest.raises(KeyboardInterrupt), portal.slot("slots"):
        raise KeyboardInterrupt
    assert portal.run(Task("echo", 7)) == 7


def test_a_block_that_takes_too_long_keeps_its_slot_until_it_is_left(portal: Portal) -> None:
    def take_too_long() -> None:
        with portal.slot("slots", timeout=0.01) as slot:
            thread, outcome = in_thread(lambda: portal.run(Task("slots"), timeout=0.1))
            thread.join(PATIENCE)
            assert type(outcome[0]) is TimeoutError
            assert slot.worker.current_tasks == 1

    with pytest.raises(TaskTimedOut) as caught:
        take_too_long()
    assert portal.run(Task("slots"), timeout=PATIENCE) is None
    assert portal.ticket(caught.value.task_id).result().status is TaskStatus.TIMED_OUT


def test_tasks_of_a_block_have_its_slot() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("one", handler=lambda task: task.payload, task_types=["work"])
    with supervisor.portal() as own:
        with own.slot("work"):
            assert own.run(Task("work", 7), timeout=PATIENCE) == 7
            with pytest.raises(DrainInside):
                own.drain()
        assert own.run(Task("work", 8), timeout=PATIENCE) == 8


def test_a_supervisor_that_stops_ends_the_slot_of_a_thread() -> None:
    supervisor = BackpressureSupervisor(zombie_grace=0.05)
    supervisor.register_worker("slots", handler=lambda _: None, task_types=["slots"])
    entered, leave = threading.Event(), threading.Event()

    def use(portal: Portal) -> None:
        with portal.slot("slots"):
            entered.set()
            assert leave.wait(PATIENCE)

    with supervisor.portal() as portal:
        thread, outcome = in_thread(lambda: use(portal))
        assert entered.wait(PATIENCE)
        report = portal.drain(0.0)
        assert len(report.orphans) == 1
    leave.set()
    thread.join(PATIENCE)
    assert [type(each) for each in outcome] == [TaskCancelled]


def test_a_loop_that_ends_does_not_wait_for_the_slot_of_a_thread() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("slots", handler=lambda _: None, task_types=["slots"])
    entered, leave = threading.Event(), threading.Event()
    threads = []

    def use(portal: Portal) -> None:
        with portal.slot("slots"):
            entered.set()
            assert leave.wait(PATIENCE)

    async def main() -> None:
        await supervisor.start()
        portal = supervisor.portal()
        threads.append(in_thread(lambda: use(portal)))
        while not entered.is_set():  # noqa: ASYNC110 - a thread sets it
            await asyncio.sleep(0.001)

    asyncio.run(main())
    leave.set()
    thread, outcome = threads[0]
    thread.join(PATIENCE)
    assert [type(each) for each in outcome] == [TaskCancelled]


# --- drain, and where it may be called -------------------------------------------------------------------------------


def test_draining_from_a_thread(portal: Portal, latch: Latch) -> None:
    running = portal.submit(Task("latch", 1))
    assert latch.started.wait(PATIENCE)
    thread, outcome = in_thread(lambda: portal.drain(PATIENCE))
    latch.open.set()
    thread.join(PATIENCE)
    assert outcome[0].finished == 1
    assert running.value() == 1
    with pytest.raises(SupervisorClosed):
        portal.submit(Task("echo"))


@pytest.fixture
async def running() -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("echo", handler=lambda task: task.payload, task_types=["echo"])
        yield supervisor


async def test_nothing_blocks_the_loop_of_the_supervisor(running: BackpressureSupervisor) -> None:
    portal = running.portal()
    for call in (
        lambda: portal.find("a"),
        lambda: portal.ticket("a"),
        portal.events,
        portal.drain,
        lambda: portal.slot("echo").__enter__(),
    ):
        with pytest.raises(WouldDeadlock):
            call()


def test_a_failed_task_raises_what_its_ticket_raises(portal: Portal) -> None:
    def fail(_: Task) -> None:
        raise ZeroDivisionError

    portal._supervisor.register_worker("broken", handler=fail, task_types=["broken"])  # type: ignore[attr-defined]
    with pytest.raises(TaskFailed):
        portal.submit(Task("broken")).value(PATIENCE)
