"""Handlers see a copy of the context variables of whoever submitted their task, in another process the carried ones."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from tests.support.task_plane import Agent, run_ready, virtual

from forebay import BackpressureSupervisor, Task, Verdict, carried_context, carry
from forebay.errors import InvalidSetting, NotSerializable

pytestmark = pytest.mark.blocks  # in virtual time the thread of SQLite is the loop's own

note: contextvars.ContextVar[Any] = contextvars.ContextVar("note", default="blank")


async def read(_: Task) -> Any:
    return note.get()


def read_in_thread(_: Task) -> Any:
    return note.get()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test registers."""
    monkeypatch.setattr(carried_context, "_variables", {})
    yield
    note.set("blank")


# --- in the process of the submitter ---


@pytest.mark.parametrize("handler", [read, read_in_thread], ids=["async", "thread"])
@virtual
async def test_a_handler_sees_the_context_of_its_submitter(handler: Any) -> None:
    note.set("of the start")
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])

        async def submit(value: str) -> Any:
            note.set(value)
            return await supervisor.run(Task("work"))

        assert await asyncio.gather(*map(submit, "abc")) == ["a", "b", "c"]


@virtual
async def test_a_task_that_waits_sees_the_context_of_the_moment_of_its_submission() -> None:
    agent = Agent(1.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("busy", handler=agent, task_types=["other", "work"])
        supervisor.submit_nowait(Task("other"))
        supervisor.register_worker("reader", handler=read, task_types=["note"])
        note.set("then")
        ticket = await supervisor.submit(Task("note"))
        note.set("now")
        assert await ticket.value() == "then"


@virtual
async def test_what_a_handler_sets_is_seen_by_no_other_task_of_a_submitter_without_variables() -> None:
    async def swap(task: Task) -> Any:
        seen = note.get()
        note.set(task.payload)
        return seen

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=swap, task_types=["work"])
        tickets = [contextvars.Context().run(supervisor.submit_nowait, Task("work", value)) for value in "abc"]
        assert [await ticket.value() for ticket in tickets] == ["blank", "blank", "blank"]


@virtual
async def test_nested_tasks_see_what_their_parent_has_set() -> None:
    async with BackpressureSupervisor() as supervisor:

        async def parent(_: Task) -> Any:
            note.set("of the parent")
            return await supervisor.run(Task("child"))

        supervisor.register_worker("parent", handler=parent, task_types=["parent"])
        supervisor.register_worker("child", handler=read, task_types=["child"])
        assert await supervisor.run(Task("parent")) == "of the parent"
        assert note.get() == "blank"


@virtual
async def test_an_ended_ticket_holds_nothing_of_its_context() -> None:
    class Large:
        pass

    async def handler(_: Task) -> bool:
        return isinstance(note.get(), Large)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])

        async def submit() -> weakref.ref[Large]:
            note.set(Large())
            assert await supervisor.run(Task("work", task_id="kept"))
            return weakref.ref(note.get())

        large = await asyncio.create_task(submit())
        await run_ready()
        gc.collect()
        assert supervisor.ticket("kept").done()
        assert large() is None


# --- in another process ---


def file_of(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/spill.db"


async def spill(overflow: str, value: Any) -> str:
    """Store a task whose submitter has set the variable to `value`; return its id."""
    async with BackpressureSupervisor(overflow=overflow, max_queue_size=0) as supervisor:
        supervisor.register_worker("busy", handler=Agent(1e3), task_types=["note"])
        supervisor.submit_nowait(Task("note", spill=False))
        note.set(value)
        ticket = await supervisor.submit(Task("note"))
        assert ticket.verdict is Verdict.SPILLED
        note.set("later")
        await supervisor.drain(0)
        return ticket.task_id


async def run_stored(overflow: str, task_id: str, handler: Any = read) -> Any:
    """Run a stored task in another supervisor, and return its value."""
    note.set("of the other process")
    async with BackpressureSupervisor(overflow=overflow) as supervisor:
        supervisor.register_worker("reader", handler=handler, task_types=["note"])
        ticket = await supervisor.find(task_id)
        assert ticket is not None
        return await ticket.value()


@virtual
async def test_a_registered_variable_goes_with_a_stored_task(tmp_path: Path) -> None:
    carry(note)
    task_id = await spill(file_of(tmp_path), {"tenant": "acme", "tags": ["a", ("b", 1)]})
    assert await run_stored(file_of(tmp_path), task_id) == {"tenant": "acme", "tags": ["a", ("b", 1)]}


@virtual
async def test_a_variable_that_is_not_registered_stays_in_its_process(tmp_path: Path) -> None:
    task_id = await spill(file_of(tmp_path), "mine")
    assert await run_stored(file_of(tmp_path), task_id) == "of the other process"


@virtual
async def test_a_variable_that_the_other_process_does_not_know_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry(note, name="old name")
    task_id = await spill(file_of(tmp_path), "mine")
    monkeypatch.setattr(carried_context, "_variables", {})
    assert await run_stored(file_of(tmp_path), task_id) == "of the other process"


@virtual
async def test_a_queued_task_that_a_drain_stores_keeps_its_context(tmp_path: Path) -> None:
    carry(note)
    supervisor = BackpressureSupervisor(overflow=file_of(tmp_path))
    async with supervisor:
        supervisor.register_worker("busy", handler=Agent(1e3), task_types=["note"])
        await supervisor.submit(Task("note", spill=False))
        note.set("queued")
        ticket = await supervisor.submit(Task("note"))
        note.set("drained")
        await supervisor.drain(0)
    assert await run_stored(file_of(tmp_path), ticket.task_id) == "queued"


@virtual
async def test_the_trace_context_goes_with_a_stored_task(tmp_path: Path) -> None:
    span = trace.SpanContext(0x1234, 0x5678, is_remote=False, trace_flags=trace.TraceFlags(1))
    attached = otel_context.attach(trace.set_span_in_context(trace.NonRecordingSpan(span)))
    try:
        task_id = await spill(file_of(tmp_path), None)
    finally:
        otel_context.detach(attached)

    async def trace_id(_: Task) -> int:
        return trace.get_current_span().get_span_context().trace_id

    assert await run_stored(file_of(tmp_path), task_id, trace_id) == 0x1234


@virtual
async def test_a_value_that_cannot_be_stored_is_an_error_at_submit(tmp_path: Path) -> None:
    carry(note)
    note.set(object())
    async with BackpressureSupervisor(overflow=file_of(tmp_path)) as supervisor:
        supervisor.register_worker("reader", handler=read, task_types=["note"])
        with pytest.raises(NotSerializable, match=r"at context\.note it holds a object"):
            await supervisor.submit(Task("note"))
        assert await supervisor.run(Task("note", spill=False)) is note.get()


async def test_a_registered_variable_reaches_a_process_of_its_own() -> None:
    from tests.support import carried_variable  # noqa: PLC0415 - registers its variable, as a user's module would

    carry(carried_variable.account)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("reader", handler=carried_variable.read, task_types=["note"], engine="process")
        carried_variable.account.set("acme")
        assert await supervisor.run(Task("note")) == "acme"


# --- registration ---


def test_what_is_no_variable_cannot_be_carried() -> None:
    with pytest.raises(InvalidSetting, match=r"carry was given variable='note'; it must be a contextvars\.ContextVar"):
        carry("note")  # type: ignore[arg-type]


def test_two_variables_of_one_name_need_names_of_their_own() -> None:
    other: contextvars.ContextVar[str] = contextvars.ContextVar("note")
    carry(note)
    carry(note)
    with pytest.raises(InvalidSetting, match="a name that no other variable has: pass name="):
        carry(other)
    carry(other, name="other note")


def test_too_many_variables_are_an_error() -> None:
    for number in range(100):
        carry(contextvars.ContextVar(f"variable {number}"))
    with pytest.raises(InvalidSetting, match="one of at most 100 variables"):
        carry(note)
