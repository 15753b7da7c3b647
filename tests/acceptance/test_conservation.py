"""Whatever happens in whatever order: every task ends exactly once, every slot is returned, and the counts add up.

Scripts are drawn at random, for the callers and for the handlers, and run in virtual time. A failure prints the script.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings
from tests.support.supervisor_checks import check_supervisor, check_task_ends
from tests.support.task_plane import results, run_ready, virtual
from tests.support.task_stores import DURABLE_STORES, OVERFLOWS, StoreBackend, overflow_url

from forebay import (
    BackpressureSupervisor,
    Deadline,
    ForebayError,
    Priority,
    Task,
    Ticket,
    progress,
)
from forebay.errors import SupervisorClosed
from forebay.simulation import simulate, virtual_loop
from forebay.testing import EventRecord, SlowHandler

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

KINDS = ("a", "b")

# --- what handlers do ------------------------------------------------------------------------------------------------

MOMENTS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0])
LEAVES = st.one_of(
    st.tuples(st.just("sleep"), MOMENTS),
    st.tuples(st.just("raise"), MOMENTS),
    st.tuples(st.just("stubborn"), MOMENTS),
    st.tuples(st.just("give up"), MOMENTS),
    st.just(("progress",)),
)


def nested(plans: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.tuples(st.just("run"), st.sampled_from(KINDS), plans),
        st.tuples(st.just("leave"), st.sampled_from(KINDS), plans),
        st.tuples(st.just("follow"), st.sampled_from(KINDS), plans),
        st.tuples(st.just("slot"), st.sampled_from(KINDS), plans),
        st.tuples(st.just("together"), plans, plans),
        st.tuples(st.just("in turn"), plans, plans),
    )


def unruly(plans: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        nested(plans),
        st.tuples(st.just("within"), MOMENTS, plans),
        st.tuples(st.just("insist"), plans, plans),
    )


PLANS = st.recursive(LEAVES, unruly, max_leaves=6)
PEACEFUL_PLANS = st.recursive(st.tuples(st.just("sleep"), MOMENTS), nested, max_leaves=8)


class HandlerError(Exception):
    """An error that a handler raises on purpose."""


async def carry_out(supervisor: BackpressureSupervisor, plan: Any) -> None:  # noqa: C901, PLR0912 - a small language
    """Do what the plan says; an overload in a nested call does not fail the plan."""
    again = functools.partial(carry_out, supervisor)
    match plan:
        case ("sleep", seconds):
            await asyncio.sleep(seconds)
        case ("raise", seconds):
            await asyncio.sleep(seconds)
            raise HandlerError
        case ("stubborn", seconds):
            due = asyncio.get_running_loop().time() + seconds
            while (left := due - asyncio.get_running_loop().time()) > 0:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(left)
        case ("give up", seconds):
            await asyncio.sleep(seconds)
            raise asyncio.CancelledError
        case ("progress",):
            progress("going on")
        case ("run", kind, inner):
            await supervisor.run(Task(kind, inner))
        case ("leave", kind, inner):
            await supervisor.submit(Task(kind, inner))
        case ("follow", kind, inner):
            ticket = await supervisor.submit(Task(kind, inner))
            async for _ in ticket.events():
                await asyncio.sleep(0.01)
        case ("slot", kind, inner):
            async with supervisor.slot(kind):
                await again(inner)
        case ("together", first, second):
            await asyncio.gather(again(first), again(second))
        case ("in turn", first, second):
            await again(first)
            await again(second)
        case ("within", seconds, inner):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await again(inner)
        case ("insist", first, second):
            try:
                await again(first)
            except asyncio.CancelledError:
                await again(second)


# --- what callers do -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A task, how it is submitted, and when its caller gives up."""

    at: float
    kind: str
    plan: Any
    by: str  # submit, nowait, run or slot
    priority: Priority
    timeout: float | None
    deadline: float | None
    thread_id: str | None
    key: str | None
    leaves_after: float | None  # cancels itself
    cancels_after: float | None  # cancels the ticket


SUBMISSIONS = st.builds(
    Submission,
    at=st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 2.0, 5.0]),
    kind=st.sampled_from(KINDS),
    plan=PLANS,
    by=st.sampled_from(["submit", "submit", "nowait", "run", "slot"]),
    priority=st.sampled_from(Priority),
    timeout=st.sampled_from([None, 0.2, 1.0, 5.0]),
    deadline=st.sampled_from([None, None, 0.3, 2.0, 20.0]),
    thread_id=st.sampled_from([None, None, "t"]),
    key=st.sampled_from([None, None, None, "k"]),
    leaves_after=st.sampled_from([None, None, 0.0, 0.001, 0.5, 1.0]),
    cancels_after=st.sampled_from([None, None, 0.0, 0.002, 0.7, 2.0]),
)


@dataclass(frozen=True)
class Script:
    """A supervisor, the tasks that are submitted to it, and how it ends."""

    slots: tuple[int, int]
    shared: bool
    nested: bool  # the second worker is a supervisor
    queue_size: int | None
    overflow: tuple[StoreBackend | None, int]  # with its bound
    reset_timeout: float | None
    submissions: list[Submission]
    ends_at: float
    end: str  # drain, close, fail, drain twice, close in drain
    seed: int


SCRIPTS = st.builds(
    Script,
    slots=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    shared=st.booleans(),
    nested=st.booleans(),
    queue_size=st.sampled_from([None, 0, 1, 3]),
    overflow=st.tuples(st.sampled_from([None, *OVERFLOWS]), st.sampled_from([2, 10_000])),
    reset_timeout=st.sampled_from([None, 0.5, 10.0]),
    submissions=st.lists(SUBMISSIONS, min_size=1, max_size=8),
    ends_at=st.sampled_from([0.0, 0.002, 0.5, 1.0, 4.0, 60.0]),
    end=st.sampled_from(["drain", "close", "fail", "drain twice", "close in drain", "impatient drain"]),
    seed=st.integers(0, 1000),
)


async def submit(supervisor: BackpressureSupervisor, planned: Submission, tickets: list[Ticket]) -> None:
    await asyncio.sleep(planned.at)
    options: dict[str, Any] = {"priority": planned.priority, "timeout": planned.timeout, "thread_id": planned.thread_id}
    if planned.deadline is not None:
        options["deadline"] = Deadline.within(planned.deadline)
    task = Task(planned.kind, planned.plan, key=planned.key, **options)
    with contextlib.suppress(ForebayError):
        match planned.by:
            case "submit" | "nowait":
                ticket = supervisor.submit_nowait(task) if planned.by == "nowait" else await supervisor.submit(task)
                tickets.append(ticket)
                if planned.cancels_after is not None:
                    await asyncio.sleep(planned.cancels_after)
                    ticket.cancel()
                await ticket
            case "run":
                await supervisor.run(task)
            case _:
                async with supervisor.slot(planned.kind, **options):
                    await carry_out(supervisor, planned.plan)


async def with_patience(planned: Submission, submission: Awaitable[None]) -> None:
    with contextlib.suppress(TimeoutError, HandlerError, asyncio.CancelledError):
        async with asyncio.timeout(None if planned.leaves_after is None else planned.at + planned.leaves_after):
            await submission


async def leave(supervisor: BackpressureSupervisor, how: str) -> None:
    match how:
        case "drain":
            await supervisor.drain()
        case "fail":
            await supervisor.__aexit__(ValueError, ValueError(), None)
        case "drain twice":
            await asyncio.gather(supervisor.drain(), supervisor.drain(timeout=1.0))
        case "close in drain":
            draining = asyncio.ensure_future(supervisor.drain())
            await asyncio.sleep(0.3)
            await supervisor.close()
            await draining
        case "impatient drain":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.7):
                    await supervisor.drain()
    await supervisor.close()


def add_workers(
    supervisor: BackpressureSupervisor, slots: tuple[int, int], *, shared: bool, nest: bool, **options: Any
) -> None:
    """Register two workers, for one task type each or both for both; the second may be a nested supervisor."""

    async def handler(task: Task) -> None:
        await carry_out(supervisor, task.payload)

    first, second = (KINDS, KINDS) if shared else (KINDS[:1], KINDS[1:])
    supervisor.register_worker("w1", handler=handler, task_types=first, max_concurrent=slots[0], **options)
    if nest:
        inner = BackpressureSupervisor(max_queue_size=1000)
        inner.register_worker("below", handler=handler, task_types=second, **options)
        supervisor.register_worker("w2", handler=inner, task_types=second, max_concurrent=slots[1], **options)
    else:
        supervisor.register_worker("w2", handler=handler, task_types=second, max_concurrent=slots[1], **options)


async def play(script: Script, directory: Path) -> None:
    backend, bound = script.overflow
    overflow = overflow_url(backend, directory, bound=bound)
    supervisor = BackpressureSupervisor(max_queue_size=script.queue_size, overflow=overflow, zombie_grace=0.5)
    record = EventRecord(supervisor)
    add_workers(
        supervisor,
        script.slots,
        shared=script.shared,
        nest=script.nested,
        reset_timeout=script.reset_timeout,
        timeout=8.0,
    )
    await supervisor.start()
    tickets: list[Ticket] = []
    callers = [
        asyncio.ensure_future(with_patience(planned, submit(supervisor, planned, tickets)))
        for planned in script.submissions
    ]
    await asyncio.sleep(script.ends_at)
    await leave(supervisor, script.end)
    await asyncio.wait(callers)
    await asyncio.sleep(30.0)  # whatever is stubborn ends

    check_supervisor(record, tickets=tickets, nested=True)
    if backend in DURABLE_STORES:
        await check_the_rest_runs_next_time(str(overflow), record)
    assert virtual_loop().pending() == [asyncio.current_task()]


async def check_the_rest_runs_next_time(overflow: str, before: EventRecord) -> None:
    """Check that the next supervisor ends what the last one accepted and did not end: all of it, and nothing else."""
    supervisor = BackpressureSupervisor(overflow=overflow, lease=3.0)
    supervisor.register_worker("next", handler=SlowHandler(0.0), task_types=KINDS, max_concurrent=3)
    record = EventRecord(supervisor)
    async with supervisor:
        await asyncio.sleep(100.0)  # leases that were not returned lapse
        assert supervisor.statistics().outside == 0
    check_task_ends(before, record, left=0)
    assert set(record.results) <= {event.task_id for event in before.submitted}


# A run that lent its slot, and goes on after the close.
SUSPENDED_AT_CLOSE = Script(
    slots=(1, 1),
    shared=False,
    nested=False,
    queue_size=None,
    overflow=(None, 2),
    reset_timeout=None,
    submissions=[
        Submission(
            at=0.0,
            kind="a",
            plan=("slot", "a", ("insist", ("sleep", 0.1), ("sleep", 0.5))),
            by="submit",
            priority=Priority.NORMAL,
            timeout=None,
            deadline=None,
            thread_id=None,
            key=None,
            leaves_after=None,
            cancels_after=None,
        )
    ],
    ends_at=0.002,
    end="close",
    seed=0,
)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS)
@example(script=SUSPENDED_AT_CLOSE)
def test_every_task_ends_once_every_slot_is_returned_and_the_counts_add_up(
    script: Script, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("spill") if script.overflow[0] in DURABLE_STORES else Path()
    simulate(lambda: play(script, directory), seed=script.seed)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    plans=st.lists(st.tuples(st.sampled_from(KINDS), PEACEFUL_PLANS), min_size=1, max_size=6),
    slots=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    shared=st.booleans(),
    nest=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nested_work_of_any_shape_finishes_with_any_number_of_slots(
    plans: list[tuple[str, Any]], slots: tuple[int, int], seed: int, *, shared: bool, nest: bool
) -> None:
    async def main() -> None:
        async with BackpressureSupervisor(max_queue_size=1000) as supervisor:
            add_workers(supervisor, slots, shared=shared, nest=nest, timeout=1e5)
            tickets = [supervisor.submit_nowait(Task(kind, plan)) for kind, plan in plans]
            assert all(result.success for result in await results(tickets))
            await supervisor.drain()
            assert supervisor.statistics().timed_out == 0
            assert supervisor.statistics().running == 0

    simulate(main, seed=seed)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    plans=st.lists(st.tuples(st.sampled_from(KINDS), PEACEFUL_PLANS), min_size=1, max_size=6),
    slots=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    queue_size=st.integers(0, 3),
    durable=st.booleans(),
    nest=st.booleans(),
    drain_at=st.sampled_from([0.0, 0.001, 0.003, 0.1, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_draining_ends_nested_work_wherever_it_waits(  # noqa: PLR0913 - all that may vary
    tmp_path_factory: pytest.TempPathFactory,
    *,
    plans: list[tuple[str, Any]],
    slots: tuple[int, int],
    queue_size: int,
    drain_at: float,
    seed: int,
    durable: bool,
    nest: bool,
) -> None:
    overflow = f"sqlite:///{tmp_path_factory.mktemp('spill')}/s.db?fsync=no"

    async def main() -> None:
        async with BackpressureSupervisor(max_queue_size=queue_size, overflow=overflow) as supervisor:
            add_workers(supervisor, slots, shared=True, nest=nest, timeout=1e5)
            submissions = [supervisor.submit(Task(kind, plan, durable=durable)) for kind, plan in plans]
            offering = asyncio.gather(*submissions)
            await asyncio.sleep(drain_at)
            started = asyncio.get_running_loop().time()
            await supervisor.drain()
            assert asyncio.get_running_loop().time() - started < 100.0
            await asyncio.wait([offering])

    with contextlib.suppress(SupervisorClosed):  # it drained before some were submitted
        simulate(main, seed=seed)


# --- memory ----------------------------------------------------------------------------------------------------------


class Payload:
    """An object that a weak reference can watch."""


async def succeeds(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await supervisor.submit_nowait(Task("work", payload))


async def is_awaited_by_run(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await supervisor.run(Task("work", payload))


async def fails(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await supervisor.submit_nowait(Task("fail", payload))


async def times_out(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await supervisor.submit_nowait(Task("work", payload, timeout=0.1))


async def is_a_zombie(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await supervisor.submit_nowait(Task("uncancellable", payload, timeout=0.1))
    await asyncio.sleep(20.0)


async def is_cancelled_in_line(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    tickets = [supervisor.submit_nowait(Task("work", payload, deadline=Deadline.within(60.0))) for _ in range(3)]
    tickets[-1].cancel()
    await results(tickets)


async def expires_in_line(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    tickets = [supervisor.submit_nowait(Task("work", payload, deadline=Deadline.within(1.5))) for _ in range(3)]
    await results(tickets)


async def is_rejected(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    while supervisor.submit_nowait(Task("work", payload)):
        pass
    await asyncio.sleep(20.0)


async def has_a_key(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await supervisor.submit_nowait(Task("work", payload, key="k"))
    for number in range(40):  # keys are remembered for a little longer
        await supervisor.run(Task("quick", key=f"k{number}"))


async def has_a_thread(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await results([supervisor.submit_nowait(Task("work", payload, thread_id="t")) for _ in range(3)])


async def is_listened_to(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    async for _ in supervisor.submit_nowait(Task("work", payload)).events():
        pass


async def is_above_others(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    await supervisor.submit_nowait(Task("parent", payload))


async def is_held_by_a_slots_caller(supervisor: BackpressureSupervisor, payload: Payload) -> None:
    async def caller(_: Payload) -> None:
        async with supervisor.slot("work"):
            await asyncio.sleep(0.1)

    await asyncio.get_running_loop().create_task(caller(payload))


SCENARIOS: list[Callable[[BackpressureSupervisor, Payload], Coroutine[Any, Any, None]]] = [
    succeeds,
    is_awaited_by_run,
    fails,
    times_out,
    is_a_zombie,
    is_cancelled_in_line,
    expires_in_line,
    is_rejected,
    has_a_key,
    has_a_thread,
    is_listened_to,
    is_above_others,
    is_held_by_a_slots_caller,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@virtual
async def test_nothing_keeps_a_task_alive_once_its_result_is_no_longer_kept(
    scenario: Callable[[BackpressureSupervisor, Payload], Coroutine[Any, Any, None]],
) -> None:
    async with BackpressureSupervisor(keep_results=1, max_queue_size=6) as supervisor:

        async def parent(_: Task) -> None:
            await supervisor.run(Task("quick"))
            await supervisor.submit(Task("quick"))

        async def works(_: Task) -> None:
            await asyncio.sleep(1.0)

        async def breaks(_: Task) -> None:
            raise HandlerError

        async def ignores_cancellation(task: Task) -> None:
            await carry_out(supervisor, ("stubborn", 10.0))
            del task

        supervisor.register_worker("worker", handler=works, task_types=["work"])
        supervisor.register_worker("quick", handler=works, task_types=["quick"], max_concurrent=100)
        supervisor.register_worker("fails", handler=breaks, task_types=["fail"])
        supervisor.register_worker(
            "uncancellable", handler=ignores_cancellation, task_types=["uncancellable"], reset_timeout=1.0
        )
        supervisor.register_worker("parent", handler=parent, task_types=["parent"])
        payload = Payload()
        alive = weakref.ref(payload)
        await scenario(supervisor, payload)
        del payload
        await asyncio.sleep(15.0)
        await supervisor.run(Task("quick"))
        gc.collect()
        assert alive() is None


@virtual
async def test_a_task_that_submits_its_successor_does_not_keep_its_ancestors_alive() -> None:
    alive: list[weakref.ref[Payload]] = []

    async def tick(task: Task) -> None:
        number, _ = task.payload
        payload = Payload()
        alive.append(weakref.ref(payload))
        if number:
            await supervisor.submit(Task("tick", (number - 1, payload)))

    async with BackpressureSupervisor(keep_results=1) as supervisor:
        supervisor.register_worker("worker", handler=tick, task_types=["tick"])
        await supervisor.submit(Task("tick", (200, Payload())))
        await asyncio.sleep(1.0)
        gc.collect()
        assert len(alive) == 201
        assert sum(reference() is not None for reference in alive) <= 3


# --- cancelled at any moment -----------------------------------------------------------------------------------------


async def do_submit(supervisor: BackpressureSupervisor) -> None:
    await supervisor.submit(Task("work", 0.01, task_id="mine"))


async def do_submit_keyed(supervisor: BackpressureSupervisor) -> None:
    await supervisor.submit(Task("work", 0.01, task_id="mine", key="k"))


async def do_run(supervisor: BackpressureSupervisor) -> None:
    await supervisor.run(Task("work", 0.01, task_id="mine"))


async def do_hold_a_slot(supervisor: BackpressureSupervisor) -> None:
    with contextlib.suppress(ForebayError):
        async with supervisor.slot("work"):
            await asyncio.sleep(0.003)


async def do_wait(supervisor: BackpressureSupervisor) -> None:
    with contextlib.suppress(ForebayError):
        await (await supervisor.submit(Task("work", 0.01, task_id="mine")))


async def do_listen(supervisor: BackpressureSupervisor) -> None:
    with contextlib.suppress(ForebayError):
        async for _ in (await supervisor.submit(Task("work", 0.01, task_id="mine"))).events():
            pass


async def do_run_nested(supervisor: BackpressureSupervisor) -> None:
    await supervisor.run(Task("parent", task_id="mine"))


async def do_drain(supervisor: BackpressureSupervisor) -> None:
    await supervisor.drain(timeout=0.02)


async def do_close(supervisor: BackpressureSupervisor) -> None:
    await supervisor.close()


DEEDS = [do_submit, do_submit_keyed, do_run, do_hold_a_slot, do_wait, do_listen, do_run_nested, do_drain, do_close]


@pytest.mark.parametrize("full", [False, True], ids=["free", "full"])
@pytest.mark.parametrize("overflow", OVERFLOWS, ids=str)
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_a_cancellation_at_any_moment_leaves_the_supervisor_consistent(
    deed: Callable[[BackpressureSupervisor], Coroutine[Any, Any, None]],
    overflow: StoreBackend | None,
    tmp_path: Path,
    *,
    full: bool,
) -> None:
    async def main(moment: int) -> None:
        directory = tmp_path / str(moment)
        directory.mkdir()
        supervisor = BackpressureSupervisor(max_queue_size=1, overflow=overflow_url(overflow, directory))
        record = EventRecord(supervisor)

        async def works(task: Task) -> None:
            await asyncio.sleep(task.payload)

        async def parent(_: Task) -> None:
            await supervisor.run(Task("work", 0.01))

        supervisor.register_worker("worker", handler=works, task_types=["work"])
        supervisor.register_worker("parent", handler=parent, task_types=["parent"])
        await supervisor.start()
        tickets = [await supervisor.submit(Task("work", 0.005)) for _ in range(4 if full else 0)]
        doing = asyncio.ensure_future(deed(supervisor))
        if moment < 12:
            await run_ready(moment)
        else:
            await asyncio.sleep(0.0007 * (moment - 12))
        doing.cancel()
        await asyncio.wait([doing])
        await asyncio.sleep(1.0)
        assert supervisor.statistics().running == 0
        with contextlib.suppress(SupervisorClosed):  # it was drained or closed
            assert (await supervisor.submit_nowait(Task("work", 0.01))).success
        await supervisor.close()
        check_supervisor(record, tickets=tickets, nested=True)
        assert virtual_loop().pending() == [asyncio.current_task()]

    for moment in range(0, 40, 2):
        simulate(lambda moment=moment: main(moment), seed=moment)  # type: ignore[misc]
