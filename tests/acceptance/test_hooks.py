"""User code at hooks: whatever it raises, whenever it calls back in, no slot, ticket or limit suffers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import pytest
from tests.support.task_plane import Agent, approximately, error_of, now, results, run_ready, virtual

from forebay import (
    BackpressureSupervisor,
    Priority,
    Task,
    TaskResult,
    TaskStatus,
    Ticket,
    Verdict,
    WorkerState,
)
from forebay.adapters import Handler
from forebay.errors import InvalidHandler, InvalidSetting, StoreUnavailable, SupervisorClosed
from forebay.events import Event, TaskStarted, TaskSubmitted
from forebay.overflow import MemoryTaskStore

SLOTS = 2
MAX_CALLBACKS = 30  # of one test


class UnknownBaseException(BaseException):
    """Derived from nothing that code usually catches."""


class UnprintableError(Exception):
    """An exception whose every description fails."""

    def __str__(self) -> str:
        raise SystemExit(4)

    __repr__ = __str__


ERRORS = [
    ValueError("x"),
    UnknownBaseException("x"),
    SystemExit(3),
    GeneratorExit(),
    StopIteration(7),
    StopAsyncIteration(),
    asyncio.CancelledError(),
    MemoryError(),
    RecursionError(),
    UnprintableError(),
]


# --- what a hook may do ----------------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """A supervisor whose hook misbehaves, and what its handlers saw."""

    supervisor: BackpressureSupervisor
    misbehave: Callable[[Fleet], object]
    tickets: list[Ticket]
    at_work: int = 0
    peak: int = 0
    calls: int = 0  # of the hook

    def hook(self, *_: object) -> Any:
        """Stand for any hook: do what the test is about, but not without end."""
        self.calls += 1
        if self.calls <= MAX_CALLBACKS:
            self.misbehave(self)
        return None

    async def async_hook(self, *_: object) -> None:
        """Stand for any hook that is awaited."""
        await asyncio.sleep(0.1)
        self.hook()

    async def work(self, task: Task) -> Any:
        """Work for a second, and count those at work."""
        self.at_work += 1
        self.peak = max(self.peak, self.at_work)
        try:
            await asyncio.sleep(1.0)
        finally:
            self.at_work -= 1
        if task.payload == "fails":
            raise HookedError(self)
        return "result", task.payload


class HookedError(Exception):
    """An exception whose message is a hook."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__()
        self._fleet = fleet

    def __str__(self) -> str:
        self._fleet.hook()
        return "described"


def raising(error: BaseException) -> Callable[[Fleet], NoReturn]:
    """Return what raises `error`."""

    def misbehave(_: Fleet) -> NoReturn:
        raise error

    return misbehave


def recursing(fleet: Fleet) -> None:
    """Recurse until Python stops it."""
    recursing(fleet)


def submitting(fleet: Fleet) -> None:
    """Submit two tasks, as a follow-up would."""
    for _ in range(2):
        fleet.tickets.append(fleet.supervisor.submit_nowait(Task("work", priority=Priority.CRITICAL)))


def cancelling(fleet: Fleet) -> None:
    """Cancel everything that this test has submitted."""
    for ticket in fleet.tickets:
        ticket.cancel()


def submitting_and_cancelling(fleet: Fleet) -> None:
    """Submit a task and cancel it at once."""
    ticket = fleet.supervisor.submit_nowait(Task("work", priority=Priority.CRITICAL))
    fleet.tickets.append(ticket)
    ticket.cancel()


def registering(fleet: Fleet) -> None:
    """Register another worker of another type."""
    name = f"other {len(fleet.supervisor.workers)}"
    fleet.supervisor.register_worker(name, handler=Agent(), task_types=["other"])


def reviving(fleet: Fleet) -> None:
    """Revive every worker."""
    for worker in fleet.supervisor.workers.values():
        worker.revive()


def draining(fleet: Fleet) -> None:
    """Drain the supervisor."""
    asyncio.ensure_future(fleet.supervisor.drain()).add_done_callback(lambda done: done.cancelled() or done.exception())


def closing(fleet: Fleet) -> None:
    """Close the supervisor."""
    asyncio.ensure_future(fleet.supervisor.close()).add_done_callback(lambda done: done.cancelled() or done.exception())


BEHAVIOURS = [
    *(pytest.param(raising(error), id=type(error).__name__) for error in ERRORS),
    *(
        pytest.param(behaviour, id=behaviour.__name__)
        for behaviour in (
            recursing, submitting, cancelling, submitting_and_cancelling, registering, reviving, draining, closing,
        )
    ),
]  # fmt: skip


# --- where a hook may be ---------------------------------------------------------------------------------------------


class Hooked:
    """An agent with the hooks of a Handler."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __forebay_handler__(self) -> Handler:
        return self._handler


def with_sink(misbehave: Callable[[Fleet], object]) -> Fleet:
    """Return a fleet with the hook as an event sink."""
    fleets: list[Fleet] = []
    supervisor = BackpressureSupervisor(on_event=lambda _: fleets[0].hook())
    fleet = Fleet(supervisor, misbehave, [])
    fleets.append(fleet)
    supervisor.register_worker("worker", handler=fleet.work, task_types=["work"], max_concurrent=SLOTS)
    return fleet


def with_hooks(
    misbehave: Callable[[Fleet], object], hooks: Callable[[Fleet], dict[str, Any]], overflow: str | None = None
) -> Fleet:
    """Return a fleet with a Handler that has `hooks`."""
    fleet = Fleet(BackpressureSupervisor(overflow=overflow, max_queue_size=3), misbehave, [])
    handler = Handler(call=fleet.work, **hooks(fleet))
    fleet.supervisor.register_worker("worker", handler=Hooked(handler), task_types=["work"], max_concurrent=SLOTS)
    return fleet


def start_hook(hook: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    """Return an async function that calls `hook` at its end."""

    async def called() -> None:
        await asyncio.sleep(0)
        hook()

    return called


class HookedCodec:
    """A codec whose every method is a hook."""

    def __init__(self, hook: Callable[[], object]) -> None:
        self._hook = hook

    def coerce(self, value: Any) -> Any:
        return value

    def dump(self, value: Any) -> Any:
        if isinstance(value, tuple):  # a result: a payload that cannot be stored is an error of its submitter
            self._hook()
        return value

    def load(self, plain: Any) -> Any:
        self._hook()
        return plain


HOOKS: dict[str, Callable[[Callable[[Fleet], object]], Fleet]] = {
    "sink": with_sink,
    "on_cancel": partial(with_hooks, hooks=lambda fleet: {"on_cancel": fleet.hook}),
    "async on_cancel": partial(with_hooks, hooks=lambda fleet: {"on_cancel": fleet.async_hook}),
    "on_end": partial(with_hooks, hooks=lambda fleet: {"on_end": fleet.hook}),
    "load": partial(with_hooks, hooks=lambda fleet: {"load": lambda kind: fleet.hook(kind) or 0.0}),
    "stop": partial(with_hooks, hooks=lambda fleet: {"stop": start_hook(fleet.hook)}),
    "str of the handler's error": partial(with_hooks, hooks=lambda _: {}),
    "codec": partial(
        with_hooks, hooks=lambda fleet: {"codec": HookedCodec(fleet.hook)}, overflow="memory://?bound=100"
    ),
}


def submit_quietly(fleet: Fleet, payload: Any) -> None:
    """Submit a task, unless the hook has stopped the supervisor."""
    with contextlib.suppress(SupervisorClosed):
        fleet.tickets.append(fleet.supervisor.submit_nowait(Task("work", payload, priority=Priority.CRITICAL)))


@pytest.mark.parametrize("misbehave", BEHAVIOURS)
@pytest.mark.parametrize("hook", HOOKS)
@virtual
async def test_no_hook_costs_a_slot_a_ticket_or_the_limit(hook: str, misbehave: Callable[[Fleet], object]) -> None:
    fleet = HOOKS[hook](misbehave)
    supervisor = fleet.supervisor
    await supervisor.start()
    for payload in ("fails", "ends", "fails", "ends"):
        submit_quietly(fleet, payload)
    await asyncio.sleep(0.5)
    for ticket in fleet.tickets[1:3]:
        ticket.cancel()
    for _ in range(8):  # the last of them spill, if there is an overflow
        try:
            fleet.tickets.append(await supervisor.submit(Task("work", "late")))
        except SupervisorClosed:
            break
    await asyncio.sleep(60.0)
    ended = [ticket for ticket in fleet.tickets if ticket]
    assert all(ticket.done() for ticket in ended)
    worker = supervisor.workers["worker"]
    assert (worker.current_tasks, worker.zombies, worker.pending_claims) == (0, 0, 0)
    assert fleet.peak <= SLOTS
    if misbehave not in (draining, closing) and hook != "load":
        again = [await supervisor.submit(Task("work", number, priority=Priority.CRITICAL)) for number in range(2)]
        if misbehave is not cancelling:
            assert [result.result for result in await results(again)] == [("result", 0), ("result", 1)]
    async with asyncio.timeout(60.0):
        await supervisor.close()
    assert fleet.calls > 0
    assert worker.current_tasks == 0
    statistics = supervisor.statistics()
    ends = statistics.succeeded + statistics.failed + statistics.cancelled + statistics.timed_out + statistics.expired
    assert ends == statistics.admitted + statistics.spilled


# --- event sinks -----------------------------------------------------------------------------------------------------


@virtual
async def test_a_sink_that_submits_never_exceeds_the_limit_of_a_worker() -> None:
    peak = 0
    follow_ups: list[Ticket] = []

    def sink(event: Event) -> None:
        if isinstance(event, TaskSubmitted) and len(follow_ups) < 5:
            follow_ups.append(supervisor.submit_nowait(Task("work")))

    async def work(_: Task) -> None:
        nonlocal peak
        peak = max(peak, supervisor.workers["worker"].current_tasks)
        await asyncio.sleep(1.0)

    async with BackpressureSupervisor(on_event=sink) as supervisor:
        supervisor.register_worker("worker", handler=work, task_types=["work"], max_concurrent=1)
        await supervisor.submit_nowait(Task("work"))
        assert {result.status for result in await results(follow_ups)} == {TaskStatus.SUCCEEDED}
        assert now() == approximately(6.0)
    assert len(follow_ups) == 5
    assert peak == 1


@virtual
async def test_a_sink_that_always_submits_does_not_stop_the_loop() -> None:
    submitted = 0

    def sink(event: Event) -> None:
        nonlocal submitted
        if isinstance(event, TaskSubmitted) and submitted < 5000:
            submitted += 1
            supervisor.submit_nowait(Task("work"))

    async with BackpressureSupervisor(on_event=sink) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        supervisor.submit_nowait(Task("work"))
        await run_ready(100)
        assert 50 <= submitted <= 100


@virtual
async def test_sinks_get_every_event_in_order_and_before_those_who_await_the_task() -> None:
    kinds: list[str] = []

    async with BackpressureSupervisor(on_event=lambda event: kinds.append(event.kind)) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        await supervisor.submit_nowait(Task("work"))
        assert kinds == ["submitted", "started", "finished"]


@virtual
async def test_events_of_code_that_never_waits_do_not_pile_up() -> None:
    received = 0

    def sink(_: Event) -> None:
        nonlocal received
        received += 1

    async with BackpressureSupervisor(on_event=sink, max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        for number in range(1, 10_000):
            supervisor.submit_nowait(Task("work"))
            assert number + 1 - received <= 1002  # the task that was admitted has started, too
    assert received == 10_001


@virtual
async def test_what_a_sink_submits_is_no_child_of_the_task_in_the_event() -> None:
    parents: list[object] = []

    def sink(event: Event) -> None:
        if isinstance(event, TaskStarted) and not parents:
            parents.append(supervisor.submit_nowait(Task("work")).parent)

    async with BackpressureSupervisor(on_event=sink) as supervisor:
        supervisor.register_worker("parents", handler=lambda _: None, task_types=["parent"], engine="loop")
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        await supervisor.submit_nowait(Task("parent"))
        await run_ready()
    assert parents == [None]


@virtual
async def test_the_last_events_reach_the_sinks_before_close_returns() -> None:
    kinds: list[str] = []
    supervisor = BackpressureSupervisor(on_event=lambda event: kinds.append(event.kind))
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    await supervisor.start()
    supervisor.submit_nowait(Task("work"))
    await supervisor.close()
    assert kinds == ["submitted", "started", "finished"]


async def async_sink(_: Event) -> None:
    """Do nothing."""


class AsyncSink:
    """An object whose call is async."""

    async def __call__(self, _: Event) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    "sink",
    [async_sink, partial(async_sink), AsyncSink(), [print, async_sink]],
    ids=["function", "partial", "object", "list"],
)
def test_an_async_sink_is_refused(sink: Any) -> None:
    with pytest.raises(InvalidSetting, match="plain function"):
        BackpressureSupervisor(on_event=sink)


@pytest.mark.parametrize("engine", [None, "thread", "process"])
@pytest.mark.parametrize("hook", ["on_end", "load"])
def test_an_async_hook_of_a_handler_that_nothing_awaits_is_refused(hook: str, engine: str | None) -> None:
    supervisor = BackpressureSupervisor()
    handler = Hooked(Handler(call=Agent(), **{hook: async_sink}))  # type: ignore[arg-type]
    with pytest.raises(InvalidHandler, match=f"{hook} of its Handler is an async function"):
        supervisor.register_worker("worker", handler=handler, task_types=["work"], engine=engine)


@virtual
async def test_on_end_of_agents_that_a_factory_makes_is_called_too() -> None:
    ended: list[object] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker(
            "worker", factory=lambda: Hooked(Handler(call=Agent(), on_end=ended.append)), task_types=["work"]
        )
        task = Task("work")
        await supervisor.submit_nowait(task)
        await run_ready()
    assert ended == [task]


@virtual
async def test_an_awaitable_that_a_plain_hook_returns_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def forgotten() -> None:
        """Do nothing."""

    handler = Handler(call=Agent(), on_end=lambda _: forgotten())  # type: ignore[arg-type]
    async with BackpressureSupervisor(on_event=lambda _: forgotten()) as supervisor:  # type: ignore[arg-type]
        supervisor.register_worker("worker", handler=Hooked(handler), task_types=["work"])
        await supervisor.submit_nowait(Task("work"))
    messages = [record.getMessage() for record in caplog.records]
    assert any("event sink" in message and "plain function" in message for message in messages)
    assert any("on_end of worker 'worker'" in message and "plain function" in message for message in messages)


@virtual
async def test_a_failing_hook_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Task) -> NoReturn:
        raise UnprintableError

    async with BackpressureSupervisor() as supervisor:
        handler = Handler(call=Agent(), on_end=broken)
        supervisor.register_worker("worker", handler=Hooked(handler), task_types=["work"])
        await supervisor.submit_nowait(Task("work"))
        await run_ready()
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "on_end of worker 'worker' raised UnprintableError; the supervisor goes on"


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loop() -> Any:
    """An event loop without asyncio's own handling of Ctrl-C, as ``run_until_complete`` is used."""
    made = asyncio.new_event_loop()
    yield made
    made.close()


class PressOnce:
    """Presses Ctrl-C at its first call."""

    def __init__(self) -> None:
        self._pressed = False

    def __call__(self, *_: object) -> None:
        if not self._pressed:
            self._pressed = True
            signal.raise_signal(signal.SIGINT)


class InterruptingError(Exception):
    """An exception whose description presses Ctrl-C."""

    def __str__(self) -> str:
        PressOnce()()
        return ""


async def interrupted(task: Task) -> Any:
    """Do what the payload says."""
    await asyncio.sleep(0)
    match task.payload:
        case "handler":
            PressOnce()()
        case "str of an error":
            raise InterruptingError
        case "on_cancel":
            await asyncio.sleep(60.0)
    return task.payload


@pytest.mark.parametrize("hook", ["handler", "sink", "on_cancel", "on_end", "str of an error"])
def test_ctrl_c_leaves_the_loop_once_everything_is_in_order(hook: str, loop: asyncio.AbstractEventLoop) -> None:
    press = PressOnce()
    supervisor = BackpressureSupervisor(on_event=press if hook == "sink" else ())
    handler = Handler(
        call=interrupted,
        on_cancel=press if hook == "on_cancel" else None,
        on_end=press if hook == "on_end" else None,
    )
    supervisor.register_worker("worker", handler=Hooked(handler), task_types=["work"])
    tickets: list[Ticket] = []

    async def main() -> None:
        await supervisor.start()
        tickets.extend(supervisor.submit_nowait(Task("work", payload)) for payload in (hook, "second"))
        await asyncio.sleep(0.01)
        tickets[0].cancel()
        await asyncio.sleep(5.0)

    async def go_on() -> list[TaskResult]:
        async with asyncio.timeout(5.0):
            ended = await results(tickets)
            await supervisor.close()
        return ended

    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(main())
    first, second = loop.run_until_complete(go_on())
    statuses = {
        "handler": TaskStatus.CANCELLED,
        "on_cancel": TaskStatus.CANCELLED,
        "str of an error": TaskStatus.FAILED,
    }
    assert first.status is statuses.get(hook, TaskStatus.SUCCEEDED)
    assert second.result == "second"
    assert supervisor.workers["worker"].current_tasks == 0
    assert supervisor.workers["worker"].state is WorkerState.IDLE


# --- a task store of the user's own ----------------------------------------------------------------------------------


class BrokenStore(MemoryTaskStore):
    """A store with a bug in one method."""

    def __init__(self, method: str) -> None:
        super().__init__()

        async def broken(*_: Any, **__: Any) -> NoReturn:
            await asyncio.sleep(1.0)
            raise LookupError

        setattr(self, method, broken)


@pytest.mark.parametrize("method", ["begin_attempt", "finish"])
@virtual
async def test_a_store_that_raises_costs_no_slot_and_no_ticket(method: str) -> None:
    async with BackpressureSupervisor(overflow=BrokenStore(method), max_queue_size=0) as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        tickets = [await supervisor.submit(Task("work", number)) for number in range(3)]
        assert [ticket.verdict for ticket in tickets] == [Verdict.ADMITTED, Verdict.SPILLED, Verdict.SPILLED]
        assert [result.result for result in await results(tickets)] == [0, 1, 2]
        assert worker.current_tasks == 0


@virtual
async def test_a_store_that_raises_as_it_stores_a_task_ends_its_ticket() -> None:
    async with BackpressureSupervisor(overflow=BrokenStore("put"), max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        supervisor.submit_nowait(Task("work"))
        task = Task("work", task_id="a")
        submitting = asyncio.ensure_future(supervisor.submit(task))
        await run_ready()
        waiting = asyncio.ensure_future(supervisor.ticket("a").value())
        assert isinstance(await error_of(submitting), LookupError)
        assert isinstance(await error_of(waiting), StoreUnavailable)
